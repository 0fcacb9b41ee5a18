"""The model of ONNX Runtime's arena; against a GPU's figures it is checked with the plans."""

from __future__ import annotations

import random

from sd35_trt.export.arena import Arena, Chunk, allocated_bytes

MIB = 1 << 20


def test_a_free_chunk_is_taken_again() -> None:
    arena = Arena()
    first = arena.allocate(1000)
    assert arena.total == 1024
    arena.free(first)
    assert arena.allocate(900) is first
    assert arena.total == 1024
    arena.allocate(1)
    assert arena.total == 1024 + 256


def test_the_smallest_that_has_room_is_taken() -> None:
    arena = Arena()
    large, small = arena.allocate(64 * MIB), arena.allocate(40 * MIB)
    arena.free(large)
    arena.free(small)
    assert arena.allocate(36 * MIB) is small
    # Less than twice what is asked for, and less than 128 MiB over: all of it is taken.
    assert small.size == 40 * MIB


def test_large_rests_are_split_off_and_joined_again() -> None:
    arena = Arena()
    whole = arena.allocate(1024 * MIB)
    arena.free(whole)
    parts = [arena.allocate(256 * MIB) for _ in range(4)]
    assert arena.total == 1024 * MIB
    for part in (parts[2], parts[0], parts[3], parts[1]):
        arena.free(part)
    assert arena.allocate(1024 * MIB).size == 1024 * MIB
    assert arena.total == 1024 * MIB
    # 900 of 1024: the rest is 124 MiB, and stays.
    other = Arena()
    other.free(other.allocate(1024 * MIB))
    assert other.allocate(900 * MIB).size == 1024 * MIB


def test_regions_are_not_joined() -> None:
    arena = Arena()
    for chunk in [arena.allocate(512 * MIB) for _ in range(2)]:
        arena.free(chunk)
    arena.allocate(1024 * MIB)
    assert arena.total == 2048 * MIB


def test_bytes_are_neither_lost_nor_given_twice() -> None:
    draw = random.Random(0)
    arena, live = Arena(), []
    for _ in range(2000):
        if live and draw.random() < 0.5:
            arena.free(live.pop(draw.randrange(len(live))))
        else:
            size = draw.choice([1, 300, 5 * MIB, 200 * MIB])
            chunk = arena.allocate(size)
            assert chunk.size >= size
            live.append(chunk)
        assert sum(c.size for c in live) <= arena.total
        assert len({id(c) for c in live}) == len(live)
    before = arena.total
    for chunk in live:
        arena.free(chunk)
    whole: list[Chunk] = sorted(arena._free, key=lambda c: c.size)
    # Every region is one free chunk again.
    assert all(c.before is None and c.after is None for c in whole)
    assert sum(c.size for c in whole) == before


def test_weights_take_whole_pages() -> None:
    handles = 64 * MIB
    assert allocated_bytes([3 * MIB, 3 * MIB]) == handles + 8 * MIB
    assert allocated_bytes([1000] * 10) == handles + 2 * MIB
    assert allocated_bytes([]) == handles
