"""The linears of an MMDiT by what they do and how deep they are, and policies made of them."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sd35_trt.policies import Policy, Rule

#: Kind of linear → globs; ``#`` stands for the number of a block.
KINDS = {
    "qkv": (
        "transformer_blocks.#.attn.to_[qkv]",
        "transformer_blocks.#.attn.add_[qkv]_proj",
        "transformer_blocks.#.attn2.to_[qkv]",
    ),
    "attention out": (
        "transformer_blocks.#.attn.to_out.0",
        "transformer_blocks.#.attn.to_add_out",
        "transformer_blocks.#.attn2.to_out.0",
    ),
    "ff in": ("transformer_blocks.#.ff.net.0.proj", "transformer_blocks.#.ff_context.net.0.proj"),
    "ff out": ("transformer_blocks.#.ff.net.2", "transformer_blocks.#.ff_context.net.2"),
    "adaLN": ("transformer_blocks.#.norm1.linear", "transformer_blocks.#.norm1_context.linear"),
    "embedders": ("time_text_embed.*", "context_embedder"),
    "output": ("norm_out.linear", "proj_out"),
}

_DEPTHS = ("first third", "middle third", "last third")

#: The components that share the MMDiT's linears.
_COMPONENTS = ("conditioner", "denoiser")


@dataclass(frozen=True)
class LinearSize:
    """A linear layer: ``component/layer``, elements of the weight, and of the bias."""

    name: str
    weight: int
    bias: int

    @property
    def half_bytes(self) -> int:
        return 2 * (self.weight + self.bias)

    @property
    def fp8_bytes(self) -> int:
        """With the FP32 scales of weight and activations."""
        return self.weight + 2 * self.bias + 8


@dataclass(frozen=True)
class Group:
    """Linears that are quantized together.

    Attributes:
        kind: a key of :data:`KINDS`.
        depth: which third of the blocks; empty for what is in no block.
        globs: over layer names; they match these layers and no others of the model.
    """

    kind: str
    depth: str
    layers: tuple[LinearSize, ...]
    globs: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.kind}, {self.depth}" if self.depth else self.kind

    @property
    def half_bytes(self) -> int:
        return sum(layer.half_bytes for layer in self.layers)

    @property
    def fp8_bytes(self) -> int:
        return sum(layer.fp8_bytes for layer in self.layers)

    @property
    def saved_bytes(self) -> int:
        return self.half_bytes - self.fp8_bytes


def number_globs(numbers: Sequence[int]) -> list[str]:
    """Globs for consecutive numbers, those of the same tens in one: 8 to 12 is [8-9] and 1[0-2]."""
    tens: dict[int, list[int]] = {}
    for number in numbers:
        tens.setdefault(number // 10, []).append(number % 10)
    globs = []
    for ten, ones in tens.items():
        last = f"[{ones[0]}-{ones[-1]}]" if len(ones) > 1 else str(ones[0])
        globs.append(f"{ten or ''}{last}")
    return globs


def group_linears(linears: Iterable[LinearSize], blocks: int) -> list[Group]:
    """Sort an MMDiT's linears into groups; empty groups are left out.

    Args:
        blocks: number of the model's blocks.
    """
    names = {linear.name.partition("/")[2]: linear for linear in linears}
    thirds = [range(blocks * k // 3, blocks * (k + 1) // 3) for k in range(3)]
    groups = []
    for kind, templates in KINDS.items():
        parts = [("", [""])]
        if "#" in templates[0]:
            parts = [(d, number_globs(t)) for d, t in zip(_DEPTHS, thirds, strict=True)]
        for depth, numbers in parts:
            globs = [t.replace("#", n) for t in templates for n in numbers]
            globs = [glob for glob in globs if fnmatch.filter(names, glob)]
            members = [x for n, x in names.items() if any(fnmatch.fnmatchcase(n, g) for g in globs)]
            if members:
                groups.append(Group(kind, depth, tuple(members), tuple(globs)))
    return groups


def choose_half(groups: Sequence[Group], errors: Sequence[float], budget: int) -> list[Group]:
    """The groups to keep in half precision so that all fit the budget.

    Errors of independent groups add in squares, so those go first whose squared error is largest
    for the bytes that it costs.

    Args:
        errors: of each group quantized alone.
        budget: bytes of all groups together; at least what they take in FP8.
    """
    room = budget - sum(group.fp8_bytes for group in groups)
    order = sorted(
        range(len(groups)), key=lambda i: errors[i] ** 2 / groups[i].saved_bytes, reverse=True
    )
    half = set()
    for i in order:
        if groups[i].saved_bytes <= room:
            half.add(i)
            room -= groups[i].saved_bytes
    return [group for i, group in enumerate(groups) if i in half]


def make_policy(
    name: str, base: Policy, groups: Sequence[Group], errors: Sequence[float], half: Iterable[Group]
) -> Policy:
    """FP8 for all groups but those to be kept half; other components as in ``base``."""
    half_groups = list(half)
    rules = [rule for rule in base.rules if rule.component not in _COMPONENTS]
    rules += [Rule(c, "*", "half", "what no rule below names") for c in _COMPONENTS]
    for group, error in zip(groups, errors, strict=True):
        if group in half_groups:
            continue
        for glob in group.globs:
            layers = fnmatch.filter([x.name.partition("/")[2] for x in group.layers], glob)
            for component in _COMPONENTS:
                if any(
                    f"{component}/{layer}" in {x.name for x in group.layers} for layer in layers
                ):
                    reason = f"{group.name}: relative error {error:.2g} alone"
                    rules.append(Rule(component, glob, "fp8", reason))
    description = f"FP8 but for the most sensitive linears of the MMDiT, from {base.name!r}."
    return Policy(name, description, tuple(rules))


def policy_toml(policy: Policy) -> str:
    """A policy as a file that :func:`~sd35_trt.policies.load_policy` reads."""
    # A JSON string is a TOML basic string.
    lines = [f"{key} = {json.dumps(getattr(policy, key))}" for key in ("name", "description")]
    for rule in policy.rules:
        lines += ["", "[[rule]]"]
        lines += [
            f"{key} = {json.dumps(getattr(rule, key))}"
            for key in ("component", "match", "precision", "reason")
        ]
    return "\n".join(lines) + "\n"
