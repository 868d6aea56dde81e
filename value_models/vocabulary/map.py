"""The map between two vocabularies, and its file in the network's folder.

The file is safetensors only: the columns, the target's token bytes, and one JSON string for the
rest. Whoever reads a map needs neither the target's tokenizer nor trust in where the file came
from.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from value_models.vocabulary.stream import START, is_special, special, special_id
from value_models.vocabulary.structure import Rule
from value_models.vocabulary.tokens import DummySpace, VocabularyError

MAP_FOLDER = "vocabulary_maps"
METADATA_KEY = "vocabulary_map"
MAX_IDS = 1 << 20  # larger than every known vocabulary
MAX_STRUCTURE = 1 << 20

Shift = Literal["none", "strip", "add"]
Fingerprint = Annotated[str, Field(pattern=r"^sha256:[0-9a-f]{64}$")]
TokenId = Annotated[int, Field(ge=0, lt=MAX_IDS, strict=True)]
Role = Annotated[str, Field(max_length=64)]
Symbol = Annotated[int, Field(ge=-1, lt=MAX_IDS, strict=True)]


@dataclass(frozen=True)
class VocabularyMap:
    """Carries one network's logits and reading to targets of one tokenizer."""

    target_fingerprint: str
    value_fingerprint: str
    columns: torch.Tensor
    """int64 `[1 or 2, num_target_ids]`: the column of the value logits that each target id takes,
    -1 for none. Row 0: within text. Row 1, if present: where a text run begins and only one of
    the tokenizers puts a dummy space there ("▁Ana" against "Ana"); `Reading.at_start` says when."""
    num_value_ids: int
    """Ids of the network's tokenizer; every column is below."""
    tokens: tuple[bytes | None, ...]
    """The bytes of the target's tokens by id; None for special tokens and unused ids."""
    dummy_space: DummySpace
    """Where the target's tokenizer puts a space of its own."""
    prefix: tuple[int, ...]
    """What the target's tokenizer puts in front of plain text: usually BOS or nothing."""
    value_prefix: tuple[int, ...]
    """What the network's tokenizer puts there."""
    placeholder: int
    """The network's id that stands alone for an empty history."""
    shift: Shift = "none"
    """What row 1 of the columns does to a target token before it looks for its counterpart."""
    rules: tuple[Rule, ...] = ()
    """Chat structure and special tokens; a special token without a rule is dropped."""
    report: dict[str, Any] = field(default_factory=dict)
    """Counts and provenance, for people to read."""

    @property
    def structure(self) -> tuple[Rule, ...]:
        """All rules, those for plain text included: its BOS becomes the network's own start."""
        stated = {rule.pattern for rule in self.rules if not rule.before}
        plain = [Rule(pattern, self.value_prefix) for pattern in self.plain_starts]
        return (*self.rules, *(rule for rule in plain if rule.pattern not in stated))

    @property
    def plain_starts(self) -> tuple[str, ...]:
        """How plain text may begin: with or without what the target's tokenizer adds itself."""
        return tuple(dict.fromkeys((START, START + "".join(map(special, self.prefix)))))

    @property
    def highest_value_id(self) -> int:
        """The largest of the network's ids that the map itself names."""
        named = [part for rule in self.rules for part in rule.output if isinstance(part, int)]
        return max(int(self.columns.max()), self.placeholder, *self.value_prefix, *named)

    def save(self, folder: Path) -> Path:
        """Write the map into a network's folder, whole or not at all, and return the file.

        Raises:
            VocabularyError: the folder cannot be written.
        """
        texts = [token for token in self.tokens if token is not None]
        lengths = [-1 if token is None else len(token) for token in self.tokens]
        tensors = {
            "columns": self.columns.to(torch.int32).contiguous(),
            "token_bytes": torch.frombuffer(
                bytearray(b"".join(texts)) or bytearray(1), dtype=torch.uint8
            )[: sum(map(len, texts))],
            "token_lengths": torch.tensor(lengths, dtype=torch.int32),
        }
        header = _Header(
            format_version=1,
            target_fingerprint=self.target_fingerprint,
            value_fingerprint=self.value_fingerprint,
            num_value_ids=self.num_value_ids,
            dummy_space=self.dummy_space,
            prefix=list(self.prefix),
            value_prefix=list(self.value_prefix),
            placeholder=self.placeholder,
            shift=self.shift,
            rules=[rule.to_json() for rule in self.rules],
            report=self.report,
        )
        file = map_file(folder, self.target_fingerprint)
        scratch = file.with_suffix(".partial")
        try:
            file.parent.mkdir(exist_ok=True)
            save_file(tensors, scratch, {METADATA_KEY: header.model_dump_json()})
            scratch.chmod(0o644)  # safetensors lets only the owner read, and servers run as others
            scratch.replace(file)
        except (OSError, SafetensorError) as error:
            raise VocabularyError(f"{file} cannot be written ({error})") from error
        return file

    @classmethod
    def load(cls, file: Path) -> VocabularyMap:
        """Read a map and check every field, so that using it cannot go out of bounds.

        Raises:
            VocabularyError: not a map, truncated, corrupt, or with ids out of range.
        """
        try:
            with safe_open(file, framework="pt") as content:
                metadata = content.metadata() or {}
                tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
            header = _Header.model_validate_json(metadata[METADATA_KEY])
            return _checked(header, tensors)
        except ValidationError as error:
            fault = error.errors(include_url=False)[0]
            place = ".".join(map(str, fault["loc"])) or "header"
            reason = f"{place}: {fault['msg']}"
        except KeyError as error:
            reason = f"it has no {error.args[0]}"
        except (SafetensorError, ValueError, OSError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
        raise VocabularyError(
            f"{file.name} is no usable vocabulary map ({reason}); "
            "remove it or run `trimtab align` again"
        )


def map_file(folder: Path, target_fingerprint: str) -> Path:
    """Where a network's map to targets of this tokenizer fingerprint lies."""
    return (
        Path(folder) / MAP_FOLDER / f"{target_fingerprint.removeprefix('sha256:')[:16]}.safetensors"
    )


class _Header(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format_version: Literal[1]
    target_fingerprint: Fingerprint
    value_fingerprint: Fingerprint
    num_value_ids: Annotated[int, Field(gt=0, le=MAX_IDS, strict=True)]
    dummy_space: DummySpace
    prefix: Annotated[list[TokenId], Field(max_length=16)]
    value_prefix: Annotated[list[TokenId], Field(max_length=16)]
    placeholder: TokenId
    shift: Shift
    rules: list[tuple[list[Symbol | str], list[TokenId | str], Role, Role]]
    report: dict[str, Any]


def _checked(header: _Header, tensors: dict[str, torch.Tensor]) -> VocabularyMap:
    columns, token_bytes, lengths = (
        tensors.pop(name) for name in ("columns", "token_bytes", "token_lengths")
    )
    if tensors:
        raise ValueError(f"unknown tensor {sorted(tensors)[0]!r}")
    num_target_ids = lengths.numel()
    rows = 1 if header.shift == "none" else 2
    if columns.dtype != torch.int32 or columns.shape != (rows, num_target_ids):
        raise ValueError("columns do not have one row of int32 per shift and one column per token")
    if not 0 < num_target_ids <= MAX_IDS or lengths.dtype != torch.int32 or lengths.dim() != 1:
        raise ValueError("token_lengths is not a list of int32")
    if token_bytes.dtype != torch.uint8 or token_bytes.dim() != 1 or bool((lengths < -1).any()):
        raise ValueError("token_bytes is not a list of bytes")
    ends = torch.cumsum(lengths.clamp(min=0).long(), 0)
    if int(ends[-1]) != token_bytes.numel():
        raise ValueError("token_bytes and token_lengths disagree")
    if int(columns.min()) < -1 or int(columns.max()) >= header.num_value_ids:
        raise ValueError("columns out of the network's vocabulary")
    blob = token_bytes.numpy().tobytes()
    tokens = tuple(
        None if length < 0 else blob[start:end]
        for length, (start, end) in zip(
            lengths.tolist(), pairwise((0, *ends.tolist())), strict=True
        )
    )
    rules = tuple(map(Rule.of_json, header.rules))
    _check_rules(rules, tokens, header.num_value_ids)
    own_ids = (*header.value_prefix, header.placeholder)
    if max(own_ids) >= header.num_value_ids or max(header.prefix, default=0) >= num_target_ids:
        raise ValueError("special tokens out of the vocabulary")
    if any(tokens[token_id] is not None for token_id in header.prefix):
        raise ValueError("the prefix holds a token that is not special")
    return VocabularyMap(
        target_fingerprint=header.target_fingerprint,
        value_fingerprint=header.value_fingerprint,
        columns=columns.long(),
        num_value_ids=header.num_value_ids,
        tokens=tokens,
        dummy_space=header.dummy_space,
        prefix=tuple(header.prefix),
        value_prefix=tuple(header.value_prefix),
        placeholder=header.placeholder,
        shift=header.shift,
        rules=rules,
        report=header.report,
    )


def _check_rules(
    rules: tuple[Rule, ...], tokens: tuple[bytes | None, ...], num_value_ids: int
) -> None:
    if sum(len(rule.pattern) + len(rule.output) for rule in rules) > MAX_STRUCTURE:
        raise ValueError("more chat structure than any template has")
    if len({(rule.pattern, rule.before) for rule in rules}) != len(rules):
        raise ValueError("two rules for one pattern")
    for rule in rules:
        if not rule.pattern or not is_special(rule.pattern[0]) or START in rule.pattern[1:]:
            raise ValueError("a rule does not begin with a special token")
        # A text part of a rule is bytes, spelled one character each.
        for symbol in rule.pattern.removeprefix(START):
            token_id = special_id(symbol)
            if token_id >= 0 and (token_id >= len(tokens) or tokens[token_id] is not None):
                raise ValueError("a rule names a token that is not special")
        if any(isinstance(part, int) and part >= num_value_ids for part in rule.output):
            raise ValueError("a rule's output is out of the network's vocabulary")
        for part in rule.output:
            if isinstance(part, str):
                part.encode()  # a lone surrogate raises UnicodeEncodeError, a ValueError
