"""Ids that are replaced by near ones: which are near, how many are replaced, and by what the choice is decided."""

from typing import Any

import pytest
import torch

from discrete_lit.checkpoints import instantiate
from discrete_lit.tokenizers import PerturbedTokenizer, PixelLevels

NETWORK = {
    "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
    "init_args": {"channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": False, "norm_groups": 4},
}
# Of each family: its arguments, and the table of codes `(K, D)` that an id of a place is one of.
FAMILIES: dict[str, Any] = {
    "VQVAE": ({"codebook_size": 12, "code_dim": 3}, lambda quantizer, place: quantizer.codebook.codes),
    "LFQ": ({"bits": 4}, lambda quantizer, place: quantizer.lookup(torch.arange(16))),
    "FSQ": ({"levels": [5, 3, 4]}, lambda quantizer, place: quantizer.lookup(torch.arange(60))),
    "RQVAE": (
        {"codebook_size": 12, "code_dim": 3, "depth": 2, "shared_codebook": False},
        lambda quantizer, place: quantizer.codebook(place % 2).codes,
    ),
    "MultiScaleVQ": (
        {"codebook_size": 12, "code_dim": 3, "scales": [1, 4]},
        lambda quantizer, place: quantizer.codebook.codes,
    ),
}


def make(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    init_args = {"network": NETWORK, **FAMILIES[family][0], **settings}
    tokenizer = instantiate({"class_path": f"discrete_lit.tokenizers.{family}", "init_args": init_args}).eval()
    for codes in (value for name, value in tokenizer.named_parameters() if name.endswith("codes")):
        torch.nn.init.normal_(codes)
    return tokenizer


@pytest.mark.parametrize("family", FAMILIES)
def test_near_ids_are_those_of_the_nearest_codes(family: str):
    tokenizer = make(family)
    table = FAMILIES[family][1]
    torch.manual_seed(1)
    tokens = torch.randint(tokenizer.vocab_size, (3, *tokenizer.token_shape(8)))
    near = tokenizer.quantizer.near_ids(tokens, 3).flatten(1, -2)
    for row, ids in zip(near, tokens.flatten(1), strict=True):
        for place, (found, own) in enumerate(zip(row, ids, strict=True)):
            codes = table(tokenizer.quantizer, place).detach()
            distances = (codes - codes[own]).norm(dim=1)
            others = torch.cat((distances[:own], distances[own + 1 :])).sort().values
            assert own not in found
            assert found.unique().numel() == 3
            torch.testing.assert_close(distances[found], others[:3])


def test_near_ids_of_bits_are_one_flip_away():
    near = make("LFQ").quantizer.near_ids(torch.arange(16)[:, None], 4)[:, 0]
    flips = torch.arange(16)[:, None] ^ torch.tensor([1, 2, 4, 8])
    assert near.sort().values.equal(flips.sort().values)


def test_ids_are_replaced_at_the_rate_by_each_near_id_alike():
    tokenizer = PerturbedTokenizer(make("FSQ"), 0.3, neighbours=4)
    torch.manual_seed(0)
    tokens = torch.randint(60, (2000, *tokenizer.token_shape(8)))
    found = tokenizer.perturb(tokens)
    near = tokenizer.tokenizer.quantizer.near_ids(tokens, 4)
    changed = found != tokens
    share = changed.double().mean()
    # Five standard deviations of the mean of as many independent decisions.
    assert abs(float(share) - 0.3) < 5 * (0.21 / tokens.numel()) ** 0.5
    choices = (near == found[..., None])[changed]
    assert choices.sum(-1).eq(1).all()
    shares = choices.double().mean(0)
    assert (shares - 0.25).abs().max() < 5 * (0.1875 / len(choices)) ** 0.5


def test_rates_of_none_and_all():
    tokens = torch.arange(60).view(-1, 2, 2).repeat(1, 2, 2)
    assert PerturbedTokenizer(make("FSQ"), 0.0).perturb(tokens).equal(tokens)
    assert (PerturbedTokenizer(make("FSQ"), 1.0).perturb(tokens) != tokens).all()


def test_choices_belong_to_the_image_alone():
    tokenizer = PerturbedTokenizer(make("VQVAE"), 0.5, neighbours=3)
    torch.manual_seed(0)
    images = torch.rand(5, 3, 8, 8) * 2 - 1
    tokens = torch.randint(12, (5, *tokenizer.token_shape(8)))
    together = tokenizer.perturb(tokens)
    assert torch.cat([tokenizer.perturb(row) for row in tokens.flip(0).split(2)]).equal(together.flip(0))
    assert not (together == PerturbedTokenizer(tokenizer.tokenizer, 0.5, neighbours=3, seed=1).perturb(tokens)).all()
    encoded = tokenizer.tokenizer.encode(images)
    assert tokenizer.encode(images).equal(tokenizer.perturb(encoded))
    assert tokenizer.decode(together).equal(tokenizer.tokenizer.decode(together))
    # Images that differ in one id are disturbed in other places.
    other = tokens[:1].clone()
    other.view(-1)[0] = (other.view(-1)[0] + 1) % 12
    places = [(tokenizer.perturb(ids) != ids).flatten() for ids in (tokens[:1], other)]
    assert not places[0][1:].equal(places[1][1:])


def test_settings_that_cannot_be():
    tokenizer = make("VQVAE")
    for rate in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"rate of replaced ids must lie in \[0, 1\], got {rate}"):
            PerturbedTokenizer(tokenizer, rate)
    for neighbours in (0, 12):
        with pytest.raises(ValueError, match=rf"count must be in \[1, 12\).*got {neighbours}"):
            PerturbedTokenizer(tokenizer, 0.1, neighbours=neighbours)
    with pytest.raises(ValueError, match="a PixelLevels has no ids with codes"):
        PerturbedTokenizer(PixelLevels(levels=4), 0.1)
    with pytest.raises(ValueError, match=r"at most 1,048,576, this LookupFreeQuantizer has 16,777,216"):
        PerturbedTokenizer(make("LFQ", bits=24, entropy_weight=0.0), 0.1)
