"""The band of the latents in a bundle: how healthy ones were in calibration, for the runtime.

It is a part of what :class:`sd35_trt.formats.calibration.CalibrationExtract` writes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from sd35_trt.errors import BundleError

from .bundle import CALIBRATION, Bundle
from .reading import decode, read_file, reason_of

REBUILD = "build it again with: sd35-trt build"

# A line for every layer of the model.
_LARGEST = 64 << 20

#: Smallest and largest of any image.
Extremes = tuple[float, float]

_Steps = Meta(max_length=4096)


class LatentStatistics(Struct, frozen=True):
    """What the latents of healthy images were like after each step.

    Attributes:
        sigma: noise level after the step.
        mean, deviation: of the latents there.
    """

    sigma: Annotated[tuple[float, ...], _Steps]
    mean: Annotated[tuple[Extremes, ...], _Steps]
    deviation: Annotated[tuple[Extremes, ...], _Steps]

    def __post_init__(self) -> None:
        if not len(self.sigma) == len(self.mean) == len(self.deviation):
            raise ValueError("latents have as many sigmas as means and deviations")


class BandExtract(Struct, frozen=True):
    """The part of the extract that the runtime reads."""

    latents: LatentStatistics | None = None

    @classmethod
    def of(cls, bundle: Bundle) -> BandExtract:
        """That of a bundle; without ``latents`` where the bundle has no calibration.

        Raises:
            BundleError: it is not as it was written.
        """
        if all(file.path != CALIBRATION for file in bundle.manifest.files):
            return cls()
        path, data = extract_bytes(bundle)
        return decode(data, cls, path, BundleError, REBUILD)


def extract_bytes(bundle: Bundle) -> tuple[Path, bytes]:
    """Path and content of a bundle's ``calibration.json``.

    Raises:
        BundleError: it cannot be read.
    """
    path = bundle.path(CALIBRATION)
    try:
        return path, read_file(path, _LARGEST)
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {reason_of(error)}", REBUILD) from error
