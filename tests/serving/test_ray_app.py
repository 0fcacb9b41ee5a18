"""The application for Ray Serve. Skipped where Ray is not installed: ``pip install '.[ray]'``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ray = pytest.importorskip("ray", reason="Ray is not installed")

from ray.serve.schema import ServeDeploySchema  # noqa: E402

from sd35_trt.errors import Sd35Error, UsageError  # noqa: E402
from sd35_trt.serving.failures import EngineHealth  # noqa: E402
from sd35_trt.serving.ray_app import build, drawer  # noqa: E402

ROOT = Path(__file__).parents[2]
CONFIGURATION = ROOT / "serving" / "deploy" / "ray.yaml"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({}, "args: bundles is missing"),
        ({"bundles": []}, "args: bundles: List should have at least 1 item"),
        ({"bundles": "/a", "host": "::"}, "args: host is no field of this request"),
        ({"bundles": "bundles/half"}, "bundles/half is relative — give the path from the root"),
        ({"bundles": "/a", "adapters": "style.safetensors"}, "has no name — give it one: style="),
        ({"bundles": "/a", "controls": "pose=x.png"}, "x.png is relative"),
        ({"bundles": "/a/half,/b/half"}, "two bundles are called half"),
        ({"bundles": "/a", "traffic": "b=100"}, "there is no bundle b — use one of: a"),
        ({"bundles": "/a", "threads": 0}, "args: threads: Input should be greater than or equal"),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        build(args)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_configuration_names_what_the_application_has() -> None:
    found = yaml.safe_load(CONFIGURATION.read_text("utf-8"))
    ServeDeploySchema.model_validate(found)
    [application] = found["applications"]
    assert application["import_path"] == f"{build.__module__}:{build.__name__}"
    deployments = {deployment["name"] for deployment in application["deployments"]}
    ingress = build(application["args"])._bound_deployment
    assert deployments == {ingress.name, ingress.init_args[0]._bound_deployment.name}


def test_a_replica_with_broken_engines_fails_its_health_check() -> None:
    replica = object.__new__(drawer(1).func_or_class)
    replica._health = EngineHealth()
    replica.check_health()
    for _ in range(3):
        replica._health.failed(Sd35Error("the engine failed"))
    with pytest.raises(RuntimeError, match="the engines failed"):
        replica.check_health()


@pytest.mark.nightly
def test_nothing_is_lost_while_replicas_and_a_node_end(
    mini_bundle: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    try:
        from ray_serve import measure

        figures = measure(
            mini_bundle, tiny_bundle, requests=200, connections=8, steps=2, size="64x64"
        )
    finally:
        for name in (
            "ray_serve",
            "serve",
            "serve_targets",
            "server_process",
            "triton_client",
            "triton_process",
        ):
            sys.modules.pop(name, None)
    for load in ("killed", "updated", "after"):
        assert figures[load]["wrong"] == []
        assert figures[load]["statuses"]["200"] == figures[load]["requests"]
