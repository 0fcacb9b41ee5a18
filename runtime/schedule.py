"""Sigma schedules and samplers. A sampler is a table of coefficients, one row per step.

The denoiser returns ``next = a * latents + b * denoised + c * previous_denoised``; a row is
(a, b, c). Rectified flow (Esser et al., 2024): ``latents = (1 - sigma) * image + sigma * noise``.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Move sigmas towards noise for larger pictures (Esser et al., 2024, section 5.3.2)."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def make_sigmas(steps: int, shift: float, num_train_timesteps: int = 1000) -> np.ndarray:
    """The schedule of diffusers' ``FlowMatchEulerDiscreteScheduler``.

    As there, the smallest training sigma is shifted once for the end of the range, and the range
    as a whole once more.

    Args:
        steps: number of denoising steps, at least 1.
        shift: 1.0 keeps sigmas evenly spaced.
        num_train_timesteps: the scheduler's, 1000.

    Returns:
        float64 [steps + 1], from 1 down to 0.
    """
    last = shift_sigmas(np.array(1 / num_train_timesteps), shift)
    sigmas = shift_sigmas(np.linspace(1.0, last, steps), shift)
    return np.append(sigmas, 0.0)


def euler(sigmas: np.ndarray) -> np.ndarray:
    """Euler's method: [steps, 3] for sigmas [steps + 1]."""
    ratio = sigmas[1:] / sigmas[:-1]
    return np.stack([ratio, 1 - ratio, np.zeros_like(ratio)], axis=1)


def dpmpp_2m(sigmas: np.ndarray) -> np.ndarray:
    """DPM-Solver++(2M) (Lu et al., 2022, algorithm 2) for rectified flow, alpha = 1 - sigma.

    First order where the second does not exist (the first step and the one after it, whose
    predecessor has log-SNR minus infinity) and in the last two steps, across which the schedule's
    log-SNR jumps: extrapolating there adds more error than it removes.

    Returns:
        [steps, 3] for sigmas [steps + 1].
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        log_snr = np.log((1 - sigmas) / sigmas)
    table = euler(sigmas)
    for i in range(1, len(table) - 2):
        before, now, after = log_snr[i - 1 : i + 2]
        if np.isfinite([before, now, after]).all():
            # D = denoised + (denoised - previous) / (2 r), r = previous step / this step.
            weight = (after - now) / (2 * (now - before))
            b = table[i, 1]
            table[i] = table[i, 0], b * (1 + weight), -b * weight
    return table


#: Samplers by name: sigmas [steps + 1] → coefficients [steps, 3].
SAMPLERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"euler": euler, "dpmpp-2m": dpmpp_2m}
