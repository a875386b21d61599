"""Which kernel runs: forced, preferred, missing."""

import os
import subprocess
import sys
from types import ModuleType

import pytest
import torch

from hf_tiered_cache.errors import KernelUnavailableError
from hf_tiered_cache.kernels import loader, ops


def test_the_compiled_core_is_built():
    """A missing extension fails here, once, instead of skipping a hundred tests."""
    core, reason = loader.compiled_core()
    assert core is not None, f"{reason}; build it: {loader.BUILD_COMMAND}"


def test_the_emulated_kernel_is_never_preferred():
    names = ops.available_kernels()
    assert names[-1] == "reference"
    assert names[0] != "avx512_bf16_emulated"
    assert "portable" in names


def test_a_kernel_can_be_forced_for_some_calls():
    default = ops.backend()
    with ops.use_kernel("reference"):
        assert ops.backend() == "reference"
        with ops.use_kernel("portable"):
            assert ops.backend() == "portable"
        assert ops.backend() == "reference"
    assert ops.backend() == default


def test_forcing_a_missing_kernel_says_what_is_there_and_why():
    with (
        pytest.raises(KernelUnavailableError, match=r"'avx4096'.*Available: .*reference"),
        ops.use_kernel("avx4096"),
    ):
        pass


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """Sets the variable as if before the first call of the process."""

    def set_kernel(name: str) -> None:
        monkeypatch.setenv(loader.ENVIRONMENT_VARIABLE, name)
        forget()

    def forget() -> None:
        loader.default_kernel.cache_clear()
        loader._environment_says_reference.cache_clear()

    yield set_kernel
    monkeypatch.undo()
    forget()


@pytest.mark.parametrize("name", ops.available_kernels())
def test_the_environment_forces_a_kernel(environment, name):
    on_cuda = ops.backend("cuda")
    environment(name)
    assert ops.backend() == name
    assert ops.backend("cuda") == ("reference" if name == "reference" else on_cuda)


def test_the_environment_cannot_force_a_missing_kernel(environment):
    environment("avx4096")
    with pytest.raises(KernelUnavailableError, match=r"Available: .*reference"):
        ops.backend()


def test_every_device_has_a_backend():
    assert ops.backend("cpu") == ops.backend()
    assert ops.backend("meta") == "reference"
    has_cuda = loader.cuda_core()[0] is not None
    assert ops.backend("cuda:0") == ("cuda" if has_cuda else "reference")
    assert bool(loader.missing_core(torch.device("cuda"))) != has_cuda
    with ops.use_kernel("reference"):
        assert ops.backend("cuda") == "reference"
    with ops.use_kernel("portable"):  # a kernel of the CPU: the device keeps its own
        assert ops.backend("cuda") == ("cuda" if has_cuda else "reference")


def test_the_cuda_core_loads_without_a_driver_and_says_why_it_has_no_device():
    core = pytest.importorskip("hf_tiered_cache._cuda", reason="built only where nvcc is found")
    num_devices, reason = core.device_count()
    assert num_devices > 0 or reason.startswith("no CUDA device: ")
    if num_devices == 0:
        assert loader.cuda_core() == (None, reason)


@pytest.mark.parametrize(("capability", "is_good"), [((7, 5), False), ((8, 0), True)])
def test_devices_older_than_the_kernels_are_refused_before_the_first_launch(
    monkeypatch, capability, is_good
):
    module = ModuleType("fake")
    module.device_count = lambda: (2, "")
    module.device_properties = lambda device: {
        "name": f"Old {device}",
        "capability": capability if device else (9, 0),
    }
    monkeypatch.setattr(loader, "import_module", lambda _: module)
    core, reason = loader.cuda_core.__wrapped__()
    assert (core is not None) == is_good
    assert is_good or "device 1 (Old 1) has compute capability (7, 5), expected (8, 0)" in reason


def test_without_the_cuda_core_the_reason_says_so():
    code = """
import sys
sys.modules["hf_tiered_cache._cuda"] = None  # importing it raises ImportError
from hf_tiered_cache.kernels import ops
print(ops.backend("cuda"), ops.backend("cuda"))
"""
    result = run_python(code)
    assert result.stdout.strip() == "reference reference"
    assert result.stderr.count("the CUDA core was not built") == 1


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, in which no kernel is forced."""
    environment = {k: v for k, v in os.environ.items() if k != loader.ENVIRONMENT_VARIABLE}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )


def test_without_the_core_everything_runs_on_plain_torch_and_says_so_once():
    code = """
import sys
sys.modules["hf_tiered_cache._C"] = None  # importing it raises ImportError
from hf_tiered_cache.kernels import ops
print(ops.backend(), ops.available_kernels())
ops.backend()
"""
    result = run_python(code)
    assert result.stdout.strip() == "reference ('reference',)"
    assert result.stderr.count("compiled core is missing") == 1
    assert "build_ext" in result.stderr
