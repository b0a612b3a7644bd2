"""Discrete flow matching's loss (Gat et al., 2024; Shaul et al., "Flow Matching with General Discrete Paths", 2024)."""

import torch
from torch import Tensor

from discrete_lit.processes.forward import ForwardProcess
from discrete_lit.processes.heads import Head
from discrete_lit.processes.losses.diffusion_loss import DiffusionLoss, gather
from discrete_lit.processes.mixture import MixtureProcess
from discrete_lit.processes.noise_level import NoiseLevel


class FlowMatching(DiffusionLoss):
    """The generalised KL of mixture paths: `m' / m [x_t != x_0](-log p(x_0)) + m' / m ([x_t = x_0] - p(x_t))`.

    p is the posterior, with which tokens jump at rate `m' / m p(y)` (Shaul et al., eq. 36): it bounds -log p of that
    chain, which for masks is the reverse of the noise, and else another chain with the same marginals.
    """

    heads = frozenset({"posterior"})
    kind = "bound"

    def check(self, head: Head, process: ForwardProcess) -> None:
        super().check(head, process)
        if not isinstance(process, MixtureProcess):
            raise ValueError(
                "FlowMatching is for paths that mix data with one distribution (AbsorbingProcess, UniformProcess, "
                f"HybridProcess), got {type(process).__name__}"
            )

    def integrand(
        self, logits: Tensor, head: Head, tokens: Tensor, states: Tensor, process: ForwardProcess, level: NoiseLevel
    ) -> Tensor:
        posterior = head(logits, states, level)
        is_mask = states == process.vocab_size
        at_clean = gather(posterior, tokens).double()
        at_state = gather(posterior, states.masked_fill(is_mask, 0)).double().exp()
        moved = -at_clean - torch.where(is_mask, 0.0, at_state)
        return level.mask_weight * torch.where(states == tokens, 1 - at_state, moved)
