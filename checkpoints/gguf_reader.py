"""``gguf.GGUFReader``, quick with long arrays in the metadata."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFValueType

# In front of an array: the type of its elements, 4 bytes, and their number, 8 bytes.
_HEAD = struct.Struct("<IQ")
_LENGTH = struct.Struct("<Q")


class Reader(GGUFReader):
    """Takes an array of numbers as one; the library makes arrays of NumPy's of each.

    A T5 file has a tokenizer of 340,000 numbers and strings, for which the library takes seconds.
    """

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY or self.byte_order == "S":
            return super()._get_field_parts(orig_offs, raw_type)
        element, count = _HEAD.unpack(self._bytes(orig_offs, _HEAD.size))
        kind, start = GGUFValueType(element), orig_offs + _HEAD.size
        number = self.gguf_scalar_to_np.get(kind)
        if number is not None:
            size = count * np.dtype(number).itemsize
            parts = [np.frombuffer(self._bytes(start, size), number)]
        elif kind == GGUFValueType.STRING:
            parts, size = self._strings(start, count)
        else:
            return super()._get_field_parts(orig_offs, raw_type)
        data = list(range(len(parts)))
        return _HEAD.size + size, parts, data, [GGUFValueType.ARRAY, kind]

    def _bytes(self, offset: int, size: int) -> memoryview:
        if offset + size > len(self.data):
            raise ValueError("the file ends within its metadata")
        return self.data.data[offset : offset + size]

    def _strings(self, start: int, count: int) -> tuple[list[Any], int]:
        strings, offset = [], start
        for _ in range(count):
            (length,) = _LENGTH.unpack(self._bytes(offset, _LENGTH.size))
            offset += _LENGTH.size
            strings.append(np.frombuffer(self._bytes(offset, length), np.uint8))
            offset += length
        return strings, offset - start
