"""Likelihoods against the enumerated law of every sequence."""

from itertools import combinations, permutations

import pytest
import torch
from helpers.exact_laws import all_sequences, order_log_laws, raster_log_law


def test_autoregressive_is_exact(make_generator) -> None:
    generator = make_generator("autoregressive", vocab_size=4, token_shape=(3,), spread=0.5)
    sequences = all_sequences(4, 3)
    for label in (0, 1, 2):
        likelihood = generator.log_likelihood(sequences, torch.full((64,), label))
        assert likelihood.kind == "exact" and likelihood.nats.dtype == torch.float64
        torch.testing.assert_close(likelihood.nats, raster_log_law(generator.backbone, label), rtol=0, atol=1e-5)
        assert float(likelihood.nats.exp().sum()) == pytest.approx(1, abs=1e-6)


@torch.no_grad()
def test_autoregressive_loss_is_its_likelihood(make_generator) -> None:
    generator = make_generator("autoregressive", vocab_size=5, token_shape=(2, 3), spread=0.5)
    tokens, labels = torch.randint(5, (7, 2, 3)), torch.arange(7) % 3
    dropped = labels == generator.num_classes
    loss, _ = generator.loss(tokens, labels.masked_fill(dropped, 0), dropped=dropped)
    nats = generator.log_likelihood(tokens, labels).nats
    assert float(loss) == pytest.approx(-float(nats.mean()) / 6, rel=1e-5)


def test_masked_along_one_order_is_exact(make_generator) -> None:
    generator = make_generator("masked", vocab_size=4, token_shape=(3,), spread=0.5)
    sequences, labels = all_sequences(4, 3), torch.ones(64, dtype=torch.int64)
    for order, law in zip(permutations(range(3)), order_log_laws(generator.backbone, 1), strict=True):
        likelihood = generator.log_likelihood(sequences, labels, order=torch.tensor(order))
        assert likelihood.kind == "exact"
        torch.testing.assert_close(likelihood.nats, law, rtol=0, atol=1e-5)
        assert float(likelihood.nats.exp().sum()) == pytest.approx(1, abs=1e-6)
    with pytest.raises(ValueError, match="order must have each of the 3 positions 0 to 2 once"):
        generator.log_likelihood(sequences, labels, order=torch.tensor([0, 1]))


def test_masked_formula_is_the_mean_over_orders(make_generator) -> None:
    """`-N E_k[(1/k) sum of k masked cross-entropies]`, every mask enumerated, is the mean of log p over all orders."""
    generator = make_generator("masked", vocab_size=3, token_shape=(3,), spread=0.5)
    sequences, labels = all_sequences(3, 3), torch.ones(27, dtype=torch.int64)
    total = torch.zeros(27, dtype=torch.float64)
    with torch.no_grad():
        for k in (1, 2, 3):
            subsets = list(combinations(range(3), k))
            for subset in subsets:
                masked = torch.zeros(27, 3, dtype=torch.bool)
                masked[:, list(subset)] = True
                values = generator._cross_entropies(sequences, labels, masked)
                total -= 3 * (values * masked).double().sum(dim=1) / k / len(subsets) / 3
    torch.testing.assert_close(total, order_log_laws(generator.backbone, 1).mean(dim=0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_masked_estimate_is_unbiased_and_a_bound(make_generator, samples: int) -> None:
    generator = make_generator("masked", vocab_size=4, token_shape=(3,), spread=0.7, likelihood_samples=samples)
    laws = order_log_laws(generator.backbone, 1)
    exact, log_mixture = laws.mean(dim=0), laws.logsumexp(dim=0) - torch.tensor(6.0).log()
    assert (exact <= log_mixture).all() and (log_mixture - exact).max() > 0.01
    for number in (5, 40):
        sequence = all_sequences(4, 3)[number].expand(3000, 3)
        likelihood = generator.log_likelihood(sequence, torch.ones(3000, dtype=torch.int64))
        assert likelihood.kind == "bound"
        error = likelihood.nats.std() / 3000**0.5
        assert abs(likelihood.nats.mean() - exact[number]) < 4 * error + 1e-6


def test_masked_evaluations_are_stratified(make_generator) -> None:
    """With as many evaluations as tokens, each number of masked tokens occurs once."""
    generator = make_generator("masked", vocab_size=4, token_shape=(6,), likelihood_samples=6)
    seen: list[torch.Tensor] = []
    generator.backbone.register_forward_pre_hook(lambda module, inputs: seen.append((inputs[0] == 4).sum(dim=1)))
    generator.log_likelihood(torch.zeros(20, 6, dtype=torch.int64), torch.zeros(20, dtype=torch.int64))
    assert (torch.stack(seen).sort(dim=0).values == torch.arange(1, 7)[:, None]).all()


def test_masked_estimate_belongs_to_the_image_not_to_the_batch(make_generator) -> None:
    generator = make_generator("masked", vocab_size=4, token_shape=(2, 2), spread=0.7, likelihood_samples=2)
    tokens, labels, indices = torch.randint(4, (9, 2, 2)), torch.arange(9) % 2, torch.arange(9) + 100
    whole = generator.log_likelihood(tokens, labels, indices=indices).nats
    rows = torch.tensor([6, 1])
    torch.testing.assert_close(
        generator.log_likelihood(tokens[rows], labels[rows], indices=indices[rows]).nats, whole[rows]
    )
    assert not torch.allclose(generator.log_likelihood(tokens, labels, indices=indices + 1).nats, whole)
    default = generator.log_likelihood(tokens, labels).nats
    torch.testing.assert_close(default, generator.log_likelihood(tokens, labels, indices=torch.arange(9)).nats)
