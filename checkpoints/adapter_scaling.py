"""What the product of an adapter's matrices is multiplied by: its alpha, by its rank.

PEFT keeps both in ``adapter_config.json``, diffusers the same in the file's header; kohya's and
ComfyUI's files have a tensor ``alpha`` beside each layer's. Without any of these, it is 1.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from sd35_trt.errors import CheckpointError
from sd35_trt.formats.reading import read_document

from .adapter_names import PEFT

#: PEFT's file of settings, beside the tensors.
CONFIG = "adapter_config.json"

# diffusers' entry of a header.
_METADATA = "lora_adapter_metadata"

_LARGEST = 16 << 20

_KINDS = ("LORA", "LOHA", "LOKR")

# Ways to begin that leave the model's weights as they are.
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "lycoris")

# Settings under which PEFT computes something else; each is off where it is null or empty.
_OTHERS = (
    "layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config",
    "kasa_config", "monteclora_config", "target_parameters",
)  # fmt: skip

_MERGE = "merge it into the model with PEFT: merge_and_unload(), save_pretrained(DIR)"
_SAVE = (
    "save it as a plain LoRA: save_pretrained(DIR, path_initial_model_for_weight_conversion=START)"
)


class _Config(msgspec.Struct):
    """PEFT's settings of an adapter, as far as they say what it computes."""

    peft_type: str = "LORA"
    r: int | None = None
    lora_alpha: float | None = None
    alpha: float | None = None
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    use_rslora: bool | None = False
    init_lora_weights: bool | str | None = True

    def scaling(self, module: str, rank: int | None) -> float:
        """Of a layer.

        Args:
            module: its name without prefix.
            rank: of its matrices; None takes the settings'.
        """
        alpha = _by_pattern(self.alpha_pattern, module)
        if alpha is None:
            alpha = self.lora_alpha if self.alpha is None else self.alpha
        rank = rank or _by_pattern(self.rank_pattern, module) or self.r
        if alpha is None or not rank or rank < 1:
            return 1.0
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def _by_pattern(patterns: Mapping[str, Any] | None, module: str) -> Any:
    # As ``peft.utils.other.get_pattern_key``.
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return None


class Scaling:
    """The scaling of the layers of a file, besides their ``alpha``.

    Args:
        path: the file.
        metadata: of its header.
        peft: whether its names are those that PEFT saves.

    Raises:
        CheckpointError: settings that are missing or damaged, or ask for another computation.
    """

    def __init__(self, path: Path, metadata: Mapping[str, str], peft: bool) -> None:
        self._configs: dict[str, _Config] = {}
        beside = path.parent / CONFIG
        if peft:
            if not beside.is_file():
                raise CheckpointError(
                    f"{path} is an adapter of PEFT without its {CONFIG}, which has its alpha",
                    f"put {CONFIG} beside it",
                )
            fix = "save the adapter again"
            document = read_document(beside, dict[str, Any], _LARGEST, CheckpointError, fix)
            self._configs[PEFT] = _read(beside, document)
        elif _METADATA in metadata:
            for prefix, settings in _sections(path, metadata[_METADATA]).items():
                self._configs[prefix] = _read(path, settings)

    def of(self, key: str, rank: int | None, alpha: float | None) -> float:
        """The scaling of a layer.

        Args:
            key: its name in the file.
            rank: of its matrices; None for a Kronecker product of whole ones.
            alpha: that stands beside them, None for none.
        """
        for prefix, config in self._configs.items():
            if key.startswith(prefix):
                return config.scaling(key.removeprefix(prefix), rank)
        return 1.0 if alpha is None or rank is None else alpha / rank


def _sections(path: Path, text: str) -> dict[str, dict[str, Any]]:
    """Settings by the prefix of the part's names, ``transformer.`` or none."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: its {_METADATA} cannot be read: {error}", "save the LoRA again"
        ) from error
    sections: dict[str, dict[str, Any]] = {}
    for name, value in data.items() if isinstance(data, dict) else ():
        prefix, dot, setting = name.rpartition(".")
        sections.setdefault(prefix + dot, {})[setting] = value
    return sections


def _read(path: Path, settings: Mapping[str, Any]) -> _Config:
    try:
        config = msgspec.convert(settings, _Config, strict=False)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"{path}: {error}", "save the adapter again") from error
    patterns = (*(config.rank_pattern or ()), *(config.alpha_pattern or ()))
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise CheckpointError(
                f"{path}: the pattern {pattern!r} is none: {error}", "save the adapter again"
            ) from error
    if config.peft_type not in _KINDS:
        raise CheckpointError(f"{path} is an adapter of the type {config.peft_type}", _MERGE)
    if config.init_lora_weights not in _PLAIN_STARTS:
        raise CheckpointError(
            f"{path}: init_lora_weights = {config.init_lora_weights!r} changed the model's own "
            "weights",
            _SAVE,
        )
    for name in _OTHERS:
        if settings.get(name):
            raise CheckpointError(f"{path} sets {name}, which is not computed here", _MERGE)
    return config
