"""The components' arithmetic: thin modules around diffusers' and transformers' own.

Each declares its ports: ``inputs`` and ``outputs`` map names to (dtype, shape), where a string is
a dynamic dimension. Latent height and width are even, in latent pixels.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from sd35_trt.checkpoints.weights import Weights
from sd35_trt.compat.torch import unset_fake_temporarily
from sd35_trt.components import LATENT_SCALE

from .adapters import AdaptedLinears, adapter_groups, take_adapters
from .layers import PositionTable, SeparablePositionTable, cast, is_separable
from .range_guard import carries_fp32
from .whole import WholeModule

# Parts: the checkpoint's modules, built from their configuration on fake tensors. Where there are
# weights, their names and shapes are checked.


def build_clip(config: dict[str, Any], weights: Weights | None) -> nn.Module:
    """CLIP-L or CLIP-G with its text projection."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    model = CLIPTextModelWithProjection(CLIPTextConfig(**config, attn_implementation="sdpa"))
    return _checked(model, weights)


def build_t5(config: dict[str, Any], weights: Weights | None) -> nn.Module:
    """The T5 v1.1 encoder; eager attention, whose position bias traces."""
    from transformers import T5Config, T5EncoderModel

    model = T5EncoderModel(T5Config(**config, attn_implementation="eager"))
    # The embedding is tied: files hold it as "shared.weight".
    return _checked(model, weights, skip=("encoder.embed_tokens.weight",))


def build_transformer(config: dict[str, Any], weights: Weights | None) -> nn.Module:
    """The MMDiT, its position table replaced by one that needs a thousandth of the bytes."""
    from diffusers import SD3Transformer2DModel

    model = SD3Transformer2DModel(**{**config, "pos_embed_max_size": 1})
    return _with_table(model, int(config["pos_embed_max_size"]), weights)


def build_controlnet(config: dict[str, Any], weights: Weights | None) -> nn.Module:
    """A ControlNet with an embedding of patches, its position table replaced likewise.

    Args:
        config, weights: of :func:`sd35_trt.checkpoints.controlnets.part_source`.
    """
    from diffusers import SD3ControlNetModel

    # The size that a net was trained at is of no effect on what it computes.
    own = {**config, "pos_embed_max_size": 1, "sample_size": config["patch_size"]}
    model = SD3ControlNetModel(**own)
    return _with_table(model, int(config["pos_embed_max_size"]), weights)


def _with_table(model: Any, size: int, weights: Weights | None) -> nn.Module:
    name = "pos_embed.pos_embed"
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    shapes[name] = (1, size * size, model.inner_dim)
    separable = True  # as every published model's is
    if weights is not None:
        weights.check(shapes)
        with unset_fake_temporarily():
            separable = is_separable(weights.read(name))
    table = SeparablePositionTable if separable else PositionTable
    del model.pos_embed.pos_embed
    model.pos_embed.pos_embed = table(size, model.inner_dim)
    return model


def build_vae(config: dict[str, Any], weights: Weights | None) -> nn.Module:
    """The autoencoder."""
    from diffusers import AutoencoderKL

    scale = 2 ** (len(config["block_out_channels"]) - 1)
    if scale != LATENT_SCALE:
        raise ValueError(f"the autoencoder reduces {scale} times, SD3.5's {LATENT_SCALE} times")
    return _checked(AutoencoderKL(**config), weights)


def _checked(model: nn.Module, weights: Weights | None, skip: tuple[str, ...] = ()) -> nn.Module:
    if weights is not None:
        weights.check({k: tuple(v.shape) for k, v in model.state_dict().items() if k not in skip})
    return model


# Components.


class ClipEncoder(WholeModule):
    """CLIP: the penultimate hidden state, and the projected state at the end token.

    Args:
        component: its name, where it takes adapters.
    """

    def __init__(self, model: nn.Module, tokens: int, component: str | None = None) -> None:
        super().__init__()
        self.part = model
        config: Any = model.config
        projection: Any = model.text_projection
        self.dtype: torch.dtype = projection.dtype
        self.inputs = {"input_ids": (torch.int64, ("batch", tokens))}
        # The penultimate state is the residual stream itself.
        blocks: Any = model.text_model.encoder.layers  # type: ignore[union-attr]
        stream = torch.float32 if any(map(carries_fp32, blocks)) else self.dtype
        self.outputs = {
            "hidden": (stream, ("batch", tokens, config.hidden_size)),
            "pooled": (projection.output_dtype, ("batch", config.projection_dim)),
        }
        self._adapted = None
        if component is not None:
            groups = adapter_groups(model, component)
            self._adapted = AdaptedLinears(model, groups)
            take_adapters(self, groups, self.dtype, "batch")

    def forward(
        self, input_ids: torch.Tensor, adapters: tuple[torch.Tensor, ...] = ()
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._adapted is not None:
            self._adapted.feed(self.adapter_inputs, adapters)
        # Given, because the model's own are a constant, and constants have no value while tracing.
        positions = torch.arange(input_ids.shape[1])[None]
        out = self.part(input_ids, position_ids=positions, output_hidden_states=True)
        hidden, pooled = (dtype for dtype, _ in self.outputs.values())
        return cast(out.hidden_states[-2], hidden), cast(out.text_embeds, pooled)


#: T5's layers that read the same tensor.
_SIBLINGS = (("q", "k", "v"), ("wi_0", "wi_1"))


class _Zeros:
    """Tensors of a run, which ``torch.export`` refuses in an attribute of the module itself."""

    values: tuple[torch.Tensor, ...] = ()


class T5Encoder(WholeModule):
    """The T5 encoder, without an attention mask: SD3 attends to the padding too.

    TensorRT makes one product of several that read the same tensor, and copies their weights for
    it: 6 GB of memory while T5-XXL compiles, for what runs once per prompt. A zero that it cannot
    know of, added to the input of all but one, keeps them apart.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.part = model
        norm: Any = model.encoder.final_layer_norm  # type: ignore[union-attr]
        self.dtype = norm.output_dtype
        config: Any = model.config
        self.inputs = {"input_ids": (torch.int64, ("batch", "tokens"))}
        self.outputs = {"hidden": (self.dtype, ("batch", "tokens", config.d_model))}
        self._zeros = _Zeros()
        for module in model.modules():
            for names in _SIBLINGS:
                for index, name in enumerate(names[1:]):
                    if hasattr(module, name):
                        layer: Any = getattr(module, name)
                        layer.register_forward_pre_hook(partial(self._add_zero, index))

    def _add_zero(
        self, index: int, layer: nn.Module, inputs: tuple[torch.Tensor]
    ) -> tuple[torch.Tensor]:
        (x,) = inputs
        return (x + self._zeros.values[index].to(x.dtype),)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        # No id is negative.
        first = input_ids[:1, :1, None]
        self._zeros.values = (first < 0, first < -1)
        encoder: Any = self.part.encoder
        # The residual stream starts, and by promotion stays, in the dtype of the feed-forward
        # output: T5's exceeds FP16.
        stream = encoder.block[0].layer[-1].DenseReluDense.output_dtype
        hidden = cast(encoder.embed_tokens(input_ids), stream)
        position_bias = None
        # Block by block: the encoder's own forward would build a mask from the stream's dtype.
        for block in encoder.block:
            hidden, position_bias, *_ = block(hidden, position_bias=position_bias)
        return (cast(encoder.final_layer_norm(hidden), self.dtype),)


def modulated_norms(part: Any) -> list[nn.Module]:
    """Every adaptive norm of a transformer or a ControlNet, in the order of its rows in the
    modulation.
    """
    norms: list[nn.Module] = []
    for block in part.transformer_blocks:
        norms.append(block.norm1)
        if hasattr(block, "norm1_context"):
            norms.append(block.norm1_context)
    return [*norms, part.norm_out] if hasattr(part, "norm_out") else norms


def modulation_rows(norm: Any) -> int:
    """How many rows of the modulation an adaptive norm reads."""
    return norm.linear.out_features // norm.linear.in_features


def text_reader(part: Any) -> Any:
    """The layer that reads the text of a transformer or a ControlNet, whose precision is that of
    its streams.
    """
    return part.context_embedder or part.time_text_embed.text_embedder.linear_1


def modulation_dtype(part: Any) -> torch.dtype:
    """What the conditioner hands to the blocks: the policy's dtype, unless it is too narrow."""
    linears: list[Any] = [norm.linear for norm in modulated_norms(part)]
    wide = any(linear.wide for linear in linears)
    return torch.float32 if wide else text_reader(part).dtype


def modulation_of(
    part: Any, norms: list[nn.Module], pooled: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """[steps, samples, rows, D] of adaptive norms."""
    embed = part.time_text_embed
    time = embed.timestep_embedder(cast(embed.time_proj(timesteps), pooled.dtype))
    text = embed.text_embedder(pooled)
    embedding = nn.functional.silu(time[:, None] + text[None])
    modulation = [
        norm.linear(embedding).unflatten(-1, (modulation_rows(norm), -1))  # type: ignore[operator]
        for norm in norms
    ]
    return torch.cat(modulation, dim=2)


class Conditioner(WholeModule):
    """Everything in the MMDiT that depends on the prompt and the timestep alone.

    The modulation of all steps comes out at once: SD3's adaLN linears see only the timestep
    embedding and the pooled text, and the sigma schedule is known before the loop.
    """

    def __init__(self, transformer: Any, adapters: bool = False) -> None:
        super().__init__()
        self.part = transformer
        embedder = transformer.context_embedder
        self.dtype = torch.float32 if embedder.follows else embedder.dtype
        self.context_dtype = embedder.output_dtype
        self.modulation_dtype = modulation_dtype(transformer)
        self.norms = modulated_norms(transformer)
        width = transformer.inner_dim
        rows = sum(map(modulation_rows, self.norms))
        config = transformer.config
        self.inputs = {
            "prompt_embeds": (self.dtype, ("samples", "tokens", config.joint_attention_dim)),
            "pooled": (self.dtype, ("samples", config.pooled_projection_dim)),
            "timesteps": (torch.float32, ("steps",)),
        }
        self.outputs = {
            "context": (self.context_dtype, ("samples", "tokens", config.caption_projection_dim)),
            "modulation": (self.modulation_dtype, ("steps", "samples", rows, width)),
        }
        self._adapted = None
        if adapters:
            groups = adapter_groups(transformer, "conditioner")
            # What the norms' linears read is [steps, samples, width].
            axes = {group.name: int(group.name != "context_embedder") for group in groups}
            self._adapted = AdaptedLinears(transformer, groups, sample_axes=axes)
            take_adapters(self, groups, self.dtype, "samples")

    def forward(
        self,
        prompt_embeds: torch.Tensor,
        pooled: torch.Tensor,
        timesteps: torch.Tensor,
        adapters: tuple[torch.Tensor, ...] = (),
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._adapted is not None:
            self._adapted.feed(self.adapter_inputs, adapters)
        modulation = modulation_of(self.part, self.norms, pooled, timesteps)
        context = self.part.context_embedder(prompt_embeds)  # type: ignore[operator]
        modulations = cast(modulation, self.modulation_dtype)
        return cast(context, self.context_dtype), modulations


class VaeDecoder(WholeModule):
    """Latents → an RGB image, rounded to bytes as diffusers' image processor does."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.part = vae
        config = vae.config
        self.inputs = {
            "latents": (torch.float32, ("batch", config.latent_channels, "height", "width"))
        }
        self.outputs = {"image": (torch.uint8, ("batch", "image_height", "image_width", 3))}

    def forward(self, latents: torch.Tensor) -> tuple[torch.Tensor]:
        vae: Any = self.part
        latents = latents / vae.config.scaling_factor + vae.config.shift_factor
        if vae.post_quant_conv is not None:
            latents = vae.post_quant_conv(latents)
        image = vae.decoder(cast(latents, vae.decoder.conv_in.dtype)).float()
        image = (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return ((image * 255).round().to(torch.uint8),)


class VaeEncoder(WholeModule):
    """An RGB image → the mean of its latent distribution, scaled as the MMDiT expects.

    Args:
        encoding: whether each image says how it is taken: the factor of its bytes, what is added,
            and how much of the shift is subtracted from its latents. Some ControlNets were trained
            on pictures taken otherwise.
    """

    def __init__(self, vae: Any, encoding: bool = False) -> None:
        super().__init__()
        self.part = vae
        config = vae.config
        self.inputs = {"image": (torch.uint8, ("batch", "image_height", "image_width", 3))}
        if encoding:
            self.inputs["encoding"] = (torch.float32, ("batch", 3))
        self.outputs = {
            "latents": (torch.float32, ("batch", config.latent_channels, "height", "width"))
        }

    def forward(
        self, image: torch.Tensor, encoding: torch.Tensor | None = None
    ) -> tuple[torch.Tensor]:
        vae: Any = self.part
        shift = vae.config.shift_factor
        # Cast first: TensorRT takes bytes from the caller, but computes nothing on them.
        pixels = image.float().permute(0, 3, 1, 2)
        if encoding is None:
            pixels = pixels / 127.5 - 1
        else:
            factor, offset, share = (encoding[:, i].view(-1, 1, 1, 1) for i in range(3))
            pixels = pixels * factor + offset
            shift = shift * share
        moments = vae.encoder(cast(pixels, vae.encoder.conv_in.dtype))
        if vae.quant_conv is not None:
            moments = vae.quant_conv(moments)
        mean = moments[:, : vae.config.latent_channels].float()
        return ((mean - shift) * vae.config.scaling_factor,)
