"""What the denoiser is given in every step of a run, from the request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sd35_trt.formats.bundle import ADAPTER_SCALES, Manifest

from .control_steps import no_residuals
from .denoise_steps import RunInputs
from .devices.device import Buffer, Device
from .request import Request
from .skip_layers import layer_count, layer_masks
from .source_pictures import latent_mask


@dataclass(frozen=True)
class Source:
    """What latents start from, besides noise.

    Attributes:
        latents: of the picture, float32 [B, C, h, w]; None where there is none.
        noise: of the seeds, the same.
    """

    latents: np.ndarray | None
    noise: np.ndarray


def run_inputs(
    device: Device,
    manifest: Manifest,
    request: Request,
    source: Source,
    adapters: Mapping[str, Buffer],
) -> RunInputs:
    """Inputs of a bundle's denoiser for a request.

    Args:
        adapters: inputs for them, by port.
    """
    own: dict[str, np.ndarray] = {}
    if manifest.guided:
        own["guidance"] = np.array(request.guidance, np.float32)
    if manifest.features.inpainting:
        own |= _inpainting(request, source)
    layers = layer_count(manifest)
    mask = None if layers is None else device.upload(layer_masks(request.skips, layers))
    buffers = {name: device.upload(array) for name, array in own.items()}
    matrices = dict(adapters)
    if (scales := matrices.pop(ADAPTER_SCALES, None)) is not None:
        buffers[ADAPTER_SCALES] = scales
    return RunInputs(buffers, matrices, mask, no_residuals(manifest, device))


def _inpainting(request: Request, source: Source) -> dict[str, np.ndarray]:
    noise = source.noise
    if request.mask is None or source.latents is None:
        everything = np.ones((len(noise), 1, *noise.shape[2:]), np.float32)
        return {"mask": everything, "source": np.zeros_like(noise), "source_noise": noise}
    mask = latent_mask(request.mask, request.latent_scale)[:, None]
    return {
        "mask": np.ascontiguousarray(mask),
        "source": source.latents,
        "source_noise": noise,
    }
