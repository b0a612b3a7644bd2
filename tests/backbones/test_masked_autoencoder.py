"""MAR's network: what it reads, how a grid of ids enters, sequences with different numbers of known places."""

from typing import Any

import pytest
import torch
from torch import Tensor

from discrete_lit.backbones.condition import Condition
from discrete_lit.backbones.masked_autoencoder import Fusion, MaskedAutoencoder, VectorLayout

BATCH, LENGTH, DIM = 3, 6, 4


ROTATED: dict[str, Any] = {"positions": "learned_rope_2d", "class_added": True, "norm": "rms", "qk_norm": "rms"}


def network(fusion: Fusion | None = None, **settings: Any) -> MaskedAutoencoder:
    torch.manual_seed(0)
    layout = VectorLayout(dim=DIM, num_classes=3, grid=(2, 3), grid_vocab=None if fusion is None else 5)
    made = MaskedAutoencoder(
        layout,
        width=16,
        depth=2,
        heads=2,
        decoder_width=24,
        decoder_heads=3,
        buffer=2,
        fusion=fusion or "prefix",
        **settings,
    ).eval()
    for parameter in made.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    return made


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    masked = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 0], [1, 1, 0, 0, 1, 1]], dtype=torch.bool)
    return torch.randn(BATCH, LENGTH, DIM), masked, torch.tensor([0, 1, 3])


@torch.no_grad()
def test_masked_vectors_are_not_read_and_all_known_ones_are() -> None:
    made, (vectors, masked, labels) = network(), inputs()
    z = made(vectors, masked, labels, known=2)
    assert z.shape == (BATCH, LENGTH, 24)
    other = torch.where(masked[..., None], torch.full_like(vectors, torch.nan), vectors)
    torch.testing.assert_close(made(other, masked, labels, known=2), z, rtol=0, atol=0)
    for place in (1, 4):  # the known ones of the first sequence
        changed = vectors.clone()
        changed[0, place] += 1
        moved = made(changed, masked, labels, known=2)
        assert bool((moved[0] != z[0]).any(dim=-1).all())
        torch.testing.assert_close(moved[1:], z[1:])


@torch.no_grad()
def test_known_places_carry_their_positions() -> None:
    made, (vectors, masked, labels) = network(), inputs()
    # The same vector at another place is another input.
    vectors[0, :] = vectors[0, 0].clone()
    moved = masked.clone()
    moved[0] = torch.tensor([0, 1, 1, 1, 0, 1], dtype=torch.bool)
    assert (made(vectors, moved, labels, known=2)[0] - made(vectors, masked, labels, known=2)[0]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, ROTATED], ids=["mar", "rotated"])
def test_sequences_with_fewer_known_places_see_no_padding(settings: dict[str, Any]) -> None:
    made, (vectors, masked, labels) = network(**settings), inputs()
    masked[1] = True  # knows nothing
    masked[2, 0] = False  # knows three
    together = made(vectors, masked, labels, known=3, uneven=True)
    for row, known in enumerate((2, 0, 3)):
        alone = made(vectors[row : row + 1], masked[row : row + 1], labels[row : row + 1], known=known)
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("fusion", ["prefix", "mix", "add", "cross"])
def test_a_grid_of_ids_enters_at_its_places(fusion: Fusion) -> None:
    made, (vectors, masked, labels) = network(fusion), inputs()
    grid = torch.tensor([[0, 1, 2, 3, 4, 5]] * BATCH)
    z = made(vectors, masked, Condition(labels=labels, grid=grid), known=2)
    known, unknown = grid.clone(), grid.clone()
    known[0, 1], unknown[0, 0] = 3, 3
    by_known = (made(vectors, masked, Condition(labels=labels, grid=known), known=2) - z).abs().amax(dim=(1, 2))
    by_unknown = (made(vectors, masked, Condition(labels=labels, grid=unknown), known=2) - z).abs().amax(dim=(1, 2))
    assert by_unknown[0] > 1e-3
    # In the place of the mask vector, ids of known places say nothing more.
    assert (by_known[0] == 0) == (fusion == "mix")
    assert by_known[1:].max() == by_unknown[1:].max() == 0


@torch.no_grad()
def test_rotations_are_of_the_places_and_not_of_their_order() -> None:
    made, (vectors, masked, labels) = network(**ROTATED), inputs()
    places = masked.to(torch.uint8).argsort(dim=1, stable=True)[:, :2]
    there = made.encode(vectors, places, labels)
    back = made.encode(vectors, places.flip(1), labels)
    torch.testing.assert_close(back[:, made.slots :].flip(1), there[:, made.slots :], rtol=1e-5, atol=1e-5)
    # Without learned positions the rotations alone tell places apart, in the encoder and in the decoder.
    for positions in (made.encoder_positions, made.decoder_positions, made.hidden_positions):
        positions.zero_()
    alike = vectors[:, :1].expand(-1, LENGTH, -1)
    encoded = made.encode(alike, places, labels)
    assert (encoded[:, -1] - encoded[:, -2]).abs().max() > 1e-3
    z = made(alike, torch.ones_like(masked), labels, known=0)
    assert (z[:, 1:] - z[:, :-1]).abs().amax(dim=(1, 2)).min() > 1e-3


@torch.no_grad()
def test_the_class_is_added_at_the_places() -> None:
    made, (vectors, masked, labels) = network(**ROTATED), inputs()
    z = made(vectors, masked, labels, known=2)
    made.class_embedding.weight.zero_()  # what the slots hold
    assert (
        made(vectors, masked, labels.flip(0), known=2)[0] - made(vectors, masked, labels, known=2)[0]
    ).abs().max() > 1e-3
    assert (made(vectors, masked, labels, known=2) - z).abs().max() > 1e-3


def test_branches_begin_at_nothing_where_asked_for() -> None:
    torch.manual_seed(0)
    layout = VectorLayout(dim=DIM, grid=(LENGTH,), num_classes=3)
    made = MaskedAutoencoder(layout, width=16, depth=1, heads=2, buffer=1, zero_outputs=True)
    hidden = torch.randn(2, 3, 16)
    for block in (*made.encoder, *made.decoder):
        torch.testing.assert_close(block(hidden), hidden, rtol=0, atol=0)


@torch.no_grad()
def test_the_ids_that_are_attended_to_are_not_alike_in_all_places() -> None:
    made, (vectors, masked, labels) = network("cross"), inputs()
    grid = torch.tensor([[0, 1, 2, 3, 4, 5]] * BATCH)
    z = made(vectors, masked, Condition(labels=labels, grid=grid), known=2)
    swapped = made(vectors, masked, Condition(labels=labels, grid=grid[:, [1, 0, 2, 3, 4, 5]]), known=2)
    assert (swapped - z).abs().max() > 1e-3


@torch.no_grad()
def test_vectors_are_attended_to_by_every_block_and_masked_ones_are_not() -> None:
    torch.manual_seed(0)
    layout = VectorLayout(dim=DIM, grid=(LENGTH,), num_classes=3)
    made = MaskedAutoencoder(layout, width=16, depth=1, heads=2, decoder_width=24, buffer=2, context_dim=5).eval()
    vectors, masked, labels = inputs()
    context, mask = torch.randn(BATCH, 4, 5), torch.ones(BATCH, 4, dtype=torch.bool)
    mask[1, 2:] = False
    z = made(vectors, masked, Condition(labels=labels, context=context, context_mask=mask), known=2)
    other = torch.where(mask[..., None], context, 7.0)
    same = made(vectors, masked, Condition(labels=labels, context=other, context_mask=mask), known=2)
    torch.testing.assert_close(same, z)
    other[:, 0] += 1
    moved = made(vectors, masked, Condition(labels=labels, context=other, context_mask=mask), known=2)
    assert bool(((moved - z).abs().amax(dim=-1) > 1e-4).all())
    alone = Condition(labels=labels, context=context, context_mask=mask)[1:2]
    torch.testing.assert_close(made(vectors[1:2], masked[1:2], alone, known=2), z[1:2], rtol=1e-4, atol=1e-5)
    assert made.flops(2, 3, 8) > made.flops(2, 3, 4) > 0
    with pytest.raises(ValueError, match="attends to vectors"):
        made(vectors, masked, labels, known=2)


@pytest.mark.parametrize(("fusion", "settings"), [("add", {}), ("cross", {}), ("add", ROTATED)])
def test_gradients_reach_every_parameter_and_checkpointing_changes_none(
    fusion: Fusion, settings: dict[str, Any]
) -> None:
    vectors, masked, labels = inputs()
    gradients = []
    for checkpointing in (False, True):
        made = network(fusion, **settings).train()
        made.activation_checkpointing = checkpointing
        condition = Condition(labels=labels, grid=torch.zeros(BATCH, LENGTH, dtype=torch.int64))
        made(vectors, masked, condition, known=2).square().sum().backward()
        gradients.append([parameter.grad for parameter in made.parameters()])
    for plain, again in zip(*gradients, strict=True):
        assert plain is not None
        assert again is not None
        torch.testing.assert_close(plain, again)


def test_wrong_settings_are_refused() -> None:
    layout = VectorLayout(dim=4, grid=(4,), num_classes=1)
    with pytest.raises(ValueError, match="fusion must be"):
        MaskedAutoencoder(layout, width=8, depth=1, heads=1, fusion="sum")  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match="fusion='cross' says how a grid of ids enters, and this network is given none"
    ):
        MaskedAutoencoder(layout, width=8, depth=1, heads=1, fusion="cross")
    of_another_shape = VectorLayout(dim=4, grid=(4,), num_classes=1, grid_vocab=3, grid_length=6)
    with pytest.raises(ValueError, match="fusion='add' needs an id for each of the 4 places, d has 6 ids"):
        MaskedAutoencoder(of_another_shape, width=8, depth=1, heads=1, fusion="add")
    with pytest.raises(ValueError, match="a block attends to one of them"):
        MaskedAutoencoder(of_another_shape, width=8, depth=1, heads=1, fusion="cross", context_dim=4)
    vectors, masked, labels = inputs()
    grid = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    with pytest.raises(ValueError, match="reads no grid of ids"):
        network()(vectors, masked, Condition(labels=labels, grid=grid), known=2)
    with pytest.raises(ValueError, match=r"reads a grid of 6 ids in \[0, 5\] for each image, got none"):
        network("add")(vectors, masked, labels, known=2)
    with pytest.raises(ValueError, match="buffer must be at least 1"):
        MaskedAutoencoder(layout, width=8, depth=1, heads=1, buffer=0)
    with pytest.raises(ValueError, match="position_std must be above 0"):
        MaskedAutoencoder(layout, width=8, depth=1, heads=1, position_std=0.0)
    with pytest.raises(ValueError, match="positions must be 'learned' or"):
        MaskedAutoencoder(layout, width=8, depth=1, heads=1, positions="rope_1d")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"needs places on a grid of rows and columns, the layout has \(4,\)"):
        MaskedAutoencoder(layout, width=8, depth=1, heads=1, positions="learned_rope_2d")
    with pytest.raises(ValueError, match="a width of 8 is not a multiple of its 3 heads"):
        MaskedAutoencoder(layout, width=8, depth=1, heads=3)


def test_positions_begin_with_the_deviation_that_is_asked_for() -> None:
    torch.manual_seed(0)
    made = MaskedAutoencoder(
        VectorLayout(dim=DIM, grid=(50,), num_classes=3), width=64, depth=1, heads=1, position_std=0.5
    )
    for positions in (made.encoder_positions, made.decoder_positions):
        assert positions.std().item() == pytest.approx(0.5, rel=0.05)
    for others in (made.hidden_positions, made.class_embedding.weight):
        assert others.std().item() == pytest.approx(0.02, rel=0.2)
