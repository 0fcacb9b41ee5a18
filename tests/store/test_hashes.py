"""Notes of hashes: of a file as it is, whatever time it is given."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from sd35_trt.store import hashes
from sd35_trt.store.cache import StageCache
from sd35_trt.store.hashes import HashNotes


def digest(root: Path, path: Path) -> str:
    """As another process has it."""
    return StageCache(root).file_hash(path)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def copy_over(path: Path, other: Path) -> None:
    """Into the same inode."""
    subprocess.run(["cp", "--preserve=timestamps", other, path], check=True)


def touch_like(path: Path, other: Path) -> None:
    path.write_bytes(other.read_bytes())
    subprocess.run(["touch", "-r", other, path], check=True)


def move_over(path: Path, other: Path) -> None:
    copy = other.with_name("copy")
    shutil.copy2(other, copy)
    copy.rename(path)


@pytest.mark.parametrize("change", [copy_over, touch_like, move_over])
def test_a_file_of_equal_size_and_time_is_hashed_anew(
    change: Callable[[Path, Path], None], tmp_path: Path, hashed: list[Path]
) -> None:
    path, other = tmp_path / "model.safetensors", tmp_path / "other"
    path.write_bytes(b"one")
    other.write_bytes(b"two")
    subprocess.run(["touch", "-r", path, other], check=True)
    cache, before = tmp_path / "cache", path.stat()
    assert digest(cache, path) == digest(cache, path) == sha256(path)
    assert hashed == [path]
    change(path, other)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (3, before.st_mtime_ns)
    assert digest(cache, path) == sha256(other)
    assert hashed == [path, path]
    assert len(list((cache / "hashes").iterdir())) <= 2


def test_a_change_right_after_it_was_hashed(tmp_path: Path) -> None:
    """However fast: clocks of file systems tick slowly."""
    path, cache = tmp_path / "model", StageCache(tmp_path / "cache")
    for number in range(20):
        path.write_bytes(b"one")
        cache.file_hash(path)
        before = path.stat()
        path.write_bytes(b"two")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert cache.file_hash(path) == sha256(path), number


def test_another_path_of_the_same_inode_is_another_file(tmp_path: Path, hashed: list[Path]) -> None:
    """A disk of another host may have it under the same numbers."""
    path, cache = tmp_path / "model", tmp_path / "cache"
    path.write_bytes(b"one")
    digest(cache, path)
    (tmp_path / "link").symlink_to(path)
    digest(cache, tmp_path / "link")
    assert hashed == [path], "a link leads to the file"
    path.rename(tmp_path / "moved")
    assert digest(cache, tmp_path / "moved") == sha256(tmp_path / "moved")
    assert len(hashed) == 2


def test_links_that_we_make_are_no_change(tmp_path: Path, hashed: list[Path]) -> None:
    stage, bundle, cache = tmp_path / "stage", tmp_path / "bundle", tmp_path / "cache"
    for folder in (stage, bundle):
        folder.mkdir()
    file = stage / "weights"
    file.write_bytes(b"one")
    value = digest(cache, file)
    with StageCache(cache).relinked(stage):
        os.link(file, bundle / "weights")
    assert digest(cache, file) == value
    with StageCache(cache).relinked(bundle):
        shutil.rmtree(bundle)
    assert digest(cache, file) == value
    assert hashed == [file]
    # What somebody else does is a change, as far as the system tells.
    file.chmod(0o444)
    assert digest(cache, file) == value
    assert hashed == [file, file]


def test_a_change_beside_our_links_is_one(tmp_path: Path, hashed: list[Path]) -> None:
    file, cache = tmp_path / "stage" / "weights", tmp_path / "cache"
    file.parent.mkdir()
    file.write_bytes(b"one")
    digest(cache, file)
    file.write_bytes(b"two")  # before it is linked
    os.utime(file, ns=(0, 0))
    with StageCache(cache).relinked(file.parent):
        os.link(file, tmp_path / "link")
    assert digest(cache, file) == sha256(file)
    with StageCache(cache).relinked(file.parent):
        os.link(file, tmp_path / "link2")
        file.write_bytes(b"three")
    assert digest(cache, file) == sha256(file)


def test_what_is_written_while_it_is_hashed_is_not_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cache = tmp_path / "model", tmp_path / "cache"
    path.write_bytes(b"one")
    real = hashes.sha256_file

    def slow(file: Path) -> str:
        value = real(file)
        file.write_bytes(b"two and more")
        return value

    with monkeypatch.context() as patch:
        patch.setattr(hashes, "sha256_file", slow)
        digest(cache, path)
    assert digest(cache, path) == sha256(path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]", b"{}", b'{"sha256": 7}', b"0" * 64])
def test_a_damaged_note_is_none(content: bytes, tmp_path: Path) -> None:
    path, cache = tmp_path / "model", tmp_path / "cache"
    path.write_bytes(b"one")
    digest(cache, path)
    (note,) = (cache / "hashes").iterdir()
    note.write_bytes(content)
    assert digest(cache, path) == sha256(path)
    assert note.read_bytes() != content


def test_a_name_that_is_no_text(tmp_path: Path, hashed: list[Path]) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9")
    path.write_bytes(b"one")
    assert digest(tmp_path / "cache", path) == digest(tmp_path / "cache", path)
    assert len(hashed) == 1


def test_notes_of_files_that_are_gone(tmp_path: Path) -> None:
    folder, files = tmp_path / "notes", [tmp_path / name for name in "abc"]
    notes = HashNotes(folder)
    for file in files:
        file.write_bytes(b"one")
        notes.digest(file)
    assert not list(notes.outdated())
    files[0].unlink()
    files[1].write_bytes(b"two and more")
    (folder / ("0" * 64)).write_text("1" * 64)  # as earlier versions had them
    (folder / "mine").write_text("kept")
    assert len(list(notes.outdated())) == 3
    for path in notes.outdated():
        path.unlink()
    assert {path.name for path in folder.iterdir()} >= {"mine"}
    assert len(list(folder.iterdir())) == 2


def test_a_file_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    path.write_bytes(b"one")

    def fail(file: Path) -> str:
        raise OSError(5, "Input/output error")  # as read(2): it names no file

    monkeypatch.setattr(hashes, "sha256_file", fail)
    with pytest.raises(OSError, match="model") as caught:
        digest(tmp_path / "cache", path)
    assert caught.value.filename == str(path)
