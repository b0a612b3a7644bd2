"""Which of the prompts an image shows, in the eyes of CLIP: retrieval, and the similarity to its own prompt.

CLIP (Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021) maps images and
texts to unit vectors whose product is high where they belong together. An image of a prompt is retrieved where no other
prompt of the run is nearer; the mean product with the own prompt, where it is positive, times 2.5 is CLIPScore (Hessel
et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", 2021).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.metrics.extractors import FeatureExtractor
from discrete_lit.tokenizers.text_encoder import TransformerTextEncoder, text_encoder_from_files

_PROJECTION = "text_projection.weight"
_LENGTH = 77
_CLIP_SCORE = 2.5


class ClipTexts(nn.Module):
    """Map texts to CLIP's unit vectors: the last hidden state of the end of a text, projected.

    Args:
        folder: of Hugging Face, with `model.safetensors`, `config.json` and `tokenizer.json` of a CLIP model.

    Raises:
        ValueError: a file is missing, or is of another model.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        at = Path(folder).expanduser()
        weights = str(at / "model.safetensors")
        encoder = text_encoder_from_files(
            weights, str(at / "tokenizer.json"), pad="<|endoftext|>", length=_LENGTH, too_long="cut"
        )
        if not isinstance(encoder, TransformerTextEncoder) or not encoder.causal:
            raise ValueError(f"clip={folder!r} holds a {type(encoder).__name__} that is no text tower of CLIP")
        self.encoder = encoder
        with safe_open(weights, "pt") as file:
            if _PROJECTION not in file.keys():
                raise ValueError(f"clip={folder!r}: model.safetensors has no {_PROJECTION}: it is no whole CLIP model")
            projection = file.get_tensor(_PROJECTION).float()
        self.register_buffer("projection", projection)

    @property
    def dim(self) -> int:
        """E, the width of the vectors."""
        return len(cast(Tensor, self.projection))

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> Tensor:
        """Map B texts to `(B, E)` float32."""
        projection = cast(Tensor, self.projection)
        ids, lengths = self.encoder.text_tokenizer.encode(texts, _LENGTH, too_long="cut")
        mask = torch.arange(_LENGTH) < lengths[:, None]
        with torch.autocast(projection.device.type, enabled=False):
            hidden = self.encoder.features(ids.to(projection.device), mask.to(projection.device))
            ends = hidden[torch.arange(len(ids), device=hidden.device), (lengths - 1).to(hidden.device)]
            return F.normalize(ends.float() @ projection.T, dim=-1)


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Say how well images show their prompts.

    Attributes:
        count: images.
        prompts: different prompts, of which each image has one.
        top_1: the share of images whose own prompt is the nearest, in [0, 1].
        top_5: the share whose own prompt is among the five nearest.
        clip_score: the mean of CLIPScore, 2.5 max(cosine, 0).
    """

    count: int
    prompts: int
    top_1: float
    top_5: float
    clip_score: float


@torch.no_grad()
def prompt_retrieval(
    images: Iterable[Tensor], prompts: Sequence[str], *, image_tower: FeatureExtractor, texts: ClipTexts
) -> Retrieval:
    """Measure how well images show their prompts.

    Args:
        images: batches of uint8 images `(B, C, H, W)`, one after another; image i is of prompt i modulo their number.
        prompts: at least two.
        image_tower: CLIP's, with its projection: a `TimmExtractor` of `output="head"`.
        texts: CLIP's text tower.

    Raises:
        ValueError: fewer than two different prompts, towers of two models, or no image.
    """
    different = list(dict.fromkeys(prompts))
    if len(different) < 2:
        raise ValueError(f"retrieval tells prompts apart: give at least two, got {len(different)}")
    if image_tower.dim != texts.dim:
        raise ValueError(
            f"the image tower {image_tower.name} gives vectors of {image_tower.dim}, the text tower of {texts.dim}: "
            "take both of one CLIP model, the image tower with its projection"
        )
    table = texts(different)
    own = torch.tensor([different.index(prompt) for prompt in prompts], device=table.device)
    count, first, fifth, score = 0, 0, 0, 0.0
    for batch in images:
        found = F.normalize(image_tower(batch.to(table.device)).float(), dim=-1) @ table.T  # (B, P)
        mine = own[(count + torch.arange(len(batch), device=table.device)) % len(prompts)]
        of_own = found.gather(1, mine[:, None])
        nearer = (found > of_own).sum(dim=1)
        first += int((nearer < 1).sum())
        fifth += int((nearer < 5).sum())
        score += float((_CLIP_SCORE * of_own.clamp(min=0)).double().sum())
        count += len(batch)
    if not count:
        raise ValueError("there is no image to measure")
    return Retrieval(
        count=count, prompts=len(different), top_1=first / count, top_5=fifth / count, clip_score=score / count
    )
