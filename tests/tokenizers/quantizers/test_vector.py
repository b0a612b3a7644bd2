"""Vector quantisation: the search, the running-mean update, the gradients; SimVQ, a fixed codebook behind one layer."""

import pytest
import torch
from torch.nn import functional as F

from discrete_lit.tokenizers.quantizers import SimVectorQuantizer, VectorQuantizer


def spread_out(quantizer: VectorQuantizer) -> VectorQuantizer:
    """Codes of deviation 1, as if they had been trained."""
    codes = torch.randn_like(quantizer.codebook.codes)
    with torch.no_grad():
        quantizer.codebook.codes.copy_(codes)
        if quantizer.codebook.update == "ema":
            quantizer.codebook.embedding_sum.copy_(codes)
        quantizer.codebook.started.fill_(True)
    return quantizer


@pytest.mark.parametrize("update", ["ema", "gradient"])
@pytest.mark.parametrize("grid", [(), (5,), (3, 4), (2, 3, 4)])
def test_any_grid(update, grid: tuple[int, ...]) -> None:
    quantizer = spread_out(VectorQuantizer(16, 3, codebook_update=update))
    latents = torch.randn(2, *grid, 3)
    quantized = quantizer(latents)
    assert quantized.z_q.shape == latents.shape and quantized.z_q.dtype == torch.float32
    assert quantized.tokens.shape == (2, *grid) and quantized.tokens.dtype == torch.int64
    flat = spread_out(VectorQuantizer(16, 3, codebook_update=update))
    flat.load_state_dict({**quantizer.state_dict(), "codebook.codes": flat.codebook.codes})
    assert torch.equal(quantizer.encode(latents).flatten(), quantizer.encode(latents.reshape(-1, 3)))


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_codes_are_the_looked_up_ones_to_the_bit(update) -> None:
    quantizer = spread_out(VectorQuantizer(16, 3, codebook_update=update)).eval()
    quantized = quantizer(torch.randn(4, 5, 3) * 3)
    assert torch.equal(quantizer.lookup(quantized.tokens), quantized.z_q)
    assert quantized.tokens.unique().numel() > 8


def test_training_codes_are_those_before_the_update() -> None:
    quantizer = spread_out(VectorQuantizer(16, 3))
    before = quantizer.codebook.codes.clone()
    quantized = quantizer(torch.randn(40, 3))
    assert torch.equal(quantized.z_q, before[quantized.tokens])
    assert not torch.equal(quantizer.codebook.codes, before)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_gradients(update) -> None:
    """Straight through to the latents, the commitment term on top, the codebook term to the codes alone."""
    quantizer = spread_out(VectorQuantizer(8, 3, codebook_update=update, commitment_weight=0.3))
    latents = torch.randn(20, 3, requires_grad=True)
    quantized = quantizer(latents)
    weights = torch.randn(20, 3)
    (through,) = torch.autograd.grad((quantized.z_q * weights).sum(), latents, retain_graph=True)
    assert torch.equal(through, weights)

    codes, count = quantized.z_q.detach(), latents.numel()
    commitment = quantized.losses["commitment"]
    torch.testing.assert_close(commitment, 0.3 * (latents - codes).square().mean())
    (gradient,) = torch.autograd.grad(commitment, latents, retain_graph=True)
    torch.testing.assert_close(gradient, 0.3 * 2 * (latents.detach() - codes) / count)
    if update == "ema":
        assert set(quantized.losses) == {"commitment"} and not list(quantizer.parameters())
        return
    assert set(quantized.losses) == {"commitment", "codebook"}
    torch.testing.assert_close(quantized.losses["codebook"], (latents - codes).square().mean())
    codebook_gradient, latent_gradient = torch.autograd.grad(
        quantized.losses["codebook"], (quantizer.codebook.codes, latents), allow_unused=True
    )
    expected = torch.zeros(8, 3).index_add(0, quantized.tokens, 2 * (codes - latents.detach()) / count)
    torch.testing.assert_close(codebook_gradient, expected)
    assert latent_gradient is None


def test_running_means_by_hand() -> None:
    """Appendix A.1, eq. 6-8, in float64 over five batches; codes that nobody takes stay where they are."""
    decay, smoothing = 0.9, 1e-5
    quantizer = spread_out(VectorQuantizer(6, 2, decay=decay))
    codes = quantizer.codebook.codes.double().numpy().copy()
    size, total = [1.0] * 6, [list(code) for code in codes]
    for _ in range(5):
        latents = torch.randn(30, 2) * 2 + 1
        tokens = quantizer(latents).tokens.tolist()
        for code in range(6):
            members = [row for row, token in zip(latents.double().tolist(), tokens, strict=True) if token == code]
            size[code] = decay * size[code] + (1 - decay) * len(members)
            for axis in range(2):
                total[code][axis] = decay * total[code][axis] + (1 - decay) * sum(row[axis] for row in members)
        everything = sum(size)
        smoothed = [(value + smoothing) / (everything + 6 * smoothing) * everything for value in size]
        expected = torch.tensor([[value / n for value in row] for row, n in zip(total, smoothed, strict=True)])
        torch.testing.assert_close(quantizer.codebook.codes, expected.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(quantizer.codebook.cluster_size, torch.tensor(size), rtol=1e-5, atol=1e-6)


def test_running_means_reach_the_cluster_means() -> None:
    quantizer = VectorQuantizer(2, 1, decay=0.5, codebook_init="uniform")
    quantizer.codebook.codes.copy_(torch.tensor([[-1.0], [1.0]]))
    quantizer.codebook.embedding_sum.copy_(quantizer.codebook.codes)
    latents = torch.tensor([[-3.0], [-5.0], [4.0], [6.0]])
    for _ in range(40):
        quantizer(latents)
    torch.testing.assert_close(quantizer.codebook.codes, torch.tensor([[-4.0], [5.0]]), rtol=0, atol=1e-3)


def test_evaluation_changes_nothing() -> None:
    quantizer = spread_out(VectorQuantizer(6, 2)).eval()
    before = {name: value.clone() for name, value in quantizer.state_dict().items()}
    quantizer(torch.randn(30, 2))
    assert all(torch.equal(value, before[name]) for name, value in quantizer.state_dict().items())


def test_autocast_does_not_change_ids() -> None:
    quantizer = spread_out(VectorQuantizer(512, 8)).eval()
    latents = torch.randn(2000, 8)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(latents)
    assert torch.equal(quantized.tokens, quantizer(latents).tokens)
    assert quantized.z_q.dtype == torch.float32
    assert torch.equal(quantizer(latents.bfloat16()).tokens, quantizer(latents.bfloat16().float()).tokens)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"codebook_size": 0, "dim": 2}, "must be positive, got 0 and 2"),
        ({"codebook_size": 4, "dim": 0}, "must be positive, got 4 and 0"),
        ({"codebook_size": 4, "dim": 2, "decay": 1.0}, r"decay must lie in \[0, 1\)"),
        ({"codebook_size": 4, "dim": 2, "commitment_weight": -1.0}, "commitment_weight must be >= 0"),
        ({"codebook_size": 4, "dim": 2, "weighted_term": "both"}, "must be 'commitment' or 'codebook', got 'both'"),
        ({"codebook_size": 4, "dim": 2, "weighted_term": "codebook"}, "'ema' has no codebook term"),
        ({"codebook_size": 4, "dim": 2, "gradient": "none"}, "gradient must be one of"),
        ({"codebook_size": 4, "dim": 2, "entropy_temperature": 0.0}, "entropy_temperature must be above 0, got 0.0"),
        ({"codebook_size": 4, "dim": 2, "entropy_weight": -1.0}, "must be >= 0, got -1.0 and 0.0"),
    ],
)
def test_settings_out_of_range(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VectorQuantizer(**arguments)


@pytest.mark.parity
@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_against_vector_quantize_pytorch(update) -> None:
    from vector_quantize_pytorch import VectorQuantize

    ours = spread_out(VectorQuantizer(32, 8, codebook_update=update, decay=0.95)).train()
    theirs = VectorQuantize(
        dim=8,
        codebook_size=32,
        decay=0.95,
        eps=1e-5,
        commitment_weight=0.25 if update == "ema" else 1.25,
        rotation_trick=False,
        learnable_codebook=update == "gradient",
        ema_update=update == "ema",
    ).train()
    with torch.no_grad():
        theirs._codebook.embed.copy_(ours.codebook.codes[None])
        if update == "ema":
            theirs._codebook.embed_avg.copy_(ours.codebook.codes[None])
            assert (theirs._codebook.cluster_size == 1).all()
    for _ in range(4):
        latents = torch.randn(2, 50, 8, requires_grad=True)
        mine = ours(latents)
        codes, tokens, loss = theirs(latents)
        assert torch.equal(mine.tokens, tokens)
        torch.testing.assert_close(mine.z_q, codes)
        torch.testing.assert_close(torch.stack(list(mine.losses.values())).sum(), loss.squeeze())
        torch.testing.assert_close(ours.codebook.codes, theirs._codebook.embed[0], rtol=1e-5, atol=1e-6)
        if update == "ema":
            torch.testing.assert_close(ours.codebook.cluster_size, theirs._codebook.cluster_size[0])
        my_gradient, their_gradient = (
            torch.autograd.grad((F.mse_loss(value, torch.zeros_like(value))), latents)[0] for value in (mine.z_q, codes)
        )
        torch.testing.assert_close(my_gradient, their_gradient)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_first_codes_are_latents_of_the_first_training_batch(update) -> None:
    quantizer = VectorQuantizer(16, 3, codebook_update=update, decay=0.99)
    untrained = quantizer.codebook.codes.detach().clone()
    assert untrained.abs().max() <= 1 / 16
    quantizer.eval()(torch.randn(40, 3))
    assert torch.equal(quantizer.codebook.codes, untrained)
    latents = torch.randn(4, 10, 3)
    tokens = quantizer.train()(latents).tokens
    assert len(tokens.unique()) == 16  # each code is its own latent's nearest
    if update == "gradient":
        assert all((latents.flatten(0, 1) == code).all(dim=1).any() for code in quantizer.codebook.codes)
    second = quantizer.codebook.codes.detach().clone()
    quantizer(torch.randn(40, 3) + 100)
    assert quantizer.codebook.codes.detach().sub(second).abs().max() < 50  # moved by its update, not started again


def test_first_codes_do_not_depend_on_the_order_of_latents() -> None:
    """However the batch is split over ranks, they start from the same codes."""
    latents = torch.randn(40, 3)
    first, second = (VectorQuantizer(16, 3, codebook_update="gradient").train() for _ in range(2))
    first(latents)
    second(latents.roll(7, dims=0).flip(0))
    assert torch.equal(first.codebook.codes, second.codebook.codes)
    assert first.codebook.codes[:, 0].std().item() == pytest.approx(latents[:, 0].std().item(), rel=0.3)


def test_codes_of_a_checkpoint_are_kept() -> None:
    trained = VectorQuantizer(16, 3, codebook_update="gradient").train()
    trained(torch.randn(40, 3))
    loaded = VectorQuantizer(16, 3, codebook_update="gradient").train()
    loaded.load_state_dict(trained.state_dict())
    loaded(torch.randn(40, 3))
    assert torch.equal(loaded.codebook.codes, trained.codebook.codes)


def test_fewer_latents_than_codes() -> None:
    quantizer = VectorQuantizer(16, 3).train()
    assert len(quantizer(torch.randn(5, 3)).tokens.unique()) == 5


def test_uniform_start() -> None:
    quantizer = VectorQuantizer(16, 3, codebook_update="gradient", codebook_init="uniform").train()
    before = quantizer.codebook.codes.detach().clone()
    quantizer(torch.randn(40, 3))
    assert torch.equal(quantizer.codebook.codes, before) and before.abs().max() <= 1 / 16
    assert "codebook.started" not in quantizer.state_dict()


def test_the_legacy_placement_of_beta() -> None:
    """Same value, other gradients: beta on the codebook term."""
    latents = torch.randn(20, 3, requires_grad=True)
    gradients = {}
    for term in ("commitment", "codebook"):
        torch.manual_seed(3)
        quantizer = spread_out(
            VectorQuantizer(8, 3, codebook_update="gradient", commitment_weight=0.2, weighted_term=term)
        )
        total = torch.stack(list(quantizer(latents).losses.values())).sum()
        gradients[term] = torch.autograd.grad(total, (latents, quantizer.codebook.codes))
    torch.testing.assert_close(gradients["codebook"][0] * 0.2, gradients["commitment"][0])
    torch.testing.assert_close(gradients["codebook"][1], gradients["commitment"][1] * 0.2)


def test_losses_on_the_sphere_are_those_of_normalised_vectors() -> None:
    quantizer = spread_out(VectorQuantizer(8, 3, codebook_update="gradient", normalize=True))
    latents = torch.randn(20, 3) * 5
    quantized = quantizer(latents)
    points, codes = F.normalize(latents, dim=1), F.normalize(quantizer.codebook.codes.detach(), dim=1)
    assert torch.equal(quantized.tokens, (points @ codes.T).argmax(dim=1))
    torch.testing.assert_close(quantized.z_q.detach(), codes[quantized.tokens])
    distance = (points - codes[quantized.tokens]).square().mean()
    torch.testing.assert_close(quantized.losses, {"commitment": 0.25 * distance, "codebook": distance})


def test_rotation_reaches_the_latents() -> None:
    latents = torch.randn(20, 3, requires_grad=True)
    quantizer = spread_out(VectorQuantizer(8, 3, gradient="rotation")).eval()
    quantized = quantizer(latents)
    assert torch.equal(quantized.z_q, quantizer.lookup(quantized.tokens))
    weights = torch.randn(20, 3)
    (gradient,) = torch.autograd.grad((quantized.z_q * weights).sum(), latents)
    cosines = torch.cosine_similarity(gradient, latents.detach()), torch.cosine_similarity(weights, quantized.z_q)
    torch.testing.assert_close(*cosines, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_entropy_terms_by_hand(update) -> None:
    """Softmax of negative squared distances, both entropies, and gradients though the codes move in the forward."""
    arguments = {"entropy_weight": 0.3, "entropy_temperature": 0.5, "entropy_log_offset": 1e-3}
    quantizer = spread_out(VectorQuantizer(8, 3, codebook_update=update, revive_below=1.0, **arguments))
    codes = quantizer.codebook.codes.detach().clone().requires_grad_()
    latents = torch.randn(20, 3, requires_grad=True)
    p = (torch.cdist(latents, codes).square() / -0.5).softmax(dim=1)
    sample = -0.3 * (p * p.log()).sum(dim=1).mean()
    batch = 0.3 * (p.mean(dim=0) * (p.mean(dim=0) + 1e-3).log()).sum()
    losses = quantizer(latents).losses
    torch.testing.assert_close(losses["sample_entropy"], sample)
    torch.testing.assert_close(losses["batch_entropy"], batch)
    mine, expected = losses["sample_entropy"] + losses["batch_entropy"], sample + batch
    leaves = (latents, quantizer.codebook.codes) if update == "gradient" else (latents,)
    wanted = torch.autograd.grad(expected, (latents, codes))
    for one, other in zip(torch.autograd.grad(mine, leaves), wanted, strict=False):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("update", ["ema", "gradient"])
def test_revival_in_training_leaves_the_backward_pass_alone(update) -> None:
    quantizer = VectorQuantizer(
        64, 3, codebook_update=update, codebook_init="uniform", revive_below=1.0, gradient="rotation"
    ).train()
    before = quantizer.codebook.codes.detach().clone()
    latents = torch.randn(50, 3, requires_grad=True)
    for _ in range(2):
        quantized = quantizer(latents)
        torch.stack([quantized.z_q.sum(), *quantized.losses.values()]).sum().backward()
    assert latents.grad is not None and latents.grad.isfinite().all()
    assert (quantizer.codebook.codes.detach() - before).abs().amax() > 0.5


def test_autocast_keeps_training_statistics_in_float32() -> None:
    plain, cast = (spread_out(VectorQuantizer(32, 4, normalize=True)) for _ in range(2))
    cast.load_state_dict(plain.state_dict())
    latents = torch.randn(100, 4)
    expected = plain(latents)
    with torch.autocast("cpu", torch.bfloat16):
        quantized = cast(latents)
    torch.testing.assert_close(quantized.losses, expected.losses, rtol=0, atol=0)
    for name, value in plain.state_dict().items():
        assert torch.equal(cast.state_dict()[name], value), name


def test_simvq_ids_and_codes_are_those_of_the_transformed_codebook() -> None:
    quantizer = SimVectorQuantizer(200, 4)
    codes = quantizer.coefficients @ quantizer.to_codes.weight.T + quantizer.to_codes.bias
    latents = torch.randn(2, 5, 7, 4)
    quantized = quantizer(latents)
    expected = torch.cdist(latents.reshape(-1, 4), codes).argmin(dim=1).reshape(2, 5, 7)
    assert torch.equal(quantized.tokens, expected) and torch.equal(quantizer.encode(latents), expected)
    torch.testing.assert_close(quantized.z_q, codes[expected])
    assert torch.equal(quantizer.lookup(expected), quantized.z_q)
    assert not torch.allclose(quantizer.lookup(expected), quantizer.coefficients[expected], atol=0.1)


def test_simvq_one_step_moves_every_code_and_not_the_coefficients() -> None:
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


def test_simvq_rotation_is_an_option() -> None:
    latents = torch.randn(6, 4, requires_grad=True)
    gradients = {}
    for gradient in ("straight_through", "rotation"):
        torch.manual_seed(1)
        made = SimVectorQuantizer(10, 4, gradient=gradient)(latents)
        (gradients[gradient],) = torch.autograd.grad(made.z_q.sum(), latents)
    assert (gradients["straight_through"] == 1).all() and not torch.allclose(*gradients.values())


def test_simvq_autocast_does_not_change_ids() -> None:
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
def test_simvq_settings_out_of_range(arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimVectorQuantizer(**{"codebook_size": 8, "dim": 4, **arguments})


@pytest.mark.parity
def test_simvq_against_vector_quantize_pytorch() -> None:
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
