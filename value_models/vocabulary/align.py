"""Building the map between a network's vocabulary and a target's: `trimtab align`."""

from __future__ import annotations

import hashlib
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from os.path import commonprefix
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tqdm import tqdm

from value_models.vocabulary.corpus import read_texts
from value_models.vocabulary.map import Shift, VocabularyMap
from value_models.vocabulary.pairs import PairCounts, count_pairs
from value_models.vocabulary.stream import is_special, special
from value_models.vocabulary.structure import Rule
from value_models.vocabulary.template import Template, TurnRules, turn_rules
from value_models.vocabulary.tokens import (
    DummySpace,
    Vocabulary,
    VocabularyError,
    load_vocabulary,
)

BYTES_PER_PROCESS = 1 << 20
"""Text for which starting another process pays off."""
NUM_EXAMPLES = 8

MapMethod = Literal["start", "warping", "exact"]
MAP_METHODS: tuple[MapMethod, ...] = ("start", "warping", "exact")
"""How a token finds its counterpart; see `_Matcher`."""


def align(
    value_folder: str | Path,
    target: str | Path,
    corpus: Sequence[str | Path],
    *,
    specials: Iterable[str] = (),
    method: MapMethod = "start",
    processes: int | None = None,
    progress: bool = False,
) -> VocabularyMap:
    """Build the map that lets a network steer targets of another tokenizer.

    Args:
        value_folder: the network's folder.
        target: a model's folder, its name on the hub, or a tokenizer file of mistral_common's.
        corpus: files of plain text, or `.jsonl` of conversations; see `read_texts`.
        specials: overrides, `TARGET=VALUE` by spelling; `TARGET=` leaves one without counterpart.
        method: how text tokens find their counterparts; "warping" and "exact" are for comparison.
        processes: None: as many as the machine has cores and the corpus is worth.
        progress: show a progress bar on stderr.

    Returns:
        The map; `VocabularyMap.save` puts it into the network's folder.

    Raises:
        VocabularyError: a tokenizer or file cannot be used.
    """
    files = [Path(file) for file in corpus]
    for file in files:
        if not file.is_file():
            raise VocabularyError(f"corpus file {file}: there is no such file")
    if not Path(value_folder).is_dir():
        raise VocabularyError(f"{value_folder}: there is no such network folder")
    size = sum(file.stat().st_size for file in files)
    value, there = load_vocabulary(value_folder), load_vocabulary(target)
    if processes is None:
        processes = max(1, min(os.cpu_count() or 1, size // BYTES_PER_PROCESS))
    with tqdm(
        total=size, unit="B", unit_scale=True, desc="align", disable=not progress, file=sys.stderr
    ) as bar:
        return align_vocabularies(
            value,
            there,
            read_texts(files),
            specials=specials,
            method=method,
            processes=processes,
            provenance={"files": [file.name for file in files]},
            progress=bar,
        )


def align_vocabularies(
    value: Vocabulary,
    target: Vocabulary,
    texts: Iterable[str],
    *,
    specials: Iterable[str] = (),
    method: MapMethod = "start",
    processes: int = 1,
    provenance: dict[str, Any] | None = None,
    progress: Any = None,
) -> VocabularyMap:
    """`align` for vocabularies that are loaded already (`Vocabulary.of(tokenizer)`) and any texts.

    The result does not depend on the number of processes.
    """
    counts, digest = PairCounts(), hashlib.sha256()
    for part in count_pairs(
        value, target, _hashed(texts, digest), processes, warping=method == "warping"
    ):
        counts += part
        if progress is not None:
            progress.update(part.num_bytes)
    templates = Template(target, target.prefix), Template(value)
    turns = turn_rules(*templates)
    overrides = _overrides(specials, target, value)
    special_ids = _specials_by_meaning(target, value, *templates) | overrides
    matcher = _Matcher(value, counts, special_ids, method)
    shift = _shift(target.dummy_space, value.dummy_space, turns)
    shifts: tuple[Shift, ...] = ("none",) if shift == "none" else ("none", shift)
    rows = [
        [matcher.match(token_id, token, change) for token_id, token in enumerate(target.tokens)]
        for change in shifts
    ]
    return VocabularyMap(
        target_fingerprint=target.fingerprint,
        value_fingerprint=value.fingerprint,
        columns=torch.tensor([[match.column for match in row] for row in rows]),
        num_value_ids=len(value.tokens),
        tokens=target.tokens,
        dummy_space=target.dummy_space,
        prefix=target.prefix,
        value_prefix=value.prefix,
        placeholder=value.bos if value.bos is not None else value.eos or 0,
        shift=shift,
        rules=_all_rules(turns, special_ids, overrides),
        report=_report(target, value, counts, rows[0], turns)
        | {"method": method}
        | {"corpus": (provenance or {}) | {"sha256": digest.hexdigest()}},
    )


class Match(NamedTuple):
    """The counterpart of a target's token."""

    column: int
    """The network's id; -1: none."""
    origin: Literal["exact", "aligned", "prefix", "special", "none", "unused"]


class _Matcher:
    """Finds a counterpart for each of the target's tokens, by one of three methods.

    - `start`: the network's token that begins most often where this one does. It need not be the
      one of equal bytes: where the target writes "'" and the network "'s", the network never says
      "'" alone.
    - `warping`: the token of equal bytes, or else the one that warping aligns with it most often
      (arXiv 2410.21027).
    - `exact`: the token of equal bytes, or none.

    What the corpus does not decide takes the token of equal bytes, or else the longest token that
    its text begins with: what the network would say next in text that goes on so.
    """

    def __init__(
        self,
        value: Vocabulary,
        counts: PairCounts,
        special_ids: dict[int, int],
        method: MapMethod,
    ) -> None:
        self._value = value
        self._special_ids = special_ids
        self._method = method
        self._by_bytes: dict[bytes, int] = {}
        # A byte token stands for its byte only where no other token does.
        for token_id in sorted(range(len(value.tokens)), key=lambda i: (i in value.byte_tokens, i)):
            token = value.tokens[token_id]
            if token:
                self._by_bytes.setdefault(token, token_id)
        self._exact = counts.exact
        self._counted: dict[int, list[tuple[int, int]]] = {}
        counted = {"start": counts.starts, "warping": counts.warped, "exact": Counter()}[method]
        for (target_id, value_id), count in counted.items():
            self._counted.setdefault(target_id, []).append((value_id, count))

    def match(self, token_id: int, token: bytes | None, change: Shift) -> Match:
        if token is None:
            column = self._special_ids.get(token_id, -1)
            return Match(column, "special" if column >= 0 else "unused")
        shifted = _shifted(token, change)
        exact = self._by_bytes.get(shifted)
        if token_id in self._counted and shifted == token:
            often, count = self._most_often(token_id, token)
            if exact is None or (self._method == "start" and count > self._exact[token_id]):
                return Match(often, "aligned")
        if exact is not None:
            return Match(exact, "exact")
        if self._method != "exact":
            for end in range(len(shifted) - 1, 0, -1):
                if shifted[:end] in self._by_bytes:
                    return Match(self._by_bytes[shifted[:end]], "prefix")
        return Match(-1, "none")

    def _most_often(self, target_id: int, token: bytes) -> tuple[int, int]:
        """The token paired with it most often, and how often.

        Warping pairs a token that is spelled in several with each of them as often; the one that it
        begins with is what comes next.
        """

        def rank(pair: tuple[int, int]) -> tuple[int, int, int]:
            value_id, count = pair
            shared = commonprefix([token, self._value.tokens[value_id] or b""])  # noqa: RUF071
            return count, len(shared), -value_id

        return max(self._counted[target_id], key=rank)


def _shifted(token: bytes, change: Shift) -> bytes:
    match change:
        case "strip":
            return token.removeprefix(b" ") or token
        case "add":
            return b" " + token
        case _:
            return token


def _shift(target: DummySpace, value: DummySpace, turns: TurnRules) -> Shift:
    """Decide what the row for a run's start does.

    Where both tokenizers put dummy spaces, but not in the same places, the row is made for the
    place that matters most: behind the prompt to generate.
    """
    if "never" in (target, value):
        return "none" if target == value else "add" if target == "never" else "strip"
    if turns.generation is None:
        return "none"
    output = turns.generation.output
    target_spaced = target == "each" and is_special(turns.generation.pattern[-1])
    value_spaced = value == "each" and bool(output) and isinstance(output[-1], int)
    return "none" if target_spaced == value_spaced else "strip" if target_spaced else "add"


def _specials_by_meaning(
    target: Vocabulary, value: Vocabulary, target_template: Template, value_template: Template
) -> dict[int, int]:
    """Pair special tokens: equal spelling, then BOS, EOS and the end of a turn."""
    spelled = {text: token_id for token_id, text in sorted(value.specials.items(), reverse=True)}
    pairs = {i: spelled[text] for i, text in target.specials.items() if text in spelled}
    end = value_template.end_of_turn if value_template.end_of_turn is not None else value.eos
    meanings = (
        (target.bos, value.bos),
        (target.eos, value.eos if value.eos is not None else end),
        # Last: where the target's EOS ends its turns, so does what it is paired with.
        (target_template.end_of_turn, end),
    )
    for target_id, value_id in meanings:
        if target_id is not None and value_id is not None and target_id in target.specials:
            pairs[target_id] = value_id
    return pairs


def _overrides(specials: Iterable[str], target: Vocabulary, value: Vocabulary) -> dict[int, int]:
    targets = {text: token_id for token_id, text in target.specials.items()}
    values = {text: token_id for token_id, text in value.specials.items()} | {"": -1}
    found = {}
    for pair in specials:
        # Either side may contain a "=" itself.
        cuts = (index for index, character in enumerate(pair) if character == "=")
        sides = [(pair[:cut], pair[cut + 1 :]) for cut in cuts]
        known = [(left, right) for left, right in sides if left in targets and right in values]
        if not known:
            raise VocabularyError(
                f"{pair!r} does not pair a special token of the target with one of the network: "
                "write TARGET=VALUE as they are spelled, or TARGET= for none"
            )
        found[targets[known[0][0]]] = values[known[0][1]]
    return found


def _all_rules(
    turns: TurnRules, special_ids: dict[int, int], overrides: dict[int, int]
) -> tuple[Rule, ...]:
    overridden = set(map(special, overrides))
    rules = {
        (rule.pattern, rule.before): rule for rule in turns.rules if rule.pattern not in overridden
    }
    for token_id, value_id in special_ids.items():
        if value_id >= 0:
            symbol = special(token_id)
            rules.setdefault((symbol, ""), Rule(symbol, (value_id,)))
    return tuple(rules[key] for key in sorted(rules))


def _report(
    target: Vocabulary,
    value: Vocabulary,
    counts: PairCounts,
    matches: list[Match],
    turns: TurnRules,
) -> dict[str, Any]:
    kinds = [match.origin for match in matches]
    occurrences: Counter[str] = Counter()
    for token_id, count in counts.seen.items():
        occurrences[kinds[token_id]] += count
    examples = {
        origin: [
            [_shown(target, token_id), _shown(value, matches[token_id].column)]
            for token_id in sorted(
                (i for i, kind in enumerate(kinds) if kind == origin and _shown(target, i)),
                key=lambda i: (-counts.seen[i], i),
            )[:NUM_EXAMPLES]
        ]
        for origin in ("aligned", "prefix", "special", "none", "unused")
    }
    return {
        "tokens": dict(sorted(Counter(kinds).items())),
        "occurrences": dict(sorted(occurrences.items())),
        "examples": examples,
        "texts": counts.num_texts,
        "bytes": counts.num_bytes,
        "lossy_texts": counts.num_lossy,
        "warnings": list(turns.warnings),
    }


def _shown(vocabulary: Vocabulary, token_id: int) -> str:
    token = vocabulary.tokens[token_id] if token_id >= 0 else b""
    return vocabulary.specials.get(token_id, "") if token is None else repr(token)[2:-1]


def _hashed(texts: Iterable[str], digest: hashlib._Hash) -> Iterator[str]:
    for text in texts:
        digest.update(text.encode("utf-8", "replace") + b"\0")
        yield text
