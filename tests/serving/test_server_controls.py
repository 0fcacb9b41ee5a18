"""ControlNets over HTTP: pictures in JSON, in forms and of the server; what is refused."""

from __future__ import annotations

import base64
import importlib.util
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from control_nets import every_feature
from openai import OpenAI
from PIL import Image
from servers import TOKEN, Running, running
from test_server_features import png
from test_server_images import EDITS, GENERATIONS, decoded, error

from sd35_trt.errors import UsageError
from sd35_trt.runtime import Control, Pipeline
from sd35_trt.serving.names import named_files, read_pictures
from sd35_trt.serving.settings import Settings

QUICK: dict[str, Any] = {"prompt": "a red star", "steps": 4, "size": "64x64", "seed": 3}
ALONE: dict[str, Any] = {"steps": 4, "size": (64, 64), "seed": 3}


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)


def file(pixels: np.ndarray) -> bytes:
    return png(Image.fromarray(pixels))


def text(pixels: np.ndarray) -> str:
    return base64.b64encode(file(pixels)).decode()


@pytest.fixture(scope="module")
def bundle(make_bundle: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Mini in FP32 with every feature and two nets."""
    return make_bundle(**every_feature(tmp_path_factory.mktemp("nets")))


@pytest.fixture(scope="module")
def alone(bundle: Path) -> Iterator[Pipeline]:
    with Pipeline.load(bundle, threads=1) as pipe:
        yield pipe


@pytest.fixture(scope="module")
def server(bundle: Path, mini_bundle: Path) -> Iterator[Running]:
    pipes = {
        "mini": Pipeline.load(bundle, threads=1), "plain": Pipeline.load(mini_bundle, threads=1)
    }  # fmt: skip
    settings = Settings(token=TOKEN, pictures={"frame": picture(9)})
    with running(pipes, settings, warm=False) as server:
        yield server


@pytest.mark.parametrize("prefix", ["", "data:image/png;base64,"])
def test_a_generation_follows_pictures(prefix: str, server: Running, alone: Pipeline) -> None:
    control = {
        "canny": {"image": prefix + text(picture(1, (96, 80))), "scale": 0.7, "end": 0.8},
        "depth": {"picture": "frame", "start": 0.25},
    }
    answer = server.client.post(GENERATIONS, json={**QUICK, "control": control}).json()
    nets = {
        "canny": Control(picture(1, (96, 80)), 0.7, end=0.8),
        "depth": Control(picture(9), start=0.25),
    }
    expected = alone.generate("a red star", controls=nets, **ALONE)
    np.testing.assert_array_equal(decoded(answer), expected.images)
    assert answer["parameters"]["controls"] == {
        "canny": {"scale": 0.7, "start": 0.0, "end": 0.8},
        "depth": {"scale": 1.0, "start": 0.25, "end": 1.0},
    }
    plain = server.client.post(GENERATIONS, json=QUICK).json()
    assert (decoded(plain)[0] != expected.images[0]).any()
    of_the_edges = alone.generate("a red star", controls={"canny": nets["canny"]}, **ALONE)
    assert (of_the_edges.images != expected.images).any()


@pytest.mark.parametrize("form", ["file", "file of a part", "text", "json"])
def test_an_edit_follows_pictures(form: str, server: Running, alone: Pipeline) -> None:
    own, source = picture(2), picture(5)
    fields = {**{k: str(v) for k, v in QUICK.items()}, "strength": "0.8"}
    files = {"image": file(source)}
    if form == "json":
        fields["control"] = json.dumps({"canny": {"image": text(own), "scale": 0.5}})
    else:
        fields["control[canny][scale]"] = "0.5"
        if form == "text":
            fields["control[canny][image]"] = text(own)
        else:
            files["control[canny][image]" if form == "file of a part" else "control[canny]"] = file(
                own
            )
    answer = server.client.post(EDITS, data=fields, files=files).json()
    expected = alone.generate(
        "a red star", image=source, strength=0.8, controls={"canny": Control(own, 0.5)}, **ALONE
    )
    np.testing.assert_array_equal(decoded(answer), expected.images)


def test_the_openai_client_sends_pictures(server: Running, alone: Pipeline) -> None:
    large = picture(6, (800, 800))  # more than a megabyte of text
    extra = {"steps": 4, "seed": 3, "control": {"canny": {"image": text(large), "scale": 0.5}}}
    with OpenAI(base_url=f"{server.url}/v1", api_key=TOKEN) as client:
        drawn = client.images.generate(
            prompt="a red star", size="64x64", extra_body=extra  # type: ignore[call-overload]
        )  # fmt: skip
        edited = client.images.edit(
            prompt="a red star", image=("a.png", file(picture(5))), extra_body=extra
        )
    nets = {"canny": Control(large, 0.5)}
    for answer, source in ((drawn, {}), (edited, {"image": picture(5), "strength": 0.6})):
        expected = alone.generate("a red star", controls=nets, **ALONE, **source)
        np.testing.assert_array_equal(decoded(answer.model_dump()), expected.images)


def test_a_stream_follows_pictures(server: Running, alone: Pipeline) -> None:
    control = {"canny": {"image": text(picture(1))}}
    body = {**QUICK, "control": control, "stream": True}
    events = server.client.post(GENERATIONS, json=body).text.strip().split("\n\n")
    last = json.loads(events[-1].partition("data: ")[2])
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(last["b64_json"]))))
    expected = alone.generate("a red star", controls={"canny": picture(1)}, **ALONE)
    np.testing.assert_array_equal(drawn, expected.images[0])


def test_edges_of_a_picture(server: Running, alone: Pipeline) -> None:
    body = {**QUICK, "control": {"canny": {"image": text(picture(1, (96, 96))), "edges": True}}}
    response = server.client.post(GENERATIONS, json=body)
    if importlib.util.find_spec("cv2") is None:
        assert "finds no edges" in error(response, 422)["message"]
        assert server.client.get("/health/live").status_code == 200
        return
    nets = {"canny": Control(picture(1, (96, 96)), edges=True)}
    expected = alone.generate("a red star", controls=nets, **ALONE)
    np.testing.assert_array_equal(decoded(response.json()), expected.images)


def test_models_say_which_nets_they_have(server: Running) -> None:
    listed = {model["id"]: model for model in server.client.get("/v1/models").json()["data"]}
    assert listed["mini"]["controls"] == {"canny": "canny", "depth": "depth"}
    assert listed["plain"]["controls"] == {}


# What is refused.

GIVEN = {"image": text(picture(1))}
SECRET = "/etc/passwd"


@pytest.mark.parametrize(
    ("control", "words"),
    [
        ({"cany": GIVEN}, "there is no ControlNet 'cany'"),
        ({"canny": SECRET}, "control.canny: Input should be a valid dictionary"),
        ({"canny": {"image": SECRET}}, "control.canny.image: must be a picture's file in base64"),
        ({"canny": {"image": text(picture(1)) + "!"}}, "control.canny.image: must be"),
        ({"canny": {"image": "aGVsbG8="}}, "control.canny.image must be a PNG, JPEG or WebP"),
        ({"canny": {"image": ""}}, "control.canny.image must be a PNG, JPEG or WebP"),
        ({"canny": {"image": 7}}, "control.canny.image: Input should be a valid bytes"),
        ({"canny": {"picture": SECRET}}, "no picture '/etc/passwd' — use one of: frame"),
        ({"canny": {}}, "control.canny: give image, or else picture"),
        ({"canny": {**GIVEN, "picture": "frame"}}, "control.canny: give image, or else picture"),
        ({"canny": {**GIVEN, "path": SECRET}}, "control.canny.path is no field of this request"),
        ({"canny": {**GIVEN, "scale": 101}}, "control.canny.scale: Input should be less than"),
        ({"canny": {**GIVEN, "end": -1}}, "control.canny.end: Input should be greater than"),
        ({"canny": {**GIVEN, "start": 0.5, "end": 0.5}}, "let it start before it ends"),
        ({"canny": {**GIVEN, "scale": "1"}}, "control.canny.scale: Input should be a valid number"),
        ([GIVEN], "control: Input should be a valid"),
    ],
)  # fmt: skip
def test_refused(server: Running, control: Any, words: str) -> None:
    found = error(server.client.post(GENERATIONS, json={**QUICK, "control": control}), 422)
    assert (found["param"], words in found["message"]) == ("control", True), found["message"]
    assert "root:" not in found["message"]


@pytest.mark.parametrize(
    ("fields", "files", "words"),
    [
        ({"control[canny]": SECRET}, {}, "control.canny: Input should be a valid dictionary"),
        ({"control[canny][image]": SECRET}, {}, "must be a picture's file in base64"),
        ({"control[canny][scale]": "much"}, {"control[canny]": file(picture(1))}, "scale: Input"),
        ({"control[canny][image]": GIVEN["image"]}, {"control[canny]": b"x"}, "given twice"),
        ({"control": "{}"}, {"control[canny]": b"x", "control[canny][image]": b"x"}, "given twice"),
        ({"control": "[]"}, {"control[canny]": b"x"}, "a form of its own"),
        ({}, {"control": b"x"}, "control must be text"),
        ({}, {"control[canny]": b"x"}, "control.canny.image must be a PNG"),
        ({"control[][scale]": "1"}, {}, "a form of its own"),
    ],
)
def test_refused_forms(
    server: Running, fields: dict[str, str], files: Mapping[str, bytes], words: str
) -> None:
    whole = {**{k: str(v) for k, v in QUICK.items()}, **fields}
    sent = {"image": file(picture(5)), **files}
    found = error(server.client.post(EDITS, data=whole, files=sent), 422)
    assert (found["param"], words in found["message"]) == ("control", True), found["message"]


def test_a_bundle_without_nets(server: Running) -> None:
    body = {**QUICK, "model": "plain", "control": {"canny": GIVEN}}
    found = error(server.client.post(GENERATIONS, json=body), 422)
    assert (found["param"], "--controlnet" in found["message"]) == ("control", True)


def test_pictures_of_the_server(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(file(picture(1)))
    (tmp_path / "text.png").write_text("no picture")
    found = read_pictures(named_files([f"a={tmp_path}/a.png"], "--control"), "--control")
    np.testing.assert_array_equal(found["a"], picture(1))
    for name, words in (("text.png", "is not a readable picture"), ("no.png", "no.png is missing")):
        with pytest.raises(UsageError, match=words):
            read_pictures({"a": tmp_path / name}, "--control")
