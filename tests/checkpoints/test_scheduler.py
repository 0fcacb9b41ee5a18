"""A scheduler is computed as diffusers computes it, or refused in one line before any work."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import diffusers.schedulers
import numpy as np
import pytest
from diffusers import FlowMatchEulerDiscreteScheduler

from sd35_trt.build import BuildOptions, build
from sd35_trt.checkpoints.diffusers import Checkpoint
from sd35_trt.checkpoints.look import look, look_at_structure
from sd35_trt.checkpoints.model_options import ModelOptions
from sd35_trt.checkpoints.scheduler import find_scheduler, write_scheduler
from sd35_trt.errors import CheckpointError, UsageError
from sd35_trt.formats.bundle import Bundle, Scheduler, sha256_file
from sd35_trt.mini import checkpoint_path
from sd35_trt.runtime.schedule import make_sigmas
from sd35_trt.store.cache import StageCache

EULER = "FlowMatchEulerDiscreteScheduler"
MINI = Checkpoint(checkpoint_path())


def written(folder: Path, **config: Any) -> Path:
    """A folder with a configuration of diffusers' Euler scheduler, unless the class is given."""
    folder.mkdir(exist_ok=True)
    (folder / "scheduler_config.json").write_text(json.dumps({"_class_name": EULER, **config}))
    return folder


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        find_scheduler(MINI, folder)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{folder / 'scheduler_config.json'} ")
    assert "--scheduler FILE" in message
    for word in words:
        assert word in message, message


def check_sigmas(folder: Path, steps: int) -> None:
    """That the schedule is the one of diffusers' object that is loaded from the folder."""
    values = find_scheduler(MINI, folder).values
    theirs = FlowMatchEulerDiscreteScheduler.from_pretrained(folder)
    theirs.set_timesteps(steps)
    ours = make_sigmas(steps, values.shift, int(values.num_train_timesteps))
    np.testing.assert_allclose(ours, theirs.sigmas.numpy(), atol=3e-6)
    timesteps = ours[:-1] * np.float32(values.num_train_timesteps)
    np.testing.assert_allclose(timesteps, theirs.timesteps.numpy(), rtol=3e-6, atol=1e-3)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"shift": 3},
        {"shift": 0.1},
        {"shift": 1000.0},
        {"shift": 5.0, "num_train_timesteps": 1},
        {"num_train_timesteps": 10},
        {"shift": 1.5, "num_train_timesteps": 4000},
    ],
    ids=str,
)
@pytest.mark.parametrize("steps", [1, 2, 28, 1000])
def test_the_schedule_is_diffusers(config: dict[str, Any], steps: int, tmp_path: Path) -> None:
    check_sigmas(written(tmp_path, **config), steps)


def test_a_shift_that_is_missing_is_diffusers(tmp_path: Path) -> None:
    assert find_scheduler(MINI, written(tmp_path)).values == Scheduler(1.0, 1000.0)


#: Another value than its default for every parameter.
OTHER = {
    "num_train_timesteps": 500, "shift": 2.0, "base_shift": 0.7, "max_shift": 2.0,
    "base_image_seq_len": 100, "max_image_seq_len": 5000, "time_shift_type": "linear",
    "shift_terminal": 0.1,
}  # fmt: skip

PARAMETERS = {
    name: parameter.default
    for name, parameter in inspect.signature(FlowMatchEulerDiscreteScheduler).parameters.items()
}


@pytest.mark.parametrize("option", PARAMETERS)
def test_every_option_is_exact_or_refused(option: str, tmp_path: Path) -> None:
    """Those that the installed diffusers knows, a newer one's among them."""
    default = PARAMETERS[option]
    value = OTHER.get(option, not default)
    assert value != default
    check_sigmas(written(tmp_path, **{"shift": 3.0, option: default}), 9)
    folder = written(tmp_path, **{"shift": 3.0, option: value})
    if default is False or option == "shift_terminal":
        refused(folder, f"sets {option} = {json.dumps(value)}")
    else:
        check_sigmas(folder, 9)


def test_options_as_others_spell_them(tmp_path: Path) -> None:
    """What diffusers takes for true is refused; what it does not know, it ignores."""
    refused(written(tmp_path, use_karras_sigmas=1, invert_sigmas="yes"), "use_karras_sigmas = 1, ")
    refused(written(tmp_path, time_shift_type="cubic"), 'time_shift_type = "cubic"')
    refused(written(tmp_path, time_shift_type=None), "time_shift_type = null")
    left = {"shift_terminal": None, "use_beta_sigmas": 0, "flow_shift": 6.0, "solver_order": 2}
    check_sigmas(written(tmp_path, **left), 5)


CLASSES = sorted(
    name
    for name in dir(diffusers.schedulers)
    if name.endswith("Scheduler") and name != EULER and not name.startswith("_")
)


def test_other_classes_are_refused_by_name(tmp_path: Path) -> None:
    assert {
        "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "DPMSolverMultistepScheduler",
        "EulerDiscreteScheduler", "UniPCMultistepScheduler",
    } <= set(CLASSES)  # fmt: skip
    for name in CLASSES:
        folder = written(tmp_path, _class_name=name, shift=3.0, use_flow_sigmas=True)
        refused(folder, f"asks for {name}, which is not computed here")
    for name in ("", 7, ["diffusers", EULER], EULER.lower()):
        refused(written(tmp_path, _class_name=name), f"asks for {name}")
    for missing in ({"_class_name": None}, {}):
        (tmp_path / "scheduler_config.json").write_text(json.dumps({"shift": 3.0, **missing}))
        refused(tmp_path, "names no scheduler")


@pytest.mark.parametrize(
    "value",
    ["0", "-1", "-0.0", "null", "NaN", "Infinity", '"3.0"', "true", "false", "[3.0]", "{}", "1e-9",
     "1e9", "1" + "0" * 400],
)  # fmt: skip
@pytest.mark.parametrize("key", ["shift", "num_train_timesteps"])
def test_numbers_that_are_none(key: str, value: str, tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    path.write_text(f'{{"_class_name": "{EULER}", "{key}": {value}}}')
    refused(tmp_path, f"has {key} = ", "number from")


def test_training_timesteps_are_whole(tmp_path: Path) -> None:
    """diffusers cannot load a fraction."""
    refused(
        written(tmp_path, num_train_timesteps=999.5), "num_train_timesteps = 999.5, not a whole"
    )


def test_a_file_that_is_no_configuration(tmp_path: Path) -> None:
    path = tmp_path / "scheduler_config.json"
    for content in (b"", b"{", b"[]", b"\xff\xfe", b"version https://git-lfs.github.com/spec/v1\n"):
        path.write_bytes(content)
        refused(tmp_path)
    with pytest.raises(CheckpointError, match="names no scheduler"):
        find_scheduler(MINI, checkpoint_path() / "text_encoder" / "config.json")
    with pytest.raises(CheckpointError, match="asks for AutoencoderKL"):
        find_scheduler(MINI, checkpoint_path() / "vae" / "config.json")


# The model's own, and another in its place.


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """mini's checkpoint, to be changed."""
    return Path(shutil.copytree(checkpoint_path(), tmp_path / "model"))


def listed(root: Path, entry: object) -> str:
    """The model with another scheduler in its index."""
    path = root / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scheduler": entry}))
    return str(root)


def test_the_models_own(copy: Path, tmp_path: Path) -> None:
    own = look(ModelOptions(str(copy))).scheduler
    assert own.values == Scheduler(3.0, 1000.0)
    assert own.file == copy / "scheduler" / "scheduler_config.json"
    digest = sha256_file(own.file)
    assert own.hashes(StageCache(tmp_path)) == {"scheduler/scheduler_config.json": digest}
    written(copy / "scheduler", shift=5.0)
    assert look(ModelOptions(str(copy))).scheduler.values == Scheduler(5.0, 1000.0)
    (copy / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"scheduler_config\.json is missing .*--scheduler"):
        look(ModelOptions(str(copy)))


def test_the_class_is_the_indexs(copy: Path) -> None:
    """As in diffusers, which does not read it from the configuration."""
    heun = "FlowMatchHeunDiscreteScheduler"
    for entry in (["diffusers", heun], ["my_scheduler", EULER], heun, [heun]):
        with pytest.raises(CheckpointError, match=r"model_index\.json lists .* not computed here"):
            look(ModelOptions(listed(copy, entry)))
    (copy / "scheduler" / "scheduler_config.json").write_text('{"shift": 2.0}')
    model = listed(copy, ["diffusers", EULER])
    assert look(ModelOptions(model)).scheduler.values.shift == 2.0
    for entry in (None, [None, None]):
        with pytest.raises(CheckpointError, match="names no scheduler"):
            look(ModelOptions(listed(copy, entry)))


def test_another_in_its_place(copy: Path, tmp_path: Path) -> None:
    model = listed(copy, ["diffusers", "UniPCMultistepScheduler"])
    shutil.rmtree(copy / "scheduler")
    other = written(tmp_path / "other", shift=1.5)
    file = other / "scheduler_config.json"
    renamed = shutil.copy(file, tmp_path / "mine.json")
    shutil.copytree(other, tmp_path / "whole" / "scheduler")
    for path in (file, other, renamed, tmp_path / "whole"):
        source = look(ModelOptions(model, scheduler=path)).scheduler
        assert source.values == Scheduler(1.5, 1000.0)
        digest = {"scheduler/scheduler_config.json": sha256_file(file)}
        assert source.hashes(StageCache(tmp_path / "cache")) == digest
    assert look_at_structure(ModelOptions("large", scheduler=file)).scheduler.values.shift == 1.5
    for path, words in ((tmp_path / "none", "none is missing"), (copy, "has no scheduler_config")):
        with pytest.raises(UsageError, match=f"{words}.* — give a scheduler_config.json"):
            look(ModelOptions(model, scheduler=path))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    values = Scheduler(2.5, 500.0)
    assert find_scheduler(MINI, write_scheduler(tmp_path, values)).values == values


def test_a_model_without_one_is_drawn_as_the_published() -> None:
    source = look_at_structure(ModelOptions("medium")).scheduler
    assert (source.values, source.file) == (Scheduler(3.0, 1000.0), None)


@pytest.mark.nightly
def test_in_the_bundle_and_in_its_twin(
    copy: Path, tmp_path: Path, stage_cache: Path, make_bundle: Any
) -> None:
    """The manifest has its values and its hash; what it is compared with has the same."""
    from sd35_trt.quality.reference import check_comparable, open_reference

    scheduler = written(tmp_path / "other", shift=1.5)
    model = listed(copy, ["diffusers", "FlowMatchHeunDiscreteScheduler"])
    options = {"scheduler": scheduler, "variant": "custom"}
    out = build(BuildOptions(model, out=tmp_path / "out", cache_dir=stage_cache, **options))  # type: ignore[arg-type]
    bundle = Bundle.open(out)
    manifest = bundle.manifest
    assert manifest.scheduler == Scheduler(1.5, 1000.0)
    assert (manifest.model.variant, manifest.defaults.guidance) == ("custom", 4.5)
    digest = sha256_file(scheduler / "scheduler_config.json")
    assert manifest.model.files["scheduler/scheduler_config.json"] == digest
    with open_reference(bundle, "half", ModelOptions(model), stage_cache, lambda *_: None) as twin:
        check_comparable(twin, bundle)
        assert twin.manifest.scheduler == manifest.scheduler
