"""Build the compiled core `hf_tiered_cache._C`; everything else is in pyproject.toml.

One translation unit per instruction set, each with its own flags, chosen between at run time: a
wheel built anywhere runs anywhere. Only setuptools and pybind11 are needed; torch is never
imported here, it decides nothing about the build. Without a working compiler the package is
installed without the core and runs on plain torch, slower.

Room for later: CUDA kernels join as prebuilt objects behind the same C ABI (csrc/cuda).
"""

import os
import platform
import sys
import tempfile
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


class BuildCore(build_ext):
    """Compile every unit with the flags of its instruction set; survive a missing compiler."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_units(ext)
        except Exception as error:  # the extension is optional: whatever happened, install without
            self.say_missing(error)

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

    def say_missing(self, error: Exception) -> None:
        print(
            "\nhf_tiered_cache: the compiled core was NOT built; the package will run on plain "
            f"torch, which is slower.\n  reason: {error}\n  needed: pybind11 and a C++17 compiler "
            "(GCC or Clang); then install again.\n",
            file=sys.stderr,
        )


setup(
    ext_modules=[
        Extension(
            "hf_tiered_cache._C",
            sources=SOURCES,
            language="c++",
            include_dirs=["csrc"],
            extra_compile_args=COMMON_FLAGS,
            extra_link_args=["-pthread"],
            depends=[str(path) for path in sorted(Path("csrc").rglob("*.h"))],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildCore},
)
