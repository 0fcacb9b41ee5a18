"""Schedules equal diffusers', samplers converge at their order."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from sd35_trt.runtime.schedule import SAMPLERS, dpmpp_2m, euler, make_sigmas


@pytest.mark.parametrize("shift", [1.0, 2.5, 3.0, 6.0])
@pytest.mark.parametrize("steps", [1, 2, 4, 28, 50])
def test_sigmas_equal_diffusers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    sigmas = make_sigmas(steps, shift)
    np.testing.assert_allclose(sigmas, scheduler.sigmas.numpy(), atol=1e-6)
    np.testing.assert_allclose(sigmas[:-1] * 1000, scheduler.timesteps.numpy(), atol=1e-3)


def run(
    table: np.ndarray,
    sigmas: np.ndarray,
    denoise: Callable[[np.ndarray, float], np.ndarray],
    x: np.ndarray,
) -> np.ndarray:
    previous = np.zeros_like(x)
    for (a, b, c), sigma in zip(table, sigmas[:-1], strict=True):
        denoised = denoise(x, sigma)
        x, previous = a * x + b * denoised + c * previous, denoised
    return x


def test_euler_equals_diffusers() -> None:
    rng = np.random.default_rng(0)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    x = torch.from_numpy(rng.standard_normal((1, 16, 4, 4)))
    target = torch.from_numpy(rng.standard_normal((1, 16, 4, 4)))
    sigmas = make_sigmas(7, 3.0)
    actual = run(euler(sigmas), sigmas, lambda x, s: np.tanh(x) * s + target.numpy(), x.numpy())
    for t, sigma in zip(scheduler.timesteps, sigmas[:-1], strict=True):
        velocity = (x - (torch.tanh(x) * sigma + target)) / sigma
        x = scheduler.step(velocity, t, x).prev_sample.double()
    np.testing.assert_allclose(actual, x.numpy(), atol=1e-5)


def test_dpmpp_2m_equals_diffusers_where_it_is_second_order() -> None:
    """Rows between the first two and the last two, against the same solver's own step."""
    sigmas = make_sigmas(9, 3.0)
    scheduler = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", solver_order=2
    )
    scheduler.set_timesteps(9)
    scheduler.sigmas = torch.from_numpy(sigmas.astype(np.float64))
    rng = np.random.default_rng(1)
    x, previous, denoised = (torch.from_numpy(rng.standard_normal(8)) for _ in range(3))
    table = dpmpp_2m(sigmas)
    for i in range(2, 7):
        scheduler._step_index = i
        expected = scheduler.multistep_dpm_solver_second_order_update(
            [previous, denoised], sample=x
        )
        a, b, c = table[i]
        np.testing.assert_allclose(a * x + b * denoised + c * previous, expected, rtol=1e-9)
    for i in (0, 1, 7, 8):
        np.testing.assert_array_equal(table[i], euler(sigmas)[i])


def _gaussian_denoise(x: np.ndarray, sigma: float) -> np.ndarray:
    """The exact posterior mean when images are normal with mean 0.7 and deviation 0.5."""
    mean, deviation = 0.7, 0.5
    variance = (1 - sigma) ** 2 * deviation**2 + sigma**2
    return mean + (1 - sigma) * deviation**2 / variance * (x - (1 - sigma) * mean)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("dpmpp-2m", 2)])
def test_order_of_convergence(sampler: str, order: int) -> None:
    """On a problem with a known solution, over the part of the schedule away from its ends."""
    x = np.array([-1.5, 0.3, 2.0])
    errors = []
    for steps in (64, 128, 256):
        sigmas = np.linspace(0.9, 0.2, steps + 1)
        actual = run(SAMPLERS[sampler](sigmas), sigmas, _gaussian_denoise, x)

        def scale(s: float) -> float:
            return float(np.sqrt((1 - s) ** 2 * 0.25 + s**2))

        # The flow maps quantiles to quantiles, which for normals is affine.
        exact = 0.7 * (1 - 0.2) + scale(0.2) / scale(0.9) * (x - 0.7 * (1 - 0.9))
        errors.append(np.abs(actual - exact).max())
    rates = np.log2(np.array(errors[:-1]) / errors[1:])
    assert rates.min() > order - 0.25
    assert rates.max() < order + 0.6


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 28])
def test_tables_end_at_the_denoised_image(name: str, steps: int) -> None:
    sigmas = make_sigmas(steps, 3.0)
    table = SAMPLERS[name](sigmas)
    assert table.shape == (steps, 3)
    assert np.isfinite(table).all()
    np.testing.assert_allclose(table[-1], [0, 1, 0])
    # A constant image and no noise is a fixed point: a * (1 - s) + b + c = 1 - s'.
    carried = table[:, 0] * (1 - sigmas[:-1]) + table[:, 1] + table[:, 2]
    np.testing.assert_allclose(carried, 1 - sigmas[1:], atol=1e-12)
