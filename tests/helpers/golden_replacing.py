"""What our generator gives for the golden cases of VQ-Diffusion: its noise, posteriors, draws, loss and guidance.

Their distributions are `(B, K + 1, L)`, ours have the ids last. Where a step is impossible, as from the mask to an id,
the reference has 1e-30 in the place of 0, and what follows from it, below e^-50: nothing of a law is as small.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.diffusion.mask_and_replace import DrawnStep
from discrete_lit.diffusion.parameterization import leave_one_out_from_posterior
from discrete_lit.diffusion.reverse import jumps_from_clean
from discrete_lit.samplers.categorical import filter_logits
from discrete_lit.samplers.guidance import guide
from helpers.golden import Case, Compared, Load, Tensors
from helpers.golden_autoregressive import grads

TOLERANCE = 2e-5
NO_PLACE: dict[str, dict[str, str]] = {}
# The reference's least log-probability, and its logarithm of 0.
LEAST, ZERO = -70.0, 1e-30


def possible(case: Case, value: Tensor) -> Tensor:
    """Log-probabilities as they are compared: what is impossible is the same whatever it is written as."""
    return value.clamp(min=-50.0)


COMPARED: Compared = {"vq_diffusion": {"true_posterior": possible, "model_posterior": possible}}


def theirs(values: Tensor) -> Tensor:
    return values.transpose(1, 2)


def log(probabilities: Tensor) -> Tensor:
    return probabilities.double().clamp(min=ZERO).log()


def level_of(generator: Any, steps: Tensor) -> DrawnStep:
    """The level of steps `(B,)` that were drawn with the same probability."""
    objective, schedule = generator.objective, generator.denoiser().schedule
    drawn = objective.importance.draw

    def fixed(uniforms: Tensor) -> tuple[Tensor, Tensor]:
        return steps[:, None], torch.ones(len(steps), 1, dtype=torch.float64)

    objective.importance.draw = fixed
    try:
        return objective.level(schedule, torch.zeros(len(steps), 1), generator.length)
    finally:
        objective.importance.draw = drawn


def gumbel(uniforms: Tensor) -> Tensor:
    return -torch.log(-torch.log(uniforms.double() + ZERO) + ZERO)


def start(generator: Any, states: Tensor, labels: Tensor, level: DrawnStep) -> tuple[Tensor, Tensor]:
    """Logits, and log p(x_0 | x_t), `(B, L, K)` both."""
    parts = generator.denoiser()
    logits = generator.backbone(states, labels, time=parts.network_time(level))
    return logits, parts.head(logits, states, level)


def posterior(generator: Any, clean: Tensor, states: Tensor, level: DrawnStep) -> Tensor:
    """log p(x_s | x_t) `(B, L, S)` of log p(x_0 | x_t) `(B, L, K)`, as the sampler's step has it."""
    process = generator.denoiser().process
    leave_one_out = leave_one_out_from_posterior(clean.double(), states, process, level)
    jumps = jumps_from_clean(leave_one_out, states, process, level.alpha_before, level.alpha)
    return log(jumps.distribution(states, process.states)).clamp(min=LEAST)


def with_mask(clean: Tensor) -> Tensor:
    """log p(x_0 | x_t) with the mask's, which is never predicted: `(B, K + 1, L)`."""
    return theirs(F.pad(clean, (0, 1), value=LEAST).clamp(min=LEAST))


def network_outputs(generator: Any, case: Case) -> Tensors:
    level = level_of(generator, case.inputs["t"])
    logits, clean = start(generator, case.expected["x_t"], case.inputs["cond"], level)
    return {"logits": theirs(logits), "x0_log_pred": with_mask(clean)}


def vq_diffusion(load: Load, case: Case) -> Tensors:
    generator, tokens, labels = load(), case.inputs["x0"], case.inputs["cond"]
    process = generator.denoiser().process
    level = level_of(generator, case.inputs["t"])
    one_hot = F.one_hot(tokens, process.vocab_size).double()
    law = process.marginal(one_hot, level.alpha, level.noise)
    # Of each state in turn, the probability that a step takes the id there.
    one_step = [
        process.step_likelihood(torch.full_like(tokens, state), level.alpha_before, level.alpha).gather(
            -1, tokens[..., None]
        )
        for state in range(process.states)
    ]
    states = (log(law) + gumbel(theirs(case.inputs["uniform"]))).argmax(dim=-1)
    logits, clean = start(generator, states, labels, level)
    reverse = posterior(generator, clean, states, level)
    masks = torch.full_like(tokens, process.mask_id)
    last = level_of(generator, torch.full_like(labels, generator.objective.steps - 1))
    null = start(generator, states, torch.full_like(labels, generator.num_classes), level)[1]
    truncation = float(case.read("x0_log_pred_top86r", r"top([\d.]+)r")[1])
    scale = float(case.read("x0_log_pred_cfg3", r"guided \(([\d.]+)\)")[1])
    kept = filter_logits(with_mask(clean).transpose(1, 2), None, truncation)
    made = {
        "q_pred": theirs(log(law)),
        "q_pred_one": theirs(log(torch.cat(one_step, dim=-1))),
        "q_pred_prev": theirs(log(process.marginal(one_hot, level.alpha_before, level.noise_before))),
        "x_t": states,
        "logits": theirs(logits),
        "x0_log_pred": with_mask(clean),
        "true_posterior": possible(case, theirs(posterior(generator, log(one_hot), states, level))),
        "model_posterior": possible(case, theirs(reverse)),
        "model_prob": theirs(reverse.exp()),
        "p_sample": (reverse + gumbel(theirs(case.inputs["uniform2"]))).argmax(dim=-1),
        "model_posterior_allmask": theirs(posterior(generator, start(generator, masks, labels, last)[1], masks, last)),
        "x0_log_pred_null": theirs(null),
        "x0_log_pred_cfg3": theirs(guide(clean, null, scale).log_softmax(dim=-1)),
        "x0_log_pred_top86r": theirs(kept.clamp(min=LEAST)),
    }
    return made | trained(generator, case, level, states)


def trained(generator: Any, case: Case, level: DrawnStep, states: Tensor) -> Tensors:
    """The loss at given steps and noisy ids, its gradients, and what it has taught of the steps."""
    objective = generator.objective
    objective.level, objective.corrupt = (lambda *inputs: level), (lambda *inputs: states)
    published = [name.removeprefix("grad.") for name in case.expected if name.startswith("grad.")]
    try:
        generator.train()
        with torch.enable_grad():
            loss, _ = generator.loss(generator.to_grid(case.inputs["x0"]), case.inputs["cond"])
            made = {"loss": loss.detach()[None], **grads(generator, loss, {name: ours(name) for name in published})}
    finally:
        del objective.level, objective.corrupt
        generator.eval()
    return made | {"Lt_history": generator.importance.squares, "Lt_count": generator.importance.counts}


def ours(name: str) -> str:
    """Our name of a parameter whose gradient a case has."""
    name = name.removeprefix("transformer.")
    named = {"content_emb.emb.weight": "token_embedding.table.weight", "to_logits.1.weight": "head.project.weight"}
    if name in named:
        return named[name]
    _, block, norm, part, rest = name.split(".")
    kind = {"ln1": "step", "ln2": "class"}[norm]
    return f"norm_tables.{block}.{kind}_{'table' if part == 'emb' else 'projection'}.{rest}"


OUTPUTS = {"vq_diffusion": vq_diffusion}


def again(generator: Any, case: Case) -> Tensors:
    """What a module that was saved and loaded again must give bit for bit."""
    return {**network_outputs(generator, case), "drawn": generator.sample(case.inputs["cond"])}
