"""What a file is by its first bytes, and a safetensors file's header, read without its data."""

from __future__ import annotations

import json
import re
import zipfile
from pathlib import Path

from sd35_trt.units import format_bytes

from .tensor_names import SD35, Kind

#: How to have a whole file.
AGAIN = "download it again, e.g. with: hf download"

# As much of a file as tells its format; a Git LFS pointer is shorter.
_START = 1024

# As safetensors allows.
_LONGEST_HEADER = 100_000_000

_TAKE = "take the model's .safetensors file"

_PICKLE = "a pickle, which can run code when it is read"
_CONVERT = (
    f"{_TAKE}, or convert it: safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW)"
)

_GGUF = b"GGUF"

# First bytes → what it is, the advice, whether it holds weights.
_MAGIC = (
    (_GGUF, Kind("a GGUF file", "give the file itself: --model FILE.gguf", weights=True)),
    ((b"ggml", b"lmgg", b"tjgg"), Kind("a GGML file", _TAKE, weights=True)),
    (b"\x89HDF", Kind("an HDF5 file", _TAKE, weights=True)),
    (b"ftrt", Kind("a TensorRT engine", "give what it was built from", weights=True)),
    (b"\x93NUMPY", Kind("a NumPy array", SD35)),
    ((b"\x1f\x8b", b"7z\xbc\xaf", b"Rar!", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ"),
     Kind("an archive", "unpack it, and give what is in it")),
    ((b"\x89PNG", b"\xff\xd8\xff", b"RIFF", b"GIF8"), Kind("a picture", SD35)),
    (b"%PDF", Kind("a PDF", SD35)),
)  # fmt: skip

# By the end of the name, where the bytes do not tell.
_SUFFIXES = {
    ".onnx": Kind("an ONNX graph", "give the checkpoint that it was made from", weights=True),
    ".msgpack": Kind("weights of Flax", _TAKE, weights=True),
    ".engine": Kind("a compiled engine", "give what it was built from", weights=True),
    ".plan": Kind("a compiled engine", "give what it was built from", weights=True),
    ".tflite": Kind("a TensorFlow Lite model", _TAKE, weights=True),
}

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def is_gguf(path: Path) -> bool:
    """Whether a file is GGUF by its first bytes; one that cannot be read is not, nor is a pipe."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as file:
            return file.read(len(_GGUF)) == _GGUF
    except OSError:
        return False


def format_kind(path: Path) -> Kind | None:
    """What a file is by its first bytes; None for what may be safetensors.

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_START)
    if not start:
        return Kind("an empty file", AGAIN, broken=True)
    pointer = _pointer_kind(start)
    if pointer is not None:
        return pointer
    for magic, kind in _MAGIC:
        if start.startswith(magic):
            return kind
    if start.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    if start[257:262] == b"ustar":
        return Kind("an archive", "unpack it, and give what is in it")
    # Protocols 2 to 5 begin like this; no safetensors header of this length has such a start.
    if re.match(rb"\x80[\x02-\x05][^\x00]", start):
        return Kind(_PICKLE, _CONVERT, weights=True)
    if not start.strip(b"\0"):
        return Kind(f"{format_bytes(size)} of zeros: a download that did not finish", AGAIN,
                    broken=True)  # fmt: skip
    if path.suffix in _SUFFIXES:
        return _SUFFIXES[path.suffix]
    text = _text(start)
    if text is not None:
        return _text_kind(text)
    if path.suffix in _PICKLE_SUFFIXES:
        return Kind(_PICKLE, _CONVERT, weights=True)
    return None


def file_header(path: Path) -> dict[str, tuple[int, ...]] | Kind:
    """Shapes of a safetensors file's tensors by name, or what is wrong with it.

    The format: https://huggingface.co/docs/safetensors/index#format

    Raises:
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        plausible = start[8:] == b"{" and length <= _LONGEST_HEADER
        if plausible and length > size - 8:
            return _damaged(f"its header has {format_bytes(length)}, the file {format_bytes(size)}")
        if len(start) < 9:
            return _damaged(f"it has {size} bytes")
        if not plausible:
            return Kind("no safetensors file", SD35)
        text = start[8:] + file.read(length - 1)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        shapes = {name: tuple(map(int, entry["shape"])) for name, entry in header.items()}
        end = max((int(entry["data_offsets"][1]) for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        return _damaged("its header is unreadable")
    if size != 8 + length + end:
        described = 8 + length + end
        return _damaged(f"its header describes {described} bytes, the file has {size}")
    return shapes


def has_header(path: Path) -> bool:
    """Whether a file is safetensors as far as its header tells.

    Raises:
        OSError: it cannot be read.
    """
    return format_kind(path) is None and not isinstance(file_header(path), Kind)


def _damaged(reason: str) -> Kind:
    return Kind(f"truncated or damaged: {reason}", AGAIN, broken=True)


def _pointer_kind(start: bytes) -> Kind | None:
    """Of a small file that stands for a large one that is kept elsewhere."""
    if start.startswith((b"version https://git-lfs.github.com/", b"version https://hawser.")):
        size = re.search(rb"^size (\d+)$", start, re.MULTILINE)
        of = f" to {format_bytes(int(size[1]))}" if size else ""
        return Kind(f"a Git LFS pointer{of}, not the file itself",
                    "fetch it: git lfs pull, or hf download", broken=True)  # fmt: skip
    if start.startswith(b"# xet version"):
        return Kind("a Xet pointer, not the file itself", AGAIN, broken=True)
    if start.startswith((b"/annex/objects/", b"../.git/annex", b".git/annex")):
        return Kind("a git-annex pointer, not the file itself", "fetch it: git annex get",
                    broken=True)  # fmt: skip
    return None


def _zip_kind(path: Path) -> Kind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return Kind("truncated or damaged: a zip file without its end", AGAIN, broken=True)
    if any(name.endswith((".pkl", "/data.pkl")) for name in names):
        return Kind(_PICKLE, _CONVERT, weights=True)
    return Kind("an archive", "unpack it, and give what is in it")


def _text(start: bytes) -> str | None:
    """The first bytes as text; None where they are none."""
    try:
        # The last character may be cut off.
        text = start.decode("utf-8-sig", "ignore" if len(start) == _START else "strict")
    except UnicodeDecodeError:
        return None
    return text if all(c.isprintable() or c in "\r\n\t\f" for c in text) else None


def _text_kind(text: str) -> Kind:
    text = text.strip()
    if re.match(r"<(!doctype|html|head|\?xml|!--)", text, re.IGNORECASE):
        return Kind("a web page, not the file itself", f"log in (hf auth login) and {AGAIN}",
                    broken=True)  # fmt: skip
    line = (text.splitlines() or [""])[0]
    quoted = line if len(line) <= 60 else f"{line[:57]}…"
    return Kind(f"text ({quoted!r})", f"{AGAIN}; or {SD35}")
