"""VQ-Diffusion's switches: norms modulated by tables of each block, and MLPs of convolutions over the grid."""

from typing import Any

import pytest
import torch
from helpers.random_weights import randomise
from torch.nn import functional as F

from discrete_lit.backbones import SequenceLayout, Transformer
from discrete_lit.backbones.blocks import GridMLP, NormTables

STEPS, WIDTH, CLASSES = 7, 8, 3


def layout(**changed: Any) -> SequenceLayout:
    given = {"num_classes": CLASSES, "attention": "bidirectional", "mask_token": True, "timed": True, **changed}
    return SequenceLayout(5, given.pop("grid", (2, 3)), **given)


def build(**switches: Any) -> Transformer:
    given = {"conditioning": "adaln_tables", "time_steps": STEPS, "mlp_on_grid": True, **switches}
    torch.manual_seed(0)
    return randomise(Transformer(layout(), width=WIDTH, depth=2, heads=2, **given), 0.4).eval()


def test_a_step_has_the_row_that_its_end_belongs_to() -> None:
    tables = NormTables(WIDTH, steps=STEPS, num_classes=CLASSES)
    randomise(tables, 1.0)
    labels = torch.zeros(STEPS, dtype=torch.int64)
    ends = (torch.arange(STEPS, dtype=torch.float64) + 1) / STEPS * 1000
    made = tables(ends, labels)
    scale, shift = tables.step_projection(F.silu(tables.step_table.weight)).chunk(2, dim=-1)
    torch.testing.assert_close(made[0][:, 0], shift)
    torch.testing.assert_close(made[1][:, 0], scale)
    # Times within a step are the step's, clean data is the first one's, and rounding moves nothing.
    for times in (ends - 500 / STEPS, ends * (1 + 1e-12), ends.float()):
        torch.testing.assert_close(tables(times, labels)[0], made[0])
    torch.testing.assert_close(tables(torch.zeros(1), labels[:1])[0], made[0][:1])


@torch.no_grad()
def test_the_blocks_by_hand() -> None:
    backbone = build()
    tokens, labels, time = torch.randint(6, (4, 6)), torch.arange(4), torch.tensor([1000 / 7, 300.0, 700.0, 1000.0])
    x = backbone.token_embedding(tokens) + backbone.positions.embedding
    for block, tables in zip(backbone.blocks, backbone.norm_tables, strict=True):
        step = torch.tensor([0, 2, 4, 6])
        scale, shift = tables.step_projection(F.silu(tables.step_table.weight[step]))[:, None].chunk(2, dim=-1)
        x = x + block.attention(F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift, None, None, False, None)
        scale, shift = tables.class_projection(F.silu(tables.class_table.weight[labels]))[:, None].chunk(2, dim=-1)
        image = (F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift).unflatten(1, (2, 3)).permute(0, 3, 1, 2)
        hidden = F.gelu(F.conv2d(image, block.mlp.expand.weight, block.mlp.expand.bias, padding=1))
        branch = F.conv2d(hidden, block.mlp.contract.weight, block.mlp.contract.bias, padding=1)
        x = x + branch.permute(0, 2, 3, 1).flatten(1, 2)
    expected = backbone.head(backbone.final_norm(x))
    torch.testing.assert_close(backbone(tokens, labels, time=time), expected, rtol=0, atol=1e-4)


def test_convolutions_begin_as_pytorch_makes_them() -> None:
    torch.manual_seed(0)
    backbone = Transformer(
        layout(),
        width=64,
        depth=1,
        heads=2,
        conditioning="adaln_tables",
        time_steps=STEPS,
        mlp_on_grid=True,
        initialization="bert",
    )
    convolution = backbone.blocks[0].mlp.expand.weight.detach()
    assert float(convolution.abs().max()) <= (64 * 9) ** -0.5 and float(convolution.std()) > 0.5 * (64 * 9) ** -0.5
    for table in (backbone.norm_tables[0].step_table.weight, backbone.norm_tables[0].step_projection.weight):
        assert 0.015 < float(table.detach().std()) < 0.025


def test_every_parameter_is_used() -> None:
    backbone = build().train()
    tokens, labels = torch.randint(6, (40, 6)), torch.arange(40) % (CLASSES + 1)
    time = torch.arange(40) % STEPS * 1000 / STEPS + 1
    backbone(tokens, labels, time=time).square().sum().backward()
    assert [name for name, value in backbone.named_parameters() if value.grad is None or not value.grad.any()] == []


def test_flops_are_counted() -> None:
    assert build().flops(2, 6) > Transformer(layout(), width=WIDTH, depth=2, heads=2, conditioning="adaln").flops(2, 6)


@pytest.mark.parametrize(
    ("changed", "switches", "message"),
    [
        ({}, {"time_steps": None}, "time_steps, at least 1, is of conditioning='adaln_tables' and needed there"),
        ({}, {"conditioning": "adaln"}, "time_steps, at least 1, is of conditioning='adaln_tables'"),
        ({"timed": False}, {}, r"needs a generator of bidirectional attention that tells the time \(time_input='time'"),
        ({}, {"norm_first": False}, "norm_first=true, and no condition_width"),
        ({"grid": (6,)}, {}, r"mlp_on_grid=true needs a bidirectional sequence of a grid of two axes .* \(6,\)"),
        ({}, {"registers": 1}, "1 registers and no class in front"),
        ({}, {"mlp": "swiglu"}, "an MLP of convolutions needs a grid of two axes and a kind without a gate"),
    ],
)
def test_what_is_refused(changed: dict[str, Any], switches: dict[str, Any], message: str) -> None:
    given = {"conditioning": "adaln_tables", "time_steps": STEPS, "mlp_on_grid": True, **switches}
    with pytest.raises(ValueError, match=message):
        Transformer(layout(**changed), width=WIDTH, depth=1, heads=2, **given)


def test_an_mlp_on_a_grid_sees_the_neighbours_alone() -> None:
    mlp = GridMLP(WIDTH, 16, grid=(5, 5), kind="gelu", bias=True, dropout=0.0)
    x = torch.zeros(1, 25, WIDTH)
    x[0, 12] = 1
    changed = (mlp(x) - mlp(torch.zeros_like(x)))[0].abs().sum(dim=-1).view(5, 5)
    assert (changed > 0).all()  # two layers of 3 x 3 reach two places away, here all
    x = torch.zeros(1, 25, WIDTH)
    x[0, 0] = 1
    changed = (mlp(x) - mlp(torch.zeros_like(x)))[0].abs().sum(dim=-1).view(5, 5)
    assert (changed[:3, :3] > 0).all() and not changed[3:].any() and not changed[:, 3:].any()
