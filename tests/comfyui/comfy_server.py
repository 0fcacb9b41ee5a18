"""A real ComfyUI without a window, on the CPU, with our nodes in it, and what its clients see."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

if "COMFYUI" not in os.environ:
    pytest.skip("COMFYUI does not name a checkout of ComfyUI", allow_module_level=True)
# ComfyUI has it, and so has the environment that `make comfyui` runs the tests in.
aiohttp = pytest.importorskip("aiohttp")

CHECKOUT = Path(os.environ["COMFYUI"])
NODES = Path(__file__).parents[2] / "comfyui"

#: Seconds to wait for ComfyUI to start, or for a workflow to end.
PATIENCE = 300.0

_ENDS = {"execution_success", "execution_error", "execution_interrupted"}
# Of the binary messages that ComfyUI sends.
_PREVIEW, _HEADER = 1, 8

Workflow = dict[str, dict[str, Any]]


@dataclass
class Outcome:
    """What became of a workflow.

    Attributes:
        end: the type of the last message, or ``refused``.
        detail: its data, or the answer of the refusal.
        progress: (value, most) of each message of it.
        previews: JPEGs.
        files: that were saved.
    """

    end: str = ""
    detail: Any = None
    progress: list[tuple[int, int]] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)


class ComfyServer:
    """A process that ends with the block.

    Args:
        checkout: of ComfyUI.
        base: an empty folder for its models, inputs and outputs.
    """

    def __init__(self, checkout: Path, base: Path) -> None:
        self.base = base
        for folder in ("models/sd35_bundles", "models/sd35_adapters", "custom_nodes", "input"):
            (base / folder).mkdir(parents=True)
        (base / "custom_nodes" / "sd35-trt").symlink_to(NODES)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        options = [
            "--cpu", "--listen", "127.0.0.1", "--port", self.address.split(":")[1],
            "--base-directory", str(base), "--database-url", f"sqlite:///{base / 'comfyui.db'}",
            "--disable-api-nodes", "--disable-auto-launch", "--preview-method", "latent2rgb",
        ]  # fmt: skip
        self._log = (base / "comfyui.log").open("w+b")
        self._process = subprocess.Popen(
            [sys.executable, str(checkout / "main.py"), *options],
            cwd=checkout, stdout=self._log, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def __enter__(self) -> ComfyServer:
        asyncio.run(self._wait_until_ready())
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=PATIENCE)
        self._log.close()

    @property
    def log(self) -> str:
        """What it wrote so far."""
        return (self.base / "comfyui.log").read_text(errors="replace")

    def get(self, path: str) -> Any:
        """The JSON that is answered."""

        async def ask() -> Any:
            async with (
                aiohttp.ClientSession() as session,
                session.get(f"http://{self.address}{path}") as answer,
            ):
                return await answer.json()

        return asyncio.run(ask())

    def run(self, workflow: Workflow, interrupt_at: int | None = None) -> Outcome:
        """Post a workflow and wait for its end.

        Args:
            interrupt_at: step of progress after which it is interrupted.
        """
        return asyncio.run(asyncio.wait_for(self._run(workflow, interrupt_at), PATIENCE))

    async def _wait_until_ready(self) -> None:
        end = time.monotonic() + PATIENCE
        async with aiohttp.ClientSession() as session:
            while time.monotonic() < end:
                assert self._process.poll() is None, self.log
                try:
                    async with session.get(f"http://{self.address}/system_stats"):
                        return
                except aiohttp.ClientError:
                    await asyncio.sleep(0.2)
        raise TimeoutError(self.log)

    async def _run(self, workflow: Workflow, interrupt_at: int | None) -> Outcome:
        client, base, outcome = uuid.uuid4().hex, f"http://{self.address}", Outcome()
        async with (
            aiohttp.ClientSession() as session,
            session.ws_connect(f"{base}/ws?clientId={client}", max_msg_size=0) as socket,
        ):
            body = {"prompt": workflow, "client_id": client}
            async with session.post(f"{base}/prompt", json=body) as answer:
                if answer.status != 200:
                    outcome.end, outcome.detail = "refused", await answer.json()
                    return outcome
                prompt_id = (await answer.json())["prompt_id"]
            async for message in socket:
                if message.type == aiohttp.WSMsgType.BINARY:
                    if int.from_bytes(message.data[:4], "big") == _PREVIEW:
                        outcome.previews.append(message.data[_HEADER:])
                    continue
                event = json.loads(message.data)
                data = event["data"]
                if event["type"] == "progress":
                    outcome.progress.append((data["value"], data["max"]))
                    if data["value"] == interrupt_at:
                        await session.post(f"{base}/interrupt", json={})
                if event["type"] == "executed":
                    outcome.files += [
                        self.base / "output" / image["subfolder"] / image["filename"]
                        for image in data["output"].get("images", [])
                    ]
                if event["type"] in _ENDS and data["prompt_id"] == prompt_id:
                    outcome.end, outcome.detail = event["type"], data
                    break
        return outcome


def changed(workflow: Workflow, **inputs: Any) -> Workflow:
    """A workflow with other values, by name, wherever a node has one of that name; links stay."""

    def change(own: Mapping[str, Any]) -> dict[str, Any]:
        return {
            name: value if isinstance(value, list) else inputs.get(name, value)
            for name, value in own.items()
        }

    return {number: {**n, "inputs": change(n["inputs"])} for number, n in workflow.items()}


def load_workflow(name: str) -> Workflow:
    """One of those that come with the nodes, in the form of the API."""
    return json.loads((NODES / "workflows" / "api" / f"{name}.json").read_text())
