"""The published models' structures, known without a checkpoint."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sd35_trt.components import CONTROLNET, OPTIONAL_PARTS, part_kind
from sd35_trt.errors import CheckpointError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from .diffusers import Part

_DATA = Path(__file__).parent / "structures.toml"

#: Variant → whose transformer it has.
_TRANSFORMERS = {"large": "large", "large-turbo": "large", "medium": "medium"}

#: Models that can be planned without a checkpoint.
PUBLISHED = tuple(_TRANSFORMERS)


@functools.cache
def _data() -> dict[str, Any]:
    return tomllib.loads(_DATA.read_text("utf-8"))


def published_config(part: str, transformer: str = "large") -> dict[str, Any]:
    """A part's configuration in the published models, as in its ``config.json``.

    Args:
        transformer: whose, where the part is the transformer: ``large`` or ``medium``.
    """
    data = _data()[part]
    return dict(data[transformer] if part == "transformer" else data)


class Structure:
    """Stands in for a :class:`~sd35_trt.checkpoints.diffusers.Checkpoint` that has no weights.

    Args:
        name: one of :data:`PUBLISHED`.
        without_t5: as of a checkpoint without T5.
        given: ControlNets beside it.
    """

    def __init__(
        self, name: str, without_t5: bool = False, given: Mapping[str, Part] | None = None
    ) -> None:
        self.given = dict(given or {})
        self._without_t5 = without_t5
        self.root = Path(name)
        self.hint = name
        self._transformer = _TRANSFORMERS[name]

    def has(self, part: str) -> bool:
        """Published models come with every part; ControlNets are given."""
        if part_kind(part) == CONTROLNET:
            return part in self.given
        if self._without_t5 and part in OPTIONAL_PARTS:
            return False
        return part == "transformer" or part in _data()

    def config(self, part: str) -> dict[str, Any]:
        """The part's configuration, as in its ``config.json``.

        Raises:
            CheckpointError: no such part.
        """
        if not self.has(part):
            raise CheckpointError(f"{self.root} has no {part}", "give a model directory")
        if part in self.given:
            return dict(self.given[part].config)
        return published_config(part, self._transformer)

    def weights(self, part: str) -> None:
        """There are none."""
