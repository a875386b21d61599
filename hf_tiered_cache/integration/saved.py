"""A prefilled cache as a folder that another process, or another person, goes on from.

    tiered_cache.json            what it was computed with, and a checksum of every tensor
    layer_00000.safetensors ...  keys and values of a layer, dense

Keys and values of one model mean nothing to another, so a folder is opened only for the model, and
with the tokenizer, that it was made with; what differs is named. The json comes last and at once: a
folder without it was not finished. safetensors has no checksums of its own.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import xxhash
from huggingface_hub import snapshot_download, upload_folder
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.cache_utils import DynamicSlidingWindowLayer

from hf_tiered_cache.errors import TieredCacheError, TierIOError, UnsupportedInputError
from hf_tiered_cache.integration.cache_layers import TieredLayer
from hf_tiered_cache.integration.compat import DummyLayer
from hf_tiered_cache.integration.model_key import model_identity

INDEX = "tiered_cache.json"
FORMAT = "hf_tiered_cache 1"
MAX_DIFFERENCES = 5  # named in an error


def save(
    layers: list[Any],
    directory: str | os.PathLike[str],
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    tokenizer: Any = None,
) -> None:
    """Write the layers, one after the other, into `directory`, which is made if missing. Raises
    UnsupportedInputError for kinds of layers that are not saved."""
    for number, layer in enumerate(layers):
        if type(layer) not in (TieredLayer, DynamicSlidingWindowLayer, DummyLayer):
            raise UnsupportedInputError(
                f"layer {number} is a {type(layer).__name__}: only full and sliding-window "
                "attention can be saved as a folder; pickle keeps the others"
            )
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / INDEX
    index.unlink(missing_ok=True)
    for stale in folder.glob("layer_*.safetensors"):
        stale.unlink()
    entries = []
    for number, layer in enumerate(layers):
        tensors, facts = _held(layer)
        if tensors:
            save_file(tensors, folder / _file_name(number))
        checksums = {part: _checksum(one) for part, one in tensors.items()}
        entries.append({**facts, "checksums": checksums})
    found = {
        "format": FORMAT,
        "identity": _identity(model, tokenizer),
        "input_ids": input_ids.tolist(),
        "layers": entries,
    }
    unfinished = folder / f"{INDEX}.unfinished"
    unfinished.write_text(json.dumps(found))
    os.replace(unfinished, index)


def load(
    layers: list[Any], folder: Path, model: torch.nn.Module, tokenizer: Any = None
) -> torch.Tensor:
    """Fill the empty layers of a cache made for `model`; the ids `[batch, tokens]` they are of.

    Raises UnsupportedInputError for another model, tokenizer or format, TierIOError for a folder
    that is unfinished or damaged.
    """
    found = _read_index(folder)
    try:
        return _load(layers, folder, found, model, tokenizer)
    except TieredCacheError:  # some are ValueErrors too
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise TierIOError(
            f"{folder / INDEX} is damaged ({type(error).__name__}: {error}): save or download it "
            "again"
        ) from error


def _load(
    layers: list[Any], folder: Path, found: dict[str, Any], model: torch.nn.Module, tokenizer: Any
) -> torch.Tensor:
    saved, given = found["identity"], _identity(model, tokenizer)
    if tokenizer is None:
        saved = {**saved, "tokenizer": None}  # ids are given by the caller, by whatever made them
    if saved != given:
        differences = _differences("", saved, given)
        more = len(differences) - MAX_DIFFERENCES
        raise UnsupportedInputError(
            f"{folder} was not computed with this: {'; '.join(differences[:MAX_DIFFERENCES])}"
            + (f"; {more} more" if more > 0 else "")
            + ". Keys and values of one model mean nothing to another: prefill it anew"
        )
    entries, input_ids = found["layers"], torch.tensor(found["input_ids"])
    if len(entries) != len(layers) or input_ids.ndim != 2:
        raise ValueError(
            f"{len(entries)} layers of ids {list(input_ids.shape)}, expected {len(layers)} of "
            "[batch, tokens]"
        )
    for number, (layer, entry) in enumerate(zip(layers, entries, strict=True)):
        if type(layer).__name__ != entry["type"]:
            raise UnsupportedInputError(
                f"layer {number} of {folder} is a {entry['type']}, here a {type(layer).__name__}: "
                "saved by another version of transformers"
            )
        checksums, tensors = entry["checksums"], {}
        if checksums:
            tensors = _read_tensors(folder / _file_name(number), checksums)
        if type(layer) is not DummyLayer:
            _check_length(number, tensors, entry, input_ids)
        if tensors:
            _fill(layer, tensors, entry)
    return input_ids


def _check_length(
    number: int, tensors: dict[str, torch.Tensor], entry: dict[str, Any], input_ids: torch.Tensor
) -> None:
    """Raises ValueError unless a layer holds what the ids say."""
    if not tensors and not input_ids.shape[1]:
        return
    keys, values = tensors["keys"], tensors["values"]
    held = entry.get("cumulative_length", keys.shape[2])  # a window forgets what it has seen
    got = [keys.shape[0], held]
    if got != list(input_ids.shape) or keys.shape[:3] != values.shape[:3] or keys.shape[2] > held:
        raise ValueError(
            f"layer {number} has keys {list(keys.shape)}, values {list(values.shape)} of {held} "
            f"tokens, expected those of ids {list(input_ids.shape)}"
        )


def _file_name(number: int) -> str:
    return f"layer_{number:05}.safetensors"


def local_folder(name: str | os.PathLike[str]) -> Path:
    """A folder as it is; else the snapshot of a repository of the hub, which is downloaded."""
    path = Path(name).expanduser()
    return path if path.is_dir() else Path(snapshot_download(str(name)))


def push(folder: str | os.PathLike[str], repo_id: str, **how: Any) -> Any:
    """Upload a saved folder by `huggingface_hub.upload_folder`, which takes `how`."""
    return upload_folder(folder_path=Path(folder), repo_id=repo_id, **how)


def _held(layer: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """What of a layer is saved: tensors, and facts for json."""
    facts: dict[str, Any] = {"type": type(layer).__name__}
    if type(layer) is DynamicSlidingWindowLayer:
        facts["cumulative_length"] = layer.cumulative_length
    if getattr(layer, "keys", None) is None or not layer.get_seq_length():
        return {}, facts
    parts = {"keys": layer.keys, "values": layer.values}
    return {name: one.clone().cpu().contiguous() for name, one in parts.items()}, facts


def _fill(layer: Any, tensors: dict[str, torch.Tensor], entry: dict[str, Any]) -> None:
    layer.update(tensors["keys"], tensors["values"])
    if type(layer) is DynamicSlidingWindowLayer:
        layer.cumulative_length = entry["cumulative_length"]


def _read_index(folder: Path) -> dict[str, Any]:
    index = folder / INDEX
    try:
        found = json.loads(index.read_text())
    except FileNotFoundError:
        raise TierIOError(f"{folder} has no {INDEX}: no saved cache, or one not finished") from None
    except ValueError as error:
        raise TierIOError(f"{index} is damaged ({error}): save or download it again") from None
    if not isinstance(found, dict):
        raise TierIOError(f"{index} is damaged (no object): save or download it again")
    if found.get("format") != FORMAT:
        raise UnsupportedInputError(
            f"{index} is of format {found.get('format')!r}, expected {FORMAT!r}: update "
            "hf_tiered_cache, or prefill it anew"
        )
    return found


def _read_tensors(file: Path, checksums: dict[str, str]) -> dict[str, torch.Tensor]:
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise TierIOError(f"{file} cannot be read ({error}): save or download it again") from None
    if not checksums.keys() == tensors.keys() == {"keys", "values"}:
        raise ValueError(f"{file.name} has {sorted(tensors)}, checksums of {sorted(checksums)}")
    for part, expected in checksums.items():
        got = _checksum(tensors[part])
        if got != expected:
            raise TierIOError(
                f"{part} in {file} are damaged: checksum {got}, expected {expected}; save or "
                "download it again"
            )
    return tensors


def _checksum(tensor: torch.Tensor) -> str:
    return xxhash.xxh3_128(tensor.view(torch.uint8).numpy().data).hexdigest()


def _identity(model: torch.nn.Module, tokenizer: Any) -> dict[str, Any]:
    """As it is after a journey through json."""
    identity = model_identity(model)
    identity["weights"] = identity["weights"].hex()
    identity["tokenizer"] = None if tokenizer is None else _tokenizer_identity(tokenizer)
    return json.loads(json.dumps(identity))


def _tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = tokenizer.get_vocab()
    rules: Any = sorted(vocabulary.items())
    if backend is not None:  # the last call leaves its truncation and padding there
        rules = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
    rules = json.dumps(rules, sort_keys=True)
    return {"size": len(vocabulary), "rules": hashlib.sha256(rules.encode()).hexdigest()}


def _differences(name: str, saved: Any, given: Any) -> list[str]:
    """Each entry in which two identities differ, by its path."""
    if isinstance(saved, dict) and isinstance(given, dict):
        return [
            difference
            for key in sorted(saved.keys() | given.keys())
            for difference in _differences(
                f"{name}.{key}" if name else key, saved.get(key), given.get(key)
            )
        ]
    return [] if saved == given else [f"{name} was {saved!r:.60}, is {given!r:.60}"]
