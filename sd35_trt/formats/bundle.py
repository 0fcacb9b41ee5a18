"""The bundle: a directory of engines, with a manifest of what they are and how they were made.

``bundle.json`` holds every fact that the runtime needs, the size and SHA-256 of every other file,
and a digest of itself. Only regular files inside the directory are ever opened.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from sd35_trt.dimensions import Ranges
from sd35_trt.errors import BundleError

#: Version of the manifest; a reader accepts exactly its own.
FORMAT = 1

MANIFEST = "bundle.json"

#: Amax values and provenance of the calibration, in a bundle that was built with one.
CALIBRATION = "calibration.json"

#: Files up to this size are hashed at every load, larger ones only on request.
SMALL_FILE = 32 << 20

_REBUILD = "build it again with: sd35-trt build"


@dataclass(frozen=True)
class Port:
    """One input or output of a component.

    ``shape`` holds integers and the names of dynamic dimensions; ``dtype`` is a numpy name.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def dynamic(self) -> list[str]:
        """Names of the dynamic dimensions."""
        return [d for d in self.shape if isinstance(d, str)]

    def resolve(self, **dims: int) -> tuple[int, ...]:
        """The shape with the dynamic dimensions filled in."""
        return tuple(dims[d] if isinstance(d, str) else d for d in self.shape)


@dataclass(frozen=True)
class File:
    """A file of the bundle: relative path, size in bytes, SHA-256 in hex."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Component:
    """One engine.

    Attributes:
        name: ``clip_l``, ``clip_g``, ``t5``, ``conditioner``, ``denoiser``, ``vae_decoder`` or
            ``vae_encoder``.
        engine: session kind that runs it, e.g. ``onnxruntime``.
        files: the first is what the session opens, the others belong to it.
        weight_bytes: bytes of weights as stored.
        precisions: how many layers have each precision of the policy.
        fp32_places: ``component/module`` → largest output in calibration, for each place that the
            range guard computes in FP32 although the policy says half.
        activation_bytes: working memory at the largest shapes, as the builder reports it, or
            estimated.
        allocated_bytes: what a GPU's memory holds for its weights, where that is more than their
            bytes.
        bounds: smallest and largest value of each dynamic dimension of the inputs.
        largest_layer_bytes: weights of its largest layer; None in bundles of older versions.
    """

    name: str
    engine: str
    files: tuple[File, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    weight_bytes: int
    precisions: dict[str, int]
    fp32_places: dict[str, float]
    activation_bytes: int | None = None
    allocated_bytes: int | None = None
    bounds: dict[str, tuple[int, int]] = field(default_factory=dict)
    largest_layer_bytes: int | None = None

    def input(self, name: str) -> Port:
        return next(port for port in self.inputs if port.name == name)

    def output(self, name: str) -> Port:
        return next(port for port in self.outputs if port.name == name)


@dataclass(frozen=True)
class Tokenizer:
    """A ``tokenizers`` file with the fixed length and padding that the model was trained with."""

    path: str
    length: int
    pad_id: int


@dataclass(frozen=True)
class Manifest:
    """Everything in ``bundle.json``.

    ``calibration`` is the digest of the calibration that the bundle was built with; where there
    was one, :data:`CALIBRATION` holds it. ``engine_options`` is what the builder was asked for:
    compute capabilities, weight streaming, refit; with ``inductor`` how the session compiles.
    """

    model: dict[str, Any]
    target: str
    builder: str
    policy: dict[str, Any]
    ranges: Ranges
    latent_channels: int
    latent_scale: int
    guided: bool
    scheduler: dict[str, float]
    defaults: dict[str, Any]
    tokenizers: dict[str, Tokenizer]
    components: tuple[Component, ...]
    files: tuple[File, ...]
    versions: dict[str, str]
    command: str
    created: str
    calibration: str | None
    engine_options: dict[str, Any]
    format: int = field(default=FORMAT)

    def component(self, name: str) -> Component | None:
        """A component by name, or None where the model has none (a checkpoint without T5)."""
        return next((c for c in self.components if c.name == name), None)

    def fp32_places(self) -> dict[str, float]:
        """What the range guard computes in FP32, of all components; see :class:`Component`."""
        return {k: v for c in self.components for k, v in c.fp32_places.items()}

    def all_files(self) -> Iterator[File]:
        yield from self.files
        seen: set[str] = set()
        for component in self.components:
            for file in component.files:
                if file.path not in seen:
                    seen.add(file.path)
                    yield file

    def to_json(self) -> str:
        data = asdict(self)
        data["digest"] = _digest(data)
        return json.dumps(data, indent=1, sort_keys=True) + "\n"


def _digest(data: dict[str, Any]) -> str:
    body = {key: value for key, value in data.items() if key != "digest"}
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _port(data: dict[str, Any]) -> Port:
    return Port(data["name"], data["dtype"], tuple(data["shape"]))


def _component(data: dict[str, Any]) -> Component:
    return Component(
        **{
            **data,
            "files": tuple(File(**file) for file in data["files"]),
            "inputs": tuple(map(_port, data["inputs"])),
            "outputs": tuple(map(_port, data["outputs"])),
            "bounds": {k: _bounds(v) for k, v in data.get("bounds", {}).items()},
        }
    )


def sha256_file(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as stream:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(stream, "sha256").hexdigest()
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()


def describe_file(root: Path, path: str) -> File:
    """Size and hash of ``root / path``."""
    full = root / path
    return File(path, full.stat().st_size, sha256_file(full))


def _inside(root: Path, path: str) -> Path:
    """``root / path``, refused when it leaves the bundle by ``..``, a root or a link."""
    pure = PurePosixPath(path)
    full = root / pure
    if (
        pure.is_absolute()
        or ".." in pure.parts
        or not full.resolve().is_relative_to(root.resolve())
    ):
        raise BundleError(
            f"{root / MANIFEST}: the path {path!r} leaves the bundle", "do not use this bundle"
        )
    return full


class Bundle:
    """An opened bundle: its directory and its manifest."""

    def __init__(self, root: Path, manifest: Manifest) -> None:
        self.root = root
        self.manifest = manifest

    @classmethod
    def open(cls, root: str | os.PathLike[str], verify: bool = False) -> Bundle:
        """Read the manifest and check the files behind it.

        Sizes are always compared, small files are always hashed.

        Args:
            root: the bundle's directory.
            verify: hash the large files too.

        Raises:
            BundleError: names the file and what to do about it.
        """
        root = Path(root)
        manifest = _read_manifest(root)
        for file in manifest.all_files():
            path = _inside(root, file.path)
            if not path.is_file():
                raise BundleError(f"{path} is missing", _REBUILD)
            size = path.stat().st_size
            if size != file.bytes:
                raise BundleError(
                    f"{path} has {size:,} bytes, the manifest says {file.bytes:,}", _REBUILD
                )
            if (verify or size <= SMALL_FILE) and sha256_file(path) != file.sha256:
                raise BundleError(f"{path} is damaged (SHA-256 differs)", _REBUILD)
        return cls(root, manifest)

    def path(self, relative: str) -> Path:
        """Path of a file of the bundle; refuses one outside it."""
        return _inside(self.root, relative)


def _read_manifest(root: Path) -> Manifest:
    path = root / MANIFEST
    try:
        data = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"{root} is not a bundle (no {MANIFEST})", "make one with: sd35-trt build"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read: {error}", _REBUILD) from error
    if not isinstance(data, dict) or not isinstance(data.get("format"), int):
        raise BundleError(f"{path} is not a bundle manifest", _REBUILD)
    if data["format"] != FORMAT:
        newer = data["format"] > FORMAT
        raise BundleError(
            f"{path} has format {data['format']}, this version reads {FORMAT}",
            "upgrade sd35-trt" if newer else _REBUILD,
        )
    if data.pop("digest", None) != _digest(data):
        raise BundleError(f"{path} is damaged (its digest differs)", _REBUILD)
    try:
        return Manifest(
            **{
                **data,
                "ranges": Ranges(**{k: _bounds(v) for k, v in data["ranges"].items()}),
                "tokenizers": {k: Tokenizer(**v) for k, v in data["tokenizers"].items()},
                "components": tuple(map(_component, data["components"])),
                "files": tuple(File(**file) for file in data["files"]),
            }
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise BundleError(f"{path} lacks or misstates a field: {error}", _REBUILD) from error


def _bounds(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
