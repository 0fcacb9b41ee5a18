"""Names of tensors without what other tools wrap around a model's modules.

``torch.compile`` adds ``_orig_mod``, ``DataParallel`` and DeepSpeed ``module``, FSDP and activation
checkpointing words of their own, PEFT ``base_model.model`` and ``base_layer``. None of them changes
a value. A prefix such as ``model.`` is of whoever saved a larger module.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from sd35_trt.errors import CheckpointError

from .contents import refusal
from .tensor_names import adapter_kind, adapter_names

# Parts of a name that no module of SD3.5 has.
_WRAPPERS = frozenset(
    {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
)

_PEFT = "base_model.model."

#: In front of all names of a file, outermost first.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "model.", "transformer.")

_MERGE = (
    "save it without: pipe.fuse_lora() and pipe.unload_lora_weights() in diffusers, "
    "merge_and_unload() in PEFT, and save_pretrained(DIR)"
)


def plain_name(name: str) -> str:
    """A tensor's, or a layer's, name without wrappers; prefixes stay."""
    parts = name.removeprefix(_PEFT).split(".")
    return ".".join(part for part in parts if part not in _WRAPPERS)


def plain_names(path: Path, names: Collection[str]) -> dict[str, str]:
    """Names without wrappers → as stored.

    Args:
        path: where they are, for the message.

    Raises:
        CheckpointError: two tensors that have the same name without.
    """
    plain: dict[str, str] = {}
    for name in sorted(names):
        other = plain.setdefault(plain_name(name), name)
        if other != name:
            raise CheckpointError(
                f"{path} has {other!r} and {name!r}, which are one tensor of the model", _MERGE
            )
    return plain


def common_prefix(names: Collection[str]) -> str:
    """The prefix that all names have, of those that larger modules give them."""
    prefix = ""
    while names:
        more = next((p for p in PREFIXES if all(n.startswith(prefix + p) for n in names)), None)
        if more is None:
            break
        prefix += more
    return prefix


def check_plain(path: Path, names: Collection[str], wanted: str) -> None:
    """Refuse tensors of adapters, which change what a model computes, alone or beside its weights.

    Args:
        wanted: what the tensors should be.

    Raises:
        CheckpointError: names the first of them.
    """
    kind = adapter_kind(names)
    if kind is None:
        return
    own = adapter_names(names)
    if len(own) == len(names):
        raise (
            refusal(path, wanted)
            if path.is_file()
            else CheckpointError(f"{path} holds {kind.title}, not {wanted}", kind.advice)
        )
    first = min(own)
    raise CheckpointError(f"{path} holds {kind.title} beside its weights ({first!r})", _MERGE)
