"""Text and image in one sequence: exact likelihoods, losses by segment, both directions, and what is refused."""

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_weights import randomise
from helpers.segment_layouts import Words
from lightning import Trainer
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from discrete_lit.backbones.segment_transformer import SegmentTransformer
from discrete_lit.backbones.vision_encoder import VisionEncoder
from discrete_lit.checkpoints import instantiate, load, save
from discrete_lit.core.random import CounterRandom
from discrete_lit.diffusion import CosineSchedule
from discrete_lit.generators.published_layout import Vocabulary
from discrete_lit.generators.segment_losses import id_losses
from discrete_lit.generators.text_and_image import CaptionIds
from discrete_lit.generators.unified import Unified
from discrete_lit.samplers.draw_settings import DrawSettings
from discrete_lit.samplers.islands import MaskedSteps
from discrete_lit.samplers.segment_by_segment import SegmentSampler
from discrete_lit.tokenizers import PixelLevels, RawPixels, TextTokenizer

WORDS = ("black", "white")
CHANNELS = {"image_channels": 1}
BACKBONE = partial(SegmentTransformer, width=24, depth=1, heads=2, head_dim=12)


def unified(spread: float | None = 0.4, **settings: Any) -> Unified:
    """One row of two grey pixels of two levels, and captions of at most two words."""
    arguments: dict[str, Any] = {
        "tokenizer": PixelLevels(2, image_channels=1),
        "image_size": [1, 2],
        "text_tokenizer": Words(WORDS),
        "text_length": 4,
        "backbone": BACKBONE,
        **settings,
    }
    generator = Unified(**arguments)
    return (generator if spread is None else randomise(generator, spread)).double().eval()


def masked(**settings: Any) -> Unified:
    return unified(image_prediction="masked", **settings)


def continuous(**settings: Any) -> Unified:
    return unified(tokenizer=RawPixels(1), image_size=[2, 2], **settings)


EVERY_IMAGE = torch.tensor(list(product(range(2), repeat=2))).view(4, 1, 2)
EVERY_TEXT = [" ".join(words) for count in range(3) for words in product(WORDS, repeat=count)]
DISCRETE: dict[str, dict[str, Any]] = {
    "chameleon": {"softmax_over": "vocabulary", "z_loss": 1e-5},
    "janus": {
        "null_text": "padding",
        "backbone": partial(BACKBONE, own_embeddings={"image": 4}, own_heads={"image": 8}, aligner_layers=2),
    },
    "emu3": {"image_format": "rows", "order": "text_first", "text_tokenizer": Words((*WORDS, "1*2"))},
    "axial": {"positions": "axial"},
}


@pytest.mark.parametrize("preset", DISCRETE)
def test_probabilities_of_all_images_sum_to_one(preset: str) -> None:
    generator = unified(**DISCRETE[preset])
    captions = generator.captions_of(["white black"] * 4)
    likelihood = generator.log_likelihood(EVERY_IMAGE, captions)
    assert likelihood.kind == "exact"
    torch.testing.assert_close(likelihood.nats.exp().sum().item(), 1.0)
    others = generator.log_likelihood(EVERY_IMAGE, generator.captions_of(["black"] * 4)).nats
    assert (likelihood.nats - others).abs().max() > 1e-3  # the caption is read


@pytest.mark.parametrize("preset", ["chameleon", "janus", "axial"])
def test_probabilities_of_all_texts_sum_to_one(preset: str) -> None:
    generator = unified(**DISCRETE[preset])
    captions = generator.captions_of(EVERY_TEXT)
    nats = generator.log_likelihood(torch.tensor([[[0, 1]]]).expand(7, 1, 2), captions, of="text").nats
    torch.testing.assert_close(nats.exp().sum().item(), 1.0)


@pytest.mark.parametrize("preset", ["janus", "emu3"])
def test_images_are_drawn_by_their_probabilities(preset: str) -> None:
    generator = unified(**DISCRETE[preset])
    expected = generator.log_likelihood(EVERY_IMAGE, generator.captions_of(["white"] * 4)).nats.exp()
    drawn = generator.sample(generator.captions_of(["white"] * 4000))
    found = (2 * drawn[:, 0, 0] + drawn[:, 0, 1]).bincount(minlength=4) / 4000
    assert (found - expected).abs().sum() < 0.06


def test_texts_are_drawn_by_their_probabilities() -> None:
    generator = unified()
    image = torch.tensor([[[0, 1]]])
    captions = generator.captions_of(EVERY_TEXT)
    expected = generator.log_likelihood(image.expand(7, 1, 2), captions, of="text").nats.exp()
    drawn = generator.caption(image.expand(4000, 1, 2))
    found = torch.tensor([drawn.count(text) for text in EVERY_TEXT]) / 4000
    assert (found - expected).abs().sum() < 0.08


def test_a_frozen_vision_encoder_stays_in_eval_mode() -> None:
    """Its features would change with dropout, and a training of what reads them with it."""
    encoder = VisionEncoder(8, 1, heads=2, image_size=4, patch_size=2)
    encoder.blocks.append(torch.nn.Dropout(0.5))
    vocabulary = Vocabulary(size=9, image_first=5, image_begin=7, features=(encoder.places, encoder.width))
    generator = unified(vision=encoder, vocabulary=vocabulary).train()
    assert generator.training and generator.backbone.training and generator.vision is not None
    assert not any(module.training for module in generator.vision.modules())
    assert not any(parameter.requires_grad for parameter in generator.vision.parameters())
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    assert torch.equal(generator.vision(images), generator.vision(images))


def batch_of(generator: Unified, count: int = 8) -> tuple[Tensor, CaptionIds]:
    captions = generator.captions_of([EVERY_TEXT[number % 7] for number in range(count)])
    if generator.patches is None:
        return torch.randint(0, 2, (count, *generator.token_shape)), captions
    return torch.randn(count, *generator.latent_shape, dtype=torch.float64), captions


def test_the_loss_is_the_mean_cross_entropy_of_what_may_vary() -> None:
    """By the likelihoods of both parts: nats of the image's ids, and of the text's ids and its end."""
    generator = unified(order="text_first", text_weight=0.25, image_weight=2.0)
    images, captions = batch_of(generator)
    loss, terms = generator.loss(images, captions)
    nats = -generator.log_likelihood(images, captions).nats.sum()
    torch.testing.assert_close(terms["loss_of/image"].double(), nats / 16)
    text = terms["loss_of/text"].double()
    # A text of two words has no choice but to end.
    count = int((captions.lengths + (captions.lengths < 2)).sum())
    torch.testing.assert_close(loss.double(), (0.25 * count * text + 2 * nats) / (0.25 * count + 2 * 16))


def test_the_softmax_over_the_vocabulary_counts_what_may_not_stand_there() -> None:
    chameleon, restricted = (unified(softmax_over=over) for over in ("vocabulary", "allowed"))
    restricted.load_state_dict(chameleon.state_dict())
    images, captions = batch_of(chameleon)
    assert chameleon.loss(images, captions)[0] > restricted.loss(images, captions)[0]
    torch.testing.assert_close(
        chameleon.log_likelihood(images, captions).nats, restricted.log_likelihood(images, captions).nats
    )


def test_the_z_loss_is_the_mean_squared_log_partition() -> None:
    plain, with_z = unified(order="text_first"), unified(order="text_first", z_loss=0.1)
    with_z.load_state_dict(plain.state_dict())
    images, captions = batch_of(plain)
    sequence = plain.sequences(images, captions)
    hidden, grammar = plain.backbone(sequence)[:, :-1], plain.grammar
    states, follows = sequence.states[:, 1:], sequence.sample[:, 1:] >= 0
    squares = [
        plain.backbone.logits(hidden[follows & (grammar.set_of[states] == number)], number).logsumexp(dim=-1) ** 2
        for number, (_, ids) in enumerate(grammar.sets)
        if len(ids) > 1
    ]
    expected = torch.cat(squares).mean()
    total, terms = with_z.loss(images, captions)
    torch.testing.assert_close(terms["z_loss"], expected)
    torch.testing.assert_close(total, plain.loss(images, captions)[0] + 0.1 * expected)


@pytest.mark.parametrize(
    "make",
    [*(partial(unified, **settings) for settings in DISCRETE.values()), masked, continuous],
    ids=[*DISCRETE, "showo", "transfusion"],
)
def test_packing_changes_no_loss(make: Callable[..., Unified]) -> None:
    alone, packed = make(), make(packed_length=40)
    packed.load_state_dict(alone.state_dict())
    images, captions = batch_of(alone)
    dropped = torch.arange(8) % 3 == 0
    alone.train(), packed.train()
    (expected, terms), (found, others) = (each.loss(images, captions, dropped=dropped) for each in (alone, packed))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(others, terms)


def test_the_caption_of_a_dropped_sample_is_neither_read_nor_scored() -> None:
    generator = unified(order="text_first")
    images, captions = batch_of(generator, 4)
    other = CaptionIds(captions.ids.flip(0), captions.lengths.flip(0))
    everywhere = torch.ones(4, dtype=torch.bool)
    losses = [
        generator.segment_losses(images, each, CounterRandom(0, torch.arange(4)), dropped=everywhere)
        for each in (captions, other)
    ]
    torch.testing.assert_close(losses[0]["image"].values, losses[1]["image"].values)
    assert len(losses[0]["text"].values) == 0


def test_the_flow_loss_is_the_error_of_the_velocity() -> None:
    """Transfusion: noisy latents are an island, its error beside the cross-entropy of the text."""
    generator = continuous(order="text_first", image_weight=5.0)
    latents, captions = batch_of(generator)
    random = CounterRandom(3, torch.arange(8))
    losses = generator.segment_losses(latents, captions, random)
    from discrete_lit.core.random import Purpose

    t = random.uniform(Purpose.DIFFUSION_TIME, 1)[:, 0]
    noise = random.normal(Purpose.DIFFUSION_NOISE, 4).view_as(latents)
    noisy = (1 - t)[:, None, None, None] * latents + t[:, None, None, None] * noise
    sequence = generator.sequences(noisy, captions, times=t)
    inside = generator.grammar.is_vector[sequence.states]
    output = generator.backbone.predict_vectors(generator.backbone(sequence)[inside], segment="image").view(8, -1)
    expected = F.mse_loss(output, (noise - latents).flatten(1), reduction="none").mean(dim=1)
    torch.testing.assert_close(losses["image"].values.double(), expected, rtol=1e-5, atol=1e-6)
    loss, terms = generator.loss(latents, captions, random)
    torch.testing.assert_close(loss, (terms["loss_of/text"] + 5 * terms["loss_of/image"]).to(loss.dtype))


def test_a_batch_of_dropped_captions_trains_the_latents_alone() -> None:
    generator = continuous(order="text_first", image_weight=5.0)
    latents, captions = batch_of(generator)
    loss, terms = generator.loss(latents, captions, dropped=torch.ones(8, dtype=torch.bool))
    torch.testing.assert_close(loss, 5 * terms["loss_of/image"].to(loss.dtype))
    assert terms["loss_of/text"] == 0


def test_latents_in_front_of_their_caption_are_not_very_noisy() -> None:
    generator = continuous(image_first=1.0, caption_noise=0.25)
    latents, _ = batch_of(generator, 64)
    flow = generator._noised(latents, torch.ones(64, dtype=torch.bool), CounterRandom(0, torch.arange(64)))
    assert 0.2 < flow.t.max() <= 0.25


@pytest.mark.parametrize(
    "make, steps",
    [
        pytest.param(unified, 100, id="ids"),
        pytest.param(masked, 200, id="masked"),
        pytest.param(continuous, 400, id="latents", marks=pytest.mark.slow),
    ],
)
def test_both_directions_are_learned_by_one_model(make: Callable[..., Unified], steps: int) -> None:
    """A caption names the left and the right half of its image: images of captions, and captions of images."""
    generator = make(spread=None, backbone=partial(SegmentTransformer, width=32, depth=2, heads=2)).float().train()
    optimizer = torch.optim.AdamW(generator.backbone.parameters(), lr=5e-3)
    for step in range(steps):
        bright = torch.rand(32, 2) < 0.5
        texts = [f"{WORDS[left]} {WORDS[right]}" for left, right in bright.long().tolist()]
        pixels = bright[:, None].expand(32, 1 if generator.patches is None else 2, 2)
        data = pixels.long() if generator.patches is None else 2 * pixels[:, None].float() - 1
        random = CounterRandom(0, 32 * step + torch.arange(32))
        optimizer.zero_grad()
        generator.loss(data, generator.captions_of(texts), random)[0].backward()
        optimizer.step()
    generator.eval()
    texts = ["black black", "black white", "white black", "white white"]
    drawn = generator.sample(generator.captions_of(texts))
    bright = drawn[:, 0] > 0 if generator.patches is None else drawn[:, 0, 0] > 0
    assert bright.tolist() == [[False, False], [False, True], [True, False], [True, True]]
    assert generator.caption(drawn) == texts


def test_guidance_reads_the_null_caption() -> None:
    generator = unified()
    texts = generator.captions_of(["white"] * 3)
    sampler = SegmentSampler({"image": DrawSettings(guidance_scale=0.0)})
    unconditional = generator.sample(generator.captions_of([""] * 3))
    assert torch.equal(generator.sample(texts, sampler), unconditional)
    padded = unified(null_text="padding")
    assert padded.null_captions(texts).ids.eq(0).all() and torch.equal(
        padded.null_captions(texts).lengths, texts.lengths
    )


# --- Masked images ---


def test_the_masked_loss_is_the_cross_entropy_of_what_stands_behind_the_masks() -> None:
    """Show-o: predicted at its own position, where both sides of the image are seen, and averaged apart."""
    generator = masked(order="text_first", image_weight=2.0)
    images, captions = batch_of(generator)
    random = CounterRandom(3, torch.arange(8))
    hidden_ids = generator._masked(torch.zeros(8, dtype=torch.bool), random)
    assert hidden_ids.any(dim=1).all() and not hidden_ids.all()
    sequence = generator.sequences(images, captions, masked=hidden_ids)
    inside = generator._inside(sequence, "image")
    logits = generator.backbone.logits(generator.backbone(sequence)[inside])[:, list(generator.image.ids)].view(8, 2, 2)
    costs = F.cross_entropy(logits.movedim(-1, 1), images.flatten(1), reduction="none")
    loss, terms = generator.loss(images, captions, random)
    torch.testing.assert_close(terms["loss_of/image"].double(), costs[hidden_ids].mean())
    torch.testing.assert_close(loss, (terms["loss_of/text"] + 2 * terms["loss_of/image"]).to(loss.dtype))
    # What stands behind a mask is not seen.
    other = generator.sequences(torch.where(hidden_ids.view(8, 1, 2), 1 - images, images), captions, masked=hidden_ids)
    assert torch.equal(sequence.ids, other.ids)


def test_an_image_in_front_of_its_caption_has_no_masks() -> None:
    generator = masked()
    first = torch.arange(64) < 32
    hidden_ids = generator._masked(first, CounterRandom(0, torch.arange(64)))
    assert not hidden_ids[first].any() and hidden_ids[~first].any(dim=1).all()


def test_masked_ids_are_drawn_by_the_networks_law() -> None:
    """In one step each by its own law given masks alone; in two the second knows the first. No mask is left."""
    generator = masked(order="text_first")
    captions = generator.captions_of(["white"] * 4000)
    everywhere = torch.ones(1, 2, dtype=torch.bool)
    one = generator.captions_of(["white"])
    sequence = generator.sequences(EVERY_IMAGE[:1], one, masked=everywhere)
    number = generator.grammar.masked_set("image")
    hidden = generator.backbone(sequence)[generator._inside(sequence, "image")]
    law = generator.backbone.logits(hidden, number).softmax(dim=-1)  # (2, K)
    expected = (law[0][:, None] * law[1]).flatten()
    output = generator.draw(captions, CounterRandom(0, torch.arange(4000)), SegmentSampler(masked=MaskedSteps(steps=1)))
    found = (2 * output.tokens[:, 0, 0] + output.tokens[:, 0, 1]).bincount(minlength=4) / 4000
    assert (found - expected).abs().sum() < 0.06
    assert output.sequential_passes == 3  # the prompt, the image's begin, the masks
    # Noise alone orders them: either is drawn first, and the other given it.
    both = torch.zeros(4, dtype=torch.float64)
    for place in range(2):
        for image in EVERY_IMAGE:
            known = torch.arange(2)[None] == place
            given = generator.sequences(image[None], one, masked=~known)
            hidden = generator.backbone(given)[generator._inside(given, "image")]
            after = generator.backbone.logits(hidden, number).softmax(dim=-1)[1 - place]
            index = int(2 * image[0, 0] + image[0, 1])
            both[index] += 0.5 * law[place][image[0, place]] * after[image[0, 1 - place]]
    steps = SegmentSampler(masked=MaskedSteps(steps=2, choice_temperature=1e9))
    drawn = generator.sample(captions, steps)
    found = (2 * drawn[:, 0, 0] + drawn[:, 0, 1]).bincount(minlength=4) / 4000
    assert (found - both).abs().sum() < 0.06


# --- Thoughts ---


def thinking(**settings: Any) -> Unified:
    """A model whose captions are "black=white", say: a word that is asked, and one that is thought."""
    return unified(**{"order": "text_first", "thought_length": 4, **settings})


def test_a_thought_is_drawn_by_its_probabilities_and_shown() -> None:
    """Of each of the seven thoughts of at most two words, by the likelihood that a sequence with it has."""
    generator = thinking()
    asked = generator.captions_of(["white"] * 7, thoughts=EVERY_TEXT)
    sequence = generator.sequences(torch.tensor([[[0, 1]]]).expand(7, 1, 2), asked)
    owners: list[tuple[str, Tensor]] = []
    losses = id_losses(
        generator.backbone, sequence, generator.backbone(sequence), softmax_over="allowed", owners=owners
    )["thought"]
    owner = torch.cat([each for name, each in owners if name == "thought"])
    expected = torch.zeros(7, dtype=torch.float64).index_add(0, owner, -losses.values).exp()
    torch.testing.assert_close(expected.sum().item(), 1.0)
    thoughts = generator.think(generator.captions_of(["white"] * 4000))
    found = torch.tensor([thoughts.count(text) for text in EVERY_TEXT]) / 4000
    assert (found - expected).abs().sum() < 0.08


@pytest.mark.parametrize("make", [thinking, partial(thinking, tokenizer=RawPixels(1), image_size=[2, 2])])
@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_picture_is_the_same_after_its_thought_drawn_or_given(make: Callable[..., Unified], scale: float) -> None:
    generator, sampler = make(), SegmentSampler({"image": DrawSettings(guidance_scale=scale)})
    prompts = ["black", "white", "", "black white"] * 3
    random = CounterRandom(5, torch.arange(12))
    drawn = generator.draw(generator.captions_of(prompts), random, sampler)
    assert drawn.thoughts is not None
    thoughts = generator.texts_of(drawn.thoughts)
    assert thoughts == generator.think(generator.captions_of(prompts), sampler, seed=5) and len(set(thoughts)) > 2
    given = generator.draw(generator.captions_of(prompts, thoughts=thoughts), random, sampler)
    torch.testing.assert_close(given.tokens, drawn.tokens)
    assert given.network_calls < drawn.network_calls and given.flops < drawn.flops
    others = ["white" if text != "white" else "black" for text in thoughts]
    assert not torch.equal(
        generator.sample(generator.captions_of(prompts, thoughts=others), sampler, seed=5), drawn.tokens
    )


def test_the_image_is_learned_through_its_thought() -> None:
    """The thought says which pixel is bright, and the caption nothing."""
    generator = thinking(spread=None, backbone=partial(SegmentTransformer, width=32, depth=2, heads=2)).float().train()
    optimizer = torch.optim.AdamW(generator.backbone.parameters(), lr=5e-3)
    for step in range(60):
        bright = torch.randint(0, 2, (32,))
        batch = {"tokens": F.one_hot(bright, 2)[:, None], "caption": [f"black={WORDS[number]}" for number in bright]}
        random = CounterRandom(0, 32 * step + torch.arange(32))
        optimizer.zero_grad()
        generator.loss(generator.data_of(batch, random), generator.condition_of(batch, random), random)[0].backward()
        optimizer.step()
    generator.eval()
    thoughts = ["black", "white"] * 8
    drawn = generator.sample(generator.captions_of(["black"] * 16, thoughts=thoughts))
    assert drawn[:, 0].argmax(dim=1).tolist() == [0, 1] * 8
    assert set(generator.think(generator.captions_of(["black"] * 40))) == {"black", "white"}


def test_a_dropped_caption_takes_its_thought_along() -> None:
    generator = thinking(text_weight=0.0)
    images, _ = batch_of(generator, 4)
    losses = [
        generator.segment_losses(
            images,
            generator.captions_of(["black"] * 4, thoughts=[thought] * 4),
            CounterRandom(0, torch.arange(4)),
            dropped=torch.ones(4, dtype=torch.bool),
        )
        for thought in ("black", "white white")
    ]
    torch.testing.assert_close(losses[0]["image"].values, losses[1]["image"].values)
    assert len(losses[0]["text"].values) == len(losses[0]["thought"].values) == 0


def test_a_prompt_without_weight_is_logged_and_does_not_train() -> None:
    generator = thinking(text_weight=0.0)
    images, _ = batch_of(generator, 4)
    captions = generator.captions_of(["black"] * 4, thoughts=["white"] * 4)
    loss, terms = generator.loss(images, captions)
    counts = {"thought": 8, "image": 8}
    expected = torch.stack([counts[name] * terms[f"loss_of/{name}"] for name in counts]).sum() / 16
    torch.testing.assert_close(loss, expected.to(loss.dtype))
    assert terms["loss_of/text"] > 0


def test_guidance_leads_away_from_a_negative_text() -> None:
    generator = unified()
    sampler = SegmentSampler({"image": DrawSettings(guidance_scale=0.0)})
    away = generator.condition_of_texts(["white"] * 8, negative=["black"] * 8)
    black = generator.condition_of_texts(["black"] * 8)
    assert torch.equal(generator.sample(away, sampler), generator.sample(black))
    assert not torch.equal(
        generator.sample(generator.condition_of_texts(["white"] * 8), sampler), generator.sample(black)
    )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: unified(thought_length=4), "set order='text_first'"),
        (lambda: thinking(thought_length=2), "thought_length=2 leaves no room"),
        (lambda: unified().captions_of(["black"], thoughts=["white"]), "trained without a thought_length"),
        (lambda: thinking().captions_of(["black"], thoughts=["white"] * 2), "1 texts and 2 thoughts"),
        (lambda: thinking().captions_of(["black"], thoughts=["white " * 3]), "model.init_args.thought_length"),
        (lambda: unified().captions_of(["white " * 3]), "model.init_args.text_length"),
        (lambda: thinking().condition_of_texts(["black=white"]), "give the thought by itself"),
        (lambda: unified().think(unified().captions_of(["black"])), "has no thoughts"),
        (
            lambda: thinking().sample(
                thinking().captions_of(["black"]), SegmentSampler({"thought": DrawSettings(guidance_scale=2)})
            ),
            "thoughts are drawn without guidance",
        ),
    ],
)  # fmt: skip
def test_thoughts_that_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_training_needs_the_thought_of_each_caption() -> None:
    generator, random = thinking(), CounterRandom(0, torch.arange(4))
    for batch, message in (
        ({"tokens": EVERY_IMAGE, "caption": ["black=white"] * 3 + ["white"]}, "caption 'white' has no thought"),
        ({"tokens": EVERY_IMAGE, "caption": torch.ones(4, 2), "caption_length": torch.ones(4)}, "thoughts reads texts"),
    ):
        with pytest.raises(ValueError, match=message):
            generator.condition_of(batch, random)


def test_the_operations_of_a_draw_are_counted() -> None:
    """As torch counts them, but for what stands outside the blocks and the logits."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    generator = unified().float()
    sequence = generator.sequences(EVERY_IMAGE[:1], generator.captions_of(["black white"]))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        generator.backbone(sequence)
    elements = sequence.ids.shape[1]
    assert counter.get_total_flops() == generator.backbone.flops(elements, elements)
    drawn = generator.draw(generator.captions_of(["black"]), CounterRandom(0, torch.zeros(1, dtype=torch.int64)))
    # The prompt has a begin, a word and the image's begin; each pixel's logits are of two ids.
    flops = generator.backbone.flops
    assert drawn.flops == flops(3, 3) + flops(1, 4) + 2 * 2 * 2 * generator.backbone.width


# --- Training, and from a configuration ---


def configured(**settings: Any) -> Unified:
    text_tokenizer = TextTokenizer.characters("abw")
    arguments = {
        "tokenizer": {"class_path": "discrete_lit.tokenizers.PixelLevels", "init_args": {"levels": 2, **CHANNELS}},
        "image_size": [1, 2],
        "text_tokenizer": text_tokenizer.config(),
        "text_length": 6,
        "backbone": {
            "class_path": "discrete_lit.backbones.SegmentTransformer",
            "init_args": {"width": 16, "depth": 1, "heads": 2, "own_embeddings": {"image": 4}},
        },
        "sampler": {
            "class_path": "discrete_lit.samplers.SegmentSampler",
            "init_args": {"settings": {"image": {"temperature": 0.9, "guidance_scale": 2.0}}},
        },
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        **settings,
    }
    made = instantiate({"class_path": "discrete_lit.generators.Unified", "init_args": arguments}, Unified)
    assert isinstance(made, Unified)
    return made


def test_a_checkpoint_alone_gives_the_model_back(tmp_path: Path) -> None:
    generator = randomise(configured(), 0.5)
    save(generator, tmp_path / "unified.ckpt")
    loaded: Any = load(tmp_path / "unified.ckpt")
    captions = generator.captions_of(["ab", "", "wwww"] * 5)
    assert torch.equal(loaded.sample(captions, seed=3), generator.eval().sample(captions, seed=3))
    images = torch.randint(0, 2, (15, 1, 2))
    assert loaded.caption(images) == generator.caption(images)


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training", "ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
@pytest.mark.parametrize("packed_length", [None, 32])
def test_training_logs_the_loss_of_each_segment(tmp_path: Path, packed_length: int | None) -> None:
    generator = configured(packed_length=packed_length, z_loss=1e-4)
    samples = [{"image": torch.rand(1, 1, 2) * 2 - 1, "caption": "ab"[: number % 3]} for number in range(8)]
    loader: Any = DataLoader(samples, batch_size=4)  # type: ignore[arg-type]
    trainer = Trainer(
        max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False, default_root_dir=tmp_path
    )
    before = generator.backbone.table.weight.detach().clone()
    trainer.fit(generator, loader, loader)
    logged = trainer.callback_metrics
    for name in ("loss", "loss_of/text", "loss_of/image"):
        assert logged[f"train/{name}"] > 0 and logged[f"validation/{name}"] > 0
    assert not torch.equal(generator.backbone.table.weight, before)
    images = torch.cat(trainer.predict(generator, loader))  # type: ignore[arg-type]
    assert images.shape == (8, 1, 1, 2) and set(images.flatten().tolist()) <= {-1.0, 1.0}


def test_the_example_of_the_page_runs() -> None:
    page = Path(__file__).resolve().parents[2] / "docs" / "text_and_image.md"
    code = page.read_text().partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["drawn"].shape == (2, 2, 2) and names["kind"] == "exact"
    assert [type(text) for text in names["texts"]] == [str, str]
    assert set(names["terms"]) == {"loss_of/text", "loss_of/image"}


# --- Bad input ---


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"order": "image_first"}, "order must be one of both, text_first"),
        ({"text_length": 2}, "leaves no room for a text"),
        ({"image_first": 1.5}, "must lie in"),
        ({"packed_length": 5}, "shorter than the longest sample, of 8 elements"),
        ({"patch_size": 2}, "is of latents"),
        ({"mask_schedule": CosineSchedule()}, "mask_schedule is of image_prediction='masked'"),
        ({"image_prediction": "masked", "image_format": "rows"}, "have no ends of rows"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unified(**settings)


@pytest.mark.parametrize(
    "batch, message",
    [
        ({"tokens": EVERY_IMAGE}, 'and no "caption"'),
        ({"tokens": EVERY_IMAGE, "caption": ["black"]}, "4 images and 1 captions"),
        ({"tokens": EVERY_IMAGE, "caption": torch.ones(4, 2).long()}, 'give "caption_length"'),
        ({"tokens": EVERY_IMAGE, "caption": ["black " * 4] * 4}, "6 ids, the length is 4"),
        (
            {"tokens": EVERY_IMAGE, "caption": torch.full((4, 5), 3), "caption_length": torch.full((4,), 5)},
            "a caption has 7 ids with its begin and end, its segment holds 4",
        ),
        (
            {"tokens": EVERY_IMAGE, "caption": torch.full((4, 2), 5), "caption_length": torch.full((4,), 2)},
            "caption 0 has the id 5 inside, .*images have ids of their own",
        ),
        ({"caption": ["black"] * 4, "label": torch.zeros(4)}, 'needs "image" or "tokens"'),
        ({"tokens": EVERY_IMAGE.float(), "caption": ["black"] * 4}, "models ids"),
        ({"tokens": EVERY_IMAGE.view(4, 2, 1), "caption": ["black"] * 4}, r"models ids \(1, 2\)"),
    ],
)
def test_batches_that_do_not_fit_are_refused(batch: dict[str, Any], message: str) -> None:
    generator, random = unified(), CounterRandom(0, torch.arange(4))
    with pytest.raises(ValueError, match=message):
        generator.data_of(batch, random)
        generator.condition_of(batch, random)


def test_what_was_not_learned_is_not_drawn() -> None:
    guided = SegmentSampler({"image": DrawSettings(guidance_scale=2), "text": DrawSettings(guidance_scale=2)})
    generator = unified(label_dropout=0.0)
    with pytest.raises(ValueError, match="learned to do without captions"):
        generator.sample(generator.captions_of(["black"]), guided)
    with pytest.raises(ValueError, match="drawn without guidance"):
        generator.caption(EVERY_IMAGE, guided)
    with pytest.raises(ValueError, match="order='both'"):
        unified(order="text_first").caption(EVERY_IMAGE)
    with pytest.raises(ValueError, match="given beside the text"):
        unified().sample(
            generator.captions_of(["black"]), SegmentSampler({"image": DrawSettings(image_guidance_scale=2)})
        )
    with pytest.raises(ValueError, match="of='image'"):
        latents, captions = batch_of(continuous())
        continuous().log_likelihood(latents, captions)
    with pytest.raises(ValueError, match="predicted one after another"):
        masked().log_likelihood(*batch_of(masked()))
    with pytest.raises(ValueError, match="steps must be at least 1"):
        MaskedSteps(steps=0)


@pytest.mark.parametrize(
    "make",
    [unified, partial(unified, softmax_over="vocabulary"), masked, continuous],
    ids=["ids", "vocabulary", "masked", "latents"],
)
def test_the_operations_of_a_step_are_counted(make: Callable[..., Unified]) -> None:
    """Against torch's counter, which knows the backward pass of attention better."""
    generator = make(backbone=partial(SegmentTransformer, width=64, depth=2, heads=2), order="text_first").train()
    assert generator.step_flops() == 0
    images, captions = batch_of(generator)
    with FlopCounterMode(display=False) as counter:
        generator.loss(images, captions)[0].backward()
    assert generator.step_flops() == pytest.approx(counter.get_total_flops(), rel=0.05)
