"""What evicting frees; evictions themselves are in test_lifecycle.py."""

from server.lifecycle.eviction import gain
from tests.server.networks import catalog_of, status


async def test_pools_that_others_use_are_not_counted() -> None:
    pool = {"id": "0", "kv_cache_bytes": 3000, "tokens": 10, "used_tokens": 0}
    alone = pool | {"id": "1"}
    catalog = await catalog_of(
        status("a", pool=pool, weights_bytes=10),
        status("b", pool=pool, weights_bytes=10),
        status("c", pool=alone, weights_bytes=10),
    )
    a, b, c = (catalog.find(name) for name in "abc")
    gains = [gain(networks, catalog) for networks in ([a], [a, b], [c], [a, c])]
    assert gains == [10, 3020, 3010, 3020]
