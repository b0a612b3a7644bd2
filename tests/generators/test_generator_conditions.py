"""Generators of ids that are given a grid of ids and vectors beside a class: exact laws, guidance, batches."""

from itertools import product
from typing import Any

import pytest
import torch
from helpers.random_weights import randomise
from helpers.recorded_graph import RecordedGraphs
from torch import Tensor

from discrete_lit.backbones import SequenceLayout, Transformer, cpu_kernels, execution
from discrete_lit.backbones.condition import Condition
from discrete_lit.core.random import CounterRandom
from discrete_lit.generators import DiscreteDiffusion, GraphedDraw
from discrete_lit.samplers import AncestralSampler, MaskGITSampler, NextScaleSampler, RasterSampler
from discrete_lit.samplers.guidance import guide
from discrete_lit.samplers.sampler import SamplingContext

PARTS: dict[str, Any] = {"grid_vocab": 2, "context_dim": 3}


def condition_of(count: int, places: int = 3) -> Condition:
    mask = torch.ones(count, 4, dtype=torch.bool)
    mask[1::2, 2:] = False
    return Condition(
        labels=torch.arange(count) % 2,
        grid=torch.randint(2, (count, places)),
        context=torch.randn(count, 4, 3),
        context_mask=mask,
    )


@torch.no_grad()
def test_likelihoods_given_a_condition_add_up_and_samples_follow_them(make_generator) -> None:
    made = make_generator("autoregressive", vocab_size=3, token_shape=(2,), spread=0.5, backbone=PARTS)
    every = torch.tensor(list(product(range(3), repeat=2)))
    for row in range(2):
        one = condition_of(2, places=2)[row : row + 1]
        many = Condition(**{name: part.expand(9, *part.shape[1:]) for name, part in one.parts().items()})  # type: ignore[union-attr]
        law = made.log_likelihood(every, many).nats.exp()
        assert law.sum().item() == pytest.approx(1, abs=1e-5)
        draws = 2000
        repeated = Condition(**{name: part.expand(draws, *part.shape[1:]) for name, part in one.parts().items()})  # type: ignore[union-attr]
        drawn = made.sample(repeated, seed=row)
        found = torch.bincount(drawn[:, 0] * 3 + drawn[:, 1], minlength=9).double()
        # Pearson's statistic of 8 degrees of freedom: above 26.1 once in a thousand.
        assert ((found - draws * law) ** 2 / (draws * law)).sum() < 26.1


@pytest.mark.parametrize("family", ["autoregressive", "masked"])
def test_a_generator_learns_the_law_given_a_grid(make_generator, family) -> None:
    """x_i is the grid's id with probability 0.9, and else the other, each place for itself: 0.65 nats for two."""
    made = make_generator(
        family, vocab_size=2, token_shape=(2,), num_classes=1, label_dropout=0.0, backbone={"grid_vocab": 2}
    )
    every = torch.tensor(list(product(range(2), repeat=4)))
    tokens, grid = every[:, :2], every[:, 2:]
    law = torch.where(tokens == grid, 0.9, 0.1).prod(dim=1)  # p(x | grid), for each grid
    condition = Condition(labels=torch.zeros(16, dtype=torch.int64), grid=grid)
    optimizer = torch.optim.Adam(made.backbone.parameters(), lr=0.02)
    for step in range(120):
        losses = made.eval().token_losses(tokens, condition, CounterRandom(step, torch.arange(16)))
        optimizer.zero_grad()
        (losses.values * losses.weights * law[:, None]).sum().div((losses.weights * law[:, None]).sum()).backward()
        optimizer.step()
    order = {"order": torch.tensor([1, 0])} if family == "masked" else {}
    found = made.log_likelihood(tokens, condition, **order)
    assert found.kind == "exact"
    torch.testing.assert_close(found.nats.exp().float(), law, rtol=0, atol=0.06)


@torch.no_grad()
def test_guidance_drops_all_parts_and_a_scale_of_one_has_no_second_pass(make_generator) -> None:
    made = make_generator("masked", spread=0.5, backbone=PARTS)
    condition, tokens = condition_of(4), torch.full((4, 3), 4)
    context = SamplingContext(made.backbone, condition, random=CounterRandom(0, torch.arange(4)))
    null = condition.null(null_label=2, null_id=2)
    expected = guide(made.backbone(tokens, condition), made.backbone(tokens, null), 2.5)
    torch.testing.assert_close(context.predict(tokens, 2.5), expected, rtol=0, atol=1e-5)
    plain = context.predict(tokens, 1.0)
    torch.testing.assert_close(plain, made.backbone(tokens, condition), rtol=0, atol=1e-5)
    assert context.output(tokens).network_calls == 3

    random = CounterRandom(0, torch.arange(4))
    guided = made.draw(condition, random, MaskGITSampler(steps=3, guidance_scale=2.5))
    unguided = made.draw(condition, random, MaskGITSampler(steps=3))
    assert (guided.network_calls, unguided.network_calls) == (6, 3)
    assert guided.flops > unguided.flops > 0


@pytest.mark.parametrize("conditioning", ["prefix", "prefix_adaln"])
@torch.no_grad()
def test_the_cached_draw_is_the_uncached(make_generator, conditioning) -> None:
    """The most probable id at each position, guided up to the fourth of six."""
    switches = {**PARTS, "conditioning": conditioning}
    made = make_generator("autoregressive", token_shape=(2, 3), spread=0.5, backbone=switches)
    condition = condition_of(4, places=6)
    sampler = RasterSampler(top_k=1, guidance_scale=3.0, guidance_interval=(0, 4))
    drawn = made.sample(condition, sampler).flatten(1)
    null, tokens = condition.null(null_label=2, null_id=2), torch.zeros(4, 0, dtype=torch.int64)
    for position in range(6):
        conditional, unconditional = (made.backbone(tokens, given)[:, -1] for given in (condition, null))
        scale = 3.0 if position < 4 else 1.0
        tokens = torch.cat((tokens, guide(conditional, unconditional, scale).argmax(dim=-1, keepdim=True)), dim=1)
    assert torch.equal(drawn, tokens)


@pytest.mark.parametrize(
    ("family", "sampler"),
    [
        ("autoregressive", RasterSampler(guidance_scale=2.0)),
        ("masked", MaskGITSampler(steps=3, guidance_scale=2.0)),
        ("masked", AncestralSampler(steps=3, guidance_scale=2.0)),
    ],
)
@torch.no_grad()
def test_a_draw_belongs_to_its_index_and_condition(make_generator, family, sampler) -> None:
    made, condition, indices = make_generator(family, spread=0.5, backbone=PARTS), condition_of(4), torch.arange(4)
    together = made.sample(condition, sampler, indices=indices)
    alone = [made.sample(condition[row : row + 1], sampler, indices=indices[row : row + 1]) for row in range(4)]
    assert torch.equal(torch.cat(alone), together)


def test_a_dropped_condition_is_all_dropped(make_generator) -> None:
    made = make_generator("masked", spread=0.5, backbone=PARTS)
    tokens, everything = torch.randint(4, (4, 3)), torch.ones(4, dtype=torch.bool)
    one, other = condition_of(4), condition_of(4)
    other = Condition(**{**other.parts(), "labels": 1 - other.labels})
    random = CounterRandom(0, torch.arange(4))
    dropped = [made.loss(tokens, given, random, dropped=everything)[0] for given in (one, other)]
    torch.testing.assert_close(dropped[0], dropped[1])
    kept = [made.loss(tokens, given, random)[0] for given in (one, other)]
    assert (kept[0] - kept[1]).abs() > 1e-3


@pytest.mark.parametrize("family", ["next_scale", "diffusion"])
def test_other_families_are_given_all_parts_too(make_next_scale, make_grid_tokenizer, family) -> None:
    def build(layout: SequenceLayout) -> Transformer:
        network = Transformer(layout, width=16, depth=1, heads=2, conditioning="prefix_adaln", **PARTS)
        return randomise(network, 0.4)

    if family == "next_scale":
        made = make_next_scale(backbone=build, sampler=NextScaleSampler(guidance_scale=2.0))
    else:
        sampler = AncestralSampler(steps=3, guidance_scale=2.0)
        made = DiscreteDiffusion(
            make_grid_tokenizer(4, (3,)), 16, num_classes=2, backbone=build, time_input="time", sampler=sampler
        ).eval()
    one, other = condition_of(4, places=made.length), condition_of(4, places=made.length)
    drawn = made.sample(one)
    alone = [made.sample(one[row : row + 1], indices=torch.tensor([row])) for row in range(4)]
    assert torch.equal(torch.cat(alone), drawn)
    random, everything = CounterRandom(0, torch.arange(4)), torch.ones(4, dtype=torch.bool)
    dropped = [made.loss(drawn, given, random, dropped=everything)[0] for given in (one, other)]
    torch.testing.assert_close(dropped[0], dropped[1])
    assert (made.log_likelihood(drawn, one).nats - made.log_likelihood(drawn, other).nats).abs().max() > 1e-2


def test_every_parameter_is_trained_given_all_parts(make_generator) -> None:
    made = make_generator("autoregressive", spread=0.5, backbone=PARTS).train()
    tokens, dropped = torch.randint(4, (8, 3)), torch.arange(8) < 3
    condition = Condition(**{**condition_of(8).parts(), "grid": torch.arange(24).view(8, 3) % 2})
    made.loss(tokens, condition, dropped=dropped)[0].backward()
    for name, parameter in made.backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def batch(count: int = 4) -> dict[str, Tensor]:
    condition = condition_of(count)
    assert condition.grid is not None and condition.context is not None and condition.context_mask is not None
    return {
        "tokens": torch.randint(4, (count, 3)),
        "label": condition.labels,
        "grid": condition.grid.to(torch.int32),
        "context": condition.context,
        "context_mask": condition.context_mask,
        "index": torch.arange(count),
    }


def test_a_batch_gives_the_parts_that_the_backbone_reads(make_generator) -> None:
    made = make_generator("masked", spread=0.5, backbone=PARTS, sampler=MaskGITSampler(steps=2))
    given = batch()
    random = made.random_of(given, 0)
    condition = made.condition_of(given, random)
    assert isinstance(condition, Condition) and condition.grid is not None
    assert condition.grid.dtype == torch.int64 and condition.grid.shape == (4, 3)
    assert torch.equal(condition.context, given["context"])
    assert torch.equal(condition.context_mask, given["context_mask"])
    # Labels stay the tensor that they are.
    of_classes = make_generator("masked").condition_of({"tokens": given["tokens"], "label": given["label"]}, random)
    assert isinstance(of_classes, Tensor)
    values, _, _ = made.validation_losses(given["tokens"], condition, random)
    assert values.shape == (4, 3)
    images = made.predict_step(given, 0)
    expected = made.tokenizer.decode(made.sample(condition, seed=made.seed, indices=given["index"]))
    assert torch.equal(images, expected)


def test_batches_with_other_parts_are_refused_by_name(make_generator) -> None:
    reads_both = make_generator("masked", backbone=PARTS, sampler=MaskGITSampler(steps=2))
    reads_none, given, random = make_generator("masked"), batch(), CounterRandom(0, torch.arange(4))
    for name, setting, value in (("grid", "grid_vocab", 2), ("context", "context_dim", 3)):
        without = {key: part for key, part in given.items() if key != name}
        with pytest.raises(
            ValueError, match=rf'and no "{name}"; backbone.init_args.{setting} of this Masked is {value}'
        ):
            reads_both.condition_of(without, random)
        too_much = {"tokens": given["tokens"], "label": given["label"], name: given[name]}
        with pytest.raises(
            ValueError, match=rf'with a "{name}"; backbone.init_args.{setting} of this Masked is not set'
        ):
            reads_none.condition_of(too_much, random)
    with pytest.raises(ValueError, match="give the context too"):
        mask_alone = {"tokens": given["tokens"], "label": given["label"], "context_mask": given["context_mask"]}
        reads_none.condition_of(mask_alone, random)
    with pytest.raises(ValueError, match=r"ids in \[0, 2\], they must lie in \[0, 2\)"):
        reads_both.condition_of({**given, "grid": torch.tensor([[0, 1, 2]] * 4)}, random)
    with pytest.raises(ValueError, match="they must lie in"):
        reads_both.on_before_batch_transfer({**given, "grid": torch.tensor([[0, 1, 2]] * 4)}, 0)
    with pytest.raises(ValueError, match=r"reads a grid of 3 ids.*got torch.int32 \(4, 2\)"):
        reads_both.condition_of({**given, "grid": given["grid"][:, :2]}, random)
    with pytest.raises(ValueError, match=r"attends to vectors \(B, M, 3\)"):
        reads_both.condition_of({**given, "context": torch.zeros(4, 4, 2)}, random)
    with pytest.raises(ValueError, match="this network reads a grid"):
        reads_both.sample(given["label"])
    with pytest.raises(ValueError, match=r"the ids of a grid must lie in \[0, 2\] \(2 is the null id\), got \[0, 3\]"):
        condition = condition_of(2)
        reads_both.sample(Condition(**{**condition.parts(), "grid": torch.tensor([[0, 1, 3]] * 2)}))


def test_a_replayed_draw_follows_its_condition(make_generator, monkeypatch) -> None:
    monkeypatch.setattr(cpu_kernels, "_SWITCH", "0")
    monkeypatch.setattr(execution, "casting_pays", lambda device: True)
    made = make_generator("masked", spread=0.5, backbone=PARTS)
    draw = GraphedDraw(made, MaskGITSampler(steps=2, guidance_scale=2.0), batch_size=4, recorder=RecordedGraphs())
    for number, count in enumerate((4, 4, 3, 4)):
        condition, indices = condition_of(count), torch.arange(count) + 4 * number
        if number == 3:  # fewer vectors: another draw to record
            condition = Condition(labels=condition.labels, grid=condition.grid, context=condition.context[:, :2])  # type: ignore[index]
        output = draw(condition, indices)
        expected = made.draw(condition, CounterRandom(0, indices), MaskGITSampler(steps=2, guidance_scale=2.0))
        assert torch.equal(output.tokens, expected.tokens), number
        assert draw.recorded == (number in (1, 2))
