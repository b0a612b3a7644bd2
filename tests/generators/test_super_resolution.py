"""SuperResolution: what the small image decides, texts of both stages, one checkpoint of both, bad input."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_weights import randomise

import discrete_lit
from discrete_lit.backbones import Transformer
from discrete_lit.backbones.condition import Condition
from discrete_lit.checkpoints import instantiate, save
from discrete_lit.core.random import CounterRandom
from discrete_lit.generators import Masked, SuperResolution
from discrete_lit.generators.given_discrete import check_same_texts
from discrete_lit.samplers import MaskGITSampler
from discrete_lit.tokenizers import StaticTextEncoder, TextTokenizer, TokenGrid
from discrete_lit.tokenizers.pixels import PixelLevels

torch.manual_seed(0)
WORDS = StaticTextEncoder(TextTokenizer.characters("ab "), 4, length=6)


NO_RANDOM: Any = None


def network(**settings: Any) -> Any:
    return partial(Transformer, width=16, depth=1, heads=2, **settings)


def base(encoder: Any = None, tokenizer: Any = None, **settings: Any) -> Masked:
    torch.manual_seed(0)
    made = Masked(
        tokenizer or PixelLevels(5, image_channels=1),
        2,
        backbone=network(context_dim=None if encoder is None else 4),
        text_encoder=encoder,
        sampler=MaskGITSampler(2),
        **{"num_classes": 1, **settings},
    )
    randomise(made.backbone, 0.5)
    return made.eval()


def large(encoder: Any = None, discrete: Any = None, *, grid_vocab: int | None = 5, **settings: Any) -> SuperResolution:
    discrete = discrete or base(encoder)
    torch.manual_seed(1)
    made = SuperResolution(
        PixelLevels(3, image_channels=1),
        4,
        discrete=discrete,
        backbone=network(grid_vocab=grid_vocab, context_dim=None if encoder is None else 4),
        text_encoder=encoder,
        sampler=MaskGITSampler(3),
        **{"num_classes": 1, **settings},
    )
    randomise(made.backbone, 0.5)
    return made.eval()


def test_an_id_of_the_small_image_stands_for_its_square() -> None:
    made = large()
    assert made.aligned(torch.tensor([[[0, 1], [2, 3]]])).view(4, 4).tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [2, 2, 3, 3],
        [2, 2, 3, 3],
    ]


def test_it_trains_on_the_small_image_of_its_own() -> None:
    """Each square of a small image has the mean of its four pixels, which bicubic shrinking keeps of flat squares."""
    made = large().train()
    squares = torch.tensor([[-1.0, -0.5], [0.0, 1.0]]).repeat(3, 1, 1, 1)
    images = squares.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    random = CounterRandom(0, torch.arange(3))
    condition = made.condition_of({"image": images, "index": torch.arange(3)}, random)
    small = made.discrete.tokenizer.encode(made._small(images))
    assert condition.grid is not None and torch.equal(condition.grid, made.aligned(small))
    made.log_dict = lambda *_, **__: None  # there is no trainer
    loss = made.training_step({"image": images, "index": torch.arange(3)}, 0)
    loss.backward()
    assert all(value.grad is None for value in made.discrete.parameters())
    assert bool(made.backbone.grid_embedding.weight.grad.any())  # type: ignore[union-attr]


def test_the_small_image_is_drawn_first_and_decides_the_large_one() -> None:
    made, labels = large(), torch.zeros(64, dtype=torch.int64)
    random = CounterRandom(3, torch.arange(64))
    output = made.draw(labels, random)
    first = made.discrete.draw(labels, CounterRandom(~3, torch.arange(64)))
    told = made.draw(Condition(labels=labels, grid=made.aligned(first.tokens)), random)
    assert torch.equal(output.tokens, told.tokens)
    assert output.sequential_passes == 5 and output.flops == told.flops + first.flops
    other = made.draw(Condition(labels=labels, grid=made.aligned((first.tokens + 1) % 5)), random)
    assert not torch.equal(other.tokens, told.tokens)


def test_both_stages_are_told_the_text() -> None:
    made = large(WORDS)
    random = CounterRandom(0, torch.arange(64))
    one, two, nothing = (made.condition_of_texts([text] * 64) for text in ("a", "b", ""))
    assert nothing.labels.tolist() == [0] * 64  # there are still the tokens of the small image
    drawn = [made.draw(each, random).tokens for each in (one, two, nothing)]
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    small = [made.discrete.draw(each, random).tokens for each in (one, two)]
    assert not torch.equal(*small)
    # Of no text the small image is drawn by what its generator has learned for that: its null condition.
    null = made.discrete.condition_of_texts([""] * 64)
    first = made.discrete.draw(null, CounterRandom(~0, torch.arange(64))).tokens
    grid = Condition(**{**nothing.parts(), "grid": made.aligned(first)})  # type: ignore[arg-type]
    assert torch.equal(made.draw(grid, random).tokens, drawn[2])


def test_a_checkpoint_has_both_stages_and_their_texts(tmp_path: Path) -> None:
    small = {"width": 16, "depth": 1, "heads": 2, "context_dim": 4}
    levels = {"class_path": "discrete_lit.tokenizers.PixelLevels"}
    sampler = {"class_path": "discrete_lit.samplers.MaskGITSampler", "init_args": {"steps": 2}}
    common = {"num_classes": 1, "text_encoder": dict(WORDS.hparams), "sampler": sampler}
    first: dict[str, Any] = {
        "class_path": "discrete_lit.generators.Masked",
        "init_args": {
            **common,
            "tokenizer": {**levels, "init_args": {"levels": 5, "image_channels": 1}},
            "image_size": 2,
            "backbone": {"class_path": "discrete_lit.backbones.Transformer", "init_args": small},
        },
    }
    save(instantiate(first), tmp_path / "first.ckpt")
    loader = "discrete_lit.generators.generator_from_checkpoint"
    second: dict[str, Any] = {
        "class_path": "discrete_lit.generators.SuperResolution",
        "init_args": {
            **common,
            "tokenizer": {**levels, "init_args": {"levels": 3, "image_channels": 1}},
            "image_size": 4,
            "discrete": {"class_path": loader, "init_args": {"checkpoint": str(tmp_path / "first.ckpt")}},
            "backbone": {
                "class_path": "discrete_lit.backbones.Transformer",
                "init_args": {**small, "grid_vocab": 5},
            },
        },
    }
    made: Any = instantiate(second)
    randomise(made.backbone, 0.5)
    with pytest.raises(ValueError, match="reads texts by another text_encoder"):
        check_same_texts(made, made.discrete, weights=True)
    made.text_encoder.load_state_dict(made.discrete.text_encoder.state_dict())
    check_same_texts(made, made.discrete, weights=True)
    save(made, tmp_path / "second.ckpt")
    (tmp_path / "first.ckpt").unlink()
    again: Any = discrete_lit.load(tmp_path / "second.ckpt")
    one, two = (each.eval().sample(each.condition_of_texts(["ab"] * 3)) for each in (made, again))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: large(grid_vocab=4), "grid_vocab is 4, and the small images have 5 ids"),
        (lambda: large(grid_vocab=None), "grid_vocab is not set"),
        (lambda: large(discrete=base(num_classes=3)), "knows 3 classes, num_classes is 1"),
        (lambda: large(discrete=base(tokenizer=TokenGrid(5, (3, 2)))), r"are a grid \(3, 2\)"),
        (lambda: large(None, base(WORDS)), "reads texts by another text_encoder"),
        (lambda: large().aligned(torch.zeros(1, 4, 4)), r"are ids \(2, 2\) each, got torch.float32 \(4, 4\)"),
        (
            lambda: large().condition_of({"tokens": torch.zeros(1, 4, 4).long()}, NO_RANDOM),
            'SuperResolution needs "image", or "tokens" and the "grid"',
        ),
    ],
)
def test_bad_input(mistake: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()
