"""Images in scales behind a text (VAR): the law of the class-conditional model, what sees what, both directions."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.exact_laws import all_sequences, chi_square_p_value, sequence_numbers
from helpers.random_weights import randomise
from helpers.segment_layouts import Words
from torch import Tensor

from discrete_lit.backbones import SequenceLayout, Transformer
from discrete_lit.backbones.segment_sequence import SegmentPart, SegmentSequence, assemble, pack
from discrete_lit.backbones.segment_transformer import SegmentTransformer
from discrete_lit.backbones.segments import Segment, SegmentLayout
from discrete_lit.core.random import CounterRandom
from discrete_lit.generators import NextScale, Unified
from discrete_lit.generators.segment_losses import scale_losses
from discrete_lit.samplers import DrawSettings, SegmentSampler
from discrete_lit.tokenizers import PixelLevels

SIZES = {"width": 24, "depth": 2, "heads": 2, "norm_epsilon": 1e-5}
EVERY_IMAGE = all_sequences(3, 5)


def image_of(label: int, **changes: Any) -> Segment:
    """Scales of one and four ids, behind a label; a sequence of their own for each label."""
    settings: dict[str, Any] = {
        "name": f"image{label}",
        "modality": "image",
        "shape": (4,),
        "input_dim": 3,
        "attention": "block_causal",
        "scales": (4,),
        "codes": 3,
        "begin_ids": (label,),
        "first": label > 0,
        **changes,
    }
    return Segment(**settings)


@pytest.fixture
def twins(make_next_scale: Callable[..., NextScale]) -> tuple[NextScale, SegmentTransformer]:
    """VAR given a class, and the same weights behind a text that is a label."""

    def backbone(layout: SequenceLayout) -> Transformer:
        switches: dict[str, Any] = {"norm": "rms", "mlp": "swiglu", "bias": False}
        return Transformer(layout, **SIZES, conditioning="prefix", positions="rope_1d", **switches)

    generator = make_next_scale(spread=0.5, backbone=backbone).double()
    network = SegmentTransformer(SegmentLayout(segments=(image_of(0), image_of(1))), **SIZES).double().eval()
    weights = generator.backbone.state_dict()
    renamed = {
        "table.weight": weights.pop("class_embedding.weight")[:2],
        "aligners.image.0.weight": weights.pop("token_embedding.project.weight"),
        "aligners.image.0.bias": weights.pop("token_embedding.project.bias"),
        "levels.image.table.weight": torch.zeros(1, 24),
        "scale_heads.image.weight": weights.pop("head.project.weight"),
        "head.weight": network.state_dict()["head.weight"],  # predicts no id here
    }
    network.load_state_dict({**weights, **renamed})
    return generator, network


def sequences_of(network: SegmentTransformer, generator: NextScale, tokens: Tensor, label: int) -> SegmentSequence:
    vectors = generator.scale_quantizer().teacher_forcing(tokens)
    return assemble(network.grammar, [SegmentPart(segment=f"image{label}", content=vectors)])


@torch.no_grad()
def test_a_text_that_is_a_label_gives_the_law_of_the_class(twins: tuple[NextScale, SegmentTransformer]) -> None:
    generator, network = twins
    for label in (0, 1):
        sequence = sequences_of(network, generator, EVERY_IMAGE, label)
        nats, owner = scale_losses(network, sequence, network(sequence), name=f"image{label}", ids=EVERY_IMAGE)
        expected = generator.log_likelihood(EVERY_IMAGE, torch.full((243,), label)).nats
        torch.testing.assert_close(-nats.sum(dim=1), expected, rtol=0, atol=1e-9)
        assert torch.equal(owner, torch.arange(243))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_images_are_drawn_as_those_of_the_class(twins: tuple[NextScale, SegmentTransformer], scale: float) -> None:
    """Given another class where guidance asks for nothing, token by token with the random numbers of either sampler."""
    generator, network = twins
    prompts = [torch.full((4000, 1), label) for label in (0, 1)]
    given = [
        SegmentSequence(ids=ids, states=network.grammar.states_of(f"image{number}")[:1].expand(4000, 1), sample=rows)
        for number, (ids, rows) in enumerate(zip(prompts, [torch.arange(4000)[:, None]] * 2, strict=True))
    ]
    sampler = SegmentSampler({"image0": DrawSettings(guidance_scale=scale)})
    output = sampler(
        network,
        given[: 1 if scale == 1 else 2],
        CounterRandom(3, torch.arange(4000)),
        segments=["image0"],
        quantizer=generator.scale_quantizer(),
    )
    laws = [generator.log_likelihood(EVERY_IMAGE, torch.full((243,), label)).nats.exp() for label in (0, 1)]
    law = laws[0]
    if scale != 1:
        law = _guided_law(network, generator, scale)
    assert chi_square_p_value(sequence_numbers(output.codes["image0"], 3), law) > 1e-3
    assert output.sequential_passes == 2 and output.network_calls == (2 if scale == 1 else 4)
    assert output.count_flops() > 0


@torch.no_grad()
def _guided_law(network: SegmentTransformer, generator: NextScale, scale: float) -> Tensor:
    logits = []
    for label in (0, 1):
        sequence = sequences_of(network, generator, EVERY_IMAGE, label)
        logits.append(network.predict_scales(network(sequence), segment=f"image{label}"))
    guided = (logits[1] + scale * (logits[0] - logits[1])).log_softmax(dim=-1)
    return guided.gather(2, EVERY_IMAGE[..., None])[..., 0].sum(dim=1).exp()


def test_a_place_sees_its_scale_and_those_before_and_no_other(make_next_scale: Callable[..., NextScale]) -> None:
    """By gradients, of two samples in one row: which vectors each of the states depends on."""
    layout = SegmentLayout(segments=(image_of(0, shape=(6,), scales=(2, 4)),))
    network = randomise(SegmentTransformer(layout, **SIZES), 0.3).double().eval()
    vectors = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    sequence = pack(
        assemble(network.grammar, [SegmentPart(segment="image0", content=vectors)]), 14, padding=network.grammar.done
    )
    hidden = network(sequence)[0]
    sees = torch.stack(
        [torch.autograd.grad(row.sum(), vectors, retain_graph=True)[0].abs().sum(dim=2) > 1e-12 for row in hidden]
    )
    expected = torch.zeros(14, 2, 6, dtype=torch.bool)
    for element in range(14):
        # The longer sample of equal ones comes first; an element of its own stands in front of each.
        sample, place = divmod(element, 7)
        expected[element, sample, : 0 if place == 0 else 2 if place < 3 else 6] = True
    assert torch.equal(sees, expected)


# --- In a Unified ---


@pytest.fixture
def unified(make_next_scale: Callable[..., NextScale]) -> Callable[..., Unified]:
    def make(**settings: Any) -> Unified:
        arguments: dict[str, Any] = {
            "tokenizer": make_next_scale().tokenizer,
            "image_size": 8,
            "text_tokenizer": Words(("black", "white")),
            "text_length": 4,
            "image_prediction": "scales",
            "backbone": lambda layout: SegmentTransformer(layout, **SIZES),
            **settings,
        }
        return randomise(Unified(**arguments), 0.4).double().eval()

    return make


@pytest.mark.parametrize("order", ["both", "text_first"])
def test_images_in_scales_follow_their_exact_law(unified: Callable[..., Unified], order: str) -> None:
    generator = unified(order=order)
    captions = generator.captions_of(["white black"] * 243)
    likelihood = generator.log_likelihood(EVERY_IMAGE, captions)
    assert likelihood.kind == "exact"
    torch.testing.assert_close(likelihood.nats.exp().sum().item(), 1.0)
    others = generator.log_likelihood(EVERY_IMAGE, generator.captions_of(["black"] * 243)).nats
    assert (likelihood.nats - others).abs().max() > 1e-3  # the caption is read
    drawn = generator.sample(generator.captions_of(["white black"] * 4000), seed=1)
    assert chi_square_p_value(sequence_numbers(drawn, 3), likelihood.nats.exp()) > 1e-3
    some = generator.sample(generator.captions_of(["white black"] * 3), seed=1, indices=torch.arange(50, 53))
    assert torch.equal(some, drawn[50:53])


def test_captions_of_images_in_scales_follow_their_exact_law(unified: Callable[..., Unified]) -> None:
    generator = unified()
    texts = [f"{a} {b}".strip() for a in ("black", "white") for b in ("", "black", "white")] + [""]
    images = EVERY_IMAGE[100:101]
    nats = generator.log_likelihood(images.expand(7, 5), generator.captions_of(texts), of="text").nats
    torch.testing.assert_close(nats.exp().sum().item(), 1.0)
    drawn = generator.caption(images.expand(3000, 5))
    found = torch.tensor([drawn.count(text) for text in texts]) / 3000
    assert (found - nats.exp()).abs().sum() < 0.09


def test_the_loss_in_scales_is_the_likelihood(unified: Callable[..., Unified]) -> None:
    generator = unified(order="text_first", image_weight=2.0, text_weight=0.0)
    captions = generator.captions_of(["white", "black white"])
    loss, terms = generator.loss(EVERY_IMAGE[[5, 77]], captions)
    expected = -generator.log_likelihood(EVERY_IMAGE[[5, 77]], captions).nats.mean() / 5
    torch.testing.assert_close(terms["loss_of/image"].double(), expected)
    torch.testing.assert_close(loss.double(), 2 * expected)
    (read,) = generator.step_passes
    assert read.rows == 2 and read.outputs >= 2 * 5 * 3 and generator.step_flops() > 0


def test_scales_that_do_not_fit_are_refused(
    unified: Callable[..., Unified], twins: tuple[NextScale, SegmentTransformer]
) -> None:
    with pytest.raises(ValueError, match="image_prediction='scales' predicts the scales of a MultiScaleResidualQuant"):
        unified(tokenizer=PixelLevels(2, image_channels=1), image_size=[1, 2])
    with pytest.raises(ValueError, match="have no ends of rows"):
        unified(image_format="rows")
    for changes in ({"begin_ids": ()}, {"codes": 0}, {"attention": "causal", "scales": ()}):
        with pytest.raises(ValueError, match="codes="):
            image_of(0, **changes)
    generator, network = twins
    grammar, rows = network.grammar, torch.zeros(1, 1, dtype=torch.int64)
    prompt = SegmentSequence(ids=rows, states=grammar.states_of("image0")[:1][None], sample=rows)
    other = generator.scale_quantizer()
    other.vocab_size = 7
    for quantizer in (None, other):
        with pytest.raises(ValueError, match="give the quantizer that makes these"):
            SegmentSampler()(
                network, [prompt], CounterRandom(0, torch.arange(1)), segments=["image0"], quantizer=quantizer
            )
