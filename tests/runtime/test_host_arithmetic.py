"""The runtime's arithmetic on the host is docs/bundle-format.md's, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import host_arithmetic as reference
import numpy as np
import pytest

from sd35_trt.runtime.noise import randn
from sd35_trt.runtime.schedule import coefficients, make_sigmas, make_timesteps, mix

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[2] / "docs" / "host-arithmetic.json").read_text("utf-8")
)


def read(values: list[str]) -> np.ndarray:
    exact = [float.fromhex(value) for value in values]
    rounded = np.array(exact, np.float32)
    assert rounded.tolist() == exact, "every value is a float32"
    return rounded


def assert_same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    assert actual.dtype == expected.dtype == np.float32
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


def test_the_vectors_are_those_of_the_specification() -> None:
    assert json.loads(json.dumps(reference.vectors())) == VECTORS


@pytest.mark.parametrize("case", VECTORS["noise"], ids=lambda case: f"seed-{case['seed']}")
def test_noise(case: dict[str, Any]) -> None:
    values = randn((case["count"],), case["seed"])
    if "last" in case:
        assert_same_bits(values[-16:], read(case["last"]))
    else:
        assert_same_bits(values, read(case["values"]))


def test_much_noise() -> None:
    """So much that a logarithm in float32 shows: it differs in one value of ten."""
    expected = np.array(reference.noise(1 << 16, 99), np.float32)
    assert_same_bits(randn((1 << 16,), 99), expected)


@pytest.mark.parametrize(
    "case", VECTORS["schedules"], ids=lambda c: f"{c['steps']}-{float.fromhex(c['shift'])}"
)
def test_schedules(case: dict[str, Any]) -> None:
    sigmas = make_sigmas(case["steps"], float.fromhex(case["shift"]), case["num_train_timesteps"])
    assert_same_bits(sigmas, read(case["sigmas"]))
    timesteps = make_timesteps(sigmas[:-1], case["num_train_timesteps"])
    assert_same_bits(timesteps, read(case["timesteps"]))
    for sampler in ("euler", "dpmpp-2m"):
        table = coefficients(sampler, sigmas)
        assert_same_bits(table, np.stack([read(row) for row in case[sampler]]))


@pytest.mark.parametrize("shift", [0.3, 1.0, 3.0, 7.77])
def test_more_schedules(shift: float) -> None:
    for steps in (*range(1, 60), 1000):
        expected = reference.sigmas(steps, shift, 1000.0)
        sigmas = make_sigmas(steps, shift)
        assert_same_bits(sigmas, np.array(expected, np.float32))
        table = np.array(reference.dpmpp_2m(expected), np.float64).astype(np.float32)
        assert_same_bits(coefficients("dpmpp-2m", sigmas), table)


def test_mix() -> None:
    for case in VECTORS["mix"]:
        sigma, noise, encoded, latent = (
            read([case[key]]) for key in ("sigma", "noise", "encoded", "latent")
        )
        assert_same_bits(mix(noise, encoded, sigma[0]), latent)
