"""What our generators of latents that are drawn in turn give for the inputs of the golden cases: cells, and channels."""

from typing import Any

import torch
from torch import Tensor

from discrete_lit.core.random import Purpose
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


def network_outputs(generator: Any, case: Case) -> Tensors:
    """What the network makes of the case's noisy latents."""
    inputs, draws = case.inputs, CellDraws(case)
    cells = generator.layout.to_cells(inputs["latents"])
    times, noise = inputs["t"].view(draws.cells, -1).T, inputs["noise"].transpose(0, 1)
    x_t = (1 - times[..., None, None]) * cells + times[..., None, None] * noise
    return {"velocity": generator.backbone(x_t, generator.network_time(times), inputs["y"]).flatten(1, 2)}


def again(module: Any, case: Case) -> Tensors:
    """What a module that was saved and loaded again must give bit for bit."""
    return {"output": module.sample(case.inputs["y"])}


OUTPUTS = {"xar": xar}
