"""A second bundle that draws when the first one's images are anomalous."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

from sd35_trt.errors import BundleError, NotFinite
from sd35_trt.features import SPLIT_GUIDANCE, STEP_CACHE
from sd35_trt.formats.bundle import Bundle

from .job import Job, Result
from .latent_guard import is_usual
from .renderer import Renderer
from .timing import Clock

logger = logging.getLogger("sd35_trt")

# So many anomalous images in a row, and the second bundle takes over.
_PATIENCE = 2


class Fallback:
    """Draws with the first of two renderers until two anomalous images in a row, then with the
    second. Images whose guidance or shift is unusual do not count. A request with an image that is
    not finite is drawn again with the second at once.

    Args:
        first, second: of bundles that :func:`check_fallback` lets pass.

    Attributes:
        active: whether the second draws.
    """

    def __init__(self, first: Renderer, second: Renderer) -> None:
        self.active = False
        self._first, self._second = first, second
        self._in_a_row = 0

    def restore(self) -> None:
        """Draw with the first again, from the next request on."""
        self._in_a_row = 0
        self.active = False

    def draw(self, jobs: Sequence[Job], clock: Clock) -> None:
        """See :meth:`sd35_trt.runtime.renderer.Renderer.draw`."""
        if self.active:
            self._draw_second(jobs, clock)
            _add_note(jobs, f"drawn with the fallback {self._second.bundle.root}")
            return
        self._first.draw(jobs, clock)
        self._count(jobs)
        again = [job for job in jobs if isinstance(job.outcome, NotFinite)]
        if again:
            for job in again:
                job.outcome = None
            self._draw_second(again, clock)
            _add_note(again, f"drawn again with the fallback {self._second.bundle.root}")

    def _count(self, jobs: Sequence[Job]) -> None:
        """Switch to the second where it is time."""
        for job in jobs:
            if not isinstance(job.outcome, (Result, NotFinite)):
                continue  # cancelled: nothing is known of its images
            anomalous = {anomaly.image for anomaly in job.anomalies}
            for image in range(len(job.request.seeds)):
                if not is_usual(self._first.bundle.manifest, job.request, image):
                    continue  # what one asks for moves nobody else
                self._in_a_row = self._in_a_row + 1 if image in anomalous else 0
                if self._in_a_row == _PATIENCE:
                    self.active = True
                    logger.error(
                        "%s: %d anomalous images in a row; drawing with %s until restore()",
                        self._first.bundle.root, _PATIENCE, self._second.bundle.root,
                    )  # fmt: skip

    def _draw_second(self, jobs: Sequence[Job], clock: Clock) -> None:
        # A budget is for one of the two at a time.
        limited = self._first.engines.budget is not None
        if limited:
            self._first.release()
        self._second.activate()
        self._second.draw(jobs, clock)
        if limited:
            self._second.release()
        self._first.activate()


def _add_note(jobs: Sequence[Job], note: str) -> None:
    for job in jobs:
        if isinstance(job.outcome, Result):
            job.outcome = replace(job.outcome, notes=(*job.outcome.notes, note))


def check_fallback(bundle: Bundle, fallback: Bundle) -> None:
    """Refuse a fallback that cannot draw whatever the bundle can.

    Raises:
        BundleError: says in what they differ.
    """
    mine, its = bundle.manifest, fallback.manifest
    difference = None
    if its.model.variant != mine.model.variant:
        difference = f"is {its.model.variant}, {bundle.root} is {mine.model.variant}"
    elif mine.guided and not its.guided:
        difference = f"was built without guidance, {bundle.root} with it"
    elif not its.ranges.include(mine.ranges):
        difference = f"accepts fewer batches, sizes or text lengths than {bundle.root}"
    elif max(its.adapter_ranks, default=0) < max(mine.adapter_ranks, default=0):
        difference = f"takes adapters of a lower rank than {bundle.root}"
    elif nets := {c.name for c in mine.controls} - {c.name for c in its.controls}:
        difference = f"has no ControlNet {', '.join(sorted(nets))}, {bundle.root} has"
    elif lacking := set(mine.requires) - {STEP_CACHE, SPLIT_GUIDANCE} - set(its.requires):
        difference = f"was built without {', '.join(sorted(lacking))}, {bundle.root} with it"
    if difference is not None:
        raise BundleError(
            f"the fallback {fallback.root} {difference}",
            "build one with the same model and options",
        )
