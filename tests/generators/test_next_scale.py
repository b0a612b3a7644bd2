"""Next-scale prediction: its law, its loss, its samples, and tokenizers without scales."""

import pytest
import torch
from helpers.exact_laws import all_sequences, chi_square_p_value, sequence_numbers

from discrete_lit.core.random import CounterRandom
from discrete_lit.generators import NextScale


@torch.no_grad()
def exact_law(generator, label: int) -> torch.Tensor:
    """`(3^5,)`: the first id from the label, the four others from the code vectors of the first alone."""
    sequences = all_sequences(3, 5)
    labels = torch.full((243,), label)
    quantizer = generator.tokenizer.quantizer
    first = quantizer.at_scale(1, quantizer.contribution(0, sequences[:, :1]))  # (243, 4, 3)
    logits = (generator.backbone(first[:, :0], labels)[:, -1:], generator.backbone(first, labels)[:, -4:])
    log_probability = torch.cat(logits, dim=1).double().log_softmax(dim=-1)
    return log_probability.gather(-1, sequences[..., None])[..., 0].sum(dim=1)


def test_layout(make_next_scale) -> None:
    layout = make_next_scale().backbone.layout
    assert (layout.attention, layout.scales, layout.input_dim) == ("block_causal", (1, 4), 3)
    assert (layout.grid, layout.vocab_size, layout.mask_token) == ((5,), 3, False)


def test_likelihood_is_exact(make_next_scale) -> None:
    generator = make_next_scale(spread=0.5)
    for label in (0, 2):
        likelihood = generator.log_likelihood(all_sequences(3, 5), torch.full((243,), label))
        assert likelihood.kind == "exact"
        torch.testing.assert_close(likelihood.nats, exact_law(generator, label), rtol=0, atol=1e-5)
        assert float(likelihood.nats.exp().sum()) == pytest.approx(1, abs=1e-6)


def test_samples_follow_the_law(make_next_scale) -> None:
    generator = make_next_scale(spread=0.5)
    drawn = generator.sample(torch.ones(8000, dtype=torch.int64), seed=2)
    assert chi_square_p_value(sequence_numbers(drawn, 3), exact_law(generator, 1).exp()) > 1e-3
    assert torch.equal(
        generator.sample(torch.ones(3, dtype=torch.int64), seed=2, indices=torch.arange(50, 53)), drawn[50:53]
    )


def test_samples_decode(make_next_scale) -> None:
    generator = make_next_scale(spread=0.5)
    assert generator.predict_step({"label": torch.tensor([0, 1])}, 0).shape == (2, 3, 8, 8)


def test_loss_is_the_likelihood_of_images_and_of_their_tokens(make_next_scale, monkeypatch) -> None:
    generator = make_next_scale(vocab_size=7, spread=0.5, label_dropout=0.0)
    monkeypatch.setattr(generator, "log_dict", lambda *_, **__: None)
    images, labels = torch.rand(6, 3, 8, 8) * 2 - 1, torch.arange(6) % 2
    tokens = generator.tokenizer.encode(images)
    assert len(tokens.unique()) > 1
    expected = -float(generator.log_likelihood(tokens, labels).nats.mean()) / 5
    for batch in ({"image": images}, {"tokens": tokens}):
        assert float(generator.training_step({**batch, "label": labels}, 0).detach()) == pytest.approx(
            expected, rel=1e-5
        )


def test_coordinate_is_the_scale(make_next_scale) -> None:
    generator = make_next_scale()
    losses = generator.token_losses(
        torch.zeros(2, 5, dtype=torch.int64), torch.tensor([0, 1]), CounterRandom(0, torch.arange(2))
    )
    assert losses.coordinate.tolist() == [[0.25, 0.75, 0.75, 0.75, 0.75]] * 2 and (losses.weights == 1).all()


def test_the_input_is_float32_under_autocast(make_next_scale) -> None:
    """Code vectors add up over scales: in bfloat16 a model would be trained on others than it is sampled with."""
    generator, seen = make_next_scale(spread=0.5), []
    generator.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    tokens, labels = all_sequences(3, 5), torch.zeros(243, dtype=torch.int64)
    generator.log_likelihood(tokens, labels)
    with torch.autocast("cpu", torch.bfloat16):
        generator.log_likelihood(tokens, labels)
    assert torch.equal(*seen)


def test_every_parameter_is_trained_and_none_of_the_tokenizer(make_next_scale, assert_all_trained) -> None:
    generator = make_next_scale(spread=0.3)
    assert_all_trained(generator)
    assert all(parameter.grad is None for parameter in generator.tokenizer.parameters())


def test_tokenizers_without_scales(make_generator, make_tokenizer, make_grid_tokenizer) -> None:
    for tokenizer, message in (
        (make_tokenizer("fsq"), "the tokenizer FSQ has a FiniteScalarQuantizer: give it a MultiScaleVQ"),
        (make_grid_tokenizer(4, (5,)), "the tokenizer GridTokenizer has no quantizer"),
    ):
        with pytest.raises(ValueError, match=message):
            NextScale(tokenizer, 8, num_classes=2, backbone=lambda layout: pytest.fail("no layout fits"))


def test_a_first_scale_of_several_ids(make_next_scale) -> None:
    tokenizer = make_next_scale().tokenizer
    tokenizer.quantizer.lengths[0] = 4
    with pytest.raises(ValueError, match="NextScale needs a first scale of one id"):
        NextScale(tokenizer, 8, num_classes=2, backbone=lambda layout: pytest.fail("no layout fits"))
