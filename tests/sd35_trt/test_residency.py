"""What stays in memory, loads and streams within a budget."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sd35_trt.residency import (
    LOADED,
    RESIDENT,
    STREAMED,
    Footprint,
    phases_of,
    plan_residency,
)

TEXT = Footprint("text", "text", 60, 2, 1, 10)
STEP = Footprint("step", "denoise", 50, 10, 20, 10)
DECODE = Footprint("decode", "decode", 5, 30, 1, 4)
ENGINES = (TEXT, STEP, DECODE)


def kinds(budget: int | None, engines: tuple[Footprint, ...] = ENGINES) -> dict[str, str]:
    return {k: p.kind for k, p in plan_residency(engines, budget).placements.items()}


def test_with_room_everything_stays() -> None:
    for budget in (None, 145):
        plan = plan_residency(ENGINES, budget)
        assert kinds(budget) == dict.fromkeys(("text", "step", "decode"), RESIDENT)
        # All weights, and the largest activations.
        assert (plan.peak_bytes, plan.bus_bytes, plan.fits) == (145, 0, True)


def test_what_costs_most_to_load_again_stays() -> None:
    # Streaming the smallest moves 5 bytes; without room for both large ones, the one that runs
    # once is loaded.
    plan = plan_residency(ENGINES, 144)
    assert kinds(144) == {"text": RESIDENT, "step": RESIDENT, "decode": STREAMED}
    assert plan.bus_bytes == 5
    plan = plan_residency(ENGINES, 100)
    assert kinds(100) == {"text": STREAMED, "step": RESIDENT, "decode": RESIDENT}
    assert plan.bus_bytes == 60


def test_each_engine_is_loaded_for_its_stage() -> None:
    plan = plan_residency(ENGINES, 62)
    assert kinds(62) == {"text": LOADED, "step": LOADED, "decode": LOADED}
    assert (plan.resident_bytes, plan.peak_bytes, plan.bus_bytes) == (0, 62, 115)


def test_streaming_is_for_what_does_not_fit_alone() -> None:
    plan = plan_residency(ENGINES, 61)
    placement = plan.placements["text"]
    assert placement.kind == STREAMED
    # It runs once, so that holding more of it than other stages need would bring nothing.
    assert placement.peak_bytes == plan.placements["step"].peak_bytes
    assert placement.bus_bytes == 60


def test_an_engine_that_runs_often_holds_what_it_can() -> None:
    placement = plan_residency((STEP,), 50).placements["step"]
    assert placement.kind == STREAMED
    assert placement.peak_bytes == 50
    # 40 of its 50 bytes are in memory, 10 of them as buffers: 30 stay, 20 pass in each run.
    assert (placement.device_bytes, placement.bus_bytes) == (40, 30 + 20 * 20)


def test_what_cannot_fit_says_what_it_takes() -> None:
    plan = plan_residency(ENGINES, 33)
    assert not plan.fits
    assert plan.peak_bytes == 34
    whole = tuple(Footprint(e.name, e.phase, e.weight_bytes, e.activation_bytes) for e in ENGINES)
    plan = plan_residency(whole, 33)
    assert (plan.fits, plan.peak_bytes) == (False, 62)


def test_the_reserve_counts_in_every_stage() -> None:
    bare, reserved = plan_residency(ENGINES, 100), plan_residency(ENGINES, 107, reserve=7)
    for name, placement in bare.placements.items():
        other = reserved.placements[name]
        assert (other.kind, other.device_bytes) == (placement.kind, placement.device_bytes)
        assert other.peak_bytes == placement.peak_bytes + 7


_sizes = st.integers(1, 100)
_engine = st.tuples(_sizes, _sizes, st.integers(1, 30), st.none() | st.integers(1, 20))


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(_engine, min_size=1, max_size=5), st.integers(0, 600))
def test_plans_keep_their_promises(rows: list[tuple[int, int, int, int | None]], room: int) -> None:
    engines = [
        Footprint(f"e{i}", f"s{i}", w, a, runs, None if s is None else min(s, w))
        for i, (w, a, runs, s) in enumerate(rows)
    ]
    plan = plan_residency(engines, room)
    assert plan.fits == (plan.peak_bytes <= room)
    keeper = sum(e.weight_bytes for e in engines if plan.placements[e.name].kind == RESIDENT)
    assert plan.resident_bytes == keeper
    for engine in engines:
        placement = plan.placements[engine.name]
        here = 0 if placement.kind == RESIDENT else placement.device_bytes
        assert placement.peak_bytes == keeper + here + engine.activation_bytes
        assert placement.device_bytes <= engine.weight_bytes
        if placement.kind == STREAMED:
            assert engine.stream_bytes is not None
            assert placement.device_bytes >= engine.stream_bytes
            # Alone it would not fit.
            assert keeper + engine.weight_bytes + engine.activation_bytes > room
        if placement.kind != RESIDENT:
            assert placement.bus_bytes >= engine.weight_bytes
    more = plan_residency(engines, room + 50)
    assert more.fits >= plan.fits
    if plan.fits:
        assert more.bus_bytes <= plan.bus_bytes


def test_names_are_kept_in_order() -> None:
    assert list(plan_residency(ENGINES, 61).placements) == [e.name for e in ENGINES]


@pytest.mark.parametrize("budget", [0, 61, 100, None])
def test_the_same_question_has_the_same_answer(budget: int | None) -> None:
    assert plan_residency(ENGINES, budget) == plan_residency(ENGINES, budget)


def test_memory_of_a_recorded_graph_stays() -> None:
    keeper = Footprint("step", "denoise", 50, 10, 20, 10, keeps_activations=True)
    plan = plan_residency((TEXT, keeper, DECODE), None)
    # Decoding has its own activations and the step's.
    assert plan.peak_bytes == 115 + 10 + 30
    assert plan.placements["step"].peak_bytes == 115 + 10
    # As little as possible: text and decoding stream, and the step's memory is there even so.
    assert plan_residency((TEXT, keeper, DECODE), 0).peak_bytes == 10 + 30 + 4


NET = Footprint("net", "denoise", 30, 15, 20, 6, every_step=True)
LOOP = (TEXT, replace(STEP, every_step=True), NET, DECODE)


def test_what_runs_in_every_step_is_in_memory_together() -> None:
    plan = plan_residency(LOOP, 95)
    # Both are loaded once, and counted in each other's peak, with the larger working memory.
    assert {plan.placements[n].kind for n in ("step", "net")} == {LOADED}
    assert {plan.placements[n].peak_bytes for n in ("step", "net")} == {50 + 30 + 15}
    assert plan.bus_bytes == 60 + 50 + 30 + 5
    assert plan.fits


def test_a_part_of_a_loop_streams_beside_the_rest() -> None:
    plan = plan_residency(LOOP, 94)
    kinds = {n: plan.placements[n].kind for n in ("step", "net")}
    assert kinds == {"step": LOADED, "net": STREAMED}
    held = sum(plan.placements[n].device_bytes for n in kinds)
    assert held + 15 == 94
    assert plan.fits
    assert not plan_residency(LOOP, 30).fits


@given(st.integers(0, 200))
def test_a_loop_stays_as_a_whole_or_not_at_all(budget: int) -> None:
    plan = plan_residency(LOOP, budget)
    resident = {plan.placements[n].kind == RESIDENT for n in ("step", "net")}
    assert len(resident) == 1
    assert plan.fits == (plan.peak_bytes <= budget)
    held = sum(plan.placements[n].device_bytes for n in ("step", "net"))
    others = plan.resident_bytes - (held if True in resident else 0)
    assert plan.peak_bytes >= held + others + 15


def test_phases() -> None:
    names = ["clip_l", "conditioner", "control_a_conditioner", "control_a", "denoiser"]
    assert phases_of(names) == {
        "text": ("clip_l",),
        "conditioning": ("conditioner", "control_a_conditioner"),
        "denoising": ("denoiser", "control_a"),
    }
