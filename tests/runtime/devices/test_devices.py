"""Devices: one suite for the CPU, for CUDA's calls on a fake, and for a GPU where there is one."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
from conftest import alone_on_a_gpu
from fake_cuda import FakeCuda, host_array
from fake_gpu import install_fake

from sd35_trt.errors import OutOfMemory, Sd35Error, UsageError
from sd35_trt.runtime.devices.device import Device
from sd35_trt.runtime.devices.opening import open_device


@pytest.fixture(params=["cpu", "fake", "cuda"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    if request.param == "fake":
        install_fake(monkeypatch)
    try:
        opened = open_device("cpu" if request.param == "cpu" else "cuda")
    except Sd35Error as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return install_fake(monkeypatch)


@pytest.mark.parametrize("count", [1, 1000, 20_000_000])
def test_what_goes_up_comes_down(device: Device, count: int) -> None:
    array = np.random.default_rng(0).integers(0, 255, count, np.uint8)
    expected = array.copy()
    buffer = device.upload(array)
    assert (buffer.shape, buffer.dtype, buffer.nbytes) == (array.shape, array.dtype, array.nbytes)
    np.testing.assert_array_equal(device.download(buffer), expected)


def test_strided_arrays_arrive_in_order(device: Device) -> None:
    array = np.arange(24, dtype=np.float16).reshape(4, 6).T
    np.testing.assert_array_equal(device.download(device.upload(array)), array)


def test_parts_share_memory(device: Device) -> None:
    array = np.arange(60, dtype=np.float32).reshape(5, 3, 4)
    buffer = device.upload(array)
    for key in (0, 3, -1, slice(0, 2), slice(-2, None), slice(2, 2), slice(None)):
        part = buffer[key]
        assert part.shape == array[key].shape
        np.testing.assert_array_equal(device.download(part), array[key])
    shaped = buffer[1:].reshape((6, 8))
    assert shaped.shape == (6, 8)
    np.testing.assert_array_equal(device.download(shaped), array[1:].reshape(6, 8))
    with pytest.raises(ValueError, match="shape"):
        buffer.reshape((7, 8))
    device.copy(buffer[0], buffer[4])
    np.testing.assert_array_equal(device.download(buffer)[4], array[0])
    assert len(buffer) == 5
    with pytest.raises(IndexError):
        buffer[5]


def test_a_part_keeps_its_memory(device: Device) -> None:
    part = device.upload(np.arange(10, dtype=np.int64))[7:]
    gc.collect()
    device.upload(np.zeros(10, np.int64))
    np.testing.assert_array_equal(device.download(part), [7, 8, 9])


def test_a_fetch_is_behind_the_queue_and_before_what_follows(device: Device) -> None:
    """Ping-pong, as the loop does it."""
    pair = [device.upload(np.full(5, i, np.float32)) for i in range(2)]
    slots = [*device.slots((5,), np.float32, 3)] or [None] * 3
    fetches, pictures = [], []
    for i in range(6):
        if i >= 2:
            fetches[i - 2].fence()
        device.copy(device.upload(np.full(5, 10 + i, np.float32)), pair[i % 2])
        fetches.append(device.fetch(pair[i % 2], slots[i % 3]))
        if not device.queues:
            pictures.append(fetches[i].wait()[0])
        elif i >= 2:
            pictures.append(fetches[i - 2].wait()[0])
    if device.queues:
        pictures += [fetch.wait()[0] for fetch in fetches[-2:]]
    assert pictures == [10, 11, 12, 13, 14, 15]


def test_memory_is_counted(device: Device, request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["device"] == "cuda":
        alone_on_a_gpu()
    before = device.memory()
    buffer = device.upload(np.ones(500_000_000, np.uint8))
    during = device.memory()
    assert during.used - before.used >= 400_000_000
    assert during.peak >= during.used
    del buffer


def test_unknown_devices() -> None:
    with pytest.raises(UsageError, match="unknown device 'tpu'"):
        open_device("tpu")


@pytest.mark.parametrize(
    ("bindings", "words"),
    [(None, "is not installed"), (ModuleType("cuda.bindings"), r"does not load \(cannot import")],
)
def test_cuda_bindings_that_are_absent_or_broken(
    bindings: ModuleType | None, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in [
        m for m in sys.modules if ".devices.cuda" in m or m.startswith("cuda.bindings.")
    ]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    with pytest.raises(Sd35Error, match=rf"cuda:1 needs cuda-bindings, which {words}.* — pip"):
        open_device("cuda:1")


@pytest.mark.parametrize(
    ("devices", "name", "words"),
    [(-1, "cuda", "cudaErrorInsufficientDriver"), (0, "cuda", "has 0 GPU"), (1, "cuda:1", "1 GPU")],
)
def test_no_such_gpu(devices: int, name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(monkeypatch, devices=devices)
    with pytest.raises(Sd35Error, match=words):
        open_device(name)


@pytest.mark.parametrize("dropped", [True, False])
def test_everything_is_released(fake: FakeCuda, dropped: bool) -> None:
    device = open_device("cuda")
    source, target = (device.upload(np.ones(1000, np.float32)) for _ in range(2))
    (slot,) = device.slots((1000,), np.float32, 1)
    fetch = device.fetch(source, slot)
    fetch.wait()
    device.capture(lambda: device.copy(source, target)).close()
    device.scratch(1 << 20)
    if dropped:
        del source, target, fetch
    device.close()
    device.close()
    assert fake.used == 0
    np.testing.assert_array_equal(slot, 1)  # a caller may keep what it saw
    del slot
    source = target = fetch = None
    gc.collect()
    # Its stream is for the next device.
    assert fake.alive == {**dict.fromkeys(fake.alive, 0), "stream": 1}, fake.alive
    for _ in range(3):
        open_device("cuda").close()
    assert fake.alive["stream"] == 1


def test_a_buffer_may_outlive_its_device(fake: FakeCuda) -> None:
    device = open_device("cuda")
    buffer = device.empty((10,), np.float32)
    device.close()
    assert fake.used == 0
    del buffer
    gc.collect()
    assert fake.used == 0


def test_no_memory_left(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(monkeypatch, total=1 << 20)
    device = open_device("cuda")
    with pytest.raises(OutOfMemory, match=r"cuda:0 has no room for 2.0 MB more — draw a smaller"):
        device.empty((2_000_000,), np.uint8)
    device.empty((1000,), np.uint8)


def test_a_graph_does_its_work_again(fake: FakeCuda) -> None:
    device = open_device("cuda")
    source, target = device.upload(np.zeros(4, np.float32)), device.empty((4,), np.float32)
    graph = device.capture(lambda: device.copy(source, target))
    for value in (3, 5):
        device.copy(device.upload(np.full(4, value, np.float32)), source)
        graph.replay()
        np.testing.assert_array_equal(device.download(target), [value] * 4)
    graph.close()


def test_buffers_that_die_while_recording_are_freed_after_it(fake: FakeCuda) -> None:
    device = open_device("cuda")
    before = fake.used
    buffers = [device.empty((1000,), np.uint8)]

    def work() -> None:
        buffers.clear()
        assert fake.used > before

    device.capture(work).close()
    assert fake.used == before


def test_a_failure_while_recording_leaves_the_stream_usable(fake: FakeCuda) -> None:
    device = open_device("cuda")

    def work() -> None:
        raise Sd35Error("no")

    with pytest.raises(Sd35Error, match="no"):
        device.capture(work)
    np.testing.assert_array_equal(device.download(device.upload(np.arange(3))), [0, 1, 2])
    assert fake.alive["graph"] == 0


def test_scratch_memory_grows_and_says_so(fake: FakeCuda) -> None:
    device = open_device("cuda")
    first, version = device.scratch(100), device.scratch_version
    assert device.scratch(50) == first
    assert device.scratch_version == version
    device_bytes = fake.used
    device.scratch(1000)
    assert device.scratch_version > version
    assert fake.used == device_bytes + 900


def test_uploads_do_not_overtake_each_other(fake: FakeCuda) -> None:
    """They share staging memory, and the stream is late."""
    device = open_device("cuda")
    buffers = [device.upload(np.full(10, i)) for i in range(4)]
    assert [int(host_array(device.pointer(b), (10,), np.int64)[0]) for b in buffers[:3]] == [
        0,
        1,
        2,
    ]
    assert [int(device.download(b)[0]) for b in buffers] == [0, 1, 2, 3]
