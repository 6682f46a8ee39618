"""What pipelines with text prompts have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ....errors import StagePruneError
from ....host import Conditions, Prompt
from .adapter import PipelineAdapter
from .prompts import PROMPTS


class TextAdapter(PipelineAdapter):
    """A pipeline that takes texts. The negative prompt of guidance is the empty one."""

    def default_prompts(self, pipe: Any) -> list[Prompt]:
        """A small list of everyday subjects; for a trustworthy calibration give texts like those of your use."""
        return list(PROMPTS)

    def call_arguments(self, pipe: Any, prompts: Sequence[Prompt], guidance: float) -> dict[str, Any]:
        """Texts as a list."""
        return {"prompt": texts(pipe, prompts), "guidance_scale": guidance, **self.size_arguments()}

    def size_arguments(self) -> dict[str, int]:
        """The size, if one was asked for."""
        return {} if self.size is None else {"height": self.size[0], "width": self.size[1]}


def texts(pipe: Any, prompts: Sequence[Prompt]) -> list[str]:
    """The prompts, if they are texts; a StagePruneError names the first that is none."""
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise StagePruneError(
                f"prompt {prompt!r} is of type {type(prompt).__name__}, but {type(pipe).__name__} takes texts: give "
                "strings such as 'a red fox in the snow'. (Class labels are for class-conditional pipelines.)"
            )
    return [str(prompt) for prompt in prompts]


def paired(conditions: Conditions, name: str, guided: bool) -> Tensor:
    """A tensor for the denoiser's batch: with guidance the unconditional half comes first."""
    tensor = conditions.tensors[name]
    return torch.cat([conditions.tensors["negative_" + name], tensor]) if guided else tensor


def guide(output: Tensor, guidance: float) -> Tensor:
    """Guidance on the output of a batch made by `paired`."""
    unconditional, conditional = output.chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def length_for(tokenizer: Any, longest: int) -> int:
    """Tokens to encode: the pipeline's own limit, or the tokenizer's if that is lower."""
    return longest if tokenizer is None else min(longest, int(tokenizer.model_max_length))


def decoded(pipe: Any, latents: Tensor) -> Tensor:
    """Images in [0, 1] from latents that are scaled as the VAE wants them."""
    images = pipe.vae.decode(latents, return_dict=False)[0]
    shown: Tensor = pipe.image_processor.postprocess(images, output_type="pt")
    return shown
