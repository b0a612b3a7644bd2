"""What generators of each family predict of given ids: costs against likelihoods and losses, attention by position."""

from functools import partial

import pytest
import torch
from helpers.random_weights import randomise
from helpers.segment_layouts import Words

from discrete_lit.backbones import Transformer
from discrete_lit.backbones.segment_transformer import SegmentTransformer
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import LogLinearSchedule, ScoreHead, UniformProcess
from discrete_lit.diffusion.losses import ContinuousBound, ScoreEntropy
from discrete_lit.generators import DiscreteDiffusion, Unified
from discrete_lit.generators.token_predictions import attention_of, map_shapes, predictions_of
from discrete_lit.tokenizers import PixelLevels

ORDER = (4, 2, 0, 5, 1, 3)
BACKBONE = partial(SegmentTransformer, width=24, depth=2, heads=2, head_dim=12)


def streams(count: int) -> CounterRandom:
    return CounterRandom(0, torch.arange(count))


@pytest.fixture
def make_diffusion(make_grid_tokenizer):
    def make(**settings):
        backbone = partial(Transformer, width=16, depth=2, heads=2, conditioning="adaln")
        generator = DiscreteDiffusion(make_grid_tokenizer(5, (2, 3)), 16, num_classes=2, backbone=backbone, **settings)
        return randomise(generator, 0.3).eval()

    return make


def unified(**settings) -> Unified:
    generator = Unified(
        PixelLevels(3, image_channels=1),
        [2, 2],
        text_tokenizer=Words(("black", "white", "2*2")),
        text_length=4,
        **{"backbone": BACKBONE, **settings},
    )
    return randomise(generator, 0.4).double().eval()


@pytest.mark.parametrize("order", ["raster", ORDER])
def test_costs_of_an_autoregressive_model_are_its_likelihood(make_generator, order) -> None:
    generator = make_generator("autoregressive", 5, (2, 3), spread=0.4, order=order)
    tokens, labels = torch.randint(5, (4, 2, 3)), torch.tensor([0, 1, 2, 0])
    found = predictions_of(generator, tokens, labels, streams(4))
    torch.testing.assert_close(-found.nats.double().sum(dim=1), generator.log_likelihood(tokens, labels).nats)
    sequences = generator.to_sequence(tokens)
    orders = generator.fixed_order.expand(4, -1) if order == ORDER else None
    laws = generator.backbone(sequences[:, :-1], labels, order=orders).softmax(dim=-1)
    in_order = found.entropy[:, list(ORDER)] if order == ORDER else found.entropy
    torch.testing.assert_close(in_order, torch.special.entr(laws).sum(dim=-1))
    coordinates = found.coordinate[0, list(ORDER)] if order == ORDER else found.coordinate[0]
    assert coordinates.diff().gt(0).all() and bool(found.predicted.all())


def test_costs_of_scales_are_the_likelihood(make_next_scale) -> None:
    generator = make_next_scale(spread=0.5)
    tokens, labels = torch.randint(3, (4, 5)), torch.tensor([0, 1, 2, 0])
    found = predictions_of(generator, tokens, labels, streams(4))
    torch.testing.assert_close(-found.nats.double().sum(dim=1), generator.log_likelihood(tokens, labels).nats)
    assert map_shapes(generator) == ((1, 1), (2, 2))
    assert 0 < float(found.entropy.min()) and float(found.entropy.max()) < torch.tensor(3.0).log()


@pytest.mark.parametrize("settings", [{}, {"bit_groups": 2, "backbone": {"token_embedding": "bits"}}])
def test_costs_of_masked_ids_are_the_loss(make_generator, settings) -> None:
    generator = make_generator("masked", 16, (2, 3), spread=0.4, **settings)
    tokens, labels = torch.randint(16, (6, 2, 3)), torch.arange(6) % 2
    found = predictions_of(generator, tokens, labels, streams(6))
    losses = generator.losses_of(tokens, labels, streams(6))
    torch.testing.assert_close(found.nats.sum(), (losses.values * losses.weights).sum())
    assert 6 <= int(found.predicted.sum()) < 36
    assert float(found.nats[~found.predicted].abs().max()) == 0 == float(found.entropy[~found.predicted].max())
    assert 0 < float(found.entropy[found.predicted].min())


def test_costs_of_a_head_of_sub_tokens(make_generator) -> None:
    from discrete_lit.backbones import FactorisedHead

    head = {"token_embedding": "parts", "place_head": partial(FactorisedHead, sizes=(2, 3))}
    generator = make_generator("autoregressive", 6, (2, 3), backbone=head)
    tokens, labels = torch.randint(6, (3, 2, 3)), torch.tensor([0, 1, 2])
    found = predictions_of(generator, tokens, labels, streams(3))
    assert found.entropy is None
    torch.testing.assert_close(-found.nats.double().sum(dim=1), generator.log_likelihood(tokens, labels).nats)


@pytest.mark.parametrize("kind", ["masks", "uniform", "scores"])
def test_predictions_of_discrete_diffusion(make_diffusion, kind) -> None:
    settings = {
        "masks": {},
        "uniform": {"process": UniformProcess, "loss": ContinuousBound()},
        "scores": {"head": ScoreHead(), "loss": ScoreEntropy(), "schedule": LogLinearSchedule()},
    }[kind]
    generator = make_diffusion(**settings)
    tokens, labels = torch.randint(5, (8, 2, 3)), torch.arange(8) % 2
    found = predictions_of(generator, tokens, labels, streams(8))
    assert bool(found.predicted.all()) == (kind == "uniform") and bool(found.predicted.any())
    entropy, nats = found.entropy[found.predicted], found.nats[found.predicted]
    assert 0 < float(entropy.min()) and float(entropy.max()) <= torch.tensor(5.0).log() + 1e-6
    if kind == "masks":  # the objective is the same cross-entropy, with a weight of each time
        losses = generator.losses_of(tokens, labels, streams(8))
        expected = (losses.values > 0).view(8, 6)
        assert torch.equal(found.predicted, expected)
        ratio = losses.values / found.nats
        assert bool(
            (
                ratio.nan_to_num(0).amax(dim=1, keepdim=True).expand_as(ratio)[expected] / ratio[expected] - 1 < 1e-4
            ).all()
        )
    assert bool((nats > 0).all())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_format": "rows", "order": "text_first"},
        {"null_text": "padding", "backbone": partial(BACKBONE, own_embeddings={"image": 4}, own_heads={"image": 8})},
    ],
)
def test_costs_in_a_sequence_of_segments_are_the_likelihood(settings) -> None:
    generator = unified(**{"order": "text_first", **settings})
    tokens, captions = torch.randint(3, (3, 2, 2)), generator.captions_of(["white", "black white", "white black"])
    found = predictions_of(generator, tokens, captions, streams(3))
    torch.testing.assert_close(-found.nats.double().sum(dim=1), generator.log_likelihood(tokens, captions).nats)


def test_costs_of_masked_segments_are_the_loss() -> None:
    generator = unified(image_prediction="masked", order="text_first")
    tokens, captions = torch.randint(3, (3, 2, 2)), generator.captions_of(["white", "black white", "white black"])
    found = predictions_of(generator, tokens, captions, streams(3))
    expected = generator.segment_losses(tokens, captions, streams(3))["image"].values
    torch.testing.assert_close(found.nats[found.predicted], expected)


def changed_weights(generator, tokens, condition, *, at: int, query: int) -> list[int]:
    """The positions whose weight in the first layer changes by another factor than the others', if one id changes."""
    other = tokens.clone()
    other.view(len(tokens), -1)[:, at] = (other.view(len(tokens), -1)[:, at] + 1) % 3
    before, after = (
        attention_of(generator, each, condition, streams(len(tokens)), layers=[0], queries=[query])[0][0, 0, 0]
        for each in (tokens, other)
    )
    assert before.ndim == 1 and float(before.sum()) <= 1 + 1e-6
    seen = before > 0
    factor = (after / before)[seen]
    return seen.nonzero()[(factor / factor.median() - 1).abs() > 1e-4][:, 0].tolist()


@pytest.mark.parametrize("order", ["raster", ORDER])
def test_attention_is_laid_out_by_position(make_generator, order) -> None:
    generator = make_generator("autoregressive", 3, (2, 3), spread=0.5, order=order)
    tokens, labels = torch.randint(3, (1, 2, 3)), torch.tensor([1])
    places = list(range(6)) if order == "raster" else list(ORDER)
    query = places[4]
    for at in places[:3]:
        assert changed_weights(generator, tokens, labels, at=at, query=query) == [at]
    weights = attention_of(generator, tokens, labels, streams(1), layers=[0, 1], queries=[query, places[0]])
    assert set(weights) == {0, 1} and weights[1].shape == (1, 2, 2, 6)
    assert (weights[0][0, 0, 0] > 0).nonzero()[:, 0].tolist() == sorted(places[:4])
    assert float(weights[0][0, :, 1].max()) == 0  # the first position is predicted from the class alone


def test_attention_of_segments_is_laid_out_by_position() -> None:
    generator = unified(order="text_first")
    tokens, captions = torch.randint(3, (1, 2, 2)), generator.captions_of(["black white"])
    assert changed_weights(generator, tokens, captions, at=1, query=3) == [1]


def test_attention_of_a_masked_model_sees_all(make_generator) -> None:
    generator = make_generator("masked", 3, (2, 3), spread=0.4, backbone={"registers": 2})
    tokens, labels = torch.randint(3, (2, 2, 3)), torch.tensor([0, 1])
    weights = attention_of(generator, tokens, labels, streams(2), layers=[1], queries=[0, 5])[1]
    with torch.no_grad():
        rest = 1 - weights.sum(dim=-1)  # two registers and the class
    assert weights.shape == (2, 2, 2, 6) and float(weights.min()) > 0 and 0 < float(rest.min()) < 1
