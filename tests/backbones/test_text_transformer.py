"""The transformer over a text: what it sees, its generator, its checkpoint, bad input."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_weights import randomise

import discrete_lit
from discrete_lit.backbones import DiT, TextTransformer, Transformer
from discrete_lit.checkpoints import instantiate, save
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion.consistency import ConsistencyLoss
from discrete_lit.diffusion.gaussian import GaussianDenoiser, RectifiedPath
from discrete_lit.generators import LatentDiffusion, Masked
from discrete_lit.samplers import MaskGITSampler
from discrete_lit.tokenizers import RawPixels, StaticTextEncoder, TextIds, TextTokenizer, TokenGrid

WORDS = TextTokenizer.characters("ab ")
NO_RANDOM: Any = None
KINDS = pytest.mark.parametrize("vocab_size", [None, 7])


def made(vocab_size: int | None, **settings: Any) -> TextTransformer:
    torch.manual_seed(0)
    return randomise(TextTransformer(5, vocab_size, **{"width": 8, "depth": 2, "heads": 2, **settings}), 0.3).eval()


def text(vocab_size: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[True] * 4, [True, True, False, False], [False] * 4])
    if vocab_size is None:
        return torch.randn(3, 4, 5, generator=generator), mask
    return torch.randint(vocab_size, (3, 4, 1), generator=generator).float(), mask


@KINDS
def test_valid_words_see_each_other_and_no_padding(vocab_size: int | None) -> None:
    network, (vectors, mask) = made(vocab_size), text(vocab_size)
    output = network(vectors, mask)
    assert output.shape == (3, 4, 8) and bool(output.isfinite().all())
    other = torch.where(mask[..., None], vectors, vectors.flip(0) * 0)
    torch.testing.assert_close(network(other, mask)[mask], output[mask])
    last = vectors.clone()
    last[0, 3] = (vectors[0, 3] + 1) % 7
    assert not torch.allclose(network(last, mask)[0, 0], output[0, 0], atol=1e-4)  # the first word sees the last
    torch.testing.assert_close(network(vectors, None)[0], output[0])
    # Ids have an order, which the vectors of an encoder bring with them.
    turned = network(vectors.flip(1), None).flip(1)
    assert torch.allclose(turned, network(vectors, None), atol=1e-5) == (vocab_size is None)


@KINDS
def test_all_of_it_is_trained(vocab_size: int | None) -> None:
    gradients = []
    for again in (False, True):
        network = made(vocab_size, activation_checkpointing=again).train()
        network(*text(vocab_size)).square().sum().backward()
        assert all(value.grad is not None and bool(value.grad.any()) for value in network.parameters())
        gradients.append([value.grad for value in network.parameters()])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def masked(encoder: Any, **settings: Any) -> Masked:
    torch.manual_seed(1)
    given: dict[str, Any] = {
        "text_transformer": partial(TextTransformer, width=16, depth=1, heads=2),
        "label_dropout": 0.1,
        **settings,
    }
    return Masked(
        TokenGrid(4, (2,)),
        image_size=8,
        num_classes=1,
        backbone=lambda layout: Transformer(layout, width=16, depth=1, heads=2, context_dim=16),
        text_encoder=encoder,
        sampler=MaskGITSampler(2),
        **given,
    )


def test_a_generator_learns_the_order_of_words() -> None:
    """The picture of "ab" is 1 1, of "ba" 2 2, which the ids alone, in no order, do not tell apart."""
    generator = masked(TextIds(WORDS, length=6)).train()
    assert generator.text_transformer is not None
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.01)
    tokens, texts = torch.tensor([[1, 1], [2, 2]]).repeat(16, 1), ["ab", "ba"] * 16
    for step in range(150):
        random = CounterRandom(step, torch.arange(32))
        condition = generator.condition_of({"tokens": tokens, "caption": texts}, random)
        loss, _ = generator.loss(tokens, condition, random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    generator.eval()
    found = generator.sample(generator.condition_of_texts(["ba", "ab"] * 50), seed=1)
    assert (found == torch.tensor([[2, 2], [1, 1]]).repeat(50, 1)).all(dim=1).float().mean() > 0.9


def test_vectors_that_were_kept_go_through_it_too() -> None:
    encoder = StaticTextEncoder(WORDS, 5, length=6)
    generator = masked(encoder).eval()
    vectors, mask = encoder(["a b", ""])
    batch = {"tokens": torch.zeros(2, 2, dtype=torch.int64)}
    random = CounterRandom(0, torch.arange(2))
    told = generator.condition_of({**batch, "caption": ["a b", ""]}, random)
    kept = generator.condition_of({**batch, "context": vectors, "context_mask": mask}, random)
    assert told.context.shape == (2, 6, 16)
    torch.testing.assert_close(told.context, kept.context)
    torch.testing.assert_close(told.context[:1], generator.condition_of_texts(["a b"]).context)


def test_a_checkpoint_has_it(tmp_path: Path) -> None:
    network = {"width": 16, "depth": 1, "heads": 2}
    grid = {"class_path": "discrete_lit.tokenizers.TokenGrid", "init_args": {"vocab_size": 4, "token_shape": [2]}}
    settings = {
        "tokenizer": grid,
        "image_size": 8,
        "num_classes": 1,
        "backbone": {"class_path": "discrete_lit.backbones.Transformer", "init_args": {**network, "context_dim": 16}},
        "text_encoder": dict(TextIds(WORDS, length=6).hparams),
        "text_transformer": {"class_path": "discrete_lit.backbones.TextTransformer", "init_args": network},
        "sampler": {"class_path": "discrete_lit.samplers.MaskGITSampler", "init_args": {"steps": 2}},
    }
    generator: Any = instantiate({"class_path": "discrete_lit.generators.Masked", "init_args": settings})
    randomise(generator.text_transformer, 0.3)
    save(generator, tmp_path / "made.ckpt")
    again = discrete_lit.load(tmp_path / "made.ckpt")
    one, two = (each.eval().condition_of_texts(["ab"]).context for each in (generator, again))
    assert torch.equal(one, two)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda: made(None, width=9), "width a multiple of heads"),
        (lambda: made(5, width=3, heads=1), "even where ids are read"),
        (lambda: masked(None), "text_transformer reads what a text_encoder makes"),
        (lambda: masked(TextIds(WORDS, length=6), text_transformer=None), "TextIds makes ids, which a backbone cannot"),
        (
            lambda: masked(
                TextIds(WORDS, length=6), text_transformer=partial(TextTransformer, width=8, depth=1, heads=2)
            ).condition_of_texts(["a"]),
            "context_dim is 16, and the TextTransformer of text_transformer makes vectors of 8",
        ),
        (
            lambda: masked(StaticTextEncoder(WORDS, 5, length=6)).condition_of(
                {"tokens": torch.zeros(1, 2, dtype=torch.int64), "context": torch.zeros(1, 6, 16)}, NO_RANDOM
            ),
            r"attends to vectors \(B, M, 5\)",
        ),
    ],
)
def test_bad_input(mistake: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake()


def test_it_is_not_distilled() -> None:
    student = LatentDiffusion(
        RawPixels(1),
        4,
        num_classes=1,
        backbone=partial(DiT, width=16, depth=1, heads=2, context_dim=16),
        text_encoder=TextIds(WORDS, length=6),
        text_transformer=partial(TextTransformer, width=16, depth=1, heads=2),
        denoiser=GaussianDenoiser(RectifiedPath(), prediction="velocity"),
        consistency=ConsistencyLoss,
        teacher="teacher.ckpt",
    )
    with pytest.raises(ValueError, match="a text_transformer is not distilled"):
        student.check_teacher(student)
