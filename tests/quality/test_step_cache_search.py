"""Finding a bundle's short steps: what is refused, and how many full ones are taken."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from bare_bundle import write_bundle
from click.testing import CliRunner

from sd35_trt.cli import main
from sd35_trt.errors import UsageError
from sd35_trt.formats.step_cache import Key, StepPlan, read_step_cache
from sd35_trt.mini import checkpoint_path, step_cache_path
from sd35_trt.quality.step_cache import (
    ERROR,
    StepCacheOptions,
    _find,
    find_step_cache,
    step_weights,
)


class MadeUp:
    """Pictures whose last latents are off by how many steps are short, in thousandths."""

    def __len__(self) -> int:
        return 3

    def exact(self, key: Key, drawn: Callable[[], None]) -> tuple[np.ndarray, np.ndarray]:
        changes = np.cumsum(np.random.default_rng(0).normal(size=(key[0], 30)), 0)
        return np.ones((3, 1, 2, 2)), changes @ changes.T

    def short(self, plan: StepPlan, drawn: Callable[[], None]) -> np.ndarray:
        return np.ones((3, 1, 2, 2)) * (1 + plan.short / 1000)


@pytest.mark.parametrize(("most", "short"), [(0.005, 5), (0.0005, 0), (0.5, 10)])
def test_the_fewest_full_steps_within_the_error(most: float, short: int) -> None:
    seen: list[tuple[float, float]] = []
    plan, errors = _find(
        MadeUp(),  # type: ignore[arg-type]
        (12, "euler", 3.0),
        most,
        lambda stage, done, total, note="": seen.append((done, total)),
    )
    assert plan.short == short
    assert plan.error == errors.median == pytest.approx(short / 1000)
    assert seen[-1][0] == seen[-1][1]


def test_the_packaged_one_is_of_the_packaged_transformer() -> None:
    cache = read_step_cache(step_cache_path())
    folder = checkpoint_path()
    digests = {name: sha256((folder / name).read_bytes()).hexdigest() for name in cache.files}
    assert "transformer/config.json" in cache.files
    cache.check_model(digests, "the packaged one")
    plan = cache.plan(28, "euler", 3.0)
    assert plan is not None
    assert plan.error <= ERROR
    assert cache.speed(plan) >= 1.7


@pytest.mark.parametrize("sampler", ["euler", "dpmpp-2m"])
def test_weights_are_those_of_the_sampler(sampler: str) -> None:
    weights = step_weights(10, sampler, 3.0)
    assert weights.shape == (10,)
    assert (weights > 0).all()


def test_a_bundle_without_short_steps_is_refused(tmp_path: Path) -> None:
    write_bundle(tmp_path / "plain")
    with pytest.raises(UsageError, match="without short steps — build it with: sd35-trt build"):
        find_step_cache(StepCacheOptions(tmp_path / "plain"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--step-cache", "B", "--policy", "fp8", "--out", "c.json"], "takes no --policy"),
        (["--step-cache", "B", "--model", "mini", "--out", "c.json"], "takes no --model"),
        (["--plan", "28", "euler", "3", "--out", "c"], "need --step-cache"),
        (["--step-cache-error", "0.1", "--out", "c"], "need --step-cache"),
        (["--step-cache", "B", "--out", "none/c.json"], "a file in a folder there is"),
        (["--step-cache", "B", "--out", "c", "--size", "1x1", "--size", "2x2"], "--size"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(
    arguments: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["calibrate", *arguments])
    assert result.exit_code == 2
    assert reason in result.output
    assert list(tmp_path.iterdir()) == []
