"""The parts that both shapes pipelines share, as files: checker, autoencoder, tokenizers and text encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from shapes.text import tokens_of

KINDS: dict[str, Any] = {
    "vae": AutoencoderKL,
    "tokenizer": CLIPTokenizer,
    "t5_tokenizer": T5TokenizerFast,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
    "t5": T5EncoderModel,
}


def load_parts(folder: Path) -> dict[str, Any]:
    """Whatever `train_shapes.py parts` wrote, frozen, in float32."""
    parts = {name: kind.from_pretrained(folder / name) for name, kind in KINDS.items()}
    for part in parts.values():
        if isinstance(part, torch.nn.Module):
            part.eval().requires_grad_(False)
    parts["vae"].register_to_config(_name_or_path="")  # diffusers would write down where it was read from
    return parts


def token_ids(parts: dict[str, Any], captions: list[str]) -> dict[str, Tensor]:
    """Token ids for CLIP and for T5."""
    return {"clip": tokens_of(parts["tokenizer"], captions), "t5": tokens_of(parts["t5_tokenizer"], captions)}
