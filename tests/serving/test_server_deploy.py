"""The image and the Kubernetes example name what is there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import click
import yaml
from starlette.routing import Match

from sd35_trt.cli.serve import command

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found]

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "serving" / "deploy"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def parsed(words: list[str]) -> dict[str, Any]:
    """Options of ``sd35-trt serve``; fails where it does not know them."""
    return command.make_context("serve", words).params


def test_the_image_holds_every_room_and_starts_the_server() -> None:
    lines = (DEPLOY / "Dockerfile.dockerignore").read_text("utf-8").splitlines()
    taken = {line[1:] for line in lines if line.startswith("!")}
    rooms = set(PROJECT["tool"]["setuptools"]["package-dir"].values())
    assert taken == {*rooms, "pyproject.toml", "README.md", "LICENSE"}
    text = (DEPLOY / "Dockerfile").read_text("utf-8")
    (entry,) = re.findall(r"^ENTRYPOINT (\[.*\])$", text, re.MULTILINE)
    program, name, *options = yaml.safe_load(entry)
    assert (program, name) == ("sd35-trt", "serve")
    assert parsed([*options, "/bundles/ada"])["host"] == "0.0.0.0"
    extras = PROJECT["project"]["optional-dependencies"]
    for found in re.findall(r"EXTRAS=(\S+)", text):
        assert set(found.split(",")) <= set(extras)
    assert re.findall(r"^USER (\d+)$", text, re.MULTILINE) == ["10001"]


def test_the_example_asks_paths_that_are_there(tiny_bundle: Path) -> None:
    from fake_engines import FakeEngines
    from prometheus_client import CollectorRegistry

    from sd35_trt.runtime import PipelinePool
    from sd35_trt.serving.app import make_app
    from sd35_trt.serving.service import Service
    from sd35_trt.serving.settings import Settings

    deployment, service = yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text("utf-8"))
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    with PipelinePool({"tiny": FakeEngines().pipeline(tiny_bundle)}) as pool:
        app = make_app(Service(pool, Settings()), CollectorRegistry())
    paths = [container[f"{kind}Probe"]["httpGet"]["path"]
             for kind in ("startup", "liveness", "readiness")]  # fmt: skip
    for path in (*paths, pod["metadata"]["annotations"]["prometheus.io/path"]):
        scope = {"type": "http", "method": "GET", "path": path, "headers": []}
        assert any(route.matches(scope)[0] is Match.FULL for route in app.routes), path
    options = parsed(container["args"])
    assert options["bundles"] == ("ada=/bundles/ada",)
    assert isinstance(command.params[0], click.Argument)
    # What was accepted is drawn before the pod is killed.
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pause + Settings().grace + 5 < pod["spec"]["terminationGracePeriodSeconds"]
    assert service["spec"]["ports"][0]["targetPort"] == container["ports"][0]["name"]
    assert pod["spec"]["securityContext"]["runAsUser"] == 10001
