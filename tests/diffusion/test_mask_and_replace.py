"""VQ-Diffusion's noise, loss and steps: against the paper's formulas, matrix powers, and models that are enumerated."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.enumerated_steps import OncePerState, context_of, draw_numbers, enumerated_law, predict
from helpers.exact_laws import all_sequences, chi_square_p_value
from helpers.exact_oracle import VOCAB_SIZE, random_law, reference_law
from torch import Tensor

from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import MaskAndReplaceProcess, MaskAndReplaceSchedule, PosteriorHead
from discrete_lit.diffusion.likelihood import likelihood_bound
from discrete_lit.diffusion.losses import DiscreteTimeBound
from discrete_lit.diffusion.mask_and_replace import StepImportance, VQDiffusionLoss
from discrete_lit.diffusion.noise_level import NoiseLevel
from discrete_lit.diffusion.parameterization import Denoiser, leave_one_out_from_posterior
from discrete_lit.diffusion.reverse import jumps_from_clean
from discrete_lit.samplers import AncestralSampler, EulerSampler

# As much noise of each kind as to be seen.
FIRST, LAST = (0.8, 0.1), (0.02, 0.9)
CLOSE = {"rtol": 0, "atol": 1e-12}


def noise(size: int, **settings: Any) -> MaskAndReplaceProcess:
    return MaskAndReplaceProcess(size, **{"first": FIRST, "last": LAST, **settings})


def schedule(steps: int) -> MaskAndReplaceSchedule:
    return MaskAndReplaceSchedule(steps, first=FIRST[0], last=LAST[0])


def matrix(alpha: float, beta: float, gamma: float, size: int) -> Tensor:
    """The paper's Q (eq. 7): a row for each state before, a column for each after."""
    made = torch.full((size + 1, size + 1), beta, dtype=torch.float64)
    made[:size, :size] += alpha * torch.eye(size, dtype=torch.float64)
    made[:, size] = gamma
    made[size] = torch.eye(size + 1, dtype=torch.float64)[size]
    return made


def alphas(steps: int, of: MaskAndReplaceSchedule) -> Tensor:
    """`(T + 1,)`, from clean data on."""
    return of.alpha(torch.arange(steps + 1, dtype=torch.float64) / steps)


# --- The noise ---


@pytest.mark.parametrize(("steps", "points"), [(100, None), (7, (FIRST, LAST))])
def test_products_of_the_steps_are_the_cumulative_kernels(steps: int, points: Any) -> None:
    """And both are the arrays that the published code makes, written down again here."""
    size = 5
    first, last = points or ((0.99999, 0.000009), (0.000009, 0.99999))
    process = MaskAndReplaceProcess(size, first=first, last=last)
    times = MaskAndReplaceSchedule(steps, first=first[0], last=last[0])
    kept, masked = (np.linspace(start, end, steps) for start, end in zip(first, last, strict=True))
    one, of_masks = (np.concatenate(([start], line)) for start, line in ((1.0, kept), (0.0, masked)))
    alpha = alphas(steps, times)
    np.testing.assert_allclose(alpha.numpy(), one, rtol=0, atol=1e-12)
    product = torch.eye(size + 1, dtype=torch.float64)
    states = torch.arange(size + 1)
    for step in range(steps):
        a = one[step + 1] / one[step]
        c = 1 - (1 - of_masks[step + 1]) / (1 - of_masks[step])
        q = matrix(a, (1 - a - c) / size, c, size)
        product = product @ q
        if step % 9 and step < steps - 1:
            continue
        torch.testing.assert_close(process.step_likelihood(states, alpha[step], alpha[step + 1]), q.T, **CLOSE)
        beta = (1 - one[step + 1] - of_masks[step + 1]) / size
        torch.testing.assert_close(product, matrix(one[step + 1], beta, of_masks[step + 1], size), **CLOSE)
        torch.testing.assert_close(process.matrix(alpha[step + 1]), product, **CLOSE)
        torch.testing.assert_close(process.likelihood(states, alpha[step + 1]), product.T, **CLOSE)
    law = torch.rand(3, size + 1, dtype=torch.float64)
    level = alpha[steps // 2].expand(3)
    torch.testing.assert_close(process.pull(process.push(law, level), level), law, rtol=0, atol=1e-9)
    torch.testing.assert_close(process.prior(), product[0] - matrix(one[-1], 0, 0, size)[0], rtol=0, atol=2 * last[0])


def test_the_schedule_and_its_inverse() -> None:
    times = MaskAndReplaceSchedule(10, first=0.9, last=0.05)
    t = torch.linspace(0, 1, 401, dtype=torch.float64)
    torch.testing.assert_close(times.inverse(times.mask_probability(t)), t, **CLOSE)
    torch.testing.assert_close(times.alpha(t), 1 - times.mask_probability(t), **CLOSE)
    middle = (t[1:] + t[:-1]) / 2  # no point is where the line bends
    slope = (times.mask_probability(t[1:]) - times.mask_probability(t[:-1])) / (t[1] - t[0])
    torch.testing.assert_close(times.derivative(middle), slope, rtol=0, atol=1e-9)
    assert times.ends() == (0.0, pytest.approx(0.95))
    # Next to clean data 1 - alpha has no digits left.
    tiny = times.mask_probability(torch.tensor(1e-20))
    assert float(tiny) == pytest.approx(1e-20, rel=1e-9) and float(noise(3).gamma(1 - tiny, tiny)) > 0


@pytest.mark.parametrize("level", [0.95, 0.5, 0.02])
def test_what_is_drawn_follows_the_kernel(level: float) -> None:
    process, alpha, count = noise(4), torch.tensor([[level]], dtype=torch.float64), 40_000
    uniforms = (torch.arange(count, dtype=torch.float64)[None] + 0.5) / count
    for token in (0, 3):
        tokens = torch.full((1, count), token)
        law = process.matrix(alpha[0])[0, token]
        drawn = process.corrupt(tokens, alpha, uniforms)[0]
        torch.testing.assert_close(drawn.bincount(minlength=5) / count, law.float(), rtol=0, atol=1e-3)
        # The same law, of which what is below `replaced` decides: next to clean data with all digits.
        anew = process.replace(tokens, alpha, uniforms)[0]
        assert torch.equal(anew.bincount(minlength=5), drawn.bincount(minlength=5))
        assert (anew[uniforms[0] >= process.replaced(tokens, alpha)[0]] == token).all()
    first = process.draw_prior(uniforms)[0].bincount(minlength=5) / count
    torch.testing.assert_close(first, process.prior().float(), rtol=0, atol=1e-3)


# --- The model of T steps ---

SMALL, STEPS, LENGTH = 2, 3, 2


def small_network(states: Tensor, level: NoiseLevel) -> Tensor:
    """Any logits of the states and the time."""
    number = (states * torch.tensor([1, 3])).sum(dim=1)[:, None, None].double()
    return torch.sin(torch.arange(1, 5).view(2, 2) * (number + 3 * level.t[:, :1, None]) + 1.3)


def small_denoiser() -> Denoiser:
    """Of noise that ends early, so that the prior term counts."""
    times = MaskAndReplaceSchedule(STEPS, first=FIRST[0], last=0.3)
    return Denoiser(process=noise(SMALL, last=(0.3, 0.5)), schedule=times, head=PosteriorHead(), time_input="time")


def reverse_steps(parts: Denoiser) -> list[Tensor]:
    """p(x_s | x_t) of each step, the noisiest first, as matrices over all sequences of states."""
    states, alpha, made = all_sequences(SMALL + 1, LENGTH), alphas(STEPS, parts.schedule), []
    for step in reversed(range(STEPS)):
        level = NoiseLevel.at(parts.schedule, torch.full((len(states), 1), (step + 1) / STEPS, dtype=torch.float64))
        posterior = parts.head(small_network(states, level), states, level)
        clean = leave_one_out_from_posterior(posterior, states, parts.process, level)
        law = jumps_from_clean(clean, states, parts.process, alpha[step].expand(len(states), 1), level.alpha)
        each = law.distribution(states, SMALL + 1)
        made.append((each[:, 0, :, None] * each[:, 1, None, :]).flatten(1))
    return made


def exact_nats(parts: Denoiser) -> Tensor:
    """-log p of every clean sequence, `(K^N,)`, by the product of the steps."""
    prior = parts.process.prior()
    law = (prior[:, None] * prior).flatten()
    for step in reverse_steps(parts):
        law = law @ step
    clean = law.view(SMALL + 1, SMALL + 1)[:SMALL, :SMALL].flatten()
    assert float(clean.sum()) == pytest.approx(1, abs=1e-9)
    return -clean.log()


def exact_bound(parts: Denoiser) -> Tensor:
    """The bound of every clean sequence, `(K^N,)`, by its definition: a sum over paths of two neighbours."""
    sequences, alpha = all_sequences(SMALL, LENGTH), alphas(STEPS, parts.schedule)
    process, steps = parts.process, reverse_steps(parts)[::-1]

    def both(kernel: Tensor) -> Tensor:
        return torch.einsum("ij,kl->ikjl", kernel, kernel).reshape((SMALL + 1) ** 2, -1)

    clean = torch.tensor([int(a) * (SMALL + 1) + int(b) for a, b in sequences])
    total = torch.zeros(len(sequences), dtype=torch.float64)
    for step in range(STEPS):
        before, states = both(process.matrix(alpha[step]))[clean], torch.arange(SMALL + 1)
        forward = both(process.step_likelihood(states, alpha[step], alpha[step + 1]).T)
        joint = before[:, :, None] * forward  # q(x_s, x_t | x_0)
        after = joint.sum(dim=1, keepdim=True)
        ratio = torch.where(joint > 0, (joint / after).log() - steps[step].T.log(), 0.0)
        total += (joint * ratio).sum(dim=(1, 2))
    return total + process.prior_divergence(sequences, alpha[-1]).sum(dim=1)


@torch.no_grad()
def test_the_bound_is_above_the_exact_value_and_is_what_is_estimated() -> None:
    parts = small_denoiser()
    nats, bound = exact_nats(parts), exact_bound(parts)
    assert (bound > nats).all()
    tokens, rows = all_sequences(SMALL, LENGTH), 4000
    for number, row in enumerate(tokens):
        random = CounterRandom(1, torch.arange(rows))
        found, error = likelihood_bound(small_network, parts, row.expand(rows, -1), random, STEPS, steps=STEPS)
        assert error.shape == (rows,)
        spread = float(found.std()) / rows**0.5
        assert float(-found.mean()) == pytest.approx(float(bound[number]), abs=5 * spread)


@torch.no_grad()
def test_the_sampler_draws_from_the_model_of_its_steps() -> None:
    """By enumeration of its steps, and their law is the data's in the limit of many."""
    backbone = OncePerState(noise(VOCAB_SIZE), PosteriorHead())
    few = AncestralSampler(steps=4)
    law = enumerated_law(few, backbone, schedule(4))
    assert chi_square_p_value(draw_numbers(few, backbone, schedule(4)), law) > 1e-3
    distances = []
    for steps in (4, 16):
        even = MaskAndReplaceSchedule(steps, first=1 - 0.98 / steps, last=LAST[0])
        made = enumerated_law(AncestralSampler(steps=steps), backbone, even)
        distances.append(float((made - reference_law()).abs().sum()))
    assert distances[1] < 0.4 * distances[0]


@torch.no_grad()
def test_truncation_is_of_the_posterior() -> None:
    """The most probable clean id given all tokens is kept, not that given the others."""
    backbone = OncePerState(noise(VOCAB_SIZE), PosteriorHead(), random_law().expand(2, -1))
    states, sampler = all_sequences(VOCAB_SIZE + 1, 3), AncestralSampler(steps=4, top_k=1)
    interval = sampler.intervals(schedule(4), context_of(backbone, len(states), schedule(4)))[2]
    prediction = predict(backbone, backbone.denoiser(schedule(4)), states, interval)
    kept = prediction.clean(sampler.filtered).argmax(dim=-1)
    assert torch.equal(kept, prediction.outputs[0].argmax(dim=-1))
    assert (kept != prediction.clean().argmax(dim=-1)).any()
    kept_alone = sampler.jumps(prediction, interval).distribution(states, VOCAB_SIZE + 1)
    one_hot = torch.nn.functional.one_hot(kept, VOCAB_SIZE).double().log()
    alpha_s, alpha_t = (part.expand(len(states), 1) for part in (interval.alpha_s, interval.alpha_t))
    exact = jumps_from_clean(one_hot, states, backbone.process, alpha_s, alpha_t)
    torch.testing.assert_close(kept_alone, exact.distribution(states, VOCAB_SIZE + 1), rtol=0, atol=1e-9)


def test_samplers_along_rates_refuse_it() -> None:
    backbone = OncePerState(noise(VOCAB_SIZE), PosteriorHead())
    with pytest.raises(ValueError, match="MaskAndReplaceProcess is noise of steps, without rates"):
        draw_numbers(EulerSampler(steps=4), backbone, schedule(4), count=3)


# --- The loss ---


def costs(loss: Any, tokens: Tensor, level: Any, uniforms: Tensor) -> Tensor:
    parts = small_denoiser()
    states = loss.corrupt(parts.process, tokens, level, uniforms)
    logits = small_network(states, level)
    return loss(logits, tokens, head=parts.head, states=states, process=parts.process, level=level)


@torch.no_grad()
def test_without_auxiliary_terms_it_is_the_bound_of_steps() -> None:
    """In whatever way steps are drawn: their weights make up for it."""
    tokens, parts, rows = all_sequences(SMALL, LENGTH), small_denoiser(), 12_000
    bound = exact_bound(parts) - parts.process.prior_divergence(tokens, alphas(STEPS, parts.schedule)[-1]).sum(dim=1)
    plain = VQDiffusionLoss(STEPS, auxiliary_weight=0.0)
    assert plain.label(parts.process, parts.schedule) == "bound"
    assert VQDiffusionLoss(STEPS).label(parts.process, parts.schedule) == "not a bound"
    assert plain.importance is not None
    plain.importance.counts.fill_(11)
    plain.importance.squares.copy_(torch.tensor([1.0, 4.0, 0.25]))
    generator = torch.Generator().manual_seed(0)
    for training in (False, True):
        plain.importance.train(training)
        drawn = torch.rand(rows, 1 + LENGTH, dtype=torch.float64, generator=generator)
        level = plain.level(parts.schedule, drawn[:, :1], LENGTH)
        assert (level.weight == 1).all() == (not training)
        found = costs(plain, tokens[1].expand(rows, -1), level, drawn[:, 1:]).sum(dim=1)
        assert float(found.mean()) == pytest.approx(float(bound[1]), abs=5 * float(found.std()) / rows**0.5)


def test_steps_are_drawn_by_the_root_of_their_mean_square() -> None:
    importance = StepImportance(4)
    uniforms = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    step, weight = importance.draw(uniforms)
    assert (step.bincount() == 250).all() and (weight == 1).all()
    for _ in range(11):
        importance.observe(torch.tensor([0, 1, 2, 3, 3]), torch.tensor([9.0, 2.0, 1.0, 1.0, 3.0]))
    assert importance.counts.tolist() == [11, 11, 11, 22]
    decay = 1 - 0.9**11  # of the mean of what came together
    torch.testing.assert_close(importance.squares, decay * torch.tensor([81.0, 4.0, 1.0, 5.0]))
    roots = torch.tensor([4.0, 4.0, 1.0, 5.0], dtype=torch.float64).sqrt()  # the first as the second
    torch.testing.assert_close(importance.probabilities(), roots / roots.sum(), rtol=0, atol=1e-4)
    step, weight = importance.draw(uniforms)
    torch.testing.assert_close(step.bincount() / 1000, (roots / roots.sum()).float(), rtol=0, atol=2e-3)
    torch.testing.assert_close(weight, 1 / (4 * importance.probabilities()[step]))
    assert importance.eval().draw(uniforms)[0].bincount().tolist() == [250] * 4


def test_a_batch_teaches_what_its_steps_cost() -> None:
    loss, tokens = VQDiffusionLoss(STEPS, auxiliary_weight=0.5), all_sequences(SMALL, LENGTH)
    assert loss.importance is not None
    level = loss.level(
        small_denoiser().schedule, torch.tensor([[0.1], [0.5], [0.5], [0.9]], dtype=torch.float64), LENGTH
    )
    assert level.step.flatten().tolist() == [0, 1, 1, 2]
    uniforms = torch.rand(4, LENGTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # Of the bound alone: the auxiliary term does not count.
    plain = costs(DiscreteTimeBoundOfPosterior(STEPS), tokens, level, uniforms).sum(dim=1) / STEPS
    costs(loss, tokens, level, uniforms)
    loss.end_batch()
    squares = torch.stack((plain[0] ** 2, (plain[1] ** 2 + plain[2] ** 2) / 2, plain[3] ** 2))
    torch.testing.assert_close(loss.importance.squares.double(), 0.1 * squares, rtol=1e-5, atol=1e-7)
    loss.importance.eval()
    costs(loss, tokens, level, uniforms)
    loss.end_batch()
    assert loss.importance.counts.tolist() == [1, 2, 1]


class DiscreteTimeBoundOfPosterior(DiscreteTimeBound):
    """The bound of T steps of a head of this kind."""

    heads = frozenset({"posterior"})

    def integrand(self, prediction: Tensor, tokens: Tensor, *, states: Any, process: Any, level: Any) -> Tensor:
        clean = leave_one_out_from_posterior(prediction, states, process, level)
        return super().integrand(clean, tokens, states=states, process=process, level=level)


def test_weights_of_the_terms() -> None:
    """lambda (2 - i / T) of the cross-entropy of step i, which is the bound's own at the step to the data."""
    tokens = all_sequences(SMALL, LENGTH)
    made = {}
    for name, settings in {
        "plain": {"auxiliary_weight": 0.0},
        "both": {"auxiliary_weight": 0.5},
        "even": {"auxiliary_weight": 0.5, "adaptive": False},
        "masked": {"auxiliary_weight": 0.5, "mask_weights": (3.0, 1.0)},
    }.items():
        loss = VQDiffusionLoss(STEPS, importance=False, **settings)
        for place in (0.1, 0.5):
            level = loss.level(small_denoiser().schedule, torch.full((4, 1), place, dtype=torch.float64), LENGTH)
            states = torch.full_like(tokens, SMALL)
            parts = small_denoiser()
            logits = small_network(states, level)
            made[name, place] = loss(logits, tokens, head=parts.head, states=states, process=parts.process, level=level)
            entropy = -logits.log_softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
            made["entropy", place] = STEPS * entropy
    torch.testing.assert_close(made["both", 0.1], made["plain", 0.1] * 2)
    torch.testing.assert_close(made["even", 0.1], made["plain", 0.1] * 1.5)
    torch.testing.assert_close(made["masked", 0.1], made["both", 0.1])
    torch.testing.assert_close(made["both", 0.5], made["plain", 0.5] + 0.5 * (2 - 1 / STEPS) * made["entropy", 0.5])
    torch.testing.assert_close(made["even", 0.5], made["plain", 0.5] + 0.5 * made["entropy", 0.5])
    torch.testing.assert_close(made["masked", 0.5], made["both", 0.5] * 3)


# --- What is refused ---


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskAndReplaceSchedule(1), "steps of MaskAndReplaceSchedule must be at least 2, got 1"),
        (lambda: MaskAndReplaceSchedule(9, first=0.1, last=0.2), "0 < last < first < 1 must hold"),
        (lambda: noise(4, last=(0.9, 0.95)), "alpha must fall and gamma rise from first to last"),
        (lambda: noise(4, first=(0.8, 0.3)), "the probability of another id, 1 - alpha - gamma, must not be negative"),
        (lambda: noise(4, last=(0.02, 0.985)), "the probability of another id"),
        (lambda: VQDiffusionLoss(1), "steps of VQDiffusionLoss must be at least 2, got 1"),
        (lambda: VQDiffusionLoss(9, auxiliary_weight=-1), "auxiliary_weight must be >= 0"),
        (lambda: VQDiffusionLoss(9, mask_weights=(1.0,)), "mask_weights two numbers >= 0"),
    ],
)
def test_bad_settings(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
