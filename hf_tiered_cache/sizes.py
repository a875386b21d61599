"""Sizes in bytes, as people write and read them."""

import math
import re

from hf_tiered_cache.errors import ConfigError

AUTO = "auto"
PREFIXES = "KMGTP"
WORDED = rf"(\d{{1,30}}(?:\.\d{{0,30}})?|\.\d{{1,30}}) ?([{PREFIXES}])(i?)B"


def parse_bytes(name: str, size: int | str) -> int | str:
    """Turn a size into int bytes, leaving "auto"; `name` is the knob the error should name."""
    if size == AUTO:
        return AUTO
    if isinstance(size, (int, str)) and not isinstance(size, bool):
        plain = re.fullmatch(r"\d{1,30}", str(size))
        if plain:
            return int(plain[0])
        worded = re.fullmatch(WORDED, str(size), re.IGNORECASE)
        if worded:
            power = PREFIXES.index(worded[2].upper()) + 1
            return int(float(worded[1]) * (1024 if worded[3] else 1000) ** power)
    raise ConfigError(
        f'{name}={size!r}: expected int bytes >= 0, a string such as "4GiB" or "1.5GB", or "{AUTO}"'
    )


def format_bytes(num_bytes: float) -> str:
    """Render a size for people: 1536 -> "1.5 KiB"."""
    units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    power = min(int(math.log(num_bytes, 1024)), len(units) - 1) if num_bytes >= 1 else 0
    return f"{num_bytes / 1024**power:.{1 if power else 0}f} {units[power]}"
