"""Sizes in bytes, as people write and read them."""

import pytest

from hf_tiered_cache.errors import ConfigError
from hf_tiered_cache.sizes import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        (0, 0),
        (4096, 4096),
        ("4096", 4096),
        ("4GiB", 4 * 2**30),
        ("4gib", 4 * 2**30),
        ("4gb", 4 * 10**9),  # bytes, not bits: the knobs are in bytes
        (".5 KB", 500),
        ("1.PiB", 2**50),
        ("1.5GB", 1_500_000_000),
        ("512MiB", 2**29),
        ("0.5TiB", 2**39),
        ("3 TB", 3 * 10**12),
        ("auto", "auto"),
    ],
)
def test_a_size_is_a_number_a_word_or_auto(size, num_bytes):
    assert parse_bytes("device_bytes", size) == num_bytes


@pytest.mark.parametrize(
    "size",
    [
        -1,
        "-1",
        "4 apples",
        "",
        "TiB",
        "1.2.3GB",
        "-1GB",
        "nanGB",
        "4B",
        "4EB",
        "9" * 5000,
        "9" * 400 + "GB",
        "\u00b2",
        1.5,
        None,
        True,
        float("nan"),
    ],
)
def test_anything_else_is_refused_by_the_name_of_its_knob(size):
    with pytest.raises(ConfigError, match=r"^disk_bytes=.*expected int bytes >= 0"):
        parse_bytes("disk_bytes", size)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (2**30, "1.0 GiB"),
        (3 * 2**60, "3072.0 PiB"),
    ],
)
def test_sizes_are_printed_for_people(num_bytes, text):
    assert format_bytes(num_bytes) == text
