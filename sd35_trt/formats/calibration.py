"""The calibration artifact: what ``sd35-trt calibrate`` measured, in a directory of two files.

``calibration.safetensors`` holds FP32 scalars, the largest magnitude (amax) of each tensor seen:

- ``<component>/<layer>.input_amax``: the input of every linear that the policy quantizes to FP8;
- ``<component>/<module>.output_amax``: the output of every layer and residual block, for the
  range guard;
- ``<component>/<attention>.q_amax``, ``k_amax``, ``v_amax``, ``p_amax`` (softmax output): where
  the policy asks for FP8 attention matmuls.

``calibration.json`` says how they came about, and holds the digest of the scalars. The band of the
latents is there too: the runtime warns of images that leave it, the build does not depend on it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from sd35_trt.errors import UsageError

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


@dataclass(frozen=True)
class Calibration:
    """Amax values by name, each rounded to FP32.

    Attributes:
        inputs: ``component/layer`` of an FP8 linear → amax of its input.
        activations: ``component/module`` → amax of its output (of a tuple: of all its tensors).
        bmm: ``component/attention.operand``, operand one of :data:`ATTENTION_OPERANDS` → amax.
        provenance: JSON-serializable: ``variant``; ``files`` (path in the checkpoint → SHA-256);
            ``policy`` (name, sha256); ``prompts`` (sha256, count); ``steps``, ``guidance``,
            ``sizes``, ``seed``, ``method``, ``versions``, ``command``; ``latents``: the noise
            level after each step (``sigma``), and the smallest and the largest ``mean`` and
            ``deviation`` that any image's latents had there.
    """

    inputs: Mapping[str, float]
    activations: Mapping[str, float]
    bmm: Mapping[str, float]
    provenance: Mapping[str, Any]

    def __post_init__(self) -> None:
        for field in ("inputs", "activations", "bmm"):
            rounded = {k: float(np.float32(v)) for k, v in getattr(self, field).items()}
            object.__setattr__(self, field, rounded)

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
        description = {"format": FORMAT, "digest": self.digest(), **self.provenance}
        tensors = {k: np.array(v, np.float32) for k, v in sorted(self.tensors().items())}
        text = json.dumps(description, indent=1, sort_keys=True, ensure_ascii=False)
        return {TENSORS: save_tensors(tensors), DESCRIPTION: f"{text}\n".encode()}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, float], provenance: Mapping[str, Any]
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
        return cls(**fields, provenance=provenance)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read a calibration.

        Args:
            path: its directory, or the ``.safetensors`` file in it.

        Raises:
            UsageError: missing, truncated, or of another format.
        """
        folder = path.parent if path.suffix == ".safetensors" else path
        description = _read_description(folder / DESCRIPTION)
        file = folder / TENSORS
        try:
            tensors = load_tensors(file.read_bytes())
            values = {
                name: float(tensor.astype(np.float32).item()) for name, tensor in tensors.items()
            }
        except FileNotFoundError:
            raise UsageError(f"{file} is missing", _AGAIN) from None
        except (SafetensorError, OSError, ValueError) as error:
            raise UsageError(f"{file} is truncated or damaged ({error})", _AGAIN) from error
        digest = description.pop("digest", None)
        description.pop("format")
        try:
            calibration = cls.from_tensors(values, description)
        except ValueError as error:
            raise UsageError(f"{file} {error}", _AGAIN) from error
        if digest != calibration.digest():
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
        known = self.provenance.get("files") or {}
        for file, digest in checkpoint_files.items():
            if known.get(file) != digest:
                raise UsageError(
                    f"the calibration is of another checkpoint ({file} differs)",
                    "calibrate this one with: sd35-trt calibrate",
                )
        operands = [f"{name}.{x}" for name in attention for x in ATTENTION_OPERANDS]
        for wanted, scales in ((list(layers), self.inputs), (operands, self.bmm)):
            _same_names(wanted, scales)
            bad = [name for name in wanted if not _SMALLEST_AMAX <= scales[name] < math.inf]
            if bad:
                values = ", ".join(f"{name} ({scales[name]:g})" for name in bad[:3])
                raise UsageError(f"amax without use in the calibration: {values}", _AGAIN)
        bad = [name for name, value in self.activations.items() if not math.isfinite(value)]
        if bad:
            raise UsageError(f"activations not finite in the calibration: {_some(bad)}", _AGAIN)


def _same_names(wanted: list[str], scales: Mapping[str, float]) -> None:
    without = [name for name in wanted if name not in scales]
    if without:
        raise UsageError(
            f"the calibration has no scale for {_some(without)}",
            "calibrate with the policy of this build: sd35-trt calibrate --policy P",
        )
    surplus = sorted(set(scales) - set(wanted))
    if surplus:
        raise UsageError(
            f"the calibration has a scale for {_some(surplus)}, which the policy does not quantize",
            "calibrate with the policy of this build: sd35-trt calibrate --policy P",
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _read_description(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UsageError(
            f"{path.parent} is not a calibration (no {path.name})",
            "make one with: sd35-trt calibrate --out DIR",
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read: {error}", _AGAIN) from error
    if not isinstance(data, dict) or not isinstance(data.get("format"), int):
        raise UsageError(f"{path} does not describe a calibration", _AGAIN)
    if data["format"] != FORMAT:
        newer = data["format"] > FORMAT
        raise UsageError(
            f"{path} has format {data['format']}, this version reads {FORMAT}",
            "upgrade sd35-trt" if newer else _AGAIN,
        )
    return data
