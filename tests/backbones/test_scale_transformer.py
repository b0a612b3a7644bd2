"""The transformer of scales: teacher forcing and steps agree, parts of the last scale, positions, the text in front."""

from typing import Any

import pytest
import torch
from helpers.random_weights import randomise
from torch import Tensor

from discrete_lit.backbones import ScaleLayout, ScaleTransformer
from discrete_lit.backbones.condition import Condition
from discrete_lit.backbones.embeddings import rotate
from discrete_lit.backbones.scale_transformer import context_positions

SIZES = ((1, 1), (2, 2), (3, 4))


def network(context: tuple[int, int] | None = None, vocab_size: int | None = 5, **settings: Any) -> ScaleTransformer:
    layout = ScaleLayout(dim=3, sizes=SIZES, num_classes=2, vocab_size=vocab_size, context=context)
    made = ScaleTransformer(layout, **{"width": 16, "depth": 2, "heads": 2, "mlp_hidden": 24, **settings})
    return randomise(made, 0.4).double().eval()


def text(count: int = 3) -> Condition:
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])[:count].bool()
    labels = torch.zeros(count, dtype=torch.int64)
    return Condition(labels=labels, context=torch.randn(count, 4, 6).double(), context_mask=mask)


CASES: list[tuple[dict[str, Any], Any]] = [
    ({}, torch.tensor([0, 1, 2])),
    ({"context": (4, 6)}, text()),
    ({"context": (4, 6), "modulated": False, "qk_norm": None, "context_norm": False}, text()),
    ({"level_embedding": "waves"}, torch.tensor([0, 1, 2])),
]


@pytest.mark.parametrize(("settings", "condition"), CASES)
@torch.no_grad()
def test_teacher_forcing_is_what_steps_give(settings: dict[str, Any], condition: Any) -> None:
    made, vectors = network(**settings), torch.randn(3, 16, 3).double()
    whole = made(vectors, condition)
    assert whole.hidden.shape == (3, 17, 16) and whole.logits is not None and whole.logits.shape == (3, 17, 5)
    cache = made.new_cache(condition)
    steps = [made(part, condition, cache) for part in vectors.split([0, 4, 12], dim=1)]
    assert [step.hidden.shape[1] for step in steps] == [1, 4, 12]
    torch.testing.assert_close(torch.cat([step.hidden for step in steps], dim=1), whole.hidden, rtol=0, atol=1e-9)
    torch.testing.assert_close(torch.cat([step.logits for step in steps], dim=1), whole.logits, rtol=0, atol=1e-9)


@torch.no_grad()
def test_a_scale_does_not_see_later_ones() -> None:
    made, labels, vectors = network(), torch.tensor([0, 1, 2]), torch.randn(3, 16, 3).double()
    changed = vectors.clone()
    changed[:, 4:] += 1
    first, second = made(vectors, labels).hidden, made(changed, labels).hidden
    torch.testing.assert_close(first[:, :5], second[:, :5], rtol=0, atol=1e-9)
    assert float((first[:, 5:] - second[:, 5:]).abs().amin(dim=(0, 2)).max()) > 0
    # Within a scale all see one another.
    changed = vectors.clone()
    changed[:, 3] += 1
    assert (made(changed, labels).hidden[:, 1] != first[:, 1]).any()


@torch.no_grad()
def test_parts_of_the_last_scale() -> None:
    """All places in any order are the whole scale; a part that training keeps is the part that is drawn first."""
    made, condition, vectors = network(context=(4, 6)), text(), torch.randn(3, 16, 3).double()
    whole = made(vectors, condition).hidden
    order = torch.stack([torch.randperm(12) for _ in range(3)])
    wide = order[..., None].expand(-1, -1, 3)
    shuffled = torch.cat((vectors[:, :4], vectors[:, 4:].gather(1, wide)), dim=1)
    mixed = made(shuffled, condition, places=order).hidden
    torch.testing.assert_close(mixed[:, :5], whole[:, :5], rtol=0, atol=1e-9)
    expected = whole[:, 5:].gather(1, order[..., None].expand(-1, -1, 16))
    torch.testing.assert_close(mixed[:, 5:], expected, rtol=0, atol=1e-9)

    kept = order[:, :5]
    part = made(shuffled[:, :9], condition, places=kept).hidden[:, 5:]
    assert float((part - expected[:, :5]).abs().max()) > 1e-3  # it sees fewer
    cache = made.new_cache(condition)
    for coarse in (vectors[:, :0], vectors[:, :4]):
        made(coarse, condition, cache)
    drawn = made(shuffled[:, 4:9], condition, cache, places=kept).hidden
    torch.testing.assert_close(drawn, part, rtol=0, atol=1e-9)
    # The rest sees all.
    rest = made(shuffled[:, 9:], condition, cache, places=order[:, 5:]).hidden
    assert rest.shape == (3, 7, 16) and cache.filled == 4 + 16


def test_positions_are_in_units_of_the_last_scale() -> None:
    coordinates = network().coordinates
    assert coordinates[:4].tolist() == [[0, 0], [0, 2], [1.5, 0], [1.5, 2]]
    assert coordinates[4:].tolist() == [[row, column] for row in range(3) for column in range(4)]


@torch.no_grad()
def test_rotary_turns() -> None:
    """Channel 2 i by the row, 2 i + 1 by the column, behind the last position of the text; the text by its position."""
    made = network(context=(4, 6))
    positions = torch.tensor([[0, 1, 2, 2]])
    table = made._rotary(positions, filled=0, vectors=16, places=None)
    assert table.shape == (1, 1, 20, 4, 4)
    waves = 10000.0 ** -(torch.arange(4).double() / 4)
    angle = 2 * waves
    expected = torch.stack((angle.cos(), angle.sin(), angle.cos(), angle.sin()), dim=-1)
    torch.testing.assert_close(table[0, 0, 3], expected)
    row, column = (2 + 1.5) * waves[[0, 2, 0, 2]], (2 + 2) * waves[[0, 2, 0, 2]]
    expected = torch.stack((row.cos(), row.sin(), column.cos(), column.sin()), dim=-1)
    torch.testing.assert_close(table[0, 0, 4 + 3], expected)

    x = torch.randn(1, 2, 20, 8).double()
    turned = rotate(x, table)
    (cos_r, sin_r, cos_c, sin_c), (even, odd) = table.unbind(-1), x.unflatten(-1, (4, 2)).unbind(-1)
    torch.testing.assert_close(turned[..., 0::2], even * cos_r - odd * sin_r)
    torch.testing.assert_close(turned[..., 1::2], odd * cos_c + even * sin_c)
    # Where both angles are the same it is the rotation of all other models.
    torch.testing.assert_close(turned[:, :, :4], rotate(x[:, :, :4], table[0, 0, :4, :, :2].contiguous()))


@torch.no_grad()
def test_a_dropped_text_says_nothing() -> None:
    made, vectors = network(context=(4, 6)), torch.randn(3, 16, 3).double()
    first, second = text(), text()
    assert not torch.equal(made(vectors, first).hidden, made(vectors, second).hidden)
    nulls = [given.null(null_label=2, null_id=None) for given in (first, second)]
    assert torch.equal(made(vectors, nulls[0]).hidden, made(vectors, nulls[1]).hidden)
    assert context_positions(nulls[0].context_mask).eq(0).all()
    assert context_positions(first.context_mask)[0].tolist() == [0, 1, 2, 2]
    both = first.with_null(null_label=2, null_id=None)
    torch.testing.assert_close(
        made(vectors.repeat(2, 1, 1), both).hidden,
        torch.cat((made(vectors, first).hidden, made(vectors, nulls[0]).hidden)),
        rtol=0,
        atol=1e-5,
    )
    some = first.dropped(torch.tensor([True, False, False]), null_label=2, null_id=None)
    assert some.context_mask.any(dim=1).tolist() == [False, True, True] and some.labels.tolist() == [2, 0, 0]


@torch.no_grad()
def test_without_ids_there_are_no_logits() -> None:
    made = network(vocab_size=None)
    states = made(torch.randn(3, 16, 3).double(), torch.tensor([0, 1, 2]))
    assert states.logits is None
    assert made.head_condition(states.hidden).shape == (3, 17, 16)


def test_positions_keep_their_digits_in_half_precision() -> None:
    made = network().to(torch.bfloat16)
    assert made.frequencies.dtype == made.coordinates.dtype == torch.float32
    torch.testing.assert_close(made.frequencies, network().frequencies.float())


def test_bad_input() -> None:
    made, labels, vectors = network(), torch.tensor([0, 1, 2]), torch.randn(3, 16, 3).double()
    with pytest.raises(ValueError, match="is given classes and no vectors"):
        made(vectors, text())
    with pytest.raises(ValueError, match=r"must be \(B, n, 3\), got \(3, 16, 4\)"):
        made(torch.randn(3, 16, 4), labels)
    with pytest.raises(ValueError, match="are these vectors of other scales"):
        made(vectors[:, :9], labels)
    with pytest.raises(ValueError, match="with a cache one scale is read at a time"):
        cache = made.new_cache(labels)
        made(vectors[:, :0], labels, cache)
        made(vectors, labels, cache)
    with pytest.raises(ValueError, match="places are of the last scale"):
        made(vectors[:, :4], labels, places=torch.zeros(3, 4, dtype=torch.int64))
    reads_text = network(context=(4, 6))
    with pytest.raises(ValueError, match="is given 4 vectors of width 6 in front"):
        reads_text(vectors, labels)
    given = text()
    with pytest.raises(ValueError, match="is the text of another encoder, or padded to another length"):
        wide: Tensor = torch.randn(3, 4, 7)
        reads_text(vectors, Condition(labels=labels, context=wide, context_mask=given.context_mask))
    with pytest.raises(ValueError, match="is the text of another encoder, or padded to another length"):
        short = given.context[:, :3], given.context_mask[:, :3]
        reads_text(vectors, Condition(labels=labels, context=short[0], context_mask=short[1]))
    with pytest.raises(ValueError, match="must be heads=2 times a multiple of 4"):
        network(width=12)
    with pytest.raises(ValueError, match="depth must be at least 1"):
        network(depth=0)
    with pytest.raises(ValueError, match="level_embedding must be"):
        network(level_embedding="sines")
    with pytest.raises(ValueError, match="the first 1 x 1; the scales are"):
        layout = ScaleLayout(dim=3, sizes=((2, 2), (3, 3)), num_classes=2)
        ScaleTransformer(layout, width=16, depth=1, heads=2)
    assert isinstance(text(), Condition)
