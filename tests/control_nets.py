"""Random ControlNets for a model's transformer, as diffusers saves them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3ControlNetModel

from sd35_trt.checkpoints.model_options import ControlNet
from sd35_trt.mini import checkpoint_path

# Of the layers that a training begins with at zero, so that a net matters.
_OUTPUTS = 0.05


def random_net(checkpoint: Path, joint: bool, seed: int = 0, **settings: Any) -> SD3ControlNetModel:
    """A net of a model's width.

    Args:
        checkpoint: the model.
        joint: whether it is as Medium's nets, with a text stream and an embedding of patches; else
            as Large's.
        settings: of its configuration.
    """
    own = json.loads((checkpoint / "transformer" / "config.json").read_text("utf-8"))
    config = {key: value for key, value in own.items() if not key.startswith("_")}
    if joint:
        config["num_layers"] = 2
    else:
        config |= {"num_layers": 2, "joint_attention_dim": None, "caption_projection_dim": None,
                   "pos_embed_max_size": None, "pos_embed_type": None, "qk_norm": None,
                   "use_pos_embed": False, "dual_attention_layers": (),
                   "force_zeros_for_pooled_projection": False}  # fmt: skip
    torch.manual_seed(seed)
    net = SD3ControlNetModel(**{**config, **settings})
    for name, parameter in net.named_parameters():
        if name.startswith(("controlnet_blocks.", "pos_embed_input.")) or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=_OUTPUTS)
    return net.eval()


#: Nets for mini: name → whether it is as Medium's, and its seed.
MINI_NETS = {"canny": (True, 1), "depth": (True, 2), "edges": (False, 3)}


def write_net(folder: Path, checkpoint: Path, joint: bool, seed: int = 0, **settings: Any) -> Path:
    """The folder of :func:`random_net`."""
    random_net(checkpoint, joint, seed, **settings).save_pretrained(folder)
    return folder


def write_mini_nets(folder: Path, names: Iterable[str] = tuple(MINI_NETS)) -> dict[str, Path]:
    """Nets for mini by name: as Medium's, two of them, and as Large's, of edges."""
    root = checkpoint_path()
    files = {"edges": "large-canny"}
    return {
        name: write_net(folder / files.get(name, name), root, *MINI_NETS[name]) for name in names
    }


def net_options(nets: Mapping[str, Path]) -> dict[str, Any]:
    """Nets by name, as ``BuildOptions`` takes them."""
    return {"controlnets": tuple(ControlNet(name, str(path)) for name, path in nets.items())}


def every_feature(folder: Path) -> dict[str, Any]:
    """Options of ``make_bundle`` for mini with all features, and the nets ``canny`` and ``depth``,
    which are written to a folder.
    """
    features = {"skip_layer_guidance": True, "inpainting": True, "adapters": 16}
    return {**features, **net_options(write_mini_nets(folder, ("canny", "depth")))}
