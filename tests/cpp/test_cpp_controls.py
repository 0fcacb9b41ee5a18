"""ControlNets, and latents in and out: libsd35 refuses in Python's words, plans as Python does, and
draws on a GPU what it draws on the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from ctypes import POINTER, byref, c_float, c_size_t, sizeof
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bare_bundle import read_json, sign
from control_nets import net_options, write_mini_nets
from cpp_build import built, library
from sd35_ctypes import (
    Asked,
    ControlFields,
    ControlInfo,
    Failure,
    Library,
    Pipe,
    RequestFields,
    StepView,
    values,
)

from sd35_trt.errors import BundleError, OutOfMemory, UsageError
from sd35_trt.formats.bundle import Bundle
from sd35_trt.formats.contract import check_contract
from sd35_trt.runtime import Control, Pipeline

QUICK: dict[str, Any] = {"steps": 5, "size": (64, 64)}


def picture(seed: int, width: int = 64, height: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture(scope="module")
def lib() -> Library:
    return library()


@pytest.fixture(scope="module")
def controlled(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mini with three nets."""
    return make_bundle(**net_options(write_mini_nets(tmp_path_factory.mktemp("nets"))))


@pytest.fixture(scope="module")
def pipe(lib: Library, controlled: Path) -> Iterator[Pipe]:
    with Pipe(lib, controlled, threads=1) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def python(controlled: Path) -> Iterator[Pipeline]:
    with Pipeline.load(controlled, threads=1) as pipeline:
        yield pipeline


def check_refusal(pipe: Pipe, python: Pipeline, **arguments: Any) -> None:
    """Both say the same of arguments."""
    arguments = {"prompt": "a star", **QUICK, **arguments}
    with pytest.raises(UsageError) as expected:
        python.request(**arguments)
    with pytest.raises(Failure) as refused:
        pipe.check(**arguments)
    assert refused.value.status == "usage"
    assert str(refused.value) == str(expected.value)


LATENTS = np.zeros((1, 16, 8, 8), np.float32)
NAN = np.full((1, 16, 8, 8), np.nan, np.float32)

WRONG: dict[str, dict[str, Any]] = {
    "an unknown net": {"controls": {"cany": picture(1)}},
    "NaN": {"controls": {"canny": Control(picture(1), float("nan"))}},
    "a large scale": {"controls": {"depth": Control(picture(1), 101)}},
    "a late end": {"controls": {"depth": Control(picture(1), end=1.25)}},
    "an early start": {"controls": {"depth": Control(picture(1), start=-0.5)}},
    "never": {"controls": {"edges": Control(picture(1), start=0.5, end=0.5)}},
    "image and latents": {"image": picture(1), "latents": LATENTS},
    "channels": {"latents": LATENTS[:, :3]},
    "a size that is none": {"latents": LATENTS[:, :, :7], "size": None},
    "another size": {"latents": LATENTS, "size": (128, 64)},
    "not finite": {"latents": NAN},
    "two for three": {"latents": np.repeat(LATENTS, 2, 0), "batch": 3},
    "no strength": {"latents": LATENTS, "strength": 0.0},
    "paste of latents": {"latents": LATENTS, "paste": True},
    "paste of nothing": {"image": picture(1), "decode": False, "paste": True},
    "a mask that the bundle takes none of": {"latents": LATENTS, "mask": picture(1)[..., 0]},
    "seeds": {"seed": [1, 2], "batch": 3},
    "negatives": {"prompt": ["a", "b", "c"], "negative": ["d", "e"]},
}


@pytest.mark.parametrize("name", WRONG)
def test_arguments_are_refused_in_pythons_words(name: str, pipe: Pipe, python: Pipeline) -> None:
    check_refusal(pipe, python, **WRONG[name])


def test_one_list_entry_for_several(python: Pipeline) -> None:
    """In Python a list is one for each; the advice says how one stands for all."""
    for arguments, words in (
        ({"prompt": ["a", "b"], "negative": ["c"]}, "give a text, which is for all prompts"),
        ({"prompt": "a", "batch": 2, "seed": [5]}, "give a number, which counts up"),
    ):
        with pytest.raises(UsageError, match=words):
            python.request(**arguments)


def test_nets_that_python_cannot_be_given(pipe: Pipe, lib: Library, mini_bundle: Path) -> None:
    for control, words in (
        (Control(picture(1, 128)), "is 128x64, the size is 64x64 — give the picture at its final"),
        (Control(np.zeros((0, 0, 3), np.uint8)), "is 0x0, the size is 64x64"),
    ):
        with pytest.raises(Failure, match=words):
            pipe.check("a", controls={"canny": control}, **QUICK)
    asked = Asked(lib, "a", controls={"canny": picture(1), "depth": picture(2)}, **QUICK)
    fields = asked.fields
    fields.controls[1].contents.name = b"canny"
    with pytest.raises(Failure, match="controls has 'canny' twice"):
        pipe.call("check", byref(fields))
    fields.controls[1].contents.name = None
    with pytest.raises(Failure, match="the name of an entry of controls is NULL"):
        pipe.call("check", byref(fields))
    fields.controls[1].contents.size = 0
    with pytest.raises(Failure, match="control->size is not set"):
        pipe.call("check", byref(fields))
    fields.controls[1] = POINTER(ControlFields)()
    with pytest.raises(Failure, match="an entry of controls is NULL"):
        pipe.call("check", byref(fields))
    fields.controls = POINTER(POINTER(ControlFields))()
    with pytest.raises(Failure, match="controls is NULL"):
        pipe.call("check", byref(fields))
    with Pipe(lib, mini_bundle) as plain, pytest.raises(Failure, match="--controlnet NAME=DIR"):
        plain.check("a", controls={"canny": picture(1)}, **QUICK)


def test_a_control_of_an_older_version(pipe: Pipe, lib: Library) -> None:
    """Whose structure ends before these fields, whatever is behind it."""
    asked = Asked(lib, "a", controls={"canny": Control(picture(1), scale=1000.0)}, **QUICK)
    asked.fields.controls[0].contents.size = ControlFields.scale.offset
    pipe.call("check", byref(asked.fields))
    asked.fields.decode = 0
    asked.fields.size = RequestFields.controls.offset
    pipe.call("check", byref(asked.fields))


def test_what_a_bundle_has(pipe: Pipe, lib: Library) -> None:
    kinds = []
    for index in range(3):
        info = ControlInfo(size=sizeof(ControlInfo))
        pipe.call("control", c_size_t(index), byref(info))
        kinds.append(values(info))
    assert kinds == [
        {"name": "canny", "kind": "canny"}, {"name": "depth", "kind": "depth"},
        {"name": "edges", "kind": "canny"},
    ]  # fmt: skip
    with pytest.raises(Failure, match="there is no ControlNet 3"):
        pipe.call("control", c_size_t(3), byref(ControlInfo(size=sizeof(ControlInfo))))


JOINS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"controls": {"canny": picture(1)}}, {}),
    ({"controls": {"canny": picture(1)}}, {"controls": {"canny": Control(picture(2), 0.5)}}),
    ({"controls": {"canny": picture(1)}}, {"controls": {"depth": picture(1)}}),
    ({"controls": {"canny": picture(1)}}, {"controls": {"canny": Control(picture(1), end=0.5)}}),
    ({"controls": {"canny": Control(picture(1), 0.0)}}, {}),
    ({"decode": False}, {}),
    ({"decode": False}, {"decode": False}),
    ({"latents": LATENTS}, {"latents": LATENTS}),
]


@pytest.mark.parametrize("number", range(len(JOINS)))
def test_requests_join_as_in_python(
    number: int, pipe: Pipe, python: Pipeline, lib: Library
) -> None:
    one, other = ({**QUICK, "prompt": "a", **own} for own in JOINS[number])
    common = [python.request(**own).in_common for own in (one, other)]
    expected = common[0] is not None and common[0] == common[1]
    assert pipe.joins(Asked(lib, **one), Asked(lib, **other)) is expected


def test_off_it_leaves_no_trace(pipe: Pipe) -> None:
    before = pipe.generate("a star", **QUICK).latents
    on = pipe.generate("a star", controls={"canny": picture(1)}, **QUICK).latents
    assert np.abs(on - before).max() > 0.01
    off = {"canny": Control(picture(1), scale=0.0)}
    np.testing.assert_array_equal(pipe.generate("a star", controls=off, **QUICK).latents, before)
    np.testing.assert_array_equal(pipe.generate("a star", **QUICK).latents, before)


def test_pictures_to_latents_and_back(pipe: Pipe, python: Pipeline, lib: Library) -> None:
    images = np.stack([picture(1, 128), picture(2, 128)])
    latents = pipe.encode(images)
    np.testing.assert_array_equal(latents, python.encode(list(images)))
    np.testing.assert_array_equal(pipe.decode(latents), python.decode(latents))
    for wrong in (images[:, :60], np.repeat(images, 4, 0), images[:0]):
        with pytest.raises(UsageError) as expected:
            python.encode(list(wrong))
        with pytest.raises(Failure) as refused:
            pipe.encode(wrong)
        assert str(refused.value) == str(expected.value)
    for array in (NAN, LATENTS[:, :2], LATENTS[:, :, :0], np.repeat(LATENTS, 9, 0)):
        with pytest.raises(UsageError) as expected:
            python.decode(array)
        with pytest.raises(Failure) as refused:
            pipe.decode(array)
        assert str(refused.value) == str(expected.value)
    assert not lib.array_data(None, None)


def test_without_pictures(pipe: Pipe) -> None:
    whole = pipe.generate("a star", seed=3, batch=2, **QUICK)
    drawn = pipe.generate("a star", seed=3, batch=2, decode=False, **QUICK)
    assert drawn.images.shape == (0, 64, 64, 3)
    assert drawn.seeds == (3, 4)
    np.testing.assert_array_equal(drawn.latents, whole.latents)
    np.testing.assert_array_equal(pipe.decode(drawn.latents), whole.images)


def test_what_a_step_takes_for_the_finished_latents(
    pipe: Pipe, python: Pipeline, lib: Library
) -> None:
    seen: list[np.ndarray] = []

    def watch(step: StepView) -> None:
        address = POINTER(c_float)()
        lib.call("step_denoised", byref(step), byref(address))
        seen.append(np.ctypeslib.as_array(address, tuple(step.shape)).copy())

    pipe.generate("a star", callback=watch, batch=2, **QUICK)
    expected: list[np.ndarray] = []
    python.generate(
        "a star", callback=lambda step: expected.append(step.denoised.copy()), batch=2, **QUICK
    )
    np.testing.assert_array_equal(np.stack(seen), np.stack(expected))
    with pytest.raises(Failure, match="step is NULL"):
        lib.call("step_denoised", None, None)


# Where memory is short, and where work is queued.


def test_budgets_are_planned_as_in_python(lib: Library, controlled: Path, pipe: Pipe) -> None:
    """Nets and the denoiser are in memory together; those that nobody asks for take no room."""
    two = {"canny": picture(1), "edges": Control(picture(2), end=0.5)}
    with pytest.raises(OutOfMemory) as expected:
        Pipeline.load(controlled, vram_budget=1 << 20)
    with pytest.raises(Failure) as refused:
        Pipe(lib, controlled, vram_budget=1 << 20)
    assert str(refused.value) == str(expected.value)
    pipe.generate("a star", controls=two, **QUICK)
    most = pipe.memory()[0]["planned_peak"]
    kinds = set()
    for share in (6, 8, 10):
        budget = most * share // 10
        with (
            Pipe(lib, controlled, threads=1, vram_budget=budget) as own,
            Pipeline.load(controlled, threads=1, vram_budget=budget) as other,
        ):
            for controls in (two, None, {"depth": picture(3)}, two):
                arguments: dict[str, Any] = {**QUICK, "controls": controls}
                drawn, theirs = (p.generate("a star", **arguments) for p in (own, other))
                np.testing.assert_array_equal(drawn.latents, theirs.latents)
                report, engines = own.memory()
                memory = other.memory()
                assert report["planned_peak"] == memory.planned_peak
                assert {
                    name: (engine["kind"], bool(engine["open"]), engine["weight_bytes"])
                    for name, engine in engines.items()
                } == {
                    name: (engine.kind, engine.open, engine.weight_bytes)
                    for name, engine in memory.engines.items()
                }
                kinds |= {engine["kind"] for engine in engines.values()}
    assert kinds == {"resident", "loaded"}


def test_nets_on_a_gpu_that_records(
    lib: Library, controlled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs of steps with nets and without, in the same buffers; on a stand-in."""
    plugins = built() / "tests" / "fake_gpu"
    if not plugins.exists():
        pytest.skip("libsd35-cuda.so is not built: CUDA's headers are not installed")
    monkeypatch.setenv("SD35_BACKENDS", str(plugins))
    two = {"canny": Control(picture(1), end=0.8), "depth": Control(picture(2), start=0.3)}
    requests: list[dict[str, Any]] = [
        {"controls": two}, {}, {"controls": {"edges": picture(3)}}, {"controls": two, "seed": 2},
        {"controls": two, "batch": 2}, {"latents": LATENTS, "strength": 0.9}, {"decode": False},
        {"controls": {"canny": Control(picture(1), start=0.95)}},
    ]  # fmt: skip
    with Pipe(lib, controlled, device="cuda") as gpu, Pipe(lib, controlled, device="cpu") as cpu:
        drawn = []
        for request in requests:
            arguments = {"steps": 9, "size": (64, 64), **request}
            drawn.append(cpu.generate("a star", **arguments).latents)
            np.testing.assert_array_equal(gpu.generate("a star", **arguments).latents, drawn[-1])
        np.testing.assert_array_equal(gpu.encode(picture(1)[None]), cpu.encode(picture(1)[None]))
        np.testing.assert_array_equal(gpu.decode(LATENTS), cpu.decode(LATENTS))
    assert not np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[2], drawn[1])


def test_a_fallback_has_the_nets(lib: Library, controlled: Path, mini_bundle: Path) -> None:
    with pytest.raises(Failure, match=r"has no ControlNet canny, depth, edges, .* has — build one"):
        Pipe(lib, controlled, fallback=mini_bundle)
    with Pipe(lib, mini_bundle, fallback=controlled):
        pass


# Manifests.


def _component(data: dict[str, Any], name: str) -> Any:
    return next(c for c in data["components"] if c["name"] == name)


def _input(data: dict[str, Any], component: str, name: str) -> Any:
    return next(p for p in _component(data, component)["inputs"] if p["name"] == name)


def _rename(data: dict[str, Any], name: str, new: str) -> None:
    _component(data, name)["name"] = new


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no component": lambda d: d["components"].remove(_component(d, "control_canny")),
    "no conditioner": lambda d: d["components"].remove(_component(d, "control_edges_conditioner")),
    "not required": lambda d: d.update(requires=[]),
    "no net": lambda d: d.update(controls=[]),
    "a net twice": lambda d: d["controls"].append(d["controls"][0]),
    "a name that is none": lambda d: d["controls"][0].update(name="Canny"),
    "a name of a conditioner": lambda d: d["controls"][0].update(name="a_conditioner"),
    "a name with a space": lambda d: d["controls"][0].update(name="can ny"),
    "a name too long": lambda d: d["controls"][0].update(name="a" * 41),
    "a net of none": lambda d: d["controls"].pop(0),
    "a component of no net": lambda d: _rename(d, "vae_decoder", "control_other"),
    "halves": lambda d: _input(d, "control_canny", "residuals").update(dtype="float16"),
    "halves of the denoiser": lambda d: _input(d, "denoiser", "residuals").update(dtype="float16"),
    "modulation in halves": lambda d: _input(d, "control_depth", "modulation").update(
        dtype="float16"
    ),
    "blocks": lambda d: _input(d, "denoiser", "residuals")["shape"].__setitem__(0, 7),
    "no blocks": lambda d: _input(d, "denoiser", "residuals")["shape"].__setitem__(0, 0),
    "dynamic blocks": lambda d: _input(d, "denoiser", "residuals")["shape"].__setitem__(0, "b"),
    "no shape": lambda d: _input(d, "denoiser", "residuals").update(shape=[]),
    "no residuals": lambda d: _component(d, "denoiser")["inputs"].remove(
        _input(d, "denoiser", "residuals")
    ),
    "no encoding": lambda d: _component(d, "vae_encoder")["inputs"].pop(),
    "no encoder": lambda d: d["components"].remove(_component(d, "vae_encoder")),
    "a hint of three": lambda d: _input(d, "control_canny", "hint")["shape"].__setitem__(1, 3),
    "a scale of halves": lambda d: _input(d, "control_canny", "scale").update(dtype="float16"),
    "rows": lambda d: _input(d, "control_canny", "modulation")["shape"].__setitem__(1, 3),
    "another input": lambda d: _input(d, "control_canny", "scale").update(name="strength"),
    "an output more": lambda d: _component(d, "control_canny_conditioner")["outputs"].append(
        {"name": "more", "dtype": "float32", "shape": [1]}
    ),
    "bounds": lambda d: _component(d, "control_canny")["bounds"].update(samples=[0, 4]),
}

_EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize("name", CHANGES)
def test_manifests_are_refused_as_in_python(
    name: str, lib: Library, controlled: Path, tmp_path: Path
) -> None:
    root = tmp_path / "bundle"
    root.mkdir()
    data = read_json(controlled)
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


RECORDS: dict[str, Any] = {
    "no list": {}, "a text": "canny", "no fields": [{}], "too many": [{}] * 65,
    "an encoding of two": [{"name": "canny", "kind": "canny", "encoding": [1.0, 2.0]}],
    "an encoding of texts": [{"name": "canny", "kind": "canny", "encoding": ["a", "b", "c"]}],
    "no kind": [{"name": "canny", "encoding": [1.0, 0.0, 0.0]}],
    "a kind of none": [{"name": "canny", "kind": "", "encoding": [1.0, 0.0, 0.0]}],
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_records_of_another_form(name: str, lib: Library, controlled: Path, tmp_path: Path) -> None:
    data = read_json(controlled)
    data["controls"] = RECORDS[name]
    root = tmp_path / "bundle"
    root.mkdir()
    sign(root, json.dumps(data))
    with pytest.raises(BundleError, match="lacks or misstates a field"):
        Bundle.open(root)
    with pytest.raises(Failure, match=r"lacks or misstates a field: .*controls"):
        Pipe(lib, root)
