"""Parts beside a model in one file are found by names and contents, or named where several are."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from originals import original, save, write_single
from random_checkpoints import Layout, kept_checkpoint

from sd35_trt.checkpoints.beside import find_beside
from sd35_trt.checkpoints.look import look
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.checkpoints.original import LAYOUTS
from sd35_trt.errors import CheckpointError
from sd35_trt.store.cache import StageCache

L, G, T5, VAE = "text_encoder", "text_encoder_2", "text_encoder_3", "vae"
_EMBEDDING = "text_model.embeddings.token_embedding.weight"

# A header is what a search reads of a file.
CONTENTS = {
    L: {_EMBEDDING: (3, 768)},
    G: {_EMBEDDING: (3, 1280)},
    T5: {"encoder.block.0.layer.0.SelfAttention.q.weight": (3, 4096)},
    VAE: {"decoder.conv_in.weight": (3, 16, 3, 3)},
    "lora": {"lora_te1_text_model.lora_down.weight": (3, 3)},
}


def put(folder: Path, **files: str) -> None:
    """Files by path, of these contents."""
    for name, content in files.items():
        tensors = {tensor: torch.zeros(shape) for tensor, shape in CONTENTS[content].items()}
        save(tensors, folder / f"{name}.safetensors")


def found(model: Path, part: str) -> str:
    place = find_beside(model, part)
    return "" if place is None else str(place.relative_to(model.parent.parent).with_suffix(""))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Where a model is to be found; a search does not open it."""
    path = tmp_path / "models" / "checkpoints" / "ft.safetensors"
    path.parent.mkdir(parents=True)
    path.touch()
    return path


@pytest.mark.parametrize(
    ("part", "name"),
    [
        (L, "clip_l"), (L, "CLIP_L"), (L, "ft_clip_l"), (L, "clip-l-ft"), (L, "My.Clip L v2"),
        (L, "longclip_clip_l_fp32"), (L, "clipL"), (L, "encoder"),
        (L, "ViT-L-14-TEXT-detail-improved"),
        (G, "clip_g"), (G, "Clip_G_ft"), (G, "some_big_g"),
        (T5, "t5xxl_fp8_scaled"), (T5, "T5XXL_FP16"), (T5, "t5_xxl_true_bf16"),
        (T5, "t5xxl_fp8_e4m3fn_scaled"), (T5, "google_t5-v1_1-xxl_encoderonly-fp8_e4m3fn"),
        (T5, "flan-t5-xxl"), (T5, "text_encoder"),
        (VAE, "sd3_vae"), (VAE, "SD3.5_VAE"), (VAE, "sd35_large_vae_fp16"), (VAE, "ft.vae"),
        (VAE, "my-sd3-vae-v2"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("case", ["beside", "ComfyUI", "Forge"])
def test_a_near_name(case: str, part: str, name: str, model: Path) -> None:
    vae = part == VAE
    folder = {
        "beside": "checkpoints",
        "ComfyUI": "vae" if vae else "text_encoders",
        "Forge": "VAE" if vae else "text_encoder",
    }[case]
    if name == "ft.vae" and case != "beside":
        name = "sd3_vae"
    save(
        {tensor: torch.zeros(shape) for tensor, shape in CONTENTS[part].items()},
        model.parents[1] / folder / f"{name}.safetensors",
    )
    put(model.parents[1], **{f"{folder}/lora_clip_l_clip_g_t5xxl_sd3_vae": "lora"})
    assert Path(found(model, part)) == Path(folder) / name


@pytest.mark.parametrize(
    "folders",
    [
        ("Stable-Diffusion", "clip", "VAE/OfficialStableDiffusion"),  # SwarmUI
        ("diffusion_models", "clip", "vae"),
        ("StableDiffusion", "TextEncoders", "VAE"),  # StabilityMatrix
        ("Stable-diffusion", "text_encoder", "VAE"),  # Forge
        ("checkpoints/sd3", "text_encoders/sd3", "vae"),  # ComfyUI
        ("unet", "clip", "vae"),
    ],
)
def test_folders_of_user_interfaces(folders: tuple[str, str, str], tmp_path: Path) -> None:
    models, (own, texts, vaes) = tmp_path / "Models", folders
    model = models / own / "some.safetensors"
    put(models, **{f"{own}/some": "lora", f"{texts}/clip_l": L, f"{texts}/clip_g": G})
    put(models, **{f"{texts}/t5xxl_fp16": T5, f"{vaes}/sd35_vae": VAE})
    for part, name in ((L, "clip_l"), (G, "clip_g"), (T5, "t5xxl_fp16")):
        assert find_beside(model, part) == models / texts / f"{name}.safetensors"
    assert find_beside(model, VAE) == models / vaes / "sd35_vae.safetensors"


def test_a_trained_encoder_before_the_base(model: Path) -> None:
    """As kohya's scripts save them; those of other models are not meant."""
    put(model.parent, clip_l=L, t5xxl_fp16=T5, other=VAE, other_clip_l=L)
    put(model.parents[1], **{"text_encoders/clip_g": G})
    assert found(model, L) == "checkpoints/clip_l"
    put(model.parent, ft_clip_l=L, ft_clip_g=G, FT_t5xxl=T5, **{"ft-000010_clip_l": L})
    put(model.parent, **{"ft-000010": "lora"})
    assert found(model, L) == "checkpoints/ft_clip_l"
    assert found(model, G) == "checkpoints/ft_clip_g"
    assert found(model, T5) == "checkpoints/FT_t5xxl"
    late = model.with_name("ft-000010.safetensors")
    assert found(late, L) == "checkpoints/ft-000010_clip_l"


def test_the_most_precise_of_the_published(model: Path) -> None:
    names = ["t5xxl_fp8_e4m3fn", "t5xxl_fp8_e4m3fn_scaled", "t5xxl", "t5xxl_bf16", "t5xxl_fp16"]
    for name in names:
        put(model.parents[1], **{f"clip/{name}": T5})
        assert found(model, T5) == f"clip/{name}"


def test_nearer_before_farther(model: Path) -> None:
    put(model.parents[1], **{"text_encoders/clip_l": L})
    put(model.parent, my_clip_l=L)
    assert found(model, L) == "checkpoints/my_clip_l"


@pytest.mark.parametrize(
    ("part", "names", "option"),
    [
        (L, ("clip_l", "ft2_clip_l"), "--clip-l"),
        (L, ("a_clip_l", "b_clip_l"), "--clip-l"),
        (L, ("encoder", "other"), "--clip-l"),
        (G, ("clip_g", "clip_g_v2"), "--clip-g"),
        (T5, ("t5xxl_fp16", "flan_t5xxl"), "--t5"),
        (VAE, ("my_sd3_vae", "sd3_vae"), "--vae"),
    ],
)
def test_several(part: str, names: tuple[str, ...], option: str, model: Path) -> None:
    put(model.parent, **dict.fromkeys(names, part))
    with pytest.raises(CheckpointError) as caught:
        find_beside(model, part)
    message = str(caught.value)
    assert f"2 files could be its {LAYOUTS[part].title}" in message
    assert f"{option} FILE" in message
    for name in names:
        assert f"{name}.safetensors" in message
    (model.parent / f"{names[0]}.safetensors").unlink()
    assert found(model, part) == f"checkpoints/{names[1]}"


def test_a_link_to_the_same_file(model: Path) -> None:
    put(model.parents[1], **{"clip/a_clip_l": L})
    (model.parents[1] / "clip" / "b_clip_l.safetensors").symlink_to("a_clip_l.safetensors")
    assert found(model, L) == "clip/a_clip_l"


@pytest.mark.parametrize("name", ["ae", "vae-ft-mse-840000-ema-pruned", "flux_vae", "sdxl_vae"])
def test_autoencoders_of_others(name: str, model: Path) -> None:
    """FLUX's has the shapes of SD3.5's: only a name tells."""
    put(model.parents[1], **{f"vae/{name}": VAE})
    with pytest.raises(CheckpointError, match=r"no sd3_vae\.safetensors .* --vae FILE"):
        find_beside(model, VAE)


@pytest.mark.parametrize("name", ["umt5_xxl_fp8_e4m3fn_scaled", "t5_base", "lora_t5xxl"])
def test_no_t5(name: str, model: Path) -> None:
    put(model.parents[1], **{f"clip/{name}": "lora"})
    assert find_beside(model, T5) is None


def test_contents_decide(model: Path) -> None:
    """The CLIPs have the same names; their widths tell them."""
    put(model.parent, my_clip_l=G, your_clip_l=L)
    assert found(model, L) == "checkpoints/your_clip_l"
    (model.parent / "your_clip_l.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no CLIP-L"):
        find_beside(model, L)
    put(model.parent, clip_l=G)
    source = model.parent / "clip_l.safetensors"
    assert find_beside(model, L) == source
    from sd35_trt.checkpoints.part_files import open_own_file

    with pytest.raises(CheckpointError, match="is a file of CLIP-G, not the model's CLIP-L"):
        open_own_file(source, L)


def test_a_folder_that_cannot_be_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders above are none of ours: a search goes on without them."""
    put(model.parents[1], **{"clip/clip_l": L})
    listed = Path.iterdir

    def iterdir(folder: Path) -> object:
        if folder == model.parents[2]:
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(folder)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert found(model, L) == "clip/clip_l"
    assert find_beside(model, T5) is None


@pytest.fixture(scope="module")
def source(stage_cache: Path) -> Path:
    """A random checkpoint; what shapes do not show is as published."""
    return kept_checkpoint(StageCache(stage_cache), "large", Layout(published=True))


def test_a_look_takes_them(source: Path, tmp_path: Path) -> None:
    file = write_single(source, tmp_path / "unet" / "ft.safetensors", ["transformer"])
    trained = original(source, L)
    save(trained, file.parent / "ft_clip_l.safetensors")
    shutil.rmtree(file.parent / "clip")
    save(original(source, T5), tmp_path / "text_encoders" / "T5XXL_fp8_scaled.safetensors")
    checkpoint = look(ModelOptions(str(file))).checkpoint
    assert checkpoint.files(L) == [file.parent / "ft_clip_l.safetensors"]
    assert checkpoint.files(T5) == [tmp_path / "text_encoders" / "T5XXL_fp8_scaled.safetensors"]
