"""SimVQ: a frozen codebook behind one linear layer."""

import pytest
import torch

from discrete_lit.tokenizers.quantizers import SimVectorQuantizer


def test_ids_and_codes_are_those_of_the_transformed_codebook() -> None:
    quantizer = SimVectorQuantizer(200, 4)
    codes = quantizer.coefficients @ quantizer.to_codes.weight.T + quantizer.to_codes.bias
    latents = torch.randn(2, 5, 7, 4)
    quantized = quantizer(latents)
    expected = torch.cdist(latents.reshape(-1, 4), codes).argmin(dim=1).reshape(2, 5, 7)
    assert torch.equal(quantized.tokens, expected) and torch.equal(quantizer.encode(latents), expected)
    torch.testing.assert_close(quantized.z_q, codes[expected])
    assert torch.equal(quantizer.lookup(expected), quantized.z_q)
    assert not torch.allclose(quantizer.lookup(expected), quantizer.coefficients[expected], atol=0.1)


def test_one_step_moves_every_code_and_not_the_coefficients() -> None:
    quantizer = SimVectorQuantizer(50, 4, commitment_weight=0.3)
    assert {name for name, _ in quantizer.named_parameters()} == {"to_codes.weight", "to_codes.bias"}
    everything, coefficients = torch.arange(50), quantizer.coefficients.clone()
    before = quantizer.lookup(everything).detach()
    latents = torch.randn(6, 4, requires_grad=True)
    quantized = quantizer(latents)
    distance = (quantized.z_q.detach() - latents.detach()).square().mean()
    torch.testing.assert_close(quantized.losses["commitment"], 0.3 * distance)
    torch.testing.assert_close(quantized.losses["codebook"], distance)
    torch.stack(list(quantized.losses.values())).sum().backward()
    torch.testing.assert_close(latents.grad, 0.3 * 2 * (latents.detach() - quantized.z_q.detach()) / latents.numel())
    torch.optim.SGD(quantizer.parameters(), lr=1.0).step()
    assert (quantizer.lookup(everything).detach() - before).abs().amax(dim=1).min() > 1e-5
    assert torch.equal(quantizer.coefficients, coefficients)


def test_rotation_is_an_option() -> None:
    latents = torch.randn(6, 4, requires_grad=True)
    gradients = {}
    for gradient in ("straight_through", "rotation"):
        torch.manual_seed(1)
        made = SimVectorQuantizer(10, 4, gradient=gradient)(latents)  # type: ignore[arg-type]
        (gradients[gradient],) = torch.autograd.grad(made.z_q.sum(), latents)
    assert (gradients["straight_through"] == 1).all() and not torch.allclose(*gradients.values())


def test_autocast_does_not_change_ids() -> None:
    quantizer = SimVectorQuantizer(512, 8)
    latents = torch.randn(1000, 8)
    expected = quantizer(latents)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(latents)
        codes = quantizer.lookup(quantized.tokens)
    assert torch.equal(quantized.tokens, expected.tokens) and torch.equal(quantized.z_q, expected.z_q)
    assert torch.equal(codes, expected.z_q)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codebook_size": 0}, "must be positive, got 0 and 4"),
        ({"commitment_weight": -1.0}, "commitment_weight must be >= 0, got -1.0"),
        ({"gradient": "none"}, "gradient must be one of"),
    ],
)
def test_settings_out_of_range(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimVectorQuantizer(**{"codebook_size": 8, "dim": 4, **arguments})


@pytest.mark.parity
def test_against_vector_quantize_pytorch() -> None:
    from vector_quantize_pytorch import SimVQ

    ours = SimVectorQuantizer(64, 8, bias=False)
    theirs = SimVQ(
        dim=8, codebook_size=64, rotation_trick=False, commitment_weight=1.0, input_to_quantize_commit_loss_weight=0.25
    )
    with torch.no_grad():
        theirs.frozen_codebook.copy_(ours.coefficients)
        theirs.code_transform.weight.copy_(ours.to_codes.weight)
    latents = torch.randn(2, 50, 8, requires_grad=True)
    mine = ours(latents)
    codes, tokens, loss = theirs(latents)
    assert torch.equal(mine.tokens, tokens)
    torch.testing.assert_close(mine.z_q, codes)
    total = torch.stack(list(mine.losses.values())).sum()
    torch.testing.assert_close(total, loss)
    torch.testing.assert_close(
        torch.autograd.grad(total, latents, retain_graph=True)[0], torch.autograd.grad(loss, latents)[0]
    )
    torch.testing.assert_close(ours.lookup(tokens), theirs.indices_to_codes(tokens))
