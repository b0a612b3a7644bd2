"""Features of a text in front of a causal sequence: where their padding stands, what sees what, and no text."""

from typing import Any

import pytest
import torch
from torch import Tensor

from discrete_lit.backbones.condition import Condition

SETTINGS: dict[str, Any] = {
    "num_classes": 1,
    "context_dim": 3,
    "context_prefix": 4,
    "positions": "rope_2d",
    "start_rotation": "zero",
}


def given(features: Tensor, lengths: list[int], *, at_the_end: bool = False) -> Condition:
    number, counts = torch.arange(features.shape[1]), torch.tensor(lengths)[:, None]
    mask = number >= features.shape[1] - counts if at_the_end else number < counts
    return Condition(labels=torch.zeros(len(lengths), dtype=torch.int64), context=features, context_mask=mask)


def texts() -> tuple[Condition, Condition]:
    """The same two texts, of 3 and of 1 vectors, with their padding behind them and before them."""
    features = torch.randn(2, 3, 3)
    moved = features.clone()
    moved[1] = features[1, [1, 2, 0]]
    return given(features, [3, 1]), given(moved, [3, 1], at_the_end=True)


def test_the_padding_may_stand_at_either_end(make_backbone) -> None:
    backbone, tokens = make_backbone("causal", **SETTINGS), torch.randint(5, (2, 5))
    behind, before = texts()
    expected = backbone(tokens, before)
    assert expected.shape == (2, 6, 5)
    torch.testing.assert_close(backbone(tokens, behind), expected)
    # Nobody sees what stands in the padding, and everybody the text.
    assert before.context is not None
    other = before.context.clone()
    other[1, :2] += 1
    torch.testing.assert_close(backbone(tokens, given(other, [3, 1], at_the_end=True)), expected)
    other[:, 2] += 1
    changed = backbone(tokens, given(other, [3, 1], at_the_end=True))
    assert (changed - expected).abs().amin(dim=(1, 2)).max() > 1e-5


def test_the_places_in_front(make_backbone) -> None:
    """By a mask that is written out: 4 places, of which 3 and 1 hold the texts, then the tokens."""
    backbone = make_backbone("causal", **SETTINGS)
    mask = backbone.context_prefix.mask(texts()[0], filled=0, count=6)[:, 0]
    expected = torch.ones(6, 6, dtype=torch.bool).tril()
    for row, hidden in enumerate((1, 3)):
        of_row = expected.clone()
        of_row[:, :hidden] = False
        of_row |= torch.eye(6, dtype=torch.bool)
        assert torch.equal(mask[row], of_row)


@torch.no_grad()
def test_a_cache_gives_what_a_pass_over_everything_does(make_backbone) -> None:
    backbone, tokens, (condition, _) = make_backbone("causal", **SETTINGS), torch.randint(5, (2, 5)), texts()
    cache = backbone.new_cache(condition)
    steps = [backbone(tokens[:, :0], condition, cache), backbone(tokens[:, :2], condition, cache)]
    steps.append(backbone(tokens[:, 2:], condition, cache))
    torch.testing.assert_close(torch.cat(steps, dim=1), backbone(tokens, condition))


@torch.no_grad()
def test_no_text_is_learned_vectors_at_the_places_that_the_text_has(make_backbone) -> None:
    backbone, tokens, (condition, _) = make_backbone("causal", **SETTINGS), torch.randint(5, (2, 5)), texts()
    null = condition.null(null_label=1, null_id=None)
    expected = given(backbone.context_prefix.null.expand(2, -1, -1), [4, 4])
    places = torch.tensor([[False, True, True, True], [False, False, False, True]])
    expected = Condition(labels=condition.labels, context=expected.context, context_mask=places)
    torch.testing.assert_close(backbone(tokens, null), backbone(tokens, expected))
    # Dropping one of a batch is the same, and guidance goes away from it.
    dropped = condition.dropped(torch.tensor([False, True]), null_label=1, null_id=None)
    both = backbone(tokens, dropped)
    torch.testing.assert_close(both[0], backbone(tokens, condition)[0])
    torch.testing.assert_close(both[1], backbone(tokens, null)[1])
    doubled = backbone(tokens.repeat(2, 1), condition.with_null(null_label=1, null_id=None))
    torch.testing.assert_close(doubled, torch.cat((backbone(tokens, condition), backbone(tokens, null))))


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"context_prefix": 0}, "context_prefix=0 must be at least 1"),
        ({"context_dim": None}, "needs a context_dim"),
        ({"conditioning": "prefix_adaln"}, "in place of the class"),
        ({"registers": 1}, "in place of the class"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(make_backbone, switches: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_backbone("causal", **(SETTINGS | switches))


def test_a_text_of_too_many_vectors_is_refused(make_backbone) -> None:
    backbone = make_backbone("causal", **SETTINGS)
    with pytest.raises(ValueError, match="a text has 5 vectors, and 4 stand in front"):
        backbone(torch.randint(5, (1, 2)), given(torch.randn(1, 5, 3), [5]))
    with pytest.raises(ValueError, match="attends to vectors"):
        backbone(torch.randint(5, (1, 2)), torch.zeros(1, dtype=torch.int64))
