"""The cells of the study's tables: who is asked, and how it is steered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from value_models.demo.demonstrations import Question
from value_models.demo.evaluate import Score, knowledge, questions_about
from value_models.guided import Guide, MappedGuide, NetworkGuide, PairGuide
from value_models.store import check_network
from value_models.study.family import NAMES, base_path, load_base
from value_models.study.maps import load_reader
from value_models.study.measure import accuracy, answers
from value_models.study.recipes import RECIPES, SEEDS, network_path, tuned_path
from value_models.vocabulary.align import MapMethod

Method = Literal["knows", "alone", "tuned", "network", "warping", "exact", "pair"]
"""How a base answers: not asked, but completing a document's own sentence; on its own; after full
fine-tuning; steered by a network, which across vocabularies takes a map (the default one, one made
by time warping, or one of exact matches only); or steered by a tuned pair."""

MAP_METHODS: dict[Method, MapMethod] = {"network": "start", "warping": "warping", "exact": "exact"}


class Cell(NamedTuple):
    """One accuracy to be measured."""

    base: str
    method: Method
    recipe: str = ""
    seed: int = 0
    scale: float = 1.0

    def __str__(self) -> str:
        return " / ".join(map(str, self))


def cells() -> Iterator[Cell]:
    """All cells, the quick ones first."""
    for base in NAMES:
        yield Cell(base, "knows")
        yield Cell(base, "alone")
        for seed in SEEDS:
            yield Cell(base, "tuned", seed=seed)
    for seed in SEEDS:
        for base in NAMES:
            yield Cell(base, "network", "residual", seed)
            yield Cell(base, "network", "residual", seed, scale=1.5)
        for recipe in RECIPES:
            if recipe != "residual":
                yield Cell("small", "network", recipe, seed)
                yield Cell("fivefold", "network", recipe, seed)
        for recipe in ("norm 0", "norm 1", "norm 10"):
            yield Cell("foreign", "network", recipe, seed)
        for recipe in ("norm 0", "residual"):
            yield Cell("foreign", "warping", recipe, seed)
            yield Cell("foreign", "exact", recipe, seed)
        for base in ("twice", "fivefold", "newer"):
            yield Cell(base, "pair", seed=seed)


def measure(cell: Cell, folder: Path) -> Score:
    """Measure one cell with the models in `folder`."""
    base = load_base(cell.base, folder / "bases")
    if cell.method == "knows":
        return knowledge(base.model, base.tokenizer, base.people, as_record=False)
    if cell.method == "tuned":
        base = base.with_model(_load(tuned_path(cell.base, cell.seed, folder)))
    return accuracy(base, list(_guides(cell, folder)))


def wrong_answers(cell: Cell, folder: Path) -> list[tuple[Question, str]]:
    """What a guided base was asked and did not answer right, and what it said."""
    base = load_base(cell.base, folder / "bases")
    questions = questions_about(base.people)
    said = answers(base, list(_guides(cell, folder)), questions)
    return [(q, text) for q, text in zip(questions, said, strict=True) if text != q.answer("qa")]


def _guides(cell: Cell, folder: Path) -> Iterator[Guide]:
    if cell.method == "pair":
        expert = _load(tuned_path("small", cell.seed, folder))
        yield PairGuide(expert, _load(base_path("small", folder / "bases")), cell.scale)
    elif cell.method in ("network", "warping", "exact"):
        path = network_path(cell.recipe, cell.seed, folder)
        if cell.base == "foreign":
            method = MAP_METHODS[cell.method]
            guide = NetworkGuide(_load(path), cell.scale)
            yield MappedGuide(guide, load_reader(method, folder))
        else:
            yield NetworkGuide(_load(path), cell.scale, check_network(path).manifest.kind)


def _load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
