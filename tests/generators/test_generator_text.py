"""Generators that are told by a text what to draw: batches, training, guidance, checkpoints."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_weights import randomise

import discrete_lit
from discrete_lit.backbones import Transformer
from discrete_lit.backbones.condition import Condition
from discrete_lit.checkpoints import instantiate, read_checkpoint, save
from discrete_lit.core.random import CounterRandom
from discrete_lit.generators import Autoregressive, Masked
from discrete_lit.samplers import MaskGITSampler, RasterSampler
from discrete_lit.tokenizers import StaticTextEncoder, TextTokenizer, TokenGrid

FAMILIES: dict[str, Any] = {
    "Masked": (Masked, partial(MaskGITSampler, steps=2)),
    "Autoregressive": (Autoregressive, RasterSampler),
}
EACH = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def encoder() -> StaticTextEncoder:
    torch.manual_seed(0)
    return StaticTextEncoder(TextTokenizer.characters("abcd "), 8, length=6)


def made_of(family: str, encoder: StaticTextEncoder | None, context_dim: int | None = 8, **settings: Any) -> Any:
    kind, sampler = FAMILIES[family]
    torch.manual_seed(1)
    made: Any = kind(
        TokenGrid(4, (2,)),
        image_size=8,
        backbone=lambda layout: Transformer(layout, width=16, depth=1, heads=2, context_dim=context_dim),
        text_encoder=encoder,
        sampler=sampler(),
        **{"num_classes": 1, "label_dropout": 0.5, **settings},
    )
    randomise(made.backbone, 0.3)
    return made.eval()


def batch_of(*texts: str) -> dict[str, Any]:
    count = len(texts)
    return {"tokens": torch.zeros(count, 2, dtype=torch.int64), "caption": list(texts), "index": torch.arange(count)}


@EACH
def test_captions_of_a_batch_are_its_context(family: str, encoder: StaticTextEncoder) -> None:
    made = made_of(family, encoder)
    batch = {**batch_of("a b", "", "dd"), "label": torch.tensor([7, 8, 9])}  # classes that nobody asked for
    condition = made.condition_of(batch, CounterRandom(0, torch.arange(3)))
    vectors, mask = encoder(batch["caption"])
    assert torch.equal(condition.context, vectors) and torch.equal(condition.context_mask, mask)
    assert condition.labels.tolist() == [0, 0, 0]
    # Vectors that were made before are taken as they are.
    given = {**batch, "context": vectors + 1, "context_mask": mask}
    assert torch.equal(made.condition_of(given, CounterRandom(0, torch.arange(3))).context, vectors + 1)


@EACH
def test_a_text_changes_the_law_and_an_empty_one_is_the_dropped_condition(
    family: str, encoder: StaticTextEncoder
) -> None:
    made = made_of(family, encoder)
    tokens = torch.tensor([[1, 2]]).expand(3, 2)
    condition = made.condition_of_texts(["a", "b", ""])
    nats = made.log_likelihood(tokens, condition).nats
    assert len(set(nats.tolist())) == 3
    dropped = condition.null(null_label=1, null_id=None)
    nothing = made.log_likelihood(tokens, Condition(**{**dropped.parts(), "labels": condition.labels})).nats
    torch.testing.assert_close(nats[2], nothing[2])


@EACH
def test_guidance_leads_away_from_a_negative_prompt(family: str, encoder: StaticTextEncoder) -> None:
    """Away from itself a text is not led at all, and away from another differently than away from nothing."""
    made = made_of(family, encoder)
    sampler = FAMILIES[family][1](guidance_scale=3.0)
    count = 64

    def drawn(negative: str | None, by: Any = sampler) -> torch.Tensor:
        away = None if negative is None else [negative] * count
        return made.sample(made.condition_of_texts(["a"] * count, negative=away), by, seed=3)

    unguided = drawn(None, FAMILIES[family][1]())
    assert torch.equal(drawn("a"), unguided)
    assert not torch.equal(drawn(None), unguided)
    # The null label stands beside the vectors of an empty text, as it does where all was dropped.
    assert torch.equal(drawn(""), drawn(None))
    assert not torch.equal(drawn("b"), drawn(None))


@EACH
def test_it_learns_what_texts_say(family: str, encoder: StaticTextEncoder) -> None:
    """The picture of "a" is 1 1, of "b" 2 2: after some steps nearly all samples are."""
    made = made_of(family, encoder, label_dropout=0.1, optimizer=None).train()
    optimizer = torch.optim.Adam(made.backbone.parameters(), lr=0.02)
    texts = ["a", "b"] * 16
    tokens = torch.tensor([[1, 1], [2, 2]]).repeat(16, 1)
    before = [value.clone() for value in encoder.parameters()]
    for step in range(60):
        random = CounterRandom(step, torch.arange(32))
        condition = made.condition_of({**batch_of(*texts), "tokens": tokens}, random)
        loss, _ = made.loss(tokens, condition, random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made.eval()
    found = made.sample(made.condition_of_texts(["b", "a"] * 50), seed=1)
    expected = torch.tensor([[2, 2], [1, 1]]).repeat(50, 1)
    assert (found == expected).all(dim=1).float().mean() > 0.9
    assert all(torch.equal(old, new) for old, new in zip(before, encoder.parameters(), strict=True))


def config_of(encoder: StaticTextEncoder, **changes: Any) -> dict[str, Any]:
    backbone = {
        "class_path": "discrete_lit.backbones.Transformer",
        "init_args": {"width": 16, "depth": 1, "heads": 2, "context_dim": 8},
    }
    tokenizer = {"class_path": "discrete_lit.tokenizers.TokenGrid", "init_args": {"vocab_size": 4, "token_shape": [2]}}
    settings = {"tokenizer": tokenizer, "image_size": 8, "num_classes": 1, "backbone": backbone}
    settings["sampler"] = {"class_path": "discrete_lit.samplers.MaskGITSampler", "init_args": {"steps": 2}}
    settings |= {"text_encoder": dict(encoder.hparams), **changes}
    return {"class_path": "discrete_lit.generators.Masked", "init_args": settings}


def test_a_checkpoint_carries_the_encoder_with_its_words(encoder: StaticTextEncoder, tmp_path: Path) -> None:
    made: Any = instantiate(config_of(encoder))
    made.text_encoder.load_state_dict(encoder.state_dict())
    save(made, tmp_path / "made.ckpt")
    again = discrete_lit.load(tmp_path / "made.ckpt")
    assert again.text_encoder.fingerprint() == encoder.fingerprint()
    condition = made.eval().condition_of_texts(["ab"])
    assert torch.equal(again.sample(again.condition_of_texts(["ab"])), made.sample(condition))


def test_weights_do_not_go_into_a_model_of_other_words(encoder: StaticTextEncoder, tmp_path: Path) -> None:
    save(instantiate(config_of(encoder)), tmp_path / "made.ckpt")
    other = StaticTextEncoder(TextTokenizer.characters("wxyz "), 8, length=6)
    strange: Any = instantiate(config_of(other))
    with pytest.raises(ValueError, match="weights were trained with the text tokenizer"):
        strange.load_state_dict(read_checkpoint(tmp_path / "made.ckpt")["state_dict"])


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda e: made_of("Masked", e).condition_of({"tokens": torch.zeros(1, 2).long()}, None), "and no caption"),
        (lambda e: made_of("Masked", e, 5).condition_of_texts(["a"]), "context_dim is 5, and the StaticTextEncoder"),
        (lambda e: made_of("Masked", e, None).condition_of_texts(["a"]), "context_dim is not set"),
        (lambda e: made_of("Masked", None).condition_of_texts(["a"]), "reads no text"),
        (lambda e: made_of("Masked", e).condition_of_texts(["abcdabcd"]), "'abcdabcd' has 10 ids"),
        (lambda e: made_of("Masked", e, num_classes=3).condition_of_texts(["a"]), "reads 3 classes beside texts"),
    ],
)
def test_bad_input(encoder: StaticTextEncoder, mistake: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake(encoder)
