"""Which kernels the contract tests run over, and how exact those must be."""

import emulated
import pytest
import torch
from paged_case import PagedCase

from hf_tiered_cache.kernels import ops

# What is too slow to emulate in every run.
MANY_QUERIES = 60
SLOW_TO_EMULATE = {
    "test_random_calls",
    "test_many_small_blocks_are_folded_in_bounded_rounds_with_the_same_bits",
    "test_number_of_threads_gives_the_same_bits",
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that ask for `kernel` run once per kernel that this machine can run, and once with the
    CUDA core emulated."""
    if "kernel" in metafunc.fixturenames:
        names = (*ops.available_kernels(), emulated.NAME)
        metafunc.parametrize("kernel", names, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Many queries are slow to emulate, and new to its kernels only up to a few tiles of rows:
    left to `make test-slow`."""
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        if params.get("kernel") != emulated.NAME:
            continue  # among them the tests of other folders
        queries = params["queries"] if "queries" in params else params.get("shape", (0,) * 4)[3]
        if queries >= MANY_QUERIES or item.originalname in SLOW_TO_EMULATE:
            item.add_marker(pytest.mark.slow)


@pytest.fixture
def kernel(request: pytest.FixtureRequest):
    """The name of the kernel that runs inside this test."""
    name = request.param
    with ops.use_kernel(emulated.kernel() if name == emulated.NAME else name):
        yield name


@pytest.fixture(autouse=True)
def one_thread():
    """Torch on one thread: for shapes this small its second one mostly waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def two_threads(one_thread):
    """Torch set to two threads, whatever the machine has."""
    torch.set_num_threads(2)


@pytest.fixture
def make_case() -> type[PagedCase]:
    """The builder of paged caches."""
    return PagedCase


@pytest.fixture
def tolerance():
    """How far a float32 result may be from float64: (out, lse), for inputs of about 1.

    All products and sums are float32 except where the kernel multiplies bfloat16 pairs: its
    weights have 8 bits.
    """

    def of(kernel: str, dtype: torch.dtype) -> tuple[float, float]:
        if dtype == torch.bfloat16 and kernel.startswith("avx512_bf16"):
            return 8e-3, 4e-3
        if dtype == torch.float64:
            return 1e-12, 1e-6
        return 1e-5, 1e-5

    return of
