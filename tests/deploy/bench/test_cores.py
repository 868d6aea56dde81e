import pytest

from deploy.bench.cores import RESERVED, all_cores, make_tables
from tests.deploy.bench.runs import timed

SOON, LATE = all_cores(10_000), all_cores(300_000)


def test_guidance_is_priced_within_an_engine_and_ways_are_compared_across() -> None:
    measured = {
        SOON.unguided: timed(0.1),
        SOON.guided: timed(0.11),
        LATE.unguided: timed(0.09),
        LATE.guided: timed(0.0945),
        RESERVED.unguided: timed(0.2),
        RESERVED.guided: timed(0.22),
    }
    _, compared, priced = make_tables({4: [measured]}, [SOON, LATE, RESERVED], limit=1.05)
    assert {row[""]: row["batch 4"] for row in compared.rows} == {
        LATE.unguided: pytest.approx(0.9),
        LATE.guided: pytest.approx(0.859, abs=1e-3),
        RESERVED.unguided: pytest.approx(2.0),
        RESERVED.guided: pytest.approx(2.0),
    }
    assert [row["batch 4"] for row in priced.rows] == list(map(pytest.approx, (1.1, 1.05, 1.1)))
    assert priced.rows[1]["efficiency, batch 4"] == pytest.approx(1.0)
