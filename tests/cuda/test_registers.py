"""The compiled kernels keep everything in registers, on every architecture they are built for."""

import shutil

import ptxas
import pytest

# Two CUDA blocks of these take every register there is.
FULL = ("_16_2_true", "_8_2_false", "_8_4_true")
SPILLING = """nvcc -O3
ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_90'
ptxas info    : Function properties for _Z6kernelv
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 8 bytes cumulative stack size
"""


@pytest.fixture
def reports() -> list[ptxas.KernelReport]:
    """Those of the last build of this tree."""
    reports = ptxas.read_logs()
    if not reports:
        has_nvcc = shutil.which("nvcc") is not None
        pytest.skip("the CUDA core was not built here" if has_nvcc else "nvcc is missing")
    return reports


def test_no_kernel_spills(reports, capsys):
    with capsys.disabled():
        print(f"\n{ptxas.table(reports)}")
    outside = {r.name: r.spill_bytes for r in reports if r.spill_bytes or r.stack_bytes}
    assert {name: count for name, count in outside.items() if not name.endswith(FULL)} == {}
    assert max(outside.values(), default=0) <= 64, "a few words around the loads"


def test_two_cuda_blocks_of_the_decode_kernel_fit_a_multiprocessor(reports):
    decode = [report for report in reports if report.name.startswith("PartialKernel")]
    assert len({report.name for report in decode}) == 6
    tensor = [report for report in reports if report.name.startswith("TensorPartialKernel")]
    assert len({report.name for report in tensor}) == 20
    # dtype, rows, chunks of 64 dims, whether head_dim is that: the common ones
    common = ("_8_1_true", "_8_2_true", "_8_4_true", "_16_1_true", "_16_2_true", "_8_2_false")
    decode += [report for report in tensor if report.name.endswith(common)]
    assert max(report.registers for report in decode) <= 65536 // (2 * 256)


def test_a_spill_would_be_seen(tmp_path):
    (tmp_path / "unit.log").write_text(SPILLING)
    (report,) = ptxas.read_logs(tmp_path)
    assert (report.registers, report.stack_bytes, report.spill_bytes) == (255, 8, 28)
    assert "255+36B" in ptxas.table([report])
