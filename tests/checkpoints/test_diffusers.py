"""What is wrong with a checkpoint is said in one line, before any work, and nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file

from sd35_trt.build import BuildOptions, build
from sd35_trt.errors import Sd35Error
from sd35_trt.mini import checkpoint_path

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A copy of mini to damage."""
    return Path(shutil.copytree(checkpoint_path(), tmp_path / "model"))


@pytest.fixture
def refused(tmp_path: Path, stage_cache: Path) -> Callable[..., None]:
    """Asserts that a build is refused in one line with these words and leaves nothing."""

    def check(model: Path | str, *words: str, **options: object) -> None:
        folder = tmp_path / "work"
        folder.mkdir(exist_ok=True)
        out = folder / "bundle"
        with pytest.raises(Sd35Error) as caught:
            build(BuildOptions(model=str(model), out=out, cache_dir=stage_cache, **options))  # type: ignore[arg-type]
        message = str(caught.value)
        for line in message.splitlines():
            assert " — " in line, "every refusal names what to do"
        for word in words:
            assert word in message, message
        assert not list(folder.iterdir())

    return check


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def test_not_a_model_directory(tmp_path: Path, refused: Callable[..., None]) -> None:
    refused(tmp_path / "nothing", "is missing")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is an empty folder")
    (tmp_path / "empty" / "README.md").write_text("a model")
    refused(tmp_path / "empty", "no model_index.json")


def test_another_pipeline(checkpoint: Path, refused: Callable[..., None]) -> None:
    index = checkpoint / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    refused(checkpoint, "a StableDiffusionXLPipeline", "not Stable Diffusion 3.5")
    index.write_text("{")
    refused(checkpoint, "model_index.json cannot be read")


@pytest.mark.parametrize(
    "file",
    ["transformer/config.json", TRANSFORMER, "vae/diffusion_pytorch_model.safetensors",
     "text_encoder/model.safetensors", "scheduler/scheduler_config.json"],
)  # fmt: skip
def test_missing_file(file: str, checkpoint: Path, refused: Callable[..., None]) -> None:
    (checkpoint / file).unlink()
    refused(checkpoint, file.split("/")[0])


@pytest.mark.parametrize("folder", ["tokenizer", "tokenizer_3", "vae", "text_encoder_2"])
def test_missing_folder(folder: str, checkpoint: Path, refused: Callable[..., None]) -> None:
    shutil.rmtree(checkpoint / folder)
    refused(checkpoint, f"{folder}")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 5000, 0.3, 0.999, -1])
def test_truncated_weights(keep: float, checkpoint: Path, refused: Callable[..., None]) -> None:
    path = checkpoint / TRANSFORMER
    data = path.read_bytes()
    length = keep if isinstance(keep, int) else int(len(data) * keep)
    path.write_bytes(data[:length])
    refused(checkpoint, str(path), "truncated or damaged" if length else "an empty file")


def test_missing_shard(checkpoint: Path, refused: Callable[..., None]) -> None:
    whole = checkpoint / TRANSFORMER
    save_torch_state_dict(  # in place of the one file
        load_file(whole), whole.parent, max_shard_size="5MB",
        filename_pattern="diffusion_pytorch_model{suffix}.safetensors",
    )  # fmt: skip
    shards = sorted(whole.parent.glob("*-of-*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    refused(checkpoint, f"{shards[1]} is missing")


def test_a_tensor_of_the_wrong_shape(checkpoint: Path, refused: Callable[..., None]) -> None:
    name = "transformer_blocks.2.attn.to_k.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name][:-1].contiguous()

    change_weights(checkpoint / TRANSFORMER, change)
    refused(checkpoint, name, "[191, 192]", "[192, 192]")


def test_a_missing_tensor(checkpoint: Path, refused: Callable[..., None]) -> None:
    name = "transformer_blocks.2.attn.to_k.weight"
    change_weights(checkpoint / TRANSFORMER, lambda tensors: tensors.pop(name))
    refused(checkpoint, f"no tensor '{name}'")


def test_a_tensor_with_nan(checkpoint: Path, refused: Callable[..., None]) -> None:
    name = "transformer_blocks.1.ff.net.2.weight"
    change_weights(
        checkpoint / TRANSFORMER, lambda tensors: tensors[name].view(-1)[7:8].fill_(torch.nan)
    )
    refused(checkpoint, name, "NaN")


def test_a_tensor_beyond_fp16(
    checkpoint: Path, refused: Callable[..., None], mini_bundle: Path, tmp_path: Path
) -> None:
    """What comes before it is in FP32, as in ``mini_bundle``, and not built anew."""
    policy = tmp_path / "conditioner.toml"
    policy.write_text(
        'name = "conditioner in half"\n'
        '[[rule]]\ncomponent = "*"\nmatch = "*"\nprecision = "fp32"\nreason = ""\n'
        '[[rule]]\ncomponent = "conditioner"\nmatch = "*"\nprecision = "half"\nreason = ""\n'
    )
    name = "time_text_embed.timestep_embedder.linear_1.weight"

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name].float()
        tensors[name].view(-1)[7] = 1e5

    change_weights(checkpoint / TRANSFORMER, change)
    refused(checkpoint, name, "exceeds FP16", "fp32", policy=str(policy))


def test_a_config_that_does_not_fit(checkpoint: Path, refused: Callable[..., None]) -> None:
    path = checkpoint / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "joint_attention_dim": 128}))
    refused(checkpoint, "T5 put out 256 channels", "takes 128")
    path.write_text(json.dumps({**config, "patch_size": 4}))
    refused(checkpoint, "has shape", "the configuration asks for")
    path.write_text(json.dumps({k: v for k, v in config.items() if k != "pos_embed_max_size"}))
    refused(checkpoint, "transformer", "pos_embed")


def test_a_scheduler_option_that_is_not_computed(
    checkpoint: Path, refused: Callable[..., None]
) -> None:
    path = checkpoint / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_karras_sigmas": True}))
    refused(checkpoint, "use_karras_sigmas")


def test_a_damaged_tokenizer(checkpoint: Path, refused: Callable[..., None]) -> None:
    for path in (checkpoint / "tokenizer_3").iterdir():
        path.write_text("{]")
    refused(checkpoint, "tokenizer_3", "cannot be read")


def test_a_hub_id_without_a_hub(
    refused: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    refused("nobody/no-such-model", "cannot be fetched from the hub")


def test_unknown_things(refused: Callable[..., None]) -> None:
    refused("mini", "unknown GPU 'voodoo2'", "cpu, turing, ampere, ada", target="voodoo2")
    refused("mini", "unknown policy 'fp7'", "fp32, fp8", policy="fp7")
    refused("mini", "--size 100:200", "in steps of 64", size=(100, 200))
    refused("mini", "--batch 0:4", batch=(0, 4))
    refused("mini", "multiple of 16", size_step=24)
