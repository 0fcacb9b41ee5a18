"""Sigma schedules and samplers. A sampler is a table of coefficients, one row per step.

The denoiser returns ``next = a * latents + b * denoised + c * previous_denoised``; a row is
(a, b, c). Rectified flow (Esser et al., 2024): ``latents = (1 - sigma) * image + sigma * noise``.

Specified to the bit in docs/bundle-format.md, for other languages: computed in float64, rounded to
float32 once. Types are explicit, since what numpy makes of mixed ones changed with its version 2.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def shift_sigmas(sigmas: np.ndarray, shift: float) -> np.ndarray:
    """Move sigmas towards noise for larger pictures (Esser et al., 2024, section 5.3.2).

    Args:
        sigmas: float64.
    """
    return np.float64(shift) * sigmas / (1.0 + np.float64(shift - 1.0) * sigmas)


def make_sigmas(steps: int, shift: float, num_train_timesteps: int = 1000) -> np.ndarray:
    """The schedule of diffusers' ``FlowMatchEulerDiscreteScheduler``.

    As there, the smallest training sigma is shifted once for the end of the range, and the range
    as a whole once more.

    Args:
        steps: number of denoising steps, at least 1.
        shift: 1.0 keeps sigmas evenly spaced.
        num_train_timesteps: the scheduler's, 1000.

    Returns:
        float32 [steps + 1], from 1 down to 0.
    """
    last = float(shift_sigmas(np.array([1.0 / num_train_timesteps], np.float64), shift)[0])
    even = np.ones(steps, np.float64)
    if steps > 1:
        even += np.arange(steps, dtype=np.float64) * ((last - 1.0) / (steps - 1))
        even[-1] = last
    sigmas = np.zeros(steps + 1, np.float32)
    sigmas[:-1] = shift_sigmas(even, shift)
    return sigmas


def make_timesteps(sigmas: np.ndarray, num_train_timesteps: float) -> np.ndarray:
    """What the conditioner takes for sigmas: float32, as they are."""
    return sigmas.astype(np.float32) * np.float32(num_train_timesteps)


def mix(noise: np.ndarray, encoded: np.ndarray, sigma: np.float32) -> np.ndarray:
    """Latents of a picture with noise, where image to image begins.

    Args:
        noise, encoded: float32 of one shape.
        sigma: float32, of the first step that is drawn.

    Returns:
        float32; every product and the sum are rounded.
    """
    return sigma * noise + (np.float32(1.0) - sigma) * encoded


def euler(sigmas: np.ndarray) -> np.ndarray:
    """Euler's method: float64 [steps, 3] for sigmas [steps + 1]."""
    wide = sigmas.astype(np.float64)
    ratio = wide[1:] / wide[:-1]
    return np.stack([ratio, 1.0 - ratio, np.zeros_like(ratio)], axis=1)


def dpmpp_2m(sigmas: np.ndarray) -> np.ndarray:
    """DPM-Solver++(2M) (Lu et al., 2022, algorithm 2) for rectified flow, alpha = 1 - sigma.

    First order where the second does not exist (the first step and the one after it, whose
    predecessor has log-SNR minus infinity) and in the last two steps, across which the schedule's
    log-SNR jumps: extrapolating there adds more error than it removes.

    Returns:
        float64 [steps, 3] for sigmas [steps + 1].
    """
    wide = sigmas.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        log_snr = np.log((1.0 - wide) / wide)
    table = euler(sigmas)
    for i in range(1, len(table) - 2):
        before, now, after = log_snr[i - 1 : i + 2]
        if np.isfinite([before, now, after]).all():
            # D = denoised + (denoised - previous) / (2 r), r = previous step / this step.
            weight = (after - now) / (2 * (now - before))
            b = table[i, 1]
            table[i] = table[i, 0], b * (1 + weight), -b * weight
    return table


#: Samplers by name: sigmas [steps + 1] → coefficients, float64 [steps, 3].
SAMPLERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"euler": euler, "dpmpp-2m": dpmpp_2m}


def coefficients(sampler: str, sigmas: np.ndarray) -> np.ndarray:
    """What the denoiser takes: float32 [steps, 3].

    Args:
        sampler: a key of :data:`SAMPLERS`.
        sigmas: float32 [steps + 1].
    """
    return SAMPLERS[sampler](sigmas).astype(np.float32)
