"""How alike two pictures are."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

#: LPIPS of two uint8 [H, W, 3] pictures.
PerceptualDistance = Callable[[np.ndarray, np.ndarray], float]


def squared_error(image: np.ndarray, reference: np.ndarray) -> float:
    """Mean squared difference of two uint8 pictures, in squared levels."""
    return float(np.mean(np.square(image.astype(np.float64) - reference.astype(np.float64))))


def psnr(error: float) -> float | None:
    """Peak signal-to-noise ratio in dB of a mean squared error; None for equal pictures."""
    return float(10 * np.log10(255**2 / error)) if error else None


def ssim(image: np.ndarray, reference: np.ndarray) -> float:
    """Structural similarity of two uint8 [H, W, 3] pictures, 1 for equal ones (Wang 2004)."""
    # Here, so that the others need numpy alone.
    from skimage.metrics import structural_similarity

    return float(structural_similarity(image, reference, channel_axis=-1, data_range=255))


def load_lpips() -> tuple[PerceptualDistance | None, str]:
    """LPIPS on AlexNet (Zhang 2018) where it is installed with its weights; never downloads.

    Returns:
        The function, or None and the reason.
    """
    for package in ("torch", "torchvision", "lpips"):
        if importlib.util.find_spec(package) is None:
            return None, f"{package} is not installed"
    try:
        import lpips
        import torch
        from torchvision.models import AlexNet_Weights
    except (ImportError, RuntimeError, OSError) as error:  # built for another torch
        return None, f"torchvision or lpips does not load: {' '.join(str(error).split())}"

    weights = Path(torch.hub.get_dir(), "checkpoints", Path(AlexNet_Weights.DEFAULT.url).name)
    if not weights.is_file():
        return None, f"{weights.name} is not in {weights.parent}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about how it asks torchvision for the weights
        model = lpips.LPIPS(net="alex", verbose=False).eval()

    def tensor(image: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 127.5 - 1

    def distance(image: np.ndarray, reference: np.ndarray) -> float:
        with torch.no_grad():
            return float(model(tensor(image), tensor(reference)))

    return distance, "AlexNet"


class RelativeError:
    """‖value − reference‖ / ‖reference‖ over all arrays that are added."""

    def __init__(self) -> None:
        self._error = self._size = 0.0

    def add(self, value: np.ndarray, reference: np.ndarray) -> None:
        """Count two arrays of the same shape."""
        exact = reference.astype(np.float64)
        with np.errstate(invalid="ignore", over="ignore"):
            self._error += float(np.square(value.astype(np.float64) - exact).sum())
            self._size += float(np.square(exact).sum())

    @property
    def ratio(self) -> float | None:
        """None where it is not finite; 0 where both are 0."""
        if self._size == 0 and self._error == 0:
            return 0.0
        value = (self._error / self._size) ** 0.5 if self._size else np.inf
        return float(value) if np.isfinite(value) else None


def relative_errors(value: np.ndarray, reference: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    """‖value − reference‖ / ‖reference‖ over these axes."""
    exact = reference.astype(np.float64)
    error = np.linalg.norm(_flat(value.astype(np.float64) - exact, axes), axis=-1)
    result: np.ndarray = error / np.linalg.norm(_flat(exact, axes), axis=-1)
    return result


def _flat(array: np.ndarray, axes: Sequence[int]) -> np.ndarray:
    moved = np.moveaxis(array, axes, range(-len(axes), 0))
    return moved.reshape(*moved.shape[: -len(axes)], -1)
