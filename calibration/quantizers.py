"""modelopt's quantizers on the layers that a policy computes in FP8, and nowhere else."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from sd35_trt.compat.modelopt import collect_statistics, collected_amax, quantizers
from sd35_trt.errors import Sd35Error
from sd35_trt.policies import Policy
from sd35_trt.policies.fp8 import fp8_attentions, fp8_linears

#: E4M3, one scale per tensor, static.
E4M3: dict[str, Any] = {"num_bits": (4, 3), "axis": None}

# An attention's operands and modelopt's names for their quantizers. The softmax has none: its
# values are at most 1.
_OPERANDS = {"q": "q_bmm_quantizer", "k": "k_bmm_quantizer", "v": "v_bmm_quantizer"}


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The libraries print and warn about what does not concern a user."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def is_attention(module: nn.Module) -> bool:
    """Whether a module is diffusers' attention, whose matrix products can be quantized."""
    from sd35_trt.compat.diffusers import Attention

    return isinstance(module, Attention)


def quantized_linears(part: str, model: nn.Module, policy: Policy) -> list[str]:
    """``component/layer`` of every linear of a part that the policy computes in FP8."""
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return fp8_linears(part, names, policy)


def quantized_attentions(part: str, model: nn.Module, policy: Policy) -> list[str]:
    """``component/module`` of every attention of a part whose matmuls the policy does in FP8."""
    names = [name for name, module in model.named_modules() if is_attention(module)]
    return fp8_attentions(part, names, policy)


def enabled_quantizers(model: nn.Module) -> set[str]:
    """Names of the quantizers in a model that are switched on."""
    return {name for name, quantizer in quantizers(model).items() if quantizer.is_enabled}


def insert_quantizers(model: nn.Module, names: Iterable[str]) -> None:
    """Insert modelopt's quantizers and switch on exactly those named.

    Args:
        names: as in the quantized model, e.g. ``proj_out.input_quantizer``.

    Raises:
        Sd35Error: another set of quantizers is on than was asked for.
    """
    with quiet():
        import modelopt.torch.quantization as mtq

        targets = set(names)
        config = [{"quantizer_name": "*", "enable": False}]
        config += [{"quantizer_name": n, "cfg": E4M3, "enable": True} for n in sorted(targets)]
        mtq.quantize(model, {"quant_cfg": config, "algorithm": None})
    check_enabled(model, targets)


def check_enabled(model: nn.Module, targets: set[str]) -> None:
    """Refuse a model in which other quantizers are on than the policy asks for.

    Raises:
        Sd35Error: names one.
    """
    enabled = enabled_quantizers(model)
    if enabled != targets:
        name = min(enabled ^ targets)
        state = "not on" if name in targets else "on"
        raise Sd35Error(
            f"{len(enabled)} quantizers are on and the policy asks for {len(targets)}: "
            f"{name} is {state}",
            "install a version of nvidia-modelopt that sd35-trt was tested with",
        )


class InputCalibrator:
    """Collects the amax of what a policy computes in FP8 while the model runs unquantized.

    Args:
        part: the part's folder in the checkpoint.
        model: its module; quantizers are inserted.
    """

    def __init__(self, part: str, model: nn.Module, policy: Policy) -> None:
        self._model = model
        self._inputs = {
            f"{name.partition('/')[2]}.input_quantizer": name
            for name in quantized_linears(part, model, policy)
        }
        self._operands = {
            f"{name.partition('/')[2]}.{quantizer}": f"{name}.{operand}"
            for name in quantized_attentions(part, model, policy)
            for operand, quantizer in _OPERANDS.items()
        }
        insert_quantizers(model, [*self._inputs, *self._operands])
        collect_statistics(model)

    def _collected(self, names: Mapping[str, str]) -> dict[str, float]:
        values = {}
        for quantizer, name in names.items():
            value = collected_amax(self._model.get_submodule(quantizer))
            if value is not None:
                values[name] = value
        return values

    def inputs(self) -> dict[str, float]:
        """``component/layer`` → amax of its input so far; what has not run yet is absent."""
        return self._collected(self._inputs)

    def bmm(self) -> dict[str, float]:
        """``component/attention.operand`` → amax so far; the softmax's bound with the others."""
        values = self._collected(self._operands)
        for name in [n for n in values if n.endswith(".q")]:
            values[f"{name.removesuffix('.q')}.p"] = 1.0
        return values


def needs_quantizers(part: str, model: nn.Module, policy: Policy) -> bool:
    """Whether the policy computes anything of a part in FP8."""
    return bool(quantized_linears(part, model, policy) or quantized_attentions(part, model, policy))
