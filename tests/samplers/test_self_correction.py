"""GIDD's self-correction: what one correction replaces, when a sequence is done, and what it is not for."""

import pytest
import torch
from helpers.diffusion_cases import LABELS, LENGTH, PROCESSES, SIZE, make_model

from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import NoiseLevel
from discrete_lit.samplers import AncestralSampler, SamplingContext, SelfCorrectionSampler
from discrete_lit.samplers.diffusion import NoisyTokens

CLEAN = torch.tensor([[[0.7, 0.2, 0.1], [0.1, 0.3, 0.6], [0.25, 0.25, 0.5]]], dtype=torch.float64).log()


def test_the_surest_of_the_ids_that_differ_are_replaced() -> None:
    tokens = torch.tensor([[1, 1, 1]])
    uniforms = torch.tensor([[0.5, 0.9, 0.3]], dtype=torch.float64)  # draw 0, 2 and 1: the last stays what it is
    for count, expected in ((1, [0, 1, 1]), (2, [0, 2, 1]), (5, [0, 2, 1])):
        sampler = SelfCorrectionSampler(correction_tokens=count, correction_temperature=1.0)
        found, log_probability = sampler.corrected(CLEAN, tokens, uniforms)
        assert found[0].tolist() == expected
        assert log_probability.exp()[0].tolist() == pytest.approx([0.7, 0.6, 0.25])
    known = torch.tensor([[True, False, False]])
    assert sampler.corrected(CLEAN, tokens, uniforms, known=known)[0][0].tolist() == [1, 2, 1]
    # At a low temperature the most probable ids are drawn, and the probabilities are those at the temperature.
    cold = SelfCorrectionSampler(correction_temperature=0.1)
    found, log_probability = cold.corrected(CLEAN, torch.zeros(1, 3, dtype=torch.int64), uniforms)
    assert found[0].tolist() == [0, 0, 2] or found[0].tolist() == [0, 2, 0]
    assert float(log_probability.exp()[0, 1]) == pytest.approx(0.6**10 / (0.6**10 + 0.3**10 + 0.1**10))


WANTED = torch.arange(LENGTH) % SIZE


@torch.no_grad()
def corrected(sampler: SelfCorrectionSampler, sure: float) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Tokens before and after, and how many corrections there were, of a network that wants the same ids whatever it
    sees, as `sure` as it is told."""
    backbone, denoiser = make_model(PROCESSES["gidd"])
    logits = sure * torch.nn.functional.one_hot(WANTED, SIZE).float()
    backbone.register_forward_hook(lambda module, inputs, output: logits.expand(len(output), -1, -1))
    random = CounterRandom(0, torch.arange(len(LABELS)))
    context = SamplingContext(backbone, LABELS, random=random, denoiser=denoiser)
    level = NoiseLevel.at(denoiser.schedule, torch.ones(1, 1))
    x = NoisyTokens(context, denoiser, level=level, steps=sampler.correction_steps)
    x.tokens = WANTED.repeat(len(LABELS), 1)
    x.tokens[:, :4] = torch.arange(4 * len(LABELS)).reshape(-1, 4) % SIZE
    before = x.tokens.clone()
    return before, sampler.finish(x), context.output(x.tokens).sequential_passes


def test_corrections_go_on_until_nothing_changes() -> None:
    before, after, passes = corrected(SelfCorrectionSampler(correction_steps=60, patience=None), 9.0)
    wrong = (before != WANTED).sum(dim=1)
    # One for each wrong id, and one that finds no more.
    assert passes == int(wrong.max()) + 1 > 2 and torch.equal(after, WANTED.expand_as(after))
    _, once, one = corrected(SelfCorrectionSampler(correction_steps=1, patience=None), 9.0)
    assert one == 1 and torch.equal((once != WANTED).sum(dim=1), (wrong - 1).clamp(min=0))


def test_patience_ends_what_does_not_get_better() -> None:
    """Of a network to which all ids are alike, corrections would change something for ever."""
    _, _, passes = corrected(SelfCorrectionSampler(correction_steps=60, patience=3), 0.0)
    _, _, endless = corrected(SelfCorrectionSampler(correction_steps=60, patience=None), 0.0)
    assert passes < 40 and endless == 60


@torch.no_grad()
def test_it_goes_on_from_what_ancestral_steps_drew() -> None:
    backbone, denoiser = make_model(PROCESSES["gidd"])
    random = CounterRandom(0, torch.arange(len(LABELS)))
    plain = AncestralSampler(steps=4)(backbone, LABELS, random, denoiser=denoiser)
    sampler = SelfCorrectionSampler(2, correction_temperature=1.0, steps=4)
    output = sampler(backbone, LABELS, random, denoiser=denoiser)
    assert output.network_calls == plain.network_calls + 2
    assert 0 < int((output.tokens != plain.tokens).sum(dim=1).max()) <= 2


def test_it_is_not_for_models_that_saw_masks_alone() -> None:
    backbone, denoiser = make_model(PROCESSES["absorbing"])
    random = CounterRandom(0, torch.arange(len(LABELS)))
    with pytest.raises(
        ValueError, match="trained on wrong ids, as those of GIDDProcess or UniformProcess; AbsorbingProc"
    ):
        SelfCorrectionSampler()(backbone, LABELS, random, denoiser=denoiser)
