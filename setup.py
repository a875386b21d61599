"""Build the compiled cores: `hf_tiered_cache._C` for the CPU and `hf_tiered_cache._cuda`.

Everything else is in pyproject.toml.

CPU: one translation unit per instruction set, each with its own flags, chosen between at run time:
a wheel built anywhere runs anywhere. CUDA: wherever nvcc is found, whether or not there is a GPU,
with a static runtime, so that the result loads without a driver and beside any torch. Only
setuptools and pybind11 are needed; torch is never imported here, it decides nothing about the
build. What cannot be built is left out, with the reason: the package then runs on plain torch,
slower.

    HF_TIERED_CACHE_BUILD_CUDA=0        never build the CUDA core
    HF_TIERED_CACHE_BUILD_CUDA=1        a CUDA core that cannot be built is an error
    HF_TIERED_CACHE_BUILD_CUDA=native   the same, for the GPUs of this machine only
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import pybind11
except ImportError:  # `python setup.py` outside an isolated build
    pybind11 = None

COMMON_FLAGS = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    "-ffp-contract=fast",  # a * b + c is one instruction where there is one
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wall",
    "-Wno-maybe-uninitialized",  # GCC 12 says it of its own intrinsics
    "-Wno-psabi",  # vector types are passed inside one translation unit only
    "-pthread",
]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [
    *AVX2_FLAGS,
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"),
]
# Instruction set -> flags of its unit. The portable unit is always built, with no flags.
X86_UNITS = {
    "avx2": AVX2_FLAGS,
    "avx512": AVX512_FLAGS,
    "avx512_bf16": [*AVX512_FLAGS, "-mavx512bf16"],
    "avx512_bf16_emulated": AVX512_FLAGS,
}
CPU_HEADERS = [*sorted(Path("csrc").glob("*.h")), *sorted(Path("csrc/cpu").glob("*.h"))]
SOURCES = [
    "csrc/attention_worker.cpp",
    "csrc/bindings.cpp",
    "csrc/block_io.cpp",
    "csrc/thread_pool.cpp",
    "csrc/xxh3.cpp",
    "csrc/cpu/append.cpp",
    "csrc/cpu/dispatch.cpp",
    "csrc/cpu/isa_portable.cpp",
]

CUDA_CHOICE = os.environ.get("HF_TIERED_CACHE_BUILD_CUDA", "")
CUDA_EXTENSION = "hf_tiered_cache._cuda"
CUDA_CHOICES = ("", "0", "1", "native")
# A100, A10 (and 30x0), L4 (and 40x0), H100, B200, 50x0; and whatever comes, by the last one's PTX.
CUDA_ARCHITECTURES = (80, 86, 89, 90, 100, 120)
CUDA_UNITS = ("append", "attend", "copy", "devices", "flags", "fold")
CUDA_FLAGS = ["-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
CUDA_HEADERS = [*sorted(Path("csrc").glob("*.h")), *sorted(Path("csrc/cuda").glob("*.*h"))]
CUDA_FOLDER = Path("build/cuda")  # objects, and what ptxas said of registers and spills


class Nvcc:
    """The CUDA compiler: where it is, what it knows, one object per unit."""

    def __init__(self) -> None:
        home = os.environ.get("CUDA_HOME")
        places = [f"{home}/bin/nvcc" if home else None, "nvcc", "/usr/local/cuda/bin/nvcc"]
        found = [path for place in places if place and (path := shutil.which(place))]
        if not found:
            raise RuntimeError("nvcc is missing (looked in CUDA_HOME, PATH and /usr/local/cuda)")
        self.path = found[0]

    def compile(self, unit: str) -> str:
        """The object of csrc/cuda/<unit>.cu, compiled again only if something changed."""
        CUDA_FOLDER.mkdir(parents=True, exist_ok=True)
        target, log = CUDA_FOLDER / f"{unit}.o", CUDA_FOLDER / f"{unit}.log"
        command = [self.path, *CUDA_FLAGS, *self.architectures(), f"--threads={os.cpu_count()}"]
        command += ["-c", f"csrc/cuda/{unit}.cu", "-o", str(target)]
        said = shlex.join(command)
        sources = [Path(f"csrc/cuda/{unit}.cu"), *CUDA_HEADERS]
        if target.exists() and log.exists() and log.read_text().startswith(f"{said}\n"):
            built = target.stat().st_mtime
            if all(source.stat().st_mtime < built for source in sources):
                return str(target)
        print(said, flush=True)
        began = time.time()
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise RuntimeError(f"{said}\n{result.stdout}{result.stderr}")
        log.write_text(f"{said}\n{result.stdout}{result.stderr}")
        os.utime(target, (began, began))  # older than what was changed meanwhile
        return str(target)

    def architectures(self) -> list[str]:
        """Flags for the architectures to compile for: those that this nvcc knows."""
        if CUDA_CHOICE == "native":
            return ["-arch=native"]
        listed = self.ask("--list-gpu-arch").split()
        known = [number for number in CUDA_ARCHITECTURES if f"compute_{number}" in listed]
        if not known:
            raise RuntimeError(f"{self.path} knows none of the architectures {CUDA_ARCHITECTURES}")
        flags = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in known]
        return [*flags, f"-gencode=arch=compute_{known[-1]},code=compute_{known[-1]}"]

    def libraries(self) -> list[str]:
        """Flags that link the runtime statically, and hide it: torch brings one of its own."""
        said = self.ask("--dryrun", "-x", "cu", "-c", "/dev/null", "-o", "/dev/null")
        (line,) = [line for line in said.splitlines() if line.startswith("#$ LIBRARIES=")]
        folders = shlex.split(line.partition("=")[2])
        return [*folders, "-lcudart_static", "-ldl", "-lrt", "-pthread", "-Wl,--exclude-libs,ALL"]

    def ask(self, *arguments: str) -> str:
        result = subprocess.run(
            [self.path, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,  # where --dryrun writes
            text=True,
            check=True,
        )
        return result.stdout


class BuildCores(build_ext):
    """Compile every unit with the flags it needs; survive a missing compiler."""

    def build_extension(self, ext: Extension) -> None:
        if ext.name == CUDA_EXTENSION:
            build, is_wanted, needed = self.build_cuda, CUDA_CHOICE != "0", "nvcc 12 or newer"
        else:
            build, is_wanted, needed = self.build_units, True, "a C++17 compiler (GCC or Clang)"
        if not is_wanted:
            return
        try:
            build(ext)
        except Exception as error:  # extensions are optional: whatever happened, install without
            if ext.name == CUDA_EXTENSION and CUDA_CHOICE in ("1", "native"):
                raise
            self.say_missing(ext, error, needed)

    def build_cuda(self, ext: Extension) -> None:
        if pybind11 is None:
            raise RuntimeError("pybind11 is missing (pip install pybind11)")
        nvcc = Nvcc()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            ext.extra_objects = list(pool.map(nvcc.compile, CUDA_UNITS))
        ext.depends = [*ext.depends, *ext.extra_objects]
        ext.include_dirs.append(pybind11.get_include())
        ext.extra_link_args = nvcc.libraries()
        super().build_extension(ext)

    def build_units(self, ext: Extension) -> None:
        if pybind11 is None:
            raise RuntimeError("pybind11 is missing (pip install pybind11)")
        units = {name: flags for name, flags in X86_UNITS.items() if self.can_build(flags)}
        ext.include_dirs.append(pybind11.get_include())
        ext.sources = [*SOURCES, *(f"csrc/cpu/isa_{name}.cpp" for name in units)]
        ext.define_macros = [(f"HTC_HAVE_{name.upper()}", "1") for name in units]
        flags_of = {f"isa_{name}": flags for name, flags in units.items()}
        plain_compile = self.compiler.compile

        def compile_units(sources, extra_postargs=None, **options):
            def compile_unit(source: str) -> list[str]:
                flags = [*(extra_postargs or []), *flags_of.get(Path(source).stem, [])]
                return plain_compile([source], extra_postargs=flags, **options)

            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [unit for units in pool.map(compile_unit, sources) for unit in units]

        self.compiler.compile = compile_units
        try:
            super().build_extension(ext)
        finally:
            self.compiler.compile = plain_compile

    def can_build(self, flags: list[str]) -> bool:
        """Whether this is an x86-64 whose compiler knows the flags."""
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return False
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "flags.cpp"
            source.write_text("#include <immintrin.h>\nint main() { return 0; }\n")
            try:
                self.compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
            except Exception:  # whatever the compiler dislikes: this unit is left out
                return False
        return True

    def say_missing(self, ext: Extension, error: Exception, needed: str) -> None:
        print(
            f"\nhf_tiered_cache: {ext.name} was NOT built; plain torch will do its work, slower."
            f"\n  reason: {error}\n  needed: pybind11 and {needed}; then install "
            "again.\n",
            file=sys.stderr,
        )


if CUDA_CHOICE not in CUDA_CHOICES:
    sys.exit(f"HF_TIERED_CACHE_BUILD_CUDA: got {CUDA_CHOICE!r}, expected 0, 1, native or nothing")

setup(
    ext_modules=[
        Extension(
            "hf_tiered_cache._C",
            sources=SOURCES,
            language="c++",
            include_dirs=["csrc"],
            extra_compile_args=COMMON_FLAGS,
            extra_link_args=["-pthread"],
            # The units too, which are chosen later: what is named here is what an sdist holds.
            depends=[str(path) for path in [*CPU_HEADERS, *sorted(Path("csrc/cpu").glob("*.cpp"))]],
            optional=True,
        ),
        Extension(
            CUDA_EXTENSION,
            sources=["csrc/cuda/bindings.cpp"],
            language="c++",
            include_dirs=["csrc"],
            extra_compile_args=COMMON_FLAGS,
            depends=[
                str(path) for path in [*CUDA_HEADERS, *sorted(Path("csrc/cuda").glob("*.cu"))]
            ],
            optional=True,
        ),
    ],
    cmdclass={"build_ext": BuildCores},
)
