"""The calibration artifact: what ``sd35-trt calibrate`` measured, in a directory of two files.

``calibration.safetensors`` holds FP32 scalars, the largest magnitude (amax) of each tensor seen:

- ``<component>/<layer>.input_amax``: the input of every linear that the policy quantizes to FP8;
- ``<component>/<module>.output_amax``: the output of every layer and residual block, for the
  range guard;
- ``<component>/<attention>.q_amax``, ``k_amax``, ``v_amax``, ``p_amax`` (softmax output): where
  the policy asks for FP8 attention matmuls.

``calibration.json`` says how they came about, and holds the digest of the scalars. The band of the
latents is there too: the runtime warns of images that leave it, the build does not depend on it.

A bundle holds an extract of it in one file, :class:`CalibrationExtract`.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from msgspec import Meta, Raw, Struct
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from sd35_trt.errors import BundleError, UsageError

from .band import REBUILD, LatentStatistics, extract_bytes
from .bundle import Bundle
from .reading import (
    Count,
    Digest,
    Name,
    Positive,
    Text,
    check_format,
    decode,
    encode,
    read_file,
    reason_of,
)

#: Version of the artifact; a reader accepts exactly its own.
FORMAT = 1

TENSORS = "calibration.safetensors"
DESCRIPTION = "calibration.json"

#: The largest finite E4M3 value; a scale is amax / E4M3_MAX.
E4M3_MAX = 448.0

#: The operands of the attention matmuls: softmax(q·kᵀ) = p, p·v.
ATTENTION_OPERANDS = ("q", "k", "v", "p")

# Below it, amax / E4M3_MAX is no normal FP32.
_SMALLEST_AMAX = E4M3_MAX * 2.0**-126

_AGAIN = "make it again with: sd35-trt calibrate"


# Of a JSON file with a line for every layer of the model.
_LARGEST = 64 << 20


class PolicyIdentity(Struct, frozen=True):
    """A precision policy's name, and the SHA-256 of its rules."""

    name: Text
    sha256: Digest


class PromptsIdentity(Struct, frozen=True):
    """SHA-256 of a set of prompts, and how many there are."""

    sha256: Digest
    count: Count


class Provenance(Struct, frozen=True, kw_only=True):
    """How amax values came about. What is not known is None.

    Attributes:
        variant: a key of :data:`sd35_trt.variants.VARIANTS`.
        files: path in the checkpoint → SHA-256.
        sizes: (width, height) in pixels.
        method: how amax is found: ``max``, or that the checkpoint had it.
        dtype: that was computed in: ``fp32``, ``bf16``, ``fp16``.
        device: that computed.
        versions: of the libraries.
        command: that made the calibration.
        latents: what the runtime compares with.
    """

    variant: Name | None = None
    files: Annotated[dict[Name, Digest], Meta(max_length=65536)] | None = None
    policy: PolicyIdentity | None = None
    prompts: PromptsIdentity | None = None
    steps: Positive | None = None
    guidance: float | None = None
    sizes: tuple[tuple[Positive, Positive], ...] | None = None
    seed: int | None = None
    method: Text | None = None
    dtype: Name | None = None
    device: Name | None = None
    versions: dict[Name, Text] | None = None
    command: Text | None = None
    latents: LatentStatistics | None = None

    def known(self) -> dict[str, object]:
        """Fields that are not None, as JSON has them."""
        fields = {name: getattr(self, name) for name in self.__struct_fields__}
        return {k: msgspec.to_builtins(v) for k, v in fields.items() if v is not None}


@dataclass(frozen=True)
class Calibration:
    """Amax values by name, each rounded to FP32.

    Attributes:
        inputs: ``component/layer`` of an FP8 linear → amax of its input.
        activations: ``component/module`` → amax of its output (of a tuple: of all its tensors).
        bmm: ``component/attention.operand``, operand one of :data:`ATTENTION_OPERANDS` → amax.
        provenance: how they came about.
        unknown: fields of the description that a newer version wrote, kept as they are.
    """

    inputs: Mapping[str, float]
    activations: Mapping[str, float]
    bmm: Mapping[str, float]
    provenance: Provenance
    unknown: Mapping[str, Raw] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("inputs", "activations", "bmm"):
            rounded = {k: float(np.float32(v)) for k, v in getattr(self, name).items()}
            object.__setattr__(self, name, rounded)

    def tensors(self) -> dict[str, float]:
        """Every amax by its name in the file."""
        suffixes = ((self.inputs, ".input_amax"), (self.activations, ".output_amax"))
        named = {name + suffix: v for values, suffix in suffixes for name, v in values.items()}
        return {**named, **{f"{name}_amax": v for name, v in self.bmm.items()}}

    def digest(self) -> str:
        """SHA-256 of names and values, hex; the provenance does not count."""
        listed = [(k, float(v).hex()) for k, v in sorted(self.tensors().items())]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def files(self) -> dict[str, bytes]:
        """Contents of the artifact's files by name."""
        description = {"format": FORMAT, "digest": self.digest(), **self.described()}
        tensors = {k: np.array(v, np.float32) for k, v in sorted(self.tensors().items())}
        return {TENSORS: save_tensors(tensors), DESCRIPTION: encode(description)}

    def described(self) -> dict[str, object]:
        """The provenance by field, unknown ones included."""
        return {**self.unknown, **self.provenance.known()}

    @classmethod
    def from_tensors(
        cls,
        tensors: Mapping[str, float],
        provenance: Provenance,
        unknown: Mapping[str, Raw] | None = None,
    ) -> Calibration:
        """The inverse of :meth:`tensors`.

        Raises:
            ValueError: a name that is none of a calibration's.
        """
        fields: dict[str, dict[str, float]] = {"inputs": {}, "activations": {}, "bmm": {}}
        kinds = {"input": "inputs", "output": "activations"}
        for name, value in tensors.items():
            module, _, operand = name.removesuffix("_amax").rpartition(".")
            if operand in kinds:
                fields[kinds[operand]][module] = value
            elif operand in ATTENTION_OPERANDS:
                fields["bmm"][f"{module}.{operand}"] = value
            else:
                raise ValueError(f"holds an unknown tensor {name!r}")
        return cls(**fields, provenance=provenance, unknown=unknown or {})

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a calibration.

        Args:
            path: its directory, or the ``.safetensors`` file in it.

        Raises:
            UsageError: missing, truncated, or of another format.
        """
        folder = path.parent if path.suffix == ".safetensors" else path
        path = folder / DESCRIPTION
        data = _read_description(path)
        head = decode(data, _Head, path, UsageError, _AGAIN)
        check_format(head.format, (FORMAT,), path, UsageError, _AGAIN)
        provenance = decode(data, Provenance, path, UsageError, _AGAIN)
        unknown = _unknown_fields(data, path, UsageError, ("format", "digest"))
        file = folder / TENSORS
        try:
            tensors = load_tensors(read_file(file, _LARGEST))
            values = {
                name: float(tensor.astype(np.float32).item()) for name, tensor in tensors.items()
            }
        except FileNotFoundError:
            raise UsageError(f"{file} is missing", _AGAIN) from None
        except (SafetensorError, OSError, ValueError) as error:
            raise UsageError(f"{file} is truncated or damaged ({error})", _AGAIN) from error
        try:
            calibration = cls.from_tensors(values, provenance, unknown)
        except ValueError as error:
            raise UsageError(f"{file} {error}", _AGAIN) from error
        if head.digest != calibration.digest():
            raise UsageError(f"{file} does not belong to {DESCRIPTION} (digest differs)", _AGAIN)
        return calibration

    def check(
        self,
        checkpoint_files: Mapping[str, str],
        layers: Iterable[str],
        attention: Iterable[str] = (),
    ) -> None:
        """Refuse a calibration of another checkpoint or another policy.

        Args:
            checkpoint_files: path in the checkpoint → SHA-256, of all or some of its parts.
            layers: ``component/layer`` of every linear that is to be quantized to FP8.
            attention: ``component/module`` of every attention whose matmuls are to be.

        Raises:
            UsageError: names the file, or the layers.
        """
        files = self.provenance.files or {}
        folders = {_folder(file) for file in checkpoint_files}
        own = {file for file in files if _LORA.match(file) and _folder(file) in folders}
        for file in (*checkpoint_files, *sorted(own - checkpoint_files.keys())):
            if files.get(file) != checkpoint_files.get(file):
                raise UsageError(
                    f"the calibration is of another checkpoint ({file} differs)",
                    "calibrate this one with: sd35-trt calibrate",
                )
        operands = [f"{name}.{x}" for name in attention for x in ATTENTION_OPERANDS]
        for names, scales in ((list(layers), self.inputs), (operands, self.bmm)):
            _same_names(names, scales)
            bad = [name for name in names if not _SMALLEST_AMAX <= scales[name] < math.inf]
            if bad:
                values = ", ".join(f"{name} ({scales[name]:g})" for name in bad[:3])
                raise UsageError(f"amax without use in the calibration: {values}", _AGAIN)
        bad = [name for name, value in self.activations.items() if not math.isfinite(value)]
        if bad:
            raise UsageError(f"activations not finite in the calibration: {_some(bad)}", _AGAIN)


# How a LoRA in a part is listed.
_LORA = re.compile(r"[^/]+/lora-\d+/")


def _folder(file: str) -> str:
    return file.partition("/")[0]


def _same_names(names: list[str], scales: Mapping[str, float]) -> None:
    without = [name for name in names if name not in scales]
    if without:
        raise UsageError(
            f"the calibration has no scale for {_some(without)}",
            "calibrate with the policy of this build: sd35-trt calibrate --policy P",
        )
    surplus = sorted(set(scales) - set(names))
    if surplus:
        raise UsageError(
            f"the calibration has a scale for {_some(surplus)}, which the policy does not quantize",
            "calibrate with the policy of this build: sd35-trt calibrate --policy P",
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


class _Head(Struct, frozen=True):
    """What says whether a description can be read, and which scalars it belongs to."""

    format: int
    digest: Digest | None = None


def _read_description(path: Path) -> bytes:
    try:
        return read_file(path, _LARGEST)
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{path.parent} is not a calibration (no {path.name})",
            "make one with: sd35-trt calibrate --out DIR",
        ) from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {reason_of(error)}", _AGAIN) from error


def _unknown_fields(
    data: bytes, path: Path, error: type[BundleError | UsageError], beside: tuple[str, ...]
) -> dict[str, Raw]:
    """Fields of a description that are not :class:`Provenance`'s, nor those ``beside`` it."""
    fields = decode(data, dict[str, Raw], path, error, _AGAIN)
    names = (*Provenance.__struct_fields__, *beside)
    return {name: raw.copy() for name, raw in fields.items() if name not in names}


@dataclass(frozen=True)
class CalibrationExtract:
    """What a bundle's ``calibration.json`` holds: provenance, and amax values by tensor name.

    Attributes:
        calibration: that was built with.
    """

    calibration: Calibration

    def encode(self) -> bytes:
        """Contents of the file: the provenance's fields, and ``amax``, sorted by name."""
        return encode({**self.calibration.described(), "amax": self.calibration.tensors()})

    @classmethod
    def of(cls, bundle: Bundle) -> CalibrationExtract:
        """That of a bundle.

        Raises:
            BundleError: the bundle has none, or it is not as it was written.
        """
        path, data = extract_bytes(bundle)
        amax = decode(data, _Amax, path, BundleError, REBUILD).amax
        provenance = decode(data, Provenance, path, BundleError, REBUILD)
        unknown = _unknown_fields(data, path, BundleError, ("amax",))
        try:
            return cls(Calibration.from_tensors(amax, provenance, unknown))
        except ValueError as error:
            raise BundleError(f"{path} {error}", REBUILD) from error


class _Amax(Struct, frozen=True):
    amax: dict[Name, float]
