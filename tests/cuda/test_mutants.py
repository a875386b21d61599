"""The tests can tell a broken kernel from a right one: each of these breakages is found.

Every mutant compiles a changed copy of csrc/cuda; the battery is a handful of the contract tests'
laws, small enough to run on each.
"""

import shutil
from pathlib import Path

import emulated
import pytest
import torch
from paged_case import PagedCase

from hf_tiered_cache.kernels import ops
from hf_tiered_cache.kernels.loader import Kernel

pytestmark = pytest.mark.slow

# name: (file, what is there, what stands there instead)
MUTANTS = {
    "no barrier between queries and products": (
        "partial.cuh",
        "LoadQueries<kType>(p, round, tile, memory);\n  __syncthreads();",
        "LoadQueries<kType>(p, round, tile, memory);",
    ),
    "no barrier between products and weights": (
        "partial.cuh",
        "KeyRows<kType>(p, tile, slot), memory);\n  __syncthreads();",
        "KeyRows<kType>(p, tile, slot), memory);",
    ),
    "no barrier before the sums overwrite the weights": (
        "partial.cuh",
        "half /= 2) {\n    __syncthreads();",
        "half /= 2) {",
    ),
    "no barrier after the factors of a fold": (
        "fold.cu",
        "  __syncthreads();\n  return before;",
        "  return before;",
    ),
    "one token too many": (
        "geometry.cuh",
        "tile.end = static_cast<int>(Max(0, end));",
        "tile.end = static_cast<int>(Min(kUnitTokens, Max(0, end + 1)));",
    ),
    "one token too few": (
        "geometry.cuh",
        "tile.end = static_cast<int>(Max(0, end));",
        "tile.end = static_cast<int>(Max(0, end - 1));",
    ),
    "the head of the wrong group": (
        "geometry.cuh",
        "tile.kv_head * round.group + number % round.group",
        "static_cast<uint32_t>(tile.kv_head + number % round.group * p.view.kv_heads)",
    ),
    "a query sees the token behind it": (
        "geometry.cuh",
        "position > p.query_start + row.query",
        "position > p.query_start + row.query + 1",
    ),
    "left padding is attended": ("geometry.cuh", "if (p.starts != nullptr)", "if (false)"),
    "values of unused tokens are read": (
        "partial.cuh",
        "if (t < tile.end && memory.scoring.is_used[t])",
        "if (t < tile.end)",
    ),
    "no guard for a row that attends nothing": (
        "partial.cuh",
        "const float base = max == MinusInfinity() ? 0.0f : max;",
        "const float base = max;",
    ),
    "the same infinity has no weight of 1": (
        "block.cuh",
        "score == max ? 1.0f : expf(score - max)",
        "expf(score - max)",
    ),
    "a row without a sum is divided": (
        "fold.cu",
        "sum == 0.0f ? 0.0f : acc * shrink",
        "acc * shrink",
    ),
    "slices of a row that is folded in place": (
        "fold.cu",
        "params.from.rows.acc != nullptr && params.to.rows.acc != nullptr",
        "false",
    ),
    "no barrier before weighted values are folded": (
        "fold.cu",
        "loads.Store(memory);\n    __syncthreads();",
        "loads.Store(memory);",
    ),
    "the mask of the first head for all": (
        "geometry.cuh",
        "row.head * p.mask_stride[1]",
        "0 * p.mask_stride[1]",
    ),
    "the capped score is not scaled back": (
        "partial.cuh",
        "p.softcap * tanhf(score / p.softcap)",
        "tanhf(score / p.softcap)",
    ),
    "a sink counts twice": (
        "fold.cu",
        "sum = fmaf(sum, shrink, Weight(sink, new_max));",
        "sum = fmaf(sum, shrink, 2 * Weight(sink, new_max));",
    ),
    "the last lane of a sum is lost": (
        "block.cuh",
        "offset > 0; offset /= 2",
        "offset > 1; offset /= 2",
    ),
    "rounds begin anew": (
        "attend.cu",
        "if (!is_first || !plan.has_running) fold.from = running;",
        "if ((!is_first && false) || !plan.has_running) fold.from = running;",
    ),
    "slots are not checked": (
        "partial.cuh",
        "if (slot < 0 || slot >= p.view.num_slots)",
        "if (false)",
    ),
    "tensor: no barrier between queries and products": (
        "tensor_partial.cuh",
        "query.Store(memory);\n  __syncthreads();",
        "query.Store(memory);",
    ),
    "tensor: no barrier between largest scores and weights": (
        "tensor_partial.cuh",
        "StoreMax(memory, lane, scores);\n  __syncthreads();",
        "StoreMax(memory, lane, scores);",
    ),
    "tensor: no barrier before the sums are overwritten": (
        "tensor_partial.cuh",
        "if (chunk > 0) __syncthreads();",
        "",
    ),
    "tensor: no barrier before the sums are read": (
        "tensor_partial.cuh",
        "load(kChunks + chunk + 2);\n    __syncthreads();",
        "load(kChunks + chunk + 2);",
    ),
    "tensor: weights of one element only": (
        "tensor_core.cuh",
        "rest = NarrowPair<kType>(",
        "rest = 0 * NarrowPair<kType>(",
    ),
    "tensor: elements of a pair exchanged": ("tensor_core.cuh", "0x7632", "0x5410"),
    "tensor: rows above 8 have the queries of those below": (
        "tensor_partial.cuh",
        "&memory.query[lane.g + kHalfRows][dim]",
        "&memory.query[lane.g][dim]",
    ),
    "tensor: values of unused tokens meet their weight": (
        "tensor_partial.cuh",
        "if ((used >> n & 1) == 0) values[n] = {};",
        "",
    ),
    "tensor: tokens that there are not have a score": (
        "tensor_partial.cuh",
        "if ((AttendedBy(attended, half) >> n & 1) == 0) score = MinusInfinity();",
        "",
    ),
    "tensor: dims behind the last are read": (
        "tensor_partial.cuh",
        "(kIsExact || dim < part.dims)",
        "true",
    ),
}


def compare(case: PagedCase, **restrictions: object) -> None:
    """Values against float64, bits against a split table; every NaN counts."""
    out, lse = case.expected(**restrictions)
    whole = case.attend(**restrictions)
    sinks = restrictions.pop("sinks", None)
    blocks = case.table.shape[1]
    state = case.attend_in_pieces([blocks // 2, blocks - blocks // 2], **restrictions)
    finished = ops.finish_attention(state, sinks=sinks)  # float32
    torch.testing.assert_close(finished.out.double(), out, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole.lse.double(), lse, atol=1e-5, rtol=1e-6)
    assert torch.equal(finished.out.to(case.dtype), whole.out)


def battery(core: emulated.EmulatedCore) -> None:
    """Raises if something is wrong with the core."""
    full_battery(core, torch.float32)
    for seed in range(2):
        core.set_seed(seed)
        compare(PagedCase(1, 2, 4, 1, 300, 128, 128, 512, torch.bfloat16))
        compare(PagedCase(1, 1, 5, 3, 90, 80, 96, 16, torch.float16))
    full_battery(core, torch.bfloat16)


def full_battery(core: emulated.EmulatedCore, dtype: torch.dtype) -> None:
    mask = torch.rand(2, 6, 1, 90, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[:, 1] = False
    mask[..., 30:35] = False
    for seed in range(3):
        core.set_seed(seed)
        compare(PagedCase(2, 2, 3, 1, 90, 64, 64, 16, dtype), mask=mask)
        compare(PagedCase(2, 2, 3, 2, 300, 128, 96, 512, dtype), sinks=torch.linspace(-1, 1, 6))
        compare(PagedCase(2, 1, 7, 3, 61, 80, 80, 16, dtype), starts=torch.tensor([0, 61]).int())
        compare(PagedCase(1, 1, 2, 5, 40, 17, 23, 8, dtype), softcap=2.0)
    case = PagedCase(2, 2, 3, 1, 90, 64, 64, 16, dtype)
    case.layout.values(case.blocks)[case.table[:, 2].long()] = torch.nan
    mask[..., 32:48] = False
    assert case.attend(mask=mask).out.isfinite().all()
    compare(PagedCase(1, 1, 8, 1, 700, 64, 64, 4, dtype))  # several rounds
    table = case.table.clone()
    table[0, 0] = case.blocks.shape[0]
    state = ops.RunningState.begin(case.query, 64)
    pointers = (state.acc.data_ptr(), state.max.data_ptr(), state.sum.data_ptr())
    super(emulated.EmulatedCore, core).attend(
        *(case.query, case.view(table=table), case.call(), pointers, None)
    )
    assert state.sum[0].isnan().all()


def test_the_kernels_as_they_are_pass():
    with ops.use_kernel(emulated.kernel()):
        battery(emulated.core())


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_kernel_is_found(tmp_path: Path, name: str) -> None:
    file, there, instead = MUTANTS[name]
    shutil.copytree(emulated.CUDA_SOURCES.parent, tmp_path / "csrc")
    path = tmp_path / "csrc" / "cuda" / file
    text = path.read_text()
    assert text.count(there) == 1
    path.write_text(text.replace(there, instead))
    core = emulated.EmulatedCore(emulated.build(path.parent))
    with (
        ops.use_kernel(Kernel(name, core)),
        pytest.raises((AssertionError, RuntimeError)) as found,
    ):
        battery(core)
    print(f"{name}: {str(found.value).strip().splitlines()[0]}")
