"""An exported component as a network of TensorRT's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sd35_trt.compat.tensorrt import attentions, without_noise
from sd35_trt.dimensions import Bounds
from sd35_trt.errors import Sd35Error
from sd35_trt.formats.component import MODEL_FILE

from .builder import ExportedComponent


def parse_network(
    trt: Any, title: str, builder: Any, component: ExportedComponent, log: Any
) -> tuple[Any, Any]:
    """A component as an ``INetworkDefinition``, strongly typed.

    Args:
        trt: the library.
        title: its name and version, for messages.
        builder: its ``Builder``.
        log: its ``ILogger``.

    Returns:
        The network, and its parser, whose memory the network's weights are in.

    Raises:
        Sd35Error: a node that the library does not take, or ports that it reads otherwise.
    """
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(component.folder / MODEL_FILE)):
        raise Sd35Error(
            f"{title} does not take {component.name}: {_parser_errors(parser)}",
            "report this with the command",
        )
    _check_ports(trt, title, component, network)
    for attention in attentions(trt, network):
        # FP32 has no fused kernel; where there is one, it is taken.
        attention.decomposable = True
    return network, parser


def _check_ports(trt: Any, title: str, component: ExportedComponent, network: Any) -> None:
    """The parsed network's inputs and outputs are the manifest's."""
    parsed = [network.get_input(i) for i in range(network.num_inputs)]
    parsed += [network.get_output(i) for i in range(network.num_outputs)]
    actual = {t.name: (_name(trt.nptype(t.dtype)), tuple(t.shape)) for t in parsed}
    for port in (*component.inputs, *component.outputs):
        dtype, shape = actual.get(port.name, ("missing", ()))
        declared = tuple(-1 if isinstance(d, str) else d for d in port.shape)
        # The parser may leave an output's dimension open that is known to be fixed.
        fits = len(shape) == len(declared) and all(
            d in (w, -1) for d, w in zip(shape, declared, strict=True)
        )
        if dtype != port.dtype or not fits:
            raise Sd35Error(
                f"{title} reads {component.name}'s {port.name} as {dtype} {shape}, "
                f"not {port.dtype} {port.shape}",
                "report this with the command",
            )


def _name(dtype: Any) -> str:
    """A numpy type's name; bfloat16 and the like come as other objects."""
    return str(getattr(dtype, "__name__", dtype))


def optimization_profile(
    builder: Any, component: ExportedComponent, bounds: Mapping[str, Bounds]
) -> Any:
    """An ``IOptimizationProfile``: smallest, usual and largest shape of every input.

    Args:
        builder: the library's ``Builder``.
        bounds: of the component's dynamic dimensions.
    """
    profile = builder.create_optimization_profile()
    for port in component.inputs:
        if port.dynamic:
            shapes = [port.resolve(**{d: b[i] for d, b in bounds.items()}) for i in range(3)]
            profile.set_shape(port.name, *shapes)
    return profile


def _parser_errors(parser: Any) -> str:
    """The parser's first errors: operator, node, reason."""
    errors = [parser.get_error(i) for i in range(min(parser.num_errors, 3))]
    return "; ".join(
        f"{e.node_operator()} {e.node_name()}: {without_noise(e.desc())}" for e in errors
    )
