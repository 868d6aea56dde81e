"""Guidance in vLLM's V2 model runner, as far as a CPU can tell: see `tests.server.worker.v2_runner`
for what of the runner is vLLM's own. What only a device has, its copies take time, is made up."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext
from vllm.v1.worker.gpu.sample.sampler import Sampler

from server.run_directory import EXPLAIN
from server.worker import processor_v2
from server.worker.guidance import Batch
from tests.models import (
    TEXT,
    make_mapped_network,
    make_model,
    make_network,
    make_sentencepiece_tokenizer,
    make_tokenizer,
)
from tests.server.worker.alone import engine_config, process_group
from tests.server.worker.engine import Ask
from tests.server.worker.v2_runner import V2Engine, dummy_batch, v2_engine

CONTEXT = 192
POISON = 300
"""A token whose embedding is not finite in the network "poisoned"."""

NETWORKS = ("first", "second", "mapped", "poisoned")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("v2")
    size: dict[str, Any] = {"max_position_embeddings": CONTEXT}
    make_model(root / "target", **size)
    make_network(root / "first", seed=2, **size)
    make_network(root / "second", seed=3, **size)
    make_network(root / "poisoned", seed=4, **size)
    make_mapped_network(
        root / "mapped", make_tokenizer(), tokenizer=make_sentencepiece_tokenizer(), **size
    )
    file = root / "poisoned" / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][POISON] = float("inf")
    save_file(weights, file, metadata={"format": "pt"})
    with process_group(root):
        yield root


@pytest.fixture
def loaded(root: Path, tmp_path: Path) -> Iterator[V2Engine]:
    """A runner whose API processes have not said yet that they are ready."""
    config = engine_config(
        root / "target", max_num_seqs=6, max_num_batched_tokens=96, max_model_len=CONTEXT
    )
    (tmp_path / EXPLAIN).mkdir()
    networks = {name: root / name for name in NETWORKS}
    with v2_engine(config, root / "target", networks, tmp_path) as engine:
        yield engine


@pytest.fixture
def engine(loaded: V2Engine) -> V2Engine:
    loaded.attach()
    return loaded


def prompt(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(10, 290) for _ in range(length)]


def text(length: int, start: int = 0) -> list[int]:
    ids: list[int] = make_tokenizer().encode(TEXT, add_special_tokens=False)
    return ids[start : start + length]


def test_rows_join_move_leave_and_share_slots(engine: V2Engine) -> None:
    engine.ask("a", Ask(prompt(30, 1), 12, "first"))
    engine.ask("b", Ask(prompt(5, 2), 6, None))
    engine.ask("c", Ask(prompt(17, 3), 12, "second", -0.7))
    engine.ask("d", Ask(prompt(31, 4), 9, "first", 0.5, also={"second": 1.5}))
    engine.step("a")
    engine.step("b", "a")
    engine.step("c", "a", "b")
    for names in ("abc", "cab", "bca", "ac", "acb"):  # in any order, and not always all of them
        engine.step(*names)
    slot = engine.slot("b")
    engine.leave("b")
    engine.step("d", "c", "a")
    assert engine.slot("d") == slot
    engine.finish("a", "c", "d")
    engine.assert_exact_all()


def test_histories_go_on_over_many_blocks(engine: V2Engine) -> None:
    """Full blocks are published by what the host knows of them, and found again by others."""
    engine.ask("a", Ask(prompt(40), 80, "first"))
    engine.finish("a")
    longer = prompt(40) + engine.output["a"][:40]
    engine.ask("b", Ask(longer, 10, "first"))
    engine.finish("b")
    engine.assert_exact_all()
    (network,) = (n for n in engine.processor.steering.residency.networks() if "first" in str(n))
    assert network.models["value"].table.prefix_hits >= 32


def test_prompts_are_read_in_chunks_beside_rows_that_decode(engine: V2Engine) -> None:
    engine.ask("a", Ask(prompt(8, 1), 8, "first"))
    engine.ask("b", Ask(prompt(50, 2), 4, "first"))
    engine.ask("c", Ask(text(50), 4, "mapped"))
    engine.step("a")
    engine.step("a", b=13, c=20)
    engine.step("a", b=20, c=1)
    assert engine.output["b"] == engine.output["c"] == []
    engine.step("a", b=16, c=28)
    engine.finish("a", "b", "c")
    engine.assert_exact_all()


def test_preempted_requests_come_back_as_they_were(engine: V2Engine) -> None:
    controlled = {"after": (), "until_tokens": 9}
    engine.ask("a", Ask(prompt(30, 1), 14, "first"))
    engine.ask("b", Ask(text(20), 14, "mapped"))
    engine.ask("c", Ask(prompt(6, 3), 14, "second", choice=controlled))
    engine.ask("d", Ask(prompt(50, 4), 14, "first"))
    engine.ask("e", Ask(prompt(9, 5), 14, None))
    engine.step("a", "b", "c", d=20)
    for _ in range(4):
        engine.step("a", "b", "c")
    for name in "abcd":
        engine.preempt(name)
    engine.step("e")
    engine.step("b", "e")  # in a slot that another one had
    engine.step("a", "e", "b", c=3)
    engine.step("a", "b", "c", "d", "e")
    engine.finish(*"abcde")
    engine.assert_exact_all()


def test_networks_of_another_vocabulary_read_what_is_generated(engine: V2Engine) -> None:
    engine.ask("a", Ask(text(20), 30, "mapped"))
    engine.ask("b", Ask(text(9, 40), 30, "first", also={"mapped": 0.5}))
    engine.ask("c", Ask(text(12, 70), 30, None))
    engine.finish("a", "b", "c")
    engine.assert_exact_all()


def test_what_networks_have_lost_they_read_anew(engine: V2Engine) -> None:
    """A row may lose its blocks to others, and a network may be loaded again: the whole history is
    wanted then, of which the host may know the prompt only."""
    engine.ask("a", Ask(prompt(10, 1), 12, "first"))
    engine.ask("b", Ask(text(9, 40), 12, "mapped"))
    for _ in range(6):
        engine.step("a", "b")
    processor = engine.processor
    for row in processor._rows.values():
        processor.steering.guidance.release(row)
        row.translations.clear()
    processor.steering.residency.revision += 1
    engine.finish("a", "b")
    engine.assert_exact_all()


def test_guidance_begins_and_ends_by_what_is_generated(engine: V2Engine) -> None:
    plain = Ask(prompt(10, 7), 24)
    engine.ask("plain", plain)
    engine.ask("guided", Ask(prompt(10, 7), 24, "first"))
    engine.finish("plain", "guided")
    spelling = engine.spelling
    assert spelling is not None
    # Sequences that do come: one of the target alone, and a text of the guided answer.
    after = tuple(engine.output["plain"][5:7])
    until = next(
        found
        for end in range(8, 16)
        if (found := spelling.text(engine.output["guided"][end - 2 : end]).decode(errors="ignore"))
    )
    engine.ask("a", Ask(plain.prompt, 24, "first", choice={"after": after}))
    engine.ask("b", Ask(plain.prompt, 24, "first", choice={"until_text": until}))
    engine.ask("c", Ask(plain.prompt, 24, "first", choice={"until_tokens": 3}))
    engine.step("c")
    engine.finish("a", "b", "c")
    engine.assert_exact_all()
    assert len({tuple(tokens) for tokens in engine.output.values()}) == 5


def test_unguided_rows_are_the_targets_to_the_last_bit(
    engine: V2Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.ask("a", Ask(prompt(10, 1), 2, "first"))
    engine.ask("b", Ask(prompt(10, 2), 2, None))
    sampled_from, compute = [], engine.runner.model.compute_logits
    sample, made = engine.runner.sampler._sample_random, []

    def recorded(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sampled_from.append(logits.clone())
        return sample(logits, *args, **kwargs)

    def computed(hidden: torch.Tensor) -> torch.Tensor:
        made.append(compute(hidden))
        return made[-1].clone()

    monkeypatch.setattr(engine.runner.sampler, "_sample_random", recorded)
    engine.runner.model.compute_logits = computed
    engine.step("a", "b")
    assert torch.equal(sampled_from[0][1], made[0][1])
    assert not torch.equal(sampled_from[0][0], made[0][0])


@pytest.mark.parametrize("logprobs", [None, 2])
def test_guidance_takes_no_copy_beside_the_samplers(
    engine: V2Engine, monkeypatch: pytest.MonkeyPatch, logprobs: int | None
) -> None:
    """Log-probabilities are of what the sampler is called with: then it has to be another one."""
    guidance, sampler = engine.processor.steering.guidance, engine.runner.sampler
    step, sample, guided, sampled_from = guidance.step, sampler._sample_random, [], []

    def stepped(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
        guided.append(step(logits, batch))
        assert (guided[-1] is logits) == (logprobs is None)
        return guided[-1]

    def sampled(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sampled_from.append(logits)
        return sample(logits, *args, **kwargs)

    monkeypatch.setattr(guidance, "step", stepped)
    monkeypatch.setattr(sampler, "_sample_random", sampled)
    compute = engine.runner.model.compute_logits
    engine.runner.model.compute_logits = lambda hidden: compute(hidden).bfloat16()
    engine.ask("a", Ask(prompt(10, 1), 3, "first", options={"logprobs": logprobs}))
    engine.ask("b", Ask(prompt(12, 2), 3, None))
    for _ in range(3):
        engine.step("a", "b")
    assert len(guided) == len(sampled_from) == 3
    assert all((a is b) == (logprobs is None) for a, b in zip(guided, sampled_from, strict=True))


def test_penalties_and_biases_see_guided_logits(
    engine: V2Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, biases = [], engine.runner.sampler.logits_processors[1]
    apply = biases.apply

    def applied(logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        seen.append(logits.clone())
        return apply(logits, ctx)

    monkeypatch.setattr(biases, "apply", applied)
    ask = Ask(prompt(9), 1, "first")
    engine.ask("a", ask)
    engine.step("a")
    expected = engine.reference_logits(ask, engine.output["a"])
    torch.testing.assert_close(seen[0], expected, atol=2e-3, rtol=1e-3)


def test_a_steady_batch_is_arranged_once(engine: V2Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    guidance, arranged = engine.processor.steering.guidance, []
    arrange = guidance.arrange
    monkeypatch.setattr(guidance, "arrange", lambda rows: [arranged.append(rows), arrange(rows)])
    engine.ask("a", Ask(prompt(10, 1), 20, "first"))
    engine.ask("b", Ask(prompt(10, 2), 20, None))
    for _ in range(6):
        engine.step("a", "b")
    assert len(arranged) == 1
    engine.step("b", "a")
    engine.step("b")
    assert [list(rows) for rows in arranged] == [[0], [1], []]


def test_slots_are_released_once_each_time_they_are_given_back(
    engine: V2Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    guidance, released = engine.processor.steering.guidance, []
    release = guidance.release
    monkeypatch.setattr(guidance, "release", lambda row: [released.append(row.slot), release(row)])
    networks = {n.folder.name: n for n in engine.processor.steering.residency.networks()}
    open_slots = networks["first"].models["value"].table.requests
    engine.ask("a", Ask(prompt(10, 1), 9, "first"))
    engine.ask("b", Ask(prompt(10, 2), 9, None))
    engine.step("a", "b")
    slot = engine.slot("a")
    assert list(open_slots) == [slot]
    engine.preempt("a")
    engine.step("b")
    assert released == [slot] and not open_slots
    engine.step("a", "b")
    del engine._computed["a"]  # added again while it has a slot, as a session's next input is
    engine.step("a", "b")
    assert released == [slot] * 2 and list(open_slots) == [engine.slot("a")]
    engine.leave("a")
    engine.leave("b")
    engine.ask("c", Ask(prompt(10, 3), 2, None))
    engine.step("c")
    assert len(released) == 3 and not open_slots
    assert not engine.processor._rows


def test_a_failed_network_ends_its_own_requests(engine: V2Engine) -> None:
    engine.ask("a", Ask(prompt(10, 1), 6, "first"))
    engine.ask("b", Ask([*prompt(5, 2), POISON], 6, "poisoned"))
    engine.ask("c", Ask(prompt(10, 3), 6, None))
    engine.ask("d", Ask(prompt(10, 3), 6, "poisoned"))
    engine.step("a", "c", "d")
    engine.step("a", "b", "c", "d")
    assert engine.output["b"] == [engine.failure_token_id]
    assert engine.output["d"][1] == engine.failure_token_id
    for name in "bd":
        engine.leave(name)
        del engine._asks[name]
    engine.finish("a", "c")
    engine.assert_exact_all()


def test_a_request_whose_tokens_cannot_be_read_ends_alone(
    engine: V2Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine.ask("a", Ask(text(10), 6, "mapped"))
    engine.ask("b", Ask(text(10), 6, "mapped"))
    engine.step("a")
    with monkeypatch.context() as patch:
        patch.setattr(processor_v2, "_staged", lambda *_: 1 // 0)
        engine.step("a", "b")
    assert engine.output["b"] == [engine.failure_token_id]
    engine.leave("b")
    del engine._asks["b"]
    engine.finish("a")
    engine.assert_exact_all()


@pytest.mark.parametrize("hook", ["step", "release"])
def test_no_exception_of_ours_reaches_the_engine(
    engine: V2Engine, monkeypatch: pytest.MonkeyPatch, hook: str
) -> None:
    guidance = engine.processor.steering.guidance
    engine.ask("a", Ask(prompt(10, 1), 6, "first"))
    engine.ask("b", Ask(prompt(10, 2), 6, "second"))
    engine.step("a", "b")
    monkeypatch.setattr(guidance, hook, lambda *_: 1 // 0)
    engine.leave("b")
    engine.step("a")
    assert engine.output["a"][1] == engine.failure_token_id
    states = {n["name"]: n["reason"] for n in engine.worker.trimtab_networks()["networks"]}
    assert all("ZeroDivisionError" in reason for reason in states.values())


def test_what_vllm_warms_up_with_changes_nothing(loaded: V2Engine) -> None:
    sampler = loaded.runner.sampler
    loaded.ask("warm", Ask(prompt(4), 2, None))
    loaded.finish("warm")
    logits, batch = dummy_batch(loaded.runner, 6)
    assert torch.equal(sampler(logits.clone(), batch).sampled_token_ids[:, 0], logits.argmax(-1))
    loaded.attach()
    loaded.attach()  # each API process does
    for name in "abcdef":  # all slots
        loaded.ask(name, Ask(prompt(4, ord(name)), 5, "first"))
    loaded.step(*"abcdef")
    before = [row.history.tokens(0, 9) for row in loaded.processor._rows.values()]
    logits, batch = dummy_batch(loaded.runner, 6)
    assert torch.equal(sampler(logits.clone(), batch).sampled_token_ids[:, 0], logits.argmax(-1))
    assert [row.history.tokens(0, 9) for row in loaded.processor._rows.values()] == before
    loaded.finish(*"abcdef")
    loaded.assert_exact_all()


def test_requests_that_came_too_early_are_ended(loaded: V2Engine) -> None:
    loaded.ask("a", Ask(text(9), 3, "mapped"))
    loaded.ask("b", Ask(text(9), 3, "first"))
    loaded.step("a", "b")
    loaded.leave("b")
    loaded.ask("c", Ask(prompt(9), 3, None))
    loaded.step("a", "c")  # in the slot of "b"
    loaded.attach()
    loaded.finish("a", "c")
    failure = loaded.failure_token_id
    assert (loaded.output.pop("a"), loaded.output.pop("b")) == ([failure] * 3, [failure])
    assert failure not in loaded.output["c"]
    assert not any(n["reason"] for n in loaded.worker.trimtab_networks()["networks"])


def test_a_sampler_of_another_kind_keeps_it(loaded: V2Engine) -> None:
    """vLLM asks for the watermarking one with `isinstance`."""
    kind = type("Watermarking", (Sampler,), {})
    loaded.runner.sampler.__class__ = kind
    loaded.attach()
    assert isinstance(loaded.runner.sampler, kind)
    loaded.ask("a", Ask(prompt(9), 3, "first"))
    loaded.finish("a")
    loaded.assert_exact_all()


def test_a_sampler_that_a_model_brings_is_refused(loaded: V2Engine) -> None:
    class Brought:
        logits_processors = loaded.runner.sampler.logits_processors

    loaded.runner.sampler = Brought()
    assert "Brought cannot be guided" in loaded.worker.trimtab_attach()["error"]


def test_log_probabilities_are_of_the_guided_distribution(engine: V2Engine) -> None:
    ask = Ask(prompt(9), 1, "first", options={"logprobs": 3})
    engine.ask("a", ask)
    _, output, _ = engine._run({"a": 9})
    expected = engine.reference_logits(ask, output.sampled_token_ids[0].tolist()).log_softmax(-1)
    found = output.logprobs_tensors
    torch.testing.assert_close(
        found.logprobs, expected.gather(-1, found.logprob_token_ids), atol=2e-3, rtol=1e-3
    )


def test_prompts_are_scored_guided(engine: V2Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, beside others, and in pieces of the batch that are cut anywhere."""
    monkeypatch.setattr("vllm.v1.worker.gpu.sample.prompt_logprob.CHUNK_SIZE", 16)
    scored = {"prompt_logprobs": 2}
    asks = {
        "a": Ask(prompt(40, 1), 3, "first", options=scored),
        "b": Ask(prompt(25, 2), 3, None, options=scored),
        "c": Ask(text(30), 3, "mapped", options=scored),
        "d": Ask(prompt(9, 4), 9, "second"),
        "e": Ask(prompt(12, 5), 3, "second", options=scored),
    }
    for name, ask in asks.items():
        engine.ask(name, ask)
    engine.step("d")
    engine.step("d", a=11, c=7)
    engine.step("d", "b", a=3, c=13)
    engine.step("d", a=25, c=10)
    engine.step("a", "b", "c", "d", "e")
    engine.finish(*asks)
    engine.assert_exact_all()
    assert set(engine.scores) == {"a", "b", "c", "e"}
    for name, found in engine.scores.items():
        expected = engine.reference_prompt_logits(asks[name])[:-1].log_softmax(-1)
        assert found.logprob_token_ids[:, 0].tolist() == asks[name].prompt[1:]
        torch.testing.assert_close(
            found.logprobs, expected.gather(-1, found.logprob_token_ids), atol=2e-3, rtol=1e-3
        )


def test_given_tokens_of_a_prompt_are_scored_guided(engine: V2Engine) -> None:
    start, given = 4, np.array([[20, 21], [22, 23], [24, 25]])
    options = {"prompt_logprob_token_ids": given, "prompt_logprob_start": start}
    ask = Ask(prompt(12, 1), 2, "first", options=options)
    engine.ask("a", ask)
    engine.ask("b", Ask(prompt(12, 1), 2, "second"))
    engine.step("b", a=6)
    engine.finish("a", "b")
    engine.assert_exact_all()
    expected = engine.reference_prompt_logits(ask).log_softmax(-1)[start : start + len(given)]
    torch.testing.assert_close(
        engine.scores["a"], expected.gather(-1, torch.from_numpy(given)), atol=2e-3, rtol=1e-3
    )


def test_a_prompt_that_cannot_be_scored_is_nan(engine: V2Engine) -> None:
    scored = {"prompt_logprobs": 0}
    engine.ask("a", Ask([*prompt(5, 2), POISON, 20], 3, "poisoned", options=scored))
    engine.ask("b", Ask(prompt(9, 3), 3, "first", options=scored))
    engine.step("a", "b")
    assert engine.scores["a"].logprobs.isnan().all()
    assert engine.scores["b"].logprobs.isfinite().all()


def test_tokens_are_explained_before_they_leave(engine: V2Engine, tmp_path: Path) -> None:
    file = tmp_path / EXPLAIN / "a"
    file.touch()
    engine.ask("b", Ask(prompt(9, 1), 4, "second"))
    engine.ask("a", Ask(prompt(9, 2), 4, "first", choice={"explain": "a"}))
    engine.step("b", a=5)  # of a prompt in chunks, there is a token for the last one only
    engine.finish("a", "b")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["token"] for line in lines] == engine.output["a"]
    assert [line["request"] for line in lines] == ["a"] * 4
    engine.assert_exact_all()


def test_loads_keep_pace_with_steps(engine: V2Engine) -> None:
    residency = engine.processor.steering.residency
    engine.ask("a", Ask(prompt(9), 4, None))
    engine.step("a")
    residency.step_seconds = 5.0
    engine.step("a")
    assert residency.step_seconds < 5.0
