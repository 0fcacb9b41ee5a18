"""ControlNets beside a model: read as diffusers saves them, told apart, refused where they do not
fit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from control_nets import write_net
from diffusers import SD3ControlNetModel
from safetensors.torch import load_file, save_file

from mini.training.control import ENCODING
from sd35_trt.checkpoints.controlnets import part_source
from sd35_trt.checkpoints.identity import folder_files
from sd35_trt.checkpoints.look import look, look_at_structure
from sd35_trt.checkpoints.model_options import ControlNet, ModelOptions
from sd35_trt.errors import CheckpointError, UsageError
from sd35_trt.mini import checkpoint_path, controlnet_paths


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As Medium's, and as Large's."""
    folder, root = tmp_path_factory.mktemp("nets"), checkpoint_path()
    return {
        "joint": write_net(folder / "joint", root, True),
        "single": write_net(folder / "single", root, False),
    }


def options(*nets: ControlNet, **fields: Any) -> ModelOptions:
    return ModelOptions(controlnets=nets, **fields)


def test_components_and_files(nets: dict[str, Path]) -> None:
    given = ControlNet("canny", str(nets["joint"])), ControlNet("two", str(nets["single"]))
    model = look(options(*given))
    assert model.components[-4:] == [
        "control_canny_conditioner", "control_canny", "control_two_conditioner", "control_two",
    ]  # fmt: skip
    assert set(folder_files(model.checkpoint, ["control_canny"])) == {
        "control_canny/config.json", "control_canny/diffusion_pytorch_model.safetensors",
    }  # fmt: skip
    assert "control_canny" not in look(ModelOptions()).components


@pytest.mark.parametrize("kind", ["joint", "single"])
def test_tensors_are_those_of_diffusers(kind: str, nets: dict[str, Path]) -> None:
    model = look(options(ControlNet("own", str(nets[kind]))))
    config, weights = part_source(model.checkpoint, "control_own")
    assert weights is not None
    own = SD3ControlNetModel.from_pretrained(nets[kind])
    for name, tensor in own.state_dict().items():
        assert torch.equal(weights.read(name), tensor), name
    # A net without an embedding of patches has the transformer's.
    transformer = model.checkpoint.weights("transformer")
    name = "pos_embed.proj.weight"
    assert torch.equal(weights.read(name), transformer.read(name)) is (kind == "single")
    assert config["pos_embed_max_size"] == 24


@pytest.mark.parametrize(
    ("name", "kind", "net", "expected"),
    [
        ("canny", None, "joint", ("canny", 1 / 127.5, -1.0, 0.0)),
        ("canny", None, "single", ("canny", 0.5, 0.5, 1.0)),
        ("edges", "canny", "single", ("canny", 0.5, 0.5, 1.0)),
        ("my_blur", None, "single", ("blur", 1 / 127.5, -1.0, 1.0)),
        ("canny", "depth", "single", ("depth", 1 / 127.5, -1.0, 1.0)),
        ("one", None, "joint", ("other", 1 / 127.5, -1.0, 0.0)),
    ],
)
def test_kinds(
    name: str, kind: str | None, net: str, expected: tuple[Any, ...], nets: dict[str, Path]
) -> None:
    (found,) = look(options(ControlNet(name, str(nets[net]), kind))).nets
    assert (found.kind, *found.encoding) == expected


def test_the_folder_tells_the_kind(nets: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(nets["single"], tmp_path / "sd3.5-large-controlnet-depth")
    (found,) = look(options(ControlNet("one", str(folder)))).nets
    assert found.kind == "depth"


def test_the_net_of_mini() -> None:
    (found,) = look(options(ControlNet("own", "mini:canny"))).nets
    assert found.place == controlnet_paths()["canny"]
    assert (found.kind, found.encoding) == ("canny", ENCODING)
    with pytest.raises(CheckpointError, match="no ControlNet 'depth' — there is mini:canny"):
        look(options(ControlNet("own", "mini:depth")))


def test_a_file_beside_its_configuration(nets: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(nets["joint"], tmp_path / "net"))
    file = (folder / "diffusion_pytorch_model.safetensors").rename(folder / "own.safetensors")
    model = look(options(ControlNet("own", str(file))))
    assert list(folder_files(model.checkpoint, ["control_own"]).values())[1] == file


# Diffusers' names of a block's layers, and Stability's.
ORIGINAL = {
    "attn.to_out.0": "attn.proj", "ff.net.0.proj": "mlp.fc1", "ff.net.2": "mlp.fc2",
    "norm1.linear": "adaLN_modulation.1",
}  # fmt: skip


def original(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As Stability spells them, queries, keys and values in one tensor."""
    spelled = {}
    for name, tensor in tensors.items():
        for ours, theirs in ORIGINAL.items():
            name = name.replace(f".{ours}.", f".{theirs}.")
        if ".attn.to_q." in name:
            rows = [tensors[name.replace("to_q", f"to_{letter}")] for letter in "qkv"]
            spelled[name.replace("to_q", "qkv")] = torch.cat(rows)
        elif ".attn.to_k." not in name and ".attn.to_v." not in name:
            spelled[name] = tensor
    return spelled


def test_a_file_of_stability(nets: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "sd3.5_large_controlnet_canny.safetensors"
    save_file(original(load_file(nets["single"] / "diffusion_pytorch_model.safetensors")), file)
    models = [look(options(ControlNet("own", str(path)))) for path in (file, nets["single"])]
    assert [model.nets[0].kind for model in models] == ["canny", "other"]
    (config, weights), (_, others) = (
        part_source(model.checkpoint, "control_own") for model in models
    )
    assert weights is not None
    assert others is not None
    names = SD3ControlNetModel(**{**config, "sample_size": 2}).state_dict()
    for name in names:
        assert torch.equal(weights.read(name), others.read(name)), name
    assert list(folder_files(models[0].checkpoint, ["control_own"])) == [
        "control_own/sd3.5_large_controlnet_canny.safetensors"
    ]


def changed(nets: dict[str, Path], to: Path, **values: Any) -> Path:
    folder = Path(shutil.copytree(nets["joint"], to))
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return folder


def without(nets: dict[str, Path], to: Path, tensor: str) -> Path:
    folder = Path(shutil.copytree(nets["joint"], to))
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors[tensor]
    save_file(tensors, path)
    return folder


def lonely(nets: dict[str, Path], to: Path) -> Path:
    to.mkdir()
    (name,) = (path.name for path in nets["joint"].glob("*.safetensors"))
    return Path(shutil.copy(nets["joint"] / name, to / name))


REFUSED: dict[str, tuple[Callable[[dict[str, Path], Path], Path], str]] = {
    "missing": (lambda nets, to: to, "net is missing"),
    "a file alone": (lambda nets, to: lonely(nets, to), "has no config.json beside it"),
    "the model itself": (lambda nets, to: checkpoint_path(), "in diffusers' layout"),
    "the transformer": (
        lambda nets, to: checkpoint_path() / "transformer",
        "SD3Transformer2DModel, not SD3ControlNetModel",
    ),
    "no tensor": (
        lambda nets, to: without(nets, to, "controlnet_blocks.1.bias"),
        "has no tensor 'controlnet_blocks.1.bias'",
    ),
    "more blocks": (lambda nets, to: changed(nets, to, num_layers=1), "has no use for"),
    "inpainting": (
        lambda nets, to: changed(nets, to, extra_conditioning_channels=1),
        "extra_conditioning_channels = 1",
    ),
    "positions": (lambda nets, to: changed(nets, to, pos_embed_type=None), "pos_embed_type"),
    "an unknown key": (lambda nets, to: changed(nets, to, controls=2), "sets controls = 2"),
    "another width": (
        lambda nets, to: write_net(
            to, checkpoint_path(), False, num_attention_heads=2, attention_head_dim=64
        ),
        "is of another model: channels = 128, the transformer has 192",
    ),
    "another text": (
        lambda nets, to: write_net(to, checkpoint_path(), True, joint_attention_dim=512),
        "joint_attention_dim = 512, the transformer has 256",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, nets: dict[str, Path], tmp_path: Path) -> None:
    make, message = REFUSED[case]
    path = make(nets, tmp_path / "net")
    with pytest.raises(CheckpointError) as caught:
        look(options(ControlNet("own", str(path))))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["Canny", "", "a-b", "my_conditioner", "conditioner", "a" * 41])
def test_names(name: str, nets: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="is no name of a ControlNet"):
        look(options(ControlNet(name, str(nets["joint"]))))


def test_a_name_twice(nets: dict[str, Path]) -> None:
    net = ControlNet("own", str(nets["joint"]))
    with pytest.raises(UsageError, match="two are called own"):
        look(options(net, net))


def test_as_many_blocks_in_all(nets: dict[str, Path], tmp_path: Path) -> None:
    other = write_net(tmp_path / "net", checkpoint_path(), True, num_layers=3)
    with pytest.raises(CheckpointError, match=r"has 3 blocks, another .* has 2"):
        look(options(ControlNet("one", str(nets["joint"])), ControlNet("two", str(other))))


def test_a_published_model_is_planned_with_nets(nets: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is of another model: channels = 192"):
        look_at_structure(options(ControlNet("own", str(nets["single"])), model="large"))


def test_words() -> None:
    given = ControlNet("canny", "my nets/canny", "blur"), ControlNet("two", "two")
    words = "--controlnet 'canny=my nets/canny:blur' --controlnet two=two"
    assert options(*given).model_words == f"--model mini {words}"
