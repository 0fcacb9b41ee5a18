"""Progress bars on standard error. They appear with the first report, so that an argument that is
refused leaves the error line alone."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class _Bars:
    """A context manager around rich's progress display, silent with ``quiet``."""

    def __init__(self, quiet: bool, *columns: ProgressColumn) -> None:
        self._progress = Progress(
            *columns, console=Console(stderr=True, markup=False), disable=quiet
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._tasks:
            self._progress.stop()

    def _update(self, name: str, total: float, completed: float, note: str = "") -> None:
        if not self._tasks:
            self._progress.start()
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(note, total=total, stage=name)
        self._progress.update(self._tasks[name], completed=completed, description=note)


class StageBars(_Bars):
    """A :class:`sd35_trt.progress.Progress`: one line a stage, with what is being done."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(
            quiet,
            TextColumn("{task.fields[stage]:<12}"),
            BarColumn(30),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.description}", markup=False),
        )

    def __call__(self, stage: str, done: float, total: float, note: str = "", /) -> None:
        self._update(stage, total, done, note)


class StepBar(_Bars):
    """A bar over denoising steps; called with each :class:`sd35_trt.runtime.Step`."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(
            quiet,
            TextColumn("{task.fields[stage]}"),
            BarColumn(30),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )

    def __call__(self, step: Any) -> None:
        self._update("drawing", step.total, step.index + 1)


class CountBars(_Bars):
    """A :class:`sd35_trt.progress.Progress`: one line a stage, with an estimate of what is left."""

    def __init__(self, quiet: bool) -> None:
        super().__init__(
            quiet,
            TextColumn("{task.fields[stage]:<12}"),
            BarColumn(30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )

    def __call__(self, stage: str, done: float, total: float, note: str = "", /) -> None:
        self._update(stage, total, done)
