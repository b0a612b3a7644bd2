"""Sequences of captions and images: made of texts, ids and latents, and read back into these.

`TextAndImageSequences` is the part of `Unified` that knows how the two stand in one sequence, and nothing of losses and
draws.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from discrete_lit.backbones.segment_sequence import SegmentPart, SegmentSequence, assemble
from discrete_lit.backbones.segments import Segment
from discrete_lit.generators.continuous_masked import Patches
from discrete_lit.generators.segment_generator import SegmentGenerator
from discrete_lit.generators.text_and_image import CaptionIds, read_captions, split_thoughts
from discrete_lit.tokenizers.quantizers import MultiScaleResidualQuantizer

NullText = Literal["empty", "padding"]


class TextAndImageSequences(SegmentGenerator):
    """Turns texts and images into sequences of segments, and back; `Unified` says what the attributes are."""

    thought_length: int | None
    thought_separator: str
    null_text: NullText
    image: Segment
    patches: Patches | None
    latent_shape: tuple[int, ...]
    token_shape: tuple[int, ...]
    codes: Tensor
    """`(K,)` int64, the id of each of the tokenizer's codes in the vocabulary of the sequence."""

    @property
    def scale_quantizer(self) -> MultiScaleResidualQuantizer | None:
        """Give the quantizer that makes the vectors of an image in scales; None of other images."""
        return None

    # Texts.

    def captions_of(
        self, texts: Sequence[str] | Tensor, lengths: Tensor | None = None, *, thoughts: Sequence[str] | None = None
    ) -> CaptionIds:
        """Encode texts, or take the begin and end of the text tokenizer off ids `(B, L)` that it made.

        Args:
            texts: B captions or prompts.
            lengths: `(B,)` int64, where they are ids.
            thoughts: B texts between caption and image, of a model that has them; it writes its own by default.

        Raises:
            ValueError: a text of more than `text_length` ids, a thought of more than `thought_length`, or ids that are
                not the text tokenizer's; thoughts for a model without.
        """
        captions = read_captions(self.text, texts, lengths=lengths, length=self.text_length, device=self.device)
        if thoughts is None:
            return captions
        if self.thought_length is None:
            raise ValueError(
                f"thoughts are given, and this {type(self).__name__} has none: it was trained without a thought_length"
            )
        if len(thoughts) != len(captions):
            raise ValueError(f"there are {len(captions)} texts and {len(thoughts)} thoughts: one for each is needed")
        return replace(
            captions,
            thoughts=read_captions(
                self.text, thoughts, length=self.thought_length, device=self.device, segment="thought"
            ),
        )

    def condition_of_texts(  # type: ignore[override]
        self,
        texts: Sequence[str],
        *,
        labels: Tensor | None = None,
        negative: Sequence[str] | None = None,
        thoughts: Sequence[str] | None = None,
    ) -> CaptionIds:
        """Make the condition of B prompts, for `sample` and `draw`.

        Args:
            texts: B prompts; an empty one stands for none.
            labels: are not read.
            negative: B texts that guidance leads away from; by default from no text.
            thoughts: B thoughts in place of the model's own.

        Raises:
            ValueError: a text is too long, or a prompt holds the separator of thoughts.
        """
        if self.thought_length is not None:
            wrong = [text for text in texts if self.thought_separator in text]
            if wrong:
                raise ValueError(
                    f"the prompt {wrong[0]!r} holds {self.thought_separator!r}, behind which captions have their "
                    "thought: leave it out, and give the thought by itself"
                )
        condition = self.captions_of(texts, thoughts=thoughts)
        return condition if negative is None else replace(condition, negative=self.captions_of(negative))

    def prompts_of(self, captions: Sequence[str]) -> CaptionIds:
        """Make prompts of captions of the data, whose thoughts are left to the model."""
        asked = captions if self.thought_length is None else split_thoughts(captions, self.thought_separator)[0]
        return self.captions_of(asked)

    # Sequences.

    def sequences(
        self,
        data: Tensor | None,
        captions: CaptionIds | None,
        *,
        image_first: Tensor | None = None,
        times: Tensor | None = None,
        masked: Tensor | None = None,
        closed: Tensor | bool = True,
        begun: str | None = None,
    ) -> SegmentSequence:
        """Put images and captions together.

        Args:
            data: ids, or latents as the network reads them; None for a text alone.
            captions: with their thoughts; None for an image alone.
            image_first: `(B,)` bool, of order `"both"`; the captions come first by default.
            times: `(B,)`, how noisy the latents are; clean by default.
            masked: `(B, P)` bool, the ids that masks stand for; none by default.
            closed, begun: as of `assemble`.
        """
        text: list[SegmentPart] = []
        if captions is not None:
            given = {"text": captions, "thought": captions.thoughts}
            text = [
                SegmentPart(segment=name, content=each.ids, lengths=each.lengths)
                for name, each in given.items()
                if each is not None
            ]
        if data is None:
            return assemble(self.grammar, text, closed=closed, begun=begun)
        if self.patches is not None:
            content = self.patches.cut(data)
        elif self.scale_quantizer is not None:
            with torch.no_grad(), torch.autocast(data.device.type, enabled=False):
                content = self.scale_quantizer.teacher_forcing(data.flatten(1))
        else:
            content = self.codes[data.flatten(1)]
        if masked is not None and self.image.mask_id is not None:
            content = content.masked_fill(masked, self.image.mask_id)
        if image_first is None:
            parts = [*text, SegmentPart(segment="image", content=content, times=times)]
            return assemble(self.grammar, parts, closed=closed, begun=begun)
        before, behind = (
            SegmentPart(segment="image", content=content, times=times, present=present)
            for present in (image_first, ~image_first)
        )
        parts = [before, *text, behind]
        return assemble(self.grammar, parts, closed=closed, begun=begun)

    def null_captions(self, captions: CaptionIds) -> CaptionIds:
        """Give what stands for no caption: an empty one, or padding of its length; a thought likewise."""
        if self.null_text == "empty":
            return captions.without(torch.ones_like(captions.lengths, dtype=torch.bool))
        thoughts = None if captions.thoughts is None else self.null_captions(captions.thoughts)
        return CaptionIds(torch.full_like(captions.ids, self.text.pad_id), captions.lengths, thoughts=thoughts)

    def dropped(self, captions: CaptionIds, where: Tensor) -> CaptionIds:
        """Put the null caption in the place of those of some samples `where (B,)`."""
        null = self.null_captions(captions)
        ids = torch.where(where[:, None], null.ids, captions.ids)
        thoughts = None if captions.thoughts is None else self.dropped(captions.thoughts, where)
        return CaptionIds(ids, torch.where(where, null.lengths, captions.lengths), thoughts=thoughts)

    # Back from sequences.

    def images_of(self, sequence: SegmentSequence) -> Tensor:
        """Take the one image of each sequence out: ids `(B, *token_shape)`, or latents `(B, D, H, W)`.

        Images in scales are not in it: their sequence holds what their ids add up to.
        """
        inside = self._inside(sequence, "image")
        if self.patches is not None:
            vectors = sequence.vectors["image"][inside].unflatten(0, (len(sequence), self.image.positions))
            return self.patches.join(vectors)
        ids = sequence.ids[inside].view(len(sequence), *self.token_shape)
        order = self.codes.argsort()
        return order[torch.searchsorted(self.codes[order], ids)]

    def text_in(self, sequence: SegmentSequence, segment: str) -> CaptionIds:
        """Take the text of a segment out of each sequence, up to its end."""
        inside = self._inside(sequence, segment) & (sequence.sample >= 0)
        ends = (sequence.ids == self.layout[segment].end_ids[0]) & inside
        inside &= ends.cumsum(dim=1) == 0
        order = (~inside).to(torch.uint8).argsort(dim=1, stable=True)
        ids = sequence.ids.where(inside, self.text.pad_id).gather(1, order)
        # The text of an interleaved layout has no other limit than the sequence.
        most = ids.shape[1] if self.layout.interleaved else self.layout[segment].positions
        return CaptionIds(ids[:, :most], inside.sum(dim=1))

    def texts_of(self, captions: CaptionIds) -> list[str]:
        """Decode captions, or thoughts, to B strings."""
        return self.text.decode(self._padded(captions, captions.ids.shape[1]))

    def thought_rows(self, thoughts: CaptionIds) -> Tensor:
        """Give ids `(B, thought_length - 2)` of thoughts, padding behind each, as the text tokenizer decodes them."""
        return self._padded(thoughts, self.layout["thought"].positions)

    def _padded(self, captions: CaptionIds, length: int) -> Tensor:
        ids = F.pad(captions.ids, (0, length - captions.ids.shape[1]))
        number = torch.arange(length, device=ids.device)
        return ids.where(number < captions.lengths[:, None], self.text.pad_id)

    def check_data(self, data: Tensor) -> None:
        vectors = self.patches is not None
        expected = self.latent_shape if vectors else self.token_shape
        if tuple(data.shape[1:]) != expected or data.is_floating_point() != vectors:
            raise ValueError(
                f"the images are {data.dtype} {tuple(data.shape)}, this generator models "
                f"{'latents' if vectors else 'ids'} {expected} of each: model.init_args.image_size is "
                f"{self.image_size}"
            )
