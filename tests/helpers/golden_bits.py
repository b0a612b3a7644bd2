"""What our generators of bits (BitDance) give for the inputs of the golden cases, by the names of their outputs.

Their time runs from noise to data, ours back.
"""

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from discrete_lit.backbones import ids_of_signs
from discrete_lit.core.random import Purpose
from helpers.golden import Case, Compared, Load, Tensors
from helpers.golden_latents import gradients

TOLERANCE = 2e-5
TOLERANCES: dict[tuple[str, str], float] = {}
NO_PLACE: dict[str, dict[str, str]] = {}
COMPARED: Compared = {}


class StoredDraws:
    """The numbers of a case in the place of random ones."""

    def __init__(self, case: Case, *, bits: int, repeats: int, solver_steps: int) -> None:
        self.inputs, self.bits, self.repeats, self.draws = case.inputs, bits, repeats, solver_steps + 1
        self.indices = torch.arange(len(case.inputs["y"]))

    def ahead(self, steps: int) -> "StoredDraws":
        return self

    def uniform(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
        if purpose == Purpose.EXPOSURE:
            made = torch.cat([self.inputs[name].flatten(1) for name in ("flip_r1", "flip_r2")], dim=1).double()
        else:
            assert purpose == Purpose.DIFFUSION_TIME
            made = rearrange(
                torch.special.ndtr(-self.inputs["t_draw"].double()),
                "(r b n) -> b (r n)",
                r=self.repeats,
                b=len(self.indices),
            )
        assert made.shape[1] == count
        return made

    def normal(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
        if purpose == Purpose.DIFFUSION_NOISE:
            noise = self.inputs["e"].flatten(1)
            made = rearrange(noise, "(r b n) c -> b (r n c)", r=self.repeats, b=len(self.indices))
        else:
            block, number = divmod(step, self.draws)
            noise = self.inputs["start"][block] if number == 0 else self.inputs["sde"][block, number - 1]
            halves = count // noise[0].numel()
            made = rearrange(noise[: halves * len(self.indices)].flatten(1), "(h b) c -> b (h c)", h=halves)
        assert made.shape[1] == count
        return made.double()


def draws_of(generator: Any, case: Case) -> Any:
    head = generator.backbone.place_head
    steps = generator.sampler.solver.steps
    return StoredDraws(case, bits=head.bits, repeats=head.flow.repeats, solver_steps=steps)


def hidden_of(generator: Any, read: Tensor, labels: Tensor) -> Tensor:
    """What the head reads of every position, `(B, N, D)`, in the generator's order."""
    order = generator.fixed_order
    return generator.backbone(read, labels, order=None if order is None else order.expand(len(labels), -1))


def in_order(generator: Any, table: Tensor) -> Tensor:
    """Rows of the positions of the grid in the generator's order."""
    return table if generator.fixed_order is None else table[generator.fixed_order]


def other_axis_first(weight: Tensor, heads: int) -> Tensor:
    """Queries and keys with the halves of each head exchanged."""
    parts = weight.unflatten(0, (3, heads, 2, -1))
    return torch.cat((parts[:2].flip(2), parts[2:])).flatten(0, 3)


def bits(load: Load, case: Case) -> Tensors:
    generator, inputs = load(), case.inputs
    head, labels, p = generator.backbone.place_head, inputs["y"], generator.block_size
    ids = ids_of_signs(inputs["latents"])
    sequences, draws = generator.to_sequence(ids), draws_of(generator, case)
    made = {"tokens": head.signs(sequences)}
    made |= trained(generator, case, ids, draws)
    hidden = hidden_of(generator, sequences[:, :-p], labels)
    made["cond_eval"] = head._blocks(hidden)
    head.train()
    made["loss_eval"] = head.losses(hidden, sequences, draws)[0].mean()
    head.eval()
    backbone = generator.backbone
    table = backbone.positions.table
    rotations = torch.cat((table[: backbone.starts], in_order(generator, table[backbone.starts :])))
    if generator.fixed_order is not None:
        rotations = rotations[:-p]
    made["freqs_cis"] = torch.cat(rotations.chunk(2, dim=1)[::-1], dim=1)
    if p > 1:
        made["attn_mask_open"] = backbone.mask
    return made | at_one_position(generator, case, hidden, draws) | sampled(generator, load, case)


def trained(generator: Any, case: Case, ids: Tensor, draws: Any) -> Tensors:
    """The loss of training, what it is made of, and its gradients."""
    inputs, backbone, p = case.inputs, generator.backbone, generator.block_size
    head, flow = backbone.place_head, backbone.place_head.flow
    dropped = inputs["drop_uniform"] < generator.label_dropout
    labels = inputs["y"].masked_fill(dropped, generator.num_classes)
    generator.train()
    sequences = generator.to_sequence(ids)
    read = generator._perturbed(sequences, draws)[:, :-p]
    with gradients(generator):
        loss, _ = generator.loss(ids, inputs["y"], draws, dropped=dropped)
        loss.backward()
        network = flow.network
        grads = {
            "proj_in.w1.weight": backbone.token_embedding.expand.weight.grad,
            "layers.0.attention.wqkv.weight": other_axis_first(
                backbone.blocks[0].attention.query_key_value.weight.grad, backbone.heads
            ),
            "head.net.final_layer.linear.weight": network.output.weight.grad,
            "head.net.time_embed.mlp.0.bias": network.time_embedding.layers[0].bias.grad,
            "pos_for_diff.weight": in_order(generator, backbone.hidden_positions.grad),
            "emb_norm.weight": backbone.embedding_norm.weight.grad,
            "cls_embedding": backbone.class_embedding.weight.grad[[int(inputs["y"][0]), generator.num_classes]],
        }
        if p > 1:
            grads["query_token"] = backbone.queries.grad
        grads = {f"grad.{name}": value.clone() for name, value in grads.items()}
    rows = head._blocks(hidden_of(generator, read, labels))
    data = head._blocks(head.signs(sequences))
    data = data.repeat(flow.repeats, *(1,) * (data.ndim - 1))
    t = flow.objective.times(torch.special.ndtr(-inputs["t_draw"].double()))
    x_t = flow.denoiser.path.add_noise(data, inputs["e"], t)
    projected = network.condition_projection(rows)
    projected = projected.repeat(flow.repeats, *(1,) * (projected.ndim - 1))
    generator.eval()
    return {
        "loss": loss.detach(),
        "flipped_input": head.signs(read),
        "t": (1 - t).float(),
        "z_t": x_t,
        "cond": rows,
        "x_pred": flow.estimate(x_t, t, projected).data,
        **grads,
    }


def at_one_position(generator: Any, case: Case, hidden: Tensor, draws: Any) -> Tensors:
    """The head's draws at one position, or block of them."""
    head, p, batch = generator.backbone.place_head, generator.block_size, len(hidden)
    block = case.constructor["sampling"]["position"]
    here = slice(block * p, (block + 1) * p)
    position = in_order(generator, generator.backbone.hidden_positions)[here]
    # The second half is the case's own: it stands for null rows.
    given = torch.cat((hidden[:, here] - position, case.expected["position_hidden"][batch:]))
    made = {"position_hidden": given}
    solver = generator.sampler.solver
    for noise in ("zero", "noise"):
        for guidance in ("nocfg", "cfg"):
            rows = (given if guidance == "cfg" else given[:batch]) + position
            scale = 1.0
            if guidance == "cfg":
                scale = 1 + (generator.sampler.guidance_scale - 1) * block * p / generator.length

            def fresh(number: int, noise: str = noise) -> Tensor:
                numbers = draws.normal(Purpose.LATENT_NOISE, p * head.bits, block * (solver.steps + 1) + number)
                return (noise == "noise") * numbers.float().view(batch, p, head.bits)

            drawn = head.sample(
                rows, fresh(0), noise=lambda n, fresh=fresh: fresh(n + 1), guidance_scale=scale, solver=solver
            )
            drawn = drawn.repeat(len(rows) // batch, 1, 1)
            expected = case.expected[f"position_pred_{noise}_{guidance}"]
            made[f"position_pred_{noise}_{guidance}"] = drawn.view(len(rows), *expected.shape[1:])
            made[f"position_bits_{noise}_{guidance}"] = head.signs(head.ids(drawn))
    return made


def sampled(generator: Any, load: Load, case: Case) -> Tensors:
    """Whole samples, and what the head predicts at every position before the sign."""
    plain = load(sampling={**case.constructor["sampling"], "cfg_scale": 1.0})
    made: Tensors = {}
    for name, module in (("cfg", generator), ("nocfg", plain)):
        head, predicted, rows = module.backbone.place_head, [], len(case.inputs["y"]) * (1 + (name == "cfg"))
        draw = head.sample

        def watched(
            *given: Any, draw: Any = draw, rows: int = rows, predicted: Any = predicted, **named: Any
        ) -> Tensor:
            vectors = draw(*given, **named)
            predicted.append(vectors.repeat(rows // len(vectors), 1, 1))
            return vectors

        head.sample = watched
        try:
            drawn = module.draw(case.inputs["y"], draws_of(module, case)).tokens
        finally:
            del head.sample
        made |= {f"sampled_{name}": head.signs(drawn).movedim(-1, 1), f"preds_{name}": torch.stack(predicted, dim=1)}
    return made


def network_outputs(generator: Any, case: Case) -> Tensors:
    """What the head reads of given bits."""
    sequences = generator.to_sequence(ids_of_signs(case.inputs["latents"]))
    hidden = hidden_of(generator, sequences[:, : -generator.block_size], case.inputs["y"])
    return {"cond_eval": generator.backbone.place_head._blocks(hidden)}


def again(generator: Any, case: Case) -> Tensors:
    """What a module that was saved and loaded again must give bit for bit."""
    return {**network_outputs(generator, case), "tokens": generator.sample(case.inputs["y"])}


OUTPUTS = {"bitdance": bits, "bitdance_parallel": bits}
