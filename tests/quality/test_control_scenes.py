"""What mini draws with its ControlNet, judged by the scenes' checker."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mini.training.edges import pictures_of
from sd35_trt.checkpoints.model_options import ControlNet
from sd35_trt.mini.checker import find, judge_detections
from sd35_trt.mini.outlines import follows
from sd35_trt.mini.rendering import render
from sd35_trt.mini.scoring import heldout
from sd35_trt.runtime import Control, Pipeline

SHOWN = heldout(8)
EDGES = np.load(Path(__file__).parents[1] / "mini" / "training" / "edges.npz")["edges"]


@pytest.fixture(scope="module", params=["half", "fp8"])
def pipe(request: pytest.FixtureRequest, make_bundle: Callable[..., Path]) -> Iterator[Pipeline]:
    net = ControlNet("canny", "mini:canny")
    with Pipeline.load(make_bundle(policy=request.param, controlnets=(net,))) as loaded:
        yield loaded


def draw(pipe: Pipeline, scale: float | None) -> np.ndarray:
    """Each caption with the edges of its own scene; None draws without a net."""
    images = []
    for seed, (example, edges) in enumerate(zip(SHOWN, pictures_of(EDGES), strict=True)):
        controls = None if scale is None else {"canny": Control(edges, scale)}
        result = pipe.generate(example.caption, seed=seed, steps=14, controls=controls)
        images.append(result.images[0])
    return np.stack(images)


@pytest.mark.nightly
def test_outlines_and_captions_are_followed(pipe: Pipeline) -> None:
    followed, right = 0, 0
    for image, example in zip(draw(pipe, 1.0), SHOWN, strict=True):
        ground, things = find(image)
        followed += follows(things, example.scene)
        right += judge_detections(ground, things, example.spec).whole
    assert followed >= 7
    assert right >= 7
    alone = draw(pipe, None)
    pairs = list(zip(alone, SHOWN, strict=True))
    assert sum(follows(find(image)[1], e.scene) for image, e in pairs) <= 1
    assert np.array_equal(draw(pipe, 0.0), alone)


@pytest.mark.nightly
def test_edges_of_a_picture_are_taken(pipe: Pipeline) -> None:
    pytest.importorskip("cv2", reason="the extra control is not installed")
    for example, edges in zip(SHOWN, pictures_of(EDGES), strict=True):
        control = Control(render(example.scene), edges=True)
        (use,) = pipe.request(example.caption, controls={"canny": control}).controls
        assert (use.pictures[0] != edges).mean() < 1e-3
