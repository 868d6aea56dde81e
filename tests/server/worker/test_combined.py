"""Every combination of networks, on the real engine, is what plain PyTorch says it is.

One engine serves all tests: residual networks, one with a reference, pairs, and a pair of another
vocabulary, beside each other.
"""

import json
import math
import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from vllm.sampling_params import StructuredOutputsParams

from server.run_directory import EXPLAIN
from tests.models import (
    OTHER_TEXT,
    make_contrast,
    make_mapped_network,
    make_model,
    make_network,
    make_tokenizer,
)
from tests.server.worker.engine import Ask, GuidedEngine, guided_engine

CONTEXT = 256
VOCAB = 512
SCALES = (1.0, 0.3, -1.0, 2.5)
KNOWING = ("known", "pair", "other")
"""Networks that know their base: dynamic fusion needs that."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuidedEngine]:
    root = tmp_path_factory.mktemp("models")
    common: dict[str, Any] = {"max_position_embeddings": CONTEXT}
    foreign = common | {"tokenizer": make_tokenizer(OTHER_TEXT, 400)}
    foreign["max_position_embeddings"] = 4 * CONTEXT
    target = make_model(root / "target", layers=3, **common)
    networks = {
        "residual": make_network(root / "residual", seed=2, **common),
        "wide": make_network(root / "wide", architecture="qwen2", vocab_size=544, seed=3, **common),
        "known": make_network(root / "known", reference={"seed": 9}, seed=4, **common),
        "pair": make_contrast(root / "pair", antiexpert={"vocab_size": 544}, seed=5, **common),
        "other": make_mapped_network(
            root / "other", make_tokenizer(), kind="contrast", seed=7, **foreign
        ),
        "mapped": make_mapped_network(root / "mapped", make_tokenizer(), seed=10, **foreign),
    }
    with guided_engine(
        target,
        networks,
        run_dir=tmp_path_factory.mktemp("run"),
        value_memory_gb=0.25,
        max_num_seqs=8,
        max_num_batched_tokens=64,  # longer prompts come in chunks
        enable_prefix_caching=True,
    ) as engine:
        yield engine


def asks(engine: GuidedEngine, seed: int, count: int = 36) -> list[Ask]:
    """Requests of every kind, so that each batch holds most of them."""
    rng = random.Random(seed)
    asks = []
    for i in range(count):
        prompt = [rng.randrange(10, VOCAB - 1) for _ in range(rng.randint(1, 90))]
        dynamic = i % 3 == 1
        names = rng.sample(KNOWING if dynamic else list(engine.networks), rng.choice((1, 1, 2, 3)))
        scales = {name: rng.choice((2.0, 0.5, -1.0) if dynamic else SCALES) for name in names}
        choice: dict[str, Any] = {"dynamic": True} if dynamic else {}
        match i % 5:
            case 1:
                choice["floor"] = 10.0 ** -rng.randint(1, 4)
            case 2:
                choice["until_tokens"] = rng.randint(1, 12)
            case 3:
                choice["until_text"] = rng.choice("aeint")
        if i % 7 == 3:
            choice["after"] = (rng.randrange(10, VOCAB - 1),)
        ask = Ask(prompt, rng.randint(1, 24), names[0], scales[names[0]], choice=choice)
        ask.also = {name: scales[name] for name in names[1:]}
        asks.append(Ask(prompt, ask.max_tokens) if i % 9 == 8 else ask)
        if i % 6 == 0:
            asks[-1].options = {"n": 2, "temperature": 1.0, "top_k": 1}
    # Four networks at once, static and dynamic.
    four = {"wide": -0.7, "pair": 1.3, "mapped": 0.4}
    asks.append(Ask([20, 21, 22], 20, "residual", 0.5, also=four))
    asks.append(Ask([30, 31], 20, "known", 2.0, also={"pair": 2.0}, choice={"dynamic": True}))
    return asks


def test_every_combination_at_once(engine: GuidedEngine) -> None:
    mixed = asks(engine, seed=1)
    engine.assert_exact(mixed, engine.run(mixed))


def test_guidance_begins_where_the_target_says(engine: GuidedEngine) -> None:
    """The target generates the token that guidance waits for, and ends it soon after."""
    prompt = [33, 34, 35]
    (alone,) = engine.run([Ask(prompt, 12)])
    token = alone.outputs[0].token_ids[4]
    begins = list(alone.outputs[0].token_ids).index(token) + 1
    ask = Ask(prompt, 24, "pair", 2.0, choice={"after": (token,), "until_tokens": 6})
    (output,) = engine.run([ask])
    engine.assert_exact([ask], [output])
    assert output.outputs[0].token_ids[:begins] == alone.outputs[0].token_ids[:begins]
    guided_from_the_first = Ask(prompt, 24, "pair", 2.0)
    (other,) = engine.run([guided_from_the_first])
    assert other.outputs[0].token_ids != output.outputs[0].token_ids


def test_a_failed_network_does_not_end_rows_that_it_no_longer_guides(engine: GuidedEngine) -> None:
    """Rows hold its blocks no longer either."""
    ask = Ask([40, 41, 42], 200, "wide", choice={"until_tokens": 3})
    (output,) = engine.run([ask])
    assert len(output.outputs[0].token_ids) == 200
    engine.assert_exact([ask], [output])
    assert engine.status()["wide"]["rows"] == 0


def explained(engine: GuidedEngine, ask: Ask, name: str) -> list[dict[str, Any]]:
    """Run a request that asks for an explanation; returns its lines."""
    file = engine.explanations / name
    file.touch()
    ask.choice["explain"] = name
    (output,) = engine.run([ask])
    engine.assert_exact([ask], [output])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["position"] for line in lines] == list(range(ask.max_tokens))
    assert [line["token"] for line in lines] == list(output.outputs[0].token_ids)
    return lines


@pytest.mark.parametrize("dynamic", [False, True])
def test_explanations_say_what_was_done(engine: GuidedEngine, dynamic: bool) -> None:
    prompt = list(range(50, 130))  # in two chunks: nothing is explained before the last
    choice = {"dynamic": dynamic, "until_tokens": 8}
    ask = Ask(prompt, 12, "pair", 2.0, also={"known": 0.5}, choice=choice)
    lines = explained(engine, ask, f"abc{dynamic}")
    sampled = [line["token"] for line in lines]
    guided = engine.reference_logits(ask, sampled).double().log_softmax(-1)
    unguided = engine.reference_logits(Ask(prompt, 12), sampled).double().log_softmax(-1)
    for position, line in enumerate(lines):
        token = line["token"]
        assert line["active"] == (position < 8)
        assert not line["masked"]
        assert line["guided_probability"] == pytest.approx(
            guided[position, token].exp().item(), abs=1e-3
        )
        assert line["target_probability"] == pytest.approx(
            unguided[position, token].exp().item(), abs=1e-3
        )
        assert [found[0] for found in line["target"]] == unguided[position].topk(5).indices.tolist()
        assert line["guided"][0][0] == token
        if position >= 8:
            assert line["networks"] == []
            assert line["kl"] == pytest.approx(0, abs=1e-5)
            continue
        p, difference = guided[position].exp(), guided[position] - unguided[position]
        kl = torch.where(p > 0, p * difference, 0.0).sum()
        assert line["kl"] == pytest.approx(kl.item(), abs=1e-3)
        weights = [weight for _, weight, _ in line["networks"]]
        assert [ordinal for ordinal, _, _ in line["networks"]] == [0, 1]
        if dynamic:
            assert 0 <= weights[0] <= 2.0
            assert 0 <= weights[1] <= 0.5
            at_bound = weights == pytest.approx([2.0, 0.5])
            assert at_bound or line["reached"] == pytest.approx(line["wanted"], abs=1e-3)
        else:
            assert weights == [2.0, 0.5]
            assert line["wanted"] is None


def test_contributions_add_up_to_the_change(engine: GuidedEngine) -> None:
    """log guided - log target = sum of contributions, less a term that all tokens share."""
    ask = Ask([60, 61], 10, "residual", 0.6, also={"pair": -0.5})
    for line in explained(engine, ask, "sum"):
        change = math.log(line["guided_probability"]) - math.log(line["target_probability"])
        shared = sum(contribution for _, _, contribution in line["networks"]) - change
        # KL(target || guided), which is never negative, plus what excluded tokens had.
        assert shared > -1e-3


COMBINATIONS: list[dict[str, Any]] = [{}, {"dynamic": True}, {"floor": 0.01}]


@pytest.mark.parametrize("choice", COMBINATIONS, ids=["static", "dynamic", "floor"])
@pytest.mark.parametrize("scale", [8.0, -8.0])
def test_what_a_grammar_forbids_stays_forbidden(
    engine: GuidedEngine, choice: dict[str, Any], scale: float
) -> None:
    name = f"grammar{scale}{len(choice)}{choice.get('floor')}"
    (engine.explanations / name).touch()
    ask = Ask([70, 71, 72], 12, "pair", scale, also={"known": -scale})
    ask.choice = {**choice, "explain": name}
    grammar = StructuredOutputsParams(regex="[abc ]{4,9}")
    ask.options = {"structured_outputs": grammar, "ignore_eos": False}
    (output,) = engine.run([ask])
    text = engine.spelling.text(output.outputs[0].token_ids).decode()
    assert re.fullmatch("[abc ]{4,9}", text), text
    lines = [json.loads(line) for line in (engine.explanations / name).read_text().splitlines()]
    assert lines
    assert all(line["masked"] for line in lines)


def count_messages(worker: Any) -> None:
    """Count those in which the engine asks for tokens alone."""
    ask_for_tokens, worker.asked = worker.sample_tokens, 0

    def sample_tokens(grammar: Any) -> Any:
        worker.asked += 1
        return ask_for_tokens(grammar)

    worker.sample_tokens = sample_tokens


def counted(worker: Any) -> int:
    del worker.sample_tokens
    asked: int = worker.asked
    return asked


def test_tokens_are_asked_for_by_themselves_only_where_a_grammar_masks_them(
    engine: GuidedEngine,
) -> None:
    def messages(*asks: Ask) -> int:
        engine.llm.collective_rpc(count_messages)
        try:
            outputs = engine.run(asks)
        finally:
            (asked,) = engine.llm.collective_rpc(counted)
        assert all(len(output.outputs[0].token_ids) == 6 for output in outputs)
        return asked

    plain, guided = Ask([70, 71, 72], 6), Ask([73, 74], 6, "pair", 2.0)
    assert messages(plain, guided) == 0
    grammar = StructuredOutputsParams(regex="[abc ]{9}")
    masked = Ask([75, 76], 6, "pair", options={"structured_outputs": grammar})
    assert messages(plain, guided, masked) >= 6


@pytest.mark.parametrize("choice", COMBINATIONS, ids=["static", "dynamic", "floor"])
def test_bad_words_and_bias_act_after_guidance(
    engine: GuidedEngine, choice: dict[str, Any]
) -> None:
    ask = Ask([73, 74], 10, "pair", 2.0, also={"known": 1.0}, choice=choice)
    (before,) = engine.run([ask])
    banned = set(before.outputs[0].token_ids)
    for options in (
        {"logit_bias": dict.fromkeys(banned, -100.0)},
        {"allowed_token_ids": [i for i in range(VOCAB - 1) if i not in banned]},
    ):
        (after,) = engine.run([Ask([73, 74], 10, "pair", 2.0, options, ask.also, choice)])
        assert not banned & set(after.outputs[0].token_ids)


def test_an_explanation_that_nobody_waits_for_is_not_written(engine: GuidedEngine) -> None:
    ask = Ask([62, 63], 4, "residual", choice={"explain": "gone"})
    engine.assert_exact([ask], engine.run([ask]))
    assert not (engine.explanations / "gone").exists()
    assert engine.explanations.name == EXPLAIN


@pytest.mark.parametrize(
    "choice",
    [{}, {"dynamic": True}, {"floor": 1e-3}],
    ids=["static", "dynamic", "floor"],
)
def test_prompt_logprobs_are_guided(engine: GuidedEngine, choice: dict[str, Any]) -> None:
    rng = random.Random(3)
    requests = [
        Ask([rng.randrange(10, VOCAB - 1) for _ in range(length)], 3, name, scale, choice=choice)
        for length in (2, 31, 64, 65, 150)
        for name, scale in (("pair", 1.0), ("known", -0.5))
    ]
    requests.append(Ask(requests[4].prompt, 2, "other", 0.7, choice=choice))
    requests.append(Ask(requests[4].prompt, 2, "known", 0.7, choice=choice, also={"pair": 0.6}))
    for ask in requests:
        ask.options = {"prompt_logprobs": 2}
    # The same again: the networks' prefix caches hold these prompts now.
    for outputs in (engine.run(requests), engine.run(requests)):
        engine.assert_exact(requests, outputs)
        for ask, output in zip(requests, outputs, strict=True):
            expected = engine.reference_prompt_logits(ask).log_softmax(-1)
            assert output.prompt_logprobs[0] is None
            assert len(output.prompt_logprobs) == len(ask.prompt)
            for position, found in enumerate(output.prompt_logprobs[1:]):
                token = ask.prompt[position + 1]
                assert found[token].logprob == pytest.approx(
                    expected[position, token].item(), abs=2e-3
                )
                best = expected[position].argmax().item()
                assert found[best].rank == 1


def test_prompt_logprobs_of_unguided_requests_stay_the_targets(engine: GuidedEngine) -> None:
    prompt = list(range(100, 140))
    plain = Ask(prompt, 2, options={"prompt_logprobs": 0})
    guided = Ask(prompt, 2, "pair", options={"prompt_logprobs": 0})
    alone, beside = engine.run([plain])[0], engine.run([guided, plain, guided])
    expected = engine.reference_prompt_logits(plain).log_softmax(-1)
    for output in (alone, beside[1]):
        for position, found in enumerate(output.prompt_logprobs[1:]):
            token = prompt[position + 1]
            assert found[token].logprob == pytest.approx(expected[position, token].item(), abs=1e-4)
    assert beside[0].prompt_logprobs[5][prompt[5]].logprob != pytest.approx(
        alone.prompt_logprobs[5][prompt[5]].logprob, abs=1e-3
    )
