"""The node that takes the texts."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .wires import CATEGORY, Prompt, PromptWire

_OTHERS = {
    "prompt_2": "What CLIP-G reads; empty is the prompt.",
    "prompt_3": "What T5 reads; empty is the prompt.",
    "negative_2": "What CLIP-G reads as negative prompt; empty is the negative prompt.",
    "negative_3": "What T5 reads as negative prompt; empty is the negative prompt.",
}


def text_inputs() -> list[Any]:
    """The prompt and the negative prompt."""
    return [
        io.String.Input("prompt", multiline=True, dynamic_prompts=True, tooltip="What to draw."),
        io.String.Input(
            "negative",
            multiline=True,
            dynamic_prompts=True,
            default="",
            tooltip="What to steer away from; has no effect with cfg 1.",
        ),
    ]


class WritePrompt(io.ComfyNode):
    """Texts → what is to be drawn. The text encoders run when it is sampled."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="Sd35TrtPrompt",
            display_name="Prompt (SD3.5 TRT)",
            category=CATEGORY,
            description="A prompt with its negative prompt, as the three text encoders read them.",
            inputs=[
                *text_inputs(),
                *(
                    io.String.Input(
                        name,
                        multiline=True,
                        dynamic_prompts=True,
                        default="",
                        optional=True,
                        tooltip=meaning,
                    )
                    for name, meaning in _OTHERS.items()
                ),
                io.Boolean.Input(
                    "weighting",
                    default=True,
                    optional=True,
                    tooltip="Read (word:1.3) as a weight, as ComfyUI's own nodes do.",
                ),
                io.Int.Input(
                    "t5_tokens",
                    default=0,
                    min=0,
                    max=512,
                    optional=True,
                    tooltip="Tokens that T5 reads; 0 is what the bundle was built for.",
                ),
            ],
            outputs=[PromptWire.Output(display_name="prompt")],
        )

    @classmethod
    def execute(
        cls,
        prompt: str,
        negative: str,
        weighting: bool = True,
        t5_tokens: int = 0,
        **others: str,
    ) -> io.NodeOutput:
        return io.NodeOutput(
            Prompt(
                {
                    "prompt": prompt,
                    "negative": negative,
                    "weighting": weighting,
                    "t5_tokens": t5_tokens or None,
                    **{name: text or None for name, text in others.items()},
                }
            )
        )
