"""What the bindings of TensorRT do inside, and what a plan's header and the log say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sd35_trt.backends import BACKENDS
from sd35_trt.compat.tensorrt import attentions, logged_memory, make_logger
from sd35_trt.compat.tensorrt_plan import read_header


@pytest.fixture(params=["tensorrt-rtx", "tensorrt"])
def trt(request: pytest.FixtureRequest) -> Any:
    backend = BACKENDS[request.param]
    library = pytest.importorskip(backend.module, reason=f"{backend.title} is not installed")
    if not backend.crosses:
        pytest.skip("compiles on a GPU alone")
    return library


def _network(trt: Any, builder: Any, logger: Any) -> Any:
    """Attention of [1, 2, 8, 64], on one input."""
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.float16, (1, 2, 8, 64))
    attention = network.add_attention(x, x, x, trt.AttentionNormalizationOp.SOFTMAX, False)
    network.mark_output(attention.get_output(0))
    return network


def test_attentions_of_a_network_that_was_not_just_made(trt: Any) -> None:
    log = make_logger(trt)
    builder = trt.Builder(log)
    network = _network(trt, builder, log)
    (attention,) = attentions(trt, network)
    attention.decomposable = True
    assert attention.decomposable, f"{trt.__name__} {trt.__version__}: layer.__class__"


def test_the_log_tells_memory_and_the_header_the_gpu(trt: Any, tmp_path: Path) -> None:
    log = make_logger(trt)
    memory: dict[str, int] = {}
    log.on_message = lambda message: memory.update(logged_memory(message))
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    x = network.add_input("x", trt.float16, (4, 4))
    network.mark_output(network.add_activation(x, trt.ActivationType.RELU).get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    plan = tmp_path / "engine.plan"
    plan.write_bytes(bytes(builder.build_serialized_network(network, config)))
    assert memory.keys() == {"Activation", "Weights"}, f"{trt.__name__} {trt.__version__}: log"
    header = read_header(plan)
    assert header.compute_capabilities == ("8.9",)
    assert header.version.startswith(trt.__version__)
