"""Triton's inside behaves as we rely on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from sd35_trt.compat.triton import binary_hashes, cached_files, get_cache_manager
from sd35_trt.programs.triton_kernels import product


def test_a_kernel_knows_the_binaries_of_its_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert binary_hashes(product) == []
    # By device: what was compiled, by its arguments, and more.
    binary = SimpleNamespace(hash="b" * 64)
    monkeypatch.setitem(product.device_caches, 0, ({"arguments": binary}, {}, None))
    assert binary_hashes(product) == ["b" * 64]


def test_files_are_kept_by_digest_and_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    digest = "a" * 64
    assert cached_files(digest, "product") == {}
    path = get_cache_manager(digest).put(b"code", "product.cubin")
    get_cache_manager(digest).put_group("product.json", {"product.cubin": path})
    files = cached_files(digest, "product")
    assert {name: Path(file).read_bytes() for name, file in files.items()} == {
        "product.cubin": b"code"
    }
