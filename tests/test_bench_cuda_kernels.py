"""`eval/bench_cuda_kernels.py` without a GPU: what its checks say, and that they can say no."""

import bench_cuda_kernels
import emulated
import pytest
import torch

from hf_tiered_cache.kernels import ops

CPU = torch.device("cpu")


def test_the_emulated_kernel_passes_the_checks_of_a_shape():
    with ops.use_kernel(emulated.kernel()):
        layer = bench_cuda_kernels.Layer(CPU, 700, 128, torch.bfloat16, kv_heads=2)
        checked = bench_cuda_kernels.check_shape(layer, group=4, queries=4)
    assert checked.is_right, checked.line()


def test_a_wrong_kernel_is_noticed(monkeypatch: pytest.MonkeyPatch, capsys):
    right = ops.paged_attention

    def rounded(*arguments, **options):
        out, lse = right(*arguments, **options)
        return ops.AttentionState((out * 32).round() / 32, lse)

    monkeypatch.setattr(ops, "paged_attention", rounded)
    monkeypatch.setattr(bench_cuda_kernels, "CHECKED_TOKENS", 300)
    assert bench_cuda_kernels.main(["--device", "cpu"]) == 1
    assert "MISSED splits" in capsys.readouterr().out
