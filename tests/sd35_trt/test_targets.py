"""GPU targets: the table, what a target can run, and the GPU that is present."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import one_error_line
from fake_nvml import Nvml

from sd35_trt.errors import Sd35Error, UsageError
from sd35_trt.policies import PRECISIONS, Policy, Rule, load_policy
from sd35_trt.targets import choose_builder, find_target, targets


def test_the_table_is_consistent() -> None:
    for name, target in targets().items():
        family = targets()[target.family]
        assert name == target.name
        assert name == name.lower()
        assert set(target.compute_capabilities) <= set(family.compute_capabilities)
        assert set(target.builders) <= set(family.builders)
        assert target.builders, name
        assert set(target.precisions) <= set(PRECISIONS)
        assert target.policies[0] == target.policy
        target.check(load_policy(target.policy))
        product = target is not family
        for value in (target.memory_bytes, target.bandwidth, target.bus_bandwidth):
            assert (value is not None) == product, name
        if product:
            assert target.compute_capability
            # No card has less than 8 GB, and none has a bus faster than its memory.
            assert target.memory_bytes >= 8e9
            assert target.bus_bandwidth < target.bandwidth


def test_families_have_the_policies_that_their_tensor_cores_run() -> None:
    actual = {name: target.policy for name, target in targets().items() if target.family == name}
    assert actual == {
        "cpu": "fp32", "turing": "int8-weight", "ampere": "int8-weight", "ada": "fp8",
        "hopper": "fp8", "blackwell": "fp8",
    }  # fmt: skip
    for target in targets().values():
        if target.family != "cpu":
            assert ("fp8" in target.policies) == target.fp8
        assert not target.fp4 or target.family == "blackwell"


def test_builders_by_compute_capability() -> None:
    assert find_target("ada").builder == "tensorrt-rtx"
    assert find_target("h100").builder == "tensorrt"
    assert find_target("b200").builder == "tensorrt"
    assert find_target("blackwell").builders["tensorrt-rtx"] == ("12.0",)
    assert find_target("ampere").builders["tensorrt-rtx"] == ("8.0", "8.6")
    assert find_target("cpu").builders == {"onnxruntime": ()}
    assert find_target("RTX4090").compute_capability == "8.9"
    assert find_target("ampere").compute_capability is None


def test_several_targets_in_one() -> None:
    both = find_target("ada,blackwell")
    assert (both.name, both.policy, both.builder) == ("ada+blackwell", "fp8", "tensorrt-rtx")
    assert both.builders == {"tensorrt-rtx": ("8.9", "12.0")}
    mixed = find_target("RTX4090, ampere,ada,t4")
    assert mixed.policy == "int8-weight", "what all of them can run"
    assert mixed.builders["tensorrt-rtx"] == ("7.5", "8.0", "8.6", "8.9")
    assert find_target("ada,ada") == find_target("ada")
    assert find_target(both.name) == both, "as a manifest has it"
    with pytest.raises(UsageError, match=r"fp8, which ada\+ampere cannot run"):
        find_target("ada,ampere").check(load_policy("fp8"))
    for refused in ("hopper", "cpu", "h100"):
        with pytest.raises(UsageError, match=f"{refused} cannot share engines with others"):
            find_target(f"ada,{refused}")
    with pytest.raises(UsageError, match="unknown GPU 'voodoo'"):
        find_target("ada,voodoo")
    with pytest.raises(UsageError, match="names no target"):
        find_target(",")


def test_a_builder_can_be_named() -> None:
    assert choose_builder(find_target("ada")) == "tensorrt-rtx"
    with pytest.raises(UsageError, match="tensorrt-rtx does not build for hopper"):
        choose_builder(find_target("hopper"), "tensorrt-rtx")


@pytest.mark.parametrize("name", ["turing", "t4", "ampere", "a100"])
def test_fp8_is_refused_where_there_is_none(name: str) -> None:
    with pytest.raises(UsageError, match=f"fp8, which {name} cannot run — use --policy int8-weig"):
        find_target(name).check(load_policy("fp8"))


def test_policies_of_the_users_own_are_judged_by_their_rules() -> None:
    rules = (Rule("*", "*", "half", ""), Rule("denoiser", "*.ff.*", "int4-weight", ""))
    policy = Policy("mine", "", rules)
    find_target("ampere").check(policy)
    with pytest.raises(UsageError, match="policy 'mine' asks for int4-weight"):
        find_target("turing").check(policy)


def test_a_policy_is_refused_before_any_work(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    status, _, err = run("build", "--gpu", "t4", "--policy", "fp8", "--model", "./none")
    assert status == 2
    assert "which t4 cannot run" in one_error_line(err)
    assert not list(tmp_path.iterdir())


def test_auto_takes_the_gpu_that_is_present(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Nvml((8, 6)))
    actual = find_target("auto")
    assert (actual.name, actual.compute_capability) == ("ampere", "8.6")
    assert actual.builders["tensorrt-rtx"] == ("8.6",)
    assert actual.memory_bytes == 6 * 2**30
    assert actual.bus_bandwidth == find_target("rtx3090").bus_bandwidth


def test_auto_without_a_gpu_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_driver() -> None:
        raise Nvml.NVMLError("NVML Shared Library Not Found")

    without_driver = Nvml((8, 6))
    without_driver.nvmlInit = no_driver
    for nvml, words in (
        (Nvml((8, 6), count=0), "this machine has no NVIDIA GPU"),
        (Nvml((6, 1)), "has compute capability 6.1, which no target has"),
        (without_driver, "no NVIDIA GPU can be asked here"),
        (None, "--gpu auto: the GPU is not known without nvidia-ml-py"),
    ):
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        with pytest.raises(Sd35Error, match=words):
            find_target("auto")
