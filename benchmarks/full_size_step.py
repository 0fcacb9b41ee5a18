"""One step of a random model of SD3.5's exact size: error against FP32, and milliseconds.

    python benchmarks/full_size_step.py --model large --device cuda --work /tmp --out step.json

The conditioner and the denoiser are exported with each policy and run in ONNX Runtime on the
device, on the runtime's buffers and stream; the reference is diffusers' transformer in FP32 on the
same inputs, from which FP8's scales are taken too. Peers in the same run: diffusers' transformer
in BF16, as it is and with its blocks compiled. Weights are random, so the error is that of the
arithmetic, not of pictures. Large takes 45 GB of disk and 50 GB of the GPU's memory.
"""

from __future__ import annotations

import gc
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from random_checkpoint import write_transformer
from rich.console import Console
from rich.table import Table

from sd35_trt.bundle import Port
from sd35_trt.calibration_file import Calibration
from sd35_trt.components import COMPONENTS
from sd35_trt.engines.builder import MODEL_FILE, ExportedComponent
from sd35_trt.export.checkpoint import Checkpoint
from sd35_trt.export.component import ExportOptions, export_component, fp8_layers
from sd35_trt.export.scales import Scales
from sd35_trt.export.structure import Structure
from sd35_trt.policy import load_policy
from sd35_trt.runtime.device import Buffer, Device, open_device
from sd35_trt.runtime.onnxruntime_session import OnnxRuntimeSession, session_options

_CLIP_TOKENS = 77
_SIGMA, _GUIDANCE = 0.7, 3.5

Arrays = dict[str, np.ndarray]


def make_inputs(config: Mapping[str, Any], size: int, tokens: int, seed: int = 0) -> Arrays:
    """What the transformer reads for one picture with guidance, in FP32."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32)

    return {
        "latents": normal(1, config["in_channels"], size // 8, size // 8),
        "prompt_embeds": normal(2, tokens, config["joint_attention_dim"]),
        "pooled": normal(2, config["pooled_projection_dim"]),
    }


def run_transformer(model: Any, arrays: Arrays) -> torch.Tensor:
    """Velocity of both branches, [2, C, h, w]."""
    given = {k: torch.from_numpy(v).to(model.device, model.dtype) for k, v in arrays.items()}
    latents = torch.cat([given["latents"]] * 2)
    timestep = torch.full((2,), _SIGMA * 1000, device=model.device)
    with torch.inference_mode():
        return model(latents, given["prompt_embeds"], given["pooled"], timestep).sample


def guided(velocity: torch.Tensor) -> np.ndarray:
    """Velocity after guidance, [1, C, h, w]."""
    uncond, cond = velocity.float().cpu().numpy()
    return (uncond + _GUIDANCE * (cond - uncond))[None]


def input_amax(model: Any, layers: list[str], run: Callable[[], object]) -> dict[str, float]:
    """Largest input of each ``component/layer`` while ``run`` runs."""
    found: dict[str, float] = {}
    modules = dict(model.named_modules())

    def watch(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            found[name] = max(found.get(name, 0.0), float(inputs[0].abs().max()))

        return hook

    hooks = [
        modules[name.partition("/")[2]].register_forward_pre_hook(watch(name)) for name in layers
    ]
    run()
    for hook in hooks:
        hook.remove()
    return found


def median_ms(step: Callable[[], object], wait: Callable[[], None], runs: int) -> dict[str, float]:
    """Milliseconds of a step that is waited for: median and the bounds of the middle 80 %."""
    for _ in range(3):
        step()
    wait()
    taken = []
    for _ in range(runs):
        start = time.perf_counter()
        step()
        wait()
        taken.append((time.perf_counter() - start) * 1e3)
    low, median, high = np.percentile(taken, (10, 50, 90)).tolist()
    return {"median": median, "p10": low, "p90": high}


class Engines:
    """A policy's conditioner and denoiser on a device.

    Args:
        folder: where they are exported to.
    """

    def __init__(
        self, checkpoint: Checkpoint, policy: str, scales: Scales, device: Device, folder: Path
    ) -> None:
        self._device = device
        self._sessions: dict[str, OnnxRuntimeSession] = {}
        self._ports: dict[str, dict[str, Port]] = {}
        self.weight_bytes: dict[str, int] = {}
        for name in ("conditioner", "denoiser"):
            out = folder / name
            out.mkdir()
            options = ExportOptions(_CLIP_TOKENS)
            export_component(name, checkpoint, load_policy(policy), options, out, scales=scales)
            component = ExportedComponent.read(out)
            self.weight_bytes[name] = component.weight_bytes
            self._ports[name] = {p.name: p for p in (*component.inputs, *component.outputs)}
            settings = session_options(fp8=bool(component.precisions.get("fp8")))
            path = str(out / MODEL_FILE)
            self._sessions[name] = OnnxRuntimeSession(path, name, device, settings)

    def _run(
        self, name: str, inputs: Mapping[str, np.ndarray | Buffer], **dims: int
    ) -> Callable[[], dict[str, Buffer]]:
        """A run of a component, to be called as often as wanted."""
        device, ports = self._device, self._ports[name]
        feed: dict[str, Buffer] = {
            key: device.upload(value.astype(ports[key].dtype))
            if isinstance(value, np.ndarray)
            else value
            for key, value in inputs.items()
        }
        outputs: dict[str, Buffer] = {
            key: device.empty(port.resolve(**dims), port.dtype)
            for key, port in ports.items()
            if key not in inputs
        }

        def run() -> dict[str, Buffer]:
            self._sessions[name].run(feed, outputs)
            return outputs

        return run

    def step(self, arrays: Arrays) -> Callable[[], dict[str, Buffer]]:
        """One denoising step, conditioned."""
        latents = arrays["latents"]
        height, width = latents.shape[2:]
        conditioned = self._run(
            "conditioner",
            {
                "prompt_embeds": arrays["prompt_embeds"],
                "pooled": arrays["pooled"],
                "timesteps": np.array([_SIGMA * 1000], np.float32),
            },
            samples=2, tokens=arrays["prompt_embeds"].shape[1], steps=1,
        )()  # fmt: skip
        context, modulation = conditioned["context"], conditioned["modulation"][0]
        inputs: dict[str, np.ndarray | Buffer] = {
            "latents": latents,
            "sigma": np.array([_SIGMA], np.float32),
            "coefficients": np.array([[1, 0, 0]], np.float32),
            "previous_denoised": np.zeros_like(latents),
            "context": context[1:],
            "modulation": modulation[1:],
            "uncond_context": context[:1],
            "uncond_modulation": modulation[:1],
            "guidance": np.array([_GUIDANCE], np.float32),
        }
        return self._run("denoiser", inputs, batch=1, height=height, width=width)

    def close(self) -> None:
        """Release the engines."""
        for session in self._sessions.values():
            session.close()


def measure_reference(
    root: Path, checkpoint: Checkpoint, device: str, arrays: Arrays
) -> tuple[np.ndarray, dict[str, float]]:
    """Velocity of diffusers' transformer in FP32, and the largest inputs of what FP8 quantizes."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel.from_pretrained(root, subfolder="transformer")
    model = model.float().to(device).eval()
    transformer = [n for n, row in COMPONENTS.items() if row.part == "transformer"]
    layers, _ = fp8_layers(checkpoint, transformer, load_policy("fp8"))
    seen: list[torch.Tensor] = []
    amax = input_amax(model, list(layers), lambda: seen.append(run_transformer(model, arrays)))
    return guided(seen.pop()), amax


def relative_error(value: np.ndarray, reference: np.ndarray) -> float:
    """‖value − reference‖ / ‖reference‖."""
    difference = value.astype(np.float64) - reference
    return float(np.linalg.norm(difference) / np.linalg.norm(reference.astype(np.float64)))


def peers(root: Path, device: str, arrays: Arrays, runs: int, names: list[str]) -> Iterator[Any]:
    """Rows of diffusers' transformer in BF16."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel.from_pretrained(
        root, subfolder="transformer", torch_dtype=torch.bfloat16
    )
    model = model.to(device).eval()
    for name in names:
        if name == "compiled":
            for block in model.transformer_blocks:
                block.compile()
        velocity = guided(run_transformer(model, arrays))
        ms = median_ms(lambda: run_transformer(model, arrays), synchronizer(device), runs)
        yield f"diffusers BF16 {name}", velocity, ms, sum(p.nbytes for p in model.parameters())


def synchronizer(device: str) -> Callable[[], None]:
    """Waits for PyTorch's work."""
    return torch.cuda.synchronize if device != "cpu" else lambda: None


@click.command()
@click.option("--model", type=click.Choice(["large", "medium"]), default="large")
@click.option("--layers", type=int, default=None, help="Fewer blocks, to try it out.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--size", default=1024, show_default=True, help="Side of the picture in pixels.")
@click.option("--tokens", default=333, show_default=True)
@click.option("--runs", default=20, show_default=True)
@click.option("--policy", "policies", multiple=True, default=("half", "fp8"), show_default=True)
@click.option("--peer", "peer_names", multiple=True, default=("eager", "compiled"))
@click.option("--work", type=click.Path(path_type=Path), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    model: str, layers: int | None, device: str, size: int, tokens: int, runs: int,
    policies: tuple[str, ...], peer_names: tuple[str, ...], work: Path, out: Path,
) -> None:  # fmt: skip
    """Measure, print a table, write JSON."""
    config = Structure(model).config("transformer")
    if layers is not None:
        config["num_layers"] = layers
        dual = config.get("dual_attention_layers") or ()
        config["dual_attention_layers"] = [i for i in dual if i < layers]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=work) as temporary:
        root = Path(temporary) / "checkpoint"
        write_transformer(root, config)
        checkpoint = Checkpoint(root)
        arrays = make_inputs(config, size, tokens)
        reference, amax = measure_reference(root, checkpoint, device, arrays)
        gc.collect()
        torch.cuda.empty_cache()
        scales = Scales.of(Calibration(amax, {}, {}, {}), "transformer")

        def note(name: str, velocity: np.ndarray, ms: dict[str, float], weights: int) -> None:
            error = relative_error(velocity, reference)
            rows.append({"name": name, "error": error, "ms": ms, "weight_bytes": weights})

        for row in peers(root, device, arrays, runs, list(peer_names)) if peer_names else ():
            note(*row)
        gc.collect()
        torch.cuda.empty_cache()
        for policy in policies:
            folder = Path(temporary) / policy
            folder.mkdir()
            place = open_device(device)
            engines = Engines(checkpoint, policy, scales, place, folder)
            step = engines.step(arrays)
            denoised = place.download(step()["denoised"])
            velocity = (arrays["latents"] - denoised) / _SIGMA
            ms = median_ms(step, place.synchronize, runs)
            note(f"sd35-trt {policy}, onnxruntime", velocity, ms, engines.weight_bytes["denoiser"])
            engines.close()
            place.close()
            shutil.rmtree(folder)
    settings = {"model": model, "layers": config["num_layers"], "size": size, "tokens": tokens}
    about = torch.cuda.get_device_name() if device != "cpu" else "cpu"
    out.write_text(json.dumps({"device": about, **settings, "rows": rows}, indent=1) + "\n")
    table = Table("", "ms per step", "middle 80 %", "of the first", "error", "weights", box=None)
    for row in rows:
        ms = row["ms"]
        table.add_row(
            row["name"], f"{ms['median']:.1f}", f"{ms['p10']:.1f} – {ms['p90']:.1f}",
            f"{ms['median'] / rows[0]['ms']['median']:.2f}", f"{row['error']:.2e}",
            f"{row['weight_bytes'] / 1e9:.2f} GB",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
