"""What our generators make of the golden cases' noisy text, by the names of the reference's outputs."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.diffusion import ForwardProcess, LinearSchedule, MaskSchedule, NoiseLevel, ScoreHead
from discrete_lit.diffusion.parameterization import posterior_from_leave_one_out, score_from_leave_one_out
from discrete_lit.diffusion.reverse import (
    analytic_weights,
    denoise_weights,
    euler_weights,
    jumps_from_clean,
    reverse_rates,
)
from helpers.golden import Case, Compared, Load, Tensors

TOLERANCE = 1e-5
NO_PLACE = {
    "mdlm": {
        "d3pm": "it gives the mask id, which no clean token is, a probability",
        r"d3pm_loss_T\d+": "of that parametrisation",
    },
}


def without_mask(case: Case, values: Tensor) -> Tensor:
    """The logit of the mask id, to which MDLM gives no probability, is left out of ours."""
    return values[..., torch.arange(values.shape[-1]) != case.constructor["mask_index"]]


def with_mask(case: Case, values: Tensor, fill: float) -> Tensor:
    """With a column of `fill` for the mask id."""
    before, after = values.tensor_split([case.constructor["mask_index"]], dim=-1)
    return torch.cat([before, torch.full_like(values[..., :1], fill), after], dim=-1)


def masked(case: Case, values: Tensor) -> Tensor:
    """The reference copies known tokens over what it computed there."""
    return values[case.inputs["xt"] == case.constructor["mask_index"]]


def noisy(case: Case, values: Tensor) -> Tensor:
    """Its float32 ratio 1 - K / (exp(sigma) - 1 + K) is wrong in the third digit where sigma is below K / 10^5."""
    return values[case.expected["sigma"] > 5e-4 * case.constructor["tokens"]]


def probabilities(case: Case, values: Tensor) -> Tensor:
    """Finite logarithms of the reference stand for -inf."""
    return values.exp()


# What both sides are made into.
BOTH: Compared = {
    "mdlm": {"ddpm_weights": masked, "ddpm_cache_weights": masked, "subs": probabilities},
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
    generator, timed, inputs = load(), load(time_conditioning=True), case.inputs
    parts = generator.denoiser()
    process, schedule = parts.process, parts.schedule
    level = NoiseLevel.at(schedule, inputs["t"][:, None])
    earlier = NoiseLevel.at(schedule, inputs["t"][:, None] - inputs["dt"])
    tokens, states = inputs["x0"], inputs["xt"]
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
        return law * now.noise[..., None]

    return {
        **noise(schedule, inputs["t"]),
        "backbone_logits": network,
        "backbone_logits_sigma": logits(timed, states, level),
        "sedd": without_mask(case, ScoreHead()(with_mask(case, network, 0.0), states, level)),
        "subs": with_mask(case, clean, -torch.inf),
        "score": score,
        "loss": loss(states, level),
        "sampled_t": times,
        "loss_forward_pass": loss(corrupted, drawn),
        "ddpm_weights": weights(schedule),
        "ddpm_cache_weights": weights(LinearSchedule()),
        "analytic_weights": analytic_weights(score, states, process, level.alpha / earlier.alpha),
        "samples": raced_samples(generator, case),
        "draws_used": torch.tensor([len(inputs["sample_u"])]),
    }


def raced_samples(generator: Any, case: Case) -> Tensor:
    """Ancestral steps, drawn by the reference's race of exponentials; the uniforms are `(T, B, N, S)`.

    Its caching update takes t itself as the probability of a mask, whatever the schedule.
    """
    parts, uniforms, sampling = generator.denoiser(), case.inputs["sample_u"], case.constructor["config"]["sampling"]
    predictor, steps, offset = sampling["predictor"], len(uniforms), case.default("gumbel_offset")
    schedule = {"ddpm_cache": LinearSchedule(), "ddpm": parts.schedule}[predictor]
    process, last = parts.process, case.default("last_time")
    assert sampling["steps"] == steps and sampling["noise_removal"], f"{case}: {sampling} is not what is drawn here"
    states = torch.full(uniforms.shape[1:3], process.mask_id)

    def leave_one_out(states: Tensor, t: Tensor) -> Tensor:
        level = NoiseLevel.at(parts.schedule, t.expand(len(states), 1))
        return parts.head(logits(generator, states, level), states, level)

    for step, t in enumerate(torch.linspace(1, last, steps + 1, dtype=torch.float64)[:-1]):
        alphas = [schedule.alpha(time.expand(len(states), 1)) for time in (t - (1 - last) / steps, t)]
        law = jumps_from_clean(leave_one_out(states, t), states, process, *alphas).distribution(states, process.states)
        arrivals = offset - (uniforms[step] + offset).log()
        states = torch.where(states == process.mask_id, (law / arrivals).argmax(dim=-1), states)
    best = leave_one_out(states, torch.tensor(last)).argmax(dim=-1)
    return torch.where(states == process.mask_id, best, states)


def compared(outputs: Callable[[Load, Case], Tensors], load: Load, case: Case) -> Tensors:
    """Outputs as they are compared."""
    parts = BOTH.get(case.family, {})
    return {name: parts[name](case, value) if name in parts else value for name, value in outputs(load, case).items()}


def again(generator: Any, case: Case) -> Tensors:
    """What a module that was saved and loaded again must give bit for bit."""
    level = NoiseLevel.at(generator.denoiser().schedule, case.inputs["t"][:, None])
    return {"logits": logits(generator, case.inputs["xt"], level)}


OUTPUTS = {
    "mdlm": partial(compared, mdlm),
    "sedd_absorb": partial(compared, sedd),
    "sedd_uniform": partial(compared, sedd),
}
