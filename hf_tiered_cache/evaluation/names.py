"""What a user names (a model, its dtype, a device), as far as it can be judged before anything is
loaded. Knows neither torch nor transformers.
"""

from pathlib import Path

AUTO = "auto"
DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda")


class ModelError(ValueError):
    """The model cannot be loaded or not be measured; says what to give instead."""


def check_dtype(dtype: str) -> None:
    """Raise ModelError unless `dtype` is "auto" or one of DTYPES."""
    if dtype not in (AUTO, *DTYPES):
        raise ModelError(f"--dtype {dtype}: expected {AUTO}, {', '.join(DTYPES)}")


def check_device(device: str) -> None:
    """Raise ModelError unless `device` is "auto" or one of DEVICES, with or without a number;
    whether it is there, torch must say."""
    kind, colon, number = device.partition(":")
    if device != AUTO and (kind not in DEVICES or (colon and not number.isdecimal())):
        raise ModelError(f"--device {device}: expected {AUTO}, {', '.join(DEVICES)} or cuda:0")


def check_model(name: str) -> None:
    """Raise ModelError if `name` is a folder's and there is none: no hub is asked for it."""
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise not_loaded(name, FileNotFoundError("no such folder"))


def not_loaded(name: str, error: Exception) -> ModelError:
    """The error of a model or tokenizer that cannot be loaded, in one line."""
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
    return ModelError(
        f"{name} cannot be loaded: {reason.rstrip('.')}; expected a folder with a causal model and "
        "its tokenizer, or the hub id of one"
    )


def model_name(name: str) -> str:
    """A hub id as it is, of a folder only its name."""
    return Path(name).resolve().name if Path(name).is_dir() else name
