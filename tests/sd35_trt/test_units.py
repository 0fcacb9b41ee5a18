"""Byte counts and durations in words."""

from __future__ import annotations

import pytest

from sd35_trt.errors import UsageError
from sd35_trt.units import parse_bytes, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90m", 5400), ("12h", 43200), ("30d", 30 * 86400), ("2w", 14 * 86400), ("30 d", 2592000),
     ("0d", 0)],
)  # fmt: skip
def test_durations(text: str, seconds: int) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "30", "d", "-1d", "1.5d", "30 days", "1y", "1d12h", "9999999d"]
)
def test_what_is_no_duration_says_how_to_say_it(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a duration — say it in .*: 90m, 12h, 30d, 2w"):
        parse_duration(text)


def test_sizes_of_disks() -> None:
    assert parse_bytes("1TB") == 10**12
    assert parse_bytes("2TiB") == 2 << 40
