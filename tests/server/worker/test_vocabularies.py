"""Networks of another vocabulary steer exactly as if every step read the whole text anew."""

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.models import (
    OTHER_TEXT,
    make_mapped_network,
    make_model,
    make_network,
    make_sentencepiece_tokenizer,
    make_tokenizer,
)
from tests.server.worker.engine import Ask, GuidedEngine, guided_engine, one_context_gb

CONTEXT = 320
SCALES = (1.0, 0.4, -1.0, 2.5)
TEXTS = (
    "Where was Ana Kovac born? Ana Kovac was born in",
    "A naïve café in Žižkov: été, e\u0301te\u0301, ﬁn, Ⅷ",
    "東京は日本の首都です。北京是中国的首都。",
    "Привет, мир! Съешь же ещё этих мягких булок",
    "مرحبا بالعالم! שלום עולם",
    "नमस्ते दुनिया, สวัสดีชาวโลก",
    "🚢🚢 👩‍👩‍👧‍👦 🇸🇮 🏴󠁧󠁢󠁳󠁣󠁴󠁿 and so on",
    "def add(first: int, second: int) -> int:\n    return first + second\n\n\n",
    '{"name": "Ana Kovac", "born": "Velenje", "works": ["The Salt Road", ',
    "  two spaces,\t\ttabs \r\n\r\n   and a new line \n",
    "Who wrote <|user|> or [INST] or </s> or <0x41> as text?",
    "x",
)
CHATS: tuple[list[dict[str, str]], ...] = (
    [{"role": "user", "content": "Where was Ana Kovac born?"}],
    [
        {"role": "system", "content": "Answer as a sailor: ⚓."},
        {"role": "user", "content": "Who wrote The Salt Road?"},
        {"role": "assistant", "content": "Teodor Lindqvist wrote it."},
        {"role": "user", "content": "東京?"},
    ],
)


def prompts(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[list[int]]:
    """Prompts of every kind that a client may send."""
    texts = [
        tokenizer(text, add_special_tokens=i % 2 == 0).input_ids for i, text in enumerate(TEXTS)
    ]
    chats = [
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for chat in CHATS
    ]
    # What is no text: any ids at all, a character's first bytes, bytes that are no UTF-8.
    garbage = [[rng.randrange(len(tokenizer)) for _ in range(length)] for length in (1, 7, 60)]
    broken = [ids[:-1] for ids in texts[2:7]]
    return [*texts, *chats, *garbage, *broken, [*texts[0], *garbage[1], *texts[3]]]


def mixed_asks(engine: GuidedEngine, seed: int) -> list[Ask]:
    """Every prompt, on networks of this and another vocabulary, on several of them, on none."""
    rng = random.Random(seed)
    tokenizer = engine.llm.get_tokenizer()
    mapped = sorted(engine.mapped)
    asks = []
    for i, prompt in enumerate(prompts(tokenizer, rng)):
        # Most on one network of another vocabulary; a few beside them.
        network = (*mapped, *mapped, "same", None)[(i + seed) % (2 * len(mapped) + 2)]
        ask = Ask(prompt, rng.randint(8, 40), network, rng.choice(SCALES))
        if i % 5 == 2 and network is not None:
            ask.also = {name: 0.7 for name in (*mapped, "same") if name != network}
        if i % 6 == 3:
            ask.options = {"n": 3, "temperature": 1.0, "top_k": 1}
        asks.append(ask)
    # Where a run of text begins, with a dummy space of one tokenizer's and none of the other's.
    start, end = [tokenizer.bos_token_id], tokenizer.eos_token_id
    asks += [Ask(ids, 8, name) for name in mapped for ids in (start, [*asks[0].prompt, end])]
    return asks


def make_models(root: Path, kind: str) -> tuple[Path, dict[str, Path]]:
    """A target, a network of its vocabulary ("same") and two of other vocabularies."""
    byte_level, pieces = make_tokenizer(), make_sentencepiece_tokenizer()
    own = {"byte-level": byte_level, "pieces": pieces}[kind]
    # The second one knows no chats: to it BOS is the start of text, and no part of a turn.
    others = {
        "byte-level": [pieces, make_sentencepiece_tokenizer(size=450, dummy_space="each")],
        "pieces": [byte_level, make_tokenizer(OTHER_TEXT, 400)],
    }[kind]
    size = {"max_position_embeddings": CONTEXT}
    # A padded vocabulary: ids beyond the map.
    target = make_model(root / "target", tokenizer=own, vocab_size=len(own) + 16, layers=3, **size)
    shapes: list[dict[str, Any]] = [
        {"architecture": "llama"},
        {"architecture": "qwen3", "hidden_size": 128, "heads": 4, "kv_heads": 2},
    ]
    networks = {"same": make_network(root / "same", tokenizer=own, seed=2, **size)}
    others[1] = copy.deepcopy(others[1])
    others[1].chat_template = None
    for i, (tokenizer, shape) in enumerate(zip(others, shapes, strict=True)):
        networks[f"other-{i}"] = make_mapped_network(
            root / f"other-{i}", own, tokenizer=tokenizer, seed=3 + i, **shape, **size
        )
    return target, networks


@pytest.fixture(scope="module", params=["byte-level", "pieces"])
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Path]]:
    return make_models(tmp_path_factory.mktemp("models"), request.param)


# First, before the other tests' engine runs beside its own.
def test_preemption_chunked_prefill_and_a_tiny_value_cache(
    models: tuple[Path, dict[str, Path]],
) -> None:
    """Everything scarce: prompts come in chunks, requests are thrown out, value blocks run out."""
    with guided_engine(
        *models,
        value_memory_gb=one_context_gb(models[1], 160),
        prefix_caching=False,
        enable_prefix_caching=False,
        block_size=32,
        num_gpu_blocks_override=12,
        max_model_len=160,
        max_num_seqs=8,
        max_num_batched_tokens=24,
        disable_log_stats=False,
    ) as engine:
        asks = mixed_asks(engine, seed=2)
        for ask in asks[::2]:  # on every network, to use up their blocks
            ask.network = ask.network or "same"
            ask.also = {name: 0.7 for name in engine.versions if name != ask.network}
        engine.assert_exact(asks, engine.run(asks))
        metrics = {metric.name: metric for metric in engine.llm.get_metrics()}
        assert metrics["vllm:num_preemptions"].value > 0
        status = engine.status()
        assert sum(status[name]["drops"] for name in engine.mapped) > 0


@pytest.fixture(scope="module")
def engine(models: tuple[Path, dict[str, Path]]) -> Iterator[GuidedEngine]:
    with guided_engine(
        *models, value_memory_gb=0.1, max_num_seqs=8, enable_prefix_caching=True
    ) as engine:
        yield engine


def test_mixed_requests(engine: GuidedEngine) -> None:
    """Cold, then with warm prefix caches."""
    asks = mixed_asks(engine, seed=0)
    assert len(asks) >= 16
    cold = engine.run(asks)
    engine.assert_exact(asks, cold)
    before = engine.status()
    warm = engine.run(asks)
    after = engine.status()
    for first, second in zip(cold, warm, strict=True):
        assert [c.token_ids for c in first.outputs] == [c.token_ids for c in second.outputs]
    for name in engine.mapped:
        assert after[name]["prefix_hits"] > before[name]["prefix_hits"]


def test_alone_or_in_company(engine: GuidedEngine) -> None:
    asks = mixed_asks(engine, seed=1)[:8]
    together = engine.run(asks)
    engine.assert_exact(asks, together)
    for ask, output in zip(asks, together, strict=True):
        (alone,) = engine.run([ask])
        assert alone.outputs[0].token_ids == output.outputs[0].token_ids


def test_a_block_that_may_be_rewritten_is_never_shared(engine: GuidedEngine) -> None:
    """Rows that end within a word, everywhere around the end of a block, and then change it."""
    tokenizer = engine.llm.get_tokenizer()

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False).input_ids)

    network = sorted(engine.mapped)[0]
    leads = [ids("Ana. " * i + "The Salt R") for i in range(5, 25)]
    completed = {"allowed_token_ids": ids("oad")[:1]}
    engine.run([Ask(lead, 3, network, options=completed) for lead in leads])
    before = engine.status()[network]["prefix_hits"]
    asks = [Ask([*lead, *ids("? Lanterns, " * 3)], 4, network) for lead in leads]
    engine.assert_exact(asks, engine.run(asks))
    assert engine.status()[network]["prefix_hits"] > before


def test_a_mapped_network_is_loaded_while_others_decode(
    engine: GuidedEngine, models: tuple[Path, dict[str, Path]]
) -> None:
    folder = models[1]["other-0"]
    for _ in engine.load("late", folder, mapped=True):
        pass
    engine.mapped["late"] = engine.mapped["other-0"]
    try:
        asks = [ask for ask in mixed_asks(engine, seed=9) if not ask.also]
        engine.assert_exact(asks, engine.run(asks))
        assert any(ask.network == "late" for ask in asks)
        assert engine.status()["late"]["mapped"]
    finally:
        del engine.mapped["late"]
