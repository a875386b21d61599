"""Which kernel runs: forced, preferred, missing."""

import os
import subprocess
import sys

import pytest

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
        loader.default_kernel.cache_clear()

    yield set_kernel
    loader.default_kernel.cache_clear()


@pytest.mark.parametrize("name", ops.available_kernels())
def test_the_environment_forces_a_kernel(environment, name):
    environment(name)
    assert ops.backend() == name


def test_the_environment_cannot_force_a_missing_kernel(environment):
    environment("avx4096")
    with pytest.raises(KernelUnavailableError, match=r"Available: .*reference"):
        ops.backend()


def test_without_the_core_everything_runs_on_plain_torch_and_says_so_once():
    code = """
import sys
sys.modules["hf_tiered_cache._C"] = None  # importing it raises ImportError
from hf_tiered_cache.kernels import ops
print(ops.backend(), ops.available_kernels())
ops.backend()
"""
    environment = {k: v for k, v in os.environ.items() if k != loader.ENVIRONMENT_VARIABLE}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert result.stdout.strip() == "reference ('reference',)"
    assert result.stderr.count("compiled core is missing") == 1
    assert "build_ext" in result.stderr
