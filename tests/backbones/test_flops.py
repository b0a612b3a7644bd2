"""The analytic FLOP count against torch's counter, over every switch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.random_weights import randomise
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from discrete_lit.backbones import SequenceLayout, Transformer
from discrete_lit.generators.ordered_backbone import OrderedBackbone

LABELS = torch.tensor([0, 2, 1])
CAUSAL = SequenceLayout(5, (2, 3), 2, "causal")
MASKED = SequenceLayout(5, (2, 3), 2, "bidirectional", mask_token=True)
BITS = SequenceLayout(4, (2, 3), 2, "bidirectional", mask_token=True, parts=2)
SCALES = SequenceLayout(5, (6,), 2, "block_causal", scales=(1, 2, 3), input_dim=7)
TIMED = SequenceLayout(5, (2, 3), 2, "bidirectional", mask_token=True, timed=True, mask_output=True)

SWITCHES: dict[str, tuple[SequenceLayout, dict[str, Any]]] = {
    "causal": (CAUSAL, {}),
    "causal_modern": (CAUSAL, {"mlp": "swiglu", "norm": "rms", "positions": "rope_2d", "qk_norm": "rms"}),
    "causal_adaln": (CAUSAL, {"conditioning": "adaln", "registers": 2}),
    "causal_positions": (CAUSAL, {"conditioning": "prefix_adaln", "condition_positions": True, "depth": 2}),
    "masked": (MASKED, {"head_dim": 6, "mlp_hidden": 20}),
    "masked_bert": (MASKED, {"norm_first": False, "head_transform": True, "tied": True, "head_bias": "place"}),
    "masked_adaln": (MASKED, {"conditioning": "adaln", "condition_width": 9}),
    "masked_registers": (MASKED, {"conditioning": "prefix_adaln", "registers": 1}),
    "long_skips": (MASKED, {"long_skips": True}),
    "bits": (BITS, {"token_embedding": "bits"}),
    "scales": (SCALES, {"conditioning": "prefix_adaln"}),
    "scales_shared": (SCALES, {"conditioning": "prefix_adaln", "shared_modulation": True, "qk_norm": "unit"}),
    "timed": (TIMED, {"conditioning": "adaln"}),
}


@pytest.fixture(params=SWITCHES)
def backbone(request: pytest.FixtureRequest) -> Transformer:
    layout, switches = SWITCHES[request.param]
    return (
        randomise(Transformer(layout, **{"width": 16, "depth": 3, "heads": 2, **switches}), 0.3)
        .eval()
        .requires_grad_(False)
    )


def counted(run: Callable[[], object]) -> int:
    """What torch counts; its counter knows no attention kernel of a CPU, but the products that one stands for."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def inputs(layout: SequenceLayout, count: int) -> Tensor:
    if layout.input_dim is not None:
        return torch.randn(len(LABELS), count, layout.input_dim)
    return torch.randint(layout.vocab_size, (len(LABELS), count))


def test_a_whole_pass(backbone: Transformer) -> None:
    layout = backbone.layout
    tokens = inputs(layout, layout.length - int(layout.attention != "bidirectional"))
    time = torch.rand(len(LABELS)) if layout.timed else None
    expected = counted(lambda: backbone(tokens, LABELS, time=time))
    assert backbone.flops(len(LABELS), tokens.shape[1]) == expected > 0


def test_every_pass_with_a_cache(backbone: Transformer) -> None:
    layout = backbone.layout
    time = torch.rand(len(LABELS)) if layout.timed else None
    cache = backbone.new_cache(LABELS)
    assert backbone.cache_flops(len(LABELS)) == counted(lambda: backbone.new_cache(LABELS))
    counts = {"bidirectional": (layout.length,) * 2, "causal": (2, 1, 1), "block_causal": (0, 2, 3)}
    for count in counts[layout.attention]:
        tokens = inputs(layout, count)
        expected = backbone.flops(len(LABELS), count, cache)
        assert counted(lambda tokens=tokens: backbone(tokens, LABELS, cache, time=time)) == expected > 0


def test_a_fixed_order_costs_nothing() -> None:
    backbone = Transformer(SequenceLayout(5, (2, 3), 2, "causal", any_order=True), 16, 2, 2)
    ordered = OrderedBackbone(backbone, torch.randperm(6))
    assert ordered.flops(3, 5) == backbone.flops(3, 5)
    assert ordered.cache_flops(3) == backbone.cache_flops(3)
