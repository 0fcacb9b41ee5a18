"""Engines beside the graphs behind them, and what engines consist of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from sd35_trt.formats.bundle import Bundle, Component

from .console import fact_table, open_console, plain_table

if TYPE_CHECKING:
    from sd35_trt.quality.contents import Contents
    from sd35_trt.quality.engines import EngineComparison, LayerSearch, PortError


def _error(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.2g}"


def print_comparison(comparison: EngineComparison) -> None:
    """Print the error of every output beside its bound, and the layers where errors begin."""
    console = open_console()
    width, height = comparison.size
    facts = {
        "engines": f"{comparison.builder} on {comparison.device}",
        "against": "ONNX Runtime on the CPU, operator by operator",
        "inputs": f"of a picture of {width}x{height} px in {comparison.steps} steps",
    }
    console.print(fact_table(facts))
    console.print()
    table = plain_table(["component", "output", "precision"], ["error", "bound"])
    table.add_column("")
    for port in comparison.ports:
        table.add_row(
            port.component, port.port, port.precision, _error(port.error), f"{port.bound:g}",
            "" if port.passed else "missed",
        )  # fmt: skip
    console.print(table)
    for search in comparison.searches:
        console.print(f"\n{search.component}: {_layer(search)}")


def _layer(search: LayerSearch) -> str:
    difference = search.difference
    if difference is None:
        return f"no layer was found: {search.note}"
    layer = f" of {difference.layer}" if difference.layer else ""
    return (
        f"the first to differ is {difference.operator} {difference.node}{layer}: error "
        f"{_error(difference.error)}, of its inputs {_error(difference.input_error)}"
    )


def failures(comparison: EngineComparison) -> list[str]:
    """What missed its bound, each component with its worst output."""
    return list(_failures(comparison))


def _failures(comparison: EngineComparison) -> Iterator[str]:
    missed: dict[str, list[PortError]] = {}
    for port in comparison.ports:
        if not port.passed:
            missed.setdefault(port.component, []).append(port)
    for component, ports in missed.items():
        worst = max(ports, key=lambda port: float("inf") if port.error is None else port.error)
        yield (
            f"{component}'s {worst.port} is off by {_error(worst.error)}, "
            f"{worst.precision} allows {worst.bound:g}"
        )


def print_contents(bundle: Bundle, engines: Mapping[str, Contents]) -> None:
    """Print what each engine consists of."""
    console = open_console()
    table = plain_table(["component", "engine", "bounds", "precisions", "layers"])
    notes: dict[str, list[str]] = {}
    for component in bundle.manifest.components:
        contents = engines[component.name]
        layers = sorted(contents.layers.items(), key=lambda item: (-item[1], item[0]))
        table.add_row(
            component.name,
            contents.form,
            _bounds(component),
            "\n".join(f"{count} {name}" for name, count in contents.precisions.items()),
            ", ".join(f"{count} {name}" for name, count in layers),
        )
        if contents.note:
            notes.setdefault(contents.note, []).append(component.name)
    console.print(table)
    for note, names in notes.items():
        console.print(f"\n{', '.join(names)}: {note}")


def _bounds(component: Component) -> str:
    return "\n".join(f"{name} {low} to {high}" for name, (low, high) in component.bounds.items())
