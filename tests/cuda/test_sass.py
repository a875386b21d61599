"""The machine code of the decode kernel: loads of 16 bytes, tensor cores, nothing in memory."""

import re
import shutil
import subprocess
from collections import Counter

import ptxas
import pytest

# bfloat16, 8 rows, 2 chunks of 64 dims, just these: the kernel of decoding with a head_dim of 128.
KERNEL = re.compile(r"Function : \S*TensorPartialKernelILNS_5DTypeE1ELi8ELi2ELb1E\S*")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]+)")
UNIT_BYTES_PER_WARP = 2 * 32 * 128 * 2  # keys and values of a strip


def instructions(sass: str) -> Counter[str]:
    """How often each instruction stands in the code of the kernel."""
    code = KERNEL.split(sass)[1].partition("Function :")[0]
    return Counter(INSTRUCTION.findall(code))


@pytest.fixture(params=[80, 90, 120])
def counts(request: pytest.FixtureRequest) -> Counter[str]:
    """Those of one architecture in the last build of this tree."""
    if shutil.which("cuobjdump") is None:
        pytest.skip("cuobjdump is missing (pip install nvidia-cuda-cuobjdump, and put it on PATH)")
    built = ptxas.FOLDER / "attend.o"
    if not built.exists():
        pytest.skip("the CUDA core was not built here")
    said = subprocess.run(
        ["cuobjdump", "-sass", "-arch", f"sm_{request.param}", str(built)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    if not KERNEL.search(said):
        pytest.skip(f"not built for sm_{request.param}")
    return instructions(said)


def test_every_byte_is_loaded_once_16_at_a_time(counts):
    wide = sum(n for name, n in counts.items() if re.fullmatch(r"LDG\.E\.EF\.128.*", name))
    assert wide * 32 * 16 == UNIT_BYTES_PER_WARP


def test_products_are_made_by_tensor_cores_and_registers_suffice(counts, capsys):
    products = sum(n for name, n in counts.items() if name.startswith("HMMA.16816.F32.BF16"))
    assert products == 2 * (32 // 8) * (128 // 16)  # of queries and keys, and as many of values
    assert not [name for name in counts if name.startswith(("LDL", "STL"))]
    with capsys.disabled():
        print(f"\n{counts.total()} instructions for {UNIT_BYTES_PER_WARP} bytes of a warp")


def test_instructions_are_counted_in_the_kernel_alone():
    name = "_ZN1aTensorPartialKernelILNS_5DTypeE1ELi8ELi2ELb1EEEv"
    sass = (
        "Function : other\n /*0000*/ LDL R1, [R2] ;\n"
        f"Function : {name}\n /*0000*/ @P0 LDG.E.EF.128 R4, desc[UR4][R2.64] ;\n"
        " /*0010*/                   HMMA.16816.F32.BF16 R4, R4, R8, RZ ;\n"
        "Function : another\n /*0000*/ STL [R1], R2 ;\n"
    )
    assert instructions(sass) == {"LDG.E.EF.128": 1, "HMMA.16816.F32.BF16": 1}
