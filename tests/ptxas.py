"""What ptxas said of each CUDA kernel when the core was built: registers, stack, spills.

    python tests/ptxas.py      prints the table

Read from the log that setup.py keeps beside the objects; nothing is compiled here.
"""

import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "build" / "cuda"
ENTRY = re.compile(r"Compiling entry function '(?P<symbol>\w+)' for '(?P<architecture>\w+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")


@dataclass(frozen=True)
class KernelReport:
    """One kernel on one architecture."""

    name: str
    architecture: str
    registers: int
    stack_bytes: int
    spill_bytes: int


def read_logs(folder: Path = FOLDER) -> list[KernelReport]:
    """Reports of every kernel in the logs; empty if nothing was built here."""
    text = "".join(path.read_text() for path in sorted(folder.glob("*.log")))
    return list(_reports(_demangled(text)))


def table(reports: list[KernelReport]) -> str:
    """Kernels by architectures: registers, and what they keep outside of them."""
    architectures = sorted({report.architecture for report in reports}, key=lambda a: int(a[3:]))
    rows: dict[str, dict[str, str]] = {}
    for report in reports:
        outside = report.stack_bytes + report.spill_bytes
        cell = f"{report.registers}" + (f"+{outside}B" if outside else "")
        rows.setdefault(report.name, {})[report.architecture] = cell
    width = max(map(len, rows))
    lines = [f"{'':{width}} " + " ".join(f"{name:>7}" for name in architectures)]
    for name, cells in sorted(rows.items()):
        lines.append(f"{name:{width}} " + " ".join(f"{cells[a]:>7}" for a in architectures))
    return "\n".join(lines)


def _demangled(text: str) -> str:
    if shutil.which("c++filt") is None:
        return text
    symbols = sorted(set(re.findall(r"\b_Z\w+", text)), key=len, reverse=True)
    said = subprocess.run(
        ["c++filt", *symbols], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    names = {symbol: _short(name) for symbol, name in zip(symbols, said, strict=True)}
    return re.sub(r"\b_Z\w+", lambda match: names[match[0]], text)


def _short(name: str) -> str:
    """`hf::(anonymous namespace)::Kernel<(hf::DType)1, 8>(Arguments)` -> `Kernel_1_8`."""
    name = name.replace("(anonymous namespace)::", "").replace("hf_tiered_cache::", "")
    name = re.sub(r"\(DType\)", "", name).partition("(")[0].removeprefix("void ")
    return re.sub(r"\W+", "_", name).strip("_")


def _reports(text: str) -> Iterator[KernelReport]:
    for part in re.split(r"(?=Compiling entry function)", text):
        entry, memory, registers = ENTRY.search(part), MEMORY.search(part), REGISTERS.search(part)
        if entry is None or memory is None or registers is None:
            continue
        stack, stores, loads = map(int, memory.groups())
        yield KernelReport(
            entry["symbol"], entry["architecture"], int(registers[1]), stack, stores + loads
        )


if __name__ == "__main__":
    print(table(read_logs()))
