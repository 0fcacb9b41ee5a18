"""A build that is killed or cannot write leaves nothing that loads, and the next one succeeds."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import UNFINISHED

from sd35_trt.build import BuildOptions, build
from sd35_trt.errors import BundleError, UsageError
from sd35_trt.formats.bundle import MANIFEST, Bundle
from sd35_trt.policies import load_policy

# Imports what a build imports, then forks one build for each line it is sent: the number of the
# call on a file at which it gets SIGKILL, 0 to let it finish. Answers with the exit status and how
# many calls on files of ours there were.
_ZYGOTE = """
import os, signal, sys
from pathlib import Path
import sd35_trt.export.component, sd35_trt.export.tokenizers, transformers, diffusers
from transformers import AutoTokenizer, CLIPTextModelWithProjection
from sd35_trt.build import BuildOptions, build
out, cache = Path(sys.argv[1]), Path(sys.argv[2])
folders = (str(out.parent), str(cache))
print("ready", flush=True)
for line in sys.stdin:
    counts, sums = os.pipe()
    pid = os.fork()
    if pid == 0:
        calls = 0
        def count(event, arguments):
            global calls
            if event != "open" and not event.startswith(("os.", "shutil.")):
                return
            paths = [os.fspath(a) for a in arguments if isinstance(a, (str, os.PathLike))]
            if any(path.startswith(folders) for path in paths):
                calls += 1
                if calls == int(line):
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(count)
        try:
            build(BuildOptions(out=out, cache_dir=cache))
            os.write(sums, str(calls).encode())
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
    os.close(sums)
    status = os.waitpid(pid, 0)[1]
    print(status, int(os.read(counts, 20) or 0), flush=True)
    os.close(counts)
"""


def _loadable(folder: Path) -> list[Path]:
    """Directories below a folder that open as a bundle; each of them must be whole."""
    folders = []
    for path in folder.rglob(MANIFEST):
        try:
            Bundle.open(path.parent)
        except BundleError:
            continue
        Bundle.open(path.parent, verify=True)
        folders.append(path.parent)
    return folders


@pytest.mark.nightly
def test_sigkill_at_any_call_on_a_file(
    mini_bundle: Path, stage_cache: Path, tmp_path: Path
) -> None:
    cache, folder = tmp_path / "cache", tmp_path / "bundles"
    shutil.copytree(stage_cache, cache, copy_function=os.link, ignore=UNFINISHED)
    folder.mkdir()
    out = folder / "mini"
    rng = random.Random(20)
    with subprocess.Popen(
        [sys.executable, "-c", _ZYGOTE, str(out), str(cache)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as zygote:
        assert zygote.stdin is not None
        assert zygote.stdout is not None

        def run(call: int = 0) -> tuple[int, int]:
            assert zygote.stdin is not None
            assert zygote.stdout is not None
            zygote.stdin.write(f"{call}\n")
            zygote.stdin.flush()
            status, calls = zygote.stdout.readline().split()
            return int(status), int(calls)

        def forget(*stages: str) -> None:
            for stage in stages:
                for kind in (stage, f"{stage}-graph"):
                    shutil.rmtree(cache / kind, ignore_errors=True)

        assert zygote.stdout.readline() == "ready\n"
        calls = {}
        # The first one hashes what it finds, which those after it do not.
        for stages in ((), (), ("tokenizers", "clip_l")):
            forget(*stages)
            status, calls[stages] = run()
            assert status == 0
            shutil.rmtree(out)
        for i in range(12):
            # Half of them while stages are written, half while the bundle is assembled; in half
            # of each there is an older bundle to be replaced.
            stages = ((), ("tokenizers", "clip_l"))[i % 2]
            forget(*stages)
            before = out.exists()
            assert run(rng.randint(1, calls[stages]))[0] == signal.SIGKILL
            loadable = _loadable(folder)
            assert out in loadable or not before, "an older bundle is lost"
            if i % 4 < 2 and out.exists():
                shutil.rmtree(out)
            elif i % 4 >= 2:
                assert run()[0] == 0
        assert run()[0] == 0
        zygote.stdin.close()
    assert [path.name for path in folder.iterdir()] == ["mini"]
    Bundle.open(out, verify=True)
    assert not list(cache.glob("*/.tmp-*"))


@pytest.fixture
def file_size_limit() -> Iterator[None]:
    """The kernel refuses a write in the middle of a file; Python ignores the signal of it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("file_size_limit")
def test_a_write_that_fails_halfway(run, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out, cache = tmp_path / "bundles" / "mini", tmp_path / "cache"
    status, _, err = run("build", "--out", out, "--cache-dir", cache)
    assert status == 1
    errors = [line for line in err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "cannot write" in errors[0]
    assert "GB free" in errors[0]
    assert "Traceback" not in err
    assert not (tmp_path / "bundles").exists()
    assert not list(cache.glob("*/.tmp-*"))
    assert not (cache / "clip_l").exists() or not list((cache / "clip_l").iterdir())


def test_destinations_that_are_refused(tmp_path: Path, stage_cache: Path) -> None:
    folder = tmp_path / "taken"
    folder.mkdir()
    (folder / "precious").write_text("data")
    (tmp_path / "file").write_text("data")
    (tmp_path / "link").symlink_to(folder)
    cases = {
        folder: "holds no bundle",
        tmp_path / "file": "is a file or a link",
        tmp_path / "link": "is a file or a link",
        tmp_path / "file" / "bundle": "cannot write in",
        Path("/proc/sd35-trt/bundle"): "cannot write in",
    }
    for out, words in cases.items():
        with pytest.raises(UsageError, match=words) as caught:
            build(BuildOptions(out=out, cache_dir=stage_cache))
        assert "choose another --out" in str(caught.value)
    assert (folder / "precious").read_text() == "data"


def test_an_older_bundle_is_replaced(mini_bundle: Path, stage_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundles" / "mini"
    build(BuildOptions(out=out, cache_dir=stage_cache))
    build(BuildOptions(out=out, cache_dir=stage_cache, batch=(1, 2)))
    assert Bundle.open(out).manifest.ranges.batch == (1, 2)
    assert [path.name for path in out.parent.iterdir()] == ["mini"]


def test_unchanged_inputs_do_no_work(mini_bundle: Path, stage_cache: Path, tmp_path: Path) -> None:
    notes: dict[str, str] = {}
    out = build(
        BuildOptions(out=tmp_path / "again", cache_dir=stage_cache),
        lambda stage, done, total, note: notes.update({stage: note}),
    )
    assert set(notes.values()) == {"unchanged", "written"}

    def without_times(bundle: Path) -> dict[str, object]:
        data = json.loads((bundle / MANIFEST).read_text())
        return {k: v for k, v in data.items() if k != "created"}

    assert without_times(out) == without_times(mini_bundle)


def test_a_changed_policy_line_rebuilds_what_it_concerns(
    stage_cache: Path, tmp_path: Path, mini_bundle: Path
) -> None:
    text = (Path(load_policy.__code__.co_filename).parent / "fp32.toml").read_text()
    path = tmp_path / "mine.toml"
    rule = '[[rule]]\ncomponent = "clip_g"\nmatch = "*"\nprecision = "half"\nreason = ""\n'
    path.write_text(text + rule)
    notes: dict[str, str] = {}
    build(
        BuildOptions(out=tmp_path / "again", cache_dir=stage_cache, policy=str(path)),
        lambda stage, done, total, note: notes.update({stage: note}),
    )
    # From an earlier session of these tests, clip_g itself may be there too.
    assert {s for s, note in notes.items() if note == "done"} <= {"clip_g"}


def test_a_damaged_stage_is_made_again(
    stage_cache: Path, tmp_path: Path, mini_bundle: Path
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(stage_cache, cache, ignore=UNFINISHED)
    for path in cache.glob("clip_l/*/weights.data"):
        data, before = bytearray(path.read_bytes()), path.stat().st_mtime_ns
        data[1000] ^= 1
        path.chmod(0o644)
        path.write_bytes(data)
        os.utime(path, ns=(before + 1, before + 1))  # as any later write
    notes: dict[str, str] = {}
    out = build(
        BuildOptions(out=tmp_path / "again", cache_dir=cache),
        lambda stage, done, total, note: notes.update({stage: note}),
    )
    assert notes["clip_l"] == "done"
    assert notes["clip_g"] == "unchanged"
    assert Bundle.open(out, verify=True).manifest.components == (
        Bundle.open(mini_bundle).manifest.components
    )
