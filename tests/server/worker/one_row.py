"""One guided row without an engine, and three networks that it may choose."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from server.choice import Choice, ChosenNetwork
from server.worker.guidance import Guidance
from server.worker.history import ListedHistory
from server.worker.network import ValueNetwork
from server.worker.residency import Residency
from server.worker.row import GuidedRow
from tests.models import (
    TEXT,
    make_mapped_network,
    make_model,
    make_network,
    make_sentencepiece_tokenizer,
    make_tokenizer,
)
from tests.server.worker.alone import engine_config, process_group, residency

CONTEXT = 192
VOCAB = 512


@contextlib.contextmanager
def three_networks(root: Path) -> Iterator[Residency]:
    """Load "first", "second", and "mapped", which is of another vocabulary."""
    size: dict[str, Any] = {"max_position_embeddings": CONTEXT}
    target = make_model(root / "target", **size)
    networks = {
        "first": make_network(root / "first", seed=2, **size),
        "second": make_network(root / "second", seed=3, **size),
        "mapped": make_mapped_network(
            root / "mapped", make_tokenizer(), tokenizer=make_sentencepiece_tokenizer(), **size
        ),
    }
    config = engine_config(target, max_num_batched_tokens=48, max_model_len=CONTEXT)
    with process_group(root), residency(target, networks, config, value_memory_gb=0.1) as worker:
        yield worker


def chosen(worker: Residency, *names: str, **choice: Any) -> tuple[Choice, list[ValueNetwork]]:
    networks = {network.folder.name: network for network in worker.networks()}
    picked = [networks[name] for name in names]
    pinned = tuple(ChosenNetwork(n.folder.name, n.folder.version, 1.0) for n in picked)
    return Choice(pinned, VOCAB - 1, **choice), picked


def guided(worker: Residency, choice: Choice, prompt: list[int]) -> tuple[Guidance, GuidedRow]:
    guidance = Guidance(worker, torch.device("cpu"), None)
    row = GuidedRow(choice, ListedHistory(prompt, []))
    row.slot = 0
    guidance.arrange({0: row})
    return guidance, row


def shrinking_prompt(network: ValueNetwork) -> list[int]:
    """Return a prompt that the network can read, though not as far as its last token but one."""
    assert network.translator is not None
    read = network.translator._reader.read
    tokenizer = make_tokenizer()
    filler = tokenizer.encode(" a", add_special_tokens=False)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    for start in range(len(ids) - 6):
        ending = ids[start : start + 6]
        for repeats in range(CONTEXT - 16, CONTEXT):
            prompt: list[int] = filler * repeats + ending
            before, whole = read(prompt[:-1]), read(prompt)
            if len(whole.ids) <= CONTEXT < len(before.ids) and not before.waiting:
                return prompt
    raise AssertionError("no such prompt")
