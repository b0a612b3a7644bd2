"""What our generators of latents in turn, of cells or of channels, give for the inputs of the golden cases."""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.core.random import Purpose
from discrete_lit.samplers import DimensionwiseSampler
from discrete_lit.tokenizers.quantizers import NormalLevels
from helpers.golden import Case, Compared, Load, Tensors
from helpers.golden_latents import gradients

TOLERANCE = 2e-5
# Shares of the largest of the reference, where its own sentence says that it is not exact.
TOLERANCES = {("xar", "sampled"): 1e-4, ("xar", "sampled_clusters"): 1e-4}
NO_PLACE: dict[str, dict[str, str]] = {}
COMPARED: Compared = {}


class CellDraws:
    """The stored times and noise of xAR's case in the place of random numbers; cells are the case's first dimension."""

    def __init__(self, case: Case) -> None:
        self.inputs = case.inputs
        self.indices = torch.arange(len(case.inputs["y"]))
        self.cells, batch, self.places, self.channels = case.inputs["noise"].shape
        assert batch == len(self.indices)

    def uniform(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
        """The numbers whose times, of a normal logit, are the stored ones."""
        assert purpose == Purpose.DIFFUSION_TIME and count == self.cells
        return torch.special.ndtr(torch.logit(self.inputs["t"].double())).view(self.cells, -1).T

    def normal(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
        noise = self.inputs["sde_noise"]
        if purpose == Purpose.DIFFUSION_NOISE:
            return self.inputs["noise"].transpose(0, 1).flatten(1).double()
        # A cell's steps follow one another; its last one has no noise, its start is counted as the first.
        number, step = divmod(step, noise.shape[1] + 1)
        of_cell = self.inputs["start"][number] if purpose == Purpose.DIFFUSION_START else noise[number, step]
        return of_cell.flatten(1).double()


def xar(load: Load, case: Case) -> Tensors:
    generator, draws, inputs = load(), CellDraws(case), case.inputs
    backbone, layout, latents = generator.backbone, generator.layout, inputs["latents"]
    any_draws: Any = draws
    made = {"clusters": layout.to_cells(latents), "velocity": network_outputs(generator, case)["velocity"]}
    with gradients(backbone):
        loss, _ = generator.loss(latents, inputs["y"], any_draws)
        loss.backward()
        made["loss"] = loss.detach()[None]
        made["grad.z_proj.weight"] = backbone.input_projection.weight.grad
        made["grad.pred.weight"] = backbone.output.weight.grad
        made["grad.class_emb.weight"] = backbone.class_embedding.weight.grad[inputs["y"]]
        # Theirs: gates, scales and shifts, each of the attention and of the MLP.
        shift1, scale1, gate1, shift2, scale2, gate2 = backbone.encoder[0].modulation.project.weight.grad.chunk(6)
        made["grad.encoder_blocks.0.ada_lin.1.weight"] = torch.cat((gate1, gate2, scale1, scale2, shift1, shift2))
    made["sampled"] = generator.draw(inputs["y"], any_draws).tokens
    return made | {"sampled_clusters": layout.to_cells(made["sampled"])}


class PlaceDraws:
    """TokenBridge's orders in the place of random numbers: the last of an order is drawn first."""

    def __init__(self, case: Case) -> None:
        self.orders = case.inputs["orders"]
        self.indices = torch.arange(len(self.orders))

    def uniform(self, purpose: Purpose, count: int, step: int = 0) -> Tensor:
        if purpose != Purpose.ORDER:
            return torch.full((len(self.orders), count), 0.5, dtype=torch.float64)  # which nobody reads
        turns = torch.arange(count, dtype=torch.float64).flip(0).expand_as(self.orders)
        return torch.empty_like(turns).scatter(1, self.orders, turns)


class RacedSampler(DimensionwiseSampler):
    """Draws by the race of exponentials that the case stores, or greedily, and keeps what it drew."""

    def race(self, case: Case, *, greedy: bool) -> None:
        self.case, self.greedy, self.ids = case, greedy, list[Tensor]()

    def choose(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        exponentials = self.case.inputs["exp"]
        if self.greedy:
            # What is drawn with a single id is checked beside the race.
            assert (self.temperature, self.top_k) == (1.0, 1)
            ids = super().choose(logits, uniforms)
        else:
            iteration, step = divmod(len(self.ids), exponentials.shape[1])
            law = (logits / self.temperature).softmax(dim=-1)
            ids = (law / exponentials[iteration, step, : len(law)]).argmax(dim=-1)
        self.ids.append(ids)
        return ids

    def tokens(self, channels: int) -> Tensor:
        """All that was drawn, in turn, in the order of the head: `(B N, D)`."""
        steps = [torch.stack(self.ids[first : first + channels], 1) for first in range(0, len(self.ids), channels)]
        return torch.cat(steps)


def raced(generator: Any, case: Case, *, greedy: bool) -> tuple[Tensor, Tensor]:
    """The latents and the tokens of a draw by the generator's own sampler."""
    sampler = RacedSampler.__new__(RacedSampler)
    vars(sampler).update(vars(generator.sampler))
    sampler.race(case, greedy=greedy)
    draws: Any = PlaceDraws(case)
    return generator.draw(case.inputs["y"], draws, sampler).tokens, sampler.tokens(generator.dim)


def tokenbridge(load: Load, case: Case) -> Tensors:
    generator, inputs, made = load(), case.inputs, Tensors()
    # The tables of the quantiser, before they are mapped to the latents' range.
    low, high, std_range = (case.constructor[name] for name in ("quant_min", "quant_max", "std_range"))
    for match in case.matching(r"values_(\d+)").values():
        count = int(match[1])
        table = NormalLevels(count, low=-std_range, high=std_range, std_range=std_range)
        mapped = NormalLevels(count, low=low, high=high, std_range=std_range)
        made |= {
            f"boundaries_{count}": table.boundaries,
            f"values_{count}": table.values,
            f"indices_{count}": mapped(inputs["x"]),
            f"dequant_{count}": mapped.lookup(mapped(inputs["x"])),
            f"bucket_{count}": torch.bucketize(inputs["x"], mapped.boundaries[1:-1]),
        }
    ids, masked = generator.to_ids(inputs["latents"]), masks(case)
    made |= {"quant_indices": ids, "quant_values": generator.quantizer.lookup(ids), "mask": masked.float()}
    head = generator.head
    with gradients(generator):
        z = hidden(generator, case)
        losses = head.losses(z[masked], ids[masked])
        losses.mean().backward()
        made |= {"loss": losses.mean().detach()[None], "z": z.detach()}
        parameters = dict(generator.named_parameters())
        made |= {
            f"grad.{theirs}": parameters[ours].grad
            for theirs, ours in {
                "z_proj.weight": "backbone.input_projection.weight",
                "condition_proj.weight": "head.condition_projection.weight",
                "token_embeddings.0.weight": "head.tables.0.weight",
                "channel_blocks.0.adaLN_modulation.1.weight": "head.blocks.0.modulation.project.weight",
                "channel_heads.15.weight": "head.logits.15.project.weight",
            }.items()
        }
        made["grad.class_emb.weight"] = parameters["backbone.class_embedding.weight"].grad[:-1]
        made["grad.timesteps_embeddings"] = parameters["head.steps"].grad[None]
        made["grad.channel_embed"] = parameters["head.positions"].grad[None]
    made["logits"] = head.all_logits(made["z"][masked], ids[masked])

    seen: list[Tensor] = []

    def greedily(logits: Tensor, uniforms: Tensor) -> Tensor:
        seen.append(logits)
        return logits.argmax(dim=-1)

    rows = made["z"].flatten(0, 1)[: len(case.expected["channel_greedy"])]
    drawn = head.sample(rows, torch.zeros(len(rows), generator.dim), greedily)
    made |= {
        "channel_greedy": drawn[:, head.order],
        "channel_logits": torch.stack(seen, dim=1),
        "channel_logits_tf": head.all_logits(rows, drawn),
    }
    # Both ways of the head's own law to these logits are one.
    torch.testing.assert_close(made["channel_logits"], head.all_logits(rows, drawn, drawn=True))

    sampling = case.constructor["sampling"]
    for name, module, greedy in (
        ("greedy_nocfg", load(sampling={**sampling, "cfg": 1.0, "temperature": 0.0}), True),
        ("greedy_cfg", load(sampling={**sampling, "temperature": 0.0}), True),
        ("sampled_cfg", generator, False),
    ):
        made[name], made[f"{name}_tokens"] = raced(module, case, greedy=greedy)
    return made


def masks(case: Case) -> Tensor:
    """The masked places `(B, N)` bool: the first of each order."""
    orders = case.inputs["orders"]
    count = int((orders.shape[1] * case.inputs["mask_rate"]).ceil())
    return torch.zeros(orders.shape, dtype=torch.bool).scatter(1, orders[:, :count], True)


def hidden(generator: Any, case: Case) -> Tensor:
    masked = masks(case)
    vectors = generator.quantizer.lookup(generator.to_ids(case.inputs["latents"]))
    return generator.backbone(vectors, masked, case.inputs["y"], known=int((~masked[0]).sum()))


def network_outputs(generator: Any, case: Case) -> Tensors:
    """What the network makes of the case's noisy latents, or of those that are known, and its head of true ids."""
    inputs = case.inputs
    if case.family == "tokenbridge":
        ids, masked, z = generator.to_ids(inputs["latents"]), masks(case), hidden(generator, case)
        return {"z": z, "logits": generator.head.all_logits(z[masked], ids[masked])}
    draws = CellDraws(case)
    cells = generator.layout.to_cells(inputs["latents"])
    times, noise = inputs["t"].view(draws.cells, -1).T, inputs["noise"].transpose(0, 1)
    x_t = (1 - times[..., None, None]) * cells + times[..., None, None] * noise
    return {"velocity": generator.backbone(x_t, generator.network_time(times), inputs["y"]).flatten(1, 2)}


def again(module: Any, case: Case) -> Tensors:
    """What a module that was saved and loaded again must give bit for bit."""
    return {"output": module.sample(case.inputs["y"])}


OUTPUTS = {"xar": xar, "tokenbridge": tokenbridge}
