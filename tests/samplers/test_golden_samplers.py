"""Samplers against what the published repositories' own code computes; needs the golden files and no network.

DISCRETE_LIT_GOLDEN names their folder; without it these tests are skipped.
"""

import os
from itertools import pairwise
from math import pi
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from discrete_lit.backbones import Cache, SequenceLayout
from discrete_lit.processes import (
    ArccosSchedule,
    CosineSchedule,
    CounterRandom,
    LinearSchedule,
    MaskSchedule,
    Purpose,
    SquareSchedule,
)
from discrete_lit.samplers import HaltonConfidenceSampler, HaltonSampler, MaskBitSampler, MaskGITSampler, TiTokSampler
from discrete_lit.samplers.categorical import filter_logits
from discrete_lit.samplers.guidance import guidance_scales
from discrete_lit.samplers.halton import halton_order


@pytest.fixture
def golden():
    """`golden(family)`: its tensors by their names, `in.` and `out.` included."""

    def load(family: str) -> dict[str, Tensor]:
        folder = os.environ.get("DISCRETE_LIT_GOLDEN")
        if not folder:
            pytest.skip("DISCRETE_LIT_GOLDEN does not name the folder of golden files")
        return load_file(Path(folder) / family / "a.safetensors")

    return load


@pytest.mark.parametrize("side", [8, 16, 24])
def test_halton_order(golden, side: int) -> None:
    rows_and_columns = golden("halton_maskgit")[f"out.halton_order_{side}"]
    assert torch.equal(halton_order(side, side), rows_and_columns[:, 0] * side + rows_and_columns[:, 1])


def test_halton_counts(golden) -> None:
    tensors = golden("halton_maskgit")
    new = tensors["out.halton_masks"].flatten(2).sum(2).tolist()
    written = tensors["out.halton_masks_older_sampler"].flatten(2).sum(2).tolist()
    known = HaltonSampler(steps=6).revealed_counts(64)
    assert [[after - before] * 2 for before, after in pairwise([0, *known])] == new
    assert [[after] * 2 for after in known] == written


class RootSchedule(MaskSchedule):
    """A share sqrt(r) of the tokens is known: m = 1 - sqrt(1 - t)."""

    def mask_probability(self, t: Tensor) -> Tensor:
        return 1 - torch.sqrt(1 - t.double())

    def derivative(self, t: Tensor) -> Tensor:
        return 0.5 / torch.sqrt(1 - t.double())

    def inverse(self, m: Tensor) -> Tensor:
        return 1 - (1 - m.double()) ** 2


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("root", RootSchedule()),
        ("linear", LinearSchedule()),
        ("square", SquareSchedule()),
        ("cosine", CosineSchedule()),
        ("arccos", ArccosSchedule()),
    ],
)
def test_cumulative_counts_of_the_confidence_sampler(golden, name: str, schedule: MaskSchedule) -> None:
    """The published table starts from 0 known tokens; its sampler raises each to one more than the step's number."""
    known = golden("halton_maskgit")[f"out.sequence_{name}"].tolist()
    masked = HaltonConfidenceSampler(steps=8, mask_schedule=schedule).masked_counts(256)
    assert [256 - count for count in masked] == [max(step + 1, count) for step, count in enumerate(known)]


def test_masked_after_each_step_of_the_confidence_sampler(golden) -> None:
    masks = golden("halton_maskgit")["out.confidence_masks_after"].flatten(2).sum(2)
    assert [[count] * 2 for count in HaltonConfidenceSampler(steps=6).masked_counts(64)] == masks.tolist()


@pytest.mark.parametrize(
    ("name", "steps", "scale", "schedule"),
    [("constant", 5, 3.0, "constant"), ("linear", 8, 4.0, "linear"), ("power_cosine", 6, 4.0, "power_cosine")],
)
def test_masked_tokens_at_each_call_of_titok(golden, name: str, steps: int, scale: float, schedule) -> None:
    """Two calls a guided step; the released code also calls twice where its power-cosine scale is 1, the first step."""
    counts = [16, *TiTokSampler(steps=steps).masked_counts(16)][:-1]
    scales = guidance_scales(schedule, scale, steps, power=2.0)
    calls = [2 if scale != 1 or name == "power_cosine" else 1 for scale in scales]
    expected = [count for count, repeats in zip(counts, calls, strict=True) for _ in range(repeats)]
    assert golden("titok_imagebert")[f"out.masked_per_call_{name}"].tolist() == [[count] * 2 for count in expected]


@pytest.mark.parametrize(("family", "units"), [("maskbit_bert", 16), ("maskbit_lfqbert", 32)])
def test_masked_units_at_each_step_of_maskbit(golden, family: str, units: int) -> None:
    inputs = golden(family)["out.inputs_per_step"].flatten(2)
    mask_id = 64 if family == "maskbit_bert" else 16
    counts = [units, *MaskBitSampler(steps=6).masked_counts(units)][:-1]
    assert (inputs == mask_id).sum(dim=2).tolist() == [[count] * 2 for count in counts]


@pytest.mark.parametrize(
    ("name", "top_k", "top_p"), [("top_k9", 9, None), ("top_p07", None, 0.7), ("k12_p08", 12, 0.8)]
)
def test_filters_of_var(golden, name: str, top_k: int | None, top_p: float | None) -> None:
    tensors = golden("var_transformer")
    probabilities = filter_logits(tensors["in.sampler_logits"], top_k, top_p).softmax(dim=-1)
    expected = tensors[f"out.sampler_probs_{name}"]
    assert torch.equal(probabilities > 0, expected > 0)
    torch.testing.assert_close(probabilities, expected, rtol=1e-5, atol=1e-6)


class ToyBackbone:
    """The net of the golden decoding: tanh(M E[ids]) O + P."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.layout = SequenceLayout(20, (16,), 1, "bidirectional", mask_token=True)
        self.tensors = tensors
        self.inputs: list[Tensor] = []

    def flops(self, batch: int, tokens: int, cache: Cache) -> int:
        return 0

    def cache_flops(self, batch: int) -> int:
        return 0

    def new_cache(self, labels: Tensor) -> Cache:
        return Cache([], None)

    def __call__(self, tokens: Tensor, labels: Tensor, cache: Cache, order: None, time: None) -> Tensor:
        self.inputs.append(tokens)
        embedded, mixing, out, bias = (self.tensors[f"in.toy_{name}"] for name in "EMOP")
        return (mixing @ embedded[tokens]).tanh() @ out + bias


class GivenNoise(CounterRandom):
    """Gumbel noise of a file in place of the confidence noise."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__(0, torch.arange(noise.shape[1]))
        self.noise = noise

    def gumbel(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
        assert purpose == Purpose.CONFIDENCE and count == self.noise.shape[2]
        return self.noise[step].double()


class GivenDraws(MaskGITSampler):
    """Draws by the file's Gumbel noise: argmax(logits + noise), at the masked places of each step in turn."""

    def __init__(self, noise: Tensor, backbone: ToyBackbone, **settings) -> None:
        super().__init__(**settings)
        self.noise, self.backbone = noise, backbone
        self.drawn: list[Tensor] = []

    def choose(self, log_probabilities: Tensor, uniforms: Tensor, temperature: float | None = None):
        masked = self.backbone.inputs[-1] == 20
        places = masked.byte().argsort(dim=1, descending=True, stable=True)[:, : log_probabilities.shape[1]]
        noise = self.noise[len(self.drawn)].gather(1, places[..., None].expand(-1, -1, 20))
        ids = (log_probabilities + noise).argmax(dim=-1)
        self.drawn.append(self.backbone.inputs[-1].scatter(1, places, ids))
        return ids, log_probabilities.log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]


class Float32Cosine(CosineSchedule):
    """As the released code computes it: 16 cos(pi / 3) falls below 8 in float32."""

    def mask_probability(self, t: Tensor) -> Tensor:
        return torch.cos((1 - t).float() * (pi / 2)).double()


def test_decoding_of_maskgit(golden) -> None:
    tensors = golden("maskgit_jax_decode")
    backbone = ToyBackbone(tensors)
    sampler = GivenDraws(tensors["in.sample_gumbel"], backbone, steps=6, mask_schedule=Float32Cosine())
    random = GivenNoise(tensors["in.mask_gumbel"])
    output = sampler(backbone, torch.zeros(2, dtype=torch.int64), random)  # type: ignore[arg-type]
    assert torch.equal(torch.stack(backbone.inputs), tensors["out.inputs_per_step"])
    assert torch.equal(torch.stack(sampler.drawn, dim=1), tensors["out.decoded_per_step"])
    assert torch.equal(output.tokens, tensors["out.decoded_per_step"][:, -1])
    assert (torch.stack(backbone.inputs) == 20).sum(dim=2).equal(tensors["out.masked_per_step"])


@pytest.mark.parametrize(
    ("name", "schedule"), [("uniform", LinearSchedule()), ("cosine", CosineSchedule()), ("pow2", SquareSchedule())]
)
def test_schedules_of_maskgit(golden, name: str, schedule: MaskSchedule) -> None:
    tensors = golden("maskgit_jax_decode")
    ours = schedule.mask_probability(1 - tensors["in.ratio"].double()).clamp(1e-6, 1)
    torch.testing.assert_close(ours.float(), tensors[f"out.schedule_{name}"], rtol=1e-5, atol=2e-6)
