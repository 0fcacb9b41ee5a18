"""Which bundles can be compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec import Raw
from msgspec.structs import replace

from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.dimensions import Ranges
from sd35_trt.errors import BundleError, UsageError
from sd35_trt.formats.bundle import Bundle, Scheduler
from sd35_trt.formats.calibration import Calibration, CalibrationExtract, Provenance
from sd35_trt.quality.reference import check_comparable, open_reference


@pytest.fixture
def candidate(mini_bundle: Path) -> Bundle:
    return Bundle.open(mini_bundle)


def changed(bundle: Bundle, **fields: Any) -> Bundle:
    return Bundle(Path("other"), replace(bundle.manifest, **fields))


def with_ranges(bundle: Bundle, **bounds: Any) -> Bundle:
    return changed(bundle, ranges=replace(bundle.manifest.ranges, **bounds))


def test_what_two_bundles_have_in_common(candidate: Bundle) -> None:
    common = check_comparable(candidate, candidate)
    assert common.batch == candidate.manifest.ranges.batch
    assert common.size == candidate.manifest.defaults.size
    other = with_ranges(candidate, batch=(2, 16))
    assert check_comparable(other, candidate).batch == (2, candidate.manifest.ranges.batch[1])


def test_other_models_and_options_are_refused(candidate: Bundle) -> None:
    m = candidate.manifest
    files = {**m.model.files, "transformer/diffusion_pytorch_model.safetensors": "0" * 64}
    low = m.ranges.size[1] + m.ranges.size_step
    cases = [
        (changed(candidate, model=replace(m.model, variant="large")), "different models: mini and"),
        (changed(candidate, model=replace(m.model, files=files)), "different checkpoints (trans"),
        (changed(candidate, guided=False), "differ in guidance in the graph: True and False"),
        (changed(candidate, scheduler=Scheduler(9.0, 1000.0)), "differ in scheduler"),
        (changed(candidate, components=m.components[1:]), "differ in components"),
        (changed(candidate, defaults=replace(m.defaults, t5_tokens=99)), "differ in text lengths"),
        (with_ranges(candidate, batch=(50, 60)), "no common batch: 1 to 4 and 50 to 60"),
        (changed(candidate, ranges=Ranges((1, 4), (low, low), 64, m.ranges.t5_tokens)),
         "other does not draw 128x128"),
    ]  # fmt: skip
    for other, words in cases:
        with pytest.raises(BundleError) as caught:
            check_comparable(other, candidate)
        message = str(caught.value)
        assert words in message
        assert " — " in message
        assert "\n" not in message


def test_half_needs_the_checkpoint(candidate: Bundle, tmp_path: Path) -> None:
    """Refused by its hashes, before anything is built."""
    files = dict.fromkeys(candidate.manifest.model.files, "0" * 64)
    other = changed(candidate, model=replace(candidate.manifest.model, files=files))
    counted: list[str] = []
    for model, words in ((None, "the packaged mini"), (str(tmp_path), f"{tmp_path} (")):
        with (
            pytest.raises(BundleError, match="name its checkpoint with --model DIR") as caught,
            open_reference(
                other,
                "half",
                model and ModelOptions(model),
                tmp_path / "cache",
                lambda *a: counted.append(a),
            ),
        ):
            pass
        assert words in str(caught.value)
    assert not counted


def test_model_is_for_half(candidate: Bundle, mini_bundle: Path) -> None:
    with (
        pytest.raises(UsageError, match="needs no checkpoint — leave out --model mini"),
        open_reference(candidate, str(mini_bundle), ModelOptions(), None, lambda *_: None),
    ):
        pass


def test_the_candidates_calibration_is_read_back(candidate: Bundle, tmp_path: Path) -> None:
    """What the manifest keeps of it is all that the twin's range guard needs."""
    artifact = Calibration(
        {"denoiser/transformer_blocks.0.attn.to_q": 3.25},
        {"denoiser/transformer_blocks.0": 20_000.1, "t5/encoder.block.3": 1e-3},
        {"denoiser/transformer_blocks.0.attn.q": 7.5},
        Provenance(variant="mini", files={"a": "b" * 64}),
        {"later": Raw(b'"a newer version wrote it"')},
    )
    (tmp_path / "calibration.json").write_bytes(CalibrationExtract(artifact).encode())
    extract = CalibrationExtract.of(Bundle(tmp_path, candidate.manifest)).calibration
    assert extract == artifact
    assert extract.digest() == artifact.digest()
