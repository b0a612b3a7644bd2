"""Every tokenizer: ids that are checked, the fingerprint, freezing; and the grid without a tokenizer."""

import copy

import pytest
import torch

from discrete_lit.tokenizers import TokenGrid, freeze


@pytest.mark.parametrize("kind", ["fsq", "vqvae"])
def test_ids_outside_the_vocabulary_are_refused(make_tokenizer, kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    for wrong in (-1, 12):
        tokens = torch.full((1, 2, 2), 3)
        tokens[0, 1, 1] = wrong
        for call in (tokenizer.decode, tokenizer.embed):
            with pytest.raises(ValueError, match=r"token ids must lie in \[0, 12\)"):
                call(tokens)


@pytest.mark.parametrize("arguments", [("fsq",), ("vqvae",), ("vqvae", "gradient")])
def test_fingerprint_changes_with_any_weight_or_buffer(make_tokenizer, arguments) -> None:
    kind, *update = arguments
    tokenizer = make_tokenizer(kind, **({"codebook_update": update[0]} if update else {}))
    seen = {tokenizer.fingerprint()}
    for count, value in enumerate(tokenizer.state_dict().values(), start=2):
        flat = value.detach().reshape(-1)
        flat[-1] = torch.nextafter(flat[-1], flat[-1] + 1) if flat.is_floating_point() else flat[-1] + 1
        seen.add(tokenizer.fingerprint())
        assert len(seen) == count
    assert all(len(digest) == 64 for digest in seen)


def test_fingerprint_changes_with_the_order_of_levels(make_tokenizer) -> None:
    first, second = make_tokenizer(levels=[4, 3]), make_tokenizer(levels=[3, 4])
    weights = {name: value for name, value in first.state_dict().items() if name != "quantizer.levels"}
    second.load_state_dict(weights, strict=False)
    assert first.vocab_size == second.vocab_size
    assert first.fingerprint() != second.fingerprint()


def test_fingerprint_names_the_class(make_tokenizer) -> None:
    tokenizer = make_tokenizer()
    before = tokenizer.fingerprint()
    tokenizer.__class__ = type("Other", (type(tokenizer),), {})
    assert tokenizer.fingerprint() != before


@pytest.mark.parametrize("kind", ["fsq", "vqvae"])
@torch.no_grad()
def test_fingerprint_stays_where_the_function_does(make_tokenizer, kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    before = tokenizer.fingerprint()
    assert copy.deepcopy(tokenizer).fingerprint() == before
    assert freeze(copy.deepcopy(tokenizer).train()).fingerprint() == before
    assert tokenizer.train().fingerprint() == before
    tokenizer.eval()
    tokenizer.decode(tokenizer.encode(torch.rand(2, 3, 16, 16)))
    tokenizer.measure(tokenizer.reconstruct(torch.rand(2, 3, 16, 16)))
    tokenizer.to(memory_format=torch.channels_last)
    assert tokenizer.fingerprint() == before


def test_freeze_leaves_no_gradients(make_tokenizer) -> None:
    tokenizer = make_tokenizer("vqvae", codebook_update="gradient").train()
    frozen = freeze(tokenizer)
    assert frozen is tokenizer
    assert not any(module.training for module in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not frozen.decode(torch.zeros(1, 2, 2, dtype=torch.int64)).requires_grad


def test_a_grid_knows_its_shape_and_vocabulary() -> None:
    tokenizer = TokenGrid(16, (2, 3))
    assert (tokenizer.vocab_size, tokenizer.token_shape(256)) == (16, (2, 3))
    assert not tokenizer.state_dict()


def test_fingerprints_tell_grids_apart() -> None:
    settings = [(16, (2, 3)), (16, (3, 2)), (16, (6,)), (8, (2, 3))]
    assert len({TokenGrid(*given).fingerprint() for given in settings}) == 4
    assert TokenGrid(16, (2, 3)).fingerprint() == TokenGrid(16, (2, 3)).fingerprint()


@pytest.mark.parametrize("use", ["encode", "decode", "embed"])
def test_a_grid_codes_nothing(use: str) -> None:
    message = "this generator was loaded without its tokenizer, which codes images as 2 x 3 ids below 16"
    with pytest.raises(ValueError, match=message):
        getattr(TokenGrid(16, (2, 3)), use)(torch.zeros(1, 2, 3, dtype=torch.int64))


@pytest.mark.parametrize("given", [(0, (2,)), (4, ()), (4, (2, 0))])
def test_grids_out_of_range(given) -> None:
    with pytest.raises(ValueError, match="vocab_size and token_shape must be positive"):
        TokenGrid(*given)


@pytest.mark.parametrize("family", ["masked", "autoregressive"])
def test_a_generator_around_a_grid_samples_ids_alone(make_generator, family: str) -> None:
    generator = make_generator(family, tokenizer=TokenGrid(4, (2, 4)))
    labels = torch.tensor([0, 1])
    assert generator.sample(labels).shape == (2, 2, 4)
    with pytest.raises(ValueError, match="loaded without its tokenizer"):
        generator.predict_step({"label": labels}, 0)
    with pytest.raises(ValueError, match="loaded without its tokenizer"):
        generator.tokens_of({"image": torch.zeros(1, 3, 8, 8)})
