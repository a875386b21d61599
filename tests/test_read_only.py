"""Handles read as dense tensors in every way, are written to in none, and never end the process."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.multiprocessing.reductions
from support import new_tokens

from hf_tiered_cache import UnsupportedInputError

HERE = Path(__file__).parent


@pytest.fixture
def keys(make_cache):
    """(the handle on 9 tokens of 2 sequences, the dense tensor)."""
    cache = make_cache()
    dense, values = new_tokens(2, 9)
    cache.update(dense, values, 0)
    handle = cache.layers[0].keys
    yield handle, dense
    assert torch.equal(cache.layers[0].keys.clone(), dense)


def test_all_that_torch_asks_of_a_tensor_is_answered_as_by_the_dense_one_or_refused():
    done = subprocess.run(
        [sys.executable, HERE / "every_tensor_method.py"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(HERE.parent), "HOME": "/tmp"},
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"died in {lines[-1]}: {done.stderr[-500:]}"
    wrong = [line for line in lines if not line.endswith((" ok", " refused", " refused by torch"))]
    assert wrong == []
    assert sum(line.endswith(" ok") for line in lines) > 400
    assert sum(line.endswith(" refused by torch") for line in lines) < 5


BYTES = {
    "data_ptr": lambda x: x.data_ptr(),
    "const_data_ptr": lambda x: x.const_data_ptr(),
    "storage": lambda x: x.storage(),
    "untyped_storage": lambda x: x.untyped_storage(),
    "share_memory_": lambda x: x.share_memory_(),
    "to another process": lambda x: torch.multiprocessing.reductions.reduce_tensor(x),
    "safetensors": lambda x: safetensors.torch.save({"keys": x}),
}


@pytest.mark.parametrize("ask", BYTES.values(), ids=BYTES)
def test_who_asks_for_bytes_of_its_own_is_told_to_clone(keys, ask):
    with pytest.raises(UnsupportedInputError, match=r"lie in its blocks.*\.clone\(\)"):
        ask(keys[0])


BELOW_PYTHON = {
    "to_dlpack": lambda x: torch.utils.dlpack.to_dlpack(x),
    "storage of the base": lambda x: torch.Tensor.untyped_storage(x).data_ptr(),
    "data_ptr of the base": lambda x: torch.Tensor.data_ptr(x),
    "apply_ of the base": lambda x: torch.Tensor.apply_(x, lambda one: one),
    "swap_tensors": lambda x: torch.utils.swap_tensors(x, torch.ones(1)),
}


@pytest.mark.parametrize("ask", BELOW_PYTHON.values(), ids=BELOW_PYTHON)
def test_who_goes_past_our_methods_gets_an_error_of_torch_and_no_null_pointer(keys, ask):
    with pytest.raises(RuntimeError, match=r"Cannot access data pointer|invalid python|slots"):
        ask(keys[0])


READS = {
    "numpy": lambda x: torch.from_numpy(x.numpy().copy()),
    "asarray": lambda x: torch.from_numpy(np.asarray(x).copy()),
    "from_dlpack": torch.from_dlpack,
    "tolist": lambda x: torch.tensor(x.tolist()),
    "torch.tensor": lambda x: torch.as_tensor(x, dtype=torch.float64),
    "data": lambda x: x.data,
    "detach": lambda x: x.detach(),
    "item": lambda x: torch.tensor(x[1, 1, 8, 7].item()),
    "view as bytes": lambda x: x.view(torch.uint8),
    "a view of a view": lambda x: x[:, :, 2:7].transpose(1, 2)[0],
    "a copy of a view": lambda x: x[:, :, 2:7].numpy().copy(),
    "iteration": lambda x: torch.stack(list(x)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_reading_gives_what_the_dense_tensor_gives(keys, read):
    handle, dense = keys
    got, expected = torch.as_tensor(read(handle)), torch.as_tensor(read(dense.clone()))
    assert torch.equal(got.clone(), expected)


def numpy_write(x):
    x.numpy()[0] = 0


def item_write(x):
    x[:, :, 3:5] = 0


def data_write(x):
    x.data = torch.zeros_like(x)


WRITES = {
    "in place": lambda x: x.zero_(),
    "in place, a view": lambda x: x[:, :, :4].zero_(),
    "in place, a view of a view": lambda x: x.transpose(1, 2)[0].mul_(2),
    "in place, through data": lambda x: x.data.zero_(),
    "in place, through detach": lambda x: x.detach().add_(1),
    "an item": item_write,
    "an item of a view": lambda x: item_write(x.transpose(0, 1)),
    "as the output of a function": lambda x: torch.exp(x.clone(), out=x),
    "as one of several": lambda x: torch._foreach_zero_([x, x]),
    "data": data_write,
    "data of a view": lambda x: data_write(x[:1]),
    "numpy": numpy_write,
    "numpy of a view": lambda x: numpy_write(x[0]),
    "apply_": lambda x: x.apply_(abs),
    "map_": lambda x: x.map_(x, max),
    "copy_": lambda x: x.copy_(torch.zeros_like(x)),
    "index_copy_": lambda x: x.index_copy_(2, torch.tensor([0]), x[:, :, 1:2].clone()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_no_write_is_lost_without_a_word(keys, write):
    with pytest.raises(ValueError, match="read-only"):  # ours, and numpy's
        write(keys[0])


def test_what_is_computed_from_a_handle_is_an_ordinary_tensor(keys):
    handle, dense = keys
    for result in (handle + 0, handle.clone(), handle[:, :, 1:].contiguous(), handle[0] * 1):
        assert type(result) is torch.Tensor
        result.zero_()
    assert torch.equal(handle + 0, dense)


def test_a_view_of_a_handle_has_bytes_for_kernels_that_take_pointers(keys):
    handle, dense = keys
    view = handle.transpose(1, 2)
    assert view.data_ptr() == view.untyped_storage().data_ptr() != 0
    assert repr(view) == repr(dense.transpose(1, 2))
