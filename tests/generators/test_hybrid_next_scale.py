"""HART and scales of vectors: exact laws and bounds, what the head is given, draws that belong to their index."""

import re
from itertools import permutations
from math import log
from typing import Any

import pytest
import torch
from helpers.counted_operations import counted
from helpers.exact_laws import all_sequences, chi_square_p_value, sequence_numbers
from helpers.random_weights import randomise
from torch import Tensor

from discrete_lit.backbones import ScaleLayout, ScaleTransformer, TokenDiffusionHead
from discrete_lit.backbones.condition import Condition
from discrete_lit.core.random import CounterRandom, Purpose
from discrete_lit.diffusion.gaussian import GaussianDenoiser, RectifiedPath
from discrete_lit.diffusion.solvers import DDPM, Euler
from discrete_lit.generators import ContinuousNextScale, HybridNextScale, VectorPyramid
from discrete_lit.generators.counted_step import count_step
from discrete_lit.generators.hybrid_next_scale import HybridPyramid
from discrete_lit.samplers import HybridScaleSampler
from discrete_lit.tokenizers import HybridLatents, HybridVQ, LatentGrid, RawPixels, StaticTextEncoder, TextTokenizer
from discrete_lit.tokenizers.networks import ConvAutoencoder


def small_network(layout: ScaleLayout) -> ScaleTransformer:
    return ScaleTransformer(layout, width=16, depth=2, heads=2, mlp_hidden=16)


def small_head(dim: int, width: int) -> TokenDiffusionHead:
    return TokenDiffusionHead(dim, width, width=16, depth=1, repeats=2, solver=DDPM(3))


def tokenizer(vocab_size: int = 3, scales: tuple[int, ...] = (1, 2)) -> HybridLatents:
    """Of images of four pixels for each place of the last scale's sides."""

    def network(code_dim: int, latent_dim: int) -> ConvAutoencoder:
        return ConvAutoencoder(code_dim, latent_dim, channels=8, multipliers=(1, 1, 2), blocks=1, norm_groups=4)

    torch.manual_seed(5)
    return HybridLatents(randomise(HybridVQ(network, vocab_size, code_dim=3, scales=scales), 0.5))


def hybrid(scales: tuple[int, ...] = (1, 2), vocab_size: int = 3, **settings: Any) -> HybridNextScale:
    given: dict[str, Any] = {"backbone": small_network, "head": small_head, "check_scale": False, **settings}
    num_classes = given.pop("num_classes", 2)
    given["scales"] = given.pop("scales_of_tokens", None)
    made = HybridNextScale(tokenizer(vocab_size, scales), 4 * scales[-1], num_classes=num_classes, **given)
    torch.manual_seed(0)
    randomise(made.backbone, 0.4)
    for parameter in made.head.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    return made.eval()


def batch(scale: int = 2, count: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(count, 3, scale, scale), torch.arange(count) % 2


# --- HART ---


def test_the_operations_of_a_step_are_counted_for_the_mean_share_of_its_places() -> None:
    made, (latents, labels) = hybrid((1, 2, 8), least_kept=1).train(), batch(8)
    given = {"latents": latents, "label": labels, "index": torch.arange(5)}
    measured = count_step(made, given)
    share = made.mean_step_share()
    assert share is not None and 0.5 < share < 1
    made.log_dict = lambda *_, **__: None
    made.fixed_share = share
    assert measured == counted(made, given) > 0
    made.fixed_share = 1.0
    assert count_step(made, given) == measured, "the count's own share is the mean"
    assert counted(made, given) != measured


@torch.no_grad()
def log_law(made: HybridNextScale, label: int) -> Tensor:
    """`(3^5,)`: both scales' factors from one pass over the whole teacher-forced input, without a cache."""
    sequences = all_sequences(3, 5)
    logits = made.backbone(made.quantizer.teacher_forcing(sequences), torch.full((243,), label)).logits
    assert logits is not None
    return logits.double().log_softmax(dim=-1).gather(-1, sequences[..., None]).sum(dim=(1, 2))


@torch.no_grad()
def log_law_in_three_passes(made: HybridNextScale, label: int) -> Tensor:
    """The same where the four places of the last scale are drawn 1, 1 and 2 at a time, in an order that is uniform.

    What is drawn in a pass is no input of the next, and its keys stay as they were: given the first id, each place
    depends on those that are read with it or before it alone.
    """
    sequences = all_sequences(3, 5)
    inputs, labels = made.quantizer.teacher_forcing(sequences), torch.full((243,), label)
    of_orders = []
    for one, two in permutations(range(4), 2):
        cache = made.backbone.new_cache(labels)
        total = chosen(made.backbone(inputs[:, :0], labels, cache).logits, sequences[:, :1])
        for part in ([one], [two], [place for place in range(4) if place not in (one, two)]):
            states = made.backbone(inputs[:, part], labels, cache, places=torch.tensor(part).expand(243, -1))
            total = total + chosen(states.logits, sequences[:, 1:][:, part])
        of_orders.append(total)
    return torch.stack(of_orders).logsumexp(dim=0) - log(len(of_orders))


def chosen(logits: Any, ids: Tensor) -> Tensor:
    """log p of ids `(B, n)` together, `(B,)` float64."""
    return logits.double().log_softmax(dim=-1).gather(-1, ids[..., None]).sum(dim=(1, 2))


@pytest.mark.parametrize("last_steps", [1, 3])
def test_drawn_ids_follow_the_law(last_steps: int) -> None:
    made, count = hybrid(), 8000
    random, labels = CounterRandom(3, torch.arange(count)), torch.ones(count, dtype=torch.int64)
    made.head.sample = lambda z, start, **_: start  # type: ignore[method-assign, assignment]
    sampler = HybridScaleSampler(last_steps=last_steps)
    drawn = sampler(made.backbone, made.head, labels, random, pyramid=HybridPyramid(made.quantizer))
    laws = {1: log_law, 3: log_law_in_three_passes}
    law = laws[last_steps](made, 1).exp()
    assert float(law.sum()) == pytest.approx(1, abs=1e-6)
    assert chi_square_p_value(sequence_numbers(drawn.tokens, 3), law) > 1e-3
    assert chi_square_p_value(sequence_numbers(drawn.tokens, 3), laws[last_steps](made, 0).exp()) < 1e-6


@torch.no_grad()
def test_drawn_latents_are_codes_and_residuals() -> None:
    """The head is given the hidden state of teacher forcing and the code of the id that was drawn."""
    made, labels = hybrid((1, 2, 3), 7), torch.tensor([0, 1, 2])
    random, given = CounterRandom(3, torch.arange(3)), []

    def head(z: Tensor, start: Tensor, **_: Any) -> Tensor:
        given.append(z)
        return start

    made.head.sample = head  # type: ignore[method-assign, assignment]
    drawn = HybridScaleSampler()(made.backbone, made.head, labels, random, pyramid=HybridPyramid(made.quantizer))
    residual = random.normal(Purpose.LATENT_NOISE, 27).float().view(3, 3, 3, 3).movedim(-1, 1)
    torch.testing.assert_close(drawn.latents, made.quantizer.before_residual(drawn.tokens) + residual)
    states = made.backbone(made.quantizer.teacher_forcing(drawn.tokens), labels)
    codes = made.quantizer.codebook.lookup(drawn.tokens[:, -9:])
    expected = made.backbone.head_condition(states.hidden[:, -9:], codes)
    torch.testing.assert_close(given[0], expected.flatten(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("last_steps", [1, 3])
@torch.no_grad()
def test_a_draw_belongs_to_its_index_and_says_what_it_costs(last_steps: int) -> None:
    sampler = HybridScaleSampler(2.0, repeat_last_scale=True, top_k=[5, 4, 3], top_p=0.9, last_steps=last_steps)
    made = hybrid((1, 2, 3), 7, sampler=sampler)
    labels, indices = torch.tensor([0, 1, 2]), torch.tensor([5, 6, 900])
    together = made.sample(labels, seed=3, indices=indices)
    assert together.shape == (3, 3, 3, 3)
    for row in range(3):
        alone = made.sample(labels[row : row + 1], seed=3, indices=indices[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-3, atol=1e-3)
    assert float((together[0] - together[1]).abs().max()) > 1e-2
    output = made.draw(labels, CounterRandom(3, indices))
    passes = [(0, 0, 0), (4, 1, 0)]
    # The cosine leaves 7, 4 and 0 of 9 places.
    passes += [(9, 5, 9)] if last_steps == 1 else [(2, 5, 2), (3, 7, 3), (4, 10, 4)]
    assert (output.network_calls, output.sequential_passes) == (2 * len(passes), len(passes))
    expected = sum(
        made.backbone.flops(2, read, filled) + (made.head.flops(2 * drawn, made.head.solver) if drawn else 0)
        for read, filled, drawn in passes
    )
    assert output.flops == expected > 0


@torch.no_grad()
def test_guidance_over_the_scales() -> None:
    assert HybridScaleSampler(5.0).scales(4) == pytest.approx([1, 1 + 4 / 3, 1 + 8 / 3, 5])
    assert HybridScaleSampler(5.0, repeat_last_scale=True).scales(4) == pytest.approx([1, 1 + 4 / 3, 1 + 8 / 3, 11 / 3])
    # With a scale of 1 nothing is doubled; the null class guides itself to nothing.
    made, random = hybrid((1, 2, 3), 7), CounterRandom(3, torch.arange(2))
    null = torch.full((2,), 2)
    plain, guided = (made.draw(null, random, HybridScaleSampler(scale, top_k=1)) for scale in (1.0, 3.0))
    assert (plain.network_calls, guided.network_calls) == (3, 6)
    torch.testing.assert_close(plain.tokens, guided.tokens, rtol=1e-3, atol=1e-3)


class Standard(TokenDiffusionHead):
    """A head that knows that every vector is standard normal, whatever its hidden state."""

    def __init__(self, dim: int, width: int) -> None:
        denoiser = GaussianDenoiser(RectifiedPath(), prediction="velocity")
        super().__init__(dim, width, width=8, depth=1, denoiser=denoiser, solver=Euler(2))

        class Exact(torch.nn.Module):
            def condition_projection(self, condition: Tensor) -> Tensor:
                return condition

            def denoise(self, x: Tensor, time: Tensor, projected: Tensor) -> Tensor:
                t = (time / 1000).to(x.dtype)[:, None]
                return (2 * t - 1) * x / (t**2 + (1 - t) ** 2)

        self.network = Exact()


@torch.no_grad()
def test_the_bound_is_that_of_ids_and_residuals() -> None:
    made = hybrid(head=Standard, likelihood_steps=100)
    latents = CounterRandom(9, torch.arange(300)).normal(Purpose.LATENT_NOISE, 12).float().view(300, 3, 2, 2)
    labels = torch.zeros(300, dtype=torch.int64)
    tokens = made.quantizer.encode(latents.movedim(1, -1))
    residual = latents - made.quantizer.before_residual(tokens)
    exact = torch.distributions.Normal(0.0, 1.0).log_prob(residual).flatten(1).sum(dim=1).double()
    exact = exact + log_law(made, 0)[sequence_numbers(tokens, 3)]
    likelihood = made.log_likelihood(latents, labels)
    assert likelihood.kind == "bound"
    gap = exact - likelihood.nats
    assert -0.1 < gap.mean().item() < 0.3, gap.mean()  # of some 20 nats
    # Validation costs the ids as the law does.
    losses = made.losses(latents, labels, CounterRandom(0, torch.arange(300)))
    nats = -log_law(made, 0)[sequence_numbers(tokens, 3)]
    torch.testing.assert_close(losses.terms["ids"].double().sum(dim=1), nats, rtol=1e-5, atol=1e-5)


def test_training_reads_as_many_places_of_each_image() -> None:
    made = hybrid((1, 2, 3), 7, least_kept=2).train()
    latents, labels = batch(3)
    random = CounterRandom(0, torch.arange(5))
    places = made._kept(random)
    assert 2 <= places.shape[1] <= 5 and (places.sort(dim=1).values == places).all()
    assert len({tuple(row) for row in places.tolist()}) > 1
    # The number belongs to the step, the places to the image.
    assert torch.equal(made._kept(CounterRandom(0, torch.arange(3, 5))), places[3:])
    losses = made.losses(latents, labels, random)
    assert losses.terms["ids"].shape == losses.terms["error"].shape == (5, 5 + places.shape[1])
    assert (losses.terms["error"][:, :5] == 0).all() and (losses.terms["error"][:, 5:] > 0).all()
    loss, terms = made.loss(latents, labels, random)
    of_head = losses.terms["error"][:, 5:].mean() * places.shape[1] / (5 + places.shape[1])
    torch.testing.assert_close(terms["error"], of_head)
    torch.testing.assert_close(loss, terms["ids"] + terms["error"] + terms["bound"])
    assert hybrid((1, 2, 3), 7)._kept(random).shape == (5, 9)  # 32 are more than there are


def test_the_head_learns_the_residual_of_the_id_that_it_is_given() -> None:
    """Whichever id is drawn, code and residual are what the scales before the last leave."""
    made = hybrid((1, 2, 3), 7).train()
    latents, labels = batch(3)
    seen: list[tuple[Tensor, Tensor]] = []
    losses = made.head.losses

    def watched(condition: Tensor, data: Tensor, **named: Any) -> dict[str, Tensor]:
        seen.append((condition.detach(), data))
        return losses(condition, data, **named)

    made.head.losses = watched
    random = CounterRandom(0, torch.arange(5))
    tokens, residual, inputs = made._parts(latents)
    rest = residual + made._codes(tokens[:, -9:])
    states = made.backbone(inputs, labels)
    drawn = made._drawn(states.logits[:, -9:], random.uniform(Purpose.TOKEN, 9))
    assert 0 < int((drawn != tokens[:, -9:]).sum())
    for ids, given in ((drawn, True), (tokens[:, -9:], False)):
        made.drawn_ids = given
        made.losses(latents, labels, random)
        condition, data = seen[-1]
        torch.testing.assert_close(data.view(5, 9, 3) + made._codes(ids), rest)
        expected = made.backbone.head_condition(states.hidden[:, -9:], made._codes(ids)).detach()
        torch.testing.assert_close(condition.view(5, 9, -1), expected)


@torch.no_grad()
def test_ids_for_the_head_are_drawn_with_their_probabilities() -> None:
    made, count = hybrid(draw_top_k=2, draw_top_p=None), 40_000
    logits = torch.tensor([0.5, -1.0, 0.2]).log_softmax(dim=0).expand(count, 1, 3)
    drawn = made._drawn(logits, CounterRandom(0, torch.arange(count)).uniform(Purpose.TOKEN, 1))
    shares = drawn.flatten().bincount(minlength=3) / count
    expected = torch.tensor([0.5, -torch.inf, 0.2]).softmax(dim=0)
    torch.testing.assert_close(shares, expected, rtol=0, atol=0.01)


def test_every_parameter_is_trained_and_none_of_the_tokenizer() -> None:
    for context in (None, (4, 6)):
        made = hybrid((1, 2, 3), 7, context=context, num_classes=1 if context else 2).train()
        latents, labels = batch(3)
        condition: Any = labels
        if context:
            condition = made.condition_of({"latents": latents, "context": torch.randn(5, 4, 6)}, None)  # type: ignore[arg-type]
        dropped = torch.tensor([True, False, False, False, False])
        made.loss(latents, condition, dropped=dropped)[0].backward()
        still = [
            name
            for name, value in made.named_parameters()
            if value.requires_grad and (value.grad is None or not value.grad.abs().sum() > 0)
        ]
        assert not still
        assert all(value.grad is None for value in made.tokenizer.parameters())


@torch.no_grad()
def test_given_text() -> None:
    made = hybrid(context=(4, 6), num_classes=1, sampler=HybridScaleSampler(3.0))
    vectors = torch.randn(2, 4, 6)
    condition = made.condition_of({"latents": torch.zeros(2, 3, 2, 2), "context": vectors}, None)  # type: ignore[arg-type]
    assert isinstance(condition, Condition) and condition.valid().all()
    random = CounterRandom(0, torch.arange(2))
    drawn = made.draw_given(condition, random).tokens
    assert drawn.shape == (2, 3, 2, 2)
    other = made.draw_given(
        Condition(labels=condition.labels, context=vectors.flip(0), context_mask=condition.context_mask), random
    )
    assert not torch.equal(drawn, other.tokens)
    mask = torch.tensor([[1, 1, 1, 0]] * 2)
    masked = made.condition_of({"latents": drawn, "context": vectors, "context_mask": mask}, None)  # type: ignore[arg-type]
    assert isinstance(masked, Condition) and torch.equal(masked.context_mask, mask.bool())


@torch.no_grad()
def test_given_captions() -> None:
    encoder = StaticTextEncoder(TextTokenizer.characters("ab"), 6, length=4)
    made = hybrid(context=(4, 6), num_classes=1, text_encoder=encoder)
    condition: Any = made.condition_of({"latents": torch.zeros(2, 3, 2, 2), "caption": ["a", "b"]}, None)  # type: ignore[arg-type]
    vectors, mask = encoder(["a", "b"])
    assert torch.equal(condition.context, vectors) and torch.equal(condition.context_mask, mask)
    one, other = (made.sample(made.condition_of_texts([text] * 8)) for text in "ab")
    assert not torch.equal(one, other)
    guided = HybridScaleSampler(3.0)
    away = {text: made.sample(made.condition_of_texts(["a"] * 8, negative=[text] * 8), guided) for text in ("b", "")}
    plain = made.sample(made.condition_of_texts(["a"] * 8), guided)
    assert torch.equal(away[""], plain) and not torch.equal(away["b"], plain)
    with pytest.raises(ValueError, match="and no caption, which this HybridNextScale reads"):
        made.condition_of({"latents": torch.zeros(2, 3, 2, 2)}, None)  # type: ignore[arg-type]


def test_bad_input() -> None:
    made, (latents, labels) = hybrid(), batch()
    with pytest.raises(ValueError, match="which a RawPixels does not give: set tokenizer to HybridLatents"):
        HybridNextScale(RawPixels(), 8, num_classes=2, backbone=small_network, head=small_head)
    with pytest.raises(ValueError, match="are these the ids of a discrete tokenizer"):
        made.loss(torch.zeros(5, 3, 2, 2, dtype=torch.int64), labels)
    with pytest.raises(ValueError, match=r"latents have the shape \(3, 3, 3\)"):
        made.loss(batch(3)[0], labels)
    assert hybrid(scales_of_tokens=[1, (2, 2)]).lengths == [1, 4]
    with pytest.raises(ValueError, match=r"scales are \[1, 2\], this generator models \[1, 3\]: its ids are others"):
        hybrid(scales_of_tokens=[1, 3])
    with pytest.raises(ValueError, match="least_kept and likelihood_steps must be at least 1"):
        hybrid(least_kept=0)
    with pytest.raises(ValueError, match="needs a generator that learned the null label"):
        hybrid(label_dropout=0.0).sample(labels, HybridScaleSampler(3.0))
    with pytest.raises(ValueError, match="exceeds the 1000 steps"):
        hybrid(sampler=HybridScaleSampler(solver=DDPM(2000)))
    with pytest.raises(ValueError, match='has 4 vectors in front, and needs "context"'):
        hybrid(context=(4, 6), num_classes=1).condition_of({"latents": latents}, None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="this network is given 4 vectors of width 6 in front"):
        hybrid(context=(4, 6), num_classes=1).sample(labels * 0)


def test_residuals_of_another_normalisation() -> None:
    """The known silent failure: the head's noise takes residuals of its own scale for granted."""
    (latents, _), random = batch(3), CounterRandom(0, torch.arange(5))
    made = hybrid((1, 2, 3), 7, check_scale=True)
    tokens = made.quantizer.encode(latents.movedim(1, -1))
    deviation = float((latents - made.quantizer.before_residual(tokens)).square().mean().sqrt())
    made.head.scale = deviation
    assert torch.equal(made.data_of({"latents": latents}, random), latents)
    again = hybrid((1, 2, 3), 7, check_scale=True)
    again.head.scale = deviation
    with pytest.raises(ValueError, match="the residuals of the first batch have the deviation"):
        again.data_of({"latents": 10 * latents}, random)
    again.head.scale = 10 * deviation
    with pytest.raises(ValueError, match=f"or is {deviation:.3g} the scale"):
        again.data_of({"latents": latents}, random)


# --- Scales of vectors ---


def continuous(scales: Any = (1, 2, 4), **settings: Any) -> ContinuousNextScale:
    given: dict[str, Any] = {"backbone": small_network, "head": small_head, "check_scale": False, **settings}
    made = ContinuousNextScale(LatentGrid((3, 4, 4)), 4, num_classes=2, scales=list(scales), **given)
    torch.manual_seed(0)
    randomise(made.backbone, 0.4)
    for parameter in made.head.parameters():
        parameter.data = parameter.data + 0.1 * torch.randn_like(parameter)
    return made.eval()


def joint_network(layout: ScaleLayout) -> ScaleTransformer:
    return ScaleTransformer(layout, width=16, depth=2, heads=2, mlp_hidden=16, place_embedding=True)


def joint_head(dim: int, width: int) -> TokenDiffusionHead:
    return TokenDiffusionHead(dim, width, width=16, depth=1, heads=2, repeats=2, solver=DDPM(3))


@pytest.mark.parametrize(("head", "together"), [(joint_head, True), (small_head, False)])
def test_the_places_of_a_scale_are_drawn_together_or_by_themselves(head: Any, together: bool) -> None:
    """The first noise of the last scale is changed at one place."""
    made = continuous(backbone=joint_network, head=head)
    labels, random = torch.tensor([0, 1]), CounterRandom(0, torch.arange(2))

    class Changed(CounterRandom):
        def normal(self, purpose: Purpose, count: int, block: int = 0) -> torch.Tensor:
            numbers = super().normal(purpose, count, block)
            if count == 16 * 3 and block == 2 * 4:  # behind the four draws of each of the scales before
                numbers = numbers.clone()
                numbers[:, :3] += 1
            return numbers

    first, second = (made.draw(labels, each).tokens for each in (random, Changed(0, torch.arange(2))))
    moved = (first - second).abs().amax(dim=1) > 1e-6
    assert moved.flatten(1).sum(dim=1).tolist() == ([16, 16] if together else [1, 1])


def test_a_head_that_draws_whole_scales_costs_each_scale_at_one_time() -> None:
    made = continuous(backbone=joint_network, head=joint_head).train()
    latents = batch(4)[0]
    terms = made.losses(latents, torch.zeros(5, dtype=torch.int64), CounterRandom(0, torch.arange(5)))
    assert terms.coordinate.shape == (5, 21)
    for term in terms.terms.values():
        assert term.shape == (5, 21)
        for part in term.split([1, 4, 16], dim=1):
            torch.testing.assert_close(part, part[:, :1].expand_as(part))
    sum(term.sum() for term in terms.terms.values()).backward()  # type: ignore[union-attr]
    assert made.backbone.place_embedding is not None
    gradient = made.backbone.place_embedding.weight.grad
    assert gradient is not None and bool((gradient.abs().sum(dim=1) > 0).all())


def test_a_head_that_draws_whole_scales_counts_its_attention() -> None:
    made = continuous(backbone=joint_network, head=joint_head)
    output = made.draw(torch.tensor([0]), CounterRandom(0, torch.tensor([0])), HybridScaleSampler(guidance_scale=2.0))
    halves = [1, 2, 2]  # the first scale is not guided
    expected = sum(
        made.backbone.flops(2, read, filled) + made.head.flops(rows, DDPM(3), together=drawn)
        for rows, (read, filled, drawn) in zip(halves, [(0, 0, 1), (4, 1, 4), (16, 5, 16)], strict=True)
    )
    assert output.flops == expected
    assert made.head.flops(1, DDPM(3), together=16) > continuous(backbone=joint_network).head.flops(16, DDPM(3))


def test_what_draws_whole_scales_is_refused_where_parts_are_drawn() -> None:
    made = continuous(backbone=joint_network, head=joint_head)
    with pytest.raises(ValueError, match="last_steps=2 draws parts of a scale"):
        made.draw(torch.tensor([0]), CounterRandom(0, torch.tensor([0])), HybridScaleSampler(last_steps=2))
    with pytest.raises(ValueError, match="of which training keeps a part here"):
        HybridNextScale(tokenizer(), 8, num_classes=2, backbone=small_network, head=joint_head)


@torch.no_grad()
def test_a_place_has_its_vector_whatever_part_of_the_last_scale_is_read() -> None:
    made = continuous(backbone=joint_network)
    _, inputs = made.pyramid.split(batch(4)[0])
    places = torch.tensor([[1, 4, 11]]).expand(5, -1)
    some = torch.cat((inputs[:, :4], inputs[:, 4:].gather(1, places[..., None].expand(-1, -1, 3))), dim=1)
    network, labels = made.backbone, torch.zeros(5, dtype=torch.int64)
    assert network._numbers(0, 7, places)[0].tolist() == [0, 1, 2, 3, 5, 8, 15]
    assert network._numbers(5, 3, places)[0].tolist() == [5, 8, 15]
    assert network._numbers(1, 4, None).tolist() == [0, 1, 2, 3]
    whole, part = network(inputs, labels).hidden, network(some, labels, places=places).hidden
    torch.testing.assert_close(whole[:, :5], part[:, :5])


def test_scales_add_up_to_the_latents() -> None:
    latents = batch(4)[0]
    pyramid = VectorPyramid([1, (2, 2), 4])
    measured = pyramid.deviations(latents)
    for scaled in (pyramid, VectorPyramid([1, 2, 4], deviations=measured)):
        vectors, inputs = scaled.split(latents)
        assert vectors.shape == (5, 21, 3) and inputs.shape == (5, 20, 3)
        torch.testing.assert_close(scaled.join(vectors), latents, rtol=0, atol=1e-5)
    assert [round(value, 5) for value in VectorPyramid([1, 2, 4], deviations=measured).deviations(latents)] == [
        round(value, 5) for value in measured
    ]
    parts = vectors.split([1, 4, 16], dim=1)
    assert [float(part.square().mean().sqrt()) for part in parts] == pytest.approx([1, 1, 1])
    # What a scale reads is the sum of those before it, and knows nothing of its own.
    torch.testing.assert_close(inputs[:, :4], latents.mean(dim=(2, 3))[:, None].expand(-1, 4, -1), rtol=0, atol=1e-5)


@torch.no_grad()
def test_drawing_the_true_vectors_gives_the_latents_by_the_states_of_teacher_forcing() -> None:
    made, (latents, labels) = continuous(), batch(4)
    vectors, inputs = made.pyramid.split(latents)
    left, given = list(vectors.split(made.lengths, dim=1)), []

    def true_vectors(z: Tensor, start: Tensor, **_: Any) -> Tensor:
        given.append(z.view(5, -1, z.shape[-1]))
        return left.pop(0).flatten(0, 1)

    made.head.sample = true_vectors  # type: ignore[method-assign, assignment]
    drawn = made.sample(labels)
    torch.testing.assert_close(drawn, latents, rtol=0, atol=1e-5)
    expected = made.backbone.head_condition(made.backbone(inputs, labels).hidden)
    torch.testing.assert_close(torch.cat(given, dim=1), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_draw_of_vectors_belongs_to_its_index() -> None:
    made = continuous(sampler=HybridScaleSampler(2.0, guidance_schedule="constant"), deviations=[0.3, 0.5, 1.0])
    labels, indices = torch.tensor([0, 1, 2]), torch.tensor([5, 6, 900])
    together = made.sample(labels, seed=3, indices=indices)
    for row in range(3):
        alone = made.sample(labels[row : row + 1], seed=3, indices=indices[row : row + 1])
        torch.testing.assert_close(alone[0], together[row], rtol=1e-3, atol=1e-3)
    output = made.draw(labels, CounterRandom(3, indices))
    assert (output.network_calls, output.sequential_passes) == (6, 3) and output.flops > 0


def test_vectors_are_trained() -> None:
    made, (latents, labels) = continuous().train(), batch(4)
    losses = made.losses(latents, labels, CounterRandom(0, torch.arange(5)))
    assert losses.terms["error"].shape == losses.coordinate.shape == (5, 21)
    assert losses.coordinate[0, [0, 1, 5]].tolist() == pytest.approx([1 / 6, 0.5, 5 / 6])
    made.loss(latents, labels, dropped=torch.arange(5) == 0)[0].backward()
    still = [name for name, value in made.named_parameters() if value.grad is None or not value.grad.abs().sum() > 0]
    assert not still


def test_a_first_batch_with_other_deviations_is_refused_with_its_own() -> None:
    latents = torch.randn(64, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    random = CounterRandom(0, torch.arange(64))
    found = VectorPyramid([1, 2, 4]).deviations(latents)
    assert found[0] < 0.5  # the mean of 16 numbers
    refused = continuous(check_scale=True)
    named = re.escape(", ".join(f"{value:.3g}" for value in found))
    for _ in range(2):  # the second time too
        with pytest.raises(ValueError, match=rf"have the deviations \[{named}\] at the 3 scales"):
            refused.data_of({"latents": latents}, random)
    with pytest.raises(ValueError, match="unit deviation"):
        continuous(check_scale=True, deviations=found).data_of({"latents": 4.3 * latents}, random)
    taken = continuous(check_scale=True, deviations=found)
    assert taken.data_of({"latents": latents}, random) is latents
    taken.data_of({"latents": 4.3 * latents}, random)  # the first batch alone


def test_bad_input_of_scales_of_vectors() -> None:
    with pytest.raises(ValueError, match="must end at the grid of the latents, 4 x 4"):
        continuous([1, 2, 3])
    with pytest.raises(ValueError, match="scales must be positive and grow"):
        VectorPyramid([1, 4, 2])
    with pytest.raises(ValueError, match="deviations must be above 0, one for each of 3 scales"):
        continuous(deviations=[1.0, 1.0])
    with pytest.raises(ValueError, match="the first 1 x 1"):
        continuous([2, 4])
    with pytest.raises(ValueError, match="has no likelihood of latents"):
        continuous().log_likelihood(*batch(4))
