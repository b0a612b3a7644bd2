"""A generator of masked tokens drawn by the samplers of diffusion, and guidance where nothing was learned for it."""

import pytest
import torch

from discrete_lit.diffusion import CosineSchedule
from discrete_lit.samplers import (
    AncestralSampler,
    EulerSampler,
    FirstHittingSampler,
    PredictorCorrectorSampler,
    RemaskingSampler,
    TauLeapingSampler,
)


@pytest.mark.parametrize(
    "sampler",
    [
        AncestralSampler(steps=5, grid=CosineSchedule(), guidance_scale=2.0, clean_up="argmax"),
        AncestralSampler(steps=5, guidance_scale=2.0, guidance_law="transition"),
        EulerSampler(steps=5, guidance_scale=2.0, guidance_law="score"),
        TauLeapingSampler(steps=5, top_p=0.9),
        FirstHittingSampler(guidance_scale=2.0, guidance_schedule="linear"),
        PredictorCorrectorSampler("gibbs", steps=5),
        PredictorCorrectorSampler("forward_backward", steps=5),
        RemaskingSampler("conf", eta=1.0, steps=5),
        RemaskingSampler("loop", eta=0.5, steps=5),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_masked_generators_serve_samplers_of_diffusion(make_generator, sampler) -> None:
    generator = make_generator("masked", spread=0.3)
    labels = torch.arange(6) % 3
    tokens = generator.sample(labels, sampler)
    assert tokens.shape == (6, *generator.token_shape)
    assert 0 <= int(tokens.min()) and int(tokens.max()) < generator.vocab_size
    known = tokens.clone()
    known[:, 0] = -1
    assert torch.equal(generator.sample(labels, sampler, seed=1, known=known)[:, 1:], tokens[:, 1:])


@pytest.mark.parametrize("family", ["masked", "autoregressive"])
def test_guidance_needs_a_null_label_that_was_learned(make_generator, family: str) -> None:
    generator = make_generator(family, label_dropout=0.0)
    sampler = type(generator.sampler)(guidance_scale=1.5)
    with pytest.raises(ValueError, match=r"guidance_scale=1.5 needs a generator that learned the null label"):
        generator.sample(torch.zeros(1, dtype=torch.int64), sampler)
