"""The bundle: a directory of engines, with a manifest of what they are and how they were made.

``bundle.json`` holds every fact that the runtime needs, the size and SHA-256 of every other file;
``bundle.json.sha256`` beside it the SHA-256 of its bytes. Only regular files are opened: inside the
directory, or where a link in it leads to the content that the manifest states.
docs/bundle-format.md specifies all of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, NoReturn

from msgspec import Meta, Struct
from msgspec.structs import replace

from sd35_trt.dimensions import Defaults, Ranges
from sd35_trt.errors import BundleError
from sd35_trt.features import (
    ADAPTERS,
    CONTROL,
    INPAINTING,
    SKIP_LAYER_GUIDANCE,
    SPLIT_GUIDANCE,
    STEP_CACHE,
    Features,
)

from .reading import (
    Count,
    Digest,
    Name,
    Option,
    Positive,
    RelativePath,
    Text,
    check_format,
    decode,
    encode,
    read_file,
    reason_of,
)

#: Version of the manifest that is written.
FORMAT = 2

#: Versions that are read.
READABLE = (1, 2)

#: What a manifest may require of its reader, and this one knows.
KNOWN_REQUIREMENTS: frozenset[str] = frozenset(
    {ADAPTERS, INPAINTING, SKIP_LAYER_GUIDANCE, CONTROL, STEP_CACHE, SPLIT_GUIDANCE}
)

#: The input of a component with how much a sample has of each adapter.
ADAPTER_SCALES = "adapter_scales"

#: The input of a component with what ControlNets make.
RESIDUALS = "residuals"

MANIFEST = "bundle.json"

#: SHA-256 of the manifest's bytes in hex, and a newline.
MANIFEST_DIGEST = "bundle.json.sha256"

#: Amax values and provenance of the calibration, in a bundle that was built with one; see
#: :class:`sd35_trt.formats.calibration.CalibrationExtract`.
CALIBRATION = "calibration.json"

#: Files up to this size are hashed at every load, larger ones only on request.
SMALL_FILE = 32 << 20

# A manifest of SD3.5 Large has about 100 kB.
_LARGEST_MANIFEST = 16 << 20

_REBUILD = "build it again with: sd35-trt build"


class Port(Struct, frozen=True):
    """One input or output of a component.

    ``shape`` holds integers and the names of dynamic dimensions; ``dtype`` is a numpy name.
    """

    name: Name
    dtype: Annotated[str, Meta(pattern=r"\A(bool|u?int8|int32|int64|float16|float32|float64)\Z")]
    shape: Annotated[
        tuple[Annotated[int, Meta(ge=0, le=2**31 - 1)] | Name, ...], Meta(max_length=8)
    ]

    @property
    def dynamic(self) -> list[str]:
        """Names of the dynamic dimensions."""
        return [d for d in self.shape if isinstance(d, str)]

    def resolve(self, **dims: int) -> tuple[int, ...]:
        """The shape with the dynamic dimensions filled in."""
        return tuple(dims[d] if isinstance(d, str) else d for d in self.shape)


#: The inputs, or the outputs, of a component.
Ports = Annotated[tuple[Port, ...], Meta(max_length=64)]


class File(Struct, frozen=True):
    """A file of the bundle: relative path, size in bytes, SHA-256 in hex."""

    path: RelativePath
    bytes: Count
    sha256: Digest


Files = Annotated[tuple[File, ...], Meta(max_length=1024)]


class AdapterGroup(Struct, frozen=True):
    """Linears whose adapters are two inputs of a component.

    Attributes:
        down, up: the inputs' names: A [blocks, in, linears, rank] and B [blocks, linears, rank,
            out].
        layers: of each block, the names of its linears in the checkpoint's part.
    """

    down: Name
    up: Name
    layers: Annotated[
        tuple[Annotated[tuple[Name, ...], Meta(min_length=1, max_length=64)], ...],
        Meta(min_length=1, max_length=4096),
    ]


class Component(Struct, frozen=True):
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
        adapters: what it takes of adapters.
    """

    name: Name
    engine: Name
    files: Annotated[tuple[File, ...], Meta(min_length=1, max_length=1024)]
    inputs: Ports
    outputs: Ports
    weight_bytes: Count
    precisions: dict[Name, Count]
    fp32_places: dict[Name, float]
    activation_bytes: Count | None = None
    allocated_bytes: Count | None = None
    bounds: dict[Name, tuple[Count, Count]] = {}
    largest_layer_bytes: Count | None = None
    adapters: Annotated[tuple[AdapterGroup, ...], Meta(max_length=32)] = ()

    def input(self, name: str) -> Port:
        return next(port for port in self.inputs if port.name == name)

    def output(self, name: str) -> Port:
        return next(port for port in self.outputs if port.name == name)


class Tokenizer(Struct, frozen=True):
    """A ``tokenizers`` file with the fixed length and padding that the model was trained with."""

    path: RelativePath
    length: Positive
    pad_id: Count


class LoraRecord(Struct, frozen=True):
    """A LoRA that was merged into the checkpoint: its file's name and SHA-256, and its scale."""

    name: Text
    scale: float
    sha256: Digest


class ModelRecord(Struct, frozen=True):
    """The checkpoint.

    Attributes:
        name: what it is called.
        variant: a key of :data:`sd35_trt.variants.VARIANTS`.
        files: path in the checkpoint → SHA-256, of all that the components were made from, and of
            the scheduler's.
        quantization: of GGUF files among them, path → how many tensors are of which type.
        origin: where on the hub it is from, as ``owner/name@revision``.
        loras: what was merged into it, in turn; ``files`` has them too, for each part.
    """

    name: Text
    variant: Name
    files: Annotated[dict[Name, Digest], Meta(max_length=65536)]
    quantization: Annotated[dict[Name, Text], Meta(max_length=64)] = {}
    origin: Text | None = None
    loras: Annotated[tuple[LoraRecord, ...], Meta(max_length=1024)] = ()


class ControlRecord(Struct, frozen=True):
    """A ControlNet of the bundle.

    Attributes:
        name: that its components have, and requests.
        kind: of its pictures: ``canny`` (edges), ``depth``, ``blur``, ``other``.
        encoding: what ``vae_encoder`` is given for its pictures, of its port of this name.
    """

    name: Name
    kind: Name
    encoding: tuple[float, float, float]


class PolicyRule(Struct, frozen=True):
    """See :class:`sd35_trt.policies.Rule`."""

    component: Text
    match: Text
    precision: Name
    reason: Text = ""


class PolicyRecord(Struct, frozen=True):
    """The precision policy that was built with; ``sha256`` is of its rules."""

    name: Text
    sha256: Digest
    rules: Annotated[tuple[PolicyRule, ...], Meta(max_length=65536)] = ()


class Scheduler(Struct, frozen=True):
    """``FlowMatchEulerDiscreteScheduler``'s: the usual shift, and timesteps of the training."""

    shift: float
    num_train_timesteps: float

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise ValueError(f"shift {self.shift} is not above 0")
        if not 1 <= self.num_train_timesteps <= 2**24:
            raise ValueError(f"num_train_timesteps {self.num_train_timesteps} is not 1 to 2**24")


class Manifest(Struct, frozen=True, kw_only=True):
    """Everything in ``bundle.json``.

    ``calibration`` is the digest of the calibration that the bundle was built with; where there
    was one, :data:`CALIBRATION` holds it. ``engine_options`` is what the builder was asked for:
    compute capabilities, weight streaming, refit; with ``inductor`` how the session compiles.
    ``requires`` names what a reader must know to draw what was meant. ``adapter_ranks`` are the
    ranks that engines take adapters of, which are padded to the next of them; the last is the most.
    ``controls`` are its ControlNets. ``short_steps`` is how many blocks a short step computes; 0
    where there are none.
    """

    format: int = FORMAT
    requires: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()
    model: ModelRecord
    target: Name
    builder: Name
    policy: PolicyRecord
    ranges: Ranges
    latent_channels: Annotated[int, Meta(ge=1, le=4096)]
    latent_scale: Annotated[int, Meta(ge=1, le=4096)]
    guided: bool
    scheduler: Scheduler
    defaults: Defaults
    tokenizers: Annotated[dict[Name, Tokenizer], Meta(max_length=256)]
    components: Annotated[tuple[Component, ...], Meta(max_length=256)]
    files: Files
    versions: dict[Name, Text]
    command: Text
    created: Text
    calibration: Digest | None
    engine_options: dict[Name, Option]
    adapter_ranks: Annotated[tuple[Positive, ...], Meta(max_length=64)] = ()
    controls: Annotated[tuple[ControlRecord, ...], Meta(max_length=64)] = ()
    short_steps: Annotated[int, Meta(ge=0, le=4096)] = 0

    @property
    def features(self) -> Features:
        """What its engines take besides what every bundle's take."""
        return Features.of(
            self.requires, self.adapter_ranks, self._control_blocks, self.short_steps
        )

    @property
    def _control_blocks(self) -> int:
        """Of each ControlNet: the first dimension of what the denoiser takes of them."""
        denoiser = self.component("denoiser")
        ports = denoiser.inputs if denoiser is not None else ()
        shapes = [port.shape for port in ports if port.name == RESIDUALS]
        count = shapes[0][0] if shapes and shapes[0] else 1
        return count if isinstance(count, int) else 1

    def control(self, name: str) -> ControlRecord | None:
        """A ControlNet by name, or None where the bundle has none of it."""
        return next((c for c in self.controls if c.name == name), None)

    def component(self, name: str) -> Component | None:
        """A component by name, or None where the model has none (a checkpoint without T5)."""
        return next((c for c in self.components if c.name == name), None)

    def option_names(self, name: str) -> list[str]:
        """An engine option that is a list of names; empty where there is none."""
        value = self.engine_options.get(name)
        return value if isinstance(value, list) else []

    def fp32_places(self) -> dict[str, float]:
        """What the range guard computes in FP32, of all components; see :class:`Component`."""
        return {k: v for c in self.components for k, v in c.fp32_places.items()}

    def all_files(self) -> Iterator[File]:
        yield from self.files
        paths: set[str] = set()
        for component in self.components:
            for file in component.files:
                if file.path not in paths:
                    paths.add(file.path)
                    yield file


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


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Write a manifest of :data:`FORMAT` and its digest, and flush them to disk.

    The digest first: without both, nothing loads.

    Raises:
        OSError: the disk is full or not writable.
    """
    data = encode(replace(manifest, format=FORMAT))
    digest = hashlib.sha256(data).hexdigest()
    for name, content in ((MANIFEST_DIGEST, f"{digest}\n".encode()), (MANIFEST, data)):
        with (root / name).open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())


def _inside(root: Path, path: str) -> Path:
    """``root / path``, refused when it leaves the bundle by ``..``, a root or a link."""
    pure = PurePosixPath(path)
    full = root / pure
    if pure.is_absolute() or ".." in pure.parts or not _resolves_inside(root, full):
        raise _leaves(root, path)
    return full


def _resolves_inside(root: Path, full: Path) -> bool:
    try:
        return full.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # a circle of links, a name too long
        return False


def _leaves(root: Path, path: str) -> BundleError:
    return BundleError(
        f"{root / MANIFEST}: the path {path!r} leaves the bundle", "do not use this bundle"
    )


def _linked(root: Path, file: File) -> Path | None:
    """Where a link that leaves the bundle leads to, as in the hub's cache, if it is a regular file
    with the content of ``file``; None for whatever else."""
    pure = PurePosixPath(file.path)
    full = root / pure
    if pure.is_absolute() or ".." in pure.parts or not full.is_symlink():
        return None
    try:
        target = full.resolve(strict=True)
        status = target.stat()
        if not stat.S_ISREG(status.st_mode) or status.st_size != file.bytes:
            return None
        # The hub's cache names large files by their SHA-256, and checks it.
        named = target.name == file.sha256 and status.st_size > SMALL_FILE
        return target if named or sha256_file(target) == file.sha256 else None
    except (OSError, RuntimeError):
        return None


class Bundle:
    """An opened bundle.

    Args:
        root: its directory.
        trust_kernels: whether compiled kernels in it may be loaded: they are code.
    """

    def __init__(self, root: Path, manifest: Manifest, trust_kernels: bool = False) -> None:
        self.root = root
        self.manifest = manifest
        self.trust_kernels = trust_kernels
        self._links: set[str] = set()

    @classmethod
    def open(
        cls, root: str | os.PathLike[str], verify: bool = False, trust_kernels: bool = False
    ) -> Bundle:
        """Read the manifest and check the files behind it.

        Sizes are always compared, small files are always hashed.

        Args:
            root: the bundle's directory.
            verify: hash the large files too.
            trust_kernels: as of the class.

        Raises:
            BundleError: names the file and what to do about it.
        """
        root = Path(root)
        manifest = _read_manifest(root)
        bundle = cls(root, manifest, trust_kernels)
        for file in manifest.all_files():
            if not _resolves_inside(root, root / file.path) and _linked(root, file):
                bundle._links.add(file.path)
            path = bundle.path(file.path)
            try:
                _check_file(path, file, verify)
            except OSError as error:
                reason = reason_of(error)
                raise BundleError(f"{path} cannot be read: {reason}", _REBUILD) from error
        for tokenizer in manifest.tokenizers.values():
            bundle.path(tokenizer.path)
        return bundle

    def path(self, relative: str) -> Path:
        """Path of a file of the bundle; refuses one outside it, unless it is a link whose target
        was seen to have the manifest's hash."""
        return self.root / relative if relative in self._links else _inside(self.root, relative)


def _check_file(path: Path, file: File, verify: bool) -> None:
    if not path.exists():
        raise BundleError(f"{path} is missing", _REBUILD)
    if not path.is_file():
        raise BundleError(f"{path} is no regular file", _REBUILD)
    size = path.stat().st_size
    if size != file.bytes:
        raise BundleError(f"{path} has {size:,} bytes, the manifest says {file.bytes:,}", _REBUILD)
    if (verify or size <= SMALL_FILE) and sha256_file(path) != file.sha256:
        raise BundleError(f"{path} is damaged (SHA-256 differs)", _REBUILD)


class _Head(Struct, frozen=True):
    """What is read before all else: it says whether the rest can be."""

    format: int
    requires: Annotated[tuple[Name, ...], Meta(max_length=64)] = ()


def _read_manifest(root: Path) -> Manifest:
    path = root / MANIFEST
    try:
        data = read_file(path, _LARGEST_MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        raise BundleError(
            f"{root} is not a bundle (no {MANIFEST})", "make one with: sd35-trt build"
        ) from None
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {reason_of(error)}", _REBUILD) from error
    head = decode(data, _Head, path, BundleError, _REBUILD)
    check_format(head.format, READABLE, path, BundleError, _REBUILD)
    for name in head.requires:
        if name not in KNOWN_REQUIREMENTS:
            raise BundleError(
                f"{path} requires {name!r}, which this version does not know", "upgrade sd35-trt"
            )
    digest, expected = _digest_1(data, path) if head.format == 1 else _digest_2(data, root)
    if digest != expected:
        raise BundleError(f"{path} is damaged (its digest differs)", _REBUILD)
    return decode(data, Manifest, path, BundleError, _REBUILD)


def _digest_1(data: bytes, path: Path) -> tuple[str, object]:
    """Digest of a manifest of format 1, and what it says of itself.

    Format 1 has it in the field ``digest``: the SHA-256 of the other fields as Python's
    ``json.dumps(…, sort_keys=True)`` writes them.
    """
    try:
        fields = json.loads(data, parse_constant=_refuse)
        digest = fields.pop("digest", None)
        text = json.dumps(fields, sort_keys=True)
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read: {reason_of(error)}", _REBUILD) from error
    return hashlib.sha256(text.encode()).hexdigest(), digest


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")


def _digest_2(data: bytes, root: Path) -> tuple[str, str]:
    """Digest of a manifest of format 2, and what :data:`MANIFEST_DIGEST` says."""
    path = root / MANIFEST_DIGEST
    try:
        digest = read_file(path, 256).decode("ascii").removesuffix("\n")
    except FileNotFoundError:
        raise BundleError(f"{path} is missing", _REBUILD) from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {reason_of(error)}", _REBUILD) from error
    return hashlib.sha256(data).hexdigest(), digest
