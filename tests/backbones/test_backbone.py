"""FLOPs that are measured without data: against those of real passes over every switch, and by hand."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from helpers.random_weights import randomise
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from discrete_lit.backbones import SequenceLayout, Transformer
from discrete_lit.backbones import backbone as backbone_file
from discrete_lit.backbones.cpu_kernels import PackedLinear
from discrete_lit.backbones.execution import (
    compile_blocks,
    count_flops,
    packed,
)
from discrete_lit.generators.autoregressive import OrderedBackbone

LABELS = torch.tensor([0, 2, 1])
CAUSAL = SequenceLayout(5, (2, 3), num_classes=2, attention="causal")
MASKED = SequenceLayout(5, (2, 3), num_classes=2, attention="bidirectional", mask_token=True)
BITS = SequenceLayout(4, (2, 3), num_classes=2, attention="bidirectional", mask_token=True, sub_tokens=2)
SCALES = SequenceLayout(5, (6,), num_classes=2, attention="block_causal", scales=(1, 2, 3), input_dim=7)
TIMED = SequenceLayout(
    5, (2, 3), num_classes=2, attention="bidirectional", mask_token=True, timed=True, mask_output=True
)

SWITCHES: dict[str, tuple[SequenceLayout, dict[str, Any]]] = {
    "causal": (CAUSAL, {}),
    "causal_modern": (CAUSAL, {"mlp": "swiglu", "norm": "rms", "positions": "rope_2d", "qk_norm": "rms"}),
    "causal_adaln": (CAUSAL, {"conditioning": "adaln", "registers": 2}),
    "causal_positions": (CAUSAL, {"conditioning": "prefix_adaln", "condition_positions": True, "depth": 2}),
    "causal_targets": (
        CAUSAL,
        {
            "conditioning": "prefix_adaln",
            "class_repeats": 3,
            "positions": "learned_rope_2d",
            "target_positions": "all",
            "target_rotations": True,
        },
    ),
    "causal_instructed": (CAUSAL, {"positions": "rope_2d", "position_instructions": True}),
    "masked": (MASKED, {"head_dim": 6, "mlp_hidden": 20}),
    "masked_bert": (MASKED, {"norm_first": False, "head_transform": True, "tied": True, "head_bias": "place"}),
    "masked_adaln": (MASKED, {"conditioning": "adaln", "condition_width": 9}),
    "masked_registers": (MASKED, {"conditioning": "prefix_adaln", "registers": 1}),
    "masked_added": (MASKED, {"conditioning": "added", "mlp": "relu_squared", "embedded_digits": [5]}),
    "causal_added": (CAUSAL, {"conditioning": "added", "zero_outputs": True}),
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
        expected = backbone.flops(len(LABELS), count, cache.filled)
        assert counted(lambda tokens=tokens: backbone(tokens, LABELS, cache, time=time)) == expected > 0


def test_a_fixed_order_costs_nothing() -> None:
    backbone = Transformer(
        SequenceLayout(5, (2, 3), num_classes=2, attention="causal", any_order=True), width=16, depth=2, heads=2
    )
    ordered = OrderedBackbone(backbone, torch.randperm(6))
    assert ordered.flops(3, 5) == backbone.flops(3, 5)
    assert ordered.cache_flops(3) == backbone.cache_flops(3)


WIDTH, DEPTH, HIDDEN, VOCABULARY, BATCH = 16, 3, 64, 5, 2


def by_hand(elements: int, seen: int, predicted: int) -> int:
    """A plain transformer: queries, keys, values and their output (4 D^2), the MLP (2 D x 4 D), the scores and what
    they mix (2 x seen x D), and the logits (D K); two operations for each multiplication and addition."""
    block = 4 * WIDTH**2 + 2 * WIDTH * HIDDEN + 2 * seen * WIDTH
    return BATCH * 2 * (DEPTH * block * elements + WIDTH * VOCABULARY * predicted)


def plain(layout: SequenceLayout, **switches: Any) -> Transformer:
    return Transformer(layout, width=WIDTH, depth=DEPTH, heads=2, **switches)


def test_by_hand() -> None:
    # The class stands in front of the six tokens, and has no logits.
    assert plain(MASKED).flops(BATCH, 6) == by_hand(elements=7, seen=7, predicted=6)
    # It stands before the first five of a causal sequence; its own row predicts the first.
    assert plain(CAUSAL).flops(BATCH, 5) == by_hand(elements=6, seen=6, predicted=6)


def test_a_cache_by_hand() -> None:
    backbone = plain(CAUSAL)
    assert backbone.cache_flops(BATCH) == 0
    assert backbone.flops(BATCH, 0, 0) == by_hand(elements=1, seen=1, predicted=1)
    for filled in (1, 4, 2, 3, 5):  # two of them measured, the others between and beyond
        assert backbone.flops(BATCH, 1, filled) == by_hand(elements=1, seen=filled + 1, predicted=1)


def test_modulations_by_hand() -> None:
    backbone = plain(MASKED, conditioning="adaln")
    modulations = BATCH * 2 * (6 * DEPTH + 2) * WIDTH**2
    assert backbone.cache_flops(BATCH) == modulations
    assert backbone.flops(BATCH, 6) == by_hand(elements=6, seen=6, predicted=6) + modulations
    assert backbone.flops(BATCH, 6, 0) == by_hand(elements=6, seen=6, predicted=6)


def test_gradients_by_hand() -> None:
    """The gradients of both factors of every product: twice the forward pass; of attention too, which has no weights.

    The first products have an input that needs a gradient as well: the embeddings.
    """

    def prepare(network: Transformer) -> Callable[[], object]:
        tokens, labels = torch.zeros(BATCH, 6, dtype=torch.int64), torch.zeros(BATCH, dtype=torch.int64)
        return lambda: network(tokens, labels).sum().backward()

    backbone = plain(MASKED)
    assert count_flops(backbone, prepare, gradients=True) == 3 * by_hand(elements=7, seen=7, predicted=6)
    assert all(parameter.grad is None for parameter in backbone.parameters())


def test_a_tied_head_while_its_weights_train() -> None:
    """Under `no_grad`, a slice of a weight that trains has no gradient function for the counter to hook on to."""
    assert plain(MASKED, tied=True).flops(BATCH, 6) == by_hand(elements=7, seen=7, predicted=6)


@pytest.mark.parametrize("change", ["half", "training", "hooks", "compiled", "packed"])
def test_what_does_not_change_the_count(change: str) -> None:
    backbone = plain(CAUSAL, dropout=0.1, activation_checkpointing=True).eval().requires_grad_(False)
    expected, called = by_hand(elements=6, seen=6, predicted=6), []
    if change == "half":
        assert backbone.bfloat16().flops(BATCH, 5) == expected
    elif change == "training":
        before = torch.get_rng_state()
        assert backbone.train().flops(BATCH, 5) == expected
        assert backbone.training and torch.equal(torch.get_rng_state(), before)
    elif change == "hooks":
        backbone.blocks[0].register_forward_hook(lambda *_: called.append(1))
        assert backbone.flops(BATCH, 5) == expected and not called
    elif change == "compiled":
        compile_blocks(backbone, backend=lambda *_: called.append(1))
        assert backbone.flops(BATCH, 5) == expected and not called
    else:
        with torch.no_grad():
            fast = packed(backbone, rows=64)
        assert isinstance(fast.blocks[0].mlp.expand, PackedLinear)
        assert fast.flops(BATCH, 5) == expected


def test_each_shape_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    def counting(*arguments: Any) -> int:
        measured.append(arguments)
        return count_flops(*arguments)

    monkeypatch.setattr(backbone_file, "count_flops", counting)
    backbone = plain(CAUSAL)
    for _ in range(2):
        backbone.flops(BATCH, 5)
        for filled in range(6):
            backbone.flops(BATCH, 1, filled)
    assert len(measured) == 1 + 1 + 2
    state = backbone.__dict__.keys()
    assert state == plain(CAUSAL).__dict__.keys()
    for copy in (deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        measured.clear()
        copy.flops(BATCH, 5)
        assert len(measured) == 1
