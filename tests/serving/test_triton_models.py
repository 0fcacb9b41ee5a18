"""Models for Triton: what is exported, how tensors become requests, and the real server."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from adapter_files import random_adapter
from conftest import one_error_line
from control_nets import every_feature
from fake_engines import PATIENCE

from sd35_trt.errors import UsageError
from sd35_trt.runtime import Control, Pipeline
from sd35_trt.serving.triton.export import export_triton
from sd35_trt.serving.triton.flags import CancelFlag
from sd35_trt.serving.triton.tensors import arguments, runs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def texts(*values: str) -> np.ndarray:
    return np.array([[value.encode()] for value in values], dtype=object)


def test_a_bundle_becomes_two_models(tiny_bundle: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    names = export_triton(tiny_bundle, repository, "tiny", {"threads": "1"})
    assert (names.once, names.stream) == ("tiny", "tiny_stream")
    once = (repository / "tiny" / "config.pbtxt").read_text("utf-8")
    stream = (repository / "tiny_stream" / "config.pbtxt").read_text("utf-8")
    assert "decoupled: true" in stream
    assert "decoupled" not in once
    assert json.dumps(str(tiny_bundle)) in stream
    assert str(tiny_bundle) not in once
    for text in (once, stream):
        assert "dynamic_batching" in text
        assert text.count("{") == text.count("}")
    model = (repository / "tiny" / "1" / "model.py").read_text("utf-8")
    compile(model, "model.py", "exec")
    export_triton(tiny_bundle, repository, "tiny")  # replaces its own
    assert "threads" not in (repository / "tiny_stream" / "config.pbtxt").read_text("utf-8")


def test_another_model_is_not_replaced(tiny_bundle: Path, tmp_path: Path) -> None:
    foreign = tmp_path / "tiny_stream" / "config.pbtxt"
    foreign.parent.mkdir()
    foreign.write_text('backend: "onnxruntime"')
    with pytest.raises(UsageError, match="holds no model of sd35-trt"):
        export_triton(tiny_bundle, tmp_path, "tiny")
    assert foreign.read_text() == 'backend: "onnxruntime"'
    assert not (tmp_path / "tiny").exists()


@pytest.mark.parametrize("name", ["", "a/b", "../a", ".a", "a b"])
def test_a_name_is_one_of_a_model(tiny_bundle: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="is no name of a model"):
        export_triton(tiny_bundle, tmp_path / "models", name)
    assert not (tmp_path / "models").exists()


def test_tensors_become_arguments() -> None:
    image = np.zeros((1, 8, 8, 3), np.uint8)
    found = arguments(
        {
            "prompt": texts("a star"), "negative_prompt": texts("é"),
            "seed": np.array([[7]], np.uint64), "size": np.array([[64, 128]], np.int32),
            "guidance": np.array([[2.5]], np.float32), "image": image,
        }
    )  # fmt: skip
    np.testing.assert_array_equal(found.pop("image"), image[0])
    assert found == {
        "prompt": ["a star"], "negative": ["é"], "seed": [7], "size": (64, 128), "guidance": 2.5,
        "controls": None, "adapters": None,
    }  # fmt: skip


def test_tensors_of_features_become_arguments() -> None:
    mask, hint = np.zeros((2, 8, 8), np.uint8), np.ones((2, 4, 6, 3), np.uint8)
    twice: dict[str, Any] = {
        "weighting": np.array([[True]] * 2), "t5_tokens": np.array([[32]] * 2, np.int32),
        "paste": np.array([[True]] * 2), "strength": np.array([[0.3]] * 2, np.float32),
        "skip_guidance_layers": np.array([[1, 2]] * 2, np.int32),
        "skip_layer_guidance_stop": np.array([[0.2]] * 2, np.float32),
        "control_canny_scale": np.array([[0.7]] * 2, np.float32),
        "control_canny_edges": np.array([[True]] * 2),
    }  # fmt: skip
    found = arguments(
        {
            "prompt": texts("a", "b"), "prompt_2": texts("c", "d"),
            "step_cache": texts("fast", "fast"), "negative_prompt_3": texts("e", "f"),
            "mask": mask, "control_canny": hint,
            "adapters": np.array([[b"style", b"shape"], [b"style", b""]], object),
            "adapter_scales": np.array([[0.8, 1.0], [0.4, 0.0]], np.float32), **twice,
        },
        nets=["canny", "depth"], adapters={"style", "shape"},
    )  # fmt: skip
    np.testing.assert_array_equal(found.pop("mask"), mask[0])
    control = found.pop("controls")
    assert control.keys() == {"canny"}
    np.testing.assert_array_equal(control["canny"].image, hint[0])
    # The decimals that were meant: of 10 steps, a strength of 0.3 draws 3.
    assert (control["canny"].scale, control["canny"].end, control["canny"].edges) == (
        0.7,
        1.0,
        True,
    )
    assert found.pop("seed")
    assert found == {
        "prompt": ["a", "b"], "prompt_2": ["c", "d"], "negative_3": ["e", "f"],
        "weighting": True, "t5_tokens": 32, "step_cache": "fast", "paste": True, "strength": 0.3,
        "skip_guidance_layers": [1, 2], "skip_layer_guidance_stop": 0.2,
        "adapters": [{"style": 0.8, "shape": 1.0}, {"style": 0.4}],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"control_canny_scale": np.ones((1, 1), np.float32)}, "send it as control_canny"),
        ({"adapters": texts("/etc/passwd"), "adapter_scales": np.ones((1, 1), np.float32)},
         "no adapter '/etc/passwd' — use one of: style"),
        ({"adapters": texts("style")}, "send a scale for each name"),
        ({"adapter_scales": np.ones((1, 1), np.float32)}, "send a scale for each name"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_agree(tensors: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        arguments({"prompt": texts("a"), **tensors}, nets=["canny"], adapters={"style"})


def test_inputs_of_a_bundle_with_nets(
    make_bundle: Callable[..., Path], tmp_path: Path, run: Any
) -> None:
    bundle = make_bundle(**every_feature(tmp_path / "nets"))
    file = random_adapter(bundle, tmp_path / "style.safetensors", 1)
    status, _, err = run(
        "export-triton", bundle, "--repository", "models", "--name", "m", "--adapter",
        f"style={file}",
    )  # fmt: skip
    assert status == 0, err
    for name in ("m", "m_stream"):
        text = (tmp_path / "models" / name / "config.pbtxt").read_text("utf-8")
        for net in ("canny", "depth"):
            assert f'name: "control_{net}" data_type: TYPE_UINT8 dims: [ -1, -1, 3 ]' in text
            assert f'name: "control_{net}_start" data_type: TYPE_FP32' in text
    assert json.dumps(json.dumps({"style": str(file)})) in text
    for given, words in ((file, "has no name"), (f"a={bundle / 'bundle.json'}", "bundle.json")):
        status, _, err = run("export-triton", bundle, "--repository", "other", "--adapter", given)
        assert status == 2
        assert words in one_error_line(err)
        assert not (tmp_path / "other").exists()


def test_adapters_of_a_run_have_room(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle = make_bundle(**every_feature(tmp_path / "nets"))
    with Pipeline.load(bundle, threads=1) as pipe:
        for seed in range(5):
            pipe.load_adapter(
                str(seed), random_adapter(bundle, tmp_path / f"{seed}.safetensors", seed)
            )
        requests = [
            pipe.request("a", size=(64, 64), steps=2, adapters={str(seed): 1.0})
            for seed in range(5)
        ]
    assert runs(requests, 8, 16) == [[0, 1, 2, 3], [4]]  # of rank 4 each


def test_each_image_without_a_seed_gets_one() -> None:
    found = [arguments({"prompt": texts("a", "b")})["seed"] for _ in range(2)]
    assert [len(seeds) for seeds in found] == [2, 2]
    assert found[0] != found[1]


def test_images_of_a_request_agree() -> None:
    tensors = {"prompt": texts("a", "b"), "steps": np.array([[2], [3]], np.int32)}
    with pytest.raises(UsageError, match="steps differs among the images"):
        arguments(tensors)
    assert arguments({**tensors, "steps": np.array([[2], [2]], np.int32)})["steps"] == 2


def test_a_text_is_utf_8() -> None:
    with pytest.raises(UsageError, match="prompt is not UTF-8"):
        arguments({"prompt": np.array([[b"\xff"]], dtype=object)})


def test_what_agrees_is_drawn_in_one_run(tiny_bundle: Path) -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        room = pipe.manifest.ranges.batch[1]
        usual: dict[str, Any] = {"size": (64, 64), "steps": 4}
        one, other = pipe.request("a", **usual), pipe.request("a", size=(64, 64), steps=3)
        full = pipe.request(["a"] * room, **usual)
        pictured = pipe.request("a", image=image, steps=4)
    assert runs([one, other, one, pictured, one, pictured], room) == [[0, 2, 4], [1], [3], [5]]
    assert runs([one, full, one], room) == [[0, 2], [1]]
    assert runs([], room) == []


def test_a_flag_is_known_by_its_token() -> None:
    flag = CancelFlag()
    other = CancelFlag.of_parameters(json.dumps(flag.parameters))
    assert other is not None
    assert not other.is_set
    flag.set()
    assert other.is_set
    flag.remove()
    assert not other.is_set
    for foreign in ("", "{}", '{"sd35_trt_cancel": "../../etc/passwd"}', '{"sd35_trt_cancel": 1}'):
        assert CancelFlag.of_parameters(foreign) is None


def test_the_command_says_what_it_wrote(tiny_bundle: Path, tmp_path: Path, run: Any) -> None:
    status, out, _ = run("export-triton", tiny_bundle, "--repository", "models", "--name", "tiny")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["models/tiny", "models/tiny_stream"]
    assert (tmp_path / "models" / "tiny_stream" / "config.pbtxt").is_file()


def test_what_cannot_be_exported_is_one_line(tiny_bundle: Path, tmp_path: Path, run: Any) -> None:
    file = tmp_path / "file"
    file.touch()
    for words, wanted, part in (
        (["nothing", "--repository", "models"], 1, "nothing"),
        ([tiny_bundle], 2, "--repository"),
        ([tiny_bundle, "--repository", "models", "--name", "a b"], 2, "give --name"),
        ([tiny_bundle, "--repository", file], 2, "choose another --name or --repository"),
        ([tiny_bundle, "--repository", "models", "--threads", "0"], 2, "--threads"),
    ):
        status, _, err = run("export-triton", *words)
        assert status == wanted, err
        assert part in one_error_line(err)
    assert not (tmp_path / "models").exists()


@pytest.fixture
def clients(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The scripts that start Triton and ask it."""
    pytest.importorskip("tritonclient.http", reason="tritonclient is not installed")
    pytest.importorskip("tritonclient.grpc", reason="tritonclient is not installed")
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    try:
        import triton_client
        import triton_process

        if triton_process.triton_root() is None:
            pytest.skip("nvidia-pytriton, whose wheel has Triton, is not installed")
        flags = tmp_path / "flags"
        flags.mkdir()
        monkeypatch.setenv("TMPDIR", str(flags))
        yield SimpleNamespace(
            http=triton_client.HttpTriton, stream=triton_client.StreamTriton,
            inputs=triton_client.inputs, triton=triton_process.triton, flags=flags,
        )  # fmt: skip
    finally:
        for name in ("triton_process", "triton_client"):
            sys.modules.pop(name, None)


@pytest.mark.nightly
def test_triton_draws_over_http_and_grpc(tiny_bundle: Path, tmp_path: Path, clients: Any) -> None:
    import tritonclient.grpc as grpc

    repository = tmp_path / "models"
    export_triton(tiny_bundle, repository, "tiny", {"threads": "1"})
    asked = {"prompt": "a star", "seed": 7, "steps": 4, "size": "64x64"}
    with Pipeline.load(tiny_bundle, threads=1) as pipe:
        expected = pipe.generate("a star", seed=7, steps=4, size=(64, 64)).images
    with clients.triton(repository, tmp_path / "log") as server:
        drawn = clients.http(server.http, "tiny").draw(asked)
        np.testing.assert_array_equal(drawn, expected)
        steps, drawn = clients.stream(server.grpc, "tiny_stream").draw(asked)
        assert steps == [1, 2, 3, 4]
        np.testing.assert_array_equal(drawn, expected)
        client = grpc.InferenceServerClient(server.grpc)
        answer = client.infer("tiny", clients.inputs(grpc, asked))
        np.testing.assert_array_equal(answer.as_numpy("image"), expected)
        with pytest.raises(Exception, match="size 3x3 is not in"):
            clients.http(server.http, "tiny").draw({**asked, "size": "3x3"})
        long = clients.inputs(grpc, {**asked, "steps": 1000})
        call = client.async_infer("tiny", long, callback=lambda result, error: None)
        time.sleep(0.3)
        call.cancel()
        client.infer("tiny", clients.inputs(grpc, asked))
        end = time.monotonic() + PATIENCE
        while list(clients.flags.glob("*.cancel")) and time.monotonic() < end:
            time.sleep(0.01)
        assert not list(clients.flags.glob("*.cancel"))


@pytest.mark.nightly
def test_triton_draws_with_all_features(
    make_bundle: Callable[..., Path], tmp_path: Path, clients: Any
) -> None:
    bundle = make_bundle(**every_feature(tmp_path / "nets"))
    style = random_adapter(bundle, tmp_path / "style.safetensors", 1)
    repository = tmp_path / "models"
    export_triton(bundle, repository, "all", {"threads": "1"}, {"style": style})
    noise = np.random.default_rng(0)
    source, hint = noise.integers(0, 256, (2, 64, 64, 3), np.uint8)
    mask = np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 255

    def each(value: Any, kind: Any) -> np.ndarray:
        return np.array(value, kind)[None]

    asked: dict[str, Any] = {
        "prompt": "a star", "seed": 7, "steps": 4, "size": "64x64", "image": source[None],
        "mask": mask[None], "paste": each([True], np.bool_),
        "strength": each([1.0], np.float32),
        "skip_guidance_layers": each([1, 2], np.int32),
        "skip_layer_guidance_stop": each([1.0], np.float32),
        "adapters": each([b"style"], object), "adapter_scales": each([0.8], np.float32),
        "control_canny": hint[None], "control_canny_scale": each([0.7], np.float32),
        "control_depth": source[None], "control_depth_end": each([0.5], np.float32),
    }  # fmt: skip
    with Pipeline.load(bundle, threads=1) as pipe:
        expected = pipe.generate(
            "a star", seed=7, steps=4, image=source, mask=mask > 0, paste=True, strength=1.0,
            skip_guidance_layers=[1, 2], skip_layer_guidance_stop=1.0, adapters={str(style): 0.8},
            controls={"canny": Control(hint, 0.7), "depth": Control(source, end=0.5)},
        ).images  # fmt: skip
    with clients.triton(repository, tmp_path / "log") as server:
        one, stream = (
            clients.http(server.http, "all"), clients.stream(server.grpc, "all_stream")
        )  # fmt: skip
        np.testing.assert_array_equal(one.draw(asked), expected)
        np.testing.assert_array_equal(stream.draw(asked)[1], expected)
        for change, words in (
            ({"adapters": each([b"/etc/passwd"], object)}, "no adapter '/etc/passwd'"),
            ({"control_canny_scale": each([101], np.float32)}, "must be -100 to 100"),
            ({"skip_guidance_layers": each([99], np.int32)}, "must be 0 to 5"),
        ):
            with pytest.raises(Exception, match=words):
                one.draw({**asked, **change})
