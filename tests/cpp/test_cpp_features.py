"""What bundles have besides text: libsd35 refuses in Python's words what does not fit them."""

from __future__ import annotations

import concurrent.futures
import json
from collections.abc import Callable, Iterator
from ctypes import byref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bare_bundle import read_json, sign
from cpp_adapters import DAMAGED, random_adapter
from cpp_build import built, library
from sd35_ctypes import Asked, Drawn, Failure, Library, Pipe, RequestFields

from sd35_trt.errors import BundleError, UsageError
from sd35_trt.formats.adapter import write_adapter
from sd35_trt.formats.bundle import Bundle
from sd35_trt.formats.contract import check_contract
from sd35_trt.runtime import Pipeline


@pytest.fixture(scope="module")
def lib() -> Library:
    return library()


@pytest.fixture(scope="module")
def pipe(lib: Library, mini_bundle: Path) -> Iterator[Pipe]:
    with Pipe(lib, mini_bundle, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def python(mini_bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(mini_bundle, threads=1) as pipeline:
        yield pipeline


def check_refusal(pipe: Pipe, python: Pipeline, **arguments: Any) -> str:
    """What both say of arguments."""
    arguments = {"prompt": "a star", **arguments}
    with pytest.raises(UsageError) as expected:
        python.request(**arguments)
    with pytest.raises(Failure) as refused:
        pipe.check(**arguments)
    assert refused.value.status == "usage"
    assert str(refused.value) == str(expected.value)
    return str(refused.value)


TEXTS: list[dict[str, Any]] = [
    {"prompt": ["a", "b"], "prompt_3": ["c", "d", "e"]}, {"prompt_2": "x" * 10_001},
    {"prompt_3": ["a", "b"], "negative_2": ["c", "d", "e"]}, {"negative_3": ["a"] * 5},
    {"prompt": "(a:101)", "weighting": True}, {"negative": "(a:nan)", "weighting": True},
    {"prompt_2": "a (b (c:-1e3))", "weighting": True},
    {"negative_3": "(a:1e999)", "weighting": True},
    {"prompt_3": "(" * 101 + "a" + ")" * 101, "weighting": True},
]  # fmt: skip


@pytest.mark.parametrize("wrong", TEXTS, ids=lambda w: " ".join(map(str, w))[:40])
def test_texts_and_weights_that_are_refused(
    wrong: dict[str, Any], pipe: Pipe, python: Pipeline
) -> None:
    check_refusal(pipe, python, **wrong)


def test_texts_that_are_no_utf8_are_named(pipe: Pipe) -> None:
    for name in ("prompt_2", "prompt_3", "negative_2", "negative_3"):
        with pytest.raises(Failure, match=f"^{name} is no UTF-8"):
            pipe.check("a", **{name: b"\xff"})


# A mask, skipped layers and adapters, which a bundle is built for.

QUICK: dict[str, Any] = {"steps": 2, "size": (64, 64)}
PICTURE = np.zeros((64, 64, 3), np.uint8)
WHITE = np.full((64, 64), 255, np.uint8)


@pytest.fixture(scope="module")
def everything(make_bundle: Callable[..., Path]) -> Path:
    return make_bundle(skip_layer_guidance=True, inpainting=True, adapters=16)


@pytest.fixture(scope="module")
def full(lib: Library, everything: Path) -> Iterator[Pipe]:
    with Pipe(lib, everything, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def full_python(everything: Path) -> Iterator[Pipeline]:
    with Pipeline.load(everything, threads=1) as pipeline:
        yield pipeline


#: Without what a bundle is built for, and with it.
PLAIN: list[dict[str, Any]] = [
    {"image": PICTURE, "mask": WHITE}, {"image": PICTURE, "paste": True}, {"paste": True},
    {"skip_guidance_layers": [1]}, {"adapters": {"style": 1.0}},
    {"skip_layer_guidance_scale": 101.0}, {"skip_layer_guidance_start": -0.1},
]  # fmt: skip
FULL: list[dict[str, Any]] = [
    {"mask": WHITE}, {"image": PICTURE, "mask": 0 * WHITE}, {"image": PICTURE, "mask": WHITE // 2},
    {"skip_guidance_layers": [-1]}, {"skip_guidance_layers": [0, 1, 99]},
    {"skip_guidance_layers": [1], "skip_layer_guidance_scale": float("nan")},
    {"skip_layer_guidance_stop": 1.5}, {"skip_guidance_layers": [2**40]},
    {"adapters": {"nobody": 1.0}}, {"adapters": [{}, {}]},
]  # fmt: skip


@pytest.mark.parametrize("wrong", PLAIN, ids=lambda w: " ".join(w))
def test_what_a_bundle_was_not_built_for(
    wrong: dict[str, Any], pipe: Pipe, python: Pipeline
) -> None:
    check_refusal(pipe, python, **wrong)


@pytest.mark.parametrize("wrong", FULL, ids=lambda w: " ".join(w))
def test_arguments_out_of_range(wrong: dict[str, Any], full: Pipe, full_python: Pipeline) -> None:
    check_refusal(full, full_python, **wrong)


def test_a_mask_of_another_size(full: Pipe) -> None:
    for shape in ((64, 63), (8, 8), (0, 64)):
        with pytest.raises(Failure, match=r"the mask is .*, the image is 64x64 — give the mask at"):
            full.check("a", image=PICTURE, mask=np.ones(shape, np.uint8))


def test_a_request_of_an_older_version(full: Pipe) -> None:
    """Whose structure ends before these fields, whatever is behind it."""
    asked = Asked(full.library, "a", skip_guidance_layers=[99], weighting=True, prompt_2=b"\xff")
    asked.fields.size = RequestFields.prompts_2.offset
    full.call("check", byref(asked.fields))


# Adapters.


@pytest.fixture(scope="module")
def files(everything: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    ranks = {"one": (4, ""), "two": (9, ""), "nine": (9, "transformer"), "huge": (17, "")}
    for seed, (name, (rank, part)) in enumerate(ranks.items()):
        write_adapter(folder / name, random_adapter(everything, rank, seed, part))
    return {name: folder / name for name in ranks}


@pytest.fixture(scope="module")
def loaded(full: Pipe, full_python: Pipeline, files: dict[str, Path]) -> Pipe:
    for name in ("one", "two", "nine"):
        full.load_adapter(name, files[name])
        full_python.load_adapter(name, files[name])
    return full


MIXES: list[Any] = [
    {"one": 1.0, "two": 1.0, "nine": 0.5}, {"one": 100.5}, {"one": float("nan")},
    [{"one": 1.0}, {"two": 0.5}], {"unknown": 1.0},
]  # fmt: skip


@pytest.mark.parametrize("mix", MIXES, ids=str)
def test_mixes_that_are_refused(mix: Any, loaded: Pipe, full_python: Pipeline) -> None:
    check_refusal(loaded, full_python, adapters=mix)


def test_an_adapter_by_its_path_and_by_its_name(loaded: Pipe, files: dict[str, Path]) -> None:
    named = loaded.generate("a star", adapters={"one": 0.5}, **QUICK)
    for _ in range(2):
        by_path = loaded.generate("a star", adapters={str(files["one"]): 0.5}, **QUICK)
        np.testing.assert_array_equal(by_path.latents, named.latents)
    nothing = loaded.generate("a star", adapters={"one": 0.0}, **QUICK)
    without = loaded.generate("a star", **QUICK)
    np.testing.assert_array_equal(nothing.latents, without.latents)
    assert np.abs(named.latents - without.latents).max() > 0.01
    loaded.load_adapter("gone", files["one"])
    loaded.call("unload_adapter", b"gone")
    for action in (lambda: loaded.call("unload_adapter", b"gone"),
                   lambda: loaded.check("a", adapters={"gone": 1.0})):  # fmt: skip
        with pytest.raises(Failure, match=r"there is no adapter 'gone' — .*known: nine, one, two"):
            action()


def test_adapters_are_counted_within_a_budget(
    lib: Library, everything: Path, files: dict[str, Path]
) -> None:
    """As Python counts them: those of the largest run so far."""
    other = Pipeline.load(everything, threads=1, vram_budget=1 << 34)
    with other, Pipe(lib, everything, threads=1, vram_budget=1 << 34) as own:
        for name in ("one", "nine"):
            own.load_adapter(name, files[name])
            other.load_adapter(name, files[name])
        peaks = []
        for mix in ({}, {"one": 1.0}, {"nine": 0.5}, {}):
            arguments: dict[str, Any] = {"prompt": "a", "steps": 1}
            arguments["adapters"] = mix
            drawn, theirs = own.generate(**arguments), other.generate(**arguments)
            np.testing.assert_array_equal(drawn.latents, theirs.latents)
            peaks.append(own.memory()[0]["planned_peak"])
            assert peaks[-1] == other.memory().planned_peak
        assert peaks[0] < peaks[1] == peaks[3]


def test_adapters_join_as_far_as_their_ranks_fit(loaded: Pipe, everything: Path) -> None:
    def asked(name: str) -> Asked:
        return Asked(loaded.library, "a", adapters={name: 1.0}, **QUICK)

    assert loaded.joins(asked("one"), asked("two"))
    assert loaded.joins(asked("two"), asked("two"))
    assert not loaded.joins(asked("two"), asked("nine"))
    requests: list[dict[str, Any]] = [
        {"prompt": "a", "adapters": {name: 1.0}, **QUICK} for name in ("two", "nine")
    ]
    outcomes = loaded.generate_joined(requests)
    words = f"the adapters are of rank 18 together, {everything} takes 16 — "
    assert all(str(outcome).startswith(words) for outcome in outcomes)


def test_swaps_from_threads_leave_no_trace(loaded: Pipe) -> None:
    mixes: list[dict[str, float]] = [{}, {"one": 1.0}, {"two": -0.5}, {"one": 0.2, "two": 0.3}]
    alone = [loaded.generate("a star", adapters=mix, **QUICK).latents for mix in mixes]

    def draw(i: int) -> Drawn:
        return loaded.generate("a star", adapters=mixes[i % 4], **QUICK)

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for i, drawn in enumerate(threads.map(draw, range(24))):
            np.testing.assert_array_equal(drawn.latents, alone[i % 4])


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_adapters(name: str, full: Pipe, full_python: Pipeline, tmp_path: Path) -> None:
    content, words = DAMAGED[name]
    path = tmp_path / "adapter"
    path.write_bytes(content)
    with pytest.raises(UsageError) as expected:
        full_python.load_adapter("damaged", path)
    with pytest.raises(Failure) as refused:
        full.load_adapter("damaged", path)
    assert refused.value.status == "usage"
    assert words in str(expected.value)
    assert words in str(refused.value)
    # The words of Python's module around those of the library are its own.
    if words != "cannot be read" and name != "halves":
        assert str(refused.value) == str(expected.value)


def test_adapters_that_are_not_there(
    full: Pipe, full_python: Pipeline, files: dict[str, Path], tmp_path: Path, pipe: Pipe
) -> None:
    for path in (tmp_path / "none", tmp_path, files["huge"]):
        with pytest.raises(UsageError) as expected:
            full_python.load_adapter("x", path)
        with pytest.raises(Failure) as refused:
            full.load_adapter("x", path)
        assert str(refused.value) == str(expected.value)
    with pytest.raises(Failure, match="takes no adapters — build it with: sd35-trt build --adap"):
        pipe.load_adapter("x", files["one"])
    with pytest.raises(Failure, match="is NULL"):
        full.call("load_adapter", None, None)


# Manifests.


def _denoiser(data: dict[str, Any]) -> Any:
    return next(c for c in data["components"] if c["name"] == "denoiser")


def _port(data: dict[str, Any], name: str) -> Any:
    return next(p for p in _denoiser(data)["inputs"] if p["name"] == name)


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no mask": lambda d: _denoiser(d)["inputs"].remove(_port(d, "mask")),
    "masks of two": lambda d: _port(d, "mask")["shape"].__setitem__(1, 2),
    "halves": lambda d: _port(d, "source").update(dtype="float16"),
    "layers that are dynamic": lambda d: _port(d, "layer_mask")["shape"].__setitem__(1, "layers"),
    "no layers": lambda d: _port(d, "layer_mask")["shape"].__setitem__(1, 0),
    "not required": lambda d: d.update(requires=["adapters", "inpainting"]),
    "unguided": lambda d: d.update(guided=False),
    "no ranks": lambda d: d.update(adapter_ranks=[]),
    "ranks upside down": lambda d: d.update(adapter_ranks=[16, 8]),
    "ranks without end": lambda d: d.update(adapter_ranks=[1 << 40]),
    "a group more": lambda d: _denoiser(d)["adapters"].append(_denoiser(d)["adapters"][0]),
    "a group less": lambda d: _denoiser(d)["adapters"].pop(),
    "a block more": lambda d: _denoiser(d)["adapters"][0]["layers"].append(["x"]),
    "a block of others": lambda d: _denoiser(d)["adapters"][0]["layers"][0].append("x"),
    "another input": lambda d: _denoiser(d)["adapters"][0].update(down="latents"),
    "bounds": lambda d: _denoiser(d)["bounds"].update(rank=[1, 8]),
    "adapters of the decoder": lambda d: d["components"][-1].update(
        adapters=_denoiser(d)["adapters"]
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_manifests_are_refused_as_in_python(
    name: str, lib: Library, everything: Path, tmp_path: Path
) -> None:
    root = tmp_path / "bundle"
    root.mkdir()
    data = read_json(everything)
    data["files"] = []
    for component in data["components"]:
        component["files"] = [{"path": "file", "bytes": 0, "sha256": _EMPTY}]
    data["tokenizers"] = {n: {**t, "path": "file"} for n, t in data["tokenizers"].items()}
    (root / "file").touch()
    CHANGES[name](data)
    sign(root, json.dumps(data))
    with pytest.raises(BundleError) as expected:
        check_contract(Bundle.open(root).manifest, root)
    with pytest.raises(Failure) as refused:
        Pipe(lib, root)
    assert refused.value.status == "bundle"
    assert str(refused.value) == str(expected.value)


_EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def test_a_fallback_has_what_the_bundle_has(
    lib: Library, everything: Path, mini_bundle: Path, make_bundle: Callable[..., Path]
) -> None:
    with pytest.raises(Failure, match="takes adapters of a lower rank than"):
        Pipe(lib, everything, fallback=mini_bundle)
    with pytest.raises(Failure, match=r"was built without inpainting, .* with it — build one"):
        Pipe(lib, make_bundle(inpainting=True), fallback=mini_bundle)
    with Pipe(lib, mini_bundle, fallback=everything):
        pass


def test_features_on_a_gpu_that_records(
    lib: Library, everything: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs of steps with a third branch and without, of one mix after another; on a stand-in."""
    plugins = built() / "tests" / "fake_gpu"
    if not plugins.exists():
        pytest.skip("libsd35-cuda.so is not built: CUDA's headers are not installed")
    monkeypatch.setenv("SD35_BACKENDS", str(plugins))
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.7}
    requests: list[dict[str, Any]] = [
        {}, {**skip}, {**skip, "seed": 3}, {"adapters": {"one": 1.0}}, {"adapters": {"two": 1.0}},
        {"adapters": {"one": 0.5}, **skip}, {"batch": 2, "adapters": [{"one": 1.0}, {}]}, {},
        {"image": PICTURE, "mask": WHITE, **skip}, {"image": PICTURE, "strength": 0.8},
    ]  # fmt: skip
    with Pipe(lib, everything, device="cuda") as gpu, Pipe(lib, everything, device="cpu") as cpu:
        for name in ("one", "two"):
            gpu.load_adapter(name, files[name])
            cpu.load_adapter(name, files[name])
        drawn = []
        for request in requests:
            arguments = {"steps": 9, "size": (64, 64), **request}
            drawn.append(cpu.generate("a star", **arguments).latents)
            np.testing.assert_array_equal(gpu.generate("a star", **arguments).latents, drawn[-1])
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[3], drawn[0])
