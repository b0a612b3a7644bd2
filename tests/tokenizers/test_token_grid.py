"""The shape of a tokenizer without the tokenizer."""

import pytest
import torch

from discrete_lit.tokenizers import TokenGrid


def test_shape_and_vocabulary() -> None:
    tokenizer = TokenGrid(16, (2, 3))
    assert (tokenizer.vocab_size, tokenizer.token_shape(256)) == (16, (2, 3))
    assert not tokenizer.state_dict()


def test_fingerprints_tell_grids_apart() -> None:
    settings = [(16, (2, 3)), (16, (3, 2)), (16, (6,)), (8, (2, 3))]
    assert len({TokenGrid(*given).fingerprint() for given in settings}) == 4
    assert TokenGrid(16, (2, 3)).fingerprint() == TokenGrid(16, (2, 3)).fingerprint()


@pytest.mark.parametrize("use", ["encode", "decode", "embed"])
def test_it_codes_nothing(use: str) -> None:
    message = "this generator was loaded without its tokenizer, which codes images as 2 x 3 ids below 16"
    with pytest.raises(ValueError, match=message):
        getattr(TokenGrid(16, (2, 3)), use)(torch.zeros(1, 2, 3, dtype=torch.int64))


@pytest.mark.parametrize("given", [(0, (2,)), (4, ()), (4, (2, 0))])
def test_settings_out_of_range(given) -> None:
    with pytest.raises(ValueError, match="vocab_size and token_shape must be positive"):
        TokenGrid(*given)


@pytest.mark.parametrize("family", ["masked", "autoregressive"])
def test_a_generator_around_it_samples_ids_alone(make_generator, family: str) -> None:
    generator = make_generator(family, tokenizer=TokenGrid(4, (2, 4)))
    labels = torch.tensor([0, 1])
    assert generator.sample(labels).shape == (2, 2, 4)
    with pytest.raises(ValueError, match="loaded without its tokenizer"):
        generator.predict_step({"label": labels}, 0)
    with pytest.raises(ValueError, match="loaded without its tokenizer"):
        generator.tokens_of({"image": torch.zeros(1, 3, 8, 8)})
