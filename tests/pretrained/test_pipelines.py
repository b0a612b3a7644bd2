"""Folders for the Hub and for diffusers: written, read back, drawn from."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import discrete_lit
from discrete_lit.checkpoints import instantiate
from discrete_lit.pretrained.pipelines import draw_images, write_pipeline
from discrete_lit.samplers import MaskGITSampler
from discrete_lit.samplers.adjustment import adjustable, with_settings

NETWORK = {
    "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
    "init_args": {"channels": 4, "multipliers": [1, 1], "blocks": 1, "attention": False, "norm_groups": 2},
}
GENERATOR = {
    "class_path": "discrete_lit.generators.Masked",
    "init_args": {
        "tokenizer": {"class_path": "discrete_lit.tokenizers.FSQ", "init_args": {"levels": [4, 3], "network": NETWORK}},
        "image_size": 8,
        "num_classes": 3,
        "backbone": {
            "class_path": "discrete_lit.backbones.Transformer",
            "init_args": {"width": 16, "depth": 1, "heads": 2},
        },
        "sampler": {"class_path": "discrete_lit.samplers.MaskGITSampler", "init_args": {"steps": 3}},
    },
}


@pytest.fixture(scope="module")
def generator() -> Any:
    """A Masked of three classes with its FSQ, far from uniform."""
    made = instantiate(GENERATOR)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.eval()


def test_a_folder_holds_the_generator_its_tokenizer_and_its_sampler(generator: Any, tmp_path: Path) -> None:
    discrete_lit.save_pretrained(generator, tmp_path / "folder", licence="apache-2.0")
    assert sorted(file.name for file in (tmp_path / "folder").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
    ]
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "license: apache-2.0" in card and "discrete_lit.generators.Masked" in card
    again = discrete_lit.load(tmp_path / "folder")
    assert torch.equal(again.sample(torch.tensor([0, 1])), generator.sample(torch.tensor([0, 1])))
    assert again.sampler.steps == 3 and not again.training


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"\0" * 9), "truncated or no safetensors file"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "gpt2"}'), "is a folder of 'transformers'"),
        (
            lambda folder: (folder / "config.json").write_text(
                '{"library_name": "discrete-lit", "class_path": "os.system", "init_args": {}}'
            ),
            "os.system",
        ),
    ],
)
def test_a_broken_folder(break_it: Callable[[Path], Any], message: str, generator: Any, tmp_path: Path) -> None:
    discrete_lit.save_pretrained(generator, tmp_path / "folder")
    break_it(tmp_path / "folder")
    with pytest.raises(ValueError, match=message):
        discrete_lit.load(tmp_path / "folder")


def test_a_pipeline_of_diffusers_draws_what_we_draw(generator: Any, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    write_pipeline(generator, tmp_path / "pipeline")
    ours = discrete_lit.load(tmp_path / "pipeline")
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipeline", trust_remote_code=True)
    drawn = pipeline(class_labels=[2, 0], seed=5, steps=2).images
    expected = draw_images(ours, [2, 0], seed=5, steps=2)
    assert np.array_equal(np.stack([np.asarray(image) for image in drawn]), expected)
    assert not np.array_equal(expected, draw_images(ours, [2, 0], seed=6, steps=2))


def test_a_pipeline_needs_a_generator_of_images(generator: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a FSQ draws nothing"):
        write_pipeline(generator.tokenizer, tmp_path / "pipeline")
    assert not (tmp_path / "pipeline").exists()


def test_a_folder_of_another_pipeline(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline", "_diffusers_version": "0.3"}))
    with pytest.raises(ValueError, match="is a folder of 'diffusers'"):
        discrete_lit.load(tmp_path)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": [4]}, r"label 4 is out of range, accepted: int in \[0, 3\]"),
        ({"labels": [0], "prompt": "a dog"}, "reads no texts"),
        ({"labels": [0], "steps": 0}, "steps=0, accepted: a number of at least 1"),
        ({"labels": [0], "top_speed": 3}, "a MaskGITSampler has no top_speed to set; it has guidance_scale"),
    ],
)
def test_what_cannot_be_drawn(given: Any, message: str, generator: Any) -> None:
    with pytest.raises(ValueError, match=message):
        draw_images(generator, **given)


def test_settings_change_a_copy() -> None:
    sampler = MaskGITSampler(steps=8, guidance_scale=2.0)
    changed = with_settings(sampler, steps=4, guidance_scale=None)
    assert (changed.steps, changed.guidance_scale, sampler.steps) == (4, 2.0, 8)
    assert adjustable(sampler) == {"guidance_scale": 2.0, "temperature": 1.0, "steps": 8}
