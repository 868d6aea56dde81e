import pytest

from deploy.bench.rounds import PLAIN
from deploy.bench.startup import MIB, Started, make_tables

ROUNDS = {
    "start": [
        {
            PLAIN: Started(20.0, 900 * MIB, 800 * MIB),
            "8": Started(23.0, 1000 * MIB, 900 * MIB, 88 * MIB, 64 * MIB, 0.5),
        },
        {
            PLAIN: Started(40.0, 900 * MIB, 800 * MIB),
            "8": Started(44.0, 1000 * MIB, 900 * MIB, 88 * MIB, 64 * MIB, 0.7),
        },
    ]
}


def test_starts_are_compared_within_rounds_and_memory_is_in_mib() -> None:
    plain, trimtab = make_tables(ROUNDS, ["8"])[0].rows
    assert trimtab["against plain"] == pytest.approx((23 / 20 + 44 / 40) / 2)
    assert trimtab["seconds to load one more"] == pytest.approx(0.6)
    assert (trimtab["worker PSS, MiB"], trimtab["networks' weights, MiB"]) == (900, 88)
    assert plain["seconds to load one more"] is None
    assert plain["worker RSS, MiB"] == 900
