"""The emulated CUDA core, for what the contract tests of tests/kernels do not ask of a kernel."""

import emulated
import pytest

from hf_tiered_cache.kernels import ops


@pytest.fixture
def core() -> emulated.EmulatedCore:
    """The CUDA core, emulated; kernels called inside the test run on it."""
    with ops.use_kernel(emulated.kernel()):
        yield emulated.core()
