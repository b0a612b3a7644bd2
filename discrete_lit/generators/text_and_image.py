"""The layout of a sequence of text and image, and the captions and thoughts of a batch as ids."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from discrete_lit.backbones.segments import PositionCount, Segment, SegmentLayout
from discrete_lit.tokenizers.text_tokenizer import TextTokenizer


@dataclass(frozen=True)
class CaptionIds:
    """The texts of a batch.

    Attributes:
        ids: `(B, L)` int64 of the text tokenizer, without its begin and end; behind each text stands anything.
        lengths: `(B,)` int64, ids of each.
        thoughts: the text between caption and image of each, of a model that has one; None where it is to be drawn.
        negative: the texts that guidance leads away from; None for no text.
    """

    ids: Tensor
    lengths: Tensor
    _: KW_ONLY
    thoughts: "CaptionIds | None" = None
    negative: "CaptionIds | None" = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def without(self, where: Tensor) -> "CaptionIds":
        """Give the captions in which those of some samples `where (B,)` are empty, and their thoughts."""
        thoughts = None if self.thoughts is None else self.thoughts.without(where)
        return replace(self, lengths=self.lengths.masked_fill(where, 0), thoughts=thoughts)


def split_thoughts(captions: Sequence[str], separator: str) -> tuple[list[str], list[str]]:
    """Take captions such as `"2+3=5"` apart at their first separator: what is asked, and the thought behind it.

    Raises:
        ValueError: a caption without the separator.
    """
    parts = [caption.partition(separator) for caption in captions]
    for number, (_, found, _) in enumerate(parts):
        if not found:
            raise ValueError(
                f"caption {captions[number]!r} has no thought: training reads it behind the first {separator!r} of a "
                "caption (model.init_args.thought_separator)"
            )
    return [before for before, _, _ in parts], [behind for _, _, behind in parts]


def read_captions(
    text: TextTokenizer,
    texts: Sequence[str] | Tensor,
    *,
    lengths: Tensor | None = None,
    length: int,
    device: torch.device,
    segment: str = "text",
) -> CaptionIds:
    """Encode texts, or take the begin and end of the text tokenizer off ids that it made.

    Args:
        text: the text tokenizer.
        texts: strings, or ids `(B, L)`.
        lengths: `(B,)` int64, ids of each text, begin and end among them, where they are ids.
        length: the most ids of a caption, its begin and end among them.
        device: of the captions.
        segment: that they stand in, for messages: `"text"` or `"thought"`.

    Raises:
        ValueError: a text that is too long, or ids that are not the text tokenizer's.
    """
    if isinstance(texts, Tensor):
        ids = texts
    else:
        ids, lengths = _encoded(text, list(texts), length, segment=segment)
    if lengths is None or ids.is_floating_point() or ids.ndim != 2 or lengths.shape != ids.shape[:1]:
        raise ValueError(
            f"captions are ids (B, L) and lengths (B,), got {ids.dtype} {tuple(ids.shape)} and "
            f"{None if lengths is None else tuple(lengths.shape)}"
        )
    ids, lengths = ids.to(device), lengths.to(device)
    begun = ((ids[:, 0] == text.begin_id) & (lengths > 0)).long()
    columns = (torch.arange(ids.shape[1], device=device) + begun[:, None]).clamp(max=ids.shape[1] - 1)
    ids, lengths = ids.gather(1, columns), lengths - begun
    last = ids.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
    lengths = lengths - ((last == text.end_id) & (lengths > 0)).long()
    if device.type == "cpu":
        _check(text, ids, lengths, length=length, segment=segment)
        ids = ids[:, : max(int(lengths.max()), 1)]
    return CaptionIds(ids[:, : length - 2].contiguous(), lengths)


def _encoded(text: TextTokenizer, texts: list[str], length: int, *, segment: str) -> tuple[Tensor, Tensor]:
    try:
        return text.encode(texts, length)
    except ValueError as error:
        if any(len(text.ids(each)) > length - 2 for each in texts):
            raise ValueError(f"{error}; here it is model.init_args.{segment}_length") from error
        raise


def _check(text: TextTokenizer, ids: Tensor, lengths: Tensor, *, length: int, segment: str) -> None:
    """Refuse captions that are too long, or that hold other ids than those of words."""
    if int(lengths.max()) > length - 2:
        raise ValueError(
            f"a caption has {int(lengths.max()) + 2} ids with its begin and end, its segment holds {length}: "
            f"model.init_args.{segment}_length"
        )
    inside = torch.arange(ids.shape[1]) < lengths[:, None]
    special = torch.tensor([text.pad_id, text.begin_id, text.end_id])
    wrong = inside & ((ids < 0) | (ids >= text.vocab_size) | torch.isin(ids, special))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0, 0])
        raise ValueError(
            f"caption {row} has the id {int(ids[wrong][0])} inside, which is no id of a text: they lie in "
            f"[0, {text.vocab_size}), padding, begin and end not among them; images have ids of their own"
        )


def text_and_image_layout(
    text: TextTokenizer,
    text_length: int,
    *,
    grid: tuple[int, ...],
    codes: int | None = None,
    dim: int | None = None,
    interleaved: bool = True,
    rows: bool = False,
    attention: Literal["bidirectional", "causal"] = "bidirectional",
    positions: PositionCount = "sequence",
    text_weight: float = 1.0,
    image_weight: float = 1.0,
    thought_length: int | None = None,
    thought_weight: float = 1.0,
    masked: bool = False,
    scales: tuple[int, ...] = (),
) -> SegmentLayout:
    """Make the layout of a caption and an image: the text's ids first, then the image's, then what stands around it.

    Where there are thoughts, a segment `"thought"` of the text's ids stands between the caption and the image.

    Args:
        text: the text tokenizer.
        text_length: the most ids of a caption, its begin and end among them.
        grid: of the image's ids or vectors.
        codes: ids of an image; None for vectors.
        dim: width of an image's vectors; None for ids.
        interleaved: whether the image may stand before the caption too; else it follows it.
        rows: of ids, whether the size stands in front and an end behind each row (Emu3: begin, height * width, begin of
            the ids, rows, end of the frame, end).
        attention: among an image's vectors.
        positions: as of `SegmentLayout`.
        text_weight, image_weight, thought_weight: of each in the loss.
        thought_length: the most ids of a thought, its begin and end among them; None for no thoughts.
        masked: of ids, whether they see each other and are predicted where they stand, from masks (Show-o).
        scales: ids of each scale, where these are predicted one after another from vectors of width `dim` (VAR).

    Raises:
        ValueError: a text tokenizer without begin and end; thoughts of an interleaved layout; masks or scales, and ends
            of rows.
    """
    if (masked or scales) and rows:
        raise ValueError("ids from masks, or in scales, have no ends of rows: set image_format='plain'")
    if thought_length is not None and interleaved:
        raise ValueError("a thought stands between a caption and its image: set order='text_first'")
    if text.begin_id is None or text.end_id is None:
        raise ValueError("the text tokenizer puts no begin and end around a text, by which a caption is told")
    words = text.vocab_size
    special = {text.pad_id, text.begin_id, text.end_id}
    end_of_text = text.end_id

    def written(name: str, length: int, begin: int, weight: float) -> Segment:
        return Segment(
            name=name,
            shape=(length - 2,),
            ids=range(words),
            modality="text",
            variable=True,
            allowed=tuple(id for id in range(words) if id not in special),
            begin_ids=(begin,),
            end_ids=(end_of_text,),
            loss_weight=weight,
        )

    of_ids = codes is not None and not scales
    first = words + (codes if codes is not None and of_ids else 0)
    begin, end, row_end = (first,), (first + 1,), None
    if rows:
        begin = (first, *text.ids("*".join(map(str, grid))), first + 1)
        end, row_end = (first + 2, first + 3), first + 4
    image = Segment(
        name="image",
        shape=(sum(scales[1:]),) if scales else grid,
        ids=range(words, first) if of_ids else (),
        input_dim=dim,
        attention="block_causal" if scales else ("bidirectional" if masked else "causal") if of_ids else attention,
        scales=scales[1:],
        codes=codes if scales else None,
        begin_ids=begin,
        end_ids=end,
        row_end_id=row_end,
        mask_id=1 + max((*begin, *end)) if masked else None,
        loss_weight=image_weight,
    )
    segments = [written("text", text_length, text.begin_id, text_weight), image]
    if thought_length is not None:
        begin_of_thought = 1 + max(image.structure())
        segments.insert(1, written("thought", thought_length, begin_of_thought, thought_weight))
    return SegmentLayout(
        segments=tuple(segments),
        interleaved=interleaved,
        most_elements=text_length + image.elements if interleaved else None,
        positions=positions,
    )
