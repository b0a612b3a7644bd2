"""Masked generation: which tokens are masked, and what the loss averages."""

import pytest
import torch
from torch.nn import functional as F

from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion import ArccosSchedule, CosineSchedule, MaskSchedule, TruncatedNormalSchedule


def losses_of(generator, indices: torch.Tensor, tokens: torch.Tensor | None = None):
    tokens = torch.zeros(len(indices), generator.length, dtype=torch.int64) if tokens is None else tokens
    labels = torch.zeros(len(tokens), dtype=torch.int64)
    return generator.token_losses(tokens, labels, CounterRandom(generator.seed, indices))


@pytest.mark.parametrize("schedule", [CosineSchedule(), ArccosSchedule(), TruncatedNormalSchedule()], ids=type)
def test_number_of_masked_tokens(make_generator, schedule: MaskSchedule) -> None:
    """ceil(N m(t)), at least one, t uniform; every position equally often; the coordinate is the ratio."""
    generator = make_generator("masked", token_shape=(4, 4), mask_schedule=schedule)
    indices = torch.arange(3000)
    losses = losses_of(generator, indices)
    t = CounterRandom(generator.seed, indices).uniform(Purpose.MASK_RATIO, 1)[:, 0]
    counts = losses.weights.sum(dim=1)
    assert torch.equal(counts.double(), (16 * schedule.mask_probability(t)).ceil())
    lowest = 12 if isinstance(schedule, TruncatedNormalSchedule) else 1
    assert counts.min() == lowest and counts.max() == 16
    assert losses.coordinate.shape == (3000, 16)
    torch.testing.assert_close(losses.coordinate[:, 3], counts.double() / 16)
    positions = losses.weights.mean(dim=0)
    assert (positions - positions.mean()).abs().max() < 5 * (0.25 / 3000) ** 0.5


def test_the_nearest_number_of_masked_tokens(make_generator) -> None:
    """TiTok's generator: max(1, round(N m)); of its 32 tokens 20.37 are masked on average, where ceil masks 20.87."""
    generator = make_generator("masked", token_shape=(32,), mask_schedule=ArccosSchedule(), mask_count="round")
    indices = torch.arange(20000)
    counts = losses_of(generator, indices).weights.sum(dim=1).double()
    r = 1 - CounterRandom(generator.seed, indices).uniform(Purpose.MASK_RATIO, 1)[:, 0]
    assert torch.equal(counts, (32 * torch.acos(r) / (torch.pi / 2)).round().clamp(min=1))
    assert float(counts.mean()) == pytest.approx(20.37, abs=0.2)
    assert float((counts == 32).double().mean()) == pytest.approx(0.0245, abs=0.004)


@pytest.mark.parametrize("unmasked_weight", [0.0, 1.0])
def test_independent_masks(make_generator, unmasked_weight: float) -> None:
    """Halton-MaskGIT masks each token with probability m: a binomial number, also 0 where all tokens count."""
    generator = make_generator(
        "masked",
        token_shape=(16,),
        mask_schedule=ArccosSchedule(),
        mask_count="bernoulli",
        unmasked_weight=unmasked_weight,
    ).train()
    indices = torch.arange(20000)
    masked = generator._draw_masks(CounterRandom(generator.seed, indices))
    r = 1 - CounterRandom(generator.seed, indices).uniform(Purpose.MASK_RATIO, 1)
    m = torch.acos(r) / (torch.pi / 2)
    standard = (masked.double() - m) / (m * (1 - m)).sqrt()
    used = (m > 0.3)[:, 0] & (m < 0.95)[:, 0]
    assert float(standard[used].mean()) == pytest.approx(0, abs=0.02)
    assert float(standard[used].sum(dim=1).var()) == pytest.approx(16, rel=0.05)
    nothing = (masked.sum(dim=1) == 0).double().mean()
    expected = float(((1 - m) ** 16).mean())
    assert float(nothing) == (pytest.approx(expected, rel=0.15) if unmasked_weight else 0)


def test_a_least_mask_ratio_in_training_alone(make_generator) -> None:
    generator = make_generator("masked", token_shape=(16,), min_mask_ratio=0.5)
    ratios = {}
    for training in (True, False):
        masked = generator.train(training)._draw_masks(CounterRandom(0, torch.arange(2000)))
        ratios[training] = masked.double().mean(dim=1)
    assert float(ratios[True].min()) == 0.5 and float(ratios[False].min()) < 0.1
    # m = sin(pi t / 2) is below 0.5 for t < 1 / 3.
    assert float((ratios[True] == 0.5).double().mean()) == pytest.approx(1 / 3, abs=0.04)
    assert torch.equal(ratios[True], ratios[False].clamp(min=0.5))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_count": "floor"}, "mask_count='floor' is not known, accepted: ceil, round, bernoulli"),
        ({"min_mask_ratio": 1.0}, r"min_mask_ratio must lie in \[0, 1\), got 1.0"),
    ],
)
def test_mistakes_about_the_masks(make_generator, settings, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_generator("masked", **settings)


def test_the_network_sees_the_mask_id_at_masked_places_alone(make_generator) -> None:
    generator = make_generator("masked", vocab_size=7, token_shape=(4, 4))
    seen: list[torch.Tensor] = []
    generator.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tokens = torch.randint(7, (50, 16))
    masked = losses_of(generator, torch.arange(50), tokens).weights > 0
    assert torch.equal(seen[0] == 7, masked)
    assert torch.equal(seen[0][~masked], tokens[~masked])


def test_corruption_belongs_to_the_sample_not_to_the_batch(make_generator) -> None:
    generator = make_generator("masked", token_shape=(4, 4), spread=0.3)
    together = losses_of(generator, torch.tensor([5, 9, 2**40]))
    for row, index in ((1, 9), (2, 2**40)):
        alone = losses_of(generator, torch.tensor([index]))
        assert torch.equal(alone.weights[0], together.weights[row])
    assert not torch.equal(losses_of(generator, torch.tensor([6])).weights[0], together.weights[0])
    other_seed = make_generator("masked", token_shape=(4, 4), seed=1)
    assert not torch.equal(losses_of(other_seed, torch.tensor([5, 9, 2**40])).weights, together.weights)


def test_loss_is_the_mean_over_masked_tokens_of_the_batch(make_generator) -> None:
    generator = make_generator("masked", vocab_size=5, token_shape=(3, 3), spread=0.4)
    tokens, labels = torch.randint(5, (6, 3, 3)), torch.arange(6) % 2
    random = CounterRandom(0, torch.arange(6))
    masked = generator.token_losses(tokens.flatten(1), labels, random).weights > 0
    logits = generator.backbone(tokens.flatten(1).masked_fill(masked, 5), labels)
    expected = F.cross_entropy(logits[masked], tokens.flatten(1)[masked])
    torch.testing.assert_close(generator.loss(tokens, labels, random)[0], expected)
    torch.testing.assert_close(generator.loss(tokens, labels)[0], expected)  # rows 0 ... B - 1 by default


def test_label_smoothing_in_training_alone(make_generator) -> None:
    generator = make_generator("masked", vocab_size=5, token_shape=(3, 3), spread=0.4, label_smoothing=0.2)
    tokens = torch.randint(5, (6, 9))
    plain = losses_of(generator, torch.arange(6), tokens)
    smooth = losses_of(generator.train(), torch.arange(6), tokens)
    masked = plain.weights > 0
    logits = generator.backbone(tokens.masked_fill(masked, 5), torch.zeros(6, dtype=torch.int64))
    log_probabilities = logits.log_softmax(dim=-1)
    chosen = log_probabilities.gather(-1, tokens[..., None])[..., 0]
    torch.testing.assert_close(plain.values, -chosen)
    # Training has values of masked tokens alone.
    expected = -(0.8 * chosen + 0.2 * log_probabilities.mean(dim=-1))
    torch.testing.assert_close(smooth.values, expected * smooth.weights)


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_weight_of_what_is_not_masked_in_training_alone(make_generator, weight: float) -> None:
    generator = make_generator("masked", vocab_size=5, token_shape=(3, 3), spread=0.4, unmasked_weight=weight)
    tokens, labels = torch.randint(5, (6, 3, 3)), torch.zeros(6, dtype=torch.int64)
    masked = losses_of(generator, torch.arange(6), tokens.flatten(1)).weights > 0
    assert 0 < masked.sum() < 54
    generator.train()
    logits = generator.backbone(tokens.flatten(1).masked_fill(masked, 5), labels)
    smooth = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none", label_smoothing=0.1).view(6, 9)
    expected = (smooth[masked].sum() + weight * smooth[~masked].sum()) / (masked.sum() + weight * (~masked).sum())
    torch.testing.assert_close(generator.loss(tokens, labels)[0], expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\)"),
        ({"unmasked_weight": 1.1}, r"unmasked_weight must lie in \[0, 1\], got 1.1"),
        ({"likelihood_samples": 0}, "likelihood_samples must be at least 1"),
    ],
)
def test_settings_out_of_range(make_generator, arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_generator("masked", **arguments)


@pytest.mark.parametrize("backbone", [{}, {"head_bias": "place"}, {"conditioning": "adaln"}, {"tied": True}])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_the_loss_of_masked_tokens_alone(make_generator, backbone, label_smoothing: float) -> None:
    """Training makes logits of masked tokens alone; the loss and its gradients are those of all."""
    generator = make_generator(
        "masked", token_shape=(5,), spread=0.3, backbone=backbone, label_smoothing=label_smoothing
    )
    tokens, labels = torch.randint(4, (6, 5)), torch.arange(6) % 3
    random = CounterRandom(0, torch.arange(6))
    generator.train()
    losses = generator.token_losses(tokens, labels, random)
    alone = torch.autograd.grad((losses.values * losses.weights).sum(), list(generator.backbone.parameters()))
    masked = losses.weights.bool()
    assert 0 < masked.sum() < masked.numel() and not losses.values[~masked].any()
    values = generator._cross_entropies(tokens, labels, masked, label_smoothing=label_smoothing)
    torch.testing.assert_close(losses.values, values * masked)
    whole = torch.autograd.grad((values * masked).sum(), list(generator.backbone.parameters()))
    torch.testing.assert_close(alone, whole)


def test_the_loss_of_masked_bits_alone(make_generator) -> None:
    """Whose groups are masked one by one."""
    generator = make_generator("masked", vocab_size=16, bit_groups=2, spread=0.3).train()
    losses = generator.token_losses(torch.randint(4, (6, 6)), torch.zeros(6).long(), CounterRandom(0, torch.arange(6)))
    assert losses.values.shape == (6, 6) and losses.values[losses.weights.bool()].all()
