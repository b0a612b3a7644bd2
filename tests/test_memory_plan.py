"""`benchmarks/memory_plan.py`: what it says autograd keeps is what autograd keeps, and its sums by hand."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from training_proof.recipes import build

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from memory_plan import GPUAttention, Memory, autocast, kept, loss_of, shard


def test_what_a_layer_keeps_by_hand() -> None:
    first, second = nn.Linear(4, 8), nn.Linear(8, 2)
    x = torch.zeros(3, 4, requires_grad=True)
    found = kept(lambda: second(torch.sigmoid(first(x))).sum(), [*first.parameters(), *second.parameters()], "cpu")
    # In bfloat16: the input, both weights, and the sigmoid's output, which the second layer keeps too.
    assert sum(found) == 2 * (3 * 4 + 4 * 8 + 8 * 2 + 3 * 8)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_is_calculated_is_what_is_allocated(checkpointed: bool) -> None:
    """The memory that a forward pass has taken and not given back, as PyTorch's profiler sees it."""
    generator: Any = build("generators/var_d16_imagenet256", tiny=True)
    generator.backbone.activation_checkpointing = checkpointed
    generator.train()
    weights = list(generator.parameters())
    try:
        loss = loss_of(generator, 2, "cpu")
        with torch.profiler.profile(profile_memory=True) as profiled, autocast("cpu"):
            held: Any = loss()
        allocated = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
        assert isinstance(held[0], Tensor)
        with FakeTensorMode(allow_non_fake_inputs=True):
            calculated = sum(kept(loss_of(generator, 2, "cpu"), weights, "cpu"))
    finally:
        generator.backbone.activation_checkpointing = False
        del generator.check_labels
    assert calculated == pytest.approx(allocated, rel=0.02)


def test_shards_are_cut_by_the_first_dimension_and_rounded_up() -> None:
    assert shard(torch.empty(16, 3), 8) == 2 * 3
    assert shard(torch.empty(17, 3), 8) == 3 * 3
    assert shard(torch.empty(1, 5, 3), 8) == 15


@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_a_gpu_keeps_no_weights(masked: bool) -> None:
    """Queries, keys, values, output, one number for each row, the mask; and a few numbers of a random state."""
    with FakeTensorMode(), GPUAttention():
        query, key, value = (torch.zeros(2, 4, 64, 16, device="cuda", requires_grad=True) for _ in range(3))
        mask = torch.ones(64, 64, dtype=torch.bool, device="cuda") if masked else None
        found = kept(
            lambda: F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=0.0), [], "cuda"
        )
    expected = 4 * 2 * (2 * 4 * 64 * 16) + 4 * (2 * 4 * 64) + masked * 2 * 64 * 64
    assert expected <= sum(found) <= expected + 64


def test_the_total_is_of_all_parts() -> None:
    parts = Memory(10, states=1.0, gathered=2.0, kept=4.0, again=8.0, temporary=16.0, reserve=32.0)
    assert parts.total == 63.0
