"""Shares, sticky keys, and which keys move when shares change."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd35_trt.errors import UsageError
from sd35_trt.runtime.traffic import Traffic

KEYS = [f"user-{i}" for i in range(4000)]


def split(shares: dict[str, float]) -> dict[str, str]:
    traffic = Traffic(shares)
    return {key: traffic.choose(key) for key in KEYS}


def test_keys_stay_and_shares_come_out() -> None:
    shares = {"a": 70.0, "b": 20.0, "c": 10.0, "d": 0.0}
    first = split(shares)
    assert first == split(dict(reversed(shares.items())))
    counts = Counter(first.values())
    for name, share in shares.items():
        # Four standard deviations of 4000 draws.
        assert abs(counts[name] / len(KEYS) - share / 100) < 0.03
    assert counts["d"] == 0


def test_the_assignment_is_the_same_in_every_release() -> None:
    """Users would change bundles when a server is updated."""
    traffic = Traffic({"fp16": 50, "fp8": 50})
    assert "".join(traffic.choose(f"user-{i}")[-1] for i in range(12)) == "868888886886"


def test_without_key_requests_are_split_by_chance() -> None:
    traffic = Traffic({"a": 75, "b": 25})
    counts = Counter(traffic.choose() for _ in range(4000))
    assert abs(counts["b"] / 4000 - 0.25) < 0.03


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 100), st.integers(0, 100))
def test_a_rollout_moves_only_the_keys_it_must(one: int, other: int) -> None:
    low, high = sorted((one, other))
    before, after = (split({"fp16": 100 - share, "fp8": share}) for share in (low, high))
    moved = {key for key in KEYS if before[key] != after[key]}
    assert all(after[key] == "fp8" for key in moved)
    assert Counter(after.values())["fp8"] - Counter(before.values())["fp8"] == len(moved)


def test_a_new_bundle_takes_from_all_in_proportion() -> None:
    before, after = split({"a": 60, "b": 40}), split({"a": 48, "b": 32, "c": 20})
    moved = [key for key in KEYS if before[key] != after[key]]
    assert {after[key] for key in moved} == {"c"}


@pytest.mark.parametrize(
    ("shares", "words"),
    [
        ({"a": 50, "b": 40}, "the shares are 90 % in all"),
        ({"a": 110, "b": -10}, "must not be negative"),
        ({"a": float("nan"), "b": 50}, "must not be negative"),
        ({}, "the shares are 0 % in all"),
    ],
)
def test_wrong_shares(shares: dict[str, float], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Traffic(shares)
