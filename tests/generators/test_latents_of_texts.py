"""Generators of latents that are told by a text what to draw: batches, training, guidance, checkpoints, commands."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.random_weights import randomise

import discrete_lit
from discrete_lit.backbones import DiT, MaskedAutoencoder, TokenDiffusionHead, Transformer, UNet
from discrete_lit.checkpoints import instantiate, save
from discrete_lit.cli.sample import sample
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion.gaussian import GaussianDenoiser, RectifiedPath
from discrete_lit.diffusion.solvers import DDPM, Euler
from discrete_lit.generators import (
    ContinuousAutoregressive,
    ContinuousMasked,
    DisCon,
    LatentDiffusion,
    Masked,
    TokenDiffusionDecoder,
)
from discrete_lit.samplers import CausalVectorSampler, GuidedSolver, MARSampler, MaskGITSampler
from discrete_lit.tokenizers import RawPixels, StaticTextEncoder, TextTokenizer, TokenGrid

DIM = 8
UNET = {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [1, 2], "heads": 2, "norm_groups": 4}


@pytest.fixture(scope="module")
def encoder() -> StaticTextEncoder:
    torch.manual_seed(0)
    return StaticTextEncoder(TextTokenizer.characters("abcd "), DIM, length=6)


def head(dim: int, width: int) -> TokenDiffusionHead:
    return TokenDiffusionHead(dim, width, width=16, depth=1, repeats=1, solver=DDPM(3))


def flow(network: Any, encoder: Any, **settings: Any) -> LatentDiffusion:
    given: dict[str, Any] = {"denoiser": GaussianDenoiser(RectifiedPath(), prediction="velocity"), **settings}
    return LatentDiffusion(RawPixels(1), 4, backbone=network, text_encoder=encoder, **given)


def masked(encoder: Any, **settings: Any) -> ContinuousMasked:
    network = partial(MaskedAutoencoder, width=16, depth=1, heads=2, buffer=1, context_dim=DIM)
    return ContinuousMasked(RawPixels(1), 4, backbone=network, head=head, text_encoder=encoder, **settings)


def autoregressive(encoder: Any, **settings: Any) -> ContinuousAutoregressive:
    network = partial(Transformer, width=16, depth=1, heads=2, context_dim=DIM)
    return ContinuousAutoregressive(
        RawPixels(1), 4, backbone=network, head=head, hidden_width=16, text_encoder=encoder, **settings
    )


def decoder(encoder: Any, **settings: Any) -> TokenDiffusionDecoder:
    return TokenDiffusionDecoder(
        RawPixels(1),
        4,
        discrete=TokenGrid(3, (2, 2)),
        token_input="learned",
        backbone=partial(DiT, width=16, depth=1, heads=2, context_dim=DIM),
        denoiser=GaussianDenoiser(RectifiedPath(), prediction="velocity"),
        text_encoder=encoder,
        **settings,
    )


def discon(encoder: Any, **settings: Any) -> DisCon:
    discrete = Masked(
        TokenGrid(3, (2, 2)),
        4,
        num_classes=settings["num_classes"],
        backbone=partial(Transformer, width=16, depth=1, heads=2, context_dim=DIM),
        text_encoder=encoder,
        sampler=MaskGITSampler(2),
    )
    network = partial(MaskedAutoencoder, width=16, depth=1, heads=2, buffer=1, context_dim=DIM)
    return DisCon(RawPixels(1), 4, discrete=discrete, backbone=network, head=head, text_encoder=encoder, **settings)


FAMILIES: dict[str, tuple[Any, Any]] = {
    "diffusion, attention": (
        partial(flow, partial(DiT, width=16, depth=1, heads=2, context_dim=DIM)),
        partial(GuidedSolver, Euler(3)),
    ),
    "diffusion, prefix": (
        partial(flow, partial(DiT, width=16, depth=1, heads=2, context_dim=DIM, context_input="prefix")),
        partial(GuidedSolver, Euler(3)),
    ),
    "diffusion, U-Net": (partial(flow, partial(UNet, **UNET, context_dim=DIM)), partial(GuidedSolver, Euler(3))),
    "masked": (masked, partial(MARSampler, 2)),
    "masked, raster": (masked, partial(MARSampler, 16, order="raster")),
    "autoregressive": (autoregressive, CausalVectorSampler),
    "decoder": (decoder, partial(GuidedSolver, Euler(3))),
    "DisCon": (discon, partial(MARSampler, 2)),
}
EACH = pytest.mark.parametrize("family", FAMILIES)
TOKENS = {"decoder", "DisCon"}


def made_of(family: str, encoder: StaticTextEncoder | None, *, spread: float | None = 0.3, **settings: Any) -> Any:
    build, sampler = FAMILIES[family]
    torch.manual_seed(1)
    made = build(encoder, sampler=sampler(), **{"num_classes": 1, "label_dropout": 0.5, **settings})
    if spread is not None:
        for network in (*made.trained_networks(), *([made.discrete.backbone] if family == "DisCon" else [])):
            randomise(network, spread)
    return made.eval()


def batch_of(family: str, *texts: str) -> dict[str, Any]:
    count = len(texts)
    batch = {"image": torch.randn(count, 1, 4, 4), "caption": list(texts), "index": torch.arange(count)}
    return {**batch, "tokens": torch.arange(4 * count).view(count, 2, 2) % 3} if family in TOKENS else batch


def draws(family: str, made: Any, texts: list[str], *, seed: int = 3, by: Any = None, **options: Any) -> torch.Tensor:
    condition = made.condition_of_texts(texts, **options)
    random = CounterRandom(seed, torch.arange(len(texts)))
    if family in TOKENS:  # the same d for every text
        tokens = torch.arange(4).view(1, 2, 2).expand(len(texts), -1, -1) % 3
        return made.draw(condition, random, by, tokens=tokens).tokens
    return made.draw(condition, random, by).tokens


@EACH
def test_captions_of_a_batch_are_its_context(family: str, encoder: StaticTextEncoder) -> None:
    made = made_of(family, encoder)
    batch = {**batch_of(family, "a b", "", "dd"), "label": torch.tensor([7, 8, 9])}  # classes that nobody asked for
    random = CounterRandom(0, torch.arange(3))
    condition = made.condition_of(batch, random)
    vectors, mask = encoder(batch["caption"])
    assert torch.equal(condition.context, vectors) and torch.equal(condition.context_mask, mask)
    assert condition.labels.tolist() == [0, 0, 0] and (condition.grid is None) == (family not in TOKENS)
    # Vectors that were made before are taken as they are.
    given = {**batch, "context": vectors + 1, "context_mask": mask}
    assert torch.equal(made.condition_of(given, random).context, vectors + 1)
    told = made.condition_of_texts(batch["caption"])
    drawn = made.draw(told, random, tokens=batch["tokens"]).tokens if family == "decoder" else made.sample(told)
    torch.testing.assert_close(made.predict_step(batch, 0), made.tokenizer.decode(drawn))


@pytest.mark.slow_but(2)
@EACH
def test_a_text_changes_the_loss_and_the_law(family: str, encoder: StaticTextEncoder) -> None:
    made, data = made_of(family, encoder), torch.randn(3, 1, 4, 4)
    random = CounterRandom(0, torch.arange(3))
    one, other = (made.condition_of(batch_of(family, *texts), random) for texts in (("a", "b", ""), ("a", "c", "")))
    first, second = (made.losses(data, each, random) for each in (one, other))
    changed = [torch.stack(list(terms.values())).sum(dim=0).view(3, -1) for terms in (first.terms, second.terms)]
    assert (changed[0] != changed[1]).any(dim=1).tolist() == [False, True, False]
    nats = made.log_likelihood(data, one).nats
    assert (nats == made.log_likelihood(data, other).nats).tolist() == [True, False, True]


@EACH
def test_guidance_leads_away_from_a_negative_prompt(family: str, encoder: StaticTextEncoder) -> None:
    """Away from itself a text is not led at all, and away from another differently than away from nothing."""
    made = made_of(family, encoder)
    guided, texts = FAMILIES[family][1](guidance_scale=3.0), ["a"] * 4
    unguided = draws(family, made, texts)

    def away(negative: str | None) -> torch.Tensor:
        return draws(family, made, texts, by=guided, negative=None if negative is None else [negative] * 4)

    torch.testing.assert_close(away("a"), unguided, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(away(None), unguided, atol=1e-3)
    assert torch.equal(away(""), away(None))
    assert not torch.allclose(away("b"), away(None), atol=1e-3)


@EACH
def test_an_empty_text_is_the_null_condition_where_nothing_else_is_given(
    family: str, encoder: StaticTextEncoder
) -> None:
    """What stands before the tokens of DisCon and of a decoder is more than a text: they keep it."""
    made = made_of(family, encoder)
    condition = made.condition_of_texts(["", "a"])
    assert condition.labels.tolist() == [0 if family in TOKENS else 1, 0]
    if family not in TOKENS:
        null = condition.null(null_label=1, null_id=None)
        random = CounterRandom(0, torch.arange(2))
        torch.testing.assert_close(made.draw(condition, random).tokens[0], made.draw(null, random).tokens[0])


@pytest.mark.parametrize("family", ["diffusion, attention", "diffusion, prefix"])
def test_it_learns_what_texts_say(family: str, encoder: StaticTextEncoder) -> None:
    """The picture of "a" is bright, of "b" dark: after some steps nearly all samples are."""
    made = made_of(family, encoder, label_dropout=0.1, spread=None).train()
    optimizer = torch.optim.Adam(made.backbone.parameters(), lr=0.01)
    texts, before = ["a", "b"] * 16, [value.clone() for value in encoder.parameters()]
    images = torch.tensor([0.8, -0.8]).repeat(16).view(32, 1, 1, 1).expand(-1, 1, 4, 4).contiguous()
    for step in range(120):
        random = CounterRandom(step, torch.arange(32))
        condition = made.condition_of({"image": images, "caption": texts}, random)
        loss, _ = made.loss(images, condition, random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    made.eval()
    drawn = made.sample(made.condition_of_texts(["b", "a"] * 20), GuidedSolver(Euler(20)), seed=1).mean(dim=(1, 2, 3))
    assert (drawn[::2] < -0.4).float().mean() > 0.9 and (drawn[1::2] > 0.4).float().mean() > 0.9
    assert all(torch.equal(old, new) for old, new in zip(before, encoder.parameters(), strict=True))


def test_a_text_costs_what_it_costs(encoder: StaticTextEncoder) -> None:
    """The operations of a draw are those of the network with its words."""
    made = made_of("diffusion, attention", encoder)
    flops = made.draw(made.condition_of_texts(["a"]), CounterRandom(0, torch.zeros(1).long())).flops
    assert flops == 3 * made.backbone.flops(1, encoder.length) > 3 * made.backbone.flops(1)


def config_of(family: str, encoder: StaticTextEncoder) -> dict[str, Any]:
    network: dict[str, Any] = {"width": 16, "depth": 1, "heads": 2, "context_dim": DIM}
    settings: dict[str, Any] = {
        "tokenizer": {"class_path": "discrete_lit.tokenizers.RawPixels", "init_args": {"image_channels": 1}},
        "image_size": 4,
        "num_classes": 1,
        "text_encoder": dict(encoder.hparams),
    }
    solver = {"class_path": "discrete_lit.diffusion.solvers.DDIM", "init_args": {"steps": 2}}
    guided = {"class_path": "discrete_lit.samplers.GuidedSolver", "init_args": {"solver": solver}}
    if family == "masked":
        settings["backbone"] = {
            "class_path": "discrete_lit.backbones.MaskedAutoencoder",
            "init_args": {**network, "buffer": 1},
        }
        settings["head"] = {
            "class_path": "discrete_lit.backbones.TokenDiffusionHead",
            "init_args": {"width": 16, "depth": 1, "solver": solver},
        }
        settings["sampler"] = {"class_path": "discrete_lit.samplers.MARSampler", "init_args": {"steps": 2}}
        return {"class_path": "discrete_lit.generators.ContinuousMasked", "init_args": settings}
    settings |= {"backbone": {"class_path": "discrete_lit.backbones.DiT", "init_args": network}, "sampler": guided}
    if family == "diffusion":
        return {"class_path": "discrete_lit.generators.LatentDiffusion", "init_args": settings}
    grid = {"class_path": "discrete_lit.tokenizers.TokenGrid", "init_args": {"vocab_size": 3, "token_shape": [2, 2]}}
    settings |= {"discrete": grid, "token_input": "learned"}
    return {"class_path": "discrete_lit.generators.TokenDiffusionDecoder", "init_args": settings}


@pytest.mark.parametrize("family", ["diffusion", "masked"])
def test_sample_draws_prompts_from_a_checkpoint(family: str, encoder: StaticTextEncoder, tmp_path: Path) -> None:
    made: Any = instantiate(config_of(family, encoder))
    made.text_encoder.load_state_dict(encoder.state_dict())
    randomise(made.backbone, 0.3)
    save(made, tmp_path / "made.ckpt")
    again = discrete_lit.load(tmp_path / "made.ckpt")
    assert again.text_encoder.fingerprint() == encoder.fingerprint()
    sample(str(tmp_path / "made.ckpt"), str(tmp_path / "out"), num_samples=5, prompt=["a", "bb"], batch_size=2)
    run = json.loads((tmp_path / "out" / "run.json").read_text())
    assert run["prompts"] == ["a", "bb"] and run["flops_per_image"] > 0
    images = np.load(tmp_path / "out" / "samples.npz")["arr_0"]
    drawn = again.sample(again.condition_of_texts(["a", "bb", "a", "bb", "a"]))
    expected = ((again.tokenizer.decode(drawn).clamp(-1, 1) + 1) * 127.5).round().byte()
    assert np.abs(images.astype(int) - expected.movedim(1, -1).numpy()).max() <= 1


def test_a_decoder_of_texts_is_told_the_prompts(encoder: StaticTextEncoder, tmp_path: Path) -> None:
    """The decoder alone reads the text, so that the tokens are the same for every prompt."""
    grid = config_of("decoder", encoder)["init_args"]["discrete"]
    generator: Any = instantiate(
        {
            "class_path": "discrete_lit.generators.Masked",
            "init_args": {
                "tokenizer": grid,
                "image_size": 4,
                "num_classes": 1,
                "backbone": {
                    "class_path": "discrete_lit.backbones.Transformer",
                    "init_args": {"width": 16, "depth": 1, "heads": 2},
                },
                "sampler": {"class_path": "discrete_lit.samplers.MaskGITSampler", "init_args": {"steps": 2}},
            },
        }
    )
    told: Any = instantiate(config_of("decoder", encoder))
    told.text_encoder.load_state_dict(encoder.state_dict())
    randomise(told.backbone, 0.3)
    save(generator, tmp_path / "generator.ckpt")
    save(told, tmp_path / "decoder.ckpt")
    common: dict[str, Any] = {"num_samples": 4, "decoder": str(tmp_path / "decoder.ckpt")}
    with pytest.raises(ValueError, match="draws what a text says"):
        sample(str(tmp_path / "generator.ckpt"), str(tmp_path / "none"), **common)
    for name, prompt in (("one", ["a"]), ("two", ["b"])):
        sample(str(tmp_path / "generator.ckpt"), str(tmp_path / name), prompt=prompt, **common)
    one, two = (np.load(tmp_path / name / "samples.npz")["arr_0"] for name in ("one", "two"))
    assert one.shape == (4, 4, 4, 1) and not np.array_equal(one, two)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            lambda e: made_of("masked", e).condition_of({"image": torch.zeros(1, 1, 4, 4)}, None),
            "and no caption, which this ContinuousMasked reads",
        ),
        (lambda e: made_of("diffusion, U-Net", None).condition_of_texts(["a"]), "reads no text"),
        (
            lambda e: made_of("diffusion, prefix", e).sample(torch.zeros(2).long()),
            r"this network attends to vectors \(B, M, 8\), the context of a condition, got none",
        ),
        (
            lambda e: flow(partial(DiT, width=16, depth=1, heads=2), None, num_classes=1).sample(
                made_of("masked", e).condition_of_texts(["a"])
            ),
            "this network attends to no vectors",
        ),
        (
            lambda e: flow(partial(DiT, width=16, depth=1, heads=2), e, num_classes=1).condition_of_texts(["a"]),
            "context_dim is not set, and the StaticTextEncoder",
        ),
        (lambda e: made_of("decoder", e).decode(torch.zeros(1, 2, 2).long()), "reads a text for each of its images"),
        (lambda e: made_of("decoder", e).autoencoder(), "this decoder reads a text, which a tokenizer does not know"),
        (
            lambda e: DisCon(
                RawPixels(1),
                4,
                num_classes=1,
                discrete=made_of("DisCon", e).discrete,
                backbone=partial(MaskedAutoencoder, width=16, depth=1, heads=2, buffer=1),
                head=head,
            ),
            "the generator of d reads texts by another text_encoder",
        ),
    ],
)
def test_bad_input(encoder: StaticTextEncoder, mistake: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake(encoder)
