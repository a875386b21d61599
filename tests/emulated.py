"""The CUDA core run on the CPU: its sources compiled against tests/cuda/emulation.

Object files are kept in build/emulation under the hash of what the compiler reads, so a run after
the first builds nothing.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import pytest
from torch import Tensor

from hf_tiered_cache.kernels.cores import CudaCore
from hf_tiered_cache.kernels.loader import Kernel
from hf_tiered_cache.kernels.view import BlockView

NAME = "cuda_emulated"
ROOT = Path(__file__).parent.parent
CUDA_SOURCES = ROOT / "csrc" / "cuda"
EMULATION = Path(__file__).parent / "cuda" / "emulation"
CACHE = ROOT / "build" / "emulation"
STREAM = 1  # any but the default stream, whose address is null
FLAGS = [
    *("-std=c++17", "-O1", "-mfma", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"),
    "-DHTC_PARTIAL_BYTES=(256<<10)",  # so that small cases take several rounds
]


def build(sources: Path = CUDA_SOURCES) -> Path:
    """The extension made of the CUDA core in `sources` (a copy of csrc/cuda, perhaps changed)."""
    CACHE.mkdir(parents=True, exist_ok=True)
    units = [*sorted(sources.glob("*.cu")), sources / "bindings.cpp", EMULATION / "emulation.cpp"]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(_compile, units))
    digest = hashlib.sha256("".join(map(str, objects)).encode()).hexdigest()[:16]
    extension = CACHE / f"_cuda_{digest}.so"
    if not extension.exists():
        _run("-shared", *map(str, objects), "-pthread", "-o", str(extension))
    return extension


def load(extension: Path) -> ModuleType:
    """The module in a built extension."""
    name = f"{extension.stem}._cuda"  # pybind11 gives out one module per name
    loader = ExtensionFileLoader(name, str(extension))
    spec = spec_from_file_location(name, extension, loader=loader)
    assert spec is not None
    module = module_from_spec(spec)
    loader.exec_module(module)
    return module


class EmulatedCore(CudaCore):
    """The core for tensors on the CPU, as if they were on a device."""

    __slots__ = ("exports",)

    def __init__(self, extension: Path) -> None:
        super().__init__(PoisoningModule(load(extension)), place=lambda _: (0, STREAM))
        self.exports = ctypes.CDLL(str(extension))

    def attend(self, query: Tensor, view: BlockView, *arguments: Any) -> None:
        view.check_slots()  # as the view does for blocks on a device
        super().attend(query, view, *arguments)

    def append(self, keys: Tensor, values: Tensor, view: BlockView, start_token: int) -> None:
        view.check_slots()
        super().append(keys, values, view, start_token)

    def set_seed(self, seed: int) -> None:
        """Decide the order of threads from here on."""
        self.exports.emulation_set_seed(ctypes.c_uint64(seed))

    def refuse_batches(self, error: int) -> None:
        """Let every batch of copies fail with this CUDA error from here on (0: none)."""
        self.exports.emulation_refuse_batches(error)

    def take_copies(self) -> tuple[int, int, int]:
        """(single copies, batches, pieces in batches) since the last call."""
        counts = (ctypes.c_int * 3)()
        self.exports.emulation_take_copies(counts)
        return counts[0], counts[1], counts[2]


class PoisoningModule:
    """A built module whose scratch memory starts as NaN."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def attend(self, *arguments: Any) -> None:
        *_, scratch, scratch_bytes = arguments
        ctypes.memset(scratch, 0xFF, scratch_bytes)
        self.module.attend(*arguments)


@lru_cache(maxsize=1)
def core() -> EmulatedCore:
    """The emulated core of this tree. Skips the test where it cannot be built."""
    if platform.machine() != "x86_64":
        pytest.skip("the emulation switches between threads in x86-64 assembly")
    if shutil.which("g++") is None:
        pytest.skip("the emulation is compiled by g++, which is missing")
    return EmulatedCore(build())


def kernel() -> Kernel:
    """The emulated core as a kernel that `ops.use_kernel` takes."""
    return Kernel(NAME, core())


def _compile(unit: Path) -> Path:
    includes = [
        *(f"-I{folder}" for folder in (EMULATION, pybind11.get_include())),
        f"-I{sysconfig.get_paths()['include']}",
    ]
    command = [*FLAGS, *includes, "-x", "c++", str(unit)]
    read = _run("-E", "-P", *command)
    target = CACHE / f"{unit.stem}_{hashlib.sha256(' '.join(FLAGS).encode() + read).hexdigest()}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}")
        _run("-c", *command, "-o", str(partial))
        partial.rename(target)  # whole or not at all, for runs side by side
    return target


def _run(*arguments: str) -> bytes:
    result = subprocess.run(["g++", *arguments], capture_output=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"g++ {' '.join(arguments)}\n{result.stderr.decode()}")
    return result.stdout
