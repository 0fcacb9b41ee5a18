"""``sd35-trt bench``: the result is whole and consistent. No test is on the times themselves."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import one_error_line

from sd35_trt.bench import meters
from sd35_trt.bench.contenders import TIMINGS
from sd35_trt.bench.options import BenchOptions
from sd35_trt.bench.run import bench
from sd35_trt.runtime import Pipeline
from sd35_trt.runtime.prompts import Prompt
from sd35_trt.runtime.text_features import TextEncoder

QUICK = ("--steps", 3, "--runs", 2, "--warmup", 1, "--size", "64x64")


def test_result_is_whole(run, mini_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run("bench", mini_bundle, *QUICK, "--batch", 2, "--json", "--out", "r.json")
    assert status == 0
    result = json.loads(out)
    assert json.loads(Path("r.json").read_text()) == result
    assert result["format"] == 1
    assert result["command"].startswith("sd35-trt bench ")
    assert result["device"] == {"kind": "cpu", "name": "cpu"}
    assert result["host"]["cores"] >= 1
    assert {"sd35-trt", "python", "onnxruntime"} <= result["versions"].keys()
    settings = result["settings"]
    assert (settings["steps"], settings["size"], settings["batch"]) == (3, [64, 64], 2)
    assert settings["guidance"] == 3.0
    assert (result["peer"], result["comparison"]) == (None, None)

    bundle = result["bundle"]
    assert (bundle["policy"], bundle["target"], bundle["model"]) == ("fp32", "cpu", "mini")
    assert len(bundle["manifest_sha256"]) == 64
    assert len(bundle["runs"]) == 2
    assert bundle["step"]["n"] == 2 * (3 - 1)
    for name in TIMINGS:
        spread = bundle["stages"][name]
        assert spread["n"] == 2
        assert 0 < spread["p10"] <= spread["median"] <= spread["p90"]
    assert bundle["images_per_second"] == pytest.approx(
        2 / bundle["stages"]["total"]["median"], rel=1e-3
    )
    for one in bundle["runs"]:
        assert one["loop"] == pytest.approx(one["conditioning"] + one["denoise"], abs=2e-6)
        # The steps but the first are in the loop.
        assert sum(one["steps"]) < one["loop"]
        parts = one["text"] + one["loop"] + one["decode"]
        assert parts <= one["total"]
    host = bundle["memory"]["host"]
    assert host["peak_bytes"] > bundle["weight_bytes"]
    assert 0 < host["own_bytes"] < host["peak_bytes"]
    assert bundle["memory"]["device"] is None
    assert bundle["joules_per_image"] is None


def test_one_step(tiny_bundle: Path) -> None:
    result = bench(BenchOptions(tiny_bundle, runs=1, warmup=1, steps=1, size=(64, 64)))
    bundle = result["bundle"]
    assert bundle["step"]["n"] == 1
    assert bundle["step"]["median"] == bundle["stages"]["loop"]["median"]


def test_text_is_encoded_in_every_run(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[list[str]] = []
    compute = TextEncoder._compute

    def watch(self: TextEncoder, texts: list[Prompt], *arguments: Any) -> Any:
        encoded.append([text.clip_l for text in texts])
        return compute(self, texts, *arguments)

    monkeypatch.setattr(TextEncoder, "_compute", watch)
    bench(BenchOptions(tiny_bundle, runs=3, warmup=2, steps=1, size=(64, 64), prompt="a star"))
    assert encoded == [["", "a star (0)"], *([f"a star ({i})"] for i in range(1, 5))]


def test_table(run, tiny_bundle: Path) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run("bench", tiny_bundle, *QUICK)
    assert status == 0
    for words in ("64x64, batch 1, 3 steps, guidance 3", "2 runs after 1", "one step", "end to end",
                  "images per second", "memory, peak", "energy per image"):  # fmt: skip
        assert words in out
    assert "ratio" not in out


@pytest.mark.parametrize(
    "peer_name",
    ["diffusers", pytest.param("diffusers-compiled", marks=pytest.mark.nightly)],
)
def test_against_diffusers(run, mini_bundle: Path, peer_name: str) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run(
        "bench", mini_bundle, *QUICK, "--batch", 2, "--against", peer_name, "--json"
    )
    assert status == 0
    result = json.loads(out)
    assert {"torch", "diffusers", "transformers"} <= result["versions"].keys()
    peer = result["peer"]
    assert (peer["kind"], peer["dtype"]) == (peer_name, "float32")
    assert peer["stages"]["conditioning"] is None
    assert peer["stages"]["denoise"] is None
    assert peer["step"]["n"] == result["bundle"]["step"]["n"]
    for one in peer["runs"]:
        assert one["text"] + one["loop"] + one["decode"] == pytest.approx(one["total"], abs=5e-6)
    comparison = result["comparison"]
    assert comparison["ratios"].keys() == {"load", "text", "loop", "decode", "total", "step"}
    for name in ("text", "loop", "decode", "total"):
        pairs = zip(result["bundle"]["runs"], peer["runs"], strict=True)
        expected = np.median([ours[name] / theirs[name] for ours, theirs in pairs])
        summary = comparison["ratios"][name]
        assert summary["ratio"] == pytest.approx(expected, rel=1e-2, abs=1e-4), "four digits"
        assert summary["p10"] <= summary["ratio"] <= summary["p90"]
    # The same work: prompts, seeds, steps, size, guidance and text length.
    assert comparison["psnr_db"] > 50
    assert comparison["psnr_of_two_seeds_db"] < 40
    assert comparison["same_work"]


def test_against_a_bundle(run, mini_bundle: Path, make_bundle: Callable[..., Path]) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run("bench", mini_bundle, *QUICK, "--against", mini_bundle, "--json")
    assert status == 0
    result = json.loads(out)
    assert result["comparison"]["psnr_db"] is None
    assert result["comparison"]["same_work"]
    assert {"conditioning", "denoise"} < result["comparison"]["ratios"].keys()
    status, out, _ = run("bench", make_bundle(policy="half"), *QUICK, "--against", mini_bundle)
    assert status == 0
    assert "ratio: bundle / bundle; the last pictures of both: PSNR" in out


def test_they_take_turns(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sd35_trt.bench.contenders import EngineContender

    order: list[int] = []
    contenders: list[object] = []
    draw = EngineContender.draw

    def watch(self: EngineContender, prompt: str, seed: int) -> Any:
        if self not in contenders:
            contenders.append(self)
        order.append(contenders.index(self))
        return draw(self, prompt, seed)

    monkeypatch.setattr(EngineContender, "draw", watch)
    options = BenchOptions(
        tiny_bundle, runs=4, warmup=1, steps=1, size=(64, 64), against=str(tiny_bundle)
    )
    bench(options)
    assert order == [0, 1, 0, 1, 1, 0, 0, 1, 1, 0]


def test_wrong_use(run, mini_bundle: Path, medium_bundle: Path, large_checkpoint: Path) -> None:  # type: ignore[no-untyped-def]
    cases: list[tuple[list[object], int, str]] = [
        (["--size", "100x100"], 2, "the nearest is 128x128"),
        (["--steps", 0], 2, "steps must be 1 to 1000, not 0"),
        (["--batch", 9], 2, "this bundle draws 1 to 4"),
        (["--guidance", "nan"], 2, "guidance must be 0 to 100"),
        (["--runs", 0], 2, "--runs"),
        (["--warmup", 0], 2, "--warmup"),
        (["--threads", 0], 2, "--threads"),
        (["--model", "mini"], 2, "--model is for --against diffusers"),
        (["--model", "mini", "--against", mini_bundle], 2, "--model is for --against diffusers"),
        (["--against", "nowhere"], 1, "nowhere is not a bundle"),
        (["--against", medium_bundle], 1, "are of different models"),
        (["--against", "diffusers", "--model", large_checkpoint], 1, "was not made from"),
        (["--against", "diffusers", "--model", "nowhere"], 1, "was not made from"),
        (["--out", "no/such/file.json"], 2, "is not a writable directory"),
        (["--out", "."], 2, "is a directory"),
    ]
    for arguments, expected, words in cases:
        status, out, err = run("bench", mini_bundle, *arguments)
        assert (status, out) == (expected, ""), arguments
        assert words in one_error_line(err)
    assert list(Path().iterdir()) == []
    status, _, err = run("bench", medium_bundle, "--against", "diffusers")
    assert status == 1
    assert "was not made from the packaged mini" in one_error_line(err)
    status, _, err = run("bench", "nowhere")
    assert status == 1
    assert "is not a bundle" in one_error_line(err)


def test_without_the_peers_packages(
    run, mini_bundle: Path, monkeypatch: pytest.MonkeyPatch  # type: ignore[no-untyped-def]
) -> None:  # fmt: skip
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "diffusers" else find(name)
    )
    status, _, err = run("bench", mini_bundle, "--against", "diffusers")
    assert status == 1
    assert one_error_line(err) == (
        "error: --against diffusers needs diffusers — pip install 'sd35-trt[build]'"
    )


def test_pictures_that_differ_are_noted(mini_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sd35_trt.bench.contenders import EngineContender

    draw = EngineContender.draw
    odd: list[object] = []

    def spoil(self: EngineContender, prompt: str, seed: int) -> Any:
        odd.append(self)
        drawn = draw(self, prompt, seed + (self is not odd[0]))
        return drawn

    monkeypatch.setattr(EngineContender, "draw", spoil)
    result = bench(BenchOptions(mini_bundle, runs=1, warmup=1, steps=8, against=str(mini_bundle)))
    assert any("this may not be the same work" in note for note in result["notes"])


def test_host_memory_is_that_of_the_span() -> None:
    with meters.host_memory() as large:
        block = np.ones(100 << 20, np.uint8)
        del block
    assert large.peak is not None
    assert 90 << 20 < large.peak - large.before < 150 << 20
    with meters.host_memory() as nothing:
        pass
    assert nothing.peak is None or nothing.peak - nothing.before < 50 << 20


def test_others_are_busy_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = meters.Others._read(), meters.Others._read()
    assert all(now >= then for now, then in zip(second, first, strict=True)), "seconds only add up"
    # On the clock, of all cores at work, of this process; ticks of the kernel are coarse.
    readings = iter([(5.0, 100.0, 8.0), (7.0, 105.0, 10.0), (7.0, 101.0, 10.0), (5.0, 100.0, 8.0)])
    monkeypatch.setattr(meters.Others, "_read", staticmethod(lambda: next(readings)))
    others = meters.Others()
    assert others.cores() == 1.5, "own work does not count"
    assert others.cores() == 0.0
    assert others.cores() == 0.0, "no time has passed"


class FakeNvml(types.ModuleType):
    """A GPU whose memory rises by 1 GB a look, up to 5 GB, and that takes 2 J between looks."""

    class NVMLError(Exception):
        pass

    counts_energy = True

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.opened = 0
        self.asked: list[Any] = []
        self._used, self._joules = 0, 0.0

    def nvmlInit(self) -> None:
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        self.asked.append(index)
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked.append(uuid)
        return uuid

    def nvmlDeviceGetName(self, device: Any) -> str:
        return "NVIDIA Test"

    def nvmlSystemGetDriverVersion(self) -> str:
        return "600.1"

    def nvmlDeviceGetMemoryInfo(self, device: Any) -> Any:
        self._used = min(self._used + 1, 5)
        return types.SimpleNamespace(total=80 * 10**9, used=self._used * 10**9)

    def nvmlDeviceGetTotalEnergyConsumption(self, device: Any) -> float:
        if not self.counts_energy:
            raise self.NVMLError("Not Supported")
        self._joules += 2.0
        return 1000 * self._joules


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeNvml]:
    fake = FakeNvml()
    monkeypatch.setitem(__import__("sys").modules, "pynvml", fake)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    yield fake
    assert fake.opened == 0


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engines stay on the CPU; what is measured is taken from NVML."""
    from sd35_trt.bench import workload as module

    load = Pipeline.load
    monkeypatch.setattr(module, "device_of", lambda bundle, asked: "cuda")
    monkeypatch.setattr(
        Pipeline, "load", lambda *a, **options: load(*a, **{**options, "device": "cpu"})
    )


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_memory_and_energy_of_a_gpu(run, tiny_bundle: Path, nvml: FakeNvml) -> None:  # type: ignore[no-untyped-def]
    status, out, _ = run("bench", tiny_bundle, *QUICK, "--batch", 2, "--json")
    assert status == 0
    result = json.loads(out)
    assert result["device"] == {
        "kind": "cuda", "name": "NVIDIA Test", "memory_bytes": 80 * 10**9, "driver": "600.1"
    }  # fmt: skip
    assert result["bundle"]["memory"]["device"] == {
        "peak_bytes": 5 * 10**9, "own_bytes": 4 * 10**9
    }  # fmt: skip
    # 2 J in each of two runs of two pictures.
    assert result["bundle"]["joules_per_image"] == 1.0
    assert [one["joules"] for one in result["bundle"]["runs"]] == [2.0, 2.0]
    assert nvml.asked == [0]


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_a_gpu_that_counts_no_energy(run, tiny_bundle: Path, nvml: FakeNvml) -> None:  # type: ignore[no-untyped-def]
    nvml.counts_energy = False
    status, out, _ = run("bench", tiny_bundle, *QUICK)
    assert status == 0
    assert "NVIDIA Test" in out
    assert [line.split()[-1] for line in out.splitlines() if line.startswith("energy")] == ["–"]
    assert "GPU memory, peak" in out


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_a_gpu_without_nvml(
    run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch  # type: ignore[no-untyped-def]
) -> None:  # fmt: skip
    monkeypatch.setitem(__import__("sys").modules, "pynvml", None)
    status, out, err = run("bench", tiny_bundle, *QUICK, "--json")
    assert status == 0
    assert json.loads(out)["bundle"]["memory"]["device"] is None
    assert "pip install nvidia-ml-py" in err


def test_the_gpu_that_cuda_sees(nvml: FakeNvml, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("3,1", 3), ("GPU-4f", "GPU-4f")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        gpu, _ = meters.Gpu.open()
        assert gpu is not None
        gpu.close()
        assert nvml.asked[-1] == expected
