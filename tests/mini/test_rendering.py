"""Pictures of scenes, and the distances that they are drawn from."""

import numpy as np
import pytest

from sd35_trt.mini.rendering import render, shape_distance
from sd35_trt.mini.scenes import sample
from sd35_trt.mini.world import BACKGROUNDS, COLOURS, DRAWN_SHAPES, SIZE


def test_rendering_shows_the_colours_at_the_centres():
    for seed in range(30):
        scene = sample(seed).scene
        image = render(scene)
        assert image.shape == (SIZE, SIZE, 3)
        assert tuple(image[0, 0]) == BACKGROUNDS[scene.background]
        for thing in scene.things:
            centre = image[int(thing.y), int(thing.x)]
            filled = thing.shape != "ring"
            palette = COLOURS[thing.colour] if filled else image[0, 0]
            assert tuple(centre) == tuple(palette)


@pytest.mark.parametrize("shape", DRAWN_SHAPES)
def test_distances_have_slope_one_outside(shape):
    x, y = np.array([3.0, -2.5]), np.array([0.5, 2.0])
    step = 1e-4
    dx = (shape_distance(shape, x + step, y) - shape_distance(shape, x, y)) / step
    dy = (shape_distance(shape, x, y + step) - shape_distance(shape, x, y)) / step
    np.testing.assert_allclose(np.hypot(dx, dy), 1, atol=1e-3)
    assert (shape_distance(shape, x, y) > 0).all()
