"""Formats that are one JSON file: what is no value of them is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from attacks.documents import DOCUMENTS

from sd35_trt.engines.tensorrt_compiler import FACTS_FILE, PlanFacts
from sd35_trt.errors import BundleError, Sd35Error, UsageError
from sd35_trt.formats import component, program, tokenizers
from sd35_trt.formats.bundle import MANIFEST, Bundle, Port
from sd35_trt.formats.calibration import DESCRIPTION, Calibration
from sd35_trt.formats.component import ComponentFacts, read_component
from sd35_trt.formats.program import Call, Graph, Node, Program, View, read_program
from sd35_trt.formats.step_cache import STEP_CACHE, read_step_cache
from sd35_trt.formats.tokenizers import TokenizerFacts, read_tokenizers, write_tokenizers
from sd35_trt.planning.working_memory import MEMORY_FILE, MemoryFacts
from sd35_trt.store.stages import stage_files

READERS: dict[str, Callable[[Path], object]] = {
    MANIFEST: Bundle.open,
    DESCRIPTION: Calibration.load,
    component.DESCRIPTION_FILE: read_component,
    program.PROGRAM_FILE: lambda folder: read_program(folder / program.PROGRAM_FILE),
    tokenizers.DESCRIPTION_FILE: read_tokenizers,
    "stage.json": stage_files,
    FACTS_FILE: PlanFacts.read,
    MEMORY_FILE: MemoryFacts.read,
    STEP_CACHE: lambda folder: read_step_cache(folder / STEP_CACHE),
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("wrong", DOCUMENTS)
def test_hostile_documents(name: str, wrong: str, tmp_path: Path) -> None:
    if wrong == "no format" and name in (tokenizers.DESCRIPTION_FILE, "stage.json"):
        pytest.skip("it has no version: nothing in it is nothing said")
    (tmp_path / name).write_text(DOCUMENTS[wrong])
    with pytest.raises(Sd35Error) as caught:
        READERS[name](tmp_path)
    given = name in (DESCRIPTION, STEP_CACHE)
    assert isinstance(caught.value, UsageError if given else BundleError)
    message = str(caught.value)
    assert name in message
    assert " — " in message
    assert "\n" not in message
    assert len(message) < 1000


def test_a_component_comes_back_as_written(tmp_path: Path) -> None:
    port = Port("latents", "float32", ("batch", 16, "height", "width"))
    facts = ComponentFacts("denoiser", 7, 3, 9, (port,), (port,), {"fp8": 2}, {"denoiser/a": 1.5})
    facts.write(tmp_path)
    assert read_component(tmp_path) == facts


@pytest.mark.parametrize("facts", [PlanFacts(7, 3), PlanFacts(7, None), MemoryFacts(3)])
def test_an_engine_comes_back_as_written(facts: PlanFacts | MemoryFacts, tmp_path: Path) -> None:
    facts.write(tmp_path)
    assert type(facts).read(tmp_path) == facts


def test_tokenizers_come_back_as_written(tmp_path: Path) -> None:
    facts = {"clip_l": TokenizerFacts(77, 49407), "t5": TokenizerFacts(256, 0)}
    write_tokenizers(tmp_path, facts)
    assert read_tokenizers(tmp_path) == facts
    (tmp_path / tokenizers.DESCRIPTION_FILE).write_text('{"t5": {"length": -1, "pad_id": 0}}')
    with pytest.raises(BundleError, match=r"length|int.*>= 1"):
        read_tokenizers(tmp_path)


def test_a_program_comes_back_as_written(tmp_path: Path) -> None:
    node = Node("y", "aten.add.Tensor", [{"value": "x"}, 1.5, None, [1, True]], {"alpha": 2})
    graph = Graph(("w",), ("x",), (node,), ("y",))
    steps = (Call("g", ("a.weight",), ("x",), ("y",)), View("rows", "y", "z", 1, 2))
    document = Program("2.11.0", {"g": graph}, steps)
    (tmp_path / program.PROGRAM_FILE).write_text(document.to_json())
    assert read_program(tmp_path / program.PROGRAM_FILE) == document


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_program_holds_no_infinity(value: float) -> None:
    graph = Graph((), ("x",), (Node("y", "aten.add.Tensor", [value], {}),), ("y",))
    with pytest.raises(ValueError, match="JSON"):
        Program("2.11.0", {"g": graph}, ()).to_json()
