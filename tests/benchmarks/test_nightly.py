"""The nightly benchmark: its matrix, its history, and what it calls a regression."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in ("history", "nightly", "trends"):
        sys.modules.pop(name, None)


def entry(run: int, total: float, host: str = "a", **changes: Any) -> dict[str, Any]:
    settings = {"steps": 28, "size": [128, 128], "batch": 1, "guidance": 3.0, "device": "cpu",
                "runs": 7, "warmup": 2}  # fmt: skip
    return {
        "format": 1,
        "run": f"run {run}",
        "date": f"2026-07-{1 + run % 28:02}T00:00:00+00:00",
        "commit": "0123456789abcdef",
        "dirty": False,
        "case": "mini",
        "build": {"gpu": "cpu"},
        "bench": {},
        "status": "ok",
        "host": {"name": host, "cpu": "CPU", "cores": 2},
        "device": {"kind": "cpu", "name": "cpu"},
        "settings": settings,
        "bundle": {"model": "mini", "policy": "fp32", "target": "cpu", "builder": "onnxruntime"},
        "images_per_second": 1 / total,
        "notes": [],
        "disturbed": False,
        "figures": {"total": {"value": total, "p10": 0.98 * total, "p90": 1.02 * total}},
    } | changes


NOISE = (1.0, 1.004, 0.997, 1.002, 0.995, 1.001, 0.999, 1.003)


def verdict(totals: Sequence[float]) -> str:
    import history

    entries = [entry(i, total) for i, total in enumerate(totals)]
    (one,) = history.series(entries)
    (finding,) = history.judge(one)
    return finding.verdict


def test_steady_noise_is_no_regression() -> None:
    for newest in (1.0, 1.02, 0.98, 1.029):
        assert verdict([*NOISE, newest]) == "same"


def test_ten_percent_is_a_regression() -> None:
    assert verdict([*NOISE, 1.1]) == "worse"
    assert verdict([*NOISE, 0.9]) == "better"


def test_a_noisy_figure_needs_a_larger_change() -> None:
    noisy = [1.0, 1.12, 0.9, 1.05, 0.93, 1.1, 0.88, 1.02]
    assert verdict([*noisy, 1.15]) == "same"
    assert verdict([*noisy, 2.0]) == "worse"


def test_few_runs_say_little_about_the_noise() -> None:
    # As measured on a shared machine: nothing had changed.
    assert verdict([233, 204, 208, 237]) == "same"
    assert verdict([1.0, 1.002, 0.999, 1.1]) == "worse"


def test_one_outlier_does_not_hide_a_regression() -> None:
    assert verdict([1.0, 1.001, 5.0, 0.999, 1.002, 1.0, 1.1]) == "worse"


def test_nothing_is_judged_before_three_runs() -> None:
    assert verdict([1.0]) == "new"
    assert verdict([1.0, 1.0, 2.0]) == "new"
    assert verdict([1.0, 1.0, 1.0, 2.0]) == "worse"


def test_old_runs_are_forgotten() -> None:
    assert verdict([2.0] * 20 + [1.0] * 10 + [1.1]) == "worse"


def test_what_differs_is_not_compared() -> None:
    import history

    before = [entry(i, 1.0) for i in range(5)]
    settings = {**before[0]["settings"], "steps": 14}
    others = [
        entry(5, 2.0, host="b"),
        entry(5, 2.0, case="other"),
        entry(5, 2.0, settings=settings),
        entry(5, 2.0, build={"gpu": "cpu", "policy": "half"}),
        entry(5, 2.0, device={"kind": "cuda", "name": "H100"}),
        entry(5, 2.0, bench={"against": "diffusers"}),
    ]
    for other in others:
        series = history.series([*before, other])
        assert len(series) == 2
        assert [f.verdict for f in history.judge(series[0])] == ["new"]
    # How often it was measured does not matter.
    again = entry(5, 2.0, settings={**before[0]["settings"], "runs": 9}, bench={"runs": 9})
    (one,) = history.series([*before, again])
    assert [f.verdict for f in history.judge(one)] == ["worse"]


def test_a_regression_has_to_be_seen_twice() -> None:
    import history

    before = [entry(i, 1.0) for i in range(5)]
    for second, expected in ((1.01, "same"), (1.2, "worse")):
        (one,) = history.series([*before, entry(5, 1.3), entry(5, second)])
        assert len(one.runs) == 6
        assert [f.verdict for f in history.judge(one)] == [expected]


def test_what_was_disturbed_is_neither_judged_nor_compared_with() -> None:
    import history

    before = [entry(i, total) for i, total in enumerate(NOISE)]
    before[2:2] = [entry(20 + i, 3.0, disturbed=True) for i in range(4)]
    (one,) = history.series([*before, entry(9, 1.1)])
    assert [f.verdict for f in history.judge(one)] == ["worse"]
    (one,) = history.series([*before, entry(9, 2.0, disturbed=True)])
    assert [(f.verdict, f.value) for f in history.judge(one)] == [("disturbed", 2.0)]
    (one,) = history.series([*before, entry(9, 2.0, disturbed=True), entry(9, 1.0)])
    assert [(f.verdict, f.value) for f in history.judge(one)] == [("same", 1.0)]


def test_history_survives_a_torn_line(tmp_path: Path) -> None:
    import history

    path = tmp_path / "history.jsonl"
    assert history.read(path) == []
    for i in range(2):
        history.append(path, entry(i, 1.0))
    whole = path.read_bytes()
    assert whole.count(b"\n") == 2
    path.write_bytes(whole + whole[:100])  # a crash while the third was written
    with pytest.warns(UserWarning, match="history.jsonl:3 is torn"):
        assert len(history.read(path)) == 2
    history.append(path, entry(3, 3.0))
    with pytest.warns(UserWarning, match="history.jsonl:3 is torn"):
        entries = history.read(path)
    assert [e["figures"]["total"]["value"] for e in entries] == [1.0, 1.0, 3.0]
    assert path.read_bytes().startswith(whole)


def test_lines_of_another_format_are_left_out(tmp_path: Path) -> None:
    import history

    path = tmp_path / "history.jsonl"
    history.append(path, entry(0, 1.0, format=99))
    with pytest.warns(UserWarning, match="is not of format 1"):
        assert history.read(path) == []


def test_page_shows_what_is_worse() -> None:
    from trends import render

    entries = [entry(i, total) for i, total in enumerate(NOISE)]
    entries += [entry(8, 1.3), entry(8, 0.5, case="other"), {
        **entry(8, 1.0, case="<broken>"), "status": "failed", "error": "build: no <model>",
    }]  # fmt: skip
    page = render(entries, "run 8", 10)
    assert "mini: end to end is worse: 1.30 s, +29.9 %" in page
    assert "&lt;broken&gt;: failed: build: no &lt;model&gt;" in page
    assert "Cases: 3, of which 1 failed. Figures: 2, of which 1 are worse" in page
    assert "too few runs" in page
    assert page.count("<svg") == 2
    for outside in ("http://", "https://", "src=", "@import"):
        assert outside not in page


def write_matrix(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def call(*arguments: object) -> Result:
    import nightly

    return CliRunner().invoke(nightly.main, [str(a) for a in arguments])


MATRIX = """
[bench]
runs = 1
warmup = 1
steps = 2
size = "64x64"
[[case]]
name = "broken"
build = { model = "$SD35_NO_SUCH_VARIABLE/model" }
[[case]]
name = "refused"
bench = { batch = 9 }
[[case]]
name = "good"
serve = { size = "64x64", steps = 2, seconds = 1, count = 5 }
"""


@pytest.mark.nightly
def test_a_failing_case_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, stage_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import history

    monkeypatch.setenv("SD35_TRT_CACHE", str(stage_cache))
    matrix = write_matrix(tmp_path / "matrix.toml", MATRIX)
    journal, page = tmp_path / "h" / "history.jsonl", tmp_path / "p" / "page.html"
    result = call(matrix, "--history", journal, "--page", page, "--work", tmp_path / "work")
    assert result.exit_code == 1, result.output
    entries = history.read(journal)
    # More than one of the good case where this machine is busy.
    assert list(dict.fromkeys((e["case"], e["status"]) for e in entries)) == [
        ("broken", "failed"), ("refused", "failed"), ("good", "ok")
    ]  # fmt: skip
    assert "SD35_NO_SUCH_VARIABLE/model names a variable that is not set" in entries[0]["error"]
    assert entries[1]["error"].startswith("bench: 9 images at once, this bundle draws 1 to 4")
    assert "failed: broken: " in result.output
    good = entries[2]
    own = {"total", "step", "text", "load", "host_memory", "server", "alone", "joined"}
    assert own <= good["figures"].keys()
    assert not list((tmp_path / "work").glob("*-serve.json"))
    assert {"commit", "date", "versions", "settings", "host", "device"} <= good.keys()
    assert len({e["run"] for e in entries}) == 1
    text = page.read_text("utf-8")
    assert "broken: failed" in text
    assert "<h2>good</h2>" in text


ONE = '[[case]]\nname = "mini"\n[[case]]\nname = "mini-gpu"\nbuild = { gpu = "auto" }\n'


@pytest.mark.parametrize(
    ("newest", "measured", "status", "words"),
    [
        ([1.0], 1, 0, ""),
        ([1.2, 1.2], 2, 1, "regression: mini: end to end is worse: 1.20 s, +20.0 %"),
        ([1.2, 1.0], 2, 0, "measuring again"),
        ([0.8], 1, 0, "improvement: mini: end to end is better: 800 ms, -20.0 %"),
        # Negative: while other processes were busy.
        ([-2.0, 1.0], 2, 0, "the machine was busy, measuring again"),
        ([-2.0, 1.2, 1.2], 3, 1, "regression: mini: end to end is worse"),
        ([-2.0, -2.0, -2.0], 3, 0, "not judged: mini: other processes kept the machine busy"),
    ],
)
def test_status(
    newest: list[float],
    measured: int,
    status: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import history
    import nightly

    journal = tmp_path / "history.jsonl"
    for i in range(5):
        history.append(journal, entry(i, 1.0, build={}))
    values = iter(newest)

    def measure(case: object, work: Path) -> dict[str, Any]:
        value = next(values)
        made = entry(9, abs(value), disturbed=value < 0)
        own = ("format", "run", "date", "commit", "dirty", "case", "build", "bench")
        return {key: value for key, value in made.items() if key not in own}

    monkeypatch.setattr(nightly, "measure", measure)
    matrix = write_matrix(tmp_path / "matrix.toml", ONE)
    result = call(
        matrix, "--history", journal, "--page", tmp_path / "page.html", "--gpu", "cpu",
        "--work", tmp_path / "work",
    )  # fmt: skip
    assert result.exit_code == status, result.output
    assert words in result.output
    assert len(history.read(journal)) == 5 + measured
    assert ("worse" in (tmp_path / "page.html").read_text("utf-8").split("<h2>")[1]) == bool(status)


def test_wrong_matrices(tmp_path: Path) -> None:
    cases = [
        ("", "has no [[case]]"),
        ("colour = 1", "unknown key 'colour'"),
        ("[[case]]\nname = 'a b'", "a name of its own"),
        ("[[case]]\nname = 'a'\n[[case]]\nname = 'a'", "a name of its own"),
        ("[[case]]\nname = 'a'\ncolour = 1", "unknown key 'colour'"),
        ("[[case]]\nname = 'a'\nbench = { colour = 1 }", "bench takes no --colour"),
        ("[[case]]\nname = 'a'\nbench = { out = 'x' }", "bench takes no --out"),
        ("[[case]]\nname = 'a'\nbuild = { steps = 1 }", "build takes no --steps"),
        ("[[case]]\nname = 'a'\nserve = { colour = 1 }", "serve takes no --colour"),
        ("[[case]]\nname = 'a'\nserve = { only = 'rates' }", "serve takes no --only"),
        ("[[case", "cannot read the matrix"),
    ]
    for text, words in cases:
        matrix = write_matrix(tmp_path / "matrix.toml", text)
        result = call(matrix, "--history", tmp_path / "h", "--page", tmp_path / "p")
        assert result.exit_code == 2
        assert words in result.output
        assert len(result.output.splitlines()) == 1
    matrix = write_matrix(tmp_path / "matrix.toml", ONE)
    result = call(matrix, "--history", tmp_path / "h", "--page", tmp_path / "p", "--only", "x*")
    assert (result.exit_code, "no case" in result.output) == (2, True)
    assert not (tmp_path / "h").exists()


def test_the_matrix_of_this_project() -> None:
    import nightly

    cases = nightly.read_matrix(ROOT / "benchmarks" / "nightly.toml")
    assert {case.gpu for case in cases} == {"cpu", "auto"}
    policies = {case.build["policy"] for case in cases if case.gpu == "cpu"}
    assert policies == {"fp32", "half", "fp8", "int8-weight"}
    assert {case.gpu for case in cases if case.serve} == {"cpu", "auto"}


def test_the_workflow_runs_it() -> None:
    text = (ROOT / ".github" / "workflows" / "nightly.yml").read_text("utf-8")
    workflow = yaml.safe_load(text)
    # YAML takes "on" for a boolean.
    assert workflow[True].keys() == {"schedule", "workflow_dispatch"}
    jobs = workflow["jobs"]
    commands = {"tests": "make test-all", "lowest": "make test-lowest",
                "benchmarks": "benchmarks/nightly.py benchmarks/nightly.toml"}  # fmt: skip
    assert jobs.keys() == commands.keys()
    assert "self-hosted" in jobs["benchmarks"]["runs-on"]
    for name, job in jobs.items():
        assert job["timeout-minutes"]
        steps = job["steps"]
        assert any(commands[name] in step.get("run", "") for step in steps)
        for step in steps:
            action, _, version = step.get("uses", "@v").partition("@")
            assert version.startswith("v"), step
            assert "cache" not in action, "nothing is kept between runs"
            assert "cache" not in step.get("with", {})
    assert json.dumps(workflow)
