"""Chat structure as rules: where a target's turn marker stands, the network's own is put."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from value_models.vocabulary.stream import START, is_special, special, special_id

JsonPattern = list[int | str]
"""A pattern in a map's file: ids of special tokens (-1: START) and text (one character a byte)."""
JsonRule = tuple[JsonPattern, list[int | str], str, str]


class Rule(NamedTuple):
    """What the network reads in place of a piece of the target's structure."""

    pattern: str
    """Symbols of the target's stream; the first is `START` or a special token."""
    output: tuple[int | str, ...]
    """Ids of the network's special tokens, and text that joins the text before and behind it."""
    before: str = ""
    """The role whose turn it must be for the rule to hold; empty: anyone's."""
    after: str = ""
    """The role whose turn begins; empty: none does."""

    def to_json(self) -> JsonRule:
        """Return what `of_json` reads."""
        pattern: JsonPattern = []
        for symbol in self.pattern:
            if is_special(symbol):
                pattern.append(-1 if symbol == START else special_id(symbol))
            elif pattern and isinstance(pattern[-1], str):
                pattern[-1] += symbol
            else:
                pattern.append(symbol)
        return pattern, list(self.output), self.before, self.after

    @classmethod
    def of_json(cls, rule: JsonRule) -> Rule:
        """Read what `to_json` returned."""
        pattern, output, before, after = rule
        symbols = (
            part if isinstance(part, str) else START if part < 0 else special(part)
            for part in pattern
        )
        return cls("".join(symbols), tuple(output), before, after)


class Structure:
    """A set of rules, and how they are applied: the longest that matches wins."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules: dict[str, list[Rule]] = {}
        # Those for one role come before those for anyone's turn.
        for rule in sorted(rules, key=lambda rule: (-len(rule.pattern), not rule.before)):
            self._rules.setdefault(rule.pattern[0], []).append(rule)

    def match(self, stream: str, position: int, role: str) -> Rule | None:
        """Find the rule for the special symbol at `position`, in a turn of this role.

        Returns None if what follows decides. A special token without any rule is dropped: the
        rule that comes back for it puts nothing in its place.
        """
        left = len(stream) - position
        for rule in self._rules.get(stream[position], ()):
            if rule.before not in ("", role):
                continue
            if stream.startswith(rule.pattern, position):
                return rule
            if len(rule.pattern) > left and rule.pattern.startswith(stream[position:]):
                return None
        return Rule(stream[position], ())
