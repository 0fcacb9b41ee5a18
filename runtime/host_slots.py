"""Host memory that a loop's latents are copied to."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from .devices.device import Device

#: What one run has at most, and all together.
SLOT_BYTES = 256 << 20


class HostSlots:
    """Pinned arrays by shape, used again by the next run: to pin memory takes longer than a step,
    and waits for the device. Those of the latest shapes are kept, up to :data:`SLOT_BYTES`.

    Args:
        device: that copies to them.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._slots: OrderedDict[tuple[int, ...], list[np.ndarray]] = OrderedDict()

    def take(self, shape: tuple[int, ...], count: int) -> list[np.ndarray]:
        """Float32 arrays, as many as asked for; none where the device does not copy.

        They are overwritten when the same shape is asked for again.
        """
        slots = self._slots.pop(shape, [])
        if count > len(slots):
            slots += self._device.slots(shape, np.float32, count - len(slots))
        self._slots[shape] = slots
        while len(self._slots) > 1 and self._nbytes() > SLOT_BYTES:
            self._slots.popitem(last=False)
        return slots[:count]

    def _nbytes(self) -> int:
        return sum(slot.nbytes for slots in self._slots.values() for slot in slots)

    def clear(self) -> None:
        """Give them back."""
        self._slots.clear()
