"""A session that is watched while a pipeline draws with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sd35_trt.runtime.devices.device import Buffer, Device
from sd35_trt.runtime.sessions.session import Session

from .onnx_graph import Arrays


class WatchedSession:
    """A session with a function before and after each run, which see arrays on the host."""

    recordable = False

    def __init__(
        self,
        session: Session,
        device: Device,
        before: Callable[[Arrays], Arrays] = lambda inputs: inputs,
        after: Callable[[Arrays, Arrays], None] = lambda inputs, outputs: None,
    ) -> None:
        self._session = session
        self._device = device
        self._before = before
        self._after = after

    def run(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
        arrays = self._download(inputs)
        state = self._before(arrays)
        changed = {k: self._device.upload(v) for k, v in state.items() if v is not arrays[k]}
        self._session.run({**inputs, **changed}, outputs)
        self._after(state, self._download(outputs))

    def _download(self, buffers: Mapping[str, Buffer]) -> Arrays:
        return {name: self._device.download(buffer) for name, buffer in buffers.items()}

    def close(self) -> None:
        self._session.close()
