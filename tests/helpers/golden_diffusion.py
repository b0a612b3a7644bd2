"""What our generators make of the golden cases' noisy text, by the names of the reference's outputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit import diffusion
from discrete_lit.diffusion import ForwardProcess, LinearSchedule, MaskSchedule, NoiseLevel, ScoreHead
from discrete_lit.diffusion.parameterization import posterior_from_leave_one_out, score_from_leave_one_out
from discrete_lit.diffusion.reverse import (
    analytic_weights,
    denoise_weights,
    euler_weights,
    jumps_from_clean,
    reverse_rates,
)
from discrete_lit.pretrained.sedd_mdlm import SCHEDULES, schedule
from discrete_lit.pretrained.settings import Settings
from helpers.golden import Case, Compared, Load, Tensors

TOLERANCE = 1e-5
NO_PLACE = {
    "mdlm": {
        "d3pm": "it gives the mask id, which no clean token is, a probability",
        r"d3pm_loss_T\d+": "of that parametrisation",
    },
}


def without_mask(case: Case, values: Tensor) -> Tensor:
    """The logit of the mask id, to which MDLM gives no probability, is left out, or stands for nothing."""
    return values[..., torch.arange(values.shape[-1]) != case.constructor["mask_index"]]


def mask_within(case: Case) -> bool:
    """Whether the mask has an id among those of the text tokenizer; ours then follows all of them."""
    return case.constructor["mask_index"] < len(case.state["backbone.vocab_embed.embedding"]) - 1


def with_mask(case: Case, values: Tensor, fill: float) -> Tensor:
    """With a column of `fill` for the mask id, in the reference's order."""
    if mask_within(case):
        return values.index_fill(-1, torch.tensor(case.constructor["mask_index"]), fill)
    before, after = values.tensor_split([case.constructor["mask_index"]], dim=-1)
    return torch.cat([before, torch.full_like(values[..., :1], fill), after], dim=-1)


def by_reference(case: Case, values: Tensor) -> Tensor:
    """Values `(..., S)` of all states with that of the mask at the reference's place."""
    if not mask_within(case):
        return values
    place = torch.tensor([case.constructor["mask_index"]])
    return values[..., :-1].index_copy(-1, place, values[..., -1:])


def exchanged(case: Case, states: Tensor, mask_id: int, *, back: bool = False) -> Tensor:
    """The reference's ids as ours, or ours as the reference's."""
    masks = case.constructor["mask_index"], mask_id
    old, new = masks[::-1] if back else masks
    return torch.where(states == old, new, states)


def masked(case: Case, values: Tensor) -> Tensor:
    """The reference copies known tokens over what it computed there."""
    return values[case.inputs["xt"] == case.constructor["mask_index"]]


def noisy(case: Case, values: Tensor) -> Tensor:
    """Its ratio 1 - K / (exp(sigma) - 1 + K), about sigma / K, is the difference of two float32 numbers near 1, off by
    half their spacing, 2^-24: within the tolerance where sigma is above K 2^-24 / tolerance."""
    return values[case.expected["sigma"] > case.constructor["tokens"] * 2**-24 / TOLERANCE]


def step_noise(case: Case) -> Tensor:
    """The noise of the samplers' step, sigma(t) - sigma(t - dt), `(B,)` float64."""
    noise = case.constructor.get("noise") or case.constructor["config"]["noise"]
    described = schedule(Settings(noise), "loglinear", tuple(SCHEDULES))
    own = getattr(diffusion, described["class_path"].rpartition(".")[2])(**described["init_args"])
    step = case.inputs["dt" if case.family == "mdlm" else "step"]
    now, then = (NoiseLevel.at(own, t[:, None]).sigma[:, 0] for t in (case.inputs["t"], case.inputs["t"] - step))
    return now - then


def within_precision(case: Case, weights: Tensor) -> Tensor:
    """The reference computes 1 - exp(-noise of the step) in float32, which is off by 2^-24, and the weight of staying
    masked as the difference of two numbers near exp(noise of the step), off by as much of these. Left out are steps of
    so little noise that the first is above the tolerance, and of so much that the second is."""
    noise, place = step_noise(case), case.constructor.get("mask_index", case.constructor.get("tokens"))
    cancelled = noise.exp() * 2**-24 > TOLERANCE
    kept = weights.masked_fill(cancelled[:, None, None] & (torch.arange(weights.shape[-1]) == place), 0.0)
    return kept[noise > 2**-24 / TOLERANCE]


def probabilities(case: Case, values: Tensor) -> Tensor:
    """Finite logarithms of the reference stand for -inf."""
    return values.exp()


# What both sides are made into.
BOTH: Compared = {
    "mdlm": {
        "ddpm_weights": masked,
        "ddpm_cache_weights": masked,
        "subs": probabilities,
        "analytic_weights": within_precision,
    },
    "sedd_absorb": {"analytic_weights": within_precision},
    "sedd_uniform": {"score_entropy": noisy, "loss": noisy},
}
COMPARED: Compared = {
    **BOTH,
    "mdlm": {**BOTH["mdlm"], **{name: without_mask for name in ("backbone_logits", "backbone_logits_sigma", "sedd")}},
}


def logits(generator: Any, states: Tensor, level: NoiseLevel) -> Tensor:
    labels = torch.zeros(len(states), dtype=torch.int64)
    return generator.backbone(states, labels, time=generator.denoiser().network_time(level))


def noise(schedule: MaskSchedule, t: Tensor) -> Tensors:
    """By the reference's names, each `(B,)`."""
    level = NoiseLevel.at(schedule, t[:, None])
    named = {"sigma": level.sigma, "dsigma": level.rate, "move_chance": level.noise}
    return {name: value[:, 0] for name, value in named.items()}


def rate_matrix(process: ForwardProcess) -> Tensor:
    rates = process.rates_into(torch.arange(process.states)).T
    return rates - rates.sum(dim=1).diag()


def uniforms_of(process: ForwardProcess, alpha: Tensor, uniforms: Tensor, jumps: Tensor | None) -> Tensor:
    """What our `corrupt` draws as the reference does: it moves where `uniforms` are small, ours where they are large,
    and what ours are above alpha says where to."""
    if jumps is None:
        return 1 - uniforms.double()
    where_to = alpha + (1 - alpha) * (jumps + 0.5) / process.vocab_size
    return torch.where(uniforms < 1 - alpha, where_to, 0.0)


def sedd(load: Load, case: Case) -> Tensors:
    generator, inputs = load(), case.inputs
    parts = generator.denoiser()
    process = parts.process
    level = NoiseLevel.at(parts.schedule, inputs["t"][:, None])
    tokens, states = inputs["x0"], inputs["xt"]
    network = logits(generator, states, level)
    earlier = NoiseLevel.at(parts.schedule, level.t - inputs["step"])
    log_score = parts.head(network, states, level)
    score, ratio = log_score.exp(), torch.exp(-inputs["delta_sigma"].double())[:, None]
    loss = generator.objective(network, tokens, head=parts.head, states=states, process=process, level=level)
    made = {
        **noise(parts.schedule, inputs["t"]),
        "log_score": log_score,
        "score_entropy": loss / level.rate,
        "loss": loss.sum(dim=1),
        "staggered_score": process.pull(score, ratio),
        "transp_transition": process.likelihood(states, ratio),
        "rate": rate_matrix(process)[states],
        "transp_rate": rate_matrix(process).T[states],
        "reverse_rate": reverse_rates(score, states, process),
        "euler_weights": euler_weights(score, states, process, inputs["step"] * level.rate),
        "analytic_weights": analytic_weights(score, states, process, level.alpha / earlier.alpha),
        "denoise_weights": denoise_weights(score, states, process, level.alpha),
        "sampled_transition": process.corrupt(
            tokens, level.alpha, uniforms_of(process, level.alpha, inputs["u"], inputs.get("jump"))
        ),
    }
    if not process.masks:
        made["transition"] = process.push(F.one_hot(tokens, process.states).double(), level.alpha)
    return made


def mdlm(load: Load, case: Case) -> Tensors:
    timed = load(config={**case.arguments["config"], "time_conditioning": True})
    generator, inputs = load(), case.inputs
    parts = generator.denoiser()
    process, schedule = parts.process, parts.schedule
    level = NoiseLevel.at(schedule, inputs["t"][:, None])
    earlier = NoiseLevel.at(schedule, inputs["t"][:, None] - inputs["dt"])
    tokens, states = inputs["x0"], exchanged(case, inputs["xt"], process.mask_id)
    network = logits(generator, states, level)
    leave_one_out = parts.head(network, states, level)
    clean = posterior_from_leave_one_out(leave_one_out, states, process, level)
    score = score_from_leave_one_out(clean, states, process, level).exp()
    # The reference cuts this off the times; and it stratifies them.
    first = case.default("sampling_eps")
    places = torch.arange(len(tokens))
    times = first + (1 - first) * ((places + inputs["u_t"]) / len(tokens) % 1)
    drawn = NoiseLevel.at(schedule, times[:, None])
    corrupted = process.corrupt(tokens, drawn.alpha, uniforms_of(process, drawn.alpha, inputs["u_mask"], None))

    def loss(states: Tensor, level: NoiseLevel) -> Tensor:
        return generator.objective(
            logits(generator, states, level), tokens, head=parts.head, states=states, process=process, level=level
        )

    def weights(schedule: MaskSchedule) -> Tensor:
        """The law of the ancestral step, in the reference's unit."""
        now, then = (NoiseLevel.at(schedule, moment.t) for moment in (level, earlier))
        law = jumps_from_clean(leave_one_out, states, process, then.alpha, now.alpha).distribution(
            states, process.states
        )
        return by_reference(case, law * now.noise[..., None])

    def own(values: Tensor) -> Tensor:
        return without_mask(case, values) if mask_within(case) else values

    return {
        **noise(schedule, inputs["t"]),
        "backbone_logits": own(network),
        "backbone_logits_sigma": own(logits(timed, states, level)),
        "sedd": without_mask(case, ScoreHead()(with_mask(case, network, 0.0), inputs["xt"], level)),
        "subs": with_mask(case, clean, -torch.inf),
        "score": by_reference(case, score),
        "loss": loss(states, level),
        "sampled_t": times,
        "loss_forward_pass": loss(corrupted, drawn),
        "ddpm_weights": weights(schedule),
        "ddpm_cache_weights": weights(LinearSchedule()),
        "analytic_weights": by_reference(case, analytic_weights(score, states, process, level.alpha / earlier.alpha)),
        "samples": raced_samples(generator, case),
        "draws_used": torch.tensor([len(inputs["sample_u"])]),
    }


def raced_samples(generator: Any, case: Case) -> Tensor:
    """The reference's steps, drawn by its race of exponentials; the uniforms are `(draws, B, N, S)`.

    Its caching update takes t itself as the probability of a mask, whatever the schedule. Its analytic update, and the
    last step after it, draw all tokens again.
    """
    parts, uniforms, sampling = generator.denoiser(), case.inputs["sample_u"], case.constructor["config"]["sampling"]
    predictor, steps, offset = sampling["predictor"], sampling["steps"], case.default("gumbel_offset")
    schedule = LinearSchedule() if predictor == "ddpm_cache" else parts.schedule
    process, last = parts.process, case.default("last_time")
    assert predictor in ("ddpm", "ddpm_cache", "analytic") and sampling["noise_removal"], f"{case}: {sampling}"
    assert len(uniforms) == steps + int(predictor == "analytic"), f"{case}: {len(uniforms)} draws for {sampling}"
    states = torch.full(uniforms.shape[1:3], process.mask_id)

    def leave_one_out(states: Tensor, level: NoiseLevel) -> Tensor:
        return parts.head(logits(generator, states, level), states, level)

    def raced(law: Tensor, draw: int) -> Tensor:
        arrivals = offset - (uniforms[draw] + offset).log()
        winners = (by_reference(case, law) / arrivals).argmax(dim=-1)
        return exchanged(case, winners, process.mask_id)

    def analytic(states: Tensor, level: NoiseLevel, alpha: Tensor) -> Tensor:
        clean = posterior_from_leave_one_out(leave_one_out(states, level), states, process, level)
        score = score_from_leave_one_out(clean, states, process, level).exp()
        return analytic_weights(score, states, process, level.alpha / alpha)

    for step, t in enumerate(torch.linspace(1, last, steps + 1, dtype=torch.float64)[:-1]):
        now, then = (NoiseLevel.at(schedule, time.expand(len(states), 1)) for time in (t, t - (1 - last) / steps))
        if predictor == "analytic":
            states = raced(analytic(states, now, then.alpha), step)
        else:
            at_t = NoiseLevel.at(parts.schedule, now.t)
            law = jumps_from_clean(leave_one_out(states, at_t), states, process, then.alpha, now.alpha).distribution(
                states, process.states
            )
            states = torch.where(states == process.mask_id, raced(law, step), states)
    end = NoiseLevel.at(parts.schedule, torch.full((len(states), 1), last, dtype=torch.float64))
    if predictor == "analytic":
        law = analytic(states, end, torch.ones_like(end.alpha))
        return raced(law.index_fill(-1, torch.tensor(process.mask_id), 0.0), steps)
    best = leave_one_out(states, end).argmax(dim=-1)
    return exchanged(case, torch.where(states == process.mask_id, best, states), process.mask_id, back=True)


def compared(outputs: Callable[[Load, Case], Tensors], load: Load, case: Case) -> Tensors:
    """Outputs as they are compared."""
    parts = BOTH.get(case.family, {})
    return {name: parts[name](case, value) if name in parts else value for name, value in outputs(load, case).items()}


def network_outputs(generator: Any, case: Case) -> Tensors:
    """The logits of the noisy ids, as the head reads them where the reference's network has a head."""
    parts = generator.denoiser()
    level = NoiseLevel.at(parts.schedule, case.inputs["t"][:, None])
    if case.family == "mdlm":
        network = logits(generator, exchanged(case, case.inputs["xt"], parts.process.mask_id), level)
        return {"backbone_logits": without_mask(case, network) if mask_within(case) else network}
    states = case.inputs["xt"]
    return {"log_score": parts.head(logits(generator, states, level), states, level)}


def again(generator: Any, case: Case) -> Tensors:
    """What a module that was saved and loaded again must give bit for bit."""
    return network_outputs(generator, case)


OUTPUTS = {
    "mdlm": partial(compared, mdlm),
    "sedd_absorb": partial(compared, sedd),
    "sedd_uniform": partial(compared, sedd),
}
