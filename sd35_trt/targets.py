"""What an engine is built for: GPU families and products, and the builders that serve them.

The figures are data, in ``gpus.toml`` beside this file.
"""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .backends import BACKENDS
from .errors import Sd35Error, UsageError
from .policies import Policy, builtin_policies, load_policy

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

#: ``--gpu`` for the GPU that is present.
AUTO = "auto"

_DATA = Path(__file__).parent / "gpus.toml"

# Payload of one PCIe lane in bytes/s, after line encoding, by generation.
_PCIE_LANE = {
    "1.0": 0.25e9,
    "2.0": 0.5e9,
    "3.0": 0.985e9,
    "4.0": 1.969e9,
    "5.0": 3.938e9,
    "6.0": 7.563e9,
}


@dataclass(frozen=True)
class Target:
    """A GPU family, a product of one, or the CPU.

    Attributes:
        name: what ``--gpu`` takes.
        title: the product's name as its maker spells it; of a family, some products.
        family: name of the family; of a family, its own.
        compute_capabilities: CUDA compute capabilities, ``"8.9"``; none for the CPU.
        builders: engine builders that can serve it → the compute capabilities that each compiles
            for, the preferred one first.
        precisions: what a policy may ask for; see :data:`sd35_trt.policies.PRECISIONS`.
        policy: name of the policy used when the user names none.
        fp8: whether its tensor cores compute in FP8.
        fp4: whether its tensor cores compute in FP4.
        memory_bytes: device memory; None for a family and the CPU.
        bandwidth: of the device memory in bytes/s; None as above.
        bus: link to the host, ``"PCIe 4.0 x16"``; None as above.
    """

    name: str
    title: str
    family: str
    compute_capabilities: tuple[str, ...]
    builders: Mapping[str, tuple[str, ...]] = field(hash=False)
    precisions: tuple[str, ...]
    policy: str
    fp8: bool
    fp4: bool
    memory_bytes: int | None = None
    bandwidth: float | None = None
    bus: str | None = None

    @property
    def compute_capability(self) -> str | None:
        """The only one; None for the CPU and for a family of several."""
        return self.compute_capabilities[0] if len(self.compute_capabilities) == 1 else None

    @property
    def builder(self) -> str:
        """The preferred builder."""
        return next(iter(self.builders))

    @property
    def bus_bandwidth(self) -> float | None:
        """Bytes/s from the host's memory, the peak of the link."""
        if self.bus is None:
            return None
        generation, lanes = re.fullmatch(r"PCIe (\S+) x(\d+)", self.bus).groups()  # type: ignore[union-attr]
        return _PCIE_LANE[generation] * int(lanes)

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the built-in policies that it can run, its default first."""
        others = [p for p in builtin_policies() if p != self.policy and self.runs(load_policy(p))]
        return (self.policy, *others)

    def runs(self, policy: Policy) -> bool:
        """Whether engines of this policy can be compiled for it."""
        return all(rule.precision in self.precisions for rule in policy.rules)

    def check(self, policy: Policy) -> None:
        """Refuse a policy that the target cannot run.

        Raises:
            UsageError: names the precision that it lacks and the policies that it can run.
        """
        if not self.runs(policy):
            lacking = next(r.precision for r in policy.rules if r.precision not in self.precisions)
            raise UsageError(
                f"policy {policy.name!r} asks for {lacking}, which {self.name} cannot run",
                f"use --policy {self.policy}"
                + "".join(f", or {name}" for name in self.policies[1:]),
            )


def target_data() -> dict[str, Any]:
    """What ``gpus.toml`` holds."""
    return tomllib.loads(_DATA.read_text("utf-8"))


@functools.cache
def targets() -> dict[str, Target]:
    """Every target by name: the families first, then the products."""
    data = target_data()
    rows = {}
    for row in data["family"]:
        row["compute_capabilities"] = tuple(row["compute_capabilities"])
        row["precisions"] = tuple(row["precisions"])
        builders = _builders(row.pop("backends"), row["compute_capabilities"])
        rows[row["name"]] = Target(family=row["name"], builders=builders, **row)
    for row in data["product"]:
        capabilities = (row.pop("compute_capability"),)
        rows[row["name"]] = replace(
            rows[row["family"]],
            name=row["name"],
            title=row["title"],
            compute_capabilities=capabilities,
            builders=_builders(rows[row["family"]].builders, capabilities),
            memory_bytes=round(row["memory_gib"] * 2**30),
            bandwidth=row["bandwidth"] * 1e9,
            bus=row["bus"],
        )
    return rows


def _builders(
    preferred: Iterable[str], capabilities: tuple[str, ...]
) -> dict[str, tuple[str, ...]]:
    """The kinds of engine that serve some of the capabilities → which; the preferred ones first."""
    served = {
        name: tuple(c for c in capabilities if c in BACKENDS[name].compute_capabilities)
        for name in dict.fromkeys((*preferred, *BACKENDS))
        if bool(BACKENDS[name].compute_capabilities) == bool(capabilities)
    }
    return {name: common for name, common in served.items() if common or not capabilities}


def find_target(name: str) -> Target:
    """Look a target up by name; ``auto`` is the GPU present, ``ada,blackwell`` both in one, which
    is then called ``ada+blackwell``.

    Raises:
        UsageError: unknown name; lists the known ones. Or no builder serves all of them.
        Sd35Error: ``auto`` without a GPU that is known.
    """
    if "," in name or "+" in name:
        parts = (part.strip() for part in re.split("[,+]", name))
        return _join([find_target(part) for part in parts if part])
    if name.lower() == AUTO:
        return present_target()
    target = targets().get(name.lower())
    if target is None:
        families = [t.name for t in targets().values() if t.memory_bytes is None]
        raise UsageError(
            f"unknown GPU {name!r}",
            f"known: {', '.join(families)}, auto, and the products that sd35-trt gpus lists",
        )
    return target


def _join(members: Sequence[Target]) -> Target:
    """One target whose engines run on every member's GPUs.

    Its policy is the first default among its members' that all of them can run.

    Raises:
        UsageError: no builder serves all of them.
    """
    if not members:
        raise UsageError("--gpu names no target", "see: sd35-trt gpus")
    members = list({member.name: member for member in members}.values())
    if len(members) == 1:
        return members[0]
    able = [backend.name for backend in BACKENDS.values() if backend.crosses]
    common = [name for name in able if all(name in m.builders for m in members)]
    name = "+".join(m.name for m in members)
    if not common:
        refused = next(
            (m.name for m in members if not set(able) & set(m.builders)), members[0].name
        )
        raise UsageError(
            f"{refused} cannot share engines with others", "build a bundle for it alone"
        )

    def union(lists: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
        return tuple(sorted({c for some in lists for c in some}, key=float))

    joined = Target(
        name=name,
        title=", ".join(m.title for m in members),
        family=name,
        compute_capabilities=union(m.compute_capabilities for m in members),
        builders={b: union(m.builders[b] for m in members) for b in common},
        precisions=tuple(
            p for p in members[0].precisions if all(p in m.precisions for m in members)
        ),
        policy=members[0].policy,
        fp8=all(m.fp8 for m in members),
        fp4=all(m.fp4 for m in members),
    )
    policies = [m.policy for m in members if joined.runs(load_policy(m.policy))]
    return replace(joined, policy=policies[0])


def _substitute(target: Target) -> str | None:
    """The builder that takes the preferred one's place here, if any does."""
    backend = BACKENDS[target.builder]
    other = backend.otherwise
    if other not in target.builders or importlib.util.find_spec(backend.module) is not None:
        return None
    return other


def choose_builder(target: Target, name: str | None = None) -> str:
    """The builder for a target: the one named, else the preferred one, or the one that stands
    in for it where its library is not installed here.

    Raises:
        UsageError: the one named does not serve the target.
    """
    builder = name or _substitute(target) or target.builder
    if builder not in target.builders:
        raise UsageError(
            f"{builder} does not build for {target.name}",
            f"use {' or '.join(target.builders)}",
        )
    return builder


@dataclass(frozen=True)
class PresentGpu:
    """A GPU of this machine, as the driver's management library (NVML) reports it.

    Attributes:
        name: as its maker spells it.
        compute_capability: ``"8.9"``.
        memory_bytes: device memory.
        bus: link to the host at its fastest, ``"PCIe 4.0 x16"``.
    """

    name: str
    compute_capability: str
    memory_bytes: int
    bus: str


def present_gpus() -> tuple[list[PresentGpu], str]:
    """The GPUs of this machine; and, where there are none, why."""
    try:
        import pynvml as nvml
    except ImportError as error:
        return [], f"the GPU is not known without nvidia-ml-py ({error}; pip install nvidia-ml-py)"
    try:
        nvml.nvmlInit()
        try:
            handles = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
            gpus = [_present_gpu(nvml, handle) for handle in handles]
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        return [], f"no NVIDIA GPU can be asked here ({error})"
    return gpus, "" if gpus else "this machine has no NVIDIA GPU"


def _present_gpu(nvml: Any, handle: Any) -> PresentGpu:
    generation = nvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)
    lanes = nvml.nvmlDeviceGetMaxPcieLinkWidth(handle)
    return PresentGpu(
        str(nvml.nvmlDeviceGetName(handle)),
        "{}.{}".format(*nvml.nvmlDeviceGetCudaComputeCapability(handle)),
        int(nvml.nvmlDeviceGetMemoryInfo(handle).total),
        f"PCIe {generation}.0 x{lanes}",
    )


def present_target() -> Target:
    """The family of the first GPU of this machine, narrowed to it.

    Raises:
        Sd35Error: no GPU, no NVIDIA driver, no package to ask it, or a GPU of no known family.
    """
    gpus, why_not = present_gpus()
    if not gpus:
        raise Sd35Error(f"--gpu auto: {why_not}", "name the GPU to build for, e.g. --gpu ada")
    gpu = gpus[0]
    capability = gpu.compute_capability
    for family in targets().values():
        if family.memory_bytes is None and capability in family.compute_capabilities:
            return replace(
                family,
                title=gpu.name,
                compute_capabilities=(capability,),
                builders={n: (capability,) for n, c in family.builders.items() if capability in c},
                memory_bytes=gpu.memory_bytes,
                bus=gpu.bus,
            )
    raise Sd35Error(
        f"{gpu.name} has compute capability {capability}, which no target has",
        "build for another GPU, see: sd35-trt gpus",
    )
