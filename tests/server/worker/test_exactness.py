"""Guided greedy tokens are exactly `argmax(target + scale * value)`, however they were batched."""

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm import LLM, RequestOutput, SamplingParams
from vllm.compilation.counter import compilation_counter

from server.worker.compilation import compiled_module
from tests.models import make_contrast, make_model, make_network
from tests.server.worker.engine import Ask, GuidedEngine, guided_engine, one_context_gb

CONTEXT = 256
VOCAB = 512
SCALES = (1.0, 0.3, -1.0, 2.5, 8.0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    common = {"max_position_embeddings": CONTEXT}
    return {
        "target": make_model(root / "target", architecture="llama", layers=3, **common),
        "padded": make_model(
            root / "padded",
            architecture="qwen2",
            vocab_size=VOCAB + 64,
            tie_word_embeddings=True,
            seed=1,
            **common,
        ),
        "llama": make_network(root / "llama", architecture="llama", seed=2, **common),
        "tied": make_network(
            root / "tied",
            architecture="qwen2",
            hidden_size=128,
            heads=4,
            kv_heads=2,
            tie_word_embeddings=True,
            seed=3,
            **common,
        ),
        "wide": make_network(
            root / "wide", architecture="llama", vocab_size=VOCAB + 32, seed=4, **common
        ),
    }


def mixed_asks(seed: int, count: int = 40) -> list[Ask]:
    """Requests of all lengths, some with a shared prefix, on every network and none."""
    rng = random.Random(seed)
    shared = [rng.randrange(10, VOCAB - 1) for _ in range(150)]
    asks = []
    for i in range(count):
        prompt = [rng.randrange(10, VOCAB - 1) for _ in range(rng.randint(1, 60))]
        if i % 3 == 0:
            prompt = shared[: rng.randint(33, 150)] + prompt[:20]
        asks.append(
            Ask(
                prompt,
                rng.randint(1, 70),
                rng.choice(["llama", "tied", "wide", None]),
                rng.choice(SCALES),
                {"n": 3, "temperature": 1.0, "top_k": 1} if i % 7 == 0 else {},
            )
        )
        if i % 5 == 0 and asks[-1].network == "llama":
            asks[-1].also = {"tied": rng.choice(SCALES), "wide": 0.5}
    # The extremes: one token and out, one token to the limit, a prompt that fills the context.
    asks[0] = Ask([11], 1, "llama")
    asks[1] = Ask([12], CONTEXT - 1, "tied")
    asks[2] = Ask([rng.randrange(10, VOCAB - 1) for _ in range(CONTEXT - 1)], 1, "wide")
    return asks


def unguided_asks() -> list[Ask]:
    asks = mixed_asks(seed=5)
    return [Ask(ask.prompt, ask.max_tokens, None, 1.0, {"logprobs": 2}) for ask in asks]


@pytest.fixture(scope="module")
def plain(models: dict[str, Path]) -> list[RequestOutput]:
    """What vLLM without trimtab answers to `unguided_asks`."""
    llm = LLM(str(models["target"]), dtype="float32", enforce_eager=True, max_num_seqs=8)
    try:
        return llm.generate(
            [{"prompt_token_ids": ask.prompt} for ask in unguided_asks()],
            [SamplingParams(**ask.sampling) for ask in unguided_asks()],
            use_tqdm=False,
        )
    finally:
        llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def engine(models: dict[str, Path], plain: list[RequestOutput]) -> Iterator[GuidedEngine]:
    """Ample memory and prefix caches, fewer seats than requests: they join and leave.

    Started once vLLM without trimtab has ended, whose end takes down what all engines of a process
    share.
    """
    target = models.pop("target")
    padded = models.pop("padded")
    networks = dict(models)
    models |= {"target": target, "padded": padded}
    with guided_engine(
        target, networks, value_memory_gb=0.1, max_num_seqs=8, enable_prefix_caching=True
    ) as engine:
        yield engine


def test_mixed_requests(engine: GuidedEngine) -> None:
    asks = mixed_asks(seed=1)
    engine.assert_exact(asks, engine.run(asks))


def test_prefix_cache_hits_change_nothing(engine: GuidedEngine) -> None:
    asks = mixed_asks(seed=2)
    cold = engine.run(asks)
    warm = engine.run(asks)
    assert sum(output.num_cached_tokens or 0 for output in warm) > 0
    engine.assert_exact(asks, cold)
    engine.assert_exact(asks, warm)


def test_alone_or_in_company(engine: GuidedEngine) -> None:
    asks = mixed_asks(seed=3)[3:15]
    together = engine.run(asks)
    for ask, output in zip(asks, together, strict=True):
        (alone,) = engine.run([ask])
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids


def test_logprobs_are_of_the_guided_distribution(engine: GuidedEngine) -> None:
    ask = Ask([20, 30, 40], 12, "tied", 0.7, {"logprobs": 3, "temperature": 0.5, "top_k": 5})
    (output,) = engine.run([ask])
    sampled = list(output.outputs[0].token_ids)
    expected = engine.reference_logits(ask, sampled).log_softmax(-1)
    for position, (token, logprobs) in enumerate(
        zip(sampled, output.outputs[0].logprobs, strict=True)
    ):
        top = expected[position].topk(3)
        assert set(top.indices.tolist()) <= set(logprobs)
        for token_id in {token, *top.indices.tolist()}:
            assert logprobs[token_id].logprob == pytest.approx(
                expected[position, token_id].item(), abs=1e-3
            )


@pytest.mark.parametrize("penalty", ["repetition_penalty", "logit_bias", "bad_words"])
def test_sampling_parameters_act_on_guided_logits(engine: GuidedEngine, penalty: str) -> None:
    plain = Ask([21, 22, 23], 20, "llama")
    (before,) = engine.run([plain])
    banned = before.outputs[0].token_ids[0]
    options = {
        "repetition_penalty": {"repetition_penalty": 3.0},
        "logit_bias": {"logit_bias": {banned: -100.0}},
        "bad_words": {"allowed_token_ids": [t for t in range(VOCAB - 1) if t != banned]},
    }[penalty]
    (after,) = engine.run([Ask(plain.prompt, 20, "llama", 1.0, options)])
    tokens = list(after.outputs[0].token_ids)
    reference = engine.reference_logits(plain, tokens)
    seen = list(plain.prompt)
    for position, token in enumerate(tokens):
        logits = reference[position].clone()
        if penalty == "repetition_penalty":
            ids = torch.tensor(sorted(set(seen)))
            logits[ids] = torch.where(logits[ids] > 0, logits[ids] / 3.0, logits[ids] * 3.0)
        else:
            logits[banned] = float("-inf")
        assert token == logits.argmax().item()
        seen.append(token)


def test_unguided_requests_are_plain_vllms(
    engine: GuidedEngine, plain: list[RequestOutput]
) -> None:
    """The same unguided requests, beside guided ones and in vLLM without trimtab."""
    asks = unguided_asks()
    guided = [Ask(ask.prompt, ask.max_tokens, "llama") for ask in asks[:6]]
    beside = engine.run([*asks, *guided])[: len(asks)]
    for with_trimtab, without in zip(beside, plain, strict=True):
        assert with_trimtab.outputs[0].token_ids == without.outputs[0].token_ids
        for a, b in zip(with_trimtab.outputs[0].logprobs, without.outputs[0].logprobs, strict=True):
            for token_id in a:
                assert a[token_id].logprob == pytest.approx(b[token_id].logprob, abs=1e-4)


# Engines of their own, whose ends take down what all engines of a process share: no test after them
# uses `engine`.


def test_preemption_chunked_prefill_and_a_tiny_value_cache(models: dict[str, Path]) -> None:
    """Everything scarce: prompts come in chunks, requests are thrown out, value blocks run out."""
    networks = {name: models[name] for name in ("llama", "tied", "wide")}
    with guided_engine(
        models["padded"],
        networks,
        value_memory_gb=one_context_gb(networks, CONTEXT),
        prefix_caching=False,
        enable_prefix_caching=False,
        block_size=32,
        num_gpu_blocks_override=14,
        max_num_seqs=8,
        max_num_batched_tokens=48,
        disable_log_stats=False,
    ) as engine:
        asks = mixed_asks(seed=6)
        engine.assert_exact(asks, engine.run(asks))
        metrics = {metric.name: metric for metric in engine.llm.get_metrics()}
        assert metrics["vllm:num_preemptions"].value > 0
        assert sum(network["drops"] for network in engine.status().values()) > 0


def test_compiled_networks_of_one_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As served by default: compiled, and three networks run the forward that one compiled.

    One of them has two models, which run the same. The next start compiles nothing, though all
    weights and the networks' folders are others.
    """
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    networks = {
        name: make(tmp_path / name, layers=1, max_position_embeddings=CONTEXT, seed=seed)
        for seed, (name, make) in enumerate(
            {"a": make_network, "b": make_network, "c": make_contrast}.items(), start=10
        )
    }
    target = make_model(tmp_path / "target", layers=1, max_position_embeddings=CONTEXT)
    with (
        compilation_counter.expect(num_aot_compiles=2, num_aot_artifacts_loaded=0),
        guided_engine(target, networks, enforce_eager=False, max_num_seqs=8) as engine,
    ):
        rng = random.Random(8)
        asks = [
            Ask([rng.randrange(10, VOCAB - 1) for _ in range(length)], 40, "abc"[length % 3])
            for length in range(1, 25)
        ]
        engine.assert_exact(asks, engine.run(asks))
        assert engine.llm.collective_rpc(num_forwards) == [1]

        # One that comes later runs what they compiled; another architecture runs uncompiled.
        late = make_network(tmp_path / "d", layers=1, max_position_embeddings=CONTEXT, seed=20)
        other = make_network(tmp_path / "e", layers=2, max_position_embeddings=CONTEXT, seed=21)
        pair = make_contrast(tmp_path / "f", layers=1, max_position_embeddings=CONTEXT, seed=22)
        for name, folder in (("d", late), ("e", other), ("f", pair)):
            for _ in engine.load(name, folder):
                pass
            (mode,) = engine.llm.collective_rpc(mode_of, args=(name,))
            assert mode == ("NONE" if name == "e" else "DYNAMO_TRACE_ONCE")
        compiled = engine.llm.collective_rpc(num_compiled)
        assert compiled > [0]
        asks = [Ask([rng.randrange(10, VOCAB - 1), 11, 12], 40, name) for name in "adefda"]
        engine.assert_exact(asks, engine.run(asks))
        assert engine.llm.collective_rpc(num_compiled) == compiled  # all were warm
        # The weights of the one that compiled it go; its compiled forward stays.
        engine.call("retire", "a", False)
        engine.call("unload", f"a@{engine.versions['a']}")
        engine.assert_exact(asks[1:4], engine.run(asks[1:4]))

    shutil.rmtree(target)
    make_model(target, layers=1, max_position_embeddings=CONTEXT, seed=1)
    networks = {"f": pair, "d": late}
    with (
        compilation_counter.expect(num_aot_compiles=0, num_aot_artifacts_loaded=2),
        guided_engine(target, networks, enforce_eager=False, max_num_seqs=8) as again,
    ):
        asks = [Ask([rng.randrange(10, VOCAB - 1), 11], 40, name) for name in (*"dfdf", None)]
        again.assert_exact(asks, again.run(asks))
        assert again.llm.collective_rpc(num_forwards) == [1]
        assert again.llm.collective_rpc(mode_of, args=("f",)) == ["DYNAMO_TRACE_ONCE"]


def mode_of(worker: Any, name: str) -> str:
    networks = worker._processor().steering.residency.networks()
    network = next(network for network in networks if network.folder.name == name)
    modes: set[str] = set()
    for model in network.models.values():
        modes.add(model.config.compilation_config.mode.name)
        assert not model._forward.eager or modes == {"NONE"}
    (mode,) = modes
    return mode


def num_forwards(worker: Any) -> int:
    """Different compiled forwards that the networks' models run."""
    networks = worker._processor().steering.residency.networks()
    models = [model for network in networks for model in network.models.values()]
    return len({id(compiled_module(model._model).aot_compiled_fn) for model in models})


def num_compiled(_worker: Any) -> int:
    count: int = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    return count
