"""The quality report: format 1 as it is written, whatever the types are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec.structs import replace

from sd35_trt.formats.report import Report

#: One that ``sd35-trt verify`` wrote, shortened.
TEXT = (Path(__file__).parent / "report.json").read_text("utf-8")


def of(data: Any) -> Report:
    return msgspec.json.decode(json.dumps(data), type=Report)


def test_a_report_is_written_as_it_was() -> None:
    report = msgspec.json.decode(TEXT, type=Report)
    assert report.to_json() == TEXT
    assert list(report.reference.weight_bytes)[:2] == ["clip_l", "clip_g"], "not sorted"


def test_without_scenes() -> None:
    """Of another model than mini: ``scenes`` is null, and pairs are neither right nor wrong."""
    data = json.loads(TEXT)
    data["scenes"] = None
    for pair in data["each"]:
        del pair["reference_right"], pair["candidate_right"]
    report = of(data)
    assert report.scenes is None
    assert report.each[0].candidate_right is None
    assert json.loads(report.to_json()) == data


def test_wrong_is_not_absent() -> None:
    report = msgspec.json.decode(TEXT, type=Report)
    pair = replace(report.each[0], reference_right=False, candidate_right=False)
    entry = json.loads(replace(report, each=(pair,)).to_json())["each"][0]
    assert (entry["reference_right"], entry["candidate_right"]) == (False, False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_no_figure_is_infinite(value: float) -> None:
    report = msgspec.json.decode(TEXT, type=Report)
    with pytest.raises(ValueError, match="JSON"):
        replace(report, seconds=value).to_json()
