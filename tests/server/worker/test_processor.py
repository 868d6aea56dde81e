"""One name for the adapters to both of vLLM's model runners."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.sample.logits_processor import _load_logitsprocs_by_fqcns
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcRequestState
from vllm.v1.worker.gpu.sample.logits_processor.loader import _load_v2_logitsprocs_by_fqcns

from server.plugin import LOGITS_PROCESSOR
from server.settings import Settings
from server.worker.processor_v1 import V1Processor
from server.worker.processor_v2 import V2Processor


@pytest.fixture(autouse=True)
def without_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(networks={}, key="", tokenizer_fingerprint="")
    monkeypatch.setattr(Settings, "load", lambda: settings)
    nothing = SimpleNamespace(revision=0, networks=list)
    monkeypatch.setattr("server.worker.steering.Residency", lambda *_: nothing)


def test_each_runner_gets_its_own_adapter_by_the_same_name() -> None:
    """Loaded by vLLM's own loaders, and called as each of its runners calls it."""
    config: Any = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=1))
    (v1,) = _load_logitsprocs_by_fqcns([LOGITS_PROCESSOR])
    assert type(v1(config, torch.device("cpu"), False)) is V1Processor
    (v2,) = _load_v2_logitsprocs_by_fqcns([LOGITS_PROCESSOR])
    tokens: Any = SimpleNamespace(gpu=torch.zeros(1, 8, dtype=torch.int32))
    none: Any = None
    states = LogitsProcRequestState(torch.device("cpu"), 1, 512, tokens, none, none, none)
    assert type(v2(config, states)) is V2Processor
