from types import SimpleNamespace

import pytest

from deploy.bench.engine import Run, Stream
from deploy.bench.rounds import ALIKE, GUIDED, UNGUIDED
from deploy.bench.stall import (
    AT_ONCE,
    JOINED,
    QUIET,
    first_token,
    longest_gap,
    make_tables,
    read_at_once,
)
from server.worker.guidance import Guidance


def joined(wait: float) -> Run:
    """Four streams, the second of which waits; and the prompt that it waits for."""
    steady = Stream([1, 2, 3], 0.0, [0.1, 0.2, 0.3])
    waiting = Stream([1, 2, 3], 0.0, [0.1, 0.2, 0.2 + wait])
    return Run([steady, waiting, steady, steady, Stream([1], 0.2, [0.2 + 2 * wait])])


def test_the_longest_wait_is_that_of_a_running_stream() -> None:
    run = joined(1.5)
    assert longest_gap(run) == pytest.approx(1.5)
    assert first_token(run) == pytest.approx(3.0)
    assert first_token(Run(run.streams[:4])) is None


def test_waits_are_compared_with_and_without_the_prompt() -> None:
    rounds = {
        QUIET: [{n: Run(joined(w).streams[:4]) for n, w in WAITS.items()}],
        JOINED: [{n: joined(2 * w) for n, w in WAITS.items()}],
    }
    longest, against = make_tables(rounds, limit=1.05)
    assert longest.rows[0] == {
        "": ALIKE,
        QUIET: pytest.approx(1000),
        JOINED: pytest.approx(2000),
        "first token of the long prompt": pytest.approx(4000),
    }
    assert against.rows[1] == {
        "": GUIDED,
        QUIET: pytest.approx(1.2),
        JOINED: pytest.approx(1.2),
        "first token of the long prompt": pytest.approx(1.2),
        "limit": 1.05,
    }


def test_networks_can_be_kept_from_reading_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    guidance = Guidance.__new__(Guidance)
    steering = SimpleNamespace(guidance=guidance)
    worker = SimpleNamespace(_processor=lambda: SimpleNamespace(steering=steering))
    monkeypatch.setattr(Guidance, "_divide", lambda self, *arguments: (arguments, "owed"))
    for on, owed in ((False, "owed"), (True, None), (True, None), (False, "owed")):
        read_at_once(worker, on)
        assert guidance._divide(1, 2, 3) == ((1, 2, 3), owed)


WAITS = {ALIKE: 1.0, UNGUIDED: 1.0, GUIDED: 1.2, AT_ONCE: 1.4}
