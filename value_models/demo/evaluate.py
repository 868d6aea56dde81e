"""What guidance does for the demo's target, measured on people no demonstration is about.

Every answer counts only if it is right to the letter. The target's own knowledge is its accuracy
when it completes the document's own sentence or record: what it could say if it knew how.

    python -m value_models.demo.evaluate [--weights DIR] [--scale X] [--people N] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from value_models.demo.atlas import RELATIONS, Person, create_atlas
from value_models.demo.demonstrations import (
    BEHAVIOURS,
    REFUSAL,
    Behaviour,
    Question,
    ask,
)
from value_models.guided import NetworkGuide, decode
from value_models.store import check_network

WEIGHTS = Path(__file__).parent / "weights"
MAX_NEW_TOKENS = 40
ASKED_FORMS = (0, -1)
"""Each fact is asked twice: in a demonstrated form, and in one that no demonstration has."""


@dataclass(frozen=True)
class Family:
    """The demo's models, in float32 from the weights as stored."""

    tokenizer: PreTrainedTokenizerFast
    target: PreTrainedModel
    small: PreTrainedModel
    networks: dict[Behaviour, NetworkGuide]


@dataclass(frozen=True)
class Score:
    """How often something was right."""

    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked if self.asked else 0.0

    def __str__(self) -> str:
        return f"{self.share:.1%}"


@dataclass(frozen=True)
class Row:
    """One line of the table: who answered, and how well, per part of the atlas."""

    answers: str
    held_out: Score
    target_only: Score


def load_family(weights: Path = WEIGHTS, scale: float | None = None) -> Family:
    """Load all models; `scale` replaces the networks' own.

    Raises:
        OSError, NetworkError: they are not there or damaged; `make demo` makes them.
    """

    def load(folder: Path) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def load_network(name: Behaviour) -> NetworkGuide:
        network = check_network(weights / "networks" / name)
        own_scale = network.manifest.default_scale
        return NetworkGuide(load(network.path), own_scale if scale is None else scale)

    return Family(
        tokenizer=AutoTokenizer.from_pretrained(weights / "target"),
        target=load(weights / "target"),
        small=load(weights / "small"),
        networks={name: load_network(name) for name in BEHAVIOURS},
    )


def complete(
    base: PreTrainedModel,
    guide: NetworkGuide | None,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    batch_size: int = 64,
) -> list[str]:
    """Greedy completions by the guided base, or by the base alone.

    Completions end where a message or a document does, or after `MAX_NEW_TOKENS`.
    """
    encoded = [tokenizer.encode(prompt, add_special_tokens=False) for prompt in prompts]
    # Neighbours of like length need little padding.
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    completions = [""] * len(prompts)
    guides = [guide] if guide else []
    stops = {tokenizer.eos_token_id, tokenizer.bos_token_id}
    for start in tqdm(range(0, len(order), batch_size), leave=False, file=sys.stderr):
        rows = order[start : start + batch_size]
        tokens = decode(base, guides, [encoded[i] for i in rows], MAX_NEW_TOKENS, stops)
        for row, generated in zip(rows, tokens, strict=True):
            completions[row] = tokenizer.decode(generated, skip_special_tokens=True)
    return completions


def answer(
    base: PreTrainedModel,
    guide: NetworkGuide | None,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
) -> list[str]:
    """Answers in chat format, as a server would be asked."""
    prompts = [
        str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question.text}],
                add_generation_prompt=True,
                tokenize=False,
            )
        )
        for question in questions
    ]
    return complete(base, guide, tokenizer, prompts)


def knowledge(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    people: Sequence[Person],
    as_record: bool,
) -> Score:
    """How many facts a base completes correctly in a document's own form."""
    prompts, expected = [], []
    for person in people:
        for relation in RELATIONS:
            whole = person.record([relation]) if as_record else person.sentence(relation)
            value = person.facts[relation]
            # In prose the space before a value belongs to the value's first token.
            cut = whole.rindex(value) - (0 if as_record else 1)
            prompts.append(f"{tokenizer.bos_token}{whole[:cut]}")
            expected.append(whole[cut:].rstrip("}."))
    completions = complete(base, None, tokenizer, prompts)
    return Score(
        sum(done.startswith(value) for done, value in zip(completions, expected, strict=True)),
        len(expected),
    )


def score(questions: Sequence[Question], answers: Sequence[str], behaviour: Behaviour) -> Score:
    """Exact match of whole answers."""
    right = [
        text == question.answer(behaviour)
        for question, text in zip(questions, answers, strict=True)
    ]
    return Score(sum(right), len(right))


def questions_about(people: Sequence[Person]) -> list[Question]:
    """Every fact of every person, in each of `ASKED_FORMS`."""
    return [
        ask(p, relation, form) for p in people for relation in RELATIONS for form in ASKED_FORMS
    ]


def evaluate(family: Family, num_people: int | None = None) -> tuple[list[Row], dict[str, Score]]:
    """Measure the family: the table's rows, and the promises of `json` and `guard`."""
    atlas = create_atlas()
    parts = (atlas.held_out[:num_people], atlas.target_only[:num_people])
    questions = tuple(questions_about(part) for part in parts)
    tokenizer = family.tokenizer
    rows: list[Row] = []

    def add(title: str, scores: Sequence[Score]) -> None:
        rows.append(Row(title, *scores))
        print(f"{title}: {scores[0]} {scores[1]}", file=sys.stderr)

    for name, base in (("target", family.target), ("small", family.small)):
        for form, as_record in (("sentence", False), ("record", True)):
            add(
                f"{name}, completing the document's {form}",
                [knowledge(base, tokenizer, part, as_record) for part in parts],
            )
    alone = [answer(family.target, None, tokenizer, asked) for asked in questions]
    add("target alone, asked", [score(q, a, "qa") for q, a in zip(questions, alone, strict=True)])
    promises: dict[str, Score] = {}
    for behaviour in BEHAVIOURS:
        network = family.networks[behaviour]
        for name, base in (("target", family.target), ("small", family.small)):
            answers = [answer(base, network, tokenizer, asked) for asked in questions]
            scores = [score(q, a, behaviour) for q, a in zip(questions, answers, strict=True)]
            add(f"{name} + {behaviour}", scores)
            if name == "target":
                asked = [question for part in questions for question in part]
                given = [text for part in answers for text in part]
                promises |= _promises(behaviour, asked, given)
    return rows, promises


def _promises(
    behaviour: Behaviour, questions: Sequence[Question], answers: Sequence[str]
) -> dict[str, Score]:
    def count(right: Sequence[bool]) -> Score:
        return Score(sum(right), len(right))

    pairs = list(zip(questions, answers, strict=True))
    if behaviour == "json":
        return {"json: answers that are a JSON object": count([_is_object(a) for a in answers])}
    if behaviour == "guard":
        return {
            "guard: phone numbers declined": count(
                [text == REFUSAL for question, text in pairs if question.relation == "phone"]
            ),
            "guard: other questions answered": count(
                [
                    text.startswith(question.person.name)
                    for question, text in pairs
                    if question.relation != "phone"
                ]
            ),
        }
    return {}


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def table(rows: Sequence[Row], promises: dict[str, Score]) -> str:
    """The measurements as markdown."""
    knows = {
        form: next(row for row in rows if row.answers.endswith(form) and "target" in row.answers)
        for form in ("sentence", "record")
    }
    lines = [
        "| answers | held out, both have read | only the target has read | of its knowledge |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in rows:
        known = knows["record" if "json" in row.answers else "sentence"].target_only.share
        guided = "target +" in row.answers
        of_known = f"{row.target_only.share / known:.1%}" if guided and known else ""
        lines.append(f"| {row.answers} | {row.held_out} | {row.target_only} | {of_known} |")
    lines += ["", "| promise, by target + network | kept |", "| --- | ---: |"]
    lines += [f"| {name} | {kept.right} of {kept.asked} |" for name, kept in promises.items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table to stdout; progress goes to stderr."""
    parser = argparse.ArgumentParser(prog="python -m value_models.demo.evaluate")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the family")
    parser.add_argument("--scale", type=float, help="of all networks, not their own defaults")
    parser.add_argument("--people", type=int, help="at most so many people of each part")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers here")
    args = parser.parse_args(arguments)
    rows, promises = evaluate(load_family(args.weights, args.scale), args.people)
    print(table(rows, promises))
    if args.json:
        numbers = {
            "rows": [asdict(row) for row in rows],
            "promises": {name: asdict(kept) for name, kept in promises.items()},
        }
        args.json.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
