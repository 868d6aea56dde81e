import time

import pytest

from deploy.bench import profile
from deploy.bench.profile import (
    FORWARD,
    GUIDANCE,
    HEAD,
    TARGET,
    Spent,
    _timed,
    make_table,
    reset,
    spent,
)


def test_a_part_is_timed_without_those_that_it_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def inner() -> None:
        now[0] += 5.0

    timed_inner = _timed(inner, HEAD, None)

    def outer() -> str:
        now[0] += 1.0
        timed_inner()
        timed_inner()
        now[0] += 2.0
        return "done"

    reset(None)
    assert _timed(outer, FORWARD, None)() == "done"
    assert Spent(*spent(None)) == Spent({HEAD: 10.0, FORWARD: 3.0}, {HEAD: 2, FORWARD: 1})
    reset(None)
    assert Spent(*spent(None)) == Spent({}, {})


def test_a_part_that_throws_is_timed_too() -> None:
    def throws() -> None:
        raise ValueError

    reset(None)
    depth = len(profile._inner)
    with pytest.raises(ValueError):
        _timed(throws, HEAD, None)()
    assert spent(None)[1] == {HEAD: 1} and len(profile._inner) == depth


def test_the_device_is_waited_for_at_both_ends() -> None:
    events: list[str] = []
    _timed(lambda: events.append("work"), HEAD, lambda: events.append("wait"))()
    assert events == ["wait", "work", "wait"]


def test_the_table_has_the_mean_step_and_what_guidance_adds() -> None:
    run = Spent({FORWARD: 0.004, HEAD: 0.001, TARGET: 0.1}, {FORWARD: 10, HEAD: 10, TARGET: 20})
    rows = {row["part"]: row["batch 4"] for row in make_table({4: run}).rows}
    assert rows[FORWARD] == 400 and rows[HEAD] == 100 and rows[TARGET] == 10_000
    assert rows["guidance, all of it"] == 500 and rows["guidance / target"] == 0.05
    assert set(GUIDANCE) < set(rows)
