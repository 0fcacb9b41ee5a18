"""The checkpoint's tokenizers as files for the ``tokenizers`` library."""

from __future__ import annotations

from pathlib import Path

from sd35_trt.checkpoints.merged import AnyCheckpoint
from sd35_trt.components import component_row
from sd35_trt.dimensions import T5_TOKENS
from sd35_trt.errors import CheckpointError
from sd35_trt.formats.tokenizers import TokenizerFacts, write_tokenizers


def export_tokenizers(checkpoint: AnyCheckpoint, names: list[str], out: Path) -> None:
    """Write ``<name>.json`` for each text encoder, and ``tokenizers.json`` with their lengths.

    Args:
        names: components of the model.
        out: an existing directory.

    Raises:
        CheckpointError: a tokenizer's folder is missing or cannot be read.
    """
    from transformers import AutoTokenizer

    facts = {}
    for name in names:
        row = component_row(name)
        if row.tokenizer is None:
            continue
        folder = checkpoint.tokenizer(row.tokenizer)
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, use_fast=True)
            backend = tokenizer.backend_tokenizer
        except Exception as error:
            raise CheckpointError(
                f"{folder} holds no usable tokenizer: {error}", "download the checkpoint again"
            ) from error
        backend.no_padding()
        backend.no_truncation()
        backend.save(str(out / f"{name}.json"))
        length = int(tokenizer.model_max_length)
        if name == "t5":
            length = min(length, T5_TOKENS)
        else:
            # A tokenizer without a limit reports 1e30; CLIP's position table has one.
            positions = checkpoint.config(row.part).get("max_position_embeddings", 77)
            length = min(length, int(positions))
        facts[name] = TokenizerFacts(length, int(tokenizer.pad_token_id))
    write_tokenizers(out, facts)
