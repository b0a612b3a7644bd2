"""BitDance's sampler: next-token prediction whose bits are drawn together by flow matching (BitDance, 2026)."""

from typing import Literal

import torch
from einops import rearrange
from torch import Tensor

from discrete_lit.backbones import BinaryFlowHead, IdHead
from discrete_lit.core.modules import widened
from discrete_lit.core.random import Purpose
from discrete_lit.core.synchronisation import forbid
from discrete_lit.diffusion.solvers import Solver
from discrete_lit.samplers.guidance import GuidanceSchedule, guided_steps
from discrete_lit.samplers.raster import common_prefix
from discrete_lit.samplers.sampler import CachedDecoder, Sampler, SamplingContext


class BinaryFlowSampler(Sampler):
    """Sample block by block: a pass of the backbone over each block of p ids, then the steps of the head's solver.

    Guidance acts on what the head predicts, at every step of its solver, and both halves share their noise. Known
    tokens must be whole blocks at the beginning. Ids have no probabilities: there are no temperature and no filters.

    Args:
        solver: of the head; its own by default. The fresh noise of `EulerMaruyama` has a temperature.
        guidance_scale: s of `uncond + s (cond - uncond)`; 3.2 is published for B, 4.0 for L, 4.55 for H, 3.9 for B in
            blocks of 4 and 6.1 in blocks of 16.
        guidance_schedule: over the blocks, r = i / (N / p) at block i from 0; `linear` is BitDance's.
        null_rows: what the rows of the null label read of a block that is drawn at scale 1, such as the first of the
            linear schedule: `"shared"`, the same ids, or `"own"`, ids of their own, as in BitDance's code.
        guidance_power, guidance_interval: as in `Sampler`.

    Raises:
        ValueError: a setting out of its range; in use, a generator without a `BinaryFlowHead`, or known tokens that are
            no whole blocks at the beginning.
    """

    attention = "causal"

    def __init__(
        self,
        solver: Solver | None = None,
        *,
        guidance_scale: float = 1.0,
        guidance_schedule: GuidanceSchedule = "linear",
        guidance_power: float = 1.0,
        guidance_interval: tuple[int, int] | None = None,
        null_rows: Literal["shared", "own"] = "shared",
    ) -> None:
        super().__init__(
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            guidance_power=guidance_power,
            guidance_interval=guidance_interval,
        )
        if null_rows not in ("shared", "own"):
            raise ValueError(f"null_rows must be 'shared' or 'own', got {null_rows!r}")
        self.solver = solver
        self.null_rows: Literal["shared", "own"] = null_rows

    def draw(self, context: SamplingContext) -> Tensor:
        layout, head = context.layout, _checked(context.backbone.place_head)
        p, mask_id = layout.block_size, layout.mask_id
        blocks, solver = layout.length // p, self.solver or head.flow.solver
        scales = self.scales(blocks)
        decoder = CachedDecoder(context, guided_steps(scales))
        random, draws = context.random.ahead(blocks * (solver.steps + 1)), solver.steps + 1

        tokens = context.start()
        known, first = tokens != mask_id, 0
        if context.known is not None:
            of_blocks = known.unflatten(1, (blocks, p))
            if bool((of_blocks.any(dim=2) != of_blocks.all(dim=2)).any()):
                raise ValueError(f"known tokens must be whole blocks of {p}: the ids of a block are drawn together")
            first = common_prefix(known) // p
        null_tokens = tokens.clone() if self.null_rows == "own" else None
        read = 0  # the cache holds the blocks before this one
        for block in range(first, blocks):
            here, before = slice(block * p, (block + 1) * p), slice(read * p, block * p)
            hidden = decoder(
                tokens[:, before], block, null_tokens=None if null_tokens is None else null_tokens[:, before]
            )[:, -p:]
            read, scale = block, scales[block]
            unguided = decoder.doubled and scale == 1
            own = unguided and null_tokens is not None
            if unguided and not own:
                hidden = hidden[: len(tokens)]

            def noise(step: int, halves: int = 1 + own, block: int = block, like: Tensor = hidden) -> Tensor:
                numbers = random.normal(Purpose.LATENT_NOISE, halves * p * head.bits, block * draws + step)
                numbers = numbers.to(widened(like.dtype))
                return rearrange(numbers, "b (h p bits) -> (h b) p bits", h=halves, p=p)

            for _ in range(solver.evaluations):
                context.count_head(1 + (decoder.doubled and (own or not unguided)), 0)
            vectors = head.sample(
                hidden,
                noise(0),
                noise=lambda step, noise=noise: noise(step + 1),
                guidance_scale=scale,
                solver=solver,
            )
            forbid(vectors.isnan().any(), lambda block=block: f"what the head predicts of block {block} is NaN")
            halves = head.ids(vectors).chunk(1 + own)
            tokens[:, here] = torch.where(known[:, here], tokens[:, here], halves[0])
            if null_tokens is not None:
                null_tokens[:, here] = torch.where(known[:, here], tokens[:, here], halves[-1])
            if context.traced:
                context.record(tokens, torch.full(tokens.shape, torch.nan, dtype=torch.float64, device=tokens.device))
        return tokens


def _checked(head: IdHead | None) -> BinaryFlowHead:
    if not isinstance(head, BinaryFlowHead):
        raise ValueError(
            f"BinaryFlowSampler draws from a generator with a BinaryFlowHead, this one has "
            f"{'no place_head' if head is None else 'a ' + type(head).__name__}"
        )
    return head
