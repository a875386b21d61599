"""Sizes in bytes, as people write and read them."""

import math
import re

from accelerate.utils import convert_file_size_to_int

from hf_tiered_cache.errors import ConfigError

AUTO = "auto"


def parse_bytes(name: str, size: int | str) -> int | str:
    """Turn a size into int bytes, leaving "auto"; `name` is the knob the error should name."""
    expected = f'expected int bytes >= 0, a string such as "4GiB" or "1.5GB", or "{AUTO}"'
    if size == AUTO:
        return AUTO
    if isinstance(size, bool) or not isinstance(size, (int, str)):
        raise ConfigError(f"{name}={size!r}: {expected}")
    try:
        tera = re.fullmatch(r"([\d.]+) ?T(i?)B", str(size), re.IGNORECASE)
        if tera:  # accelerate's words end at giga
            giga = convert_file_size_to_int(f"{tera[1]}G{tera[2]}B")
            return giga * (1024 if tera[2] else 1000)
        return convert_file_size_to_int(int(size) if str(size).isdigit() else size)
    except (ValueError, OverflowError):
        raise ConfigError(f"{name}={size!r}: {expected}") from None


def format_bytes(num_bytes: float) -> str:
    """Render a size for people: 1536 -> "1.5 KiB"."""
    units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    power = min(int(math.log(num_bytes, 1024)), len(units) - 1) if num_bytes >= 1 else 0
    return f"{num_bytes / 1024**power:.{1 if power else 0}f} {units[power]}"
