"""Copies between two devices: what comes, when, and what may be overwritten after it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from fake_cuda import FakeCuda, host_array
from fake_gpu import install_fake

from sd35_trt.runtime.devices.device import Buffer, Device
from sd35_trt.runtime.devices.opening import open_device
from sd35_trt.runtime.devices.peer_copies import Copy, exchange

Pair = tuple[Device, Device]


@pytest.fixture(params=["cpu", "fake"])
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    if request.param == "fake":
        install_fake(monkeypatch, devices=2)
    names = ("cpu", "cpu") if request.param == "cpu" else ("cuda:0", "cuda:1")
    devices = open_device(names[0]), open_device(names[1])
    assert devices[0].reaches(devices[1])
    yield devices
    for device in devices:
        device.activate()
        device.close()


def filled(device: Device, value: float) -> Buffer:
    device.activate()
    return device.upload(np.full(1000, value, np.float32))


def content(device: Device, buffer: Buffer) -> np.ndarray:
    device.activate()
    return device.download(buffer)


def test_each_gets_the_others(pair: Pair) -> None:
    own = [filled(device, value) for device, value in zip(pair, (1.0, 2.0), strict=True)]
    got = [filled(device, 0.0) for device in pair]
    exchange(*pair, [Copy(got[0], own[1])], [Copy(got[1], own[0])])
    np.testing.assert_array_equal(content(pair[0], got[0]), 2.0)
    np.testing.assert_array_equal(content(pair[1], got[1]), 1.0)


def test_what_went_may_be_overwritten(pair: Pair) -> None:
    """Many times, as the steps of a picture do: neither waits for the host."""
    one, other = pair
    mine, theirs = filled(one, 0.0), [filled(other, -1.0) for _ in range(6)]
    values = [filled(one, float(value)) for value in range(6)]
    for value, target in zip(values, theirs, strict=True):
        one.copy(value, mine)
        exchange(one, other, to_other=[Copy(target, mine)])
    one.copy(values[0], mine)
    one.synchronize()  # it is written before anybody asks for the copy
    for number, target in enumerate(theirs):
        np.testing.assert_array_equal(content(other, target), float(number))


def test_a_copy_waits_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """For what computes its source, and for what reads the target before it."""
    fake: FakeCuda = install_fake(monkeypatch, devices=2)
    one, other = open_device("cuda:0"), open_device("cuda:1")
    assert one.reaches(other)
    source, target, kept = filled(one, 1.0), filled(other, 5.0), filled(other, 0.0)
    array = host_array(one.pointer(source), source.shape, source.dtype)
    one.activate()
    fake.launch(one.stream, lambda: np.copyto(array, 3.0))
    other.copy(target, kept)
    exchange(one, other, to_other=[Copy(target, source)])
    np.testing.assert_array_equal(content(other, target), 3.0)
    np.testing.assert_array_equal(content(other, kept), 5.0)
    for device in (one, other):
        device.activate()
        device.close()


@pytest.mark.parametrize("peers", [set(), {(0, 1)}, {(1, 0)}])
def test_both_have_to_reach_the_other(
    monkeypatch: pytest.MonkeyPatch, peers: set[tuple[int, int]]
) -> None:
    fake = install_fake(monkeypatch, devices=2)
    fake.peers = peers
    assert not open_device("cuda:0").reaches(open_device("cuda:1"))
    assert not open_device("cuda:0").reaches(open_device("cpu"))
    assert not open_device("cpu").reaches(open_device("cuda:0"))


def test_one_gpu_may_stand_for_two(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = install_fake(monkeypatch)
    fake.peers = set()
    assert open_device("cuda:0").reaches(open_device("cuda:0"))


def test_access_that_was_allowed_before_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    install_fake(monkeypatch, devices=2)
    for _ in range(2):
        one, other = open_device("cuda:0"), open_device("cuda:1")
        assert one.reaches(other)
        one.close()
        other.activate()
        other.close()


def test_sizes_have_to_fit(pair: Pair) -> None:
    with pytest.raises(ValueError, match=r"4000 bytes|reshape"):
        exchange(*pair, [Copy(filled(pair[0], 0.0)[:10], filled(pair[1], 1.0))])
