"""What `env` finds on this machine, section by section."""

import os
import platform
import resource
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from hf_tiered_cache.config import (
    AUTO_DEVICE_SHARE,
    AUTO_DISK_SHARE,
    DIRECTORY_VARIABLE,
    disk_directory,
    free_disk_bytes,
    free_memory_bytes,
)
from hf_tiered_cache.errors import ConfigError, KernelUnavailableError, TierIOError
from hf_tiered_cache.evaluation.environment import processor
from hf_tiered_cache.evaluation.versions import package_version
from hf_tiered_cache.kernels import loader
from hf_tiered_cache.planner.rates import disk_rates, memory_read_rate
from hf_tiered_cache.sizes import format_bytes
from hf_tiered_cache.tiers.disk.block_file import BlockFile
from hf_tiered_cache.tiers.disk.movers import moving_core

PACKAGES = ("torch", "transformers", "accelerate", "huggingface_hub", "xxhash", "numpy")


def versions() -> dict[str, str]:
    """Of this package and those under it."""
    found = {
        "hf_tiered_cache": package_version(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["torch's CUDA"] = torch.version.cuda or "none"
    return found


def machine() -> dict[str, Any]:
    """Hardware and system."""
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "processor": processor(),
        "processors": f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads",
        "memory": f"{format_bytes(psutil.virtual_memory().total)}, "
        f"{format_bytes(free_memory_bytes())} free",
        "lockable memory": "unlimited" if locked < 0 else format_bytes(locked),
    }


def kernels() -> dict[str, Any]:
    """Which kernel runs, which others could, and why the rest cannot."""
    core, reason = loader.compiled_core()
    try:
        chosen = loader.backend()
    except KernelUnavailableError as error:
        chosen = f"none: {error}"
    cuda_core, why_not = loader.cuda_core()
    forced = os.environ.get(loader.ENVIRONMENT_VARIABLE)
    return {
        "compiled core": "built" if core else f"missing: {reason}",
        "chosen": chosen + (f" (forced by {loader.ENVIRONMENT_VARIABLE})" if forced else ""),
        "available": ", ".join(loader.available_kernels()),
        **{f"not {name}": why for name, why in loader.unavailable_kernels().items()},
        "on cuda": "the CUDA core" if cuda_core else f"plain torch: {why_not}",
        "disk mover": "compiled" if moving_core() else "python",
    }


def tiers(disk_dir: str | None, measure: bool) -> dict[str, Any]:
    """Where blocks can lie, what is free there, and how fast it is."""
    free = free_memory_bytes()
    found: dict[str, Any] = {
        "device cpu": f"{format_bytes(free)} free; "
        f'device_bytes="auto" takes {format_bytes(free * AUTO_DEVICE_SHARE)}'
    }
    if measure:
        found["  reads"] = f"{memory_read_rate() / 1e9:.1f} GB/s"
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            found[f"device cuda:{index}"] = (
                f"{torch.cuda.get_device_name(index)}, {format_bytes(free)} of "
                f"{format_bytes(total)} free"
            )
    return found | disk_tier(disk_dir, measure)


def disk_tier(disk_dir: str | None, measure: bool) -> dict[str, Any]:
    """The folder, its space, whether it takes direct I/O, and its rates."""
    folder = disk_directory(disk_dir)
    found: dict[str, Any] = {"disk": str(folder)}
    try:
        free = free_disk_bytes(folder)
        file = BlockFile(os.fspath(folder), want_direct=True)
        is_direct = file.has_direct
        file.close()
        found["  space"] = (
            f"{format_bytes(free)} free on {file_system(folder)}; "
            f'disk_bytes="auto" takes {format_bytes(free * AUTO_DISK_SHARE)}'
        )
        found["  O_DIRECT"] = "works" if is_direct else "refused: all I/O goes by the page cache"
        rates = disk_rates(folder, is_direct) if measure else None
    except (ConfigError, TierIOError) as error:
        return found | {"  unusable": str(error)}
    if rates:
        found["  writes"] = f"{rates.write / 1e9:.2f} GB/s"
        found["  reads, verified"] = (
            f"{rates.read / 1e9:.2f} GB/s"
            f" ({format_bytes(rates.num_bytes)}, {'O_DIRECT' if is_direct else 'page cache'})"
        )
    return found


def file_system(folder: Path) -> str:
    """Its kind, and the device it is on."""
    path = folder.resolve()
    parts = psutil.disk_partitions(all=True)
    held = [part for part in parts if path.is_relative_to(part.mountpoint)]
    if not held:
        return "an unknown file system"
    part = max(held, key=lambda part: len(part.mountpoint))
    return f"{part.fstype} ({part.device})"


def environment_variables() -> dict[str, str]:
    """Those that this package reads."""
    names = (DIRECTORY_VARIABLE, loader.ENVIRONMENT_VARIABLE, "HF_HOME")
    return {name: os.environ.get(name, "not set") for name in names}
