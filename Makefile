# The commands of this project. Each sets up .venv first if it must; only Python 3.11+ has to be there.
#   make serve [PORT=8123] [HOST=0.0.0.0]    the bundled demo over HTTP
#   make test                                all tests
#   make check                               format, lint and types
#   make demo                                remakes the demo models from nothing (under an hour)
#   make study                               asks how well networks carry over (a night on two cores)
#   make bench [QUESTION=prefill] [OUT=...]  measures this machine: tokens per second, or what else is asked
# BUILD=cpu or BUILD=gpu overrides what is found on this machine.
HOST ?= 127.0.0.1
PORT ?= 8000
QUESTION ?= throughput
OUT ?=
BUILD ?= $(shell nvidia-smi >/dev/null 2>&1 && echo gpu || echo cpu)

WEIGHTS := value_models/demo/weights
READY := .venv/ready-$(BUILD)

.PHONY: serve test check demo study bench
.DEFAULT_GOAL := serve

serve: $(READY)
	@.venv/bin/trimtab serve $(WEIGHTS)/target --served-model-name atlas \
		--value-network-dir $(WEIGHTS)/networks --host $(HOST) --port $(PORT)

# Most of the time is engines starting, each on about one core: two at once, but for tests that need the
# machine for themselves. A file's tests share their engines. In the order of their names, files without
# engines, value_models', are left for last, and fill what time the longer ones leave.
test: $(READY)
	@status=0; \
	.venv/bin/python -m pytest -q -m alone || status=1; \
	.venv/bin/python -m pytest -q -m "not alone" -n 2 --dist loadfile --no-loadscope-reorder || status=1; \
	exit $$status

check: $(READY)
	@.venv/bin/ruff format --check .
	@.venv/bin/ruff check .
	@.venv/bin/mypy

demo: $(READY)
	@.venv/bin/python -m value_models.demo

study: $(READY)
	@.venv/bin/python -m value_models.study

bench: $(READY)
	@.venv/bin/python -m deploy.bench $(QUESTION) $(if $(OUT),--out $(OUT))

$(READY): pyproject.toml deploy/locks/$(BUILD).txt deploy/locks/dev.txt deploy/setup
	@deploy/setup $(BUILD)
