"""Bundles made to harm who opens them. Each attack changes a good one in place.

None of them may be opened: all end in one line that names the file. Digests are right unless the
attack is one on them: who makes a hostile bundle signs it too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bare_bundle import read_json, sign

from sd35_trt.formats.bundle import MANIFEST, MANIFEST_DIGEST

Attack = Callable[[Path], None]

#: Attack → words of the refusal.
ATTACKS: dict[Attack, str] = {}


def _attack(words: str) -> Callable[[Attack], Attack]:
    def register(attack: Attack) -> Attack:
        ATTACKS[attack] = words
        return attack

    return register


def _change(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = read_json(root)
    change(data)
    sign(root, json.dumps(data))


def _set_path(root: Path, path: str) -> None:
    _change(root, lambda d: d["components"][0]["files"][0].update(path=path))


@_attack("leaves the bundle")
def path_upwards(root: Path) -> None:
    """A file named ``../outside``. Paths with ``..`` are refused."""
    (root.parent / "outside").write_text("secret")
    _set_path(root, "../outside")


@_attack("leaves the bundle")
def path_upwards_in_the_middle(root: Path) -> None:
    """``denoiser/../../outside``. Paths with ``..`` are refused wherever it stands."""
    _set_path(root, "denoiser/../../outside")


@_attack("leaves the bundle")
def path_from_the_root(root: Path) -> None:
    """``/etc/passwd``. Paths from the root are refused."""
    _set_path(root, "/etc/passwd")


@_attack("leaves the bundle")
def linked_folder(root: Path) -> None:
    """A folder that is a link to ``/etc``. A path is resolved, and has to lie in the bundle."""
    (root / "link").symlink_to("/etc")
    _set_path(root, "link/passwd")


def _link_weights(root: Path, target: Path | str) -> None:
    weights = root / "denoiser" / "weights.data"
    weights.unlink()
    weights.symlink_to(target)


@_attack("leaves the bundle")
def linked_file(root: Path) -> None:
    """The weights are a link to a file elsewhere, of the same size. Its hash is compared."""
    secret = root.parent / "secret"
    secret.write_bytes(bytes((root / "denoiser" / "weights.data").stat().st_size))
    _link_weights(root, secret)


@_attack("leaves the bundle")
def linked_device(root: Path) -> None:
    """The weights are ``/dev/zero``, which never ends. A link leads to a regular file."""
    _link_weights(root, "/dev/zero")


@_attack("leaves the bundle")
def linked_hole(root: Path) -> None:
    """The weights are a link to a terabyte of nothing. Sizes are compared before hashes."""
    with (root.parent / "hole").open("wb") as stream:
        stream.truncate(1 << 40)
    _link_weights(root, root.parent / "hole")


@_attack("leaves the bundle")
def linked_pipe(root: Path) -> None:
    """The weights are a link to a pipe, to make the reader wait. It is not opened."""
    os.mkfifo(root.parent / "pipe")
    _link_weights(root, root.parent / "pipe")


@_attack("is missing")
def dangling_link(root: Path) -> None:
    """The weights are a link to nothing in the bundle. It is said to be missing."""
    _link_weights(root, "nothing")


@_attack("leaves the bundle")
def circle_of_links(root: Path) -> None:
    """A link to itself. What cannot be resolved is refused."""
    (root / "circle").symlink_to("circle")
    _set_path(root, "circle/x")


@_attack("leaves the bundle")
def tokenizer_outside(root: Path) -> None:
    """A tokenizer's path that no entry of ``files`` has. Its path is checked too."""
    _change(root, lambda d: d["tokenizers"]["clip_l"].update(path="../../etc/passwd"))


@_attack("lacks or misstates")
def path_with_a_nul(root: Path) -> None:
    """A NUL in a path, which systems read up to it. The type of paths has none."""
    _set_path(root, "denoiser/model.onnx\0.txt")


@_attack("leaves the bundle|is missing|cannot be read: File name too long")
def path_of_a_name_too_long(root: Path) -> None:
    """A name that no file system takes. What cannot be resolved is refused."""
    _set_path(root, "a" * 1000)


@_attack("lacks or misstates")
def path_without_end(root: Path) -> None:
    """A path of a megabyte. Paths have 1,024 characters at most."""
    _set_path(root, "a/" * (1 << 19))


@_attack("is no regular file")
def pipe_instead_of_a_file(root: Path) -> None:
    """Weights that are a pipe, to make the reader wait. Regular files alone are opened."""
    (root / "denoiser" / "weights.data").unlink()
    os.mkfifo(root / "denoiser" / "weights.data")


@_attack("cannot be read: it is no regular file")
def pipe_instead_of_the_manifest(root: Path) -> None:
    """A manifest that is a pipe. It is opened without waiting, and has to be a regular file."""
    (root / MANIFEST).unlink()
    os.mkfifo(root / MANIFEST)


@_attack("its digest differs")
def manifest_of_another(root: Path) -> None:
    """A manifest changed behind its digest. The digest is of the manifest's bytes."""
    text = (root / MANIFEST).read_text()
    (root / MANIFEST).write_text(text.replace('"guided": true', '"guided":false'))


@_attack("is missing")
def no_digest(root: Path) -> None:
    """A digest taken away. A manifest of format 2 does not load without."""
    (root / MANIFEST_DIGEST).unlink()


@_attack("its digest differs")
def format_1_to_avoid_the_digest(root: Path) -> None:
    """A manifest that says format 1, with no digest. Format 1 has its digest inside."""
    data = read_json(root)
    (root / MANIFEST).write_text(json.dumps({**data, "format": 1}))


@_attack("is damaged")
def weights_of_another(root: Path) -> None:
    """Weights exchanged for others of the same size. Their hash is in the manifest."""
    (root / "denoiser" / "weights.data").write_bytes(bytes(256))


@_attack("has 100 bytes, the manifest says 256")
def truncated_weights(root: Path) -> None:
    """Weights cut short. Sizes are always compared."""
    path = root / "denoiser" / "weights.data"
    path.write_bytes(path.read_bytes()[:100])


@_attack("cannot be read")
def truncated_manifest(root: Path) -> None:
    """A manifest cut short and signed. It is no JSON any more."""
    text = (root / MANIFEST).read_text()
    sign(root, text[: len(text) // 2])


@_attack("cannot be read: it has .* bytes, at most")
def manifest_without_end(root: Path) -> None:
    """A manifest of a terabyte, most of it a hole. Its size is looked at before it is read."""
    with (root / MANIFEST).open("ab") as stream:
        stream.truncate(1 << 40)


@_attack("cannot be read")
def nesting(root: Path) -> None:
    """A hundred thousand brackets in a field that is not known. Depth is bounded."""
    text = (root / MANIFEST).read_text().rstrip().removesuffix("}")
    sign(root, text + ', "later": ' + "[" * 100_000 + "]" * 100_000 + "}")


@_attack("cannot be read")
def nesting_in_format_1(root: Path) -> None:
    """The same where Python's own reader computes the digest. Its error is caught as well."""
    sign(root, '{"format": 1, "later": ' + "[" * 100_000 + "]" * 100_000 + "}")


@_attack("cannot be read")
def not_a_number(root: Path) -> None:
    """NaN as the guidance, which no comparison refuses. It is no JSON."""
    _change(root, lambda d: d["defaults"].update(guidance=float("nan")))


@_attack("cannot be read")
def infinity(root: Path) -> None:
    """Infinity as the shift. It is no JSON."""
    _change(root, lambda d: d["scheduler"].update(shift=float("inf")))


@_attack(r"\$\.scheduler\.shift")
def number_out_of_range(root: Path) -> None:
    """``1e999``, which many readers take for infinity. It is out of a number's range."""
    text = (root / MANIFEST).read_text()
    sign(root, text.replace('"shift": 3.0', '"shift": 1e999'))


@_attack(r"int.*\$\.components\[0\]\.weight_bytes")
def negative_size(root: Path) -> None:
    """Weights of -1 byte, so that a budget is never used up. Sizes are counted from 0."""
    _change(root, lambda d: d["components"][0].update(weight_bytes=-1))


@_attack(r"int.*\$\.components\[0\]\.files\[0\]\.bytes")
def absurd_size(root: Path) -> None:
    """A file of 2**63 bytes. Sizes fit 63 bits."""
    _change(root, lambda d: d["components"][0]["files"][0].update(bytes=1 << 63))


@_attack(r"length <= 256.*\$\.components")
def thousands_of_components(root: Path) -> None:
    """Ten thousand components. There are 256 at most."""
    _change(root, lambda d: d.update(components=d["components"] * 5000))


@_attack(r"length <= 8.*shape")
def thousands_of_dimensions(root: Path) -> None:
    """A port with ten thousand dimensions. There are 8 at most."""
    _change(root, lambda d: d["components"][0]["inputs"][0].update(shape=[1] * 10_000))


@_attack(r"command")
def string_without_end(root: Path) -> None:
    """A command of a megabyte, for terminals. Texts have 65,536 characters at most."""
    _change(root, lambda d: d.update(command="x" * (1 << 20)))


@_attack(r"dtype")
def objects_as_values(root: Path) -> None:
    """A port of Python objects. The types of values are a list of eight."""
    _change(root, lambda d: d["components"][0]["inputs"][0].update(dtype="object"))


@_attack(r"int.*got `str`.*\$\.defaults\.steps")
def words_for_numbers(root: Path) -> None:
    """Steps as a text. Types are not converted."""
    _change(root, lambda d: d["defaults"].update(steps="28"))


@_attack(r"bool.*\$\.guided")
def numbers_for_truth(root: Path) -> None:
    """``1`` for true. Types are not converted."""
    _change(root, lambda d: d.update(guided=1))


@_attack(r"no range")
def range_upside_down(root: Path) -> None:
    """Batches from 4 to 1. Bounds are in order."""
    _change(root, lambda d: d["ranges"].update(batch=[4, 1]))


@_attack(r"is not above 0")
def shift_of_nothing(root: Path) -> None:
    """A shift of 0, which divides by zero. Shifts are above 0."""
    _change(root, lambda d: d["scheduler"].update(shift=0))
