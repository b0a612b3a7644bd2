"""Autoregressive generation along other orders than the raster's: laws, samples, and RAR's annealing."""

from itertools import permutations

import pytest
import torch
from helpers.exact_laws import all_sequences, chi_square_p_value, sequence_numbers

from discrete_lit.core.random import CounterRandom
from discrete_lit.samplers import RasterSampler

RAR = {"target_positions": True, "conditioning": "prefix_adaln", "condition_positions": True, "registers": 1}


@torch.no_grad()
def law_along(generator, order: tuple[int, ...], label: int) -> torch.Tensor:
    """`(K^N,)` log-probability of every raster sequence, each factor from its own pass over what came before."""
    sequences = all_sequences(generator.vocab_size, generator.length)
    labels = torch.full((len(sequences),), label)
    orders = torch.tensor(order).expand(len(sequences), -1)
    total = torch.zeros(len(sequences), dtype=torch.float64)
    for position in range(generator.length):
        before = sequences[:, list(order[:position])]
        logits = generator.backbone(before, labels, order=orders)[:, -1].double()
        total += logits.log_softmax(dim=-1).gather(1, sequences[:, order[position], None])[:, 0]
    return total


def test_likelihood_along_every_order(make_generator) -> None:
    generator = make_generator("autoregressive", order="random_annealed", spread=0.5, backbone=RAR)
    sequences, labels, laws = all_sequences(4, 3), torch.ones(64, dtype=torch.int64), []
    for order in permutations(range(3)):
        likelihood = generator.log_likelihood(sequences, labels, order=torch.tensor(order))
        assert likelihood.kind == "exact"
        torch.testing.assert_close(likelihood.nats, law_along(generator, order, 1), rtol=0, atol=1e-5)
        assert float(likelihood.nats.exp().sum()) == pytest.approx(1, abs=1e-6)
        laws.append(likelihood.nats)
    assert torch.stack(laws).std(dim=0).min() > 1e-3  # the orders' laws differ
    assert torch.equal(generator.log_likelihood(sequences, labels).nats, laws[0])


@pytest.mark.parametrize("positions", ["learned", "rope_2d"])
def test_likelihood_and_samples_of_a_fixed_order(make_generator, positions: str) -> None:
    order = (3, 0, 2, 1)
    backbone = {"positions": positions, "target_positions": True}
    generator = make_generator(
        "autoregressive", vocab_size=3, token_shape=(2, 2), order=order, spread=0.5, backbone=backbone
    )
    sequences = all_sequences(3, 4)
    nats = generator.log_likelihood(sequences.reshape(-1, 2, 2), torch.ones(81, dtype=torch.int64)).nats
    law = law_along(generator, order, 1)
    torch.testing.assert_close(nats, law, rtol=0, atol=1e-5)
    drawn = generator.sample(torch.ones(8000, dtype=torch.int64), seed=3)
    assert drawn.shape == (8000, 2, 2)
    assert chi_square_p_value(sequence_numbers(drawn.flatten(1), 3), law.exp()) > 1e-3


def test_guided_samples_of_a_fixed_order(make_generator) -> None:
    """Both halves of a guided batch stand in the order: greedy ids are those of the guided passes over prefixes."""
    order = torch.tensor([2, 0, 3, 1])
    generator = make_generator("autoregressive", vocab_size=5, token_shape=(4,), order=(2, 0, 3, 1), spread=0.5)
    drawn = generator.sample(torch.tensor([0, 1]), RasterSampler(top_k=1, guidance_scale=3.0))
    for row, label in enumerate((0, 1)):
        prefix = torch.empty(1, 0, dtype=torch.int64)
        for _ in range(4):
            rows = [generator.backbone(prefix, torch.tensor([y]), order=order[None])[0, -1] for y in (label, 2)]
            given, null = (logits.log_softmax(dim=-1) for logits in rows)
            prefix = torch.cat((prefix, (null + 3 * (given - null)).argmax()[None, None]), dim=1)
        assert torch.equal(drawn[row, order], prefix[0])


def test_samplers_of_other_orders(make_generator) -> None:
    generator = make_generator("autoregressive", order=(2, 0, 1))
    with pytest.raises(ValueError, match="order='random' needs a generator of any order"):
        generator.sample(torch.tensor([0]), RasterSampler(order="random"))


def test_known_tokens_come_first_in_a_fixed_order(make_generator) -> None:
    generator = make_generator("autoregressive", order=(2, 0, 1), spread=0.5)
    drawn = generator.sample(torch.zeros(50, dtype=torch.int64), known=torch.tensor([-1, -1, 3]).expand(50, -1))
    assert (drawn[:, 2] == 3).all() and len(drawn.unique(dim=0)) > 4
    with pytest.raises(ValueError, match="known must be the first tokens in the generator's order"):
        generator.sample(torch.tensor([0]), known=torch.tensor([[3, -1, -1]]))


def test_loss_of_a_fixed_order_is_its_likelihood(make_generator) -> None:
    generator = make_generator("autoregressive", vocab_size=5, token_shape=(2, 2), order=(3, 1, 0, 2), spread=0.5)
    tokens, labels = torch.randint(5, (6, 2, 2)), torch.arange(6) % 3
    expected = -generator.log_likelihood(tokens, labels).nats.mean() / 4
    dropped = labels == generator.num_classes
    loss, _ = generator.loss(tokens, labels.masked_fill(dropped, 0), dropped=dropped)
    assert float(loss.detach()) == pytest.approx(float(expected), rel=1e-5)


def test_probability_of_random_orders(make_generator, monkeypatch) -> None:
    generator = make_generator("autoregressive", order="random_annealed", anneal_steps=(10, 30))
    for step, probability in ((0, 1.0), (9, 1.0), (10, 1.0), (15, 0.75), (25, 0.25), (30, 0.0), (99, 0.0)):
        monkeypatch.setattr(type(generator), "global_step", step)
        assert generator.random_order_probability() == pytest.approx(probability)
    at_once = make_generator("autoregressive", order="random_annealed", anneal_steps=(5, 5))
    for step, probability in ((4, 1.0), (5, 0.0)):
        monkeypatch.setattr(type(generator), "global_step", step)
        assert at_once.random_order_probability() == probability


def orders_seen(generator, indices: torch.Tensor) -> torch.Tensor | None:
    """The orders that the backbone is given for the samples `indices`."""
    seen = []
    handle = generator.backbone.register_forward_pre_hook(
        lambda module, inputs, named: seen.append(named["order"]), with_kwargs=True
    )
    count = len(indices)
    tokens = torch.zeros(count, generator.length, dtype=torch.int64)
    generator.token_losses(tokens, torch.zeros(count, dtype=torch.int64), CounterRandom(generator.seed, indices))
    handle.remove()
    return seen[0]


def test_training_orders(make_generator, monkeypatch) -> None:
    generator = make_generator("autoregressive", order="random_annealed", anneal_steps=(0, 4)).train()
    every = torch.tensor(list(permutations(range(3))))
    for step, random_share in ((0, 1.0), (1, 0.75)):
        monkeypatch.setattr(type(generator), "global_step", step)
        orders = orders_seen(generator, torch.arange(6000))
        numbers = (orders[:, None] == every).all(dim=-1).int().argmax(dim=1)
        assert torch.equal(every[numbers], orders)
        law = torch.full((6,), random_share / 6)
        law[0] += 1 - random_share
        assert chi_square_p_value(numbers, law) > 1e-3
        assert torch.equal(orders_seen(generator, torch.tensor([17, 4000])), orders[[17, 4000]])  # the sample's own
    monkeypatch.setattr(type(generator), "global_step", 4)
    assert (orders_seen(generator, torch.arange(50)) == torch.arange(3)).all()
    monkeypatch.setattr(type(generator), "global_step", 0)
    assert orders_seen(generator.eval(), torch.arange(5)) is None


def test_training_loss_is_along_the_drawn_orders(make_generator) -> None:
    generator = make_generator("autoregressive", order="random_annealed", spread=0.5, backbone=RAR).train()
    tokens, labels = torch.randint(4, (20, 3)), torch.arange(20) % 3
    orders = orders_seen(generator, torch.arange(20))
    losses = generator.token_losses(tokens, labels, CounterRandom(generator.seed, torch.arange(20)))
    assert len(orders.unique(dim=0)) > 3
    for row in range(20):
        nats = generator.log_likelihood(tokens[row : row + 1], labels[row : row + 1], order=orders[row]).nats
        assert float(-losses.values[row].detach().sum()) == pytest.approx(float(nats), rel=1e-5)


def test_every_parameter_is_trained(make_generator, assert_all_trained) -> None:
    assert_all_trained(make_generator("autoregressive", order="random_annealed", spread=0.3, backbone=RAR))
    assert_all_trained(make_generator("autoregressive", order=(1, 2, 0), spread=0.3))


def test_order_is_not_in_the_weights(make_generator) -> None:
    """A checkpoint of either order is one of the other: the settings say which."""
    ordered = make_generator("autoregressive", order=(1, 2, 0))
    annealed = make_generator("autoregressive", order="random_annealed")
    assert ordered.state_dict().keys() == annealed.state_dict().keys()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"order": "spiral"},
            "order must be 'raster', 'blocks', 'random', 'random_annealed' or a permutation of positions, got 'spiral'",
        ),
        ({"order": (0, 1)}, "order must have each of the 3 positions 0 to 2 once"),
        ({"order": (0, 1, 1)}, "order must have each of the 3 positions 0 to 2 once"),
        ({"anneal_steps": (3, 2)}, r"anneal_steps must not fall and be >= 0, got \(3, 2\)"),
    ],
)
def test_settings_out_of_range(make_generator, arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_generator("autoregressive", **arguments)


def test_likelihood_along_orders_that_do_not_fit(make_generator) -> None:
    tokens, labels = torch.zeros(1, 3, dtype=torch.int64), torch.tensor([0])
    with pytest.raises(ValueError, match="knows the raster order alone"):
        make_generator("autoregressive").log_likelihood(tokens, labels, order=torch.tensor([0, 1, 2]))
    with pytest.raises(ValueError, match="order must have each of the 3 positions"):
        generator = make_generator("autoregressive", order="random_annealed")
        generator.log_likelihood(tokens, labels, order=torch.tensor([0, 1, 3]))
