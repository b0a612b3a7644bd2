"""What a flow-matching step of a diffusion decoder costs beyond the passes of its network.

    OMP_NUM_THREADS=2 python benchmarks/decoder_step.py
    OMP_NUM_THREADS=2 python benchmarks/decoder_step.py --precision bf16-mixed --batch 32

`TokenDiffusionDecoder` with DiT-B/2 over latents of 4 x 32 x 32, given 16 x 16 tokens of 16,384 ids as learned vectors
of 8 numbers, with times of a logit-normal law and dropped tokens. Latents and tokens come as arrays, so that no
tokenizer runs in either arm. A step is the loss with all that it draws, the backward pass and AdamW. The bare arm makes
the passes of the same network alone, forward and backward, on inputs and gradients that are there, and the same AdamW.
The arms take turns; their ratio by processor time is the one that other programs disturb least.

Measured on 29 November 2026, 2 threads on 2 cores of an AMD EPYC with avx512_bf16 that did nothing else, `--rounds 5
--precision 32-true`: a step takes 1.00 times its passes.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from side_by_side.published_shapes import autocast, dit_shape
from side_by_side.timing import alternate, milliseconds, ratio

from discrete_lit.backbones.condition import Condition
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.gaussian import GaussianDenoiser, RectifiedPath
from discrete_lit.diffusion.gaussian_losses import LogitNormalTimes
from discrete_lit.generators import TokenDiffusionDecoder
from discrete_lit.tokenizers import LatentGrid, TokenGrid

IDS, TOKEN_WIDTH, TOKENS, LATENTS = 16_384, 8, (16, 16), (4, 32, 32)


def make_decoder() -> TokenDiffusionDecoder:
    """The decoder in training mode, with random weights also where training starts at 0."""
    torch.manual_seed(0)
    decoder = TokenDiffusionDecoder(
        LatentGrid(LATENTS),
        256,
        discrete=TokenGrid(IDS, TOKENS),
        token_input="learned",
        token_width=TOKEN_WIDTH,
        backbone=lambda layout: dit_shape(context_channels=layout.context_channels, num_classes=layout.num_classes),
        denoiser=GaussianDenoiser(RectifiedPath(), prediction="velocity"),
        times=LogitNormalTimes(),
    )
    with torch.no_grad():
        for parameter in decoder.backbone.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return decoder.train()


def arms(decoder: TokenDiffusionDecoder, batch: int, precision: str) -> dict[str, Callable[[], None]]:
    """A step of the decoder, and the bare passes of its network; both step one optimizer."""
    device, network = decoder.device, decoder.backbone
    latents = torch.randn(batch, *LATENTS, device=device)
    condition = Condition(
        labels=torch.zeros(batch, dtype=torch.int64, device=device),
        grid=torch.randint(IDS, (batch, TOKENS[0] * TOKENS[1]), device=device),
    )
    optimizer = torch.optim.AdamW([*network.parameters(), *decoder.token_embedding.parameters()], lr=1e-5, fused=True)
    random = CounterRandom(0, torch.arange(batch, device=device))
    with torch.no_grad():
        read = decoder.given(condition)
    time, gradient = 1000 * torch.rand(batch, device=device), torch.randn_like(latents)

    def update(backward: Callable[[], None]) -> None:
        optimizer.zero_grad()
        backward()
        optimizer.step()

    def step() -> None:
        with autocast(device, precision):
            dropped = random.uniform(Purpose.LABEL_DROPOUT, 1)[:, 0] < decoder.label_dropout
            loss, _ = decoder.loss(latents, condition, random, dropped=dropped)
        update(loss.backward)
        loss.item()

    def bare() -> None:
        with autocast(device, precision):
            output = network(latents, time, condition.labels, **read)
        update(partial(output.backward, gradient.to(output.dtype)))

    return {"decoder": step, "network": bare}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), help="both if left out")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    for precision in [options.precision] if options.precision else ["32-true", "bf16-mixed"]:
        decoder = make_decoder().to(options.device)
        taken = alternate(arms(decoder, options.batch, precision), options.rounds)
        print(f"\nbatch {options.batch}, {precision}, {torch.get_num_threads()} threads, {decoder.device}")
        for arm, times in taken.items():
            print(f"  {arm:8s} {milliseconds(times)}")
        print(f"  decoder / network {ratio(taken['decoder'], taken['network'], 'at most 1.03')}")


if __name__ == "__main__":
    main()
