"""What is wrong with a model, told together: one line a part.

Headers, configurations and tokenizers are read, and no values of tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sd35_trt.components import CONTROLNET, OPTIONAL_PARTS, component_row, part_kind
from sd35_trt.errors import CheckpointError

from .comfy import INPUT_SCALES, MARKS
from .configuration import KINDS, check_class, check_configuration
from .controlnets import check_nets
from .findings import Findings
from .merged import AnyCheckpoint
from .tensor_shapes import tensor_shapes
from .tokenizer_ids import TokenizerIds, read_tokenizer_ids
from .weights import Weights

_CONFIG = "use the config.json that belongs to these weights"
_ONE_MODEL = "take all parts from one SD3.5 model"

# Tensors that no part computes with: tables and copies that libraries save, settings of samplers,
# the other half of a whole CLIP or T5, and what tells of the inputs of quantized weights, which
# their reader judges.
_IDLE = {
    "": r"(position_ids|logit_scale|logit_bias|attn_mask|spiece_model)$"
    rf"|({'|'.join((*INPUT_SCALES, *MARKS))})$",
    "transformer": r"model_ema\.|(model_sampling|denoiser)\.\w+$|(alphas_cumprod|betas|sigmas)$",
    # Of files with CLIP-L; a folder's projection is computed.
    "text_encoder": r"(vision_model|visual)\.|(visual|text)_projection(\.weight)?$",
    "text_encoder_2": r"(vision_model|visual)\.|visual_projection\.weight$",
    "text_encoder_3": r"decoder\.|lm_head\.weight$|embed_tokens\.weight$",
    "vae": r"loss\.|model_ema\.",
    CONTROLNET: r"model_ema\.",
}

# Types of tensors that hold no numbers of a model, as headers spell them.
_NO_NUMBERS = re.compile(r"[IU]\d+|BOOL|C64|F4|F6_.*|F8_E8M0")

# What a CLIP's end token is where its pooled state is that of the largest id.
_LARGEST = 2


def check_parts(
    checkpoint: AnyCheckpoint, parts: Sequence[str], findings: Findings
) -> dict[str, Mapping[str, Any]]:
    """Check every part by itself, and whether they belong together.

    Returns:
        The configurations of the parts that may be computed with.

    Raises:
        CheckpointError: kept by ``findings``.
    """
    configs: dict[str, Mapping[str, Any]] = {}
    errors: dict[str, CheckpointError] = {}
    for part in parts:
        try:
            configs[part] = _configuration(checkpoint, part)
        except CheckpointError as error:
            errors[part] = error
    errors |= _widths(checkpoint, configs)
    if "transformer" in configs:
        nets = {p: config for p, config in configs.items() if part_kind(p) == CONTROLNET}
        errors |= check_nets(checkpoint, nets)
    for part in parts:
        with findings.part():
            if part in errors:
                raise errors[part]
            check_tensors(part, configs[part], checkpoint.weights(part))
    return {part: config for part, config in configs.items() if part not in errors}


def _configuration(checkpoint: AnyCheckpoint, part: str) -> Mapping[str, Any]:
    """A part's configuration.

    Raises:
        CheckpointError: its class, or the configuration, is not computed here.
    """
    if problem := check_class(part, checkpoint.class_name(part)):
        raise CheckpointError(f"{checkpoint.place(part)} {problem}", _class_fix(part))
    config = checkpoint.config(part)
    if problems := check_configuration(part, config):
        raise CheckpointError(f"{checkpoint.place(part)} {'; '.join(problems)}", _CONFIG)
    return config


def _class_fix(part: str) -> str:
    kind = KINDS[part_kind(part)]
    return f"take the {kind.title} of an SD3.5 model ({kind.classes[0]})"


def check_tensors(part: str, config: Mapping[str, Any], weights: Weights) -> None:
    """Compare a part's tensors with what its configuration asks for.

    Args:
        config: that :func:`check_configuration` found nothing wrong with.

    Raises:
        CheckpointError: names tensors that are missing, of another shape or type, and those that
            the part has no use for.
    """
    shapes = tensor_shapes(part, config)
    missing = [name for name in shapes if name not in weights]
    problems = []
    if missing:
        problems.append(f"has no tensor {_some([weights.source(name) for name in missing])}")
    present = [name for name in shapes if name in weights]
    for name in present:
        if weights.shape(name) != shapes[name]:
            problems.append(
                f"{name!r} has shape {list(weights.shape(name))}, the configuration asks for "
                f"{list(shapes[name])}"
            )
            break
    unread = [name for name in present if _NO_NUMBERS.fullmatch(weights.dtype(name))]
    if unread:
        kind = weights.dtype(unread[0])
        problems.append(f"has {kind} in {_some([weights.source(name) for name in unread])}")
    idle = re.compile(rf"(^|\.)({_IDLE['']}|{_IDLE[part_kind(part)]})")
    unused = [name for name in weights.unused(shapes) if not idle.search(name)]
    if unused:
        problems.append(f"has no use for {_some(unused)}")
    if problems:
        raise CheckpointError(
            f"{weights.folder}: {'; '.join(problems)}", _tensor_fix(part, weights, missing)
        )


def _tensor_fix(part: str, weights: Weights, missing: list[str]) -> str:
    if missing == ["text_projection.weight"]:
        return "take a CLIP with its projection (CLIPTextModelWithProjection)"
    return weights.advice if missing == [] else "download it again, or " + weights.advice


def _some(names: list[str]) -> str:
    """The first of some names, and how many more there are."""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]!r}{more}"


def _widths(
    checkpoint: AnyCheckpoint, configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, CheckpointError]:
    """What the transformer does not take, by part."""
    errors: dict[str, CheckpointError] = {}
    if "transformer" not in configs:
        return errors
    transformer = configs["transformer"]

    def compare(part: str, title: str, width: int, takes: int) -> None:
        if width != takes:
            errors[part] = CheckpointError(
                f"{checkpoint.place(part)}: {title} put out {width} channels, the transformer "
                f"takes {takes}",
                _ONE_MODEL,
            )

    if "text_encoder" in configs and "text_encoder_2" in configs:
        clips = [configs[part] for part in ("text_encoder", "text_encoder_2")]
        most = transformer["joint_attention_dim"]
        hidden = sum(clip["hidden_size"] for clip in clips)
        compare("text_encoder", "CLIP-L's and CLIP-G's states", max(hidden, most), most)
        pooled = [clip["projection_dim"] for clip in clips]
        title = f"CLIP-L and CLIP-G together ({pooled[0]} + {pooled[1]})"
        compare("text_encoder", title, sum(pooled), transformer["pooled_projection_dim"])
    if "text_encoder_3" in configs:
        t5 = configs["text_encoder_3"]["d_model"]
        compare("text_encoder_3", "T5", t5, transformer["joint_attention_dim"])
    if "vae" in configs:
        latents = configs["vae"]["latent_channels"]
        compare("vae", "the autoencoder", latents, transformer["in_channels"])
    return errors


def check_tokenizers(
    checkpoint: AnyCheckpoint,
    components: Iterable[str],
    configs: Mapping[str, Mapping[str, Any]],
    findings: Findings,
) -> list[str]:
    """Check the tokenizers against the text encoders.

    Args:
        configs: of :func:`check_parts`; the other encoders' tokenizers are read alone.

    Returns:
        Notes: what of a text encoder stays unused.

    Raises:
        CheckpointError: kept by ``findings``.
    """
    lengths, notes = {}, []
    for name in components:
        row = component_row(name)
        if row.tokenizer is None:
            continue
        with findings.part():
            folder = checkpoint.tokenizer(row.tokenizer)
            tokenizer, config = read_tokenizer_ids(folder), configs.get(row.part, {})
            title = KINDS[row.part].title
            if problem := _check_ids(tokenizer, config, title):
                raise CheckpointError(f"{folder} {problem}", f"take the tokenizer of this {title}")
            positions = config.get("max_position_embeddings")
            if row.part not in OPTIONAL_PARTS and isinstance(positions, int):
                length = min(tokenizer.length or positions, positions)
                lengths[title] = length
                if length < positions:
                    notes.append(
                        f"{title} has {positions} positions; its tokenizer uses {length} of them"
                    )
    with findings.part():
        if len(set(lengths.values())) > 1:
            both = ", ".join(f"{title} {length}" for title, length in lengths.items())
            raise CheckpointError(
                f"{checkpoint.root}: the CLIPs read texts of different lengths ({both})",
                "set model_max_length in both tokenizer_config.json to the smaller one",
            )
    return notes


def _check_ids(tokenizer: TokenizerIds, config: Mapping[str, Any], title: str) -> str | None:
    """What is wrong with a tokenizer's ids; None where nothing is."""
    rows = config.get("vocab_size")
    token, largest = tokenizer.last
    if isinstance(rows, int) and largest >= rows:
        return f"gives {token!r} the id {largest}; {title}'s embedding has {rows} rows"
    end = config.get("eos_token_id")
    pools = "max_position_embeddings" in config and end != _LARGEST
    if pools and tokenizer.end is not None and end != tokenizer.end:
        return f"ends texts with the id {tokenizer.end}; {title} looks for {end}"
    return None
