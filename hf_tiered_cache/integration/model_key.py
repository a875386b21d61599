"""Which model blocks are of: everything that keys and values depend on besides the tokens.

Names and revisions prove nothing (a merge changes weights in place), so weights are sampled: of
every parameter and buffer 8 KiB at three places. What lies between the samples is a blind spot, a
change of single numbers there is not seen; every way of training, merging or quantising that is
known changes far more.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from hf_tiered_cache.store import keys

SAMPLE_BYTES = 8192
LAYOUT = "kv-head-major-1"  # `BlockLayout`
# Of a config, what is not about keys and values, or differs between two loads of one checkpoint.
_IGNORED = frozenset(
    {
        *("_name_or_path", "name_or_path", "_commit_hash", "transformers_version", "architectures"),
        *("torch_dtype", "dtype", "use_cache", "_attn_implementation", "attn_implementation"),
        *("output_attentions", "output_hidden_states", "return_dict", "problem_type"),
        *("id2label", "label2id", "chunk_size_feed_forward"),
    }
)


def model_space(model: torch.nn.Module, salt: bytes = b"") -> bytes:
    """The namespace of a model's blocks as it computes them now, 32 bytes: weights, config after
    loading (RoPE included), dtypes, adapters, quantisation, autocast, tensor-parallel rank.
    salt: a tenant's."""
    return keys.namespace({**model_identity(model), "salt": salt})


def model_identity(model: torch.nn.Module) -> dict[str, Any]:
    """What `model_space` is made of, by name."""
    device = next((it.device.type for it in model.parameters()), "cpu")
    autocast = torch.is_autocast_enabled(device)
    config: Any = getattr(model, "config", None)
    return {
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "config": _plain(config.to_dict()) if hasattr(config, "to_dict") else None,
        "weights": _weights(model),
        "adapters": list(_adapters(model)),
        "autocast": str(torch.get_autocast_dtype(device)) if autocast else "",
        "layout": LAYOUT,
        "parallel": _parallel(model),
    }


def _weights(model: torch.nn.Module) -> bytes:
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        described = [name, str(tensor.dtype), list(tensor.shape)]
        digest.update(keys.canonical(described))
        digest.update(_sample(tensor))
    return digest.digest()


def _sample(tensor: torch.Tensor) -> bytes | memoryview:
    """Bytes from the beginning, the middle and the end."""
    if hasattr(tensor, "to_local"):  # a rank's part of a distributed tensor
        tensor = tensor.to_local()
    if tensor.device.type == "meta" or not tensor.numel():
        return b""
    tensor = tensor.detach()
    count = SAMPLE_BYTES // tensor.itemsize
    if not tensor.is_contiguous() or tensor.numel() <= 3 * count:
        part = tensor.reshape(-1)[: 3 * count] if tensor.is_contiguous() else tensor[:1].reshape(-1)
    else:
        flat = tensor.view(-1)
        middle = (flat.numel() - count) // 2
        part = torch.cat([flat[:count], flat[middle : middle + count], flat[-count:]])
    return part.contiguous().cpu().view(torch.uint8).numpy().data


def _adapters(model: torch.nn.Module) -> Iterator[list[Any]]:
    """What of LoRA and its like is active and how much it counts; weights are sampled already."""
    for name, module in model.named_modules():
        active = getattr(module, "active_adapters", None)
        if hasattr(module, "base_layer") and isinstance(active, list):
            scaling = getattr(module, "scaling", {})
            yield [
                name,
                sorted(map(str, active)),
                sorted((str(one), float(value)) for one, value in dict(scaling).items()),
                sorted(map(str, getattr(module, "merged_adapters", []))),
                bool(getattr(module, "disable_adapters", False)),
            ]


def _parallel(model: torch.nn.Module) -> list[int]:
    """(rank, world) of the tensor-parallel group."""
    mesh = getattr(model, "_device_mesh", None)
    if mesh is None:
        return [0, 1]
    tp = mesh["tp"] if "tp" in (mesh.mesh_dim_names or ()) else mesh
    return [tp.get_local_rank(), tp.size()]


def _plain(value: Any) -> Any:
    """A config as `keys.canonical` takes it."""
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items() if k not in _IGNORED}
    if isinstance(value, list | tuple | set | frozenset):
        return [
            _plain(one) for one in (sorted(value, key=str) if isinstance(value, set) else value)
        ]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return str(value)


def layer_devices(model: torch.nn.Module) -> dict[int, torch.device]:
    """Where each layer attends, by its number: on the device of its attention's parameters."""
    devices: dict[int, torch.device] = {}
    for module in model.modules():
        number = getattr(module, "layer_idx", None)
        if isinstance(number, int) and number not in devices:
            hook = getattr(module, "_hf_hook", None)
            device = getattr(hook, "execution_device", None)
            parameter = next(module.parameters(), None)
            if device is None and parameter is not None:
                device = parameter.device
            if device is not None:
                devices[number] = torch.device(device)
    return devices
