"""The name of a model that tells which one it is, by its path and its links."""

from __future__ import annotations

from pathlib import Path

import pytest

from sd35_trt.store.model_names import telling_name

HASH = "b940f670f0eda2d07fbb75229e779da1ad11eb80"
TURBO = "stable-diffusion-3.5-large-turbo"


def folder(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    return path


def file(path: Path) -> Path:
    folder(path.parent)
    path.touch()
    return path


def link(path: Path, target: Path | str) -> Path:
    folder(path.parent)
    path.symlink_to(target)
    return path


def test_its_own_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for above in ("turbo-tests", "turbo", "sd3.5_large_turbo"):
        assert telling_name(folder(tmp_path / above / "model")) == "model"
        assert telling_name(file(tmp_path / above / "sd3.5_large.safetensors")).startswith("sd3.5")
        inner = folder(tmp_path / above / "snapshots" / HASH)
        assert telling_name(inner) == HASH, "not the hub's cache"
    monkeypatch.chdir(folder(tmp_path / "my-turbo" / "vae"))
    assert telling_name(Path()) == ""
    assert telling_name(Path("..")) == "my-turbo"
    assert telling_name(Path("../../my-turbo/")) == "my-turbo"


@pytest.mark.parametrize("make", [folder, file])
def test_links(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """The target's name first, then the links'."""
    silent = make(tmp_path / "turbo-tests" / "0123abcd")
    large = make(tmp_path / "sd3.5_large")
    turbo = make(tmp_path / "sd3.5_large_turbo")
    for name, target, telling in (
        ("turbo", silent, "turbo"),
        ("model", silent, "model"),
        ("turbo-2", large, "sd3.5_large"),
        ("model-2", turbo, "sd3.5_large_turbo"),
    ):
        assert telling_name(link(tmp_path / "links" / name, target)) == telling
    first = link(tmp_path / "first-turbo", "turbo-tests/0123abcd")
    second = link(tmp_path / "elsewhere" / "second", f"../{first.name}")
    assert telling_name(link(tmp_path / "third", second)) == "first-turbo"
    assert telling_name(tmp_path / "elsewhere" / ".." / "third") == "first-turbo"


def test_a_folder_above_that_is_a_link(tmp_path: Path) -> None:
    model = folder(tmp_path / "data" / "model")
    assert telling_name(link(tmp_path / "turbo", model.parent) / "model") == "model"


def test_a_snapshot_of_the_hub(tmp_path: Path) -> None:
    """The repository's name decides, not a link's or the cache's folder."""
    for repository, other in ((TURBO, "large"), ("stable-diffusion-3.5-large", "turbo")):
        root = tmp_path / "turbo-hub" / f"models--stabilityai--{repository}"
        snapshot = folder(root / "snapshots" / HASH)
        assert telling_name(snapshot) == repository
        assert telling_name(link(tmp_path / other, snapshot)) == repository
    silent = folder(tmp_path / "models--turbo--sd35" / "snapshots" / HASH)
    assert telling_name(silent) == HASH
    assert telling_name(link(tmp_path / "my-turbo", silent)) == "my-turbo"


def test_a_file_in_a_snapshot(tmp_path: Path) -> None:
    """Its own name, a link's to a blob; the repository's where it says nothing."""
    root = tmp_path / f"models--stabilityai--{TURBO}"
    file(root / "blobs" / "0123abcd")
    for name, telling in (
        ("sd3.5_large.safetensors", "sd3.5_large.safetensors"),
        ("sd3.5_large_turbo.safetensors", "sd3.5_large_turbo.safetensors"),
        ("model.safetensors", TURBO),
    ):
        path = link(root / "snapshots" / HASH / name, "../../blobs/0123abcd")
        assert telling_name(path) == telling
        assert telling_name(link(tmp_path / f"a-{name}", path)) == telling
        # A cache without links holds the file itself.
        assert telling_name(file(root / "snapshots" / "other" / name)) == telling
