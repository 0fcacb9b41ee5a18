"""Precision policies: data files that say in which format each layer is stored and computed.

A policy is an ordered list of rules. A rule names a component and the layers in it by glob
(``fnmatch`` over module names, as in ``state_dict`` without the trailing ``.weight``), a precision,
and the reason. The last rule that matches a layer wins. What is said of the denoiser and the
conditioner holds for those of ControlNets too.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from sd35_trt.components import policy_names
from sd35_trt.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

#: Precisions a rule may name. What a build supports is up to the exporter.
PRECISIONS = ("fp32", "half", "fp8", "int8-weight", "int4-weight")

#: Those that quantize the weights of linear layers.
QUANTIZED = ("fp8", "int8-weight", "int4-weight")

_BUILTIN = Path(__file__).parent

# Bytes of a policy: thousands of rules.
_LARGEST = 1 << 20


@dataclass(frozen=True)
class Rule:
    component: str
    match: str
    precision: str
    reason: str

    def names(self, component: str) -> bool:
        """Whether the rule is for a component."""
        return any(fnmatch.fnmatchcase(name, self.component) for name in policy_names(component))

    def covers(self, component: str, layer: str, linear: bool) -> bool:
        """Whether the rule applies to a layer; see :meth:`Policy.rule`."""
        return (
            (linear or self.precision not in QUANTIZED)
            and self.names(component)
            and fnmatch.fnmatchcase(layer, self.match)
        )


@dataclass(frozen=True)
class Policy:
    """An ordered list of rules under a name."""

    name: str
    description: str
    rules: tuple[Rule, ...]

    def digest(self, components: Iterable[str] | None = None) -> str:
        """SHA-256 of the rules, hex; the name and the wording do not count.

        Args:
            components: count only the rules that can apply to one of these.
        """
        names = None if components is None else list(components)
        rules = [
            (r.component, r.match, r.precision)
            for r in self.rules
            if names is None or any(map(r.names, names))
        ]
        return hashlib.sha256(json.dumps(rules).encode()).hexdigest()

    def rule(self, component: str, layer: str, linear: bool) -> Rule:
        """The rule that decides for one layer: the last that matches.

        Args:
            linear: whether the layer is a matrix product; rules that quantize apply to these
                alone, so that a glob over a whole block leaves its norms to the rules before.

        Raises:
            UsageError: no rule covers the layer.
        """
        for rule in reversed(self.rules):
            if rule.covers(component, layer, linear):
                return rule
        raise UsageError(
            f"policy {self.name!r} has no rule for {component}/{layer}",
            'begin it with a rule for component = "*", match = "*"',
        )

    def attention_rule(self, component: str, attention: str) -> Rule | None:
        """The rule for the matrix products inside an attention, Q·Kᵀ and softmax·V.

        The last rule whose glob names the attention itself (``transformer_blocks.*.attn``), not
        also the layers in it (``transformer_blocks.*``); None where there is none: they stay as
        their operands are.
        """
        for rule in reversed(self.rules):
            inside = rule.covers(component, f"{attention}.to_q", linear=True)
            if rule.covers(component, attention, linear=True) and not inside:
                return rule
        return None

    def check(
        self, component: str, layers: Mapping[str, bool], attentions: Iterable[str] = ()
    ) -> None:
        """Refuse rules for exactly this component that match nothing in it.

        Args:
            layers: name → whether it is linear.
            attentions: names of its attention modules.

        Raises:
            UsageError: names the rule, so that a misspelt glob is not silently without effect.
        """
        names = {**layers, **dict.fromkeys(attentions, True)}
        for rule in self.rules:
            if rule.component == component and not any(
                rule.covers(component, name, linear) for name, linear in names.items()
            ):
                raise UsageError(
                    f"policy {self.name!r}: rule {rule.match!r} matches nothing in {component}",
                    "correct the glob or delete the rule",
                )


def builtin_policies() -> list[str]:
    """Names of the policies that come with the package."""
    return sorted(path.stem for path in _BUILTIN.glob("*.toml"))


def load_policy(name_or_path: str) -> Policy:
    """Read a policy by its built-in name or from a TOML file.

    Raises:
        UsageError: unknown name, unreadable file, unknown key or precision.
    """
    path = _BUILTIN / f"{name_or_path}.toml"
    if not path.is_file():
        path = Path(name_or_path)
    if not path.is_file():
        raise UsageError(
            f"unknown policy {name_or_path!r}",
            f"use one of {', '.join(builtin_policies())}, or the path of a TOML file",
        )
    try:
        with path.open("rb") as stream:
            content = stream.read(_LARGEST + 1)
        if len(content) > _LARGEST:
            raise UsageError(
                f"{path} is larger than any policy ({_LARGEST:,} bytes)", "give a TOML file"
            )
        data = tomllib.loads(content.decode("utf-8"))
        rules = tuple(Rule(**rule) for rule in data["rule"])
        policy = Policy(data["name"], data.get("description", ""), rules)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UsageError(
            f"policy file {path}: {error}",
            "a policy has a name and [[rule]] tables with component, match, precision, reason",
        ) from error
    except OSError as error:
        raise UsageError(
            f"policy file {path} cannot be read: {error.strerror or error}", "make it readable"
        ) from error
    for rule in policy.rules:
        if rule.precision not in PRECISIONS:
            raise UsageError(
                f"policy {policy.name!r}: unknown precision {rule.precision!r} for {rule.match!r}",
                f"use one of {', '.join(PRECISIONS)}",
            )
    return policy
