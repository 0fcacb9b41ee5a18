"""Scripts in processes of their own, whose time and memory are measured stage by stage."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import click

_SCRIPTS = Path(__file__).parent / "children"


def anonymous_bytes(pid: int) -> int:
    """A process's memory that no file backs."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text("ascii").splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return 0


def run_child(script: str, *arguments: str | Path) -> dict[str, Any]:
    """Run a script of ``children``, which prints [time, stage, note] where a stage begins.

    Returns:
        ``seconds``, ``peak_bytes``, and by stage: the same, and the notes it ended with.
    """
    start = time.time()
    child = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(_SCRIPTS / script), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    samples: list[tuple[float, int]] = []

    def watch() -> None:
        while child.poll() is None:
            samples.append((time.time(), anonymous_bytes(child.pid)))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    output, errors = child.communicate()
    end = time.time()
    watcher.join()
    if child.returncode:
        raise click.ClickException(
            f"{script} failed with status {child.returncode}: {errors.strip().splitlines()[-1]}"
        )
    begins: dict[str, float] = {}
    notes: dict[str, str] = {}
    for line in output.splitlines():
        if line.startswith("["):
            when, stage, note = json.loads(line)
            begins.setdefault(stage, when)
            notes[stage] = note
    ends = [*list(begins.values())[1:], end][: len(begins)]
    stages = {
        stage: {
            "seconds": stop - begin,
            "peak_bytes": max((b for t, b in samples if begin <= t <= stop), default=0),
            "note": notes[stage],
        }
        for (stage, begin), stop in zip(begins.items(), ends, strict=True)
    }
    peak = max(bytes_ for _, bytes_ in samples)
    return {"seconds": end - start, "peak_bytes": peak, "stages": stages}
