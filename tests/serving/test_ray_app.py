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


def test_what_others_reach_needs_a_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    with pytest.raises(UsageError, match="give token_file"):
        build({"bundles": "/a"})
    (tmp_path / "token").write_text("a-token-of-clients-0123456789")
    build({"bundles": "/a", "token_file": str(tmp_path / "token")})


@pytest.mark.nightly
def test_nothing_is_lost_on_a_cluster_of_two_nodes(
    mini_bundle: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While a replica and a node are killed, engines fail, replicas follow the load, and another
    bundle takes the first one's place.
    """
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    before = set(sys.modules)
    try:
        from ray_serve import PARTS, measure, table

        figures = measure(
            mini_bundle, tiny_bundle, requests=1000, connections=16, steps=2, size="64x64",
            only=[part for part in PARTS if part != "scaling"],
        )  # fmt: skip
    finally:
        for name in set(sys.modules) - before:
            if Path(getattr(sys.modules[name], "__file__", None) or "").parent.name == "benchmarks":
                del sys.modules[name]
    text, well = table(figures)
    assert well, text
    for load in ("killed", "growing", "updated"):
        assert figures[load]["wrong"] == []
        assert figures[load]["statuses"]["200"] == figures[load]["requests"]
    assert (figures["growing"]["replicas_before"], figures["broken"]["failed"] <= 3) == (1, True)
