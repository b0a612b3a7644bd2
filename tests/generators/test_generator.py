"""What holds for every generator: its loss, sampling, the sampler that fits, the errors that users meet."""

from functools import partial

import pytest
import torch
from helpers.precision_cases import GENERATORS
from helpers.precision_cases import make_generator as make_precision_generator
from jsonargparse import ArgumentParser
from lightning import LightningModule
from torch import nn

from discrete_lit.backbones import FactorisedHead, MaskedBitHead, Transformer
from discrete_lit.backbones.blocks import Attention, StochasticDepth
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.generators import Autoregressive, DiscreteDiffusion, Generator, Masked, NextScale
from discrete_lit.samplers import BARSampler, HaltonSampler, MaskGITSampler, RasterSampler
from discrete_lit.tokenizers import TokenGrid

each_family = pytest.mark.parametrize("family", ["masked", "autoregressive"])


@each_family
def test_sample(make_generator, family: str) -> None:
    generator = make_generator(family, token_shape=(2, 4), spread=0.4)
    labels = torch.arange(12) % 3
    tokens = generator.sample(labels, seed=5)
    assert tokens.shape == (12, 2, 4) and tokens.dtype == torch.int64
    for size in (1, 3, 7):
        parts = [generator.sample(labels[rows], seed=5, indices=rows) for rows in torch.arange(12).split(size)]
        assert torch.equal(torch.cat(parts), tokens)
    greedy = MaskGITSampler(steps=2, top_k=1) if family == "masked" else RasterSampler(top_k=1)
    assert not torch.equal(generator.sample(labels, greedy, seed=5), tokens)


@each_family
def test_four_sequences_are_learnt_by_heart(make_generator, family: str) -> None:
    generator = make_generator(
        family,
        vocab_size=8,
        token_shape=(2, 3),
        num_classes=4,
        optimizer=partial(torch.optim.Adam, lr=1e-2),
        **({"label_smoothing": 0.0} if family == "masked" else {}),
    ).train()
    tokens, labels = torch.randint(8, (4, 2, 3)), torch.arange(4)
    optimizer = generator.configure_optimizers()
    for step in range(200):
        loss, _ = generator.loss(tokens, labels, CounterRandom(0, torch.arange(4) + 4 * step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    generator.eval()
    assert generator.loss(tokens, labels)[0].item() < 0.02
    nats = generator.log_likelihood(tokens, labels).nats
    assert (nats > -0.1).all()
    sampler = MaskGITSampler(steps=3) if family == "masked" else None
    assert torch.equal(generator.sample(labels, sampler), tokens)


def test_samplers_of_the_other_kind(make_generator) -> None:
    with pytest.raises(ValueError, match="RasterSampler samples backbones with causal attention; Masked has bidirec"):
        make_generator("masked", sampler=RasterSampler())
    with pytest.raises(ValueError, match="MaskGITSampler samples backbones with bidirectional attention; Autoregr"):
        make_generator("autoregressive", sampler=MaskGITSampler())
    with pytest.raises(ValueError, match="needs a backbone with causal attention"):
        make_generator("masked").sample(torch.tensor([0]), RasterSampler())


@each_family
@pytest.mark.parametrize("label", [-1, 3])
def test_sampling_labels_out_of_range(make_generator, family: str, label: int) -> None:
    with pytest.raises(ValueError, match=rf"labels must lie in \[0, 2\] .* got \[{min(0, label)}, {max(0, label)}\]"):
        make_generator(family).sample(torch.tensor([0, label]))


@each_family
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"label_dropout": 1.5}, r"label_dropout must lie in \[0, 1\]"),
    ],
)
def test_settings_out_of_range(make_generator, family: str, arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_generator(family, **arguments)


@each_family
def test_default_randomness_of_the_objective_is_of_rows(make_generator, family: str) -> None:
    generator = make_generator(family, spread=0.3, seed=9)
    tokens, labels = torch.randint(4, (5, 3)), torch.zeros(5, dtype=torch.int64)
    given = generator.loss(tokens, labels, CounterRandom(9, torch.arange(5)))[0]
    assert torch.equal(generator.loss(tokens, labels)[0], given)
    assert CounterRandom(9, torch.arange(5)).uniform(Purpose.MASK_RATIO, 1).unique().numel() == 5


@pytest.mark.parametrize("family", [Autoregressive, DiscreteDiffusion, Masked, NextScale])
def test_two_classes_stand_between_a_family_and_lightning(family: type[Generator]) -> None:
    between = family.__mro__[1 : family.__mro__.index(LightningModule)]
    assert [each.__name__ for each in between] == ["Generator", "ClassConditionalTraining"]


@pytest.mark.parametrize("family", [Autoregressive, DiscreteDiffusion, Masked, NextScale])
def test_help_describes_what_all_families_take(family: type[Generator]) -> None:
    """Families do not repeat these arguments: the parser finds them, and their descriptions, in the base classes."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(family, "model")
    text = " ".join(parser.format_help().split())
    for name, description in {
        "tokenizer": "frozen here",
        "image_size": "of the images in pixels: the side of a square",
        "num_classes": "labels lie in [0, num_classes)",
        "backbone": "called with the layout",
        "sampler": "by default",
        "label_dropout": "probability that a training label is replaced",
        "optimizer": "needed to train",
        "scheduler": "stepped after every batch",
        "seed": "of corruption, orders, label dropout",
    }.items():
        assert f"--model.{name} " in text and description in text, name
    assert "--model.layout" not in text


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("Masked", {"sampler": HaltonSampler(steps=4)}),
        ("Masked", {"bit_groups": 2}),
        ("Autoregressive", {}),
        ("Autoregressive", {"order": "random_annealed", "anneal_steps": (10, 20)}),
        ("Autoregressive", {"order": (5, 1, 3, 0, 4, 2)}),
        ("DiscreteDiffusion", {}),
        ("NextScale", {}),
    ],
)
def test_grids_that_are_not_square(family: str, arguments: dict) -> None:
    """Rows and columns are kept through training, likelihood and sampling, and known tokens stay where they are."""
    from functools import partial

    from discrete_lit import generators
    from discrete_lit.backbones import Transformer
    from discrete_lit.tokenizers import LFQ, MultiScaleVQ
    from discrete_lit.tokenizers.networks import ConvAutoencoder

    network = partial(ConvAutoencoder, channels=4, multipliers=(1, 1), blocks=1, norm_groups=2, image_channels=1)
    scales = family == "NextScale"
    tokenizer = MultiScaleVQ(network, 16, code_dim=4, scales=(1, (1, 2), (2, 3))) if scales else LFQ(network, 4)
    settings = {"width": 16, "depth": 1, "heads": 2, "positions": "learned" if scales else "rope_2d"}
    if "bit_groups" in arguments:
        settings["token_embedding"] = "bits"
    generator = getattr(generators, family)(
        tokenizer, [4, 6], num_classes=2, backbone=partial(Transformer, **settings), **arguments
    ).train()
    shape = (1 + 2 + 6,) if scales else (2, 3)
    assert generator.image_size == (4, 6) and generator.token_shape == shape
    labels, images = torch.tensor([0, 1, 2]), torch.rand(3, 1, 4, 6) * 2 - 1
    tokens = generator.tokens_of({"image": images, "label": labels})
    assert tokens.shape == (3, *shape) and torch.equal(generator.to_grid(generator.to_sequence(tokens)), tokens)
    generator.loss(tokens, labels % 2, dropped=labels == 2)[0].backward()
    assert generator.eval().log_likelihood(tokens, labels).nats.isfinite().all()
    known = torch.full_like(tokens, -1)
    if family != "Autoregressive":
        known[:, ..., -1] = tokens[:, ..., -1]
    drawn = generator.sample(labels, known=known if family != "Autoregressive" else None)
    assert drawn.shape == tokens.shape and torch.equal(drawn.where(known >= 0, -1), known)
    assert tokenizer.decode(drawn).shape == (3, 1, 4, 6)
    if not scales:
        with pytest.raises(ValueError, match=r"token grids \(3, 2\), this generator models \(2, 3\)"):
            generator.tokens_of({"image": images.transpose(2, 3), "label": labels})


def with_dropout(generator: Generator) -> Generator:
    """Half of all activations, attention weights and residual branches are left out in training."""
    for module in generator.backbone.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
        if isinstance(module, Attention):
            module.dropout = 0.5
        if isinstance(module, StochasticDepth):
            module.active = True
            module.kept.fill_(0.5)
    return generator


@pytest.mark.parametrize("name", GENERATORS)
def test_samples_and_likelihoods_are_those_of_eval_mode(name: str) -> None:
    generator, labels = with_dropout(make_precision_generator(name, 0.6)), torch.arange(6) % 3
    tokens, nats = generator.sample(labels), generator.log_likelihood(generator.sample(labels), labels).nats
    generator.train()
    generator.backbone.blocks[0].eval()  # frozen by the user
    before = [module.training for module in generator.modules()]
    assert not torch.equal(generator.backbone.blocks[1].dropout(torch.ones(8, 1, 1)), torch.ones(8, 1, 1))
    for _ in range(2):
        assert torch.equal(generator.sample(labels), tokens)
        torch.testing.assert_close(generator.log_likelihood(tokens, labels).nats, nats, rtol=1e-6, atol=1e-6)
    assert [module.training for module in generator.modules()] == before
    assert not generator.tokenizer.training


def test_modes_are_put_back_behind_an_error(make_generator) -> None:
    generator = make_generator("autoregressive").train()
    with pytest.raises(ValueError, match="labels must lie in"):
        generator.sample(torch.tensor([99]))
    assert generator.backbone.training and not generator.tokenizer.training


BITS = {
    "masked bits": (48, {"token_embedding": "bits", "place_head": partial(MaskedBitHead, width=48, depth=1)}),
    "parts": (60, {"token_embedding": "parts", "place_head": partial(FactorisedHead, sizes=(2**10,) * 6, depth=1)}),
}


@pytest.mark.parametrize("name", BITS)
def test_wide_ids_are_predicted_bit_by_bit(name: str) -> None:
    """Ids of 48 and 60 bits, of which a float keeps no more than 53: their bits are read from integers."""
    bits, switches = BITS[name]
    generator = Autoregressive(
        TokenGrid(2**bits, (3,)), 8, num_classes=2, backbone=partial(Transformer, width=8, depth=1, heads=2, **switches)
    )
    sampler = BARSampler((8, 40), guidance_scale=1.0) if name == "masked bits" else None
    labels = torch.zeros(4, dtype=torch.int64)
    tokens = generator.sample(labels, sampler)
    assert int(tokens.max()) > 2**32 and len(tokens.unique()) == 12
    assert torch.equal(generator.sample(labels, sampler, known=tokens), tokens)
    split = generator.backbone.place_head.sub_tokens
    assert torch.equal(split.join(split.split(tokens)), tokens)
    nats = generator.log_likelihood(tokens, labels).nats
    # The lowest bit of an id counts in its likelihood, and in what follows.
    assert (generator.log_likelihood(tokens ^ 1, labels).nats != nats).all()


def test_wide_ids_in_groups_of_bits() -> None:
    generator = Masked(
        TokenGrid(2**60, (3,)),
        8,
        num_classes=2,
        bit_groups=6,
        backbone=partial(Transformer, width=8, depth=1, heads=2, token_embedding="bits"),
    )
    tokens = torch.randint(2**60, (5, 3))
    sequences = generator.to_sequence(tokens)
    assert sequences.shape == (5, 18) and sequences.max() < 2**10
    assert torch.equal(generator.to_grid(sequences), tokens)
    assert torch.equal(generator.sample(torch.zeros(5, dtype=torch.int64), known=tokens), tokens)
