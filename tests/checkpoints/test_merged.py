"""LoRAs merged into a model: as PEFT merges them, in every spelling, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import (
    Layers,
    LowRank,
    comfy_names,
    diffusers_names,
    kohya_names,
    peft_adapter,
    random_layers,
    randomize,
    scale,
    write,
)
from against_diffusers import check, load_diffusers
from conftest import one_error_line
from diffusers import SD3Transformer2DModel
from gguf_files import write_gguf
from originals import Tensors, original, original_transformer, part_tensors, write_single
from random_checkpoints import Layout, kept_checkpoint

from sd35_trt.build import BuildOptions, build
from sd35_trt.checkpoints.identity import difference, file_hashes
from sd35_trt.checkpoints.look import Model, look
from sd35_trt.checkpoints.merged import AnyCheckpoint
from sd35_trt.checkpoints.model_options import Lora, ModelOptions
from sd35_trt.errors import CheckpointError, UsageError
from sd35_trt.formats.bundle import Bundle
from sd35_trt.mini import calibration_path, checkpoint_path
from sd35_trt.runtime import Pipeline
from sd35_trt.store.cache import StageCache

# As near as two orders of summation in FP32 come.
NEAR = 2e-6

CLIPS = ("text_encoder", "text_encoder_2")
IMAGE = "transformer_blocks.0.attn.to_q"
CLIP = "text_model.encoder.layers.0.self_attn.q_proj"


def merged(model: Path | str, *loras: Path | Lora) -> Model[AnyCheckpoint]:
    given = tuple(lora if isinstance(lora, Lora) else Lora(lora) for lora in loras)
    return look(ModelOptions(str(model), loras=given))


def read(checkpoint: AnyCheckpoint, part: str, names: Any) -> Tensors:
    weights = checkpoint.weights(part)
    return {name: weights.read(name) for name in names}


def assert_near(actual: Tensors, expected: Tensors, base: Tensors) -> int:
    """Tensors that differ from the base are near what is expected, others bit for bit the base's.

    Returns:
        How many differ.
    """
    changed = 0
    for name, value in expected.items():
        if torch.equal(value, base[name]):
            assert torch.equal(actual[name], base[name]), name
            continue
        error = (actual[name].double() - value.double()).norm() / value.double().norm()
        assert error <= NEAR, (name, float(error))
        assert (value - base[name]).norm() > 1e-3 * base[name].norm(), name
        changed += 1
    return changed


# As PEFT merges.

LINEARS = ["to_q", "add_k_proj", "to_out.0", "net.0.proj", "norm1.linear", "proj_out"]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LORA", {"r": 4, "lora_alpha": 6}),
    "rank-stabilized": ("LORA", {"r": 4, "lora_alpha": 6, "use_rslora": True}),
    "patterns": ("LORA", {
        "r": 4, "lora_alpha": 6, "rank_pattern": {"to_q": 2},
        "alpha_pattern": {r"transformer_blocks\.0\.attn\.to_q": 1, "proj_out": 11},
    }),
    "bias": ("LORA", {"r": 4, "lora_alpha": 6, "lora_bias": True}),
    "DoRA": ("LORA", {"r": 4, "lora_alpha": 6, "use_dora": True}),
    "LoHa": ("LOHA", {"r": 4, "alpha": 6}),
    "LoKr": ("LOKR", {"r": 4, "alpha": 6}),
    "LoKr, both parts": ("LOKR", {"r": 2, "alpha": 3, "decompose_both": True}),
    "LoKr, whole": ("LOKR", {"r": 999, "alpha": 500}),
}  # fmt: skip
CONVOLUTION = {"LoRA", "DoRA", "LoHa", "LoKr"}


@pytest.fixture(scope="module")
def transformers(large_checkpoint: Path, medium_checkpoint: Path) -> dict[str, Any]:
    """The transformers of random checkpoints in FP32; copy them."""
    return {
        root: SD3Transformer2DModel.from_pretrained(root, subfolder="transformer")
        for root in (large_checkpoint, medium_checkpoint)
    }


# PEFT takes biases for matrices of which a part is missing.
@pytest.mark.filterwarnings("ignore:Adapter 'default'")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("structure", ["large_checkpoint", "medium_checkpoint"])
def test_as_peft_merges(
    kind: str, structure: str, transformers: Any, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """In a folder that PEFT saved; the user's scale multiplies the file's own."""
    root = request.getfixturevalue(structure)
    base = part_tensors(root, "transformer")
    name, settings = KINDS[kind]
    targets = [*LINEARS, *(["pos_embed.proj"] if kind in CONVOLUTION else [])]
    model = copy.deepcopy(transformers[root])
    peer = peft_adapter(model, name, target_modules=targets, **settings)
    peer.save_pretrained(str(tmp_path))
    scale(peer, 0.7)
    expected = peer.merge_and_unload().state_dict()
    actual = read(merged(root, Lora(tmp_path, 0.7)).checkpoint, "transformer", base)
    assert assert_near(actual, {n: expected[n] for n in base}, base) > 10


def test_several_as_peft_merges_them(
    transformers: Any, large_checkpoint: Path, tmp_path: Path
) -> None:
    """A DoRA gives rows their lengths as if it were alone."""
    base = part_tensors(large_checkpoint, "transformer")
    model = copy.deepcopy(transformers[large_checkpoint])
    first = {"target_modules": LINEARS, "r": 4, "use_dora": True}
    peer = peft_adapter(model, "LORA", **first)
    second = copy.deepcopy(peer.peft_config["default"])
    second.r, second.use_dora, second.target_modules = 2, False, {"to_q", "to_k"}
    peer.add_adapter("second", second)
    randomize(peer, 5, "second")
    peer.save_pretrained(str(tmp_path))
    expected = peer.merge_and_unload(adapter_names=["default", "second"]).state_dict()
    checkpoint = merged(large_checkpoint, tmp_path, tmp_path / "second").checkpoint
    actual = read(checkpoint, "transformer", base)
    assert assert_near(actual, {n: expected[n] for n in base}, base) > 10


# Spellings.

# Layers by their names in the original, and how many of diffusers' each is.
ORIGINAL = {
    "joint_blocks.0.x_block.attn.qkv": 3,
    "joint_blocks.1.context_block.attn.qkv": 3,
    "joint_blocks.0.x_block.attn.proj": 1,
    "joint_blocks.0.context_block.mlp.fc1": 1,
    "joint_blocks.0.x_block.adaLN_modulation.1": 1,
    "joint_blocks.2.context_block.adaLN_modulation.1": 1,
    "final_layer.adaLN_modulation.1": 1,
    "final_layer.linear": 1,
    "context_embedder": 1,
    "x_embedder.proj": 1,
    "t_embedder.mlp.0": 1,
    "y_embedder.mlp.2": 1,
}


@pytest.mark.parametrize("spell", [kohya_names, comfy_names], ids=["kohya", "ComfyUI"])
def test_original_names(
    spell: Callable[[str, Layers], Tensors], large_checkpoint: Path, tmp_path: Path
) -> None:
    """Fused projections, and modulations whose halves are the other way round, among them."""
    base = part_tensors(large_checkpoint, "transformer")
    theirs = original_transformer(base)
    layers = random_layers(theirs, ORIGINAL)
    file = write(tmp_path / "style.safetensors", spell("transformer", layers))
    model = merged(large_checkpoint, file)
    assert model.loras[0].parts == {"transformer": sum(ORIGINAL.values())}
    actual = original_transformer(read(model.checkpoint, "transformer", base))
    expected = dict(theirs)
    for name, layer in layers.items():
        expected[f"{name}.weight"] = theirs[f"{name}.weight"] + layer.delta()
    assert assert_near(actual, expected, theirs) == len(ORIGINAL)


SECOND = "joint_blocks.0.x_block.attn2.qkv"


def test_the_second_attention_of_medium(medium_checkpoint: Path, tmp_path: Path) -> None:
    base = part_tensors(medium_checkpoint, "transformer")
    layers = random_layers(original_transformer(base), [SECOND])
    file = write(tmp_path / "style.safetensors", kohya_names("transformer", layers))
    actual = read(merged(medium_checkpoint, file).checkpoint, "transformer", base)
    expected, deltas = dict(base), layers[SECOND].delta().chunk(3)
    for letter, delta in zip("qkv", deltas, strict=True):
        name = f"transformer_blocks.0.attn2.to_{letter}.weight"
        expected[name] = base[name] + delta
    assert assert_near(actual, expected, base) == 3


DIFFUSERS = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.ff.net.2", "proj_out"]
BARE: Callable[[str, Layers], Tensors] = lambda part, layers: {  # noqa: E731
    name.removeprefix("transformer."): t for name, t in diffusers_names(part, layers).items()
}
OWN_NAME: Callable[[str, Layers], Tensors] = lambda part, layers: {  # noqa: E731
    re.sub(r"(lora_[AB])", r"\1.style", n): t for n, t in diffusers_names(part, layers).items()
}
ONE_TRAINER: Callable[[str, Layers], Tensors] = lambda part, layers: {  # noqa: E731
    name.replace("lora_unet_", "lora_transformer_"): t
    for name, t in kohya_names(part, layers).items()
}


@pytest.mark.parametrize(
    "spell",
    [diffusers_names, comfy_names, kohya_names, BARE, OWN_NAME, ONE_TRAINER],
    ids=["diffusers", "ComfyUI", "kohya", "bare", "adapter's name", "OneTrainer"],
)
@pytest.mark.parametrize("alpha", [2.0, None])
def test_diffusers_names(
    spell: Callable[[str, Layers], Tensors],
    alpha: float | None,
    large_checkpoint: Path,
    tmp_path: Path,
) -> None:
    base = part_tensors(large_checkpoint, "transformer")
    layers = random_layers(base, DIFFUSERS, alpha=alpha)
    file = write(tmp_path / "style.safetensors", spell("transformer", layers))
    actual = read(merged(large_checkpoint, file).checkpoint, "transformer", base)
    expected = dict(base)
    for name, layer in layers.items():
        expected[f"{name}.weight"] = base[f"{name}.weight"] + layer.delta()
    assert assert_near(actual, expected, base) == len(DIFFUSERS)


@pytest.mark.parametrize("spell", [diffusers_names, comfy_names, kohya_names])
@pytest.mark.parametrize(
    ("part", "layer"),
    [
        ("text_encoder", CLIP),
        ("text_encoder_2", "text_model.encoder.layers.1.mlp.fc2"),
        ("text_encoder_3", "encoder.block.1.layer.0.SelfAttention.q"),
    ],
)
def test_text_encoders(
    part: str,
    layer: str,
    spell: Callable[[str, Layers], Tensors],
    large_checkpoint: Path,
    tmp_path: Path,
) -> None:
    base = part_tensors(large_checkpoint, part)
    layers = random_layers(base, [layer])
    file = write(tmp_path / "style.safetensors", spell(part, layers))
    model = merged(large_checkpoint, file)
    assert model.loras[0].parts == {part: 1}
    actual = read(model.checkpoint, part, base)
    name = f"{layer}.weight"
    expected = base | {name: base[name] + layers[layer].delta()}
    assert assert_near(actual, expected, base) == 1


def test_alpha_in_the_header(large_checkpoint: Path, tmp_path: Path) -> None:
    """diffusers keeps PEFT's settings there."""
    base = part_tensors(large_checkpoint, "transformer")
    layers = random_layers(base, [IMAGE], rank=2, alpha=None)
    settings = {"transformer.r": 2, "transformer.lora_alpha": 5, "transformer.use_dora": False}
    file = write(
        tmp_path / "pytorch_lora_weights.safetensors",
        diffusers_names("transformer", layers),
        metadata={"lora_adapter_metadata": json.dumps(settings)},
    )
    actual = read(merged(large_checkpoint, tmp_path).checkpoint, "transformer", base)
    assert file.parent == tmp_path
    name = f"{IMAGE}.weight"
    expected = base | {name: base[name] + 2.5 * layers[IMAGE].delta()}
    assert assert_near(actual, expected, base) == 1


def test_dora_scale(large_checkpoint: Path, tmp_path: Path) -> None:
    """LyCORIS' and kohya's name of the rows' lengths, of a fused projection."""
    base = part_tensors(large_checkpoint, "transformer")
    theirs = original_transformer(base)
    name = "joint_blocks.0.x_block.attn.qkv"
    layers = random_layers(theirs, [name])
    tensors = kohya_names("transformer", layers)
    lengths = torch.rand(theirs[f"{name}.weight"].shape[0], 1) + 0.5
    tensors[f"lora_unet_{name.replace('.', '_')}.dora_scale"] = lengths
    file = write(tmp_path / "style.safetensors", tensors)
    changed = theirs[f"{name}.weight"] + layers[name].delta()
    changed = changed * lengths / changed.norm(dim=1, keepdim=True)
    actual = original_transformer(
        read(merged(large_checkpoint, file).checkpoint, "transformer", base)
    )
    assert_near(actual, theirs | {f"{name}.weight": changed}, theirs)


# Quantized files.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_stored_in_half_precision(
    dtype: torch.dtype, large_checkpoint: Path, tmp_path: Path
) -> None:
    """The sum is made in FP32, whatever the matrices are stored in."""
    base = part_tensors(large_checkpoint, "transformer")
    rounded = {
        name: LowRank(layer.down.to(dtype), layer.up.to(dtype), layer.alpha)
        for name, layer in random_layers(base, [IMAGE]).items()
    }
    file = write(tmp_path / "style.safetensors", diffusers_names("transformer", rounded))
    actual = (
        merged(large_checkpoint, file).checkpoint.weights("transformer").read(f"{IMAGE}.weight")
    )
    expected = base[f"{IMAGE}.weight"] + rounded[IMAGE].delta()
    assert actual.dtype == torch.float32
    assert (actual - expected).norm() <= NEAR * expected.norm()


def test_an_fp8_file(stage_cache: Path, tmp_path: Path) -> None:
    """Changed weights are dequantized; the others keep their bytes; input scales count no more."""
    source = kept_checkpoint(StageCache(stage_cache), "large", Layout(published=True))
    model = write_single(source, tmp_path / "sd3.5_large.safetensors", spelling="scaled_fp8")
    layers = random_layers(part_tensors(source, "transformer"), [IMAGE])
    file = write(tmp_path / "loras" / "s.safetensors", diffusers_names("transformer", layers))
    plain = look(ModelOptions(str(model))).checkpoint.weights("transformer")
    weights = merged(model, file).checkpoint.weights("transformer")
    name, other = f"{IMAGE}.weight", "transformer_blocks.0.attn.to_k.weight"
    expected = plain.read(name).float() + layers[IMAGE].delta()
    assert (weights.read(name) - expected).norm() <= NEAR * expected.norm()
    assert plain.fp8(name) is not None
    assert weights.fp8(name) is None
    kept, stored = weights.fp8(other), plain.fp8(other)
    assert kept is not None
    assert stored is not None
    assert torch.equal(kept[0].float(), stored[0].float())
    assert plain.input_amax(IMAGE) is not None
    assert weights.input_amax(IMAGE) is None


def test_a_gguf_file(stage_cache: Path, tmp_path: Path) -> None:
    source = kept_checkpoint(StageCache(stage_cache), "large", Layout(published=True))
    # Its other parts lie beside it.
    write_single(source, tmp_path / "sd3.5_large.safetensors", ["transformer"]).unlink()
    model = tmp_path / "sd3.5_large.gguf"
    write_gguf(original(source, "transformer"), model)
    layers = random_layers(part_tensors(source, "transformer"), [IMAGE])
    file = write(tmp_path / "loras" / "s.safetensors", diffusers_names("transformer", layers))
    plain = look(ModelOptions(str(model))).checkpoint.weights("transformer")
    actual = merged(model, file).checkpoint.weights("transformer")
    for name in (f"{IMAGE}.weight", f"{IMAGE}.bias"):
        expected = plain.read(name).float()
        if name.endswith("weight"):
            expected = expected + layers[IMAGE].delta()
        assert (actual.read(name) - expected).norm() <= NEAR * expected.norm()


# Identity.


def one_lora(path: Path, seed: int = 0, names: Any = (IMAGE,)) -> Path:
    """A LoRA for mini."""
    base = part_tensors(checkpoint_path(), "transformer")
    layers = random_layers(base, names, seed=seed)
    return write(path, diffusers_names("transformer", layers))


def test_file_scale_and_order_are_part_of_the_identity(tmp_path: Path) -> None:
    cache = StageCache(tmp_path / "cache")
    one = one_lora(tmp_path / "one.safetensors")
    other = one_lora(tmp_path / "other" / "one.safetensors", seed=1)
    plain = look(ModelOptions())
    variants = [
        plain,
        merged("mini", one),
        merged("mini", Lora(one, 0.5)),
        merged("mini", other),
        merged("mini", one, other),
        merged("mini", other, one),
    ]
    hashes = [file_hashes(v.checkpoint, v.parts, cache) for v in variants]
    assert len({json.dumps(h, sort_keys=True) for h in hashes}) == len(variants)
    assert "transformer/lora-1/one.safetensors:0.5" in hashes[2]
    # Parts that it does not touch are the same.
    assert {k: v for k, v in hashes[1].items() if k.startswith("text_")} == {
        k: v for k, v in hashes[0].items() if k.startswith("text_")
    }
    assert difference(variants[1].checkpoint, hashes[1], cache) is None
    without = difference(plain.checkpoint, hashes[1], cache)
    assert without == "transformer/lora-1/one.safetensors:1 is missing"
    added = difference(variants[1].checkpoint, hashes[0], cache)
    assert added == "transformer/lora-1/one.safetensors:1 was not in it"
    assert plain.packaged
    assert not variants[1].packaged


def test_another_process_reads_the_same(tmp_path: Path) -> None:
    checkpoint = merged("mini", Lora(one_lora(tmp_path / "one.safetensors"), 0.5)).checkpoint
    other = pickle.loads(pickle.dumps(checkpoint))  # noqa: S301
    name = f"{IMAGE}.weight"
    both = (c.weights("transformer").read(name) for c in (checkpoint, other))
    assert torch.equal(*both)


# What is drawn.


def test_pictures_are_those_of_diffusers(
    make_bundle: Callable[..., Path], tmp_path: Path, run: Any
) -> None:
    """Two LoRAs, of the transformer and both CLIPs, merged into mini."""
    root = checkpoint_path()
    names = [
        n for n in part_tensors(root, "transformer") if re.search(r"attn\.to_[qv]\.weight$", n)
    ]
    linears = [name.removesuffix(".weight") for name in names]
    base = part_tensors(root, "transformer")
    first = [diffusers_names("transformer", random_layers(base, linears, alpha=None))]
    first += [
        diffusers_names(part, random_layers(part_tensors(root, part), [CLIP], alpha=None))
        for part in CLIPS
    ]
    one = write(tmp_path / "one.safetensors", *first)
    two = one_lora(tmp_path / "two.safetensors", seed=3, names=linears[:2])
    # diffusers reads no alpha beside the matrices.
    tensors = diffusers_names("transformer", random_layers(base, linears[:2], alpha=None, seed=3))
    two = write(tmp_path / "two.safetensors", tensors)
    bundle = make_bundle(loras=(Lora(one, 0.5), Lora(two, -0.25)))
    peer = load_diffusers(root)
    for path, factor in ((one, 0.5), (two, -0.25)):
        peer.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=path.stem)
        peer.set_adapters(path.stem, factor)
        peer.fuse_lora(["transformer", *CLIPS], adapter_names=[path.stem])
        peer.unload_lora_weights()
    with Pipeline.load(bundle) as pipe:
        check(pipe, peer, guidance=3.0, t5_tokens=64)

    record = Bundle.open(bundle).manifest.model.loras
    assert [(lora.name, lora.scale) for lora in record] == [
        ("one.safetensors", 0.5),
        ("two.safetensors", -0.25),
    ]
    status, out, _ = run("inspect", bundle)
    assert status == 0
    assert "one.safetensors at 0.5" in out

    status, _, err = run("verify", bundle, "--against", "half", "--captions", 1)
    assert status == 1
    line = one_error_line(err)
    assert "lora-1/one.safetensors:0.5 is missing" in line
    assert "--lora one.safetensors:0.5 --lora two.safetensors:-0.25" in line


def test_the_command_line(run: Any, tmp_path: Path) -> None:
    """The build says what it merges; a calibration of the model without is another's."""
    lora = one_lora(tmp_path / "style.safetensors")
    status, _, err = run("build", "--lora", f"{lora}:0.5", "--policy", "fp8", "--out", "b")
    assert status == 2
    line = one_error_line(err)
    assert f"sd35-trt calibrate --model mini --lora {lora}:0.5 --policy fp8" in line
    status, out, _ = run("plan", "--gpu", "rtx4090", "--lora", lora)
    assert status == 0
    assert "mini" in out
    for words, text in (
        (["plan", "--gpu", "ada", "--model", "large", "--lora", lora], "leave out --lora"),
        (["build", "--lora", f"{lora}:nan"], "finite"),
        (["build", "--lora", tmp_path / "gone.safetensors:2"], "gone.safetensors is missing"),
        (["verify", "b", "--lora", lora], "--lora needs --against"),
    ):
        status, _, err = run(*words)
        assert status in (1, 2)
        assert text in err, err


def test_a_calibration_of_the_model_without(tmp_path: Path) -> None:
    lora = Lora(one_lora(tmp_path / "style.safetensors"))
    options = BuildOptions(
        loras=(lora,), policy="fp8", calibration=calibration_path(), out=tmp_path / "b",
        cache_dir=tmp_path / "cache",
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"another checkpoint \(transformer/lora-1/style"):
        build(options)


# What is refused.


def refused(message: str, *tensors: Tensors, tmp_path: Path, **options: Any) -> None:
    file = write(tmp_path / "style.safetensors", *tensors)
    with pytest.raises(CheckpointError) as caught:
        look(ModelOptions(loras=(Lora(file),), **options))
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)
    assert " — " in str(caught.value)


def pair(name: str, out: int, columns: int, rank: int = 2) -> Tensors:
    layer = LowRank(torch.ones(rank, columns), torch.ones(out, rank))
    return diffusers_names("transformer", {name: layer})


@pytest.fixture(scope="module")
def good() -> Tensors:
    base = part_tensors(checkpoint_path(), "transformer")
    return diffusers_names("transformer", random_layers(base, [IMAGE]))


def peft_names(tensors: Tensors) -> Tensors:
    return {n.replace("transformer.", "base_model.model.", 1): t for n, t in tensors.items()}


DOWN, UP = (f"transformer.{IMAGE}.lora_{x}.weight" for x in "AB")

REFUSED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "another's layer": (
        lambda good: good | pair("transformer_blocks.99.attn.to_q", 64, 64),
        r"'transformer\.transformer_blocks\.99\.attn\.to_q\.\S+' is of no layer of the model",
    ),
    "another width": (
        lambda good: good | pair(IMAGE, 1536, 1536),
        r"lora_A\.weight \[2, 1536\].* not a LoRA for the model's layer, whose weight is \[",
    ),
    "half a pair": (lambda good: {DOWN: good[DOWN]}, r"lora_A\.weight' has no up beside it"),
    "an alpha alone": (
        lambda good: good | {"transformer.proj_out.alpha": torch.tensor(1.0)},
        r"'transformer\.proj_out\.alpha' has no matrices",
    ),
    "rank 0": (
        lambda good: {DOWN: good[DOWN][:0], UP: good[UP][:, :0]}, r"not a LoRA for",
    ),
    "a tensor of no use": (
        lambda good: good | {f"transformer.{IMAGE}.diff": good[UP]}, r"\.diff' is of no adapter",
    ),
    "a mixture": (
        lambda good: good | {f"transformer.{IMAGE}.lokr_w1": good[UP]}, r"lokr_w1' is of no use",
    ),
    "Tucker's core": (
        lambda good: good | {f"transformer.{IMAGE}.lora_mid.weight": good[UP]},
        r"lora_mid\.weight' is of no adapter",
    ),
    "one layer twice": (
        lambda good: good
        | {n.replace("transformer.trans", "diffusion_model.trans"): t for n, t in good.items()},
        r"which are one layer of the model",
    ),
    "one tensor twice": (
        lambda good: good | {f"transformer.{IMAGE}.lora_down.weight": good[DOWN]},
        r"which are one tensor",
    ),
    "NaN": (
        lambda good: good | {UP: torch.full_like(good[UP], torch.nan)},
        r"lora_B\.weight' holds NaN or infinite",
    ),
    "infinity in FP16": (
        lambda good: good | {UP: torch.full_like(good[UP], 1e9).half()}, r"NaN or infinite",
    ),
    "FP8": (
        lambda good: good | {UP: good[UP].to(torch.float8_e4m3fn)}, r"stored in F8_E4M3",
    ),
    "lengths of columns": (
        lambda good: good | {f"transformer.{IMAGE}.dora_scale": good[UP][:1, :1].repeat(1, 64)},
        r"not a LoRA for",
    ),
    "PEFT without its settings": (
        lambda good: peft_names(good),
        r"without its adapter_config\.json.* — put adapter_config\.json beside it",
    ),
    "SDXL": (
        lambda good: {"lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": good[DOWN]},
        r"a LoRA for Stable Diffusion 1, 2 or XL, not for Stable Diffusion 3\.5 — take a LoRA for",
    ),
    "FLUX": (
        lambda good: {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": good[DOWN]},
        r"a LoRA for FLUX, not for Stable",
    ),
    "OFT": (
        lambda good: {f"lora_unet_{IMAGE}.oft_blocks": good[DOWN]}, r"an OFT adapter.*ComfyUI",
    ),
    "a model": (
        lambda good: {"transformer_blocks.0.norm1_context.linear.weight": good[DOWN]},
        r"not a LoRA for Stable Diffusion 3\.5",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, good: Tensors, tmp_path: Path) -> None:
    change, message = REFUSED[case]
    refused(message, change(good), tmp_path=tmp_path)


def test_a_lora_of_t5_without_t5(tmp_path: Path) -> None:
    layer = LowRank(torch.ones(1, 64), torch.ones(64, 1))
    tensors = kohya_names("text_encoder_3", {"encoder.block.0.layer.0.SelfAttention.q": layer})
    refused(r"is of T5, which is left out.*--no-t5", tensors, tmp_path=tmp_path, without_t5=True)


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "another type": ({"peft_type": "VERA"}, "an adapter of the type VERA"),
    "a changed model": ({"init_lora_weights": "pissa"}, "changed the model's own weights"),
    "another computation": ({"use_qalora": True}, "sets use_qalora"),
    "no pattern": ({"alpha_pattern": {"(": 2}}, "the pattern '\\(' is none"),
    "no number": ({"lora_alpha": "much"}, "Expected `float"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_refused(case: str, good: Tensors, tmp_path: Path) -> None:
    settings, message = SETTINGS[case]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 3, **settings}))
    refused(message, peft_names(good), tmp_path=tmp_path)
