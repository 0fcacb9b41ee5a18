"""Draws from a bundle by docs/bundle-format.md alone: nothing of the package is imported.

Stands for a reader in another language, on ONNX Runtime.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import host_arithmetic
import numpy as np
import onnxruntime
import tokenizers


class Reader:
    """An opened bundle of ``onnxruntime`` engines."""

    def __init__(self, root: Path) -> None:
        data = (root / "bundle.json").read_bytes()
        digest = (root / "bundle.json.sha256").read_text("ascii")
        assert digest == hashlib.sha256(data).hexdigest() + "\n"
        self.root = root
        self.manifest: dict[str, Any] = json.loads(data)
        assert self.manifest["format"] == 2
        assert not self.manifest["requires"]
        self.components = {c["name"]: c for c in self.manifest["components"]}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.sessions = {
            name: onnxruntime.InferenceSession(str(root / c["files"][0]["path"]), options)
            for name, c in self.components.items()
        }

    def run(self, name: str, **inputs: Any) -> dict[str, np.ndarray]:
        component = self.components[name]
        feed = {p["name"]: np.asarray(inputs[p["name"]], p["dtype"]) for p in component["inputs"]}
        names = [port["name"] for port in component["outputs"]]
        return dict(zip(names, self.sessions[name].run(names, feed), strict=True))

    def tokens(self, name: str, text: str, length: int) -> list[int]:
        about = self.manifest["tokenizers"][name]
        tokenizer = tokenizers.Tokenizer.from_file(str(self.root / about["path"]))
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length=length)
        ids: list[int] = tokenizer.encode(text).ids
        return ids + [about["pad_id"]] * (length - len(ids))

    def features(self, text: str, t5_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        clip_tokens = self.manifest["tokenizers"]["clip_l"]["length"]
        port = self.components["conditioner"]["inputs"][0]
        embeds = np.zeros((clip_tokens + t5_tokens, port["shape"][2]), port["dtype"])
        pooled, column = [], 0
        for name in ("clip_l", "clip_g"):
            out = self.run(name, input_ids=[self.tokens(name, text, clip_tokens)])
            width = out["hidden"].shape[2]
            embeds[:clip_tokens, column : column + width] = out["hidden"][0]
            column += width
            pooled.append(out["pooled"][0])
        if "t5" in self.components:
            ids = self.tokens("t5", text, t5_tokens)
            embeds[clip_tokens:] = self.run("t5", input_ids=[ids])["hidden"][0]
        return embeds, np.concatenate(pooled)

    def draw(
        self,
        prompt: str,
        seed: int,
        steps: int,
        sampler: str,
        guidance: float,
        size: tuple[int, int],
        image: np.ndarray | None = None,
        strength: float = 1.0,
    ) -> np.ndarray:
        """One picture, uint8 [height, width, 3]."""
        m = self.manifest
        texts = ["", prompt] if m["guided"] else [prompt]
        features = [self.features(text, m["defaults"]["t5_tokens"]) for text in texts]
        timesteps = m["scheduler"]["num_train_timesteps"]
        sigmas = host_arithmetic.sigmas(steps, m["scheduler"]["shift"], timesteps)
        scale = m["latent_scale"]
        shape = (1, m["latent_channels"], size[1] // scale, size[0] // scale)
        latents = np.array(host_arithmetic.noise(int(np.prod(shape)), seed), np.float32)
        latents = latents.reshape(shape)
        if image is not None:
            sigmas = sigmas[int(max(steps - min(steps * strength, steps), 0)) :]
            encoded = self.run("vae_encoder", image=image[None])["latents"]
            pairs = zip(latents.ravel().tolist(), encoded.ravel().tolist(), strict=True)
            mixed = [host_arithmetic.mix(a, b, sigmas[0]) for a, b in pairs]
            latents = np.array(mixed, np.float32).reshape(shape)
        table = {"euler": host_arithmetic.euler, "dpmpp-2m": host_arithmetic.dpmpp_2m}[sampler]
        conditioning = self.run(
            "conditioner",
            prompt_embeds=np.stack([embeds for embeds, _ in features]),
            pooled=np.stack([pooled for _, pooled in features]),
            timesteps=[host_arithmetic.f32(s * timesteps) for s in sigmas[:-1]],
        )
        denoised = np.zeros_like(latents)
        for i, row in enumerate(table(sigmas)):
            modulation = conditioning["modulation"][i]
            out = self.run(
                "denoiser",
                latents=latents,
                sigma=[sigmas[i]],
                coefficients=[row],
                previous_denoised=denoised,
                context=conditioning["context"][-1:],
                modulation=modulation[-1:],
                uncond_context=conditioning["context"][:1],
                uncond_modulation=modulation[:1],
                guidance=[guidance],
            )
            latents, denoised = out["next_latents"], out["denoised"]
        picture: np.ndarray = self.run("vae_decoder", latents=latents)["image"][0]
        return picture
