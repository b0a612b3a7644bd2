"""Tiny checkpoints in published layouts, written by hand."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.fixture
def taming_state() -> Callable[..., dict[str, Tensor]]:
    """`taming_state()`: an f2 VQGAN of 32 channels with 16 codes of 4 numbers, random weights."""

    def make() -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}

        def convolution(name: str, inputs: int, outputs: int, kernel: int) -> None:
            state[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel) / (inputs * kernel * kernel) ** 0.5
            state[f"{name}.bias"] = torch.randn(outputs) * 0.1

        def norm(name: str) -> None:
            state[f"{name}.weight"], state[f"{name}.bias"] = 1 + torch.randn(32) * 0.1, torch.randn(32) * 0.1

        def block(name: str) -> None:
            for place in (1, 2):
                norm(f"{name}.norm{place}")
                convolution(f"{name}.conv{place}", 32, 32, 3)

        def attention(name: str) -> None:
            norm(f"{name}.norm")
            for part in ("q", "k", "v", "proj_out"):
                convolution(f"{name}.{part}", 32, 32, 1)

        for half, levels, inner, outer in (("encoder", "down", 3, 8), ("decoder", "up", 8, 3)):
            convolution(f"{half}.conv_in", inner, 32, 3)
            convolution(f"{half}.conv_out", 32, outer, 3)
            norm(f"{half}.norm_out")
            for place in range(1 if half == "encoder" else 2):
                block(f"{half}.{levels}.0.block.{place}")
                block(f"{half}.{levels}.1.block.{place}")
                attention(f"{half}.{levels}.1.attn.{place}")
            block(f"{half}.mid.block_1")
            attention(f"{half}.mid.attn_1")
            block(f"{half}.mid.block_2")
        convolution("encoder.down.0.downsample.conv", 32, 32, 3)
        convolution("decoder.up.1.upsample.conv", 32, 32, 3)
        convolution("quant_conv", 8, 4, 1)
        convolution("post_quant_conv", 4, 8, 1)
        state["quantize.embedding.weight"] = torch.randn(16, 4)
        return state

    return make
