"""A tiny random pipeline of each supported kind. The same name and seed give the same weights; every weight matters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from stageprune.core.host import sample
from stageprune.core.hosts.diffusers import DiffusersHost

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,-'"
TOKENS = 16
"""Length of every text, in characters: the tokenizers know letters only."""

PROMPTS = ["red fox", "two blue cups", "old house"]
LABELS = [1, 2, 3]

DIT = {
    "num_attention_heads": 5,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "sample_size": 8,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
# diffusers takes the number of heads from a UNet's `attention_head_dim`; each head has 8 channels here.
SD15 = {
    "sample_size": 8,
    "block_out_channels": (32, 48),
    "attention_head_dim": (4, 6),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 24,
}
SDXL = {
    "sample_size": 16,
    "block_out_channels": (16, 32, 48),
    "attention_head_dim": (2, 4, 6),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 1, 2),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "use_linear_projection": True,
    "cross_attention_dim": 48,  # both text encoders side by side
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 24 + 6 * 8,  # pooled text, six numbers about the image's size
}
SD3 = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "caption_projection_dim": 32,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 48,
    "pos_embed_max_size": 8,
}
SD35 = {**SD3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
FLUX = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 8,
    "axes_dims_rope": (2, 2, 4),
    "joint_attention_dim": 24,
    "pooled_projection_dim": 24,
}
DENOISERS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "dit": (DiTTransformer2DModel, DIT),
    "sd15": (UNet2DConditionModel, SD15),
    "sdxl": (UNet2DConditionModel, SDXL),
    "sd3": (SD3Transformer2DModel, SD3),
    "sd35": (SD3Transformer2DModel, SD35),
    "flux": (FluxTransformer2DModel, FLUX),
}
NAMES = tuple(DENOISERS)


def make_denoiser(name: str, seed: int = 0, **config: Any) -> nn.Module:
    """A random denoiser.

    Args:
        name: one of `NAMES`.
        seed: of the weights.
        config: changes to its configuration.
    """
    build, defaults = DENOISERS[name]
    return fill(build(**{**defaults, **config}), seed)


def make_pipeline(name: str, seed: int = 0, **config: Any) -> Any:
    """A pipeline around `make_denoiser`, with tiny text encoders, a tiny VAE and the scheduler that its model is used
    with; images have 16 or 32 pixels.
    """
    build = {"dit": _dit, "sd15": _sd15, "sdxl": _sdxl, "sd3": _sd3, "sd35": _sd3, "flux": _flux}[name]
    pipe = build(make_denoiser(name, seed, **config), seed)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts_for(pipe: Any) -> list[int] | list[str]:
    """Three prompts that the pipeline takes."""
    return LABELS if isinstance(pipe, DiTPipeline) else PROMPTS


def generate(
    pipe: Any, guidance: float, output: str = "latent", steps: int = 4, size: int | tuple[int, int] | None = None
) -> Tensor:
    """What `pipe(...)` itself gives for `prompts_for` and fixed seeds. Class-conditional pipelines only give images."""
    prompts = prompts_for(pipe)
    inputs = DiffusersHost(pipe, size).adapter.call_arguments(pipe, prompts, guidance)
    seeds = [torch.Generator().manual_seed(seed) for seed in range(len(prompts))]
    return pipe(**inputs, num_inference_steps=steps, generator=seeds, output_type=output).images


def drive(pipe: Any, guidance: float, steps: int = 4, size: int | tuple[int, int] | None = None) -> Tensor:
    """Final latents of the same through the host."""
    host, prompts = DiffusersHost(pipe, size), prompts_for(pipe)
    return sample(host, host.encode(prompts), range(len(prompts)), steps, guidance)


def fill(model: nn.Module, seed: int) -> nn.Module:
    """Random weights everywhere: diffusers starts gates and outputs at zero, which would hide mistakes behind them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.1 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
            if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
                parameter.add_(1)
    return model.eval()


def _dit(denoiser: nn.Module, seed: int) -> DiTPipeline:
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False, prediction_type="v_prediction")
    return DiTPipeline(denoiser, _vae(seed), scheduler)


def _sd15(denoiser: nn.Module, seed: int) -> StableDiffusionPipeline:
    scheduler = DDIMScheduler(**_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae=_vae(seed, scaling_factor=0.18215),
        text_encoder=_clip(seed),
        tokenizer=_clip_tokenizer(),
        unet=denoiser,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _sdxl(denoiser: nn.Module, seed: int) -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        vae=_vae(seed, scaling_factor=0.13025),
        text_encoder=_clip(seed),
        text_encoder_2=_clip(seed + 1, projection=True),
        tokenizer=_clip_tokenizer(),
        tokenizer_2=_clip_tokenizer(),
        unet=denoiser,
        scheduler=EulerDiscreteScheduler(**_BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )


def _sd3(denoiser: nn.Module, seed: int) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=denoiser,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(seed, scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=_clip(seed, projection=True),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_clip(seed + 1, projection=True),
        tokenizer_2=_clip_tokenizer(),
        text_encoder_3=_t5(seed, 48),
        tokenizer_3=_t5_tokenizer(),
    )


def _flux(denoiser: nn.Module, seed: int) -> FluxPipeline:
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, max_shift=1.15),
        vae=_vae(seed, scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=_clip(seed),
        tokenizer=_clip_tokenizer(),
        text_encoder_2=_t5(seed, 24),
        tokenizer_2=_t5_tokenizer(),
        transformer=denoiser,
    )
    pipe.default_sample_size = 8  # 128 by itself: FLUX keeps its size in the pipeline's code
    return pipe


_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _vae(seed: int, **config: Any) -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(8, 8),
            latent_channels=4,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            **config,
        )
    return vae.eval()


def _clip(seed: int, projection: bool = False) -> nn.Module:
    config = CLIPTextConfig(
        vocab_size=2 + 2 * len(LETTERS),
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=TOKENS,
        projection_dim=24,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return fill((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), seed)


def _clip_tokenizer() -> CLIPTokenizer:
    pieces = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(letter + "</w>" for letter in LETTERS)]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def _t5(seed: int, width: int) -> nn.Module:
    config = T5Config(vocab_size=4 + len(LETTERS), d_model=width, d_kv=8, d_ff=32, num_layers=2, num_heads=3)
    return fill(T5EncoderModel(config), seed)


def _t5_tokenizer() -> T5Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", *LETTERS]
    return T5Tokenizer(vocab=[(piece, 0.0) for piece in pieces], extra_ids=0, model_max_length=TOKENS)
