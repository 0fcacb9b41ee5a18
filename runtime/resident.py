"""A bundle's engines in device memory: which stay, which come and go, within a budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain

from sd35_trt.components import layer_holder, runs_every_step
from sd35_trt.errors import BundleError
from sd35_trt.formats.bundle import Bundle, Component
from sd35_trt.residency import LOADED, RESIDENT, STREAMED, phases_of

from .devices.device import Device, DeviceMemory
from .memory_plan import MemoryPlanner
from .opening import Opening
from .process import keep_from_forks
from .sessions.session import Session, SessionOptions

logger = logging.getLogger("sd35_trt")

OpenSession = Callable[[Bundle, Component, Device, SessionOptions], Session]


@dataclass(frozen=True)
class EngineMemory:
    """One engine.

    Attributes:
        kind: ``resident``, ``loaded`` or ``streamed``; see :mod:`sd35_trt.residency`.
        open: whether it is in memory now.
        weight_bytes: of its weights, in memory while it is open.
    """

    kind: str
    open: bool
    weight_bytes: int


@dataclass(frozen=True)
class MemoryReport:
    """What a pipeline takes of its device.

    Attributes:
        engines: by component.
        device: what the device says.
        budget: bytes that were asked to be kept to; None where there is no limit.
        planned_peak: what the planner expects at most, for the largest request so far.
        second: of the second device, where two draw one picture.
    """

    engines: Mapping[str, EngineMemory]
    device: DeviceMemory
    budget: int | None
    planned_peak: int
    second: MemoryReport | None = None


class EngineSet:
    """Opens engines when they are needed and closes what the budget does not let stay.

    One thread at a time; engines are also opened ahead, in a thread of its own.

    Args:
        budget: bytes of device memory; None keeps every engine once it is open.
        only: components that it has; None has all of the bundle.

    Attributes:
        budget: as given.
    """

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        budget: int | None,
        threads: int | None,
        open_session: OpenSession,
        only: Collection[str] | None = None,
    ) -> None:
        self._bundle = bundle
        self._device = device
        self.budget = budget
        self._threads = threads
        self._open_session = open_session
        names = [component.name for component in bundle.manifest.components]
        self._components = {
            name: component
            for name in chain.from_iterable(phases_of(names).values())
            if (component := bundle.manifest.component(name)) is not None
            and (only is None or name in only)
        }
        self._sessions: dict[str, Session] = {}
        self._held: dict[str, int | None] = {}
        self._ahead: dict[str, Opening] = {}
        self._before_close: dict[str, Callable[[], None]] = {}
        self._fitted: tuple[dict[str, int], frozenset[str], bool] | None = None
        unknown = any(c.activation_bytes is None for c in self._components.values())
        if budget is not None and device.kind != "cpu" and unknown:
            logger.warning(
                "%s does not know what its engines work with: vram_budget counts their weights "
                "alone, leave room for the rest", bundle.root,
            )  # fmt: skip
        self._planner = MemoryPlanner(bundle, self._components, device.kind == "cuda", budget)
        self._plan = self._planner.plan({})
        self._most = 0

    def fit(self, dims: Mapping[str, int], nets: Collection[str] = (), short: bool = False) -> None:
        """Make room for requests of this size.

        Args:
            dims: sizes of dynamic dimensions of the components; those left out count as least.
            nets: ControlNets that they run. Without a budget, the others' engines stay too.
            short: whether they have short steps. Without a budget, their engine stays if not.

        Raises:
            OutOfMemory: the budget is too small; names the smallest that is enough.
        """
        wanted = dict(dims), frozenset(nets), short
        if wanted != self._fitted:
            self._plan, self._fitted = self._planner.plan_within_budget(*wanted), wanted
            self._most = max(self._most, self._plan.peak_bytes)
        for name in list(self._sessions):
            if self._held[name] != self._holds(name) or not (self._stays(name) or self._runs(name)):
                self._close(name)

    def before_close(self, name: str, call: Callable[[], None]) -> None:
        """Have something called before an engine closes: what others hold of it is released."""
        self._before_close[name] = call

    def use(self, name: str) -> Session:
        """The engine of a component, in memory until another is used that needs its room.

        Raises:
            BundleError: the bundle has no such component, or the engine refuses its file.
            Sd35Error: no memory, or the backend's package is not installed.
        """
        for other in [*self._sessions, *self._ahead]:
            # What runs in every step runs in turn with this.
            in_turn = runs_every_step(name) and runs_every_step(other)
            if other != name and not in_turn and not self._stays(other):
                self._close(other)
        ahead = self._ahead.pop(name, None)
        if ahead is not None:
            self._sessions[name] = ahead.session()
        elif name not in self._sessions:
            self._make_room()
            self._sessions[name] = self._open(name)
        self._device.memory()  # notes the peak
        return self._sessions[name]

    def load_ahead(self, name: str, beside: str) -> None:
        """Begin to open an engine while another runs, if both have room.

        Args:
            name: the engine that is used next.
            beside: the one that runs.
        """
        if name in self._sessions or name in self._ahead or name not in self._components:
            return
        if not self._stays(name) and self.budget is not None:
            running, coming = self._plan.placements[beside], self._plan.placements[name]
            together = [beside]
            if runs_every_step(beside):
                together = list(filter(runs_every_step, self._plan.placements))
            extra = sum(
                self._plan.placements[n].device_bytes for n in together if not self._stays(n)
            )
            if max(coming.peak_bytes + extra, running.peak_bytes + coming.device_bytes) > (
                self.budget
            ):
                return
        self._make_room()
        self._held[name] = self._holds(name)
        self._ahead[name] = Opening(lambda: self._open(name))

    def open_all(self) -> None:
        """Open every engine that stays; the denoiser, which takes longest, beside the others."""
        stays = [name for name in self._components if self._stays(name)]
        longest = next((name for name in stays if layer_holder(name) == "denoiser"), None)
        if longest is not None:
            self.load_ahead(longest, longest)
        # Waited for last, or what is behind it would be opened after it.
        for name in sorted(stays, key=lambda name: name == longest):
            self.use(name)

    def keeps(self, *names: str) -> bool:
        """Whether all of these stay in memory."""
        return all(map(self._stays, names))

    def release(self) -> None:
        """Close every engine, even if one fails to; they open again when they are used."""
        with ExitStack() as closing:
            closing.callback(self._device.trim)
            for name in [*self._sessions, *self._ahead]:
                closing.callback(self._close, name)

    def memory(self) -> MemoryReport:
        """What is in memory now; may be called from any thread."""
        engines = {}
        for name, component in self._components.items():
            placement = self._plan.placements.get(name)
            is_open, held = name in self._sessions, self._planner.weight_bytes(component)
            if is_open and placement is not None:
                held = placement.device_bytes
            kind = LOADED if placement is None else placement.kind
            engines[name] = EngineMemory(RESIDENT if self._stays(name) else kind, is_open, held)
        return MemoryReport(engines, self._device.memory(), self.budget, self._most)

    def _runs(self, name: str) -> bool:
        """Whether requests of the last size run a component."""
        return name in self._plan.placements

    def _stays(self, name: str) -> bool:
        if not self._runs(name):
            return self.budget is None
        return self._plan.placements[name].kind == RESIDENT

    def _holds(self, name: str) -> int | None:
        """Bytes of weights that an engine holds where it streams, by the plan."""
        placement = self._plan.placements.get(name)
        if placement is None or placement.kind != STREAMED:
            return None
        return placement.device_bytes

    def _make_room(self) -> None:
        """Give back what the engines before worked with: the plan counts it in their stages alone,
        where engines come and go."""
        if self.budget is not None:
            self._device.trim()

    def _open(self, name: str) -> Session:
        if name not in self._components:
            raise BundleError(f"{self._bundle.root} has no {name}", "build it again")
        self._device.activate()
        self._held[name] = self._holds(name)
        options = SessionOptions(self._threads, self._held[name])
        session = self._open_session(self._bundle, self._components[name], self._device, options)
        keep_from_forks(session)
        return session

    def _close(self, name: str) -> None:
        session = self._sessions.pop(name, None)
        ahead = self._ahead.pop(name, None)
        if ahead is not None:
            session = ahead.session_if_any()
        with ExitStack() as closing:
            if session is not None:
                closing.callback(session.close)
            if name in self._before_close:
                closing.callback(self._before_close[name])
