"""What a decode step asks of Python and of CUDA, in each layer; the same on every machine."""

import bench_host_cost as bench
import pytest

# Python calls, copies, and events made, queried and waited for. A little above what it is now.
MOST = {
    "resident": (130, 0, 0, 0, 0),
    "32K, 90% off, copy lane": (540, 4, 20, 12, 10),
    "32K, 90% off, both lanes": (510, 2, 14, 8, 6),
    "128K, 50% off, copy lane": (850, 8, 36, 26, 17),
    "128K, 50% off, both lanes": (550, 3, 18, 10, 8),
}
NAMES = ("Python calls", "core.copy", "event made", "event query", "stream wait")


@pytest.mark.parametrize("case", bench.CASES, ids=lambda case: case.name)
def test_a_layer_costs_no_more_calls_than_it_did(case):
    with bench.decoding(case) as (gpu, cache):
        calls = bench.calls_per_layer(gpu, cache)
    costs = {name: calls.get(name, 0) for name in NAMES}
    assert all(cost <= most for cost, most in zip(costs.values(), MOST[case.name], strict=True)), (
        costs
    )
    assert calls["core.append"] == 1
    assert (costs["core.copy"] > 0) == (case.share > 0)
