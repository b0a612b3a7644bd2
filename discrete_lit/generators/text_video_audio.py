"""One transformer over a text, a clip and its sound: VideoPoet's sequence.

VideoPoet: Kondratyuk et al., "VideoPoet: A Large Language Model for Zero-Shot Video Generation", ICML 2024. One
vocabulary holds special ids, ids of texts, of a tokenizer of clips (MAGVIT-v2) and of a codec with several books
(SoundStream). A sequence has a *prefix* that is given, whose elements see each other and which no loss counts, and an
*output* whose ids are predicted one after another (section 4.1). Two kinds of sequences are here, told by the task id
that each begins with:

    <draw>  <bot> text ... <eot>   |  <bov> clip ... <eov>  <boa> sound ... <eoa> <eos>
    <voice> <bov_i> clip ... <eov_i>  |  <boa> sound ... <eoa> <eos>

The clip's ids stand frame after frame, so that its first frames are a prefix too: `draw` continues them. The sound is
turned so that the whole of it is predicted at one book before the next, finer one, and each book has ids of its own
(section 3.1).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from discrete_lit.backbones.segment_sequence import SegmentPart, SegmentSequence, assemble
from discrete_lit.backbones.segment_transformer import SegmentTransformer
from discrete_lit.backbones.segments import PositionCount, Segment, SegmentLayout
from discrete_lit.core.modules import in_evaluation
from discrete_lit.core.random import CounterRandom, Purpose, streams_of
from discrete_lit.generators.generator import Likelihood
from discrete_lit.generators.segment_generator import PassShape, SegmentGenerator
from discrete_lit.generators.segment_losses import SegmentLosses, SoftmaxOver, id_losses, without_prior
from discrete_lit.samplers.sampler import SamplerOutput
from discrete_lit.samplers.segment_by_segment import SegmentSampler
from discrete_lit.tokenizers.text_tokenizer import TextTokenizer
from discrete_lit.tokenizers.tokenizer import Tokenizer, freeze


class SpecialIds(NamedTuple):
    """The ids that stand around the segments, the first ones of the vocabulary."""

    draw: int = 0
    """Begins a sequence of a text, a clip and its sound."""
    voice: int = 1
    """Begins a sequence of a clip and its sound."""
    begin_of_text: int = 2
    end_of_text: int = 3
    begin_of_given_video: int = 4
    end_of_given_video: int = 5
    begin_of_video: int = 6
    end_of_video: int = 7
    begin_of_audio: int = 8
    end_of_audio: int = 9
    end: int = 10


SPECIAL = SpecialIds()
RESERVED_IDS = 256
"""How many ids of the vocabulary are kept for special ones, as in VideoPoet."""


def text_video_audio_layout(
    *,
    words: int,
    text_length: int,
    video_grid: tuple[int, ...],
    video_codes: int,
    audio_frames: int,
    books: int,
    audio_codes: int,
    video_weight: float = 1.0,
    audio_weight: float = 1.0,
    positions: PositionCount = "sequence",
) -> SegmentLayout:
    """Make VideoPoet's layout: special ids first, then those of texts, of clips, and of each book of a codec.

    Args:
        words: ids of the text tokenizer.
        text_length: ids of every text, with its begin, its end and what pads it.
        video_grid: of a clip's ids: (T', H', W').
        video_codes: ids of the tokenizer of clips.
        audio_frames: of a sound's ids.
        books: ids of each frame of a sound.
        audio_codes: ids of each book.
        video_weight, audio_weight: of each in the loss; of what is given it is 0.
        positions: as of `SegmentLayout`.
    """
    first_video = RESERVED_IDS + words
    first_audio = first_video + video_codes
    of_video: dict[str, Any] = {
        "shape": video_grid,
        "ids": range(first_video, first_audio),
        "modality": "video",
    }

    def sound(name: str) -> list[Segment]:
        return [
            Segment(
                name=f"{name}_{book}",
                shape=(audio_frames,),
                ids=range(first_audio + book * audio_codes, first_audio + (book + 1) * audio_codes),
                modality=f"audio_{book}",
                begin_ids=() if book else (SPECIAL.begin_of_audio,),
                end_ids=(SPECIAL.end_of_audio, SPECIAL.end) if book == books - 1 else (),
                loss_weight=audio_weight,
            )
            for book in range(books)
        ]

    text = Segment(
        name="text",
        shape=(text_length,),
        ids=range(RESERVED_IDS, first_video),
        attention="bidirectional",
        loss_weight=0.0,
        begin_ids=(SPECIAL.draw, SPECIAL.begin_of_text),
        end_ids=(SPECIAL.end_of_text,),
    )
    video = Segment(
        name="video",
        begin_ids=(SPECIAL.begin_of_video,),
        end_ids=(SPECIAL.end_of_video,),
        loss_weight=video_weight,
        **of_video,
    )
    given = Segment(
        name="given_video",
        first=True,
        attention="bidirectional",
        loss_weight=0.0,
        begin_ids=(SPECIAL.voice, SPECIAL.begin_of_given_video),
        end_ids=(SPECIAL.end_of_given_video,),
        **of_video,
    )
    return SegmentLayout(segments=(text, video, *sound("audio"), given, *sound("voice")), positions=positions)


@dataclass(frozen=True)
class VideoAndAudio:
    """The ids of a batch of clips with their sounds.

    Attributes:
        video: `(B, T', H', W')` int64.
        audio: `(B, frames, books)` int64.
    """

    video: Tensor
    audio: Tensor

    def __len__(self) -> int:
        return len(self.video)

    @property
    def device(self) -> torch.device:
        return self.video.device

    def of(self, where: Tensor) -> "VideoAndAudio":
        """Give some of them, `where (B,)` bool."""
        return VideoAndAudio(self.video[where], self.audio[where])


@dataclass(frozen=True, kw_only=True)
class TextVideoAudioOutput(SamplerOutput):
    """Clips that were drawn, as their ids, and the sounds behind them."""

    audio: Tensor | None = None
    """`(B, frames, books)` int64."""


class TextVideoAudio(SegmentGenerator):
    """Model a clip and its sound given a text, and the sound given the clip, one id after another (VideoPoet).

    A batch is `{"tokens": (B, T', H', W'), "audio_tokens": (B, frames, books), "caption": [...]}`, ids of both
    tokenizers, as `PairedTokenArrays` gives; or holds `"video"` and `"audio"`, which the frozen tokenizers encode. The
    loss is the mean cross-entropy of the outputs' ids, by the weights of clip and sound; the prefix has none. Each
    one's mean is logged as `loss_of/video` and `loss_of/audio`.

    Different from the published model: texts are ids of a tokenizer of one's own, in the place of T5's vectors; the
    task id stands in the place of <bos>; elements of the prefix see those of their own segment and the ones before;
    there are no resolution ids, and no in-painting or out-painting.

    Args:
        tokenizer: of clips, frozen here.
        audio_tokenizer: a codec, frozen here, whose ids are (frames, books).
        image_size: of the clips: `[frames, height, width]`.
        audio_length: of the sounds in samples.
        text_tokenizer: makes ids of captions; a checkpoint carries it.
        text_length: ids of every text, with begin, end and padding; 64 in VideoPoet.
        backbone: called with the layout.
        voice_share: the probability that training gives a sample as a clip whose sound is to be predicted.
        video_weight, audio_weight: of the ids of each in the mean.
        softmax_over: in training: `"allowed"`, the ids that may stand in the place, or all of the `"vocabulary"`.
        positions: how elements are counted, see `SegmentLayout`.
        sampler: how `sample`, `draw` and `voice` draw where nothing else is asked for.
        training: `label_dropout`, here the probability that the text is dropped; `optimizer`, `scheduler`,
            `weight_decay_rule` and `seed` of `ClassConditionalTraining`.

    Raises:
        ValueError: a setting out of its range, or tokenizers of another kind.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        audio_tokenizer: Tokenizer,
        *,
        image_size: tuple[int, int, int],
        audio_length: int,
        text_tokenizer: TextTokenizer,
        text_length: int = 64,
        backbone: Callable[[SegmentLayout], SegmentTransformer],
        voice_share: float = 0.1,
        video_weight: float = 1.0,
        audio_weight: float = 1.0,
        softmax_over: SoftmaxOver = "allowed",
        positions: PositionCount = "sequence",
        sampler: SegmentSampler | None = None,
        **training: Any,
    ) -> None:
        super().__init__(**training)
        if not 0 <= voice_share <= 1 or text_length < 2:
            raise ValueError(
                f"voice_share={voice_share} must lie in [0, 1], and text_length={text_length} be at least 2: begin, end"
            )
        self.tokenizer, self.audio_tokenizer = freeze(tokenizer), freeze(audio_tokenizer)
        self.image_size, self.audio_length = image_size, audio_length
        self.token_shape = tuple(tokenizer.token_shape(image_size))
        audio_shape = tuple(audio_tokenizer.token_shape((audio_length,)))
        if len(self.token_shape) != 3 or len(audio_shape) != 2:
            raise ValueError(
                f"tokenizer must be of clips and audio_tokenizer a codec of several books: their ids are "
                f"{list(self.token_shape)} and {list(audio_shape)}"
            )
        self.audio_shape = audio_shape
        self.text, self.text_length = text_tokenizer, text_length
        self.voice_share = voice_share
        self.softmax_over: SoftmaxOver = softmax_over
        self.layout = text_video_audio_layout(
            words=text_tokenizer.vocab_size,
            text_length=text_length,
            video_grid=self.token_shape,
            video_codes=tokenizer.vocab_size,
            audio_frames=audio_shape[0],
            books=audio_shape[1],
            audio_codes=audio_tokenizer.vocab_size,
            video_weight=video_weight,
            audio_weight=audio_weight,
            positions=positions,
        )
        self.build_network(backbone, sampler)

    def frozen_networks(self) -> Iterable[nn.Module]:
        return (self.audio_tokenizer,)

    # Batches.

    def data_of(self, batch: dict[str, Any], random: CounterRandom) -> Any:
        """Return the ids of a batch.

        Raises:
            ValueError: no ids, and no clips or sounds to encode; or ids of another shape or out of range.
        """
        found = []
        for name, source, coder, shape in (
            ("tokens", "video", self.tokenizer, self.token_shape),
            ("audio_tokens", "audio", self.audio_tokenizer, self.audio_shape),
        ):
            if name not in batch and source not in batch:
                raise ValueError(
                    f'a batch holds {", ".join(map(str, batch))}: TextVideoAudio needs "{name}", or "{source}" to '
                    "encode"
                )
            ids = batch[name] if name in batch else coder.encode(batch[source])
            if tuple(ids.shape[1:]) != shape or ids.is_floating_point():
                raise ValueError(
                    f'"{name}" of a batch are {ids.dtype} {tuple(ids.shape)}, this generator models ids {shape} of each'
                )
            if ids.device.type == "cpu":
                coder.check_tokens(ids)
            found.append(ids.long())
        if len(found[0]) != len(found[1]):
            raise ValueError(f"a batch has {len(found[0])} clips and {len(found[1])} sounds")
        return VideoAndAudio(*found)

    def condition_of(self, batch: dict[str, Any], random: CounterRandom) -> Tensor:
        """Return the texts of a batch as ids `(B, text_length)`.

        Raises:
            ValueError: a batch without captions, or one that is too long.
        """
        return self.condition_of_texts(self.texts_in(batch))

    def condition_of_texts(  # type: ignore[override]
        self, texts: Sequence[str], *, labels: Tensor | None = None, negative: Sequence[str] | None = None
    ) -> Tensor:
        """Encode texts as ids `(B, text_length)`, padded.

        Raises:
            ValueError: a text of more ids, or a negative one.
        """
        if negative is not None:
            raise ValueError("guidance of TextVideoAudio leads away from no text: leave negative_prompt out")
        return self.text.encode(list(texts), self.text_length)[0].to(self.device)

    def null_texts(self, count: int) -> Tensor:
        """Give what stands for no text: an empty one."""
        return self.condition_of_texts([""] * count)

    # Sequences.

    def drawn_sequence(self, texts: Tensor, data: VideoAndAudio | None = None) -> SegmentSequence:
        """Make sequences `<draw> text | clip sound`, or their prefix alone."""
        parts = [SegmentPart(segment="text", content=texts + RESERVED_IDS)]
        if data is not None:
            parts += [self._video("video", data.video), *self._sound("audio", data.audio)]
        return assemble(self.grammar, parts)

    def voiced_sequence(self, video: Tensor, audio: Tensor | None = None) -> SegmentSequence:
        """Make sequences `<voice> clip | sound`, or their prefix alone."""
        parts = [self._video("given_video", video)]
        return assemble(self.grammar, parts if audio is None else [*parts, *self._sound("voice", audio)])

    def _video(self, name: str, ids: Tensor) -> SegmentPart:
        return SegmentPart(segment=name, content=ids.flatten(1) + self.layout[name].ids[0])

    def _sound(self, name: str, ids: Tensor) -> list[SegmentPart]:
        return [
            SegmentPart(segment=book, content=each + self.layout[book].ids[0])
            for book, each in zip(self._books(name), ids.unbind(2), strict=True)
        ]

    def _ids(self, sequence: SegmentSequence, name: str) -> Tensor:
        """Take the ids of a segment `(B, P)` out of sequences, counted from 0."""
        return sequence.ids[self._inside(sequence, name)].view(len(sequence), -1) - self.layout[name].ids[0]

    def _sound_of(self, sequence: SegmentSequence, name: str) -> Tensor:
        return torch.stack([self._ids(sequence, book) for book in self._books(name)], dim=2)

    def _books(self, name: str) -> tuple[str, ...]:
        """Name the segments of a sound, one for each book."""
        return tuple(f"{name}_{book}" for book in range(self.audio_shape[1]))

    # The loss.

    def segment_losses(
        self, data: VideoAndAudio, condition: Tensor, random: CounterRandom, *, dropped: Tensor | None = None
    ) -> dict[str, SegmentLosses]:
        """Cost the prediction of a batch: `"video"` and `"audio"`.

        Args:
            data: ids of clips and sounds.
            condition: ids of the texts `(B, text_length)`.
            random: decides which samples are given as clips.
            dropped: bool `(B,)`, the samples whose text is dropped.
        """
        voiced = random.uniform(Purpose.ORDER, 1)[:, 0] < self.voice_share
        texts = condition if dropped is None else condition.where(~dropped[:, None], self.null_texts(1))
        return self.output_losses(data, texts, voiced=voiced)

    def output_losses(self, data: VideoAndAudio, texts: Tensor, *, voiced: Tensor) -> dict[str, SegmentLosses]:
        """Cost the prediction of the outputs' ids, of clips and of sounds.

        Args:
            data: ids.
            texts: ids `(B, text_length)`.
            voiced: bool `(B,)`, the samples that are a given clip and its sound.
        """
        found: dict[str, list[SegmentLosses]] = {}
        passes: list[PassShape] = []
        for where, voice in ((~voiced, False), (voiced, True)):
            if not bool(where.any()):
                continue
            mine = data.of(where)
            sequence = (
                self.voiced_sequence(mine.video, mine.audio) if voice else self.drawn_sequence(texts[where], mine)
            )
            outputs = self._books("voice") if voice else ("video", *self._books("audio"))
            hidden = self.backbone(sequence)
            # Elements of the prefix see those behind them: nothing is predicted there.
            losses = id_losses(self.backbone, sequence, hidden, softmax_over=self.softmax_over, segments=outputs)
            passes.append(self.shape_of(sequence, losses))
            for name, each in losses.items():
                found.setdefault("video" if name == "video" else "audio", []).append(each)
        self.step_passes = tuple(passes)
        return {name: SegmentLosses(*map(torch.cat, zip(*each, strict=True))) for name, each in found.items()}  # type: ignore[arg-type]

    def validation_losses(
        self, data: VideoAndAudio, condition: Tensor, random: CounterRandom
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the losses of samples that are given as texts, all of them."""
        nobody = torch.zeros(len(data), dtype=torch.bool, device=condition.device)
        return without_prior(self.output_losses(data, condition, voiced=nobody))

    @torch.no_grad()
    @in_evaluation
    def log_likelihood(self, data: VideoAndAudio, condition: Tensor) -> Likelihood:
        """Give log p of the ids of clips and sounds given the texts, exact, of the law that `draw` draws from."""
        sequence = self.drawn_sequence(condition, data)
        outputs = ("video", *self._books("audio"))
        return Likelihood(self.nats_of(outputs, sequence, hidden=self.backbone(sequence)), "exact")

    # Sampling.

    @torch.no_grad()
    def sample(
        self,
        condition: Tensor,
        sampler: SegmentSampler | None = None,
        *,
        seed: int = 0,
        indices: Tensor | None = None,
        first_frames: Tensor | None = None,
    ) -> Tensor:
        """Draw the ids of a clip `(B, T', H', W')` for each text; `draw` gives the sounds too.

        Args:
            condition: ids of the texts.
            sampler: this generator's own by default.
            seed: with `indices`, it alone decides the draw, whatever the batch.
            indices: `(B,)` int64, each sample's index among all that are drawn; 0 to B - 1 by default.
            first_frames: ids `(B, t, H', W')` that the clips begin with.

        Raises:
            ValueError: guidance of a model that never learned to do without a text; frames of another shape.
        """
        random = streams_of(condition, seed=seed, indices=indices)
        return self.draw(condition, random, sampler, first_frames=first_frames).tokens

    @torch.no_grad()
    def draw(
        self,
        condition: Tensor,
        random: CounterRandom,
        sampler: SegmentSampler | None = None,
        *,
        first_frames: Tensor | None = None,
    ) -> TextVideoAudioOutput:
        """Draw clips and their sounds as `sample` does, and report what they cost."""
        sampler = sampler or self.sampler
        segments = ("video", *self._books("audio"))
        contexts = self.contexts_of(sampler, segments)
        given = [condition, self.null_texts(1).expand_as(condition)][:contexts]
        prompts = [self.drawn_sequence(texts) for texts in given]
        if first_frames is not None:
            prompts = [self._begun(texts, first_frames) for texts in given]
        drawn = sampler(self.backbone, prompts, random, segments=segments)
        sequence = drawn.sequence
        if first_frames is not None:
            video = torch.cat((first_frames.flatten(1), self._ids(sequence, "video")), dim=1)
        else:
            video = self._ids(sequence, "video")
        cost = drawn.costing(video.view(len(condition), *self.token_shape))
        return TextVideoAudioOutput(**vars(cost), audio=self._sound_of(sequence, "audio"))

    @torch.no_grad()
    def voice(
        self, video: Tensor, sampler: SegmentSampler | None = None, *, seed: int = 0, indices: Tensor | None = None
    ) -> Tensor:
        """Draw the ids of a sound `(B, frames, books)` for each clip, of ids `(B, T', H', W')`."""
        sampler, segments = sampler or self.sampler, self._books("voice")
        if self.contexts_of(sampler, segments) > 1:
            raise ValueError("sounds of given clips are drawn without guidance: the clip is never dropped")
        random = streams_of(video, seed=seed, indices=indices)
        drawn = sampler(self.backbone, [self.voiced_sequence(video)], random, segments=segments)
        return self._sound_of(drawn.sequence, "voice")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe all three tokenizers in the checkpoint, so that it loads without their files."""
        super().on_save_checkpoint(checkpoint)
        if self.audio_tokenizer.hparams:
            checkpoint["audio_tokenizer_config"] = dict(self.audio_tokenizer.hparams)

    def _begun(self, texts: Tensor, frames: Tensor) -> SegmentSequence:
        """Make the prefix and the beginning of the clip: of a whole sequence the first elements."""
        expected, most = self.token_shape[1:], self.token_shape[0]
        if frames.ndim != 4 or tuple(frames.shape[2:]) != expected or not 0 < frames.shape[1] < most:
            raise ValueError(
                f"first_frames must be ids (B, t, {', '.join(map(str, expected))}) of 1 to {most - 1} frames, got "
                f"{tuple(frames.shape)}"
            )
        missing = frames.new_zeros(len(frames), most - frames.shape[1], *expected)
        silent = frames.new_zeros(len(frames), *self.audio_shape)
        whole = self.drawn_sequence(texts, VideoAndAudio(torch.cat((frames, missing), dim=1), silent))
        kept = self.layout["text"].elements + 1 + frames[0].numel()
        ids, states, sample = (each[:, :kept] for each in (whole.ids, whole.states, whole.sample))
        return replace(whole, ids=ids, states=states, sample=sample)
