"""Retrieval of prompts by CLIP: its text tower is transformers', its figures are counted by hand, and the command."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from helpers.random_weights import randomise
from safetensors.torch import save_file
from torch import Tensor, nn

from discrete_lit.cli.retrieval import retrieval
from discrete_lit.evaluation.prompt_retrieval import ClipTexts, prompt_retrieval

WORDS = ("a", "dark", "light", "coat", "bag")
TEXTS = ["a dark coat", "a light bag", "bag"]
TOWER = "test_vit.r160_in1k"


def write_tokenizer(folder: Path) -> int:
    names = ["<|startoftext|>", *WORDS, "<|endoftext|>"]
    vocabulary = {name: number for number, name in enumerate(names)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="a"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>",
        special_tokens=[(name, vocabulary[name]) for name in (names[0], names[-1])],
    )
    made.save(str(folder / "tokenizer.json"))
    return len(names)


@pytest.fixture
def clip(tmp_path: Path) -> tuple[Any, Path]:
    """A tiny CLIP of transformers with random weights, and the folder that it writes."""
    import transformers

    folder = tmp_path / "clip"
    folder.mkdir()
    size = write_tokenizer(folder)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    text = {**sizes, "vocab_size": size, "max_position_embeddings": 77, "bos_token_id": 0, "eos_token_id": size - 1}
    vision = {**sizes, "image_size": 8, "patch_size": 4}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=1000)
    model = randomise(transformers.CLIPModel(config), 0.3).eval()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    return model, folder


@pytest.mark.parity
@torch.no_grad()
def test_the_text_tower_is_transformers(clip: tuple[Any, Path]) -> None:
    model, folder = clip
    made = ClipTexts(str(folder))
    found = made(TEXTS)
    assert made.dim == 1000 and found.shape == (3, 1000)
    for row, text in zip(found, TEXTS, strict=True):
        ids = torch.tensor([[0, *(1 + WORDS.index(word) for word in text.split()), 6]])
        pooled = model.text_projection(model.text_model(input_ids=ids).pooler_output)[0]
        torch.testing.assert_close(row, pooled / pooled.norm(), rtol=1e-4, atol=1e-5)


class Towers(nn.Module):
    """Both towers: texts and images at angles that are given."""

    name, dim = "angles", 2

    def __init__(self, angles: Sequence[float]) -> None:
        super().__init__()
        radians = torch.tensor(angles).deg2rad()
        self.register_buffer("vectors", torch.stack((radians.cos(), radians.sin()), dim=1))

    def forward(self, given: Any) -> Tensor:
        count = len(given)
        return self.vectors[given[:, 0, 0, 0].long()] if isinstance(given, Tensor) else self.vectors[:count]


def test_the_figures_are_those_of_the_definition() -> None:
    """Six prompts at 0, 10, ... degrees; images at 1, 26 and 90 degrees, of the prompts 0, 1 and 0."""
    texts: Any = Towers([0, 10, 20, 30, 40, 50])
    images: Any = Towers([1, 26, 90])
    prompts = ["p", "q", "r", "s", "t", "u"]
    batches = [torch.arange(2).view(2, 1, 1, 1), torch.full((1, 1, 1, 1), 2)]
    found = prompt_retrieval(batches, [*prompts[:2], *prompts], image_tower=images, texts=texts)
    # Image 0 is nearest to its own; to image 1 three are nearer; to image 2 all of the five others.
    assert (found.count, found.prompts, found.top_1, found.top_5) == (3, 6, 1 / 3, 2 / 3)
    cosines = torch.tensor([1.0, 16.0, 90.0]).deg2rad().cos()
    assert found.clip_score == pytest.approx(2.5 * float(cosines.mean()), rel=1e-5)
    with pytest.raises(ValueError, match="at least two, got 1"):
        prompt_retrieval(batches, ["p", "p"], image_tower=images, texts=texts)
    with pytest.raises(ValueError, match="there is no image"):
        prompt_retrieval([], prompts, image_tower=images, texts=texts)
    texts.dim = 3
    with pytest.raises(ValueError, match="gives vectors of 2, the text tower of 3"):
        prompt_retrieval(batches, prompts, image_tower=images, texts=texts)


def test_the_command(clip: tuple[Any, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import timm

    _, folder = clip
    save_file(randomise(timm.create_model(TOWER), 0.1).state_dict(), tmp_path / "tower.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", arr_0=pixels)
    arguments = {"image_tower": TOWER, "image_weights": str(tmp_path / "tower.safetensors"), "accelerator": "cpu"}
    with pytest.raises(ValueError, match=r"has no run\.json beside it"):
        retrieval(str(tmp_path / "samples.npz"), str(folder), **arguments)
    (tmp_path / "run.json").write_text(json.dumps({"prompts": TEXTS}))
    found = retrieval(str(tmp_path / "samples.npz"), str(folder), batch_size=2, **arguments)
    assert json.loads((tmp_path / "retrieval.json").read_text()) == json.loads(json.dumps(found))
    assert found["count"] == 5 and found["prompts"] == 3 and 0 <= found["top_1"] <= found["top_5"] == 1
    assert "5 images of 3 prompts" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no such file"):
        retrieval(str(tmp_path / "none.npz"), str(folder), **arguments)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no such file; give the \.safetensors of a text encoder"):
        retrieval(str(tmp_path / "samples.npz"), str(folder), **arguments)
