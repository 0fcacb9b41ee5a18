"""What a file of weights is, told by the names and shapes of its tensors.

Names of other models: ``diffusers.loaders.single_file_utils.CHECKPOINT_KEY_NAMES``; of adapters:
kohya's sd-scripts, LyCORIS, PEFT and diffusers' ``lora_conversion_utils``; of ControlNets and
IP-Adapters: diffusers and ComfyUI's ``controlnet.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """What a path holds.

    Attributes:
        title: noun phrase, or what is the matter: "a LoRA", "truncated or damaged".
        advice: the way that works.
        broken: whether it may be what was asked for, once it is whole.
        weights: whether it is a file of weights.
    """

    title: str
    advice: str
    broken: bool = False
    weights: bool = False


#: What is said where a model is asked for.
MODEL = "Stable Diffusion 3.5"

#: Advice where something else was given.
SD35 = f"give a {MODEL} model"

#: Advice where a part was given for the model.
PART = "give the model's own file, or its directory"

_DIRECTORY = "give the model's directory, the one with model_index.json"
#: Advice where an adapter was given for the model.
MERGED = "give the model, and this with it: --lora FILE:SCALE"
#: Advice where a ControlNet was given for the model.
BESIDE = "give the model, and this with it: --controlnet NAME=DIR"
_IN_COMFY = (
    "merge it into the model in ComfyUI: LoraLoader, then CheckpointSave, and give the file that "
    "it saves"
)
_IN_PEFT = "merge it into the model with PEFT: merge_and_unload(), save_pretrained(DIR)"
_ALONE = f"bundles take none of these: give the {MODEL} model alone"

# Adapters, the special before the general: pattern of a tensor's name, title, advice.
_ADAPTERS = (
    (r"[._]lokr_w[12]|[._]lokr_t2", "a LoKr", MERGED),
    (r"[._]hada_[wt][12]", "a LoHa", MERGED),
    (r"[._]boft_[RSs]", "a BOFT adapter", _IN_PEFT),
    (r"[._]oft_(blocks|diag)", "an OFT adapter", _IN_COMFY),
    (r"[._]oft_[rR]\b", "an OFT adapter", _IN_PEFT),
    (r"[._]ia3_l|\.on_input$", "an (IA)³ adapter", _IN_PEFT),
    (r"dora_scale", "a DoRA", MERGED),
    (r"lora_magnitude_vector", "a DoRA", MERGED),
    (r"vera_lambda|fourierft_|[._]hra_|randlora_|[._]bone_|adaption_prompt", "a PEFT adapter",
     _IN_PEFT),
    (r"(^|[._])lora[_.](down|up|mid|[AaBbE]|embedding_[AB])\b|lora_embedding_|"
     r"lora\d?\.(down|up)\.|_lora\.(down|up)\.", "a LoRA", MERGED),
    (r"^(lora|lycoris)_\w+\.(weight|alpha|[ab][12]\.weight|diff|diff_b|w_norm|b_norm)$|\.diff(_b)?$",
     "a LyCORIS adapter", _IN_COMFY),
    (r"modules_to_save\.|\.original_module\.", "a PEFT adapter", _IN_PEFT),
    (r"controlnet_blocks\.", "a ControlNet", BESIDE),
    (r"controlnet_cond_embedding|controlnet_(down|mid)_block|"
     r"controlnet_x_embedder|^control_model\.|input_hint_block|(^|\.)zero_convs\.|"
     r"control_(layers|all_x_embedder)", "a ControlNet", _ALONE),
    (r"(^|\.)ip_adapter[._]|^image_proj(_model)?\.|[._]to_[kv]_ip\b|[._]add_[kv]_proj_ip\b",
     "an IP-Adapter", _ALONE),
    (r"^(adapter\.)?body\.\d+\.(resnets|block1|in_conv)", "a T2I-Adapter", _ALONE),
    (r"motion_modules\.", "a motion module of AnimateDiff", _ALONE),
)  # fmt: skip

# Whose adapter it is where it is not SD3's.
_FAMILIES = (
    (r"double_blocks|single_blocks|single_transformer_blocks", "FLUX"),
    (r"(down|up|input|output|mid|middle)_blocks?[._]", "Stable Diffusion 1, 2 or XL"),
)

# Names that one layout of adapters has.
_LAYOUTS = (
    (r"^(lora|lycoris)_(unet|te\d?|transformer|prior|clip)", "kohya's names"),
    (r"^base_model\.model\.", "PEFT's names"),
    (r"^(transformer|unet|text_encoder\w*)\.", "diffusers' names"),
    (r"^(model\.)?(diffusion_model\.)?(joint|double|single)_blocks\.|^diffusion_model\.",
     "the original names"),
)  # fmt: skip

# Whole models and parts of models, the special before the general.
_MODELS = (
    (r"distilled_guidance_layer\.", "Chroma", SD35),
    (r"single_stream_modulation\.", "FLUX.2", SD35),
    (r"early_stream_modulations\.|(^|\.)ref_time_in\.", "FLUX.3", SD35),
    (r"individual_token_refiner\.|(^|\.)context_refiner\.", "HunyuanVideo", SD35),
    (r"double_stream_blocks\.", "HiDream", SD35),
    (r"(^|\.)double_layers\.0\.|(^|\.)joint_transformer_blocks\.0\.", "AuraFlow", SD35),
    (r"(^|\.)double_blocks\.0\.|(^|\.)single_transformer_blocks\.0\.", "FLUX", SD35),
    (r"txt_in\.text_norm\.|transformer_blocks\.0\.img_mod\.", "Qwen-Image", SD35),
    (r"(^|\.)patchify_proj\.|av_ca_", "LTX-Video", SD35),
    (r"(^|\.)head\.modulation$|(^|\.)blocks\.0\.self_attn\.norm_q\.", "Wan", SD35),
    (r"\.attn\.qkv_x\.", "Mochi", SD35),
    (r"(^|\.)cap_embedder\.0\.", "Lumina or Z-Image", SD35),
    (r"net\.x_embedder\.proj\.1\.", "Cosmos", SD35),
    (r"mlp\.inverted_conv|ff\.conv_inverted\.", "Sana", SD35),
    (r"cross_attn\.q_linear\.|adaln_single\.", "PixArt", SD35),
    (r"text_embedding_padding$|blocks\.0\.default_modulation", "Hunyuan-DiT", SD35),
    (r"clip_txt_mapper\.|channelwise\.0\.", "Stable Cascade", SD35),
    (r"^conditioner\.embedders\.", "Stable Diffusion XL", SD35),
    (r"^cond_stage_model\.model\.", "Stable Diffusion 2", SD35),
    (r"^cond_stage_model\.transformer\.", "Stable Diffusion 1", SD35),
    (r"(^|\.)input_blocks\.0\.0\.|^down_blocks\.0\.(resnets|attentions)\.",
     "the UNet of Stable Diffusion 1, 2 or XL", SD35),
    (r"transformer_blocks\.0\.norm1_context\.", "one part of a diffusers model, SD3's transformer",
     _DIRECTORY),
    (r"(^|\.)transformer_blocks\.0\.", "one part of a diffusers model, a transformer", _DIRECTORY),
    (r"^(encoder|decoder)\.layers\.\d+\.conv", "TAESD, a small autoencoder",
     "give the model with its own autoencoder"),
    (r"^(first_stage_model\.|vae\.)?(encoder|decoder)\.(down_blocks|up_blocks|down|up)\.0\.",
     "one part of a model, an autoencoder", PART),
    (r"vision_model\.|^visual\.", "an image encoder", SD35),
    (r"text_model\.embeddings\.|^(token_embedding\.|positional_embedding$)|"
     r"transformer\.resblocks\.", "one part of a model, a CLIP text encoder",
     PART),
    (r"encoder\.block\.0\.layer\.0\.SelfAttention\.", "one part of a model, a T5 text encoder",
     PART),
    (r"(^|\.)layers\.0\.self_attn\.q_proj\.|^lm_head\.|^h\.0\.attn\.", "a language model", SD35),
    (r"RRDB_trunk|^body\.\d+\.(rdb1|weight)|^model\.\d+\.(sub|weight)", "an upscaler", SD35),
)  # fmt: skip

# A textual inversion holds rows of the text encoders' embeddings, as wide as these are.
_EMBEDDINGS = frozenset({"emb_params", "clip_l", "clip_g", "t5", "t5xxl", "string_to_param"})
_WIDTHS = frozenset({768, 1024, 1280, 4096})
_FEW = 4

_SD3 = re.compile(r"(^|\.)joint_blocks\.0\.x_block\.attn\.qkv\.weight$")


def is_sd3(names: Iterable[str]) -> bool:
    """Whether the MMDiT of SD3 in the original layout is among these tensors."""
    return any(_SD3.search(name) for name in names)


def adapter_kind(names: Iterable[str]) -> Kind | None:
    """The adapter that tensors of these names are, or are part of; None where they are none."""
    names = list(names)
    for pattern, title, advice in _ADAPTERS:
        own = [name for name in names if re.search(pattern, name)]
        if own:
            return _adapter(title, advice, own)
    return None


def adapter_names(names: Iterable[str]) -> list[str]:
    """Those of the names that an adapter's tensors have."""
    return [name for name in names if any(re.search(row[0], name) for row in _ADAPTERS)]


def _adapter(title: str, advice: str, names: list[str]) -> Kind:
    for pattern, family in _FAMILIES:
        if any(re.search(pattern, name) for name in names) and advice != _ALONE:
            return Kind(f"{title} for {family}", SD35)
    if title == "a LoRA":
        for pattern, layout in _LAYOUTS:
            if any(re.search(pattern, name) for name in names):
                return Kind(f"{title} in {layout}", advice)
    return Kind(title, advice)


def tensors_kind(shapes: Mapping[str, tuple[int, ...]]) -> Kind:
    """What a file is that has these tensors and no model of ours.

    Args:
        shapes: by name; none for a file without a tensor.
    """
    if not shapes:
        return Kind("a file without a tensor", "download it again", broken=True)
    adapter = adapter_kind(shapes)
    if adapter is not None:
        return adapter
    if _is_embedding(shapes):
        return Kind("a textual inversion, new words for the text encoders", _ALONE)
    for pattern, title, advice in _MODELS:
        if any(re.search(pattern, name) for name in shapes):
            return Kind(title, advice)
    return Kind(f"a file of something else (its first tensor is {min(shapes)!r})", SD35)


def _is_embedding(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    if len(shapes) > _FEW:
        return False
    return all(
        shape and shape[-1] in _WIDTHS and (name in _EMBEDDINGS or "." not in name)
        for name, shape in shapes.items()
    )
