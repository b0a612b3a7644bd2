"""MaskGIT's sampler against `diffusers`' AmusedScheduler, the one of UVit2D: counts, and every step on the same noise.

Of 6 steps it would mask 7 of 16 tokens after the fourth, not 8: its float32 cosine of 60 degrees is below a half.
"""

import pytest
import torch

from discrete_lit.backbones import SequenceLayout
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion import CosineSchedule, LinearSchedule
from discrete_lit.samplers import MaskGITSampler
from discrete_lit.samplers.categorical import draw_categorical

pytestmark = pytest.mark.parity
SCHEDULES = {"cosine": CosineSchedule(), "linear": LinearSchedule()}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("length", "steps"), [(256, 8), (256, 16), (64, 8), (64, 5), (100, 7), (16, 4)])
def test_reveal_counts(schedule: str, length: int, steps: int) -> None:
    from diffusers import AmusedScheduler

    scheduler = AmusedScheduler(mask_token_id=5, masking_schedule=schedule)
    scheduler.set_timesteps(steps)
    sample, counts = torch.full((1, length), 5), []
    for time in scheduler.timesteps:
        sample = scheduler.step(torch.zeros(1, length, 5), time, sample).prev_sample
        counts.append(int((sample == 5).sum()))
    sampler = MaskGITSampler(steps=steps, mask_schedule=SCHEDULES[schedule])
    assert sampler.masked_counts(length) == counts


@pytest.mark.parametrize("schedule", SCHEDULES)
@torch.no_grad()
def test_every_step_on_the_same_noise(schedule: str, make_layout_backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its ids are drawn by our uniform numbers and ordered by our Gumbel noise; its temperatures fall to 0 as ours."""
    from diffusers import AmusedScheduler
    from diffusers.schedulers import scheduling_amused

    layout = SequenceLayout(5, (4, 4), num_classes=2, attention="bidirectional", mask_token=True)
    backbone = make_layout_backbone(layout)
    labels, steps, noise = torch.arange(6) % 3, 5, 3.0
    random = CounterRandom(0, torch.arange(6))
    sampler = MaskGITSampler(steps=steps, choice_temperature=noise, mask_schedule=SCHEDULES[schedule])
    ours = sampler(backbone, labels, random, trace=True)

    scheduler = AmusedScheduler(mask_token_id=layout.mask_id, masking_schedule=schedule)
    scheduler.set_timesteps(steps, temperature=(noise * (1 - 1 / steps), 0))
    sample = torch.full((6, 16), layout.mask_id)
    for step, time in enumerate(scheduler.timesteps):
        uniforms = random.uniform(Purpose.TOKEN, 16, step)
        gumbel = random.gumbel(Purpose.CONFIDENCE, 16, step)
        monkeypatch.setattr(
            torch,
            "multinomial",
            lambda law, count, generator, u=uniforms: draw_categorical(law.log(), u.flatten())[:, None],
        )
        monkeypatch.setattr(scheduling_amused, "gumbel_noise", lambda like, generator, g=gumbel: g)
        sample = scheduler.step(backbone(sample, labels), time, sample).prev_sample
        assert torch.equal(sample, ours.trace[step].tokens), step
    assert torch.equal(sample, ours.tokens)
