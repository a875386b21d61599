"""Every knob of the cache, its unit and its validation.

A config only says what was asked. What "auto" becomes is decided by `Budgets.resolve`, from what
is free at that moment, so that a cache can print both.
"""

import contextlib
import difflib
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

import psutil
from huggingface_hub.constants import HF_HOME

from hf_tiered_cache.errors import ConfigError
from hf_tiered_cache.sizes import AUTO, format_bytes, parse_bytes

DIRECTORY_VARIABLE = "HF_TIERED_CACHE_DIR"
NO_PACKING = "none"
DISK_IO_MODES = ("auto", "direct", "buffered")
MIN_BLOCK_TOKENS = 4

# Shares of what is free that "auto" takes: the model's activations and other programs need the
# rest of the memory, and a full disk hurts everybody on the machine.
AUTO_DEVICE_SHARE = 0.5
AUTO_HOST_SHARE = 0.5
AUTO_DISK_SHARE = 0.8


@dataclass(frozen=True)
class TieredCacheConfig:
    """What a `TieredCache` was asked to be. Sizes are int bytes, "4GiB", "1.5GB" or "auto".

    Raises `ConfigError` naming the knob, what was got and what is expected.
    """

    # Bytes on each compute device (RAM on a machine without a GPU): blocks and staging together.
    device_bytes: int | str = AUTO
    # Bytes of host memory between device and disk; 0: none. "auto" means none where the device is
    # the CPU: one memory needs no second tier. A size makes one there too, which pays where
    # device_bytes are in faster memory (another NUMA node, CXL), and for tests. Not counted in it:
    # up to 64 MiB of pinned memory for blocks of each shape that pass between a GPU and the disk.
    host_bytes: int | str = AUTO
    # Bytes of the disk tier; 0 switches it off.
    disk_bytes: int | str = AUTO
    # Folder of the disk tier; default: $HF_TIERED_CACHE_DIR, else <HF_HOME>/tiered_cache.
    disk_dir: str | os.PathLike[str] | None = None
    # "direct" bypasses the page cache, "buffered" uses it, "auto" by size against free memory.
    disk_io: str = AUTO
    # Tokens in a block, a power of two; default: 64 KiB of keys for one head.
    block_tokens: int | None = None
    # Device bytes, out of device_bytes, for cold blocks passing through.
    staging_bytes: int | str = AUTO
    # Share, 0 to 1, of the blocks in host memory that the CPU attends where they lie instead of
    # their being carried to the device; 0 switches the one off, 1 the other. "auto": on a GPU as
    # the rates of both say, 1 where the device is the CPU.
    cpu_share: float | str = AUTO
    # Tiers of your own between host memory and disk, by name or "module:Class", with their bytes.
    extra_tiers: Mapping[str, int | str] | None = None
    # What blocks are encoded with on disk: "none", an exact codec by name or as "module:Class"; or
    # "auto": bfloat16 as "bf16_12bit" where compiled kernels run, anything else as it is.
    packing: str = NO_PACKING
    # Which blocks leave a rung first: the name of a demotion policy ("by_age"; for drafts
    # "sinks_and_recent"), or "module:Class".
    demotion: str = "by_age"
    # What attention reads: "all", or the name of another selection policy, which is approximate
    # ("resident_only": what is on the device), or "module:Class".
    attend: str = "all"

    def __post_init__(self) -> None:
        for name in ("device_bytes", "host_bytes", "disk_bytes", "staging_bytes"):
            object.__setattr__(self, name, parse_bytes(name, getattr(self, name)))
        share = self.cpu_share
        is_number = isinstance(share, (int, float)) and not isinstance(share, bool)
        if share != AUTO and not (is_number and 0 <= float(share) <= 1):
            raise ConfigError(f'cpu_share={share!r}: expected a number from 0 to 1, or "{AUTO}"')
        if self.disk_io not in DISK_IO_MODES:
            raise ConfigError(f"disk_io={self.disk_io!r}: expected one of {DISK_IO_MODES}")
        object.__setattr__(self, "extra_tiers", _parse_tiers(self.extra_tiers))
        examples = {"demotion": "by_age", "packing": "bf16_12bit", "attend": "all"}
        for name, example in examples.items():
            if not isinstance(getattr(self, name), str):
                raise ConfigError(
                    f"{name}={getattr(self, name)!r}: expected a name such as"
                    f' "{example}", or "module:Class"'
                )
        tokens = self.block_tokens
        if tokens is not None and (
            not isinstance(tokens, int) or tokens < MIN_BLOCK_TOKENS or tokens & (tokens - 1)
        ):
            raise ConfigError(
                f"block_tokens={tokens!r}: expected a power of two from {MIN_BLOCK_TOKENS} up, "
                "or None to choose by head size"
            )

    @classmethod
    def unknown(cls, name: str) -> ConfigError:
        """The error of an argument that is no knob, with the closest one or all of them."""
        known = [field.name for field in fields(cls)]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
        return ConfigError(f"unknown argument {name!r}{hint}")

    def asked(self) -> list[str]:
        """The knobs that are not at their defaults."""
        return [field.name for field in fields(self) if getattr(self, field.name) != field.default]


@dataclass(frozen=True)
class Budgets:
    """The config's sizes with every "auto" replaced by bytes.

    `host_bytes` chosen from what is free are for devices other than the CPU.
    """

    device_bytes: int
    host_bytes: int
    disk_bytes: int
    disk_dir: Path
    device_is_auto: bool
    host_is_auto: bool
    disk_is_auto: bool

    @classmethod
    def resolve(cls, config: TieredCacheConfig, device_is_host: bool = False) -> "Budgets":
        """Measure what is free now; raises `ConfigError` if the folder, or the host's memory,
        cannot hold that much. device_is_host: attention is computed in the host's memory, which
        must then hold `device_bytes`; any other device says itself what it has."""
        directory = disk_directory(config.disk_dir)
        device, host, disk = config.device_bytes, config.host_bytes, config.disk_bytes
        free_memory = free_memory_bytes()
        if device == AUTO:
            device = int(free_memory * AUTO_DEVICE_SHARE)
        elif device_is_host:
            _check_memory("device_bytes", int(device), free_memory)
        if host == AUTO:
            host = int(free_memory * AUTO_HOST_SHARE)
        else:
            _check_memory("host_bytes", int(host), free_memory)
        if disk != 0:
            free = free_disk_bytes(directory)
            if disk == AUTO:
                disk = int(free * AUTO_DISK_SHARE)
            elif int(disk) > free:
                raise ConfigError(
                    f"disk_bytes={disk} ({format_bytes(int(disk))}) is more than the "
                    f"{format_bytes(free)} free in {directory}: lower disk_bytes, or give another "
                    f"folder with disk_dir= or ${DIRECTORY_VARIABLE}"
                )
        return cls(
            device_bytes=int(device),
            host_bytes=int(host),
            disk_bytes=int(disk),
            disk_dir=directory,
            device_is_auto=config.device_bytes == AUTO,
            host_is_auto=config.host_bytes == AUTO,
            disk_is_auto=config.disk_bytes == AUTO,
        )


def _parse_tiers(given: object) -> dict[str, int] | None:
    """`extra_tiers` with their sizes as int bytes."""
    if given is None:
        return None
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise ConfigError(
            f'extra_tiers={given!r}: expected a mapping from the name of a tier, or "module:Class",'
            " to its bytes"
        )
    sizes = {name: parse_bytes(tier_knob(name), size) for name, size in given.items()}
    for name, size in sizes.items():
        if size == AUTO:
            raise ConfigError(f'{tier_knob(name)}="{AUTO}": expected int bytes, or "4GiB", "1.5GB"')
    return {name: int(size) for name, size in sizes.items()}


def tier_knob(name: str) -> str:
    """How the size of one of the extra tiers is asked for."""
    return f"extra_tiers[{name!r}]"


def _check_memory(knob: str, num_bytes: int, free_bytes: int) -> None:
    if num_bytes > free_bytes:
        raise ConfigError(
            f"{knob}={num_bytes} ({format_bytes(num_bytes)}) is more than the "
            f"{format_bytes(free_bytes)} of memory free: lower {knob}; what does not fit goes to "
            "disk"
        )


def disk_directory(given: str | os.PathLike[str] | None) -> Path:
    """The folder of the disk tier: the given one, the environment's, or one below HF_HOME."""
    chosen = given or os.environ.get(DIRECTORY_VARIABLE) or Path(HF_HOME) / "tiered_cache"
    return Path(chosen).expanduser()


def free_disk_bytes(directory: Path) -> int:
    """Bytes free in `directory`, made (mode 0700) if missing; ConfigError if unwritable."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"disk_dir={str(directory)!r} cannot be made: {error.strerror}; give another folder "
            f"with disk_dir= or ${DIRECTORY_VARIABLE}, or disk_bytes=0 for no disk tier"
        ) from None
    if not os.access(directory, os.W_OK | os.X_OK):
        raise ConfigError(
            f"disk_dir={str(directory)!r} is not writable: give another folder with disk_dir= or "
            f"${DIRECTORY_VARIABLE}, or disk_bytes=0 for no disk tier"
        )
    return shutil.disk_usage(directory).free


def free_memory_bytes() -> int:
    """Bytes of RAM this process may still take: what the machine has left, within its cgroup."""
    free = psutil.virtual_memory().available
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or "max"
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return max(free, 0)
