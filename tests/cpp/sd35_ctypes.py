"""libsd35 through its C functions, as a program in any language would call it."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from ctypes import (
    POINTER,
    Structure,
    byref,
    c_char_p,
    c_double,
    c_float,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint32,
    c_uint64,
    c_void_p,
)
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

UNSET = -(2**53)

STATUS = ("ok", "failed", "usage", "bundle", "out of memory", "cancelled", "not finite")


class Text(Structure):
    _fields_ = (("data", c_char_p), ("length", c_size_t))


class StepView(Structure):
    _fields_ = (
        ("size", c_size_t), ("index", c_uint32), ("total", c_uint32), ("sigma", c_float),
        ("latents", POINTER(c_float)), ("shape", c_uint64 * 4), ("source", c_void_p),
    )  # fmt: skip


CALLBACK = ctypes.CFUNCTYPE(c_int, POINTER(StepView), c_void_p)
LOG = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class LoadOptions(Structure):
    _fields_ = (
        ("size", c_size_t), ("device", c_char_p), ("fallback", c_char_p),
        ("vram_budget", c_uint64), ("prompt_cache", c_uint64), ("threads", c_uint32),
        ("max_prompt_chars", c_uint32), ("verify", c_int32), ("log", LOG), ("log_user", c_void_p),
    )  # fmt: skip


class AdapterUse(Structure):
    _fields_ = (("name", c_char_p), ("scale", c_double))


class Mix(Structure):
    _fields_ = (("uses", POINTER(AdapterUse)), ("count", c_size_t))


class ControlFields(Structure):
    _fields_ = (
        ("size", c_size_t), ("name", c_char_p), ("image", POINTER(c_uint8)),
        ("image_width", c_uint32), ("image_height", c_uint32), ("scale", c_double),
        ("start", c_double), ("end", c_double),
    )  # fmt: skip


class ControlInfo(Structure):
    _fields_ = (("size", c_size_t), ("name", c_char_p), ("kind", c_char_p))


class RequestFields(Structure):
    _fields_ = (
        ("size", c_size_t),
        ("prompts", POINTER(Text)), ("prompt_count", c_size_t),
        ("negatives", POINTER(Text)), ("negative_count", c_size_t),
        ("seeds", POINTER(c_uint64)), ("seed_count", c_size_t), ("seed", c_uint64),
        ("batch", c_int64), ("steps", c_int64), ("guidance", c_double), ("shift", c_double),
        ("width", c_int64), ("height", c_int64), ("t5_tokens", c_int64), ("sampler", c_char_p),
        ("image", POINTER(c_uint8)), ("image_width", c_uint32), ("image_height", c_uint32),
        ("strength", c_double), ("callback", CALLBACK), ("callback_user", c_void_p),
        ("prompts_2", POINTER(Text)), ("prompt_2_count", c_size_t),
        ("prompts_3", POINTER(Text)), ("prompt_3_count", c_size_t),
        ("negatives_2", POINTER(Text)), ("negative_2_count", c_size_t),
        ("negatives_3", POINTER(Text)), ("negative_3_count", c_size_t), ("weighting", c_int64),
        ("mask", POINTER(c_uint8)), ("mask_width", c_uint32), ("mask_height", c_uint32),
        ("paste", c_int64),
        ("skip_guidance_layers", POINTER(c_int64)), ("skip_guidance_layer_count", c_size_t),
        ("skip_layer_guidance_scale", c_double), ("skip_layer_guidance_start", c_double),
        ("skip_layer_guidance_stop", c_double), ("mixes", POINTER(Mix)), ("mix_count", c_size_t),
        ("controls", POINTER(POINTER(ControlFields))), ("control_count", c_size_t),
        ("latents", POINTER(c_float)), ("latent_shape", c_uint64 * 4), ("decode", c_int64),
    )  # fmt: skip


class AnomalyFields(Structure):
    _fields_ = (
        ("size", c_size_t), ("image", c_uint32), ("step", c_uint32), ("sigma", c_double),
        ("seed", c_uint64), ("prompt", c_char_p), ("what", c_char_p), ("finite", c_uint32),
    )  # fmt: skip


class MemoryFields(Structure):
    _fields_ = tuple(
        (name, c_size_t if name == "size" else c_uint64)
        for name in ("size", "used", "peak", "total", "budget", "planned_peak")
    )


class EngineFields(Structure):
    _fields_ = (
        ("size", c_size_t), ("component", c_char_p), ("kind", c_char_p), ("open", c_uint32),
        ("weight_bytes", c_uint64),
    )  # fmt: skip


class Failure(Exception):
    """What a function returned other than ``SD35_OK``.

    Attributes:
        status: its name, of :data:`STATUS`.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self._arguments = status, message
        self.status = STATUS[status]

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process is given it whole."""
        return Failure, self._arguments


@dataclass(frozen=True)
class Drawn:
    """A result, copied out of the library."""

    images: np.ndarray
    latents: np.ndarray
    seeds: tuple[int, ...]
    parameters: dict[str, Any]
    timings: dict[str, float]
    notes: tuple[str, ...]
    anomalies: tuple[dict[str, Any], ...]


class Library:
    """The shared library at a path."""

    def __init__(self, path: Path) -> None:
        self._lib = lib = ctypes.CDLL(str(path))
        for name in ("version", "error_message", "result_parameters", "result_note",
                     "result_timing"):  # fmt: skip
            getattr(lib, f"sd35_{name}").restype = c_char_p
        for name in ("result_count", "result_timing_count", "result_note_count",
                     "result_anomaly_count", "memory_engine_count"):  # fmt: skip
            getattr(lib, f"sd35_{name}").restype = c_size_t
        lib.sd35_result_image.restype = POINTER(c_uint8)
        lib.sd35_result_latents.restype = POINTER(c_float)
        lib.sd35_result_seed.restype = lib.sd35_pipeline_anomalies.restype = c_uint64
        lib.sd35_array_data.restype = c_void_p
        for name in ("result_width", "result_height"):
            getattr(lib, f"sd35_{name}").restype = c_uint32

    def __getattr__(self, name: str) -> Any:
        return getattr(self._lib, f"sd35_{name}")

    def check(self, status: int, error: c_void_p) -> None:
        """Raise where a function failed, and free its error."""
        if status:
            failure = Failure(status, self.error_message(error).decode())
            self.error_free(error)
            raise failure

    def call(self, name: str, *arguments: Any) -> None:
        """A function whose last argument is where its error goes."""
        error = c_void_p()
        status = getattr(self, name)(*arguments, byref(error))
        self.check(status, error)

    def result(self, handle: c_void_p) -> Drawn:
        """Copies a result and frees it."""
        count = self.result_count(handle)
        height, width = self.result_height(handle), self.result_width(handle)
        shape = (c_uint64 * 4)()
        latents = self.result_latents(handle, shape)
        addresses = [self.result_image(handle, c_size_t(i)) for i in range(count)]
        shape_of_one = (height, width, 3)
        images = [np.ctypeslib.as_array(a, shape_of_one).copy() for a in addresses if a]
        seconds = c_double()
        timings = {}
        for i in range(self.result_timing_count(handle)):
            name = self.result_timing(handle, c_size_t(i), byref(seconds))
            timings[name.decode()] = seconds.value
        drawn = Drawn(
            np.stack(images) if images else np.empty((0, *shape_of_one), np.uint8),
            np.ctypeslib.as_array(latents, tuple(shape)).copy(),
            tuple(self.result_seed(handle, c_size_t(i)) for i in range(count)),
            json.loads(self.result_parameters(handle)),
            timings,
            tuple(
                self.result_note(handle, c_size_t(i)).decode()
                for i in range(self.result_note_count(handle))
            ),
            tuple(self._anomaly(handle, i) for i in range(self.result_anomaly_count(handle))),
        )
        self.result_free(handle)
        return drawn

    def _anomaly(self, handle: c_void_p, index: int) -> dict[str, Any]:
        fields = AnomalyFields(size=ctypes.sizeof(AnomalyFields))
        self.call("result_anomaly", handle, c_size_t(index), byref(fields))
        return values(fields)


def values(fields: Structure) -> dict[str, Any]:
    """Of a structure, its size left out; bytes as text."""
    names = [name for name, *_ in fields._fields_ if name != "size"]
    got = {name: getattr(fields, name) for name in names}
    return {k: v.decode() if isinstance(v, bytes) else v for k, v in got.items()}


def _mixes(mixes: Mapping[str, float] | Sequence[Mapping[str, float]]) -> tuple[Any, int]:
    some = [mixes] if isinstance(mixes, Mapping) else list(mixes)
    uses = [(AdapterUse * len(m))(*(AdapterUse(n.encode(), s) for n, s in m.items())) for m in some]
    return (Mix * len(some))(*(Mix(own, len(own)) for own in uses)), len(some)


#: Argument → the fields of how many texts, and of these.
_OTHER_TEXTS = {
    f"{kind}_{number}": (f"{kind}_{number}_count", f"{kind}s_{number}")
    for kind in ("prompt", "negative")
    for number in (2, 3)
}


def _texts(texts: str | bytes | Sequence[str | bytes]) -> tuple[Any, int]:
    some = [texts] if isinstance(texts, str | bytes) else list(texts)
    data = [text.encode() if isinstance(text, str) else text for text in some]
    return (Text * len(data))(*(Text(d, len(d)) for d in data)), len(data)


class Asked:
    """A request's structure, and what it points to; arguments as Python's."""

    def __init__(
        self,
        library: Library,
        prompt: str | bytes | Sequence[str | bytes],
        *,
        negative: str | bytes | Sequence[str | bytes] = (),
        seed: int | Sequence[int] = 0,
        size: tuple[int, int] | None = None,
        image: np.ndarray | None = None,
        sampler: str | None = None,
        mask: np.ndarray | None = None,
        skip_guidance_layers: Sequence[int] | None = None,
        adapters: Mapping[str, float] | Sequence[Mapping[str, float]] | None = None,
        controls: Mapping[str, Any] | None = None,
        latents: np.ndarray | None = None,
        callback: Callable[[StepView], bool | None] | None = None,
        **more: Any,
    ) -> None:
        self.fields = RequestFields()
        library.request_init(byref(self.fields))
        fields = self.fields
        fields.prompts, fields.prompt_count = _texts(prompt)
        fields.negatives, fields.negative_count = _texts(negative)
        for name, (singular, plural) in _OTHER_TEXTS.items():
            if name in more:
                data, count = _texts(more.pop(name))
                setattr(fields, plural, data)
                setattr(fields, singular, count)
        if isinstance(seed, int):
            fields.seed = seed
        else:
            fields.seeds = (c_uint64 * len(seed))(*seed)
            fields.seed_count = len(seed)
        if size is not None:
            fields.width, fields.height = size
        if image is not None:
            self._image = np.ascontiguousarray(image)
            fields.image = self._image.ctypes.data_as(POINTER(c_uint8))
            fields.image_height, fields.image_width = image.shape[:2]
        if mask is not None:
            self._mask = np.ascontiguousarray(mask)
            fields.mask = self._mask.ctypes.data_as(POINTER(c_uint8))
            fields.mask_height, fields.mask_width = mask.shape
        if skip_guidance_layers is not None:
            layers = list(skip_guidance_layers)
            fields.skip_guidance_layers = (c_int64 * max(len(layers), 1))(*layers)
            fields.skip_guidance_layer_count = len(layers)
        if adapters is not None:
            fields.mixes, fields.mix_count = _mixes(adapters)
        if controls is not None:
            self._set_controls(library, controls)
        if latents is not None:
            self._latents = np.ascontiguousarray(latents)
            fields.latents = self._latents.ctypes.data_as(POINTER(c_float))
            fields.latent_shape[:] = latents.shape
        if sampler is not None:
            fields.sampler = sampler.encode()
        for name, value in more.items():
            setattr(fields, name, UNSET if value is None else value)
        if callback is not None:
            # A number other than 0 ends the request.
            fields.callback = CALLBACK(lambda step, _: int(callback(step.contents) is False))

    def _set_controls(self, library: Library, controls: Mapping[str, Any]) -> None:
        """Pictures, or what has them with scale, start and end."""
        pointers = []
        self._pictures = []
        for name, control in controls.items():
            own = ControlFields()
            library.control_init(byref(own))
            picture = control if isinstance(control, np.ndarray) else control.image
            self._pictures.append(np.ascontiguousarray(picture))
            own.name = name.encode()
            own.image = self._pictures[-1].ctypes.data_as(POINTER(c_uint8))
            own.image_height, own.image_width = picture.shape[:2]
            if picture is not control:
                own.scale, own.start, own.end = control.scale, control.start, control.end
            pointers.append(ctypes.pointer(own))
        self.fields.controls = (POINTER(ControlFields) * max(len(pointers), 1))(*pointers)
        self.fields.control_count = len(pointers)


class Pipe:
    """A pipeline; options as Python's."""

    def __init__(self, library: Library, path: Path | str, **options: Any) -> None:
        self.library = library
        self.logged: list[str] = []
        fields = LoadOptions()
        library.load_options_init(byref(fields))
        for name, value in options.items():
            setattr(fields, name, str(value).encode() if name in ("device", "fallback") else value)
        self._log = fields.log = LOG(lambda _, text, __: self.logged.append(text.decode()))
        self.handle = c_void_p()
        library.call("pipeline_load", str(path).encode(), byref(fields), byref(self.handle))

    def __enter__(self) -> Pipe:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.free()

    def free(self) -> None:
        self.library.pipeline_free(self.handle)
        self.handle = c_void_p()

    def call(self, name: str, *arguments: Any) -> None:
        self.library.call(f"pipeline_{name}", self.handle, *arguments)

    def generate(self, prompt: Any, **arguments: Any) -> Drawn:
        asked = Asked(self.library, prompt, **arguments)
        result = c_void_p()
        self.call("generate", byref(asked.fields), byref(result))
        return self.library.result(result)

    def check(self, prompt: Any, **arguments: Any) -> None:
        self.call("check", byref(Asked(self.library, prompt, **arguments).fields))

    def load_adapter(self, name: str, path: Path | str) -> None:
        self.call("load_adapter", name.encode(), str(path).encode())

    def joins(self, one: Asked, other: Asked) -> bool:
        joins = c_int()
        self.call("joins", byref(one.fields), byref(other.fields), byref(joins))
        return bool(joins.value)

    def generate_joined(self, requests: Sequence[dict[str, Any]]) -> list[Drawn | Failure]:
        asked = [Asked(self.library, **request) for request in requests]
        count = len(asked)
        pointers = (POINTER(RequestFields) * count)(*(ctypes.pointer(a.fields) for a in asked))
        results, errors = (c_void_p * count)(), (c_void_p * count)()
        self.library.pipeline_generate_joined(
            self.handle, pointers, c_size_t(count), results, errors
        )
        outcomes: list[Drawn | Failure] = []
        for result, error in zip(results, errors, strict=True):
            assert (result is None) != (error is None), "one of the two"
            if result is not None:
                outcomes.append(self.library.result(c_void_p(result)))
                continue
            status = self.library.error_status(c_void_p(error))
            try:
                self.library.check(status, c_void_p(error))
            except Failure as failure:
                outcomes.append(failure)
        return outcomes

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Latents of pictures [B, H, W, 3]."""
        own = np.ascontiguousarray(images)
        count, height, width, _ = own.shape
        array = c_void_p()
        self.call("encode", own.ctypes.data_as(POINTER(c_uint8)), c_size_t(count), c_uint32(width),
                  c_uint32(height), byref(array))  # fmt: skip
        return self._taken(array, c_float)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """Pictures of latents [B, C, h, w]."""
        own = np.ascontiguousarray(latents)
        array = c_void_p()
        shape = (c_uint64 * 4)(*own.shape)
        self.call("decode", own.ctypes.data_as(POINTER(c_float)), shape, byref(array))
        return self._taken(array, c_uint8)

    def _taken(self, array: c_void_p, kind: Any) -> np.ndarray:
        shape = (c_uint64 * 4)()
        address = self.library.array_data(array, shape)
        values = ctypes.cast(address, POINTER(kind))
        copy = np.ctypeslib.as_array(values, tuple(shape)).copy()
        self.library.array_free(array)
        return copy

    def memory(self) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
        """Of the device, and of each engine."""
        handle = c_void_p()
        self.call("memory", byref(handle))
        library = self.library
        report = MemoryFields(size=ctypes.sizeof(MemoryFields))
        library.call("memory_get", handle, byref(report))
        engines = {}
        for i in range(library.memory_engine_count(handle)):
            fields = EngineFields(size=ctypes.sizeof(EngineFields))
            library.call("memory_engine", handle, c_size_t(i), byref(fields))
            engine = values(fields)
            engines[engine.pop("component")] = engine
        library.memory_free(handle)
        return values(report), engines
