"""A user's model and tokenizer, ready to be measured; what cannot be loaded is said in one line."""

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

AUTO = "auto"


class ModelError(ValueError):
    """The model cannot be loaded or not be measured; says what to give instead."""


def load_model(name: str, dtype: str = AUTO, device: str | torch.device = "cpu") -> PreTrainedModel:
    """A causal model in evaluation mode.

    name: hub id or folder. dtype: "auto" for the checkpoint's own, or a name of torch's. Raises
    ModelError.
    """
    known = AUTO if dtype == AUTO else getattr(torch, dtype, None)
    if not (known == AUTO or (isinstance(known, torch.dtype) and known.is_floating_point)):
        raise ModelError(f"--dtype {dtype}: expected auto, float32, bfloat16 or float16")
    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=known)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _not_loaded(name, error) from None
    return model.eval().to(device)


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a hub id or folder. Raises ModelError."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _not_loaded(name, error) from None


def choose_device(name: str = AUTO) -> torch.device:
    """A device of that name; "auto" is the accelerator that torch can use, else the CPU. Raises
    ModelError."""
    if name == AUTO:
        found = torch.accelerator.is_available() and torch.accelerator.current_accelerator()
        return found or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"--device {name}: {reason}; expected auto, cpu or cuda") from None
    return device


def _not_loaded(name: str, error: Exception) -> ModelError:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), repr(error))
    return ModelError(
        f"{name} cannot be loaded: {reason.rstrip('.')}; expected a folder with a causal model and "
        "its tokenizer, or the hub id of one"
    )


def model_name(name: str) -> str:
    """A hub id as it is, of a folder only its name."""
    return Path(name).resolve().name if Path(name).is_dir() else name
