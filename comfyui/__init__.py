"""ComfyUI nodes that draw with bundles of sd35-trt.

ComfyUI calls :func:`comfy_entrypoint` when it finds this folder in ``custom_nodes``.
"""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .adapter import ApplyAdapter
from .autoencoder import Decode, Encode
from .control import ApplyControl
from .load import LoadBundle
from .picture import DrawPicture
from .prompt import WritePrompt
from .sample import Sample
from .skip_layers import SkipLayers


class Sd35TrtExtension(ComfyExtension):
    """The nodes of this folder."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            LoadBundle,
            WritePrompt,
            Sample,
            Decode,
            Encode,
            ApplyAdapter,
            ApplyControl,
            SkipLayers,
            DrawPicture,
        ]


async def comfy_entrypoint() -> ComfyExtension:
    return Sd35TrtExtension()
