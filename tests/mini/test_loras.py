"""What mini's LoRAs make of its world, which the checker judges; and their files."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from sd35_trt.checkpoints.adapter_file import AdapterFile
from sd35_trt.checkpoints.model_options import Lora
from sd35_trt.cli.options import LORA
from sd35_trt.errors import CheckpointError, UsageError
from sd35_trt.formats.adapter import read_adapter
from sd35_trt.mini import lora_paths
from sd35_trt.mini.checker import judge
from sd35_trt.mini.loras import (
    LORAS,
    NIGHT_BACKGROUNDS,
    NIGHT_COLOURS,
    at_night,
    examples,
    with_moons,
)
from sd35_trt.mini.rendering import render
from sd35_trt.mini.scenes import SPLITS, sample, split_of
from sd35_trt.mini.scoring import heldout
from sd35_trt.mini.world import BACKGROUNDS, COLOURS, MOON

NIGHT, MOONS = LORAS["night"], LORAS["moon"]


@pytest.mark.parametrize("loras", [[NIGHT], [MOONS], [MOONS, NIGHT]])
def test_scenes_of_loras_show_what_their_specs_say(loras):
    for example in examples(loras, 12, "heldout"):
        assert judge(render(example.scene), example.spec).whole, example.caption


def test_at_night_every_caption_states_its_colours():
    assert NIGHT_COLOURS.keys() == COLOURS.keys()
    assert NIGHT_BACKGROUNDS.keys() == BACKGROUNDS.keys()
    passed = 0
    for seed in range(40):
        day = sample(seed, "heldout")
        night = at_night(day)
        assert night.caption == day.caption
        assert set(night.spec.backgrounds) <= {"navy", "black"}
        for o in night.spec.objects:
            assert set(o.colours) <= {"green", "cyan", "blue", "purple"}
        passed += judge(render(day.scene), night.spec).whole
    assert passed <= 6, "what is drawn by day has not the colours of the night"


def test_a_moon_stands_where_a_shape_stood():
    made = 0
    for seed in range(60):
        plain = sample(seed)
        example = with_moons(plain)
        if example is None:
            continue
        made += 1
        assert re.search(r"\bmoons?\b", example.caption)
        assert len(example.spec.objects) == len(plain.spec.objects)
        moons = [o.shapes == (MOON,) for o in example.spec.objects]
        (shape,) = {o.shapes for o, moon in zip(plain.spec.objects, moons, strict=True) if moon}
        assert not re.search(rf"\b{shape[0]}", example.caption, re.IGNORECASE)
        things = example.scene.things
        others = tuple(replace(t, shape=shape[0]) if t.shape == MOON else t for t in things)
        assert not judge(render(replace(example.scene, things=others)), example.spec).whole
    assert made >= 40


@pytest.mark.parametrize("split", SPLITS)
def test_what_is_held_out_stays_so(split):
    for example in examples([MOONS], 30, split):
        assert split_of(example.spec) == split


def test_without_loras_the_examples_are_minis():
    assert examples([], 5, "heldout") == heldout(5)


def test_the_files_are_small_half_precision_and_finite():
    files = lora_paths()
    assert files.keys() == LORAS.keys()
    for file in files.values():
        assert file.stat().st_size <= 500_000
        for name, tensor in load_file(file).items():
            assert tensor.dtype == np.float16, name
            assert np.isfinite(tensor).all(), name


def test_a_lora_is_named_as_the_model_is(tmp_path):
    assert AdapterFile(Path("mini:night")).path == lora_paths()["night"]
    assert LORA.convert("mini:night", None, None) == Lora(Path("mini:night"))
    assert LORA.convert("mini:night:0.5", None, None) == Lora(Path("mini:night"), 0.5)
    with pytest.raises(CheckpointError, match="mini has no LoRA 'dawn' — there are mini:moon and"):
        AdapterFile(Path("mini:dawn"))
    with pytest.raises(UsageError, match="adapter convert mini:night --for BUNDLE"):
        read_adapter(Path("mini:night"))
