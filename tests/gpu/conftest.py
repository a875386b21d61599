"""Tests over devices: on the CPU wherever that makes sense, on CUDA where there is one."""

import os

import pytest
import torch

# cuBLAS promises the same bits on several streams only with a workspace of fixed size; it looks at
# this once, before its first product.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

NO_CUDA = "no CUDA device"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Tests that ask for `device` run once on each."""
    if "device" in metafunc.fixturenames:
        has_none = not torch.cuda.is_available()
        cuda = pytest.param("cuda", marks=pytest.mark.skipif(has_none, reason=NO_CUDA))
        metafunc.parametrize("device", ["cpu", cuda], indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    """The device that this run of the test is about."""
    return torch.device(request.param)


@pytest.fixture
def gpu() -> torch.device:
    """A CUDA device, or the test is skipped."""
    if not torch.cuda.is_available():
        pytest.skip(NO_CUDA)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def copy_lane() -> dict[str, float]:
    """The knob that lets no block be attended by the CPU of a GPU: bits are promised then."""
    return {"cpu_share": 0.0}
