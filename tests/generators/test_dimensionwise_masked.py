"""DimensionwiseMasked: its exact law by enumeration, the bound, draws, training and checkpoints, bad input."""

from itertools import permutations, product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.counted_operations import counted
from helpers.tiny_runs import QUIET, run, write_settings
from torch import Tensor

import discrete_lit
from discrete_lit.backbones import ChannelHead, ChannelLayout, MaskedAutoencoder, VectorLayout
from discrete_lit.backbones.condition import as_condition
from discrete_lit.core.random import CounterRandom
from discrete_lit.generators import DimensionwiseMasked
from discrete_lit.generators.counted_step import count_step
from discrete_lit.samplers import DimensionwiseSampler
from discrete_lit.tokenizers import DimensionwiseTokenizer, LatentGrid, TokenGrid


def small_network(layout: VectorLayout) -> MaskedAutoencoder:
    return MaskedAutoencoder(layout, width=16, depth=1, heads=2, buffer=2)


def small_head(layout: ChannelLayout) -> ChannelHead:
    return ChannelHead(layout, width=8, depth=1, heads=2)


def generator(shape: tuple[int, int, int] = (3, 2, 2), **settings: Any) -> DimensionwiseMasked:
    torch.manual_seed(0)
    given: dict[str, Any] = {"backbone": small_network, "head": small_head, "levels": 4, **settings}
    made = DimensionwiseMasked(LatentGrid(shape), 2, num_classes=2, **given)
    for parameter in made.parameters():
        parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
    return made


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(5, 3, 2, 2), torch.tensor([0, 1, 1, 0, 1])


def test_latents_are_rounded_to_ids_and_back() -> None:
    made, (latents, _) = generator(), batch()
    ids = made.to_ids(latents)
    assert ids.shape == (5, 4, 3) and 0 <= ids.min() and ids.max() < 4
    rounded = made.to_latents(ids)
    assert rounded[2, 1, 1, 0] == made.quantizer.values[ids[2, 2, 1]]
    assert torch.equal(made.to_ids(rounded), ids)
    nearest = (latents[..., None] - made.quantizer.values).abs().amin(dim=-1)
    torch.testing.assert_close((latents - rounded).abs(), nearest)


# The loss.


def test_a_step_masks_as_many_places_in_each_image_and_costs_these() -> None:
    made, (latents, labels) = generator().train(), batch()
    losses = made.losses(latents, as_condition(labels), CounterRandom(0, torch.arange(5)))
    count = losses.terms["cross_entropy"].shape[1]
    assert losses.terms["cross_entropy"].shape == losses.coordinate.shape == (5, count) and 3 <= count <= 4
    assert losses.weights is None and losses.coordinate.unique().tolist() == [count / 4]


def test_the_operations_of_a_step_are_counted_for_the_mean_share_of_its_places() -> None:
    made, latents, labels = generator((3, 8, 8)).train(), torch.randn(5, 3, 8, 8), batch()[1]
    given = {"latents": latents, "label": labels, "index": torch.arange(5)}
    measured = count_step(made, given)
    share = made.mean_step_share()
    assert share is not None and 0.7 < share < 1
    made.log_dict = lambda *_, **__: None
    made.fixed_share = share
    assert measured == counted(made, given) > 0
    made.fixed_share = 1.0
    assert count_step(made, given) == measured, "the count's own share is the mean"
    assert counted(made, given) != measured


@torch.no_grad()
def test_in_validation_a_loss_belongs_to_its_image() -> None:
    made, (latents, labels) = generator().eval(), batch()
    indices = torch.tensor([3, 17, 40, 41, 9])
    values, weights, coordinate = made.validation_losses(latents, labels, CounterRandom(0, indices))
    torch.testing.assert_close(weights.double().mean(dim=1), coordinate[:, 0])
    for row in range(5):
        one = slice(row, row + 1)
        alone = made.validation_losses(latents[one], labels[one], CounterRandom(0, indices[one]))
        torch.testing.assert_close(alone[0][0], values[row], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_loss_at_a_place_is_the_head_of_its_hidden_state() -> None:
    made, (latents, labels) = generator().eval(), batch()
    values, weights, _ = made.validation_losses(latents, labels, CounterRandom(0, torch.arange(5)))
    ids, masked = made.to_ids(latents), weights.bool()
    for row in range(5):
        known = int((~masked[row]).sum())
        vectors = made.quantizer.lookup(ids[row : row + 1])
        # What stands at masked places is not read: others there change nothing.
        vectors = torch.where(masked[row, :, None], 99.0, vectors)
        hidden = made.backbone(vectors, masked[row : row + 1], labels[row : row + 1], known=known)[0]
        torch.testing.assert_close(made.head.losses(hidden, ids[row]), values[row], rtol=1e-4, atol=1e-5)


# The likelihood.


def every_grid(made: DimensionwiseMasked) -> Tensor:
    """The latents of all ids of two places of two channels in two levels."""
    ids = torch.tensor(list(product(range(2), repeat=4))).view(16, 2, 2)
    return made.to_latents(ids)


@torch.no_grad()
def test_the_likelihoods_of_all_grids_sum_to_one_in_every_order() -> None:
    made = generator((2, 1, 2), levels=2).double().eval()
    latents, labels = every_grid(made), torch.ones(16, dtype=torch.int64)
    along = []
    for order in permutations(range(2)):
        likelihood = made.log_likelihood(latents, labels, order=torch.tensor(order))
        assert likelihood.kind == "exact"
        torch.testing.assert_close(likelihood.nats.exp().sum(), torch.ones((), dtype=torch.float64))
        along.append(likelihood.nats)
    assert not torch.isclose(*along).any()
    # Over many draws of the masks, the bound is the mean of both.
    many = generator((2, 1, 2), levels=2, likelihood_samples=2).eval()
    bound = many.log_likelihood(latents.float().repeat(2000, 1, 1, 1), labels.repeat(2000))
    assert bound.kind == "bound"
    mean = bound.nats.view(2000, 16).mean(dim=0)
    torch.testing.assert_close(mean, torch.stack(along).mean(dim=0), rtol=0, atol=0.15)
    with pytest.raises(ValueError, match="order must have each of the 2 positions"):
        made.log_likelihood(latents, labels, order=torch.tensor([0, 0]))


# Sampling.


@torch.no_grad()
@pytest.mark.parametrize("shifted", [False, True])
def test_draws_one_place_at_a_time_follow_the_exact_law(shifted: bool) -> None:
    def head(layout: ChannelLayout) -> ChannelHead:
        return ChannelHead(layout, width=8, depth=1, heads=2, order=[1, 0], shifted_start=shifted)

    made, count = generator((2, 1, 2), levels=2, head=head).eval(), 10_000
    sampler = DimensionwiseSampler(2, order="raster")
    drawn = made.to_ids(made.draw(torch.ones(count, dtype=torch.int64), _random(count), sampler).tokens)
    frequencies = (drawn.flatten(1) * torch.tensor([8, 4, 2, 1])).sum(dim=1).bincount(minlength=16) / count
    labels, order = torch.ones(16, dtype=torch.int64), torch.tensor([0, 1])
    law = made.log_likelihood(every_grid(made), labels, order=order).nats.exp().float()
    torch.testing.assert_close(frequencies, law, rtol=0, atol=0.02)


def _random(count: int) -> CounterRandom:
    return CounterRandom(11, torch.arange(count))


@torch.no_grad()
def test_a_draw_belongs_to_its_index_and_says_what_it_costs() -> None:
    made = generator(sampler=DimensionwiseSampler(3, guidance_scale=2.0)).eval()
    labels, indices = torch.tensor([0, 1, 1, 0]), torch.tensor([4, 0, 9, 2])
    drawn = made.draw(labels, CounterRandom(0, indices))
    assert drawn.tokens.shape == (4, 3, 2, 2)
    assert torch.equal(made.to_latents(made.to_ids(drawn.tokens)), drawn.tokens)
    # After the passes 1, 2 and 4 places are known; the last scale is that of three.
    assert (drawn.sequential_passes, drawn.network_calls) == (3, 6)
    known, of_pass = (0, 1, 2), (1, 1, 2)
    flops = sum(made.backbone.flops(2, first) + made.head.flops(n) for first, n in zip(known, of_pass, strict=True))
    assert drawn.flops == flops
    assert torch.equal(made.sample(labels[2:3], indices=indices[2:3])[0], drawn.tokens[2])
    assert not torch.equal(made.sample(labels, indices=indices, seed=1), drawn.tokens)


# Bad input.


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"levels": 1}, "levels must be at least 2, got 1"),
        ({"low": 5.0}, "low must lie below high"),
        ({"likelihood_samples": 0}, "likelihood_samples must be at least 1, got 0"),
        (
            {"head": lambda layout: ChannelHead(layout, width=8, depth=1, heads=2, order=range(16))},
            r"each of the 3 channels of the tokenizer's latents once, got .*: is it that of another tokenizer",
        ),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generator(**settings)


def test_a_tokenizer_of_ids_is_refused() -> None:
    for tokenizer in (TokenGrid(4, (2, 2, 3)), DimensionwiseTokenizer(LatentGrid((3, 2, 2)), 4)):
        with pytest.raises(ValueError, match=f"a {type(tokenizer).__name__} makes ids: give the tokenizer that it"):
            DimensionwiseMasked(tokenizer, 2, num_classes=2, backbone=small_network, head=small_head)  # type: ignore[arg-type]


def test_latents_of_another_scale_or_kind_are_refused() -> None:
    made, (latents, labels) = generator(), batch()
    random = CounterRandom(0, torch.arange(5))
    with pytest.raises(ValueError, match=r"must have about unit deviation.*The scale is the tokenizer's"):
        made.data_of({"latents": 4.3 * latents, "label": labels}, random)
    with pytest.raises(ValueError, match="are these the ids of a discrete tokenizer"):
        made.data_of({"latents": made.to_ids(latents), "label": labels}, random)
    with pytest.raises(ValueError, match=r"the latents have the shape \(3, 4, 1\)"):
        made.loss(latents.view(5, 3, 4, 1), labels)


def test_what_cannot_be_drawn_is_refused() -> None:
    labels = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="steps=5 exceeds the 4 places of an image"):
        generator().sample(labels, DimensionwiseSampler(5))
    with pytest.raises(ValueError, match="needs a generator that learned the null label"):
        generator(label_dropout=0.0).sample(labels, DimensionwiseSampler(2, guidance_scale=2.0))
    broken = generator()
    broken.head.logits[1].bias.data[0] = torch.nan  # type: ignore[index]
    with pytest.raises(ValueError, match="the logits are NaN"):
        broken.sample(labels, DimensionwiseSampler(2))


# Training.


def test_it_trains_from_a_configuration_and_loads_again(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "model": {
            "class_path": "discrete_lit.generators.DimensionwiseMasked",
            "init_args": {
                "tokenizer": {"class_path": "discrete_lit.tokenizers.RawPixels", "init_args": {"scale": 2.0}},
                "image_size": 8,
                "num_classes": 2,
                "levels": 8,
                "check_scale": False,
                "backbone": {
                    "class_path": "discrete_lit.backbones.MaskedAutoencoder",
                    "init_args": {"width": 16, "depth": 1, "heads": 2, "buffer": 2},
                },
                "head": {
                    "class_path": "discrete_lit.backbones.ChannelHead",
                    "init_args": {"width": 8, "depth": 1, "heads": 2, "order": [2, 0, 1], "dropout": 0.1},
                },
                "sampler": {"class_path": "discrete_lit.samplers.DimensionwiseSampler", "init_args": {"steps": 4}},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {"class_path": "helpers.synthetic_data.SyntheticImages", "init_args": {"count": 8, "batch_size": 4}},
        "trainer": {**QUIET, "max_steps": 2},
    }
    run("fit", "--config", write_settings(tmp_path / "tokenbridge.yaml", settings), "--run_dir", tmp_path / "run")
    loaded = discrete_lit.load(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert isinstance(loaded, DimensionwiseMasked) and loaded.head.order == [2, 0, 1]
    assert loaded.tokenizer.decode(loaded.sample(torch.tensor([0, 1]))).shape == (2, 3, 8, 8)
