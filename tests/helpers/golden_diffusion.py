"""What our generators make of the golden files' noisy text, by the names of the reference's outputs."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.processes import ForwardProcess, LinearSchedule, MaskSchedule, NoiseLevel, ScoreHead
from discrete_lit.processes.heads import posterior_from_cavity, score_from_cavity
from discrete_lit.processes.reverse import (
    analytic_weights,
    denoise_weights,
    euler_weights,
    jumps_from_clean,
    reverse_rates,
)

Tensors = dict[str, Tensor]
Inputs = Mapping[str, Tensor]
# From the reference's own arguments, if any, to the generator that they give.
Load = Callable[..., Any]

NO_PLACE: dict[str, dict[str, str]] = {
    "mdlm": {
        "d3pm": "it gives the mask id, which no clean token is, a probability",
        "d3pm_loss_T10": "of that parametrisation",
    },
}
# What of an output is compared. The logit of the mask id, to which MDLM gives no probability, is left out of ours.
_IDS = (..., slice(-1))
COMPARED: dict[str, dict[str, tuple[Any, ...]]] = {
    "mdlm": {name: _IDS for name in ("backbone_logits", "backbone_logits_sigma", "sedd")}
}


def masked(inputs: Inputs) -> Tensor:
    """The reference copies known tokens over what it computed there."""
    return inputs["xt"] == 32


def noisy(inputs: Inputs) -> Tensor:
    """At a total noise of 2e-4 the reference's float32 ratio 1 - K / (exp(sigma) - 1 + K) is 0.6% off."""
    return inputs["t"] > 0.1


# Where outputs are compared.
WHERE: dict[str, dict[str, Callable[[Inputs], Tensor]]] = {
    "mdlm": {"ddpm_weights": masked, "ddpm_cache_weights": masked},
    "sedd_uniform": {"score_entropy": noisy, "loss": noisy},
}
# Finite logarithms there stand for -inf.
AS_PROBABILITIES: dict[str, tuple[str, ...]] = {"mdlm": ("subs",)}


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


def sedd(load: Load, inputs: Inputs) -> Tensors:
    generator = load()
    parts = generator.denoiser()
    process = parts.process
    level = NoiseLevel.at(parts.schedule, inputs["t"][:, None])
    tokens, states = inputs["x0"], inputs["xt"]
    network = logits(generator, states, level)
    earlier = NoiseLevel.at(parts.schedule, level.t - inputs["step"])
    log_score = parts.head(network, states, level)
    score, ratio = log_score.exp(), torch.exp(-inputs["delta_sigma"].double())[:, None]
    loss = generator.objective(network, parts.head, tokens, states, process, level)
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


def mdlm(load: Load, inputs: Inputs) -> Tensors:
    generator, timed = load(), load(time_conditioning=True)
    parts = generator.denoiser()
    process, schedule = parts.process, parts.schedule
    level = NoiseLevel.at(schedule, inputs["t"][:, None])
    earlier = NoiseLevel.at(schedule, inputs["t"][:, None] - inputs["dt"])
    tokens, states = inputs["x0"], inputs["xt"]
    network = logits(generator, states, level)
    cavity = parts.head(network, states, level)
    clean = posterior_from_cavity(cavity, states, process, level)
    score = score_from_cavity(clean, states, process, level).exp()
    # The reference cuts 1e-3 off the times.
    places = torch.arange(len(tokens))
    times = 1e-3 + (1 - 1e-3) * ((places + inputs["u_t"]) / len(tokens))
    drawn = NoiseLevel.at(schedule, times[:, None])
    corrupted = process.corrupt(tokens, drawn.alpha, uniforms_of(process, drawn.alpha, inputs["u_mask"], None))

    def loss(states: Tensor, level: NoiseLevel) -> Tensor:
        return generator.objective(logits(generator, states, level), parts.head, tokens, states, process, level)

    def weights(schedule: MaskSchedule) -> Tensor:
        """The law of the ancestral step, in the reference's unit."""
        now, then = (NoiseLevel.at(schedule, moment.t) for moment in (level, earlier))
        law = jumps_from_clean(cavity, states, process, then.alpha, now.alpha).distribution(states, process.states)
        return law * now.noise[..., None]

    return {
        **noise(schedule, inputs["t"]),
        "backbone_logits": network,
        "backbone_logits_sigma": logits(timed, states, level),
        "sedd": ScoreHead()(F.pad(network, (0, 1)), states, level)[..., :-1],
        "subs": F.pad(clean, (0, 1), value=-torch.inf),
        "score": score,
        "loss": loss(states, level),
        "sampled_t": times,
        "loss_forward_pass": loss(corrupted, drawn),
        "ddpm_weights": weights(schedule),
        "ddpm_cache_weights": weights(LinearSchedule()),
        "analytic_weights": analytic_weights(score, states, process, level.alpha / earlier.alpha),
        "samples": raced_samples(generator, inputs["sample_u"]),
        "draws_used": torch.tensor([len(inputs["sample_u"])]),
    }


def raced_samples(generator: Any, uniforms: Tensor) -> Tensor:
    """Ours steps by the linear schedule, drawn by the reference's race of exponentials; `uniforms (T, B, N, S)`."""
    parts, schedule = generator.denoiser(), LinearSchedule()
    process, last = parts.process, 1e-5
    states = torch.full(uniforms.shape[1:3], process.mask_id)

    def cavity(states: Tensor, t: Tensor) -> Tensor:
        level = NoiseLevel.at(schedule, t.expand(len(states), 1))
        return parts.head(logits(generator, states, level), states, level)

    for step, t in enumerate(torch.linspace(1, last, len(uniforms) + 1, dtype=torch.float64)[:-1]):
        alphas = [schedule.alpha(time.expand(len(states), 1)) for time in (t - (1 - last) / len(uniforms), t)]
        law = jumps_from_clean(cavity(states, t), states, process, *alphas).distribution(states, process.states)
        arrivals = 1e-10 - (uniforms[step] + 1e-10).log()
        states = torch.where(states == process.mask_id, (law / arrivals).argmax(dim=-1), states)
    best = cavity(states, torch.tensor(last)).argmax(dim=-1)
    return torch.where(states == process.mask_id, best, states)


OUTPUTS: dict[str, Callable[[Load, Inputs], Tensors]] = {"mdlm": mdlm, "sedd_absorb": sedd, "sedd_uniform": sedd}
