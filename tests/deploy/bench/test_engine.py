"""The measured engine itself, over toy models."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.distributed.device_communicators import shm_broadcast

from deploy.bench.checkpoints import Checkpoints, make_dummy_checkpoints
from deploy.bench.engine import Engine, Request
from deploy.bench.price import put_back, take_out
from deploy.bench.rounds import make_prompts
from server.cpu import RESERVED_FROM, SPINS, num_cores
from server.settings import ENVIRONMENT_VARIABLE
from tests.deploy.bench.test_checkpoints import SMALLER, TOY

SHORT, LONG = make_prompts(2, 6, "seed"), make_prompts(1, 90, "seed")[0]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    folder = tmp_path_factory.mktemp("dummy")
    return make_dummy_checkpoints(folder, "float32", ["first", "second"], TOY, SMALLER)


@pytest.fixture(scope="module")
def engine(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(
        checkpoints.target,
        checkpoints.networks,
        tmp_path_factory.mktemp("log") / "trimtab.log",
        enforce_eager=True,
        max_num_seqs=8,
        environment={"VLLM_USE_V2_MODEL_RUNNER": "0"},
        logprobs_mode="processed_logprobs",
        **checkpoints.engine_options,
    ) as started:
        yield started


def test_options_reach_vllm_whose_target_may_have_no_weights(engine: Engine) -> None:
    assert engine.description["max_num_seqs"] == 8
    assert engine.description["dtype"] == "float32"


def test_requests_of_one_batch_have_networks_lengths_and_tokens_of_their_own(
    engine: Engine,
) -> None:
    requests = [
        Request(SHORT[0], 8),
        Request(SHORT[0], 6, ("first",)),
        Request(SHORT[0], 6, ("second",)),
        Request(LONG, 5, ("first", "second"), logprobs=3),
    ]
    run = engine.run(requests)
    assert [len(stream.tokens) for stream in run.streams] == [8, 6, 6, 5]
    assert len({tuple(stream.tokens[:6]) for stream in run.streams[:3]}) == 3
    for request, stream in zip(requests, run.streams, strict=True):
        assert engine.run([request]).tokens == [stream.tokens]
    logprobs = run.streams[-1].logprobs
    assert logprobs is not None and run.streams[0].logprobs is None
    # Greedy, and guided: a sampled token is the likeliest by what comes back.
    assert [max(found, key=lambda t: found[t]) for found in logprobs] == run.tokens[-1]


def test_every_token_has_a_time_of_its_own(engine: Engine) -> None:
    run = engine.run([Request(prompt, 10, ("first",)) for prompt in SHORT])
    for stream in run.streams:
        assert 0 <= stream.sent < stream.arrivals[0] == stream.sent + stream.time_to_first_token
        assert len(stream.gaps) == 9 and all(gap > 0 for gap in stream.gaps)
    assert run.seconds == max(stream.arrivals[-1] for stream in run.streams)
    assert run.tokens_per_second == 20 / run.seconds


def test_a_request_joins_when_the_others_have_so_many_tokens(engine: Engine) -> None:
    first, second, joined = engine.run(
        [*(Request(prompt, 12) for prompt in SHORT), Request(LONG, 1, joins_after=6)]
    ).streams
    assert max(first.arrivals[5], second.arrivals[5]) <= joined.sent < first.arrivals[-1]


def test_the_next_is_sent_when_one_of_so_many_has_ended(engine: Engine) -> None:
    requests = [Request(SHORT[0], num_tokens) for num_tokens in (20, 3, 5, 2)]
    streams = engine.run(requests, at_once=2).streams
    for stream in streams[2:]:
        running = [s for s in streams if s.sent < stream.sent < s.arrivals[-1]]
        assert len(running) < 2
    first, second, third, fourth = streams
    assert second.arrivals[-1] <= third.sent < third.arrivals[-1] <= fourth.sent
    assert fourth.arrivals[-1] < first.arrivals[-1]


def test_trimtab_can_be_taken_out_of_the_step_and_put_back(engine: Engine) -> None:
    unguided, guided = Request(SHORT[0], 8), Request(SHORT[0], 8, ("first",))
    expected = [engine.run([request]).tokens for request in (unguided, guided, unguided)]
    as_started = engine.call(state_of_runner)
    engine.call(take_out)
    assert engine.call(state_of_runner) == (False, 0, 0, False)
    assert [engine.run([guided]).tokens, engine.run([unguided]).tokens] == [expected[0]] * 2
    engine.call(put_back)
    assert engine.call(state_of_runner) == as_started
    assert [engine.run([r]).tokens for r in (unguided, guided, unguided)] == expected
    assert expected[0] != expected[1]


def state_of_runner(worker: Any) -> tuple[bool, int, int, bool]:
    """Return whether it keeps tokens for processors, its hooks, and whether trimtab scores."""
    runner = worker.model_runner
    hooks = (runner.sampler._forward_pre_hooks, runner.sampler._forward_hooks)
    scores = "_get_prompt_logprobs_dict" in vars(runner)
    return (runner.input_batch.logitsprocs_need_output_token_ids, *map(len, hooks), scores)


def resident(worker: Any, key: str) -> list[str]:
    return [network["name"] for network in worker.trimtab_networks()[key]]


def test_a_function_runs_in_the_worker(engine: Engine) -> None:
    assert engine.call(resident, "networks") == ["first", "second"]
    assert len(engine.call("trimtab_networks")["networks"]) == 2


@pytest.mark.parametrize(
    ("set_up_alike", "environment"), [(False, {"GOMP_SPINCOUNT": "700"}), (True, {})]
)
def test_vllm_without_trimtab_is_set_up_as_told(
    checkpoints: Checkpoints,
    tmp_path: Path,
    set_up_alike: bool,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "{}")  # as a shell beside a server may have it
    for variable in ("VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_OMP_THREADS_BIND", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(variable, raising=False)
    options = checkpoints.engine_options | {"enforce_eager": True, "max_num_seqs": 8}
    options |= {"set_up_alike": set_up_alike, "environment": environment}
    with Engine(checkpoints.target, {}, tmp_path / "plain.log", **options) as plain:
        wait, threads, spins = plain.call(how_it_runs)
    cores, shared = num_cores(), set_up_alike and num_cores() < RESERVED_FROM
    assert wait == ("nap" if set_up_alike else "sched_yield")
    assert threads == (cores if shared else max(1, cores - 1))
    assert spins == (str(SPINS) if shared else environment.get("GOMP_SPINCOUNT"))


def how_it_runs(_worker: Any) -> tuple[str, int, str | None]:
    """Return how the worker waits, on how many cores it computes, and how long its threads spin."""
    spins = os.environ.get("GOMP_SPINCOUNT")
    return shm_broadcast.sched_yield.__name__, torch.get_num_threads(), spins


def test_one_whose_call_throws_ends_with_its_log(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """It waited for good once, and everybody for it."""
    with (
        pytest.raises(SystemExit, match="KeyError: 'nobody'"),
        Engine(
            checkpoints.target,
            checkpoints.networks,
            tmp_path / "trimtab.log",
            enforce_eager=True,
            max_num_seqs=8,
            **checkpoints.engine_options,
        ) as started,
    ):
        started.run([Request(SHORT[0], 2, ("nobody",))])
