"""What our samplers draw from the published generators of the golden files, by the names of their outputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from discrete_lit.processes import (
    ArccosSchedule,
    CosineSchedule,
    CounterRandom,
    LinearSchedule,
    MaskSchedule,
    SquareSchedule,
)
from discrete_lit.samplers import (
    HaltonConfidenceSampler,
    HaltonSampler,
    MaskBitSampler,
    NextScaleSampler,
    RasterSampler,
    Sampler,
    TiTokSampler,
)
from discrete_lit.samplers.categorical import filter_logits
from discrete_lit.samplers.guidance import guidance_scales
from discrete_lit.samplers.halton import halton_order

Tensors = dict[str, Tensor]
Inputs = Mapping[str, Tensor]


class MostProbable(Sampler):
    """Takes the most probable id and keeps its probability among all ids, which `top_k=1` would make 1."""

    def choose(
        self, log_probabilities: Tensor, uniforms: Tensor, temperature: float | None = None
    ) -> tuple[Tensor, Tensor]:
        best = (log_probabilities / (temperature or self.temperature)).log_softmax(dim=-1).max(dim=-1)
        return best.indices, best.values


class GreedyHaltonConfidence(MostProbable, HaltonConfidenceSampler):
    pass


class GreedyMaskBit(MostProbable, MaskBitSampler):
    pass


def guided(generator: Any, tokens: Tensor, labels: Tensor, scales: Sequence[float]) -> Tensor:
    """Logits `(B, n, K)` with a scale for each of the n places."""
    null = torch.full_like(labels, generator.num_classes)
    conditional, unconditional = (generator.backbone(tokens, label) for label in (labels, null))
    return unconditional + torch.tensor(scales)[:, None] * (conditional - unconditional)


def greedy(generator: Any, labels: Tensor, known: Tensor | None = None, **settings: Any) -> Tensor:
    return generator.sample(labels, RasterSampler(top_k=1, **settings), known=known).flatten(1)


def traced(generator: Any, labels: Tensor, sampler: Sampler) -> tuple[Tensor, Tensor, Tensor]:
    """The grids that were drawn; the sequences `(T, B, N)` before and after each step."""
    random = CounterRandom(0, torch.arange(len(labels)))
    output = generator.draw(labels, random, sampler, trace=True)
    after = torch.stack([step.tokens for step in output.trace])
    start = torch.full_like(after[:1], generator.backbone.layout.mask_id)
    return output.tokens, torch.cat([start, after[:-1]]), after


def most_probable(generator: Any, before: Tensor, labels: Tensor, scales: Sequence[float]) -> Tensor:
    """`(T, B, N)`: the ids that each step would draw everywhere."""
    length = before.shape[-1]
    steps = zip(before, scales, strict=True)
    return torch.stack([guided(generator, tokens, labels, [scale] * length).argmax(dim=-1) for tokens, scale in steps])


def taming_net2net(generator: Any, inputs: Inputs) -> Tensors:
    labels, tokenizer = inputs["c"], generator.tokenizer
    tokens = tokenizer.encode(inputs["x"]).flatten(1)
    half = tokens.shape[1] // 2
    known = torch.cat([tokens[:, :half], torch.full_like(tokens[:, half:], -1)], dim=1)
    drawn = greedy(generator, labels)
    return {
        "greedy_indices": drawn,
        "greedy_logits": generator.backbone(drawn[:, :-1], labels),
        "greedy_image": tokenizer.network.decode(tokenizer.embed(generator.to_grid(drawn))),
        "greedy_from_half": greedy(generator, labels, generator.to_grid(known)),
    }


def llamagen_gpt_c2i(generator: Any, inputs: Inputs) -> Tensors:
    labels, interval = inputs["y"], int(inputs["cfg_interval"])
    twice = greedy(generator, labels, guidance_scale=2.0)
    return {
        "greedy_nocfg": greedy(generator, labels),
        "greedy_cfg2": twice,
        "greedy_cfg3_interval": greedy(generator, labels, guidance_scale=3.0, guidance_interval=(0, interval + 2)),
        "cfg2_logits_on_greedy": guided(generator, twice[:, :-1], labels, [2.0] * twice.shape[1]),
    }


def rar(generator: Any, inputs: Inputs) -> Tensors:
    labels = inputs["y"]
    schedule: Any = {"guidance_schedule": "power_cosine", "guidance_power": 1.5}
    drawn = greedy(generator, labels, guidance_scale=4.0, **schedule)
    scales = guidance_scales("power_cosine", 4.0, drawn.shape[1], power=1.5)
    return {
        "greedy_nocfg": greedy(generator, labels),
        "greedy_cfg": drawn,
        "greedy_cfg_logits": guided(generator, drawn[:, :-1], labels, scales),
    }


def halton_maskgit(generator: Any, inputs: Inputs) -> Tensors:
    labels, shape = inputs["y"], generator.token_shape
    mask_id = generator.backbone.layout.mask_id
    made: Tensors = {}
    for variant, suffix in (("newer", ""), ("older", "_older_sampler")):
        sampler = HaltonSampler(steps=6, variant=variant, guidance_scale=3.0, top_k=1)
        drawn, before, after = traced(generator, labels, sampler)
        written = after != mask_id
        if variant == "newer":
            written &= before == mask_id
        made |= {
            f"halton_greedy{suffix}": drawn,
            f"halton_inputs{suffix}": before.unflatten(-1, shape),
            f"halton_masks{suffix}": written.to(torch.uint8).unflatten(-1, shape),
        }
    confidence = GreedyHaltonConfidence(steps=6, choice_temperature=0.0, guidance_scale=3.0)
    _, before, after = traced(generator, labels, confidence)
    made |= {
        "confidence_inputs": before.unflatten(-1, shape),
        "confidence_pred_codes": most_probable(generator, before, labels, confidence.scales(6)).unflatten(-1, shape),
        "confidence_masks_after": (after == mask_id).to(torch.uint8).unflatten(-1, shape),
    }
    for side in (8, 16, 24):
        order = halton_order(side, side)
        made[f"halton_order_{side}"] = torch.stack([order // side, order % side], dim=1)
    schedules: dict[str, MaskSchedule] = {
        "linear": LinearSchedule(),
        "square": SquareSchedule(),
        "cosine": CosineSchedule(),
        "arccos": ArccosSchedule(),
    }
    for name, schedule in schedules.items():
        masked = HaltonConfidenceSampler(steps=8, mask_schedule=schedule).masked_counts(256)
        # The reference counts 0 before its first step and raises that to 1 where it is used.
        assert masked[0] == 255
        made[f"sequence_{name}"] = 256 - torch.tensor([256, *masked[1:]])
    return made


def titok(generator: Any, inputs: Inputs) -> Tensors:
    settings: dict[str, dict[str, Any]] = {
        "constant": {"steps": 5, "guidance_scale": 3.0, "guidance_schedule": "constant"},
        "linear": {"steps": 8, "guidance_scale": 4.0, "guidance_schedule": "linear"},
        "power_cosine": {
            "steps": 6,
            "guidance_scale": 4.0,
            "guidance_schedule": "power_cosine",
            "guidance_power": 2.0,
            "temperature_annealing": True,
        },
    }
    made: Tensors = {}
    for name, setting in settings.items():
        drawn, before, _ = traced(generator, inputs["y"], TiTokSampler(choice_temperature=0.0, **setting))
        masked = (before == generator.backbone.layout.mask_id).sum(dim=-1)  # (T, B)
        # The reference calls twice in every step but the first of the linear schedule.
        calls = torch.tensor([1 if name == "linear" and step == 0 else 2 for step in range(len(masked))])
        made |= {f"greedy_{name}": drawn, f"masked_per_call_{name}": masked.repeat_interleave(calls, dim=0)}
    return made


def maskbit(generator: Any, inputs: Inputs) -> Tensors:
    labels, groups = inputs["y"], inputs["split"].shape[-1]
    sampler = GreedyMaskBit(steps=6, choice_temperature=0.0, guidance_scale=4.0, guidance_power=2.5)
    drawn, before, _ = traced(generator, labels, sampler)
    predicted = most_probable(generator, before, labels, sampler.scales(6))
    predicted = torch.where(before == generator.backbone.layout.mask_id, predicted, before)
    return {
        "sampled": drawn.flatten(1),
        "inputs_per_step": before.unflatten(-1, (-1, groups)),
        "sampled_per_step": predicted.unflatten(-1, (-1, groups)),
    }


def var_transformer(generator: Any, inputs: Inputs) -> Tensors:
    labels, tokenizer = inputs["y"], generator.tokenizer
    lengths = torch.tensor(tokenizer.quantizer.lengths)
    drawn = generator.sample(labels, NextScaleSampler(guidance_scale=2.5, top_k=1))
    plain = generator.sample(labels, NextScaleSampler(top_k=1))
    scales = torch.tensor(guidance_scales("scale_linear", 2.5, len(lengths))).repeat_interleave(lengths)
    filters = {"top_k9": (9, None), "top_p07": (None, 0.7), "k12_p08": (12, 0.8)}
    return {
        "greedy_indices": drawn,
        "greedy_cfg_logits": guided(generator, tokenizer.quantizer.teacher_forcing(drawn), labels, scales.tolist()),
        "greedy_fhat": tokenizer.embed(drawn),
        "greedy_image": (tokenizer.decode(drawn) + 1) / 2,
        "greedy_nocfg_indices": plain,
        "greedy_nocfg_image": (tokenizer.decode(plain) + 1) / 2,
        **{
            f"sampler_probs_{name}": filter_logits(inputs["sampler_logits"], *settings).softmax(dim=-1)
            for name, settings in filters.items()
        },
    }


SAMPLES = {
    "taming_net2net": taming_net2net,
    "llamagen_gpt_c2i": llamagen_gpt_c2i,
    "rar": rar,
    "halton_maskgit": halton_maskgit,
    "maskbit_bert": maskbit,
    "maskbit_lfqbert": maskbit,
    "titok_imagebert": titok,
    "titok_uvitbert": titok,
    "var_transformer": var_transformer,
}
