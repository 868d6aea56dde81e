"""What a chat template puts between messages, and the rules that carry it to another template.

Nothing is known of a template but what it renders: conversations whose contents are easy to find
are rendered and tokenized, and what stands between two contents is the *gap* between their roles.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise, product
from os.path import commonprefix
from typing import NamedTuple

from value_models.vocabulary.stream import (
    START,
    StreamWriter,
    as_characters,
    is_special,
    next_special,
    special_id,
)
from value_models.vocabulary.structure import Rule
from value_models.vocabulary.tokens import Vocabulary

BEGIN, END, GENERATION = "<begin>", "<end>", "<generation>"
# In this order where a template marks two roles alike: it has put the one's words with the other's.
ROLES = ("user", "assistant", "system", "tool")
CONVERSATIONS = (
    (BEGIN, "system", "user", "assistant", "user", "assistant", "user", GENERATION),
    (BEGIN, "user", "assistant", "user", "assistant", "user", GENERATION),
    (BEGIN, "system", "user", "assistant", END),
    (BEGIN, "user", "assistant", END),
    (BEGIN, "system", "user", END),
    (BEGIN, "user", END),
    (BEGIN, "system", END),
    (BEGIN, "user", "assistant", "system", "user", GENERATION),
    (BEGIN, "user", "assistant", "tool", "assistant", "user", "assistant", "tool", GENERATION),
    (BEGIN, "user", "assistant", "tool", "user", GENERATION),
    (BEGIN, "user", "assistant", "tool", END),
)
# An id of nine letters and digits is what Mistral's templates insist on.
TOOL_FIELDS = {"name": "look_up_zq", "tool_call_id": "a1B2c3D4e"}


class Template:
    """The gaps of a vocabulary's chat template; none if it has no template."""

    def __init__(self, vocabulary: Vocabulary, prefix: Iterable[int] = ()) -> None:
        """`prefix`: see `StreamWriter`; what a history that is read will be written with."""
        self.gaps: dict[tuple[str, str], str] = {}
        self._vocabulary = vocabulary
        self._prefix = tuple(prefix)
        self._characters = as_characters(vocabulary.tokens)
        for roles in CONVERSATIONS:
            for between, gap in self._render(roles):
                self.gaps.setdefault(between, gap)

    def close(self, role: str) -> str | None:
        """What ends a turn of this role, whichever comes next."""
        gaps = [gap for (before, after), gap in self.gaps.items() if before == role]
        return commonprefix(gaps) if gaps else None  # noqa: RUF071

    def open(self, role: str) -> str | None:
        """What begins a turn of this role, whichever came before; None if that makes a difference.

        `GENERATION` is the beginning of a turn that the model is to write.
        """
        found = {
            gap.removeprefix(self.close(before) or "")
            for (before, after), gap in self.gaps.items()
            if after == role and before != BEGIN
        }
        return found.pop() if len(found) == 1 else None

    def between(self, before: str, after: str) -> str | None:
        """The gap between two roles, or the nearest thing that the template has.

        A template without tools reads what they return as a user's words, one without a system
        role reads the system's words as the beginning of the user's first message.
        """
        if (before, after) in self.gaps:
            return self.gaps[before, after]
        if "tool" in (before, after) and "tool" not in {
            role for pair in self.gaps for role in pair
        }:
            return self.between(*("user" if role == "tool" else role for role in (before, after)))
        if "system" not in {role for pair in self.gaps for role in pair}:
            if after == "system":
                return self.between(before, "user")
            if before == "system":
                return "\n\n" if after == "user" else self.between("user", after)
        close, opening = self.close(before), self.open(after)
        return None if close is None or opening is None else close + opening

    @property
    def end_of_turn(self) -> int | None:
        """The special token with which the assistant ends its turn."""
        close = self.close("assistant") or ""
        position = next_special(close)
        return special_id(close[position]) if position < len(close) else None

    def _render(self, roles: tuple[str, ...]) -> Iterator[tuple[tuple[str, str], str]]:
        tokenizer = self._vocabulary.tokenizer
        messages = [
            {"role": role, "content": f"Zq{number}x{role}qZ"}
            | (TOOL_FIELDS if role == "tool" else {})
            for number, role in enumerate(roles)
            if role in ROLES
        ]
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=roles[-1] == GENERATION
            )
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception:  # a template refuses, in its own way, what it was not written for
            return
        writer = StreamWriter(self._characters, self._vocabulary.dummy_space, self._prefix)
        stream = START + writer.write(ids)
        gaps = []
        for message in messages:
            gap, found, stream = stream.partition(message["content"])
            if not found:  # dropped, reordered or rewritten: nothing can be said about the gaps
                return
            gaps.append(gap)
        gaps.append(stream)
        if any(value in gap for gap in gaps for value in TOOL_FIELDS.values()):
            return  # the gaps of tools hold what differs from call to call
        yield from zip(pairwise(roles), gaps, strict=True)


class TurnRules(NamedTuple):
    """How one template's structure is read as another's."""

    rules: tuple[Rule, ...]
    generation: Rule | None
    """The rule of the prompt to generate, where a model begins to write."""
    warnings: tuple[str, ...]


def turn_rules(target: Template, value: Template) -> TurnRules:
    """Derive the rules that turn the target's chat structure into the network's.

    The whole gap between two roles comes first, for templates whose markers depend on both; then
    what ends and begins each role's turns, so that histories in any order keep their structure.
    """
    if not target.gaps:
        return TurnRules((), None, ())
    if not value.gaps:
        return TurnRules(
            (), None, ("the network has no chat template; it reads turns as plain text",)
        )
    rules = _Rules()
    generation = ("user", GENERATION)
    for before, after in (generation, *product((BEGIN, *ROLES), (*ROLES, GENERATION, END))):
        if (before, after) in target.gaps:
            here = value.between(before, after)
            rules.add(target.gaps[before, after], here, before, after)
    for role in (GENERATION, *ROLES):
        known = role if value.open(role) is not None else "user"
        rules.add(target.open(role), value.open(known), "", role)
        known = role if value.close(role) is not None else "user"
        close = "\n\n" if role == "system" != known else value.close(known)
        rules.add(target.close(role), close, role, "")
    prompts = (target.gaps.get(generation, ""), target.open(GENERATION) or "")
    kept = [rule for rule in rules.condensed() if not _goes_on_behind(rule.pattern, prompts)]
    generated = _rule(target.gaps.get(generation), value.between(*generation), *generation)
    warnings = []
    if generated is None:
        warnings.append(
            "the target's chat template has no special tokens in its turn markers; the network "
            "reads them as text"
        )
    return TurnRules(tuple(kept), generated, tuple(warnings))


class _Rules:
    """Rules by pattern and role; the first of two that disagree stays."""

    def __init__(self) -> None:
        self._rules: dict[str, dict[str, Rule]] = {}

    def add(self, there: str | None, here: str | None, before: str, after: str) -> None:
        rule = _rule(there, here, before, after)
        if rule:
            self._rules.setdefault(rule.pattern, {}).setdefault(rule.before, rule)

    def condensed(self) -> Iterator[Rule]:
        """Yield the rules, without roles where they make no difference."""
        for by_role in self._rules.values():
            default = by_role.get("") or by_role.get("assistant") or next(iter(by_role.values()))
            yield default._replace(before="")
            for rule in by_role.values():
                if (rule.output, rule.after) != (default.output, default.after):
                    yield rule


def _rule(there: str | None, here: str | None, before: str, after: str) -> Rule | None:
    """Make a rule that begins with a special token: text before it is read as text."""
    if there is None or here is None:
        return None
    first = next_special(there)
    if there.startswith(START):
        if next_special(there, 1) == len(there):
            return None
    elif first == len(there):
        return None
    lead = there[:first]
    output = here.removeprefix(START).removeprefix(lead)
    return Rule(
        there[first:],
        _parts(output),
        before if before in ROLES else "",
        "assistant" if after == GENERATION else after if after in ROLES else "",
    )


def _parts(stream: str) -> tuple[int | str, ...]:
    parts: list[int | str] = []
    position = 0
    while position < len(stream):
        if is_special(stream[position]):
            parts.append(special_id(stream[position]))
            position += 1
        else:
            end = next_special(stream, position)
            parts.append(stream[position:end].encode("latin-1").decode("utf-8", "replace"))
            position = end
    return tuple(parts)


def _goes_on_behind(pattern: str, prompts: Iterable[str]) -> bool:
    """Whether a pattern holds a prompt to generate and something behind it.

    There the model begins to write: waiting for more would silence the network at the first token.
    """
    return any(prompt and prompt in pattern and not pattern.endswith(prompt) for prompt in prompts)
