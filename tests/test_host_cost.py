"""What a decode step asks of Python and of CUDA, in each layer; the same on every machine."""

import bench_host_cost as bench
import pytest

# Python calls, copies, and events made, queried and waited for. A little above what it is now.
MOST = {
    "resident": (98, 0, 0, 0, 0),
    "32K, 90% off, copy lane": (455, 4, 11, 2, 2),
    "32K, 90% off, both lanes": (490, 2, 9, 2, 2),
    "128K, 50% off, copy lane": (735, 8, 22, 12, 4),
    "128K, 50% off, both lanes": (490, 3, 11, 2, 2),
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
