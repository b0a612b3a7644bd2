"""What our generators of MD4's and GIDD's layouts give for their golden cases, by the names of the reference's outputs.

Uniform numbers of GIDD pick the first id whose cumulative probability exceeds them; the Gumbel noise of MD4 is added to
the logarithms of a law. Both are over all states in the reference's order, the mask last.
"""

from dataclasses import replace
from functools import partial
from math import log
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import AbsorbingProcess, NoiseLevel
from discrete_lit.diffusion.divergences import (
    mixture_at_states,
    mixture_divergence,
)
from discrete_lit.diffusion.losses import (
    ContinuousBound,
    DiscreteTimeBound,
)
from discrete_lit.diffusion.reverse import Jumps, without_rare
from discrete_lit.samplers import SamplingContext, SelfCorrectionSampler
from discrete_lit.samplers.categorical import filter_logits
from discrete_lit.samplers.diffusion import Interval, NoisyTokens
from discrete_lit.samplers.diffusion_guidance import Prediction
from helpers.golden import Case, Compared, Load, Tensors
from helpers.golden_diffusion import logits
from helpers.golden_latents import gradients

TOLERANCE = 1e-5
NO_PLACE: dict[str, dict[str, str]] = {}


def ids_alone(case: Case, values: Tensor) -> Tensor:
    """GIDD's network has a logit of the mask, the last, which is never used."""
    return values[..., :-1]


def relative(case: Case, values: Tensor) -> Tensor:
    """Weights that differ by orders of magnitude are compared each by itself."""
    return values / case.expected["elbo_weights"]


def of_masked(case: Case, values: Tensor) -> Tensor:
    """The reference computes the law of every token, and keeps what is not masked."""
    return values[case.inputs["zt"] == case.constructor["vocab_size"]]


def kept(case: Case, values: Tensor) -> Tensor:
    """Logits of -1e7, or -inf, are left out of the probabilities."""
    return values.softmax(dim=-1)


# What both sides are made into.
BOTH: Compared = {
    "gidd": {"elbo_weights": relative, "loss_weights_none": relative},
    "md4": {"step_probs": of_masked, "topp_masked_logits": kept},
}
COMPARED: Compared = {**BOTH, "gidd": {**BOTH["gidd"], "logits": ids_alone}}


def level_at(generator: Any, times: Tensor) -> NoiseLevel:
    """The level of times `(B,)`."""
    return NoiseLevel.at(generator.denoiser().schedule, times[:, None])


def predicted(generator: Any, states: Tensor, level: NoiseLevel) -> Prediction:
    parts = generator.denoiser()
    output = parts.head(logits(generator, states, level), states, level)
    return Prediction(denoiser=parts, x_t=states, level=level, outputs=(output,), scale=1.0)


def costs(generator: Any, objective: Any, states: Tensor, tokens: Tensor, level: NoiseLevel) -> Tensor:
    parts = generator.denoiser()
    network = logits(generator, states, level)
    return objective(network, tokens, head=parts.head, states=states, process=parts.process, level=level)


# GIDD.


def drawn(law: Tensor, uniforms: Tensor) -> Tensor:
    """The first state whose cumulative probability exceeds a uniform number."""
    found = torch.searchsorted(law.double().cumsum(dim=-1), uniforms.double()[..., None], right=True)[..., 0]
    return found.clamp(max=law.shape[-1] - 1)


def step(generator: Any, states: Tensor, t: Tensor, s: Tensor, clean: Tensor | None = None, min_p: float = 0) -> Tensor:
    """The law of the sampler's step, `(B, N, S)`, of all from time t to s; given clean ids, that of Bayes' rule."""
    process, (at_t, at_s) = generator.denoiser().process, (level_at(generator, time[None]) for time in (t, s))
    interval = Interval(number=0, t=at_t, s=at_s, slope=torch.ones(1, 1), last=False)
    if clean is None:
        every = at_t.take(torch.zeros(len(states), dtype=torch.int64))
        prediction = predicted(generator, states, every)
    else:
        one_hot = F.one_hot(clean, process.vocab_size).double().log()
        parts = generator.denoiser()
        prediction = Prediction(denoiser=parts, x_t=states, level=at_t, outputs=(one_hot,), scale=1.0)
    jumps = generator.sampler.jumps(prediction, interval)
    if min_p:
        jumps = without_rare(jumps, states, process, min_p)
    return jumps.distribution(states, process.states)


def gidd(load: Load, case: Case) -> Tensors:
    generator, inputs, constructor = load(), case.inputs, case.constructor
    process = generator.denoiser().process
    level = level_at(generator, inputs["t"])
    tokens, states, attended = inputs["ids"], inputs["z"], inputs["attention_mask"].double()
    marginal = process.marginal(F.one_hot(tokens, process.vocab_size).double(), level.alpha, level.noise)
    count = len(case.expected["t_low_discrepancy"])
    spread = (torch.arange(count) / count + inputs["u_t"]) % 1
    bound = ContinuousBound()
    elbo = costs(generator, bound, states, tokens, level)
    dynamic = generator.objective.weight(tokens, states=states, process=process, level=level)
    made = {
        "log_B": torch.tensor([log(process.uniform_scale)]),
        "alpha": level.alpha,
        "beta_pi": process.over_states(process.noise_masses(level.alpha, level.noise), torch.float64)[:, 0],
        "q_t": marginal,
        "z_t": drawn(marginal, inputs["uniform_zt"]),
        "t_low_discrepancy": generator.objective.level(generator.denoiser().schedule, spread[:, None], 0).t[:, 0],
        "logits": logits(generator, states, level),
        "alpha_ratio": -level.rate,
        "elbo_weights": bound.weight(tokens, states=states, process=process, level=level),
        "elbo_tokens": elbo,
        "loss_tokens": costs(generator, generator.objective, states, tokens, level),
        "metric_elbo": (elbo * attended).sum()[None] / attended.sum(),
        **parts_of_the_loss(generator, case, level, dynamic),
        **weighted(load, case),
        **gradients_of_gidd(generator, case, level),
        **masked_baseline(load(diffusion_process="mdlm"), case),
    }
    for name, match in case.matching(r"posterior_probs_(\d+)").items():
        times = (inputs[time][int(match[1])] for time in "ts")
        made[name] = step(generator, case.expected["z_t"], *times, clean=tokens)
    for name, match in case.matching(r"step(_minp)?_probs_(\d+)").items():
        times = (inputs[time][int(match[2])] for time in "ts")
        made[name] = step(generator, states, *times, min_p=constructor["min_p"] if match[1] else 0)
        made[name.replace("probs", "z")] = drawn(made[name], inputs["uniform_step"])
    times = grid(case)
    chain = torch.full_like(states, process.vocab_size)
    for number, uniforms in enumerate(inputs["uniform_gen"]):
        place = constructor["steps"] - 1 - number
        chain = drawn(step(generator, chain, times[place], times[max(0, place - 1)]), uniforms)
    made["gidd_generated"] = chain
    at_first = level_at(generator, inputs["t"][:1].expand(len(tokens)))
    corrector = SelfCorrectionSampler(
        correction_tokens=int(case.read("self_correction", r"(\d+) tokens")[1]),
        correction_temperature=case.number("self_correction", "temp"),
    )
    clean = predicted(generator, tokens, at_first).clean()
    made["self_correction"] = corrector.corrected(clean, tokens, inputs["uniform_step"].double())[0]
    return made


def grid(case: Case) -> Tensor:
    """The times of the samplers, from `t_eps` up."""
    first = case.constructor["t_eps"]
    return first + (1 - 2 * first) * torch.linspace(0, 1, case.constructor["steps"] + 1, dtype=torch.float64)


def parts_of_the_loss(generator: Any, case: Case, level: NoiseLevel, weights: Tensor) -> Tensors:
    """The Kullback-Leibler and the Itakura-Saito term, averaged over the tokens of texts by their weights."""
    parts, tokens, states = generator.denoiser(), case.inputs["ids"], case.inputs["z"]
    clean = predicted(generator, states, level).clean()
    settings = {"process": parts.process, "alpha": level.alpha, "noise": level.noise}
    divergence = mixture_divergence(clean, tokens, **settings)
    _, log_ratio = mixture_at_states(clean, tokens, states=states, **settings)
    weights = weights * case.inputs["attention_mask"]
    means = {"kl": divergence, "is": torch.expm1(log_ratio) - log_ratio}
    return {f"metric_{name}_loss": (weights * value).sum()[None] / weights.sum() for name, value in means.items()}


def weighted(load: Load, case: Case) -> Tensors:
    """Losses and weights with every kind of weighting."""
    made, tokens, states = {}, case.inputs["ids"], case.inputs["z"]
    for kind in ("dynamic", "clip", "none"):
        generator = load(loss_weighting=kind)
        level, process = level_at(generator, case.inputs["t"]), generator.denoiser().process
        made[f"loss_weights_{kind}"] = generator.objective.weight(tokens, states=states, process=process, level=level)
        made[f"loss_{kind}"] = costs(generator, generator.objective, states, tokens, level).mean()[None]
    return made


def gradients_of_gidd(generator: Any, case: Case, level: NoiseLevel) -> Tensors:
    backbone = generator.backbone
    with gradients(generator):
        costs(generator, generator.objective, case.inputs["z"], case.inputs["ids"], level).mean().backward()
        head = backbone.head.project.weight.grad
        made = {
            "vocab_embed.embedding": backbone.token_embedding.table.weight.grad,
            # That of the mask's logit is 0.
            "output_layer.linear.weight": torch.cat((head, torch.zeros_like(head[:1]))),
        }
        made |= {f"sigma_map.mlp.{n}.weight": backbone.time_embedding.layers[n].weight.grad for n in (0, 2)}
        for number, block in enumerate(backbone.blocks):
            turned, values = block.attention.query_key_value.weight.grad.tensor_split([2 * backbone.width])
            turned = rearrange(turned, "(qk h c two) d -> (qk h two c) d", qk=2, h=backbone.heads, two=2)
            made[f"blocks.{number}.attn_qkv.weight"] = torch.cat((turned, values))
        return {f"grad.{name}": value.clone() for name, value in made.items()}


def masked_baseline(generator: Any, case: Case) -> Tensors:
    """MDLM in GIDD's repository: of the noisy tokens only masks count as noise, though the network has seen all."""
    parts, inputs = generator.denoiser(), case.inputs
    process, tokens = parts.process, inputs["ids"]
    assert type(process) is AbsorbingProcess
    level, mask = level_at(generator, inputs["t"]), process.vocab_size
    states = torch.where(inputs["z"] == mask, mask, tokens)
    network = logits(generator, inputs["z"], level)
    elbo = generator.objective(network, tokens, head=parts.head, states=states, process=process, level=level)
    attended = inputs["attention_mask"].double()
    times = grid(case)
    chain = torch.full_like(states, mask)
    for number, uniforms in enumerate(inputs["uniform_gen"]):
        place = case.constructor["steps"] - 1 - number
        if place:
            chain = drawn(step(generator, chain, times[place], times[place - 1]), uniforms)
            continue
        best = predicted(generator, chain, level_at(generator, times[:1].expand(len(chain)))).clean().argmax(dim=-1)
        chain = torch.where(chain == mask, best, chain)
    return {
        "mdlm_elbo_tokens": elbo,
        "mdlm_elbo": (elbo * attended).sum()[None] / attended.sum(),
        "mdlm_q_t": process.marginal(F.one_hot(tokens, mask).double(), level.alpha, level.noise),
        "mdlm_generated": chain,
    }


# MD4.


def md4(load: Load, case: Case) -> Tensors:
    generator, inputs = load(), case.inputs
    parts = generator.denoiser()
    process, schedule, objective, length = parts.process, parts.schedule, generator.objective, generator.length
    tokens, batch = inputs["x"], len(inputs["x"])
    uniforms = ((inputs["t0"].double() + torch.arange(batch) / batch) % 1)[:, None]
    level = objective.level(schedule, uniforms, length)
    noisy = process.corrupt(tokens, level.alpha, inputs["mask_uniform"].double(), level.noise)
    bits = length * log(2)

    def diffusion_loss() -> Tensor:
        return costs(generator, objective, noisy, tokens, level).sum(dim=1)

    # What the first step leaves, a guess among all ids, is a constant.
    left = torch.tensor([length * schedule.ends()[0] * log(generator.vocab_size) / bits])
    mean = diffusion_loss().mean()[None] / bits
    described = NoiseLevel.at(schedule, inputs["grid"])
    backbone = generator.backbone
    with gradients(generator):
        ((diffusion_loss().mean()) / bits).backward()
        table = backbone.token_embedding.table.weight.grad
        name = "params.classifier.Transformer_0.Embed_0.embedding"
        if case.constructor["outside_embed"]:
            before = case.state["params.classifier.Transformer_0.Dense_0.kernel"].to(table.device)
            name, table = "params.classifier.Embed_0.embedding", table @ before.T
        grads = {name: table.clone()}
        for number, block in enumerate(backbone.blocks):
            queries = block.attention.query_key_value.weight.grad.chunk(3)[0]
            place = f"params.classifier.Transformer_0.TransformerBlock_{number}.attention.wq.kernel"
            grads[place] = queries.T.clone()
        if backbone.time_embedding is not None:
            cosines, sines = backbone.time_embedding.layers[0].weight.grad.T.chunk(2)
            grads["params.classifier.CondEmbedding_0.dense0.kernel"] = torch.cat((sines, cosines))
    context = SamplingContext(
        backbone, torch.zeros(batch, dtype=torch.int64), random=CounterRandom(0, torch.arange(batch)), denoiser=parts
    )
    intervals = generator.sampler.intervals(schedule, context)
    here = intervals[int(inputs["i"])]
    nucleus = load(sampler="topp").sampler
    made = {
        "loss": mean + left,
        "loss_diff": mean,
        "loss_recon": left,
        "t": (uniforms if isinstance(objective, DiscreteTimeBound) else level.t)[:, 0],
        "z_t": noisy,
        "diffusion_loss": diffusion_loss(),
        **{f"grad.{name}": value for name, value in grads.items()},
        **network_outputs(generator, case),
        "alpha": described.alpha,
        "dgamma_times_alpha": -described.mask_weight,
        "log_snr": described.odds.log(),
        "grid_s_t": torch.cat((here.s.t, here.t.t))[:, 0],
        "ancestral": raced(generator.sampler, context, here, inputs["zt"], inputs["gumbel"]),
        "topp": raced(nucleus, context, here, inputs["zt"], inputs["gumbel"]),
        "step_probs": law(generator.sampler, context, here, inputs["zt"]),
        "topp_masked_logits": filter_logits(
            logits(generator, inputs["zt"], level_at(generator, inputs["t"])), None, nucleus.top_p
        ),
    }
    states, end = context.start(), NoiseLevel.at(schedule, torch.zeros(1, 1))
    # The reference's last step goes to m(0) > 0, and what is left gets its most probable id.
    for number, interval in enumerate(intervals):
        short = replace(interval, s=end, last=False) if interval.last else interval
        states = raced(generator.sampler, context, short, states, inputs["gumbel"].roll(number, dims=1))
        made[f"chain_{number}"] = states
    best = predicted(generator, states, level_at(generator, torch.zeros(batch))).clean().argmax(dim=-1)
    made["chain_decoded"] = torch.where(states == process.mask_id, best, states)
    return made


def law(sampler: Any, context: SamplingContext, interval: Interval, states: Tensor) -> Tensor:
    """The law of the sampler's step, `(B, N, S)`."""
    assert context.denoiser is not None
    x = NoisyTokens(context, context.denoiser, level=interval.t)
    x.tokens = states
    jumps = sampler.jumps(x.predict(interval.t, 1.0), interval)
    return Jumps(jumps.probability, sampler.filtered(jumps.targets)).distribution(states, context.layout.mask_id + 1)


def raced(sampler: Any, context: SamplingContext, interval: Interval, states: Tensor, gumbel: Tensor) -> Tensor:
    drawn_states = (law(sampler, context, interval, states).log() + gumbel).argmax(dim=-1)
    return torch.where(states == context.layout.mask_id, drawn_states, states)


def compared(outputs: Any, load: Load, case: Case) -> Tensors:
    """Outputs as they are compared."""
    parts = BOTH[case.family]
    return {name: parts[name](case, value) if name in parts else value for name, value in outputs(load, case).items()}


def network_outputs(generator: Any, case: Case) -> Tensors:
    """The logits of the noisy ids."""
    states = case.inputs["z" if case.family == "gidd" else "zt"]
    return {"logits": logits(generator, states, level_at(generator, case.inputs["t"]))}


def again(generator: Any, case: Case) -> Tensors:
    """What a module that was saved and loaded again must give bit for bit."""
    drawn_tokens = generator.sample(torch.zeros(2, dtype=torch.int64))
    return {**network_outputs(generator, case), "drawn": drawn_tokens}


OUTPUTS = {"gidd": partial(compared, gidd), "md4": partial(compared, md4)}
