"""Tokenizers and text encoders for captions of shapes, trained to read: no picture is involved.

Two CLIP encoders as SDXL has them, and a T5 encoder, which FLUX takes beside the first CLIP. Each learns to say from
its states what the caption asks for; what a diffusion model needs is then linear in them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from shapes.scenes import Layout, draw_layouts
from stageprune.core.evaluation.scene import COLOURS, RELATIONS, SHAPES, SIZES
from training import Descent, log

LENGTH = 16  # tokens; the longest caption has 12
WIDTH = 64
BATCH = 128

WORDS = tuple(dict.fromkeys(word for text in ("a", *SIZES, *COLOURS, *SHAPES, *RELATIONS) for word in text.split()))
FACTS = (len(SHAPES), len(COLOURS), len(SIZES) + 1)  # of an object; an unnamed size is a class of its own
PLACED_FACTS = (*FACTS, len(RELATIONS))  # and on which side of the other object it stands
SCENE_FACTS = (*FACTS, *(size + 1 for size in FACTS), len(RELATIONS) + 1)  # an absent second object too
SIDE_FACTS = tuple(size + 1 for size in FACTS) * len(RELATIONS)  # of whatever stands on each side, perhaps nothing


def clip_tokenizer() -> CLIPTokenizer:
    """Byte-pair encoding in which every word of the captions is one token and other words fall into letters."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        pieces = _pieces(word, [*merges])
        while len(pieces) > 1:
            merges[pieces[0], pieces[1]] = None
            pieces = _pieces(word, [*merges])
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocab = {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=[*merges], model_max_length=LENGTH)


def _pieces(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """What byte-pair encoding leaves of a word, by merges of which the first count most.

    Not learned by `tokenizers`: its trainer numbers the last letters of words in an order that is new in every run.
    """
    pieces = [*word[:-1], f"{word[-1]}</w>"]
    while found := [merge for merge in merges if merge in pairwise(pieces)]:
        at = [*pairwise(pieces)].index(found[0])
        pieces[at : at + 2] = ["".join(found[0])]
    return pieces


def t5_tokenizer() -> T5TokenizerFast:
    """One piece a word; anything else is unknown."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -2.0) for word in WORDS)]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=LENGTH)


def clip_encoder(tokenizer: CLIPTokenizer, projected: bool) -> CLIPTextModel | CLIPTextModelWithProjection:
    """Three layers; SDXL reads the states before the last one."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=WIDTH,
        hidden_act="gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def t5_encoder(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    """Three layers, both directions."""
    return T5EncoderModel(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=WIDTH,
            d_kv=16,
            num_heads=4,
            d_ff=4 * WIDTH,
            num_layers=3,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            use_cache=False,
        )
    )


def tokens_of(tokenizer: CLIPTokenizer | T5TokenizerFast, captions: list[str]) -> Tensor:
    """Token ids, padded to the length that the pipelines use, (B, 16)."""
    ids: Tensor = tokenizer(
        captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def scene_facts(layout: Layout) -> Tensor:
    """What a caption says, as one class index a fact, (B, 7): both objects' shape, colour, size; the relation."""
    size = torch.where(layout.named, layout.size, len(SIZES))
    first, second = (torch.stack([layout.shape[:, j], layout.colour[:, j], size[:, j]], 1) for j in range(2))
    absent = layout.count == 1
    second = torch.where(absent[:, None], torch.tensor(FACTS), second)
    relation = torch.where(absent, len(RELATIONS), layout.relation)
    return torch.cat([first, second, relation[:, None]], 1)


def placed_facts(layout: Layout) -> Tensor:
    """What a caption says of each of two objects, (B, 2, 4): shape, colour, size, and its side of the other one.

    "A above B" puts A above and B below: bound to the object, the relation leaves a denoiser nothing to work out.
    """
    things = scene_facts(layout)[:, :6].view(-1, 2, 3)
    opposite = layout.relation ^ 1  # RELATIONS has above beside below, left beside right
    return torch.cat([things, torch.stack([layout.relation, opposite], 1)[..., None]], 2)


def side_facts(layout: Layout) -> Tensor:
    """What a caption says of the upper, lower, left and right object, (B, 12): the last class where it names none."""
    placed = placed_facts(layout)
    result = torch.tensor(FACTS).repeat(len(placed), len(RELATIONS), 1)
    rows = torch.nonzero(layout.count == 2)
    for which in range(2):
        result[rows[:, 0], placed[rows[:, 0], which, 3]] = placed[rows[:, 0], which, :3]
    return result.flatten(1)


class Reader(nn.Module):
    """Linear heads over the states: the word everywhere; the object at its noun; each of two objects with its side
    where that is known, the first one's at the relation's last word (CLIP reads from left to right), the second one's
    at its noun; the scene where all was read. The pooled output says it twice: what comes first and second, and what
    stands on each side.
    """

    def __init__(self, vocabulary: int, pooled: int) -> None:
        super().__init__()
        self.word = nn.Linear(WIDTH, vocabulary)
        self.thing = nn.Linear(WIDTH, sum(FACTS))
        self.placed = nn.Linear(WIDTH, sum(PLACED_FACTS))
        self.scene = nn.Linear(WIDTH, sum(SCENE_FACTS))
        self.pooled = nn.Linear(pooled, sum(SCENE_FACTS) + sum(SIDE_FACTS))

    def loss(
        self, ids: Tensor, states: Tensor, pooled: Tensor | None, layout: Layout, places: Places, end: int
    ) -> Tensor:
        """Cross-entropy of all heads."""
        facts = scene_facts(layout)
        loss = F.cross_entropy(self.word(states).flatten(0, 1), ids.flatten())
        row, place = torch.isin(ids, places.nouns).nonzero(as_tuple=True)
        which = torch.cat([torch.zeros(1, dtype=torch.long), (row[1:] == row[:-1]).long()])
        loss = loss + _facts_loss(
            self.thing(states[row, place]),
            facts.view(-1)[row[:, None] * 7 + which[:, None] * 3 + torch.arange(3)],
            FACTS,
        )
        loss = loss + self._placed_loss(ids, states, layout, places)
        last = (ids == end).float().argmax(1)
        loss = loss + _facts_loss(self.scene(states[torch.arange(len(ids)), last]), facts, SCENE_FACTS)
        if pooled is None:
            return loss
        both = torch.cat([facts, side_facts(layout)], 1)
        return loss + 2 * _facts_loss(self.pooled(pooled), both, (*SCENE_FACTS, *SIDE_FACTS))

    def _placed_loss(self, ids: Tensor, states: Tensor, layout: Layout, places: Places) -> Tensor:
        row = torch.nonzero(layout.count == 2).flatten()
        number = torch.arange(ids.shape[1])
        losses = [
            _facts_loss(
                self.placed(states[row, (torch.isin(ids, words) * number).argmax(1)[row]]), facts[row], PLACED_FACTS
            )
            for words, facts in zip((places.relations, places.nouns), placed_facts(layout).unbind(1), strict=True)
        ]
        return losses[0] + losses[1]


def _facts_loss(logits: Tensor, facts: Tensor, sizes: tuple[int, ...]) -> Tensor:
    parts = logits.split(list(sizes), dim=1)
    return torch.stack([F.cross_entropy(part, facts[:, i]) for i, part in enumerate(parts)]).mean()


@dataclass(frozen=True)
class Places:
    """Token ids at which facts are read: the nouns, and the last word of each relation."""

    nouns: Tensor
    relations: Tensor

    @classmethod
    def of(cls, tokenizer: CLIPTokenizer | T5TokenizerFast) -> Places:
        """Those of a tokenizer in which every word is one token."""
        first = 1 if tokenizer.bos_token_id is not None else 0
        last_words = [name.split()[-1] for name in RELATIONS]
        return cls(*(tokens_of(tokenizer, list(words))[:, first] for words in (SHAPES, last_words)))


def clip_states(encoder: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """States before the last layer and the pooled output, as SDXL (and FLUX, for the latter) takes them."""

    def run(ids: Tensor) -> tuple[Tensor, Tensor]:
        result = encoder(ids, output_hidden_states=True)
        pooled = result.text_embeds if hasattr(result, "text_embeds") else result.pooler_output
        return result.hidden_states[-2], pooled

    return run


def t5_states(encoder: nn.Module) -> Callable[[Tensor], tuple[Tensor, None]]:
    """The last states; T5 has no pooled output. No mask: FLUX gives none."""
    return lambda ids: (encoder(ids)[0], None)


def train_reader(
    tokenizer: CLIPTokenizer | T5TokenizerFast,
    encoder: nn.Module,
    run: Callable[[Tensor], tuple[Tensor, Tensor | None]],
    steps: int,
    seed: int,
) -> float:
    """Train `encoder` in place; returns the last loss."""
    generator = torch.Generator().manual_seed(seed)
    reader = Reader(len(tokenizer), WIDTH)
    descend = Descent([*encoder.parameters(), *reader.parameters()], steps, 2e-3)
    places = Places.of(tokenizer)
    for step in range(steps):
        if step % 50 == 0:
            pool = draw_layouts(BATCH * 50, generator)
            captions = tokens_of(tokenizer, [str(scene) for scene in pool.scenes()])
        part = torch.arange(BATCH) + BATCH * (step % 50)
        ids = captions[part]
        states, pooled = run(ids)
        descend(loss := reader.loss(ids, states, pooled, pool[part], places, tokenizer.eos_token_id))
        if step % 250 == 0:
            log.info("text step %d/%d loss %.4f", step, steps, loss.item())
    encoder.eval().requires_grad_(False)
    return float(loss)
