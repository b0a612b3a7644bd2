"""What our generators of whole latents give for the inputs of the golden cases, by the names of their outputs.

SiT's time and velocity run from noise to data, and those of ours back.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from discrete_lit.backbones.condition import Condition
from discrete_lit.backbones.scale_transformer import context_positions
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.gaussian import Estimate, Posterior
from discrete_lit.diffusion.solvers import (
    DDIM,
    DDPM,
    Euler,
    EulerMaruyama,
    Heun,
    HeunMaruyama,
    Solver,
    even_steps,
)
from discrete_lit.generators.hybrid_next_scale import HybridPyramid
from discrete_lit.samplers.guided_solver import GuidedNetwork
from helpers.golden import Case, Compared, Load, Tensors

TOLERANCE = 2e-5
# Shares of the largest of the reference, where its own sentence says that it is not exact.
TOLERANCES = {
    ("sit", "ode_dopri5"): 1e-3,
    # With random weights the first denoising steps magnify to 1e4.
    ("mar", "sampled_cfg"): 1e-4,
    ("mar", "sampled_nocfg"): 1e-4,
}
NO_PLACE = {
    "ldm": {
        r"grad\.model\.diffusion_model\.time_embed\.0\.weight": "0 but for rounding: each of the case's norms is over "
        "the places of one channel, and takes away what the time adds",
    },
}
COMPARED: Compared = {}


def guided(generator: Any, labels: Tensor, channels: int | None = None) -> GuidedNetwork:
    return GuidedNetwork(
        generator.backbone,
        labels,
        denoiser=generator.denoiser,
        network_time=generator.network_time,
        channels=channels,
    )


def null(generator: Any, labels: Tensor) -> Tensor:
    return torch.full_like(labels, generator.num_classes)


def doubled(generator: Any, labels: Tensor, x: Tensor, t: Any, scale: float) -> Tensor:
    """Outputs of the doubled batch: the second half has the null class's where channels are not guided."""
    first = guided(generator, labels, channels=3).output(x, t, scale)
    second = guided(generator, null(generator, labels)).output(x, t, 1.0)
    return torch.cat((first, torch.cat((first[:, :3], second[:, 3:]), dim=1)))


def dit(load: Load, case: Case) -> Tensors:
    generator, inputs = load(), case.inputs
    path, denoiser, x, labels = generator.denoiser.path, generator.denoiser, inputs["x"], inputs["y"]
    t = (inputs["t"].double() + 1) / path.steps
    made = {
        "out": guided(generator, labels).output(x, t, 1.0),
        "out_null": guided(generator, null(generator, labels)).output(x, t, 1.0),
        "out_cfg4": doubled(generator, labels, x, t, 4.0),
        "alphas_cumprod": path.squared_alphas[1:].float(),
    }
    estimate = denoiser(made["out"], x, t)
    posterior = Posterior.between(path, t, t - 1 / path.steps, like=x)
    made |= {
        "p_mean": posterior.mean(estimate.data, x),
        "p_log_variance": posterior.log_variance(estimate, smallest=posterior.variance),
        "p_pred_xstart": estimate.data,
        "x_t": path.add_noise(x, inputs["noise"], t),
    }
    output = generator.backbone(made["x_t"], generator.network_time(t), labels)
    terms = generator.objective(output, x, inputs["noise"], x_t=made["x_t"], t=t)
    made |= {"mse": terms["error"], "vb": terms["bound"], "loss": terms["error"] + terms["bound"]}

    kept = torch.tensor(even_steps(path.steps, 50))
    times = torch.cat((torch.zeros(1), (kept.double() + 1) / path.steps))
    assert times.flip(0).tolist() == pytest.approx(DDPM(50).times(path), abs=1e-7)
    later, earlier = times[inputs["t50"] + 1], times[inputs["t50"]]
    estimate = denoiser(guided(generator, labels).output(x, later, 1.0), x, later)
    alpha, sigma = path.at(path.alpha, earlier, x), path.at(path.sigma, earlier, x)
    return made | {
        "use_timesteps_50": kept,
        "p50_mean": Posterior.between(path, later, earlier, like=x).mean(estimate.data, x),
        "ddim50": alpha * estimate.data + sigma * estimate.noise,
    }


def trajectory(
    generator: Any, labels: Tensor, solver: Solver, start: Tensor, *, noise: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """The states `(T + 1, B, C, H, W)` of a solver, the start first; the noise of each step `(T, B, C, H, W)`."""
    network = guided(generator, labels, channels=3 if scale != 1 else None)
    seen: dict[float, Tensor] = {}

    def denoise(x: Tensor, t: float) -> Estimate:
        # Of two passes over one time, the second of Heun's step to it comes first: the state is what comes after.
        seen[t] = x
        return network(x, t, scale)

    end = solver(denoise, start, path=generator.denoiser.path, noise=None if noise is None else noise.__getitem__)
    return torch.stack([*(x for t, x in seen.items() if t > 0), end])


def sit(load: Load, case: Case) -> Tensors:
    generator, inputs = load(), case.inputs
    path, x, labels, start = generator.denoiser.path, inputs["x"], inputs["y"], inputs["noise"]
    t = 1 - inputs["t"].double()
    velocity = guided(generator, labels).output(x, t, 1.0)
    estimate = generator.denoiser(velocity, x, t)
    made = {
        "velocity": -velocity,
        "velocity_null": -guided(generator, null(generator, labels)).output(x, t, 1.0),
        "velocity_cfg4": -doubled(generator, labels, x, t, 4.0),
        "score": estimate.score(path, t),
        "eps": estimate.noise,
    }
    made |= sit_losses(generator, case, t)
    steps = int(case.number("ode_euler", "num_steps")) - 1
    euler = trajectory(generator, labels, Euler(steps), start)
    made |= {"ode_euler": euler, "ode_heun2": trajectory(generator, labels, Heun(steps), start)}
    made["ode_dopri5"] = trajectory(generator, labels, Heun(100), start)[-1]
    steps = len(case.expected["ode_euler"]) - 1
    states = trajectory(generator, labels, Euler(steps), start, scale=case_scale(case))
    # The second half starts with the same noise, and its first three channels go the same way.
    second, taken = start[:, 3:], guided(generator, null(generator, labels))
    for number, state in enumerate(states[:-1]):
        second = second - taken.output(state, 1 - number / steps, 1.0)[:, 3:] / steps
    made["ode_euler_cfg2"] = torch.cat((states[-1], torch.cat((states[-1][:, :3], second), dim=1)))
    for name, solver in (("sde_Euler", EulerMaruyama), ("sde_Heun", HeunMaruyama)):
        noise = inputs["sde_noise"]
        made[name] = stochastic(generator, labels, solver(len(noise) + 1, last_step=0.04), start, noise)
    quarter_circle = load(path_type="GVP").denoiser.path
    made["gvp_xt"] = quarter_circle.add_noise(x, start, t)
    made["gvp_ut"] = -quarter_circle.velocity(x, start, t)
    return made


def case_scale(case: Case) -> float:
    return float(case.read("ode_euler_cfg2", r"forward_with_cfg\((\d+\.\d+)\)")[1])


def stochastic(generator: Any, labels: Tensor, solver: Solver, start: Tensor, noise: Tensor) -> Tensor:
    """The states behind each step: those of the steps before the last are what each step is given."""
    states: list[Tensor] = []

    class Watched(type(solver)):
        def step(self, x: Tensor, step: Any) -> Tensor:
            states.append(super().step(x, step))
            return states[-1]

    watched = Watched.__new__(Watched)
    vars(watched).update(vars(solver))
    trajectory(generator, labels, watched, start, noise=noise)
    return torch.stack(states)


def sit_losses(generator: Any, case: Case, t: Tensor) -> Tensors:
    inputs, backbone = case.inputs, generator.backbone
    x_t = generator.denoiser.path.add_noise(inputs["x"], inputs["noise"], t)
    with gradients(backbone):
        output = backbone(x_t, generator.network_time(t), inputs["y"])
        loss = generator.objective(output, inputs["x"], inputs["noise"], x_t=x_t, t=t)["error"]
        loss.mean().backward()
        last = torch.zeros(case.expected["grad.final_layer.linear.weight"].shape)
        channels, patch = x_t.shape[1], backbone.patch_size
        # The published weights have the other sign, and rows that are never read.
        last.view(patch**2, -1, last.shape[1])[:, :channels] = -backbone.output.weight.grad.unflatten(0, (-1, channels))
        return {
            "loss": loss.detach(),
            "loss_pred": -output.detach(),
            "grad.x_embedder.proj.weight": backbone.patch_embedding.weight.grad.unflatten(1, (channels, patch, patch)),
            "grad.blocks.0.attn.qkv.weight": backbone.blocks[0].attention.query_key_value.weight.grad,
            "grad.final_layer.linear.weight": last,
            "grad.y_embedder.embedding_table.weight": backbone.class_embedding.weight.grad,
        }


@contextmanager
def gradients(module: torch.nn.Module) -> Iterator[None]:
    """With gradients of a module's parameters, which are forgotten at the end."""
    with torch.enable_grad():
        yield
    module.zero_grad(set_to_none=True)


def ldm(load: Load, case: Case) -> Tensors:
    generator, inputs = load(), case.inputs
    backbone, denoiser, path = generator.backbone, generator.denoiser, generator.denoiser.path
    x, labels, noise = inputs["x"], inputs["y"], inputs["noise"]
    t = (inputs["t"].double() + 1) / path.steps
    eps = guided(generator, labels).output(x, t, 1.0)
    estimate = denoiser(eps, x, t)
    posterior = Posterior.between(path, t, t - 1 / path.steps, like=x)
    mean = posterior.mean(estimate.data, x)
    made = {
        "context": backbone.class_embedding(labels)[:, None],
        "x_t": path.add_noise(x, noise, t),
        "eps": eps,
        "eps_null": guided(generator, null(generator, labels)).output(x, t, 1.0),
        "p_mean": mean,
        "p_sample": mean + posterior.variance.sqrt().to(x.dtype) * noise,
        "p_x0": estimate.data,
    }
    made |= ldm_losses(generator, case, t)
    return made | ldm_samples(generator, case)


def ldm_losses(generator: Any, case: Case, t: Tensor) -> Tensors:
    inputs, backbone = case.inputs, generator.backbone
    x_t = generator.denoiser.path.add_noise(inputs["x"], inputs["noise"], t)
    with gradients(backbone):
        output = backbone(x_t, generator.network_time(t), inputs["y"])
        loss = generator.objective(output, inputs["x"], inputs["noise"], x_t=x_t, t=t)["error"].mean()
        loss.backward()
        # With one vector to attend to, and norms of one channel each, these are 0 but for rounding.
        key = backbone.middle[0].attention.layers[0].cross_attention.key_value.weight.grad.chunk(2)[0]
        time = backbone.time_embedding.layers[0].weight.grad
        published = case.expected["grad.model.diffusion_model.time_embed.0.weight"]
        assert float(key.abs().max()) < 1e-7 and float(time.abs().max()) < 1e-7 > float(published.abs().max())
        middle = "grad.model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight"
        return {
            "loss": loss.detach()[None],
            middle: torch.zeros_like(key),
            "grad.cond_stage_model.embedding.weight": backbone.class_embedding.weight.grad,
            "grad.model.diffusion_model.out.2.weight": backbone.conv_out.weight.grad,
        }


def ldm_samples(generator: Any, case: Case) -> Tensors:
    inputs, path, x, labels = case.inputs, generator.denoiser.path, case.inputs["x"], case.inputs["y"]
    steps, index = int(case.number("ddim_timesteps", "S")), int(inputs["index"])
    settings: Any = {"spacing": "strided", "offset": 1, "last": "first_step"}
    times = torch.tensor(DDIM(steps, **settings).times(path), dtype=torch.float64).flip(0)
    later, earlier = times[1:], times[:-1]
    squares = path.alpha(times) ** 2
    variance = Posterior.between(path, later, earlier, like=torch.empty(steps)).variance

    def one_step(eta: float, scale: float) -> tuple[Tensor, Tensor]:
        network, seen = guided(generator, labels), []

        def denoise(state: Tensor, t: float) -> Estimate:
            assert t == float(later[index])
            seen.append(network(state, t, scale))
            return seen[0]

        class OneStep(DDIM):
            def times(self, path: Any) -> list[float]:
                return [float(later[index]), float(earlier[index])]

        drawn = OneStep(1, eta=eta)(denoise, x, path=path, noise=lambda step: inputs["noise"])
        return drawn, seen[0].data

    with_noise, data = one_step(1.0, 1.0)
    network = guided(generator, labels)
    few = DDIM(int(case.number("ddim_sample_cfg", "S")), **settings)
    scale = case.number("ddim_sample_cfg", "guidance")
    return {
        "ddim_timesteps": path.network_time(later).round().long(),
        "ddim_alphas": squares[1:].float(),
        "ddim_alphas_prev": squares[:-1].float(),
        "ddim_sigmas_eta1": variance.sqrt().float(),
        "ddim_step_eta1": with_noise,
        "ddim_step_x0": data,
        "ddim_step_cfg3": one_step(0.0, case.number("ddim_step_cfg3", "guidance"))[0],
        "ddim_sample_cfg": few(lambda state, t: network(state, t, scale), inputs["noise"], path=path),
    }


class StoredDraws:
    """The orders and the noise of MAR's case in the place of random numbers."""

    def __init__(self, case: Case, solver: Solver, dim: int) -> None:
        self.indices = torch.arange(len(case.inputs["y"]))
        self.orders, self.noise = case.inputs["orders"], case.inputs["sample_noise"]
        self.steps, self.dim = solver.steps, dim

    def ahead(self, steps: int) -> "StoredDraws":
        return self

    def uniform(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
        """Numbers that sort the places by their turn: the last of an order is drawn first."""
        turns = torch.arange(count, dtype=torch.float64).flip(0).expand_as(self.orders)
        return torch.empty_like(turns).scatter(1, self.orders, turns)

    def normal(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
        iteration, number = divmod(step, self.steps + 1)
        rows = len(self.indices) * count // self.dim
        return self.noise[iteration, number, :rows].reshape(len(self.indices), count)


def mar(load: Load, case: Case) -> Tensors:
    generator, inputs = load(), case.inputs
    head, network, labels = generator.head, generator.backbone, inputs["y"]
    denoiser, path = head.denoiser, head.denoiser.path
    vectors, masked = generator.to_sequence(inputs["latents"]), inputs["mask"].bool()
    known = int((~masked).sum(dim=1).max())
    places = masked.to(torch.uint8).argsort(dim=1, stable=True)[:, :known]
    z = network(vectors, masked, labels, known=known)
    flat, rows = z.flatten(0, 1), vectors.flatten(0, 1)
    made = {
        "patches": vectors,
        "unpatchified": generator.to_grid(vectors),
        "encoder": network.encode(vectors, places, labels),
        "z": z,
        "z_uncond": network(vectors, masked, null(generator, labels), known=known),
        "diffloss_net": head.network(rows, inputs["t"], flat),
        "alphas_cumprod_train": path.squared_alphas[1:].float(),
    }
    # A time of training is the middle of its step's share of uniform numbers.
    uniforms = (inputs["t"].double() + 0.5) / path.steps
    head.repeats = 1
    terms = head.losses(flat, rows, uniforms=uniforms[None], noise=inputs["noise"][None])
    made |= {"diff_mse": terms["error"], "diff_vb": terms["bound"], "diff_loss": terms["error"] + terms["bound"]}

    solver = generator.sampler.solver
    times = torch.tensor(solver.times(path), dtype=torch.float64).flip(0)
    later, earlier = times[1:][inputs["t_gen"]], times[:-1][inputs["t_gen"]]
    estimate = denoiser(head.network(rows, path.network_time(later).round(), flat), rows, later)
    posterior = Posterior.between(path, later, earlier, like=rows)
    # The first step's posterior has no variance; the next one's stands for it.
    smallest = Posterior.between(path, times[2:3], times[1:2], like=rows[:1]).variance
    smallest = torch.where(posterior.variance == 0, smallest, posterior.variance)
    made |= {
        "p_mean": posterior.mean(estimate.data, rows),
        "p_log_variance": posterior.log_variance(estimate, smallest=smallest),
        "p_pred_xstart": estimate.data,
        "use_timesteps": path.network_time(times[1:]).round().long(),
        "betas_gen": Posterior.between(path, times[1:], times[:-1], like=times[1:]).largest_variance.float(),
    }
    plain = load(sampling={**case.constructor["sampling"], "cfg": 1.0, "temperature": 1.0})
    for name, module in (("sampled_cfg", generator), ("sampled_nocfg", plain)):
        draws: Any = StoredDraws(case, solver, generator.dim)
        made[name] = module.draw(labels, draws).tokens
    return made


class StoredNoise:
    """The noise of HART's case in the place of random numbers; its ids are the most probable ones."""

    def __init__(self, case: Case, solver: Solver) -> None:
        self.indices = torch.arange(len(case.inputs["context"]))
        self.noise, self.steps = case.inputs["gen_noise"], solver.steps

    def uniform(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
        return torch.full((len(self.indices), count), 0.5, dtype=torch.float64)

    def normal(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
        iteration, number = divmod(step, self.steps + 1)
        rows = len(self.indices) * count // self.noise.shape[-1]
        return self.noise[iteration, number, :rows].reshape(len(self.indices), count)


def hart(load: Load, case: Case) -> Tensors:
    generator, inputs = load(), case.inputs
    network, read = generator.backbone, inputs["var_input"]
    condition = text_in_front(case)
    hidden, _ = network.elements(read, condition)
    last = generator.lengths[-1]
    tokenizer = generator.tokenizer.tokenizer
    greedy = copy(generator.sampler)
    greedy.top_k = 1
    conditions: list[Tensor] = []
    sample = generator.head.sample

    def watched(z: Tensor, *arguments: Any, **named: Any) -> Tensor:
        conditions.append(z)
        return sample(z, *arguments, **named)

    draws: Any = StoredNoise(case, generator.head.solver)
    with patch.object(generator.head, "sample", watched):
        drawn = greedy(network, generator.head, condition, draws, pyramid=HybridPyramid(generator.quantizer))
    *coarse, finest = generator.quantizer.split(drawn.tokens)
    return {
        "hidden": hidden,
        "logits": network(read, condition).logits,
        "head_condition": network.head_condition(hidden[:, -last:], read[:, -last:]),
        **{f"greedy_idx_{number}": ids for number, ids in enumerate(coarse)},
        "greedy_idx_last_first_iter": finest,
        "greedy_head_condition": conditions[0],
        "greedy_fhat": drawn.latents,
        "greedy_image": (tokenizer.decode_latents(drawn.latents) + 1) / 2,
        **hart_head(generator.head, case),
    }


def text_in_front(case: Case) -> Condition:
    """The case's text, whose positions the reference is given and ours counts."""
    context, valid = case.inputs["context"], case.inputs["context_mask"].bool()
    assert torch.equal(context_positions(valid), case.inputs["context_position_ids"])
    labels = torch.zeros(len(context), dtype=torch.int64)
    return Condition(labels=labels, context=context, context_mask=valid)


def hart_head(head: Any, case: Case) -> Tensors:
    """The head's loss with its gradients, its outputs, and what it draws; null conditions are the second half."""
    inputs, denoiser, path, network = case.inputs, head.denoiser, head.denoiser.path, head.network
    target, t, z = inputs["target"], inputs["t"], inputs["z"]
    half, dim = len(target) // 2, target.shape[1]
    repeats, head.repeats = head.repeats, 1
    # A time of training is the middle of its step's share of uniform numbers.
    uniforms = (t.double() + 0.5) / path.steps
    with gradients(head):
        terms = head.losses(z, target, uniforms=uniforms[None], noise=inputs["noise"][None])
        loss = (terms["error"] + terms["bound"]).mean()
        loss.backward()
        made = {
            "diff_loss": loss.detach(),
            "grad.diffloss.net.cond_embed.weight": network.condition_projection.weight.grad,
            "grad.diffloss.net.input_proj.weight": network.input_projection.weight.grad,
            "grad.diffloss.net.final_layer.linear.weight": network.output.weight.grad,
        }
    head.repeats = repeats

    def in_both_halves(output: Tensor, scale: float) -> Tensor:
        """The reference's doubled batch: the guided noise for both halves, the variance of each one's own."""
        guided = denoiser.guide(*output.chunk(2), scale)[:, :dim]
        return torch.cat((guided.repeat(2, 1), output[:, dim:]), dim=1)

    scale = 1 + case_number(case, "head_out_cfg", r"cfg_scale=(\d+\.\d+)")
    first_twice = target[:half].repeat(2, 1)
    made |= {
        "head_out": network(target, t, z),
        "head_out_cfg": in_both_halves(network(first_twice, t, z), scale),
    }
    noise = inputs["head_noise"]
    made["head_sample"] = head.sample(z, noise[0], noise=lambda step: noise[step + 1])
    scale = 1 + case_number(case, "head_sample_cfg", r"cfg=(\d+\.\d+)")
    projected = network.condition_projection(z)

    def denoise(x: Tensor, time: float) -> Estimate:
        step = path.network_time(torch.tensor([time], dtype=torch.float64)).round()
        output = network.denoise(x[:half].repeat(2, 1), step, projected)
        return denoiser(in_both_halves(output, scale), x, time)

    start = noise[0, :half].repeat(2, 1)
    both = head.solver(denoise, start, path=path, noise=lambda step: noise[step + 1]) * head.scale
    guided = head.sample(z, noise[0, :half], noise=lambda step: noise[step + 1, :half], guidance_scale=scale)
    return made | {"head_sample_cfg": torch.cat((guided, both[half:]))}


def case_number(case: Case, output: str, pattern: str) -> float:
    return float(case.read(output, pattern)[1])


def network_outputs(generator: Any, case: Case) -> Tensors:
    """What the network makes of given noisy latents, or for MAR of those that are known, and its head of noisy ones."""
    if case.family == "hart":
        states = generator.backbone(case.inputs["var_input"], text_in_front(case))
        noisy = case.inputs["target"], case.inputs["t"], case.inputs["z"]
        return {"logits": states.logits, "head_out": generator.head.network(*noisy)}
    inputs, labels = case.inputs, case.inputs["y"]
    if case.family == "mar":
        vectors, masked = generator.to_sequence(inputs["latents"]), inputs["mask"].bool()
        z = generator.backbone(vectors, masked, labels, known=int((~masked).sum(dim=1).max()))
        return {"z": z, "diffloss_net": generator.head.network(vectors.flatten(0, 1), inputs["t"], z.flatten(0, 1))}
    path = generator.denoiser.path
    t = 1 - inputs["t"].double() if case.family == "sit" else (inputs["t"].double() + 1) / path.steps
    output = generator.backbone(inputs["x"], generator.network_time(t), labels)
    return {"sit": {"velocity": -output}, "dit": {"out": output}, "ldm": {"eps": output}}[case.family]


def again(module: Any, case: Case) -> Tensors:
    """What a module that was saved and loaded again must give bit for bit."""
    if case.family == "hart":
        random = CounterRandom(0, torch.arange(len(case.inputs["context"])))
        return {"output": module.draw_given(text_in_front(case), random).tokens}
    if case.family == "mar":
        return {"output": module.sample(case.inputs["y"])}
    times = case.inputs["t"].float()
    return {"output": module.backbone(case.inputs["x"], times, case.inputs["y"])}


OUTPUTS = {"dit": dit, "sit": sit, "ldm": ldm, "mar": mar, "hart": hart}
