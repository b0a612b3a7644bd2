"""What no checkpoint of ours is needed for: MaskGIT's own decoding on the toy network of its golden cases, which have
noise alone, and BAR's quantizer, whose tokenizer is SigLIP's network with another decoder."""

from types import SimpleNamespace
from typing import Self

import torch
from torch import Tensor

from discrete_lit.backbones import Cache, SequenceLayout
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion import CosineSchedule
from discrete_lit.samplers import MaskGITSampler
from discrete_lit.tokenizers.quantizers import FiniteScalarQuantizer
from helpers.golden import Case, Tensors
from helpers.golden_generators import SCHEDULES

TOLERANCE = 2e-6
NO_PLACE = {
    "maskgit_jax_decode": {
        "schedule_(pow2_5|log|exp)": "schedules that no published model has, and that ours do not offer"
    }
}


class ToyBackbone:
    """The net of the golden decoding: tanh(M E[ids]) O + P."""

    grid_vocab = None

    def __init__(self, inputs: Tensors) -> None:
        embedded, self.mixing, self.out, self.bias = (inputs[f"toy_{name}"] for name in "EMOP")
        self.embedded = embedded
        self.layout = SequenceLayout(
            len(embedded) - 1, (len(self.mixing),), num_classes=1, attention="bidirectional", mask_token=True
        )
        self.inputs: list[Tensor] = []

    def flops(self, batch: int, tokens: int, filled: int | None) -> int:
        return 0

    def cache_flops(self, batch: int) -> int:
        return 0

    def new_cache(self, labels: Tensor) -> Cache:
        return Cache([], None)

    def __call__(self, tokens: Tensor, labels: Tensor, cache: Cache, order: None, time: None) -> Tensor:
        self.inputs.append(tokens)
        return (self.mixing @ self.embedded[tokens]).tanh() @ self.out + self.bias


class GivenNoise(CounterRandom):
    """Gumbel noise of a case `(T, B, N)` in place of the confidence noise."""

    def __init__(self, noise: Tensor) -> None:
        super().__init__(0, torch.arange(noise.shape[1]))
        self.noise = noise

    def ahead(self, steps: int) -> Self:
        return self

    def gumbel(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
        assert purpose == Purpose.CONFIDENCE and count == self.noise.shape[2]
        return self.noise[step].double()


class GivenDraws(MaskGITSampler):
    """Draws by the case's Gumbel noise: argmax(logits + noise), at the masked positions of each step in turn."""

    def __init__(self, noise: Tensor, backbone: ToyBackbone, **settings) -> None:
        super().__init__(**settings)
        self.noise, self.backbone = noise, backbone
        self.drawn: list[Tensor] = []

    def choose(self, log_probabilities: Tensor, uniforms: Tensor, temperature: float | None = None):
        masked = self.backbone.inputs[-1] == self.backbone.layout.mask_id
        drawn_at = log_probabilities.shape[1]
        if drawn_at == masked.shape[1]:  # all positions, in their own order
            places = torch.arange(drawn_at).expand(len(masked), -1)
        else:
            places = masked.byte().argsort(dim=1, descending=True, stable=True)[:, :drawn_at]
        noise = self.noise[len(self.drawn)].gather(1, places[..., None].expand(-1, -1, self.noise.shape[-1]))
        ids = (log_probabilities + noise).argmax(dim=-1)
        drawn = torch.where(masked, self.backbone.inputs[-1].scatter(1, places, ids), self.backbone.inputs[-1])
        self.drawn.append(drawn)
        return ids, log_probabilities.log_softmax(dim=-1).gather(-1, ids[..., None])[..., 0]


class GivenConfidence(MaskGITSampler):
    """One step whose drawn ids have given probabilities `(1, N)`, with noise of one temperature."""

    def __init__(self, probabilities: Tensor, temperature: float, masked: int) -> None:
        super().__init__(steps=1)
        self.probabilities, self.temperature_of_noise, self.masked = probabilities, temperature, masked

    def draw_scored(self, logits: Tensor, uniforms: Tensor, r: float) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(self.probabilities, dtype=torch.int64), self.probabilities.double().log()

    def noise_scale(self, step: int) -> float:
        return self.temperature_of_noise

    def masked_counts(self, unknown: int) -> list[int]:
        return [self.masked]


class Float32Cosine(CosineSchedule):
    """As the released code computes it: 16 cos(pi / 3) falls below 8 in float32."""

    def mask_probability(self, t: Tensor) -> Tensor:
        return torch.cos((1 - t).float() * (torch.pi / 2)).double()


def masked_by_confidence(case: Case) -> Tensor:
    """What one step masks again in each row, all tokens being drawn."""
    probabilities, counts = case.inputs["topk_probs"], case.inputs["topk_mask_len"][:, 0].tolist()
    temperature, length = float(case.inputs["topk_temperature"]), probabilities.shape[1]
    layout = SequenceLayout(1, (length,), num_classes=1, attention="bidirectional", mask_token=True)
    start = torch.full((1, length), layout.mask_id)
    masked = []
    for row, count in enumerate(counts):
        context = SimpleNamespace(
            layout=layout,
            random=GivenNoise(case.inputs["topk_gumbel"][None, row : row + 1]),
            denoiser=None,
            start=lambda: start,
            unknown=lambda: start == layout.mask_id,
            unknown_counts=lambda: [length],
            predict=lambda tokens, scale: torch.zeros(1, length, 1),
            record=lambda tokens, confidence: None,
        )
        sampler = GivenConfidence(probabilities[row : row + 1], temperature, count)
        masked.append(sampler.draw(context) == layout.mask_id)  # type: ignore[arg-type]
    return torch.cat(masked).to(torch.uint8)


def maskgit_jax_decode(case: Case) -> Tensors:
    constructor, inputs = case.constructor, case.inputs
    schedules = {**SCHEDULES, "cosine": Float32Cosine()}
    backbone = ToyBackbone(inputs)
    mask_id = backbone.layout.mask_id
    sampler = GivenDraws(
        inputs["sample_gumbel"],
        backbone,
        steps=constructor["num_iter"],
        choice_temperature=constructor["temp"],
        mask_schedule=schedules[constructor["method"]],
    )
    start = inputs["init_ids"]
    labels, known = torch.zeros(len(start), dtype=torch.int64), torch.where(start == mask_id, -1, start)
    output = sampler(backbone, labels, GivenNoise(inputs["mask_gumbel"]), known=known)  # type: ignore[arg-type]
    fed = torch.stack(backbone.inputs)
    decoded = torch.stack(sampler.drawn, dim=1)
    assert torch.equal(output.tokens, decoded[:, -1])
    made = {
        "inputs_per_step": fed,
        "decoded_per_step": decoded,
        "masked_per_step": (fed == mask_id).sum(dim=2),
        "topk_mask": masked_by_confidence(case),
    }
    for name, found in case.matching("schedule_(.*)").items():
        if found[1] in SCHEDULES:
            ratios = SCHEDULES[found[1]].mask_probability(1 - inputs["ratio"].double())
            made[name] = ratios.clamp(1e-6, 1).float()
    return made


def bar_fsq(case: Case) -> Tensors:
    """Its codes are -1 and 1 where ours are -1 and 0, which the linear layer behind them takes up."""
    weights = case.state
    quantizer = FiniteScalarQuantizer([2] * case.constructor["token_size"], formula="atanh")

    def projected(layer: str, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weights[f"quantize.{layer}.weight"], weights[f"quantize.{layer}.bias"])

    def out(codes: Tensor) -> Tensor:
        return projected("out_proj", 2 * codes + 1)

    z = case.inputs["z"].clone().requires_grad_()
    with torch.enable_grad():
        latents = projected("in_proj", z)
        quantized = quantizer(latents)
        quant = out(quantized.z_q)
        quant.square().mean().backward()
    width = quantizer.dim
    bits = case.inputs["bits"].unflatten(1, (-1, width))
    ids = (bits << torch.arange(width)).sum(dim=-1)
    assert z.grad is not None
    return {
        "projected": latents,
        "bounded": quantizer.bound(latents),
        "quant": quant,
        "indices": quantized.tokens[..., None] >> torch.arange(width) & 1,
        "grad_z": z.grad,
        "codes_from_bits": out(quantizer.lookup(ids)),
    }


OUTPUTS = {"maskgit_jax_decode": maskgit_jax_decode, "bar_fsq": bar_fsq}
