"""Adapters as inputs: as diffusers draws with them, each image its own mix, off without a trace."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_files import Layers, LowRank, diffusers_names, kohya_names, random_layers, write
from against_diffusers import draw_with_diffusers, load_diffusers
from conftest import one_error_line, psnr, relative_error
from fake_gpu import QueuedSession, install_fake
from msgspec.structs import replace
from originals import Tensors, original_transformer, part_tensors

from sd35_trt.build import BuildOptions, build
from sd35_trt.checkpoints.adapter_convert import convert_adapter
from sd35_trt.errors import BundleError, CheckpointError, UsageError
from sd35_trt.formats.adapter import Adapter, AdapterLayer, adapter_slots, write_adapter
from sd35_trt.formats.bundle import Bundle, Manifest
from sd35_trt.formats.contract import check_contract
from sd35_trt.mini import checkpoint_path
from sd35_trt.quality.reference import HALF, open_reference
from sd35_trt.runtime import Pipeline, PipelinePool
from sd35_trt.runtime.job import Job, Result
from sd35_trt.runtime.memory_plan import adapter_bytes

RANK = 32
PROMPT = "a small red circle to the left of a large blue square"
T5_TOKENS = 32
CLIPS = ("text_encoder", "text_encoder_2")
QUICK: dict[str, Any] = {"steps": 2, "size": (64, 64), "guidance": 3.0}

# What a bundle takes adapters of, in the checkpoint's names.
LINEARS = {
    "transformer": r"attn2?\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
    r"|ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear|norm_out\.linear|context_embedder",
    "text_encoder": r"layers\.\d+\.(self_attn\.\w+_proj|mlp\.fc\d)",
    "text_encoder_2": r"layers\.\d+\.(self_attn\.\w+_proj|mlp\.fc\d)",
}


def linears(tensors: Iterable[str], part: str) -> list[str]:
    pattern = re.compile(rf"(.*\.)?({LINEARS[part]})\.weight")
    return [name.removesuffix(".weight") for name in tensors if pattern.fullmatch(name)]


def lora(root: Path, path: Path, rank: int, seed: int, parts: Iterable[str] = LINEARS) -> Path:
    """A LoRA of all linears of some parts, as diffusers saves it."""
    tensors: list[Tensors] = []
    for part in parts:
        base = part_tensors(root, part)
        layers = random_layers(base, linears(base, part), rank, None, seed)
        tensors.append(diffusers_names(part, layers))
    return write(path, *tensors)


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path]) -> Path:
    """Mini in FP32, with adapters."""
    return make_bundle(adapters=RANK)


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """LoRAs for mini: of everything, of two ranks, and of the transformer alone."""
    folder, root = tmp_path_factory.mktemp("loras"), checkpoint_path()
    return {
        "style": lora(root, folder / "style.safetensors", 4, 1),
        "subject": lora(root, folder / "subject.safetensors", 9, 2),
        "shape": lora(root, folder / "shape.safetensors", 16, 3, ["transformer"]),
    }


@pytest.fixture(scope="module")
def adapters(
    bundle: Path, loras: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The same, converted."""
    folder = tmp_path_factory.mktemp("adapters")
    for path in loras.values():
        write_adapter(folder / path.name, convert_adapter(path, Bundle.open(bundle)))
    return {name: folder / path.name for name, path in loras.items()}


def load(bundle: Path, adapters: dict[str, Path]) -> Pipeline:
    pipe = Pipeline.load(bundle)
    for name, path in adapters.items():
        pipe.load_adapter(name, path)
    return pipe


# As diffusers draws.


def compare(
    root: Path, pipe: Pipeline, loras: dict[str, Path], mix: dict[str, float], tokens: int
) -> None:
    peer = load_diffusers(root)
    for name in mix:
        path = loras[name]
        peer.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name=name)
    peer.set_adapters(list(mix), list(mix.values()))
    if not all(p.any() for n, p in peer.text_encoder.named_parameters() if "lora_B" in n):
        pytest.skip("this version of transformers leaves out what a LoRA has of CLIP")
    options: dict[str, Any] = {"steps": 4, "guidance": 3.0, "size": (128, 128)}
    result = pipe.generate(PROMPT, seed=11, t5_tokens=tokens, adapters=mix, **options)
    without = pipe.generate(PROMPT, seed=11, t5_tokens=tokens, **options)
    latents, images = draw_with_diffusers(
        peer, 1, (128, 128), tokens, guidance_scale=3.0, negative_prompt="", num_inference_steps=4
    )
    assert relative_error(result.latents, latents) <= 1e-3
    assert psnr(result.images, images) >= 50
    assert relative_error(without.latents, latents) > 0.1


# Several adapters are what is meant.
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize(
    "mix", [{"style": 0.8}, {"style": 0.5, "subject": -0.4}, {"shape": 0.3, "style": 0.3}]
)
def test_as_diffusers_draws(
    mix: dict[str, float], bundle: Path, loras: dict[str, Path], adapters: dict[str, Path]
) -> None:
    with load(bundle, adapters) as pipe:
        compare(checkpoint_path(), pipe, loras, mix, T5_TOKENS)


@pytest.mark.nightly
@pytest.mark.parametrize("structure", ["large_checkpoint", "medium_checkpoint"])
def test_random_checkpoints(
    structure: str,
    make_bundle: Callable[..., Path],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Second attentions and wide modulations among the layers."""
    root = request.getfixturevalue(structure)
    path = make_bundle(model=str(root), adapters=RANK)
    own = {"style": lora(root, tmp_path / "style.safetensors", 4, 1)}
    write_adapter(tmp_path / "own.safetensors", convert_adapter(own["style"], Bundle.open(path)))
    with load(path, {"style": tmp_path / "own.safetensors"}) as pipe:
        compare(root, pipe, own, {"style": 0.5}, 77)


# Every image its own mix.


def test_off_after_swaps_is_as_if_there_never_was_one(
    bundle: Path, adapters: dict[str, Path]
) -> None:
    with Pipeline.load(bundle) as fresh:
        never = fresh.generate(PROMPT, seed=3, **QUICK)
    with load(bundle, adapters) as pipe:
        for mix in ({"style": 1.0}, {"subject": 0.5, "shape": -1.0}, {"style": 0.0}):
            pipe.generate(PROMPT, seed=3, adapters=mix, **QUICK)
            off = pipe.generate(PROMPT, seed=3, **QUICK)
            assert np.array_equal(off.latents, never.latents)
            assert np.array_equal(off.images, never.images)
        zero = pipe.generate(PROMPT, seed=3, adapters={"style": 0.0}, **QUICK)
        assert np.array_equal(zero.latents, never.latents)
        assert "adapters" not in zero.parameters


def test_images_of_one_run_have_mixes_of_their_own(bundle: Path, adapters: dict[str, Path]) -> None:
    mixes: list[dict[str, float]] = [{"style": 0.7}, {}, {"subject": 0.5, "style": -0.2}]
    with load(bundle, adapters) as pipe:
        together = pipe.generate([PROMPT] * 3, seed=[5, 5, 5], adapters=mixes, **QUICK)
        for k, mix in enumerate(mixes):
            alone = pipe.generate(PROMPT, seed=5, adapters=mix, **QUICK)
            assert relative_error(together.latents[k], alone.latents[0]) <= 1e-5
            others = [together.latents[i] for i in range(3) if i != k]
            assert all(relative_error(other, alone.latents[0]) > 0.01 for other in others)
    assert together.parameters["adapters"] == mixes


def test_an_overflowing_neighbour_changes_nothing(
    bundle: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Where an image has nothing of an adapter, its product is not multiplied but left out."""
    slots = adapter_slots(Bundle.open(bundle).manifest)
    slot = slots["transformer/transformer_blocks.0.attn.to_q"]
    huge = np.full((1, slot.shape[0]), 3e38, np.float32)
    up = np.full((slot.shape[1], 1), 3e38, np.float32)
    layers = {"transformer/transformer_blocks.0.attn.to_q": AdapterLayer(huge, up)}
    write_adapter(tmp_path / "huge.safetensors", Adapter(layers, "f" * 64))
    with load(bundle, {**adapters, "huge": tmp_path / "huge.safetensors"}) as pipe:
        alone = pipe.generate(PROMPT, seed=5, adapters={"style": 0.7}, **QUICK)
        jobs = [
            Job(pipe.request(PROMPT, seed=5, adapters={"style": 0.7}, **QUICK)),
            Job(pipe.request(PROMPT, seed=5, adapters={"huge": 1.0}, **QUICK)),
        ]
        pipe.draw(jobs)
    assert isinstance(jobs[0].outcome, Result)
    assert relative_error(jobs[0].outcome.latents, alone.latents) <= 1e-5
    assert "not finite" in str(jobs[1].outcome)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=pytest.mark.nightly)])
def test_random_swaps_under_threads(count: int, bundle: Path, adapters: dict[str, Path]) -> None:
    """Joined or not, every picture is that of its request alone."""
    choose = random.Random(0)
    mixes = [{}, {"style": 0.6}, {"subject": -0.5}, {"style": 0.2, "shape": 0.4}, {"shape": 1.0},
             {"subject": 0.3, "style": 0.9}]  # fmt: skip
    requests = [(choose.choice(mixes), choose.randrange(3)) for _ in range(count)]
    quick = {**QUICK, "steps": 1}
    with load(bundle, adapters) as pipe:
        alone = {
            (json.dumps(mix), seed): pipe.generate(PROMPT, seed=seed, adapters=mix, **quick)
            for mix, seed in requests
        }
    with PipelinePool({"mini": bundle}) as pool, ThreadPoolExecutor(8) as threads:
        for name, path in adapters.items():
            pool.load_adapter(name, path)

        def draw(request: tuple[dict[str, float], int]) -> tuple[np.ndarray, np.ndarray]:
            mix, seed = request
            result = pool.submit(PROMPT, seed=seed, adapters=mix, **quick).result()
            return result.latents, result.images

        for (mix, seed), (latents, images) in zip(
            requests, threads.map(draw, requests), strict=True
        ):
            expected = alone[json.dumps(mix), seed]
            assert relative_error(latents, expected.latents) <= 1e-5
            assert psnr(images, expected.images) >= 60


@pytest.mark.parametrize("recordable", [True, False])
def test_where_work_is_queued(
    bundle: Path, adapters: dict[str, Path], recordable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the fake CUDA: graphs of steps are recorded anew where the matrices are others."""
    fake = install_fake(monkeypatch)

    def open_session(own: Any, component: Any, device: Any, options: Any) -> QueuedSession:
        session = QueuedSession(fake, own, component, device)
        session.recordable = recordable
        return session

    mixes: list[dict[str, float]] = [
        {}, {"style": 0.5}, {"style": -0.2}, {"style": 0.5, "shape": 0.3}, {}, {"subject": 1.0},
        {"style": 0.5},
    ]  # fmt: skip
    gpu = Pipeline(Bundle.open(bundle), open_session=open_session, device="cuda")
    with load(bundle, adapters) as cpu, gpu:
        for name, path in adapters.items():
            gpu.load_adapter(name, path)
        for mix in mixes:
            request = {**QUICK, "steps": 5, "seed": 3, "adapters": mix}
            ours, theirs = (pipe.generate(PROMPT, **request) for pipe in (gpu, cpu))
            assert np.array_equal(ours.latents, theirs.latents)
    assert ("cudaGraphLaunch" in fake.calls) == recordable


def test_within_a_budget_the_matrices_are_counted(
    bundle: Path, adapters: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the last run alone stay, also where recorded graphs read them."""
    fake = install_fake(monkeypatch)

    def open_session(own: Any, component: Any, device: Any, options: Any) -> QueuedSession:
        session = QueuedSession(fake, own, component, device)
        session.recordable = True
        return session

    def matrices(rank: int) -> int:
        components = Bundle.open(bundle).manifest.components
        return sum(adapter_bytes(component, rank) for component in components)

    opened = {"open_session": open_session, "device": "cuda"}
    with Pipeline(Bundle.open(bundle), vram_budget=1 << 40, **opened) as pipe:
        for name, path in adapters.items():
            pipe.load_adapter(name, path)
        planned, held = [], []
        for mix in ({}, {"style": 0.5}, {"shape": 0.3, "subject": 1.0}, {"style": 1.0}):
            pipe.generate(PROMPT, **{**QUICK, "steps": 5, "size": (128, 128)}, adapters=mix)
            renderer = pipe._renderer
            planned.append(renderer.engines.memory().planned_peak)
            held.append(renderer._feeder._stacks.nbytes)
            assert len(renderer._loop._recorded) == 1
    # Padded to 16 and to 32 columns; what is planned for is the most there was.
    assert held == [matrices(1), matrices(16), matrices(32), matrices(16)]
    assert planned[1] - planned[0] == matrices(16) - matrices(1)
    assert planned[2] - planned[1] == matrices(32) - matrices(16)
    with Pipeline(Bundle.open(bundle), vram_budget=planned[1], **opened) as pipe:
        pipe.load_adapter("shape", adapters["shape"])
        pipe.load_adapter("subject", adapters["subject"])
        pipe.generate(PROMPT, **QUICK, adapters={"shape": 1.0})
        assert pipe.memory().planned_peak <= planned[1]


# What is refused.


def test_arguments(bundle: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    refused: dict[str, tuple[Any, str]] = {
        "an unknown name": ({"styel": 1.0}, r"no adapter 'styel'.*known: shape, style, subject"),
        "a LoRA of mini": ({"mini:night": 1.0}, "adapter convert mini:night --for BUNDLE"),
        "a list of names": (["style"], r"adapters\[0\] must be a mapping"),
        "a name alone": ("style", "a mapping from names to scales"),
        "another count": ([{}, {}], "2 mixes of adapters for 1 images"),
        "no number": ({"style": "much"}, "the scale of the adapter style must be a number"),
        "NaN": ({"style": float("nan")}, "must be -100 to 100"),
        "too large": ({"style": 101}, "must be -100 to 100"),
        "no text": ({3: 1.0}, "must be text"),
        "a folder": ({str(tmp_path): 1.0}, "missing"),
        "too many": (
            {str(p): 1.0 for p in _copies(adapters["shape"], tmp_path, 3)},
            r"of rank 48 together.*takes 32.*--adapters 48",
        ),
    }  # fmt: skip
    with load(bundle, adapters) as pipe:
        for value, message in refused.values():
            with pytest.raises(UsageError, match=message):
                pipe.request(PROMPT, adapters=value, **QUICK)
        by_path = pipe.generate(PROMPT, adapters={str(adapters["style"]): 0.5}, **QUICK)
        by_name = pipe.generate(PROMPT, adapters={"style": 0.5}, **QUICK)
        assert np.array_equal(by_path.latents, by_name.latents)
        pipe.unload_adapter("style")
        with pytest.raises(UsageError, match="no adapter 'style'"):
            pipe.request(PROMPT, adapters={"style": 0.5})
        with pytest.raises(UsageError, match="no adapter 'style'"):
            pipe.unload_adapter("style")


def _copies(path: Path, folder: Path, count: int) -> list[Path]:
    copies = [folder / f"{k}.safetensors" for k in range(count)]
    for copy in copies:
        copy.write_bytes(path.read_bytes())
    return copies


def test_other_adapters(bundle: Path, tmp_path: Path) -> None:
    def refused(message: str, **layers: tuple[int, int, int]) -> None:
        own = {
            f"transformer/{name.replace('__', '.')}": AdapterLayer(
                np.ones((rank, rows), np.float32), np.ones((columns, rank), np.float32)
            )
            for name, (rank, rows, columns) in layers.items()
        }
        write_adapter(tmp_path / "other.safetensors", Adapter(own, "0" * 64))
        with Pipeline.load(bundle) as pipe, pytest.raises(UsageError, match=message):
            pipe.load_adapter("other", tmp_path / "other.safetensors")

    refused("takes none of 'transformer/proj_out'", proj_out=(1, 192, 64))
    refused(
        r"from 64 to 64 features, the bundle has \[", transformer_blocks__0__attn__to_q=(1, 64, 64)
    )
    refused(
        "of rank 33, the bundle takes 32 together — build it with: --adapters 33",
        transformer_blocks__0__attn__to_q=(33, 192, 192),
    )


def test_a_bundle_without(mini_bundle: Path, adapters: dict[str, Path]) -> None:
    with Pipeline.load(mini_bundle) as pipe:
        for call in (
            lambda: pipe.load_adapter("style", adapters["style"]),
            lambda: pipe.request(PROMPT, adapters={"style": 1.0}),
        ):
            with pytest.raises(UsageError, match=r"takes no adapters — build it with.*--adapters"):
                call()
    assert not Bundle.open(mini_bundle).manifest.requires
    manifest = Bundle.open(mini_bundle).manifest
    assert not any(
        "down" in p.name or "adapter" in p.name for c in manifest.components for p in c.inputs
    )


def test_a_fallback_without(bundle: Path, mini_bundle: Path) -> None:
    with pytest.raises(BundleError, match="takes adapters of a lower rank"):
        Pipeline.load(bundle, fallback=mini_bundle)


# Conversion.


def test_kohya_converts_to_the_same(bundle: Path, tmp_path: Path) -> None:
    """Fused projections become three; halves that are the other way round are turned."""
    base = part_tensors(checkpoint_path(), "transformer")
    theirs = original_transformer(base)
    names = ["joint_blocks.0.x_block.attn.qkv", "final_layer.adaLN_modulation.1"]
    layers = random_layers(theirs, names, rank=3, alpha=6.0)
    file = write(tmp_path / "k.safetensors", kohya_names("transformer", layers))
    adapter = convert_adapter(file, Bundle.open(bundle))
    assert len(adapter.layers) == 4
    changed = dict(base)
    for name, layer in adapter.layers.items():
        weight = f"{name.removeprefix('transformer/')}.weight"
        changed[weight] = base[weight] + torch.from_numpy(layer.up @ layer.down)
    for name, weight in original_transformer(changed).items():
        module = name.removesuffix(".weight")
        expected = theirs[name] + (layers[module].delta() if module in layers else 0)
        assert relative_error(weight.numpy(), expected.numpy()) <= 1e-6, name


LAYER = "transformer_blocks.0.attn.to_q"
T5_LAYER = "encoder.block.0.layer.0.SelfAttention.q"


def one(**more: Any) -> Layers:
    base = part_tensors(checkpoint_path(), "transformer")
    return random_layers(base, [LAYER], **more)


def _with(role: str, rows: int) -> Callable[[], Tensors]:
    def tensors() -> Tensors:
        own = diffusers_names("transformer", one())
        return own | {
            f"transformer.{LAYER}.{role}": own[f"transformer.{LAYER}.lora_B.weight"][:rows, 0]
        }

    return tensors


NOT_INPUTS: dict[str, tuple[Callable[[], Tensors], str]] = {
    "DoRA": (_with("lora_magnitude_vector", 192), r"lora_magnitude_vector' is of no LoRA whose"),
    "a bias": (_with("lora_B.bias", 192), r"lora_B\.bias' is of no LoRA whose matrices"),
    "LoKr": (
        lambda: {f"lycoris_{LAYER.replace('.', '_')}.lokr_w1": one()[LAYER].down},
        r"lokr_w1' is of no LoRA whose",
    ),
    "T5's": (
        lambda: kohya_names("text_encoder_3", {T5_LAYER: one()[LAYER]}),
        r"lora_te3_\S+' is of a layer that takes no adapters",
    ),
    "an embedder's": (
        lambda: diffusers_names("transformer", {"proj_out": LowRank(*_proj_out())}),
        r"proj_out\S+' is of a layer that takes no adapters",
    ),
}  # fmt: skip


def _proj_out() -> tuple[Any, Any]:
    base = part_tensors(checkpoint_path(), "transformer")
    layer = random_layers(base, ["proj_out"])["proj_out"]
    return layer.down, layer.up


@pytest.mark.parametrize("case", NOT_INPUTS)
def test_what_cannot_be_an_input(case: str, bundle: Path, tmp_path: Path) -> None:
    make, message = NOT_INPUTS[case]
    file = write(tmp_path / "style.safetensors", make())
    with pytest.raises(CheckpointError) as caught:
        convert_adapter(file, Bundle.open(bundle))
    assert re.search(message, str(caught.value)), caught.value
    assert str(caught.value).endswith("sd35-trt build --lora FILE:SCALE")


def test_too_large_to_convert(bundle: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "s.safetensors", diffusers_names("transformer", one(rank=33)))
    with pytest.raises(UsageError, match=r"of rank 33, the bundle takes 32.*--adapters 33"):
        convert_adapter(file, Bundle.open(bundle))


# The command line, and the manifest.


def test_the_command_line(
    run: Any, bundle: Path, mini_bundle: Path, loras: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "adapters" / "style.safetensors"
    status, printed, _ = run(
        "adapter", "convert", loras["style"], "--for", bundle, "--out", out, "--json"
    )
    assert status == 0
    assert json.loads(printed)["layers"].keys() == set(LINEARS)
    status, printed, _ = run("adapter", "inspect", out)
    assert status == 0
    assert "rank 4" in printed
    status, printed, _ = run(
        "generate", bundle, PROMPT, "--adapter", f"{out}:0.5", "--steps", 1, "--json"
    )
    assert status == 0
    assert json.loads(printed)["parameters"]["adapters"] == [{str(out): 0.5}]
    status, printed, _ = run("inspect", bundle)
    assert f"of rank {RANK} together" in printed
    for words, message in (
        (["generate", mini_bundle, PROMPT, "--adapter", out], "takes no adapters"),
        (["generate", bundle, PROMPT, "--adapter", loras["style"]], "adapter convert FILE"),
        (
            ["adapter", "convert", loras["style"], "--for", mini_bundle, "--out", "x"],
            "--adapters RANK",
        ),
        (["build", "--adapters", 0], "within 1:512"),
    ):
        status, _, err = run(*words)
        assert status in (1, 2)
        assert message in one_error_line(err)


@pytest.mark.nightly
def test_half_of_the_same(run: Any, bundle: Path, stage_cache: Path) -> None:
    """The twin that a bundle is compared with takes adapters too."""
    candidate = Bundle.open(bundle)
    with open_reference(candidate, HALF, None, stage_cache, lambda *a: None) as twin:
        assert twin.manifest.adapter_ranks == candidate.manifest.adapter_ranks == (16, 32)
        assert twin.manifest.requires == ("adapters",)


def _changed(manifest: Manifest, **fields: Any) -> Manifest:
    """The manifest with other fields in its denoiser."""
    components = [replace(c, **fields) if c.name == "denoiser" else c for c in manifest.components]
    return replace(manifest, components=tuple(components))


def test_manifests_refused(bundle: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    check_contract(manifest, "b")
    own = manifest.component("denoiser")
    assert own is not None
    first, *rest = own.adapters
    cases = [
        (replace(manifest, adapter_ranks=()), "takes adapters of the ranks"),
        (replace(manifest, adapter_ranks=(32, 16)), "takes adapters of the ranks"),
        (replace(manifest, adapter_ranks=(16, 64)), "bounds of rank"),
        (_changed(manifest, adapters=(replace(first, down="gone"), *rest)), "no input gone"),
        (_changed(manifest, adapters=(replace(first, layers=first.layers[:1]), *rest)), "input"),
        (_changed(manifest, adapters=(first, first, *rest)), "two adapters of"),
        (_changed(manifest, adapters=tuple(rest)), "unknown"),
    ]  # fmt: skip
    for changed, message in cases:
        with pytest.raises(BundleError, match=message):
            check_contract(changed, "b")


@pytest.mark.nightly
def test_fp8_with_adapters(
    make_bundle: Callable[..., Path], loras: dict[str, Path], adapters: dict[str, Path]
) -> None:
    """Products of adapters are computed beside FP8's, from what comes before rounding."""
    fp8 = make_bundle(policy="fp8", adapters=RANK)
    full = make_bundle(adapters=RANK)
    errors = []
    for mix in ({}, {"style": 0.3}):
        with load(fp8, adapters) as one_pipe, load(full, adapters) as other:
            results = [p.generate(PROMPT, seed=1, adapters=mix, **QUICK) for p in (one_pipe, other)]
        errors.append(relative_error(results[0].latents, results[1].latents))
    assert errors[1] <= 2 * errors[0]


def test_builds_share_graphs_of_every_rank(bundle: Path, stage_cache: Path, tmp_path: Path) -> None:
    """The rank is a dimension: another one is another manifest, not another component."""
    other = build(BuildOptions(out=tmp_path / "b", cache_dir=stage_cache, adapters=64))
    a, b = (Bundle.open(path).manifest for path in (bundle, other))
    assert b.adapter_ranks == (16, 32, 64)
    for one_component, two in zip(a.components, b.components, strict=True):
        assert [f.sha256 for f in one_component.files] == [f.sha256 for f in two.files]
