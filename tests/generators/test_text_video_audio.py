"""VideoPoet's sequence: what stands where, who sees whom, which losses count, exact likelihoods, and draws by them."""

from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.random_weights import randomise
from helpers.segment_layouts import Words
from lightning import Trainer
from torch.utils.flop_counter import FlopCounterMode

from discrete_lit.backbones.segment_sequence import seen_by
from discrete_lit.backbones.segment_transformer import SegmentTransformer
from discrete_lit.checkpoints import instantiate, load, save, save_pretrained
from discrete_lit.core.random import CounterRandom
from discrete_lit.data.paired_token_arrays import PairedTokenArrays
from discrete_lit.data.token_arrays import TokenWriter
from discrete_lit.generators.text_video_audio import RESERVED_IDS, SPECIAL, TextVideoAudio, VideoAndAudio
from discrete_lit.samplers.draw_settings import DrawSettings
from discrete_lit.samplers.segment_by_segment import SegmentSampler
from discrete_lit.tokenizers import TextTokenizer
from discrete_lit.tokenizers.tokenizer import TokenGrid

WORDS = ("dark", "bright")
BACKBONE = partial(SegmentTransformer, width=24, depth=2, heads=2, head_dim=12)
VIDEO, AUDIO = (2, 1, 1), (1, 2)


def generator(**settings: Any) -> TextVideoAudio:
    """Clips of two ids of two, sounds of one frame of two books of two ids, texts of at most two words."""
    arguments: dict[str, Any] = {
        "tokenizer": TokenGrid(2, VIDEO),
        "audio_tokenizer": TokenGrid(2, AUDIO),
        "image_size": (3, 4, 4),
        "audio_length": 8,
        "text_tokenizer": Words(WORDS),
        "text_length": 4,
        "backbone": BACKBONE,
        **settings,
    }
    return randomise(TextVideoAudio(**arguments), 0.4).double().eval()


EVERY = [(video, audio) for video in product(range(2), repeat=2) for audio in product(range(2), repeat=2)]
EVERYTHING = VideoAndAudio(
    torch.tensor([video for video, _ in EVERY]).view(16, *VIDEO),
    torch.tensor([audio for _, audio in EVERY]).view(16, *AUDIO),
)


def test_the_order_of_the_ids() -> None:
    """Special ids, the text with its padding, the clip frame after frame, then the sound, one book after the other."""
    model = generator(tokenizer=TokenGrid(5, (2, 1, 2)), audio_tokenizer=TokenGrid(3, (2, 2)))
    data = VideoAndAudio(torch.tensor([[[[0, 4]], [[2, 1]]]]), torch.tensor([[[0, 1], [2, 0]]]))
    words, video, audio = RESERVED_IDS, RESERVED_IDS + 5, RESERVED_IDS + 10
    text = [words + id for id in (1, 4, 2, 0)]
    clip = [video + id for id in (0, 4, 2, 1)]
    sound = [audio, audio + 2, audio + 3 + 1, audio + 3 + 0]
    of = SPECIAL
    ending = [of.begin_of_audio, *sound, of.end_of_audio, of.end]
    drawn = model.drawn_sequence(model.condition_of_texts(["bright"]), data)
    begun = [of.draw, of.begin_of_text, *text, of.end_of_text, of.begin_of_video, *clip, of.end_of_video]
    assert drawn.ids.tolist() == [[*begun, *ending]]
    voiced = model.voiced_sequence(data.video, data.audio)
    begun = [of.voice, of.begin_of_given_video, *clip, of.end_of_given_video]
    assert voiced.ids.tolist() == [[*begun, *ending]]
    assert model.layout.vocab_size == audio + 6
    assert len(set(SPECIAL)) == len(SPECIAL) and max(SPECIAL) < RESERVED_IDS


def test_the_prefix_sees_itself_and_the_output_what_came_before() -> None:
    model = generator()
    texts = model.condition_of_texts(["dark"])
    data = VideoAndAudio(EVERYTHING.video[:1], EVERYTHING.audio[:1])
    for sequence, prefix in (
        (model.drawn_sequence(texts, data), range(2, 6)),
        (model.voiced_sequence(data.video, data.audio), range(2, 4)),
    ):
        count = sequence.ids.shape[1]
        number = torch.arange(count)[None]
        last = number + model.grammar.ahead_of[sequence.states]
        mask = seen_by(torch.zeros_like(number), last, elements=count)[0, 0]
        expected = torch.ones(count, count, dtype=torch.bool).tril()
        expected[prefix.start : prefix.stop, prefix.start : prefix.stop] = True
        assert torch.equal(mask, expected)


def test_what_the_network_sees_is_that_mask() -> None:
    """Another last word changes the state at the first one; another last id of the clip none before it."""
    model = generator()
    data = VideoAndAudio(EVERYTHING.video[:1], EVERYTHING.audio[:1])
    hidden = {
        text: model.backbone(model.drawn_sequence(model.condition_of_texts([text]), data))[0]
        for text in ("dark dark", "dark bright")
    }
    changed = (hidden["dark dark"] - hidden["dark bright"]).abs().amax(dim=1) > 1e-9
    assert changed.tolist() == [False, False] + [True] * (len(changed) - 2)
    other = VideoAndAudio(data.video.clone(), data.audio)
    other.video[:, 1] = 1 - other.video[:, 1]
    last = (
        model.drawn_sequence(model.condition_of_texts(["dark dark"]), data).ids.tolist()[0].index(SPECIAL.end_of_video)
        - 1
    )
    states = model.backbone(model.drawn_sequence(model.condition_of_texts(["dark dark"]), other))[0]
    changed = (hidden["dark dark"] - states).abs().amax(dim=1) > 1e-9
    assert changed.tolist() == [False] * last + [True] * (len(changed) - last)


def test_the_loss_counts_outputs_alone() -> None:
    """By hand: the mean over ids of clip and sound by their weights, of sequences of both kinds."""
    model = generator(video_weight=1.0, audio_weight=0.5)
    texts = model.condition_of_texts(["dark"] * 16)
    voiced = torch.arange(16) % 4 == 0
    losses = model.output_losses(EVERYTHING, texts, voiced=voiced)
    assert losses.keys() == {"video", "audio"}
    assert len(losses["video"].values) == 12 * 2 and len(losses["audio"].values) == 16 * 2
    assert set(losses["video"].weights.tolist()) == {1.0} and set(losses["audio"].weights.tolist()) == {0.5}
    nats = model.log_likelihood(EVERYTHING, texts).nats[~voiced].sum()
    of_drawn = losses["video"].values.sum() + losses["audio"].values[: 12 * 2].sum()
    torch.testing.assert_close(-nats, of_drawn)
    model.voice_share = 0.0
    loss, terms = model.loss(EVERYTHING, texts)
    each = model.output_losses(EVERYTHING, texts, voiced=torch.zeros(16, dtype=torch.bool))
    expected = (each["video"].values.sum() + 0.5 * each["audio"].values.sum()) / (16 * 2 + 0.5 * 16 * 2)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(terms["loss_of/audio"], each["audio"].values.mean())
    model.voice_share = 1.0
    assert model.loss(EVERYTHING, texts)[1].keys() == {"loss_of/audio"}
    loss.backward()
    gradient = model.backbone.table.weight.grad
    assert gradient is not None and gradient[SPECIAL.end].abs().max() == 0  # what must follow costs nothing


def test_probabilities_sum_to_one_and_are_those_of_draws() -> None:
    model = generator()
    texts = model.condition_of_texts(["bright dark"] * 16)
    likelihood = model.log_likelihood(EVERYTHING, texts)
    assert likelihood.kind == "exact"
    torch.testing.assert_close(likelihood.nats.exp().sum().item(), 1.0)
    others = model.log_likelihood(EVERYTHING, model.condition_of_texts(["dark"] * 16)).nats
    assert (likelihood.nats - others).abs().max() > 1e-3  # the text is read
    count = 3000
    drawn = model.draw(texts[:1].expand(count, -1), CounterRandom(0, torch.arange(count)))
    assert drawn.tokens.shape == (count, *VIDEO) and drawn.audio is not None
    ids = torch.cat((drawn.tokens.flatten(1), drawn.audio.flatten(1)), dim=1)
    found = (ids * torch.tensor([8, 4, 2, 1])).sum(dim=1).bincount(minlength=16) / count
    assert (found - likelihood.nats.exp()).abs().sum() < 0.1


def test_clips_are_continued_and_voiced_by_the_same_law() -> None:
    model = generator()
    count = 3000
    texts = model.condition_of_texts(["dark"])
    first = torch.ones(count, 1, 1, 1, dtype=torch.int64)
    drawn = model.sample(texts.expand(count, -1), first_frames=first)
    assert torch.equal(drawn[:, :1], first)
    joint = model.log_likelihood(EVERYTHING, texts.expand(16, -1)).nats.exp()
    begun = EVERYTHING.video[:, 0, 0, 0] == 1
    ends = EVERYTHING.video[:, 1, 0, 0] == 1
    expected = joint[begun & ends].sum() / joint[begun].sum()
    assert abs(float(drawn[:, 1].double().mean()) - float(expected)) < 0.04

    clip = EVERYTHING.video[:1]
    sounds = torch.tensor(list(product(range(2), repeat=2))).view(4, *AUDIO)
    voiced = model.output_losses(
        VideoAndAudio(clip.expand(4, *VIDEO), sounds), texts.expand(4, -1), voiced=torch.ones(4, dtype=torch.bool)
    )["audio"]
    # Ids of the first book of all samples, then of the second.
    law = (-voiced.values.view(2, 4).sum(dim=0)).exp()
    torch.testing.assert_close(law.sum().item(), 1.0)
    made = model.voice(clip.expand(count, *VIDEO)).flatten(1)
    found = (2 * made[:, 0] + made[:, 1]).bincount(minlength=4) / count
    assert (found - law).abs().sum() < 0.06


def test_guidance_leads_away_from_no_text() -> None:
    """The first id of the clip follows `null + s (full - null)` of its log-probabilities."""
    model = generator(label_dropout=0.1)
    texts, count = model.condition_of_texts(["bright"]), 3000
    first = EVERYTHING.video[:, 0, 0, 0]
    full, null = (
        torch.stack(
            [model.log_likelihood(EVERYTHING, each.expand(16, -1)).nats[first == id].logsumexp(0) for id in (0, 1)]
        )
        for each in (texts, model.null_texts(1))
    )
    expected = (null + 3 * (full - null)).softmax(dim=0)
    sampler = SegmentSampler({"video": DrawSettings(guidance_scale=3.0)})
    found = model.sample(texts.expand(count, -1), sampler)[:, 0].double().mean()
    assert abs(float(found - expected[1])) < 0.03 and (expected - full.exp()).abs().max() > 0.05
    with pytest.raises(ValueError, match="label_dropout=0"):
        generator(label_dropout=0.0).sample(texts, sampler)
    with pytest.raises(ValueError, match="without guidance"):
        model.voice(EVERYTHING.video[:1], SegmentSampler({"voice_0": DrawSettings(guidance_scale=2.0)}))


def write_tokens(folder: Path, shape: tuple[int, ...], count: int = 8, captions: bool = False) -> str:
    TokenWriter.create(
        folder,
        count=count,
        token_shape=shape,
        vocab_size=2,
        image_size=(3, 4, 4),
        num_classes=0,
        classes=[],
        tokenizer=TokenGrid(2, shape).fingerprint(),
        source="noise",
        captions=captions,
    )
    writer = TokenWriter(folder)
    rows = torch.arange(count)
    ids = (rows.view(-1, *(1,) * len(shape)) // 2 % 2).expand(-1, *shape)
    words = [[WORDS[row // 2 % 2]] for row in range(count)] if captions else None
    writer.write(rows, ids, None, captions=words)
    writer.close()
    TokenWriter.finalise(folder)
    return str(folder)


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training", "ignore:.*does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_it_learns_what_texts_say_from_paired_arrays(tmp_path: Path) -> None:
    """Dark and bright clips with sounds alike: from folders of both, through the Trainer."""
    video, audio = write_tokens(tmp_path / "video", VIDEO, captions=True), write_tokens(tmp_path / "audio", AUDIO)
    data = PairedTokenArrays(video, video, audio_train=audio, audio_validation=audio, batch_size=8)
    batch = next(iter(data.training_loader(0, 1)))
    for text, clip, sound in zip(batch["caption"], batch["tokens"], batch["audio_tokens"], strict=True):
        assert clip.shape == VIDEO and sound.shape == AUDIO
        assert set(clip.flatten().tolist()) == set(sound.flatten().tolist()) == {WORDS.index(text)}
    model = generator(voice_share=0.3, optimizer=partial(torch.optim.Adam, lr=0.02)).float().train()
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(max_epochs=40, accelerator="cpu", enable_checkpointing=False, default_root_dir=tmp_path, **quiet)
    trainer.fit(model, data)
    assert float(trainer.callback_metrics["validation/loss"]) < 0.1
    drawn = model.draw(model.condition_of_texts(list(WORDS)), CounterRandom(0, torch.arange(2)))
    assert drawn.tokens.flatten(1).tolist() == [[0, 0], [1, 1]] and drawn.audio is not None
    assert drawn.audio.flatten(1).tolist() == [[0, 0], [1, 1]]
    assert model.voice(drawn.tokens).flatten(1).tolist() == [[0, 0], [1, 1]]


def test_a_checkpoint_alone_gives_the_model_back(tmp_path: Path) -> None:
    """Without the files of both tokenizers and of the text tokenizer."""
    files = {name: tmp_path / f"{name}.ckpt" for name in ("video", "audio")}
    for name, shape in (("video", VIDEO), ("audio", AUDIO)):
        grid = {"vocab_size": 2, "token_shape": list(shape)}
        save(instantiate({"class_path": "discrete_lit.tokenizers.TokenGrid", "init_args": grid}), files[name])
    words = tmp_path / "words.json"
    words.write_text(TextTokenizer.characters("ab").json)
    frozen = {
        name: {"class_path": "discrete_lit.tokenizers.from_checkpoint", "init_args": {"checkpoint": str(file)}}
        for name, file in files.items()
    }
    arguments = {
        "tokenizer": frozen["video"],
        "audio_tokenizer": frozen["audio"],
        "image_size": [3, 4, 4],
        "audio_length": 8,
        "text_tokenizer": {"class_path": "discrete_lit.tokenizers.TextTokenizer", "init_args": {"file": str(words)}},
        "text_length": 4,
        "backbone": {
            "class_path": "discrete_lit.backbones.SegmentTransformer",
            "init_args": {"width": 16, "depth": 1, "heads": 2},
        },
    }
    model: Any = instantiate({"class_path": "discrete_lit.generators.TextVideoAudio", "init_args": arguments})
    randomise(model, 0.5)
    save(model, tmp_path / "model.ckpt")
    save_pretrained(model, tmp_path / "folder")
    for file in (*files.values(), words):
        file.unlink()
    texts = model.eval().condition_of_texts(["ab", "", "b"] * 4)
    random = CounterRandom(3, torch.arange(12))
    expected = model.draw(texts, random)
    for saved in ("model.ckpt", "folder"):
        loaded: Any = load(tmp_path / saved)
        assert torch.equal(loaded.condition_of_texts(["ab", "", "b"] * 4), texts)
        drawn = loaded.draw(texts, random)
        assert torch.equal(drawn.tokens, expected.tokens) and torch.equal(drawn.audio, expected.audio)


def test_clips_are_predicted_for_the_texts_of_a_batch() -> None:
    model = generator()
    model.tokenizer.decode = lambda tokens: tokens  # a grid has no decoder
    batch = {"tokens": EVERYTHING.video, "audio_tokens": EVERYTHING.audio, "caption": ["dark"] * 16}
    found = model.predict_step({**batch, "index": torch.arange(5, 21)}, 0)
    expected = model.sample(model.condition_of_texts(["dark"] * 16), indices=torch.arange(5, 21))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("voice_share", [0.0, 0.5])
def test_the_operations_of_a_step_are_counted(voice_share: float) -> None:
    """Against torch's counter, which knows the backward pass of attention better; sequences of both kinds."""
    model = generator(voice_share=voice_share, backbone=partial(SegmentTransformer, width=64, depth=2, heads=2)).train()
    assert model.step_flops() == 0
    with FlopCounterMode(display=False) as counter:
        model.loss(EVERYTHING, model.condition_of_texts(["dark"] * 16))[0].backward()
    assert model.step_flops() == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_what_does_not_fit(tmp_path: Path) -> None:
    model = generator()
    good = {"tokens": EVERYTHING.video, "audio_tokens": EVERYTHING.audio, "caption": ["dark"] * 16}
    random = CounterRandom(0, torch.arange(16))
    for changes, message in (
        ({"tokens": EVERYTHING.video[:, :1]}, r"\"tokens\" of a batch are"),
        ({"audio_tokens": EVERYTHING.audio[:2]}, "16 clips and 2 sounds"),
        ({"tokens": EVERYTHING.video + 2}, "must lie in"),
    ):
        with pytest.raises(ValueError, match=message):
            model.data_of({**good, **changes}, random)
    with pytest.raises(ValueError, match='needs "audio_tokens"'):
        model.data_of({"tokens": EVERYTHING.video}, random)
    with pytest.raises(ValueError, match='no "caption"'):
        model.condition_of({"tokens": EVERYTHING.video}, random)
    with pytest.raises(ValueError, match="first_frames must be ids"):
        model.sample(model.condition_of_texts(["dark"]), first_frames=EVERYTHING.video[:1])
    with pytest.raises(ValueError, match="a codec of several books"):
        generator(audio_tokenizer=TokenGrid(2, (4,)))
    with pytest.raises(ValueError, match="voice_share=2"):
        generator(voice_share=2.0)
    video, audio = write_tokens(tmp_path / "video", VIDEO), write_tokens(tmp_path / "audio", AUDIO, count=6)
    with pytest.raises(ValueError, match=r"8 rows and .* 6"):
        PairedTokenArrays(video, audio_train=audio, batch_size=2).training_loader(0, 1)
    with pytest.raises(ValueError, match="given together"):
        PairedTokenArrays(video, batch_size=2)
    assert np.load(tmp_path / "video" / "tokens.npy").shape == (8, *VIDEO)
