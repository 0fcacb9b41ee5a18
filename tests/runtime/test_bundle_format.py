"""docs/bundle-format.md is complete: who knows it alone draws the same pictures."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from conftest import psnr
from foreign_reader import Reader

from sd35_trt.dimensions import Defaults, Ranges
from sd35_trt.formats import band, bundle, calibration
from sd35_trt.runtime import Pipeline

DOCUMENT = (Path(__file__).parents[2] / "docs" / "bundle-format.md").read_text("utf-8")


@pytest.fixture(scope="module")
def reader(mini_bundle: Path) -> Reader:
    return Reader(mini_bundle)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp-2m"])
def test_a_foreign_reader_draws_the_same(reader: Reader, mini_bundle: Path, sampler: str) -> None:
    """The same numbers, but for how many texts and images an engine computes at once."""
    size = tuple(reader.manifest["defaults"]["size"])
    # Of 5 seeds they are equal, by any number of threads; engines that are off by 1e-5 give 74 dB.
    least = 70
    with Pipeline.load(mini_bundle, threads=1) as pipe:
        for prompt, seed in (("a large pink heart on a navy background", 7), ("x " * 200, 2**32)):
            ours = pipe.generate(prompt, seed=seed, steps=6, sampler=sampler, guidance=3.5)
            theirs = reader.draw(prompt, seed, 6, sampler, 3.5, size)
            assert psnr(theirs, ours.images[0]) > least
            again = pipe.generate(
                prompt, seed=seed, steps=9, sampler=sampler, image=theirs, strength=0.55
            )
            guidance = reader.manifest["defaults"]["guidance"]
            other = reader.draw(prompt, seed, 9, sampler, guidance, size, theirs, 0.55)
            assert psnr(other, again.images[0]) > least
            assert not np.array_equal(other, theirs)


@pytest.mark.parametrize(
    "kind",
    [
        bundle.Manifest, bundle.ModelRecord, bundle.PolicyRecord, bundle.PolicyRule,
        bundle.Scheduler, bundle.Tokenizer, bundle.Component, bundle.AdapterGroup,
        bundle.LoraRecord, bundle.Port, bundle.File, Ranges, Defaults,
        band.LatentStatistics, calibration.Provenance,
    ],
)  # fmt: skip
def test_every_field_is_described(kind: type[msgspec.Struct]) -> None:
    for name in kind.__struct_fields__:
        assert f"`{name}`" in DOCUMENT, name
