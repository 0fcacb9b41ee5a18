"""The second of two devices that draw one picture, and what it holds of a bundle."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack

from sd35_trt.components import BRANCH_DENOISER, COMBINE
from sd35_trt.errors import BundleError, Sd35Error
from sd35_trt.formats.bundle import Bundle

from .adapters import AdapterFeeder, AdapterInputs
from .denoise_steps import RunInputs
from .devices.device import Device
from .devices.opening import open_device
from .lane import BranchEngines
from .process import keep_from_forks
from .request import Request
from .resident import EngineSet, MemoryReport, OpenSession
from .run_inputs import Source, run_inputs

logger = logging.getLogger("sd35_trt")

#: What each of two devices holds for the steps.
SPLIT = (BRANCH_DENOISER, COMBINE)


class SecondDevice:
    """Its engines, and its copy of what a run is given.

    Args:
        device: closed with this.
        budget: bytes of its memory; None is without limit.
        threads, open_session: see :class:`~sd35_trt.runtime.renderer.Renderer`.
        forget: called before an engine closes: graphs and buffers are released.

    Attributes:
        device: as given.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        budget: int | None,
        threads: int | None,
        open_session: OpenSession,
        forget: Callable[[], None],
    ) -> None:
        self.device = device
        self._manifest = bundle.manifest
        with ExitStack() as opened:
            opened.callback(device.close)
            opened.callback(device.activate)
            keep_from_forks(device)
            device.activate()
            self._engines = EngineSet(bundle, device, budget, threads, open_session, SPLIT)
            opened.callback(self._engines.release)
            for name in SPLIT:
                self._engines.before_close(name, forget)
            self._feeder = AdapterFeeder(bundle, device, None if budget is None else forget)
            opened.callback(self._feeder.clear)
            opened.callback(device.activate)
            self._open = opened.pop_all()

    def fit(self, dims: Mapping[str, int]) -> None:
        """See :meth:`sd35_trt.runtime.resident.EngineSet.fit`."""
        self.device.activate()
        self._engines.fit(dims)

    def open_all(self) -> None:
        """Open every engine that stays."""
        self.device.activate()
        self._engines.open_all()

    def engines(self) -> BranchEngines:
        """Its engines, open."""
        self.device.activate()
        return branch_engines(self._engines)

    def inputs(self, request: Request, source: Source) -> RunInputs:
        """What its engines are given in every step of a run."""
        self.device.activate()
        adapters = AdapterInputs.of(self._manifest, request.adapters)
        ports = self._feeder.ports("denoiser", adapters, request.adapters)
        return run_inputs(self.device, self._manifest, request, source, ports)

    def memory(self) -> MemoryReport:
        """What is in its memory now."""
        self.device.activate()
        return self._engines.memory()

    def release(self) -> None:
        """Close every engine; they open again when they are used."""
        self.device.activate()
        self._engines.release()

    def close(self) -> None:
        """Release engines and device."""
        self._open.close()


def branch_engines(engines: EngineSet) -> BranchEngines:
    """Those of a lane, open."""
    return BranchEngines(engines.use(BRANCH_DENOISER), engines.use(COMBINE))


def check_splits(bundle: Bundle) -> None:
    """Refuse a bundle whose pictures two devices cannot draw.

    Raises:
        BundleError: says how it is built.
    """
    if bundle.manifest.features.split_guidance:
        return
    if not bundle.manifest.guided:
        raise BundleError(
            f"{bundle.root} has no guidance, of which two devices would compute a branch each",
            "use one device, or a PipelinePool with devices=",
        )
    raise BundleError(
        f"{bundle.root} has no denoiser of one branch of guidance for two devices",
        "build it with: --split-guidance, or use one device",
    )


def open_second(first: Device, name: str) -> Device | None:
    """The second device, whose copies from and to the first go directly; None, with a warning,
    where there is no such device."""
    try:
        second = open_device(name)
    except Sd35Error as error:
        logger.warning("%s draws alone: %s", first.name, error)
        first.activate()
        return None
    try:
        if first.reaches(second):
            return second
    finally:
        first.activate()
    logger.warning("%s draws alone: copies between it and %s do not go directly", first.name, name)
    second.activate()
    second.close()
    first.activate()
    return None
