"""mini: a small Stable Diffusion 3.5 that ships with the package."""

from pathlib import Path


def checkpoint_path() -> Path:
    """Directory of the packaged checkpoint, in the diffusers layout."""
    return Path(__file__).parent / "checkpoint"


def lora_paths() -> dict[str, Path]:
    """Files of the packaged LoRAs by name, in the names of diffusers."""
    folder = Path(__file__).parent / "adapters"
    return {file.stem: file for file in sorted(folder.glob("*.safetensors"))}


def controlnet_paths() -> dict[str, Path]:
    """Folders of the packaged ControlNets by name, as diffusers' SD3ControlNetModel saves them."""
    folder = Path(__file__).parent / "controlnets"
    return {place.parent.name: place.parent for place in sorted(folder.glob("*/config.json"))}


def calibration_path() -> Path:
    """Directory of the packaged calibration for the ``fp8`` policy."""
    return Path(__file__).parent / "calibration"


def calibration_prompts_path() -> Path:
    """128 captions to calibrate with; none of them is among the evaluation's."""
    return Path(__file__).parent / "calibration_prompts.txt"


def step_cache_path() -> Path:
    """The packaged step cache, of short steps that compute the first block alone."""
    return calibration_path() / "step_cache.json"
