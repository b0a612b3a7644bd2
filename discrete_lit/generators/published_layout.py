"""The layout of a sequence of text and image whose ids stand where a published vocabulary has them."""

from dataclasses import dataclass

from discrete_lit.backbones.segments import Segment, SegmentLayout
from discrete_lit.tokenizers.text_tokenizer import TextTokenizer


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The ids of a published model: where those of text and image stand in the vocabulary that they share.

    Attributes:
        size: ids that text and image share. Those that the file of the text tokenizer does not have stand in no text.
        image_first: id of code 0 of an image; those of its other codes follow it.
        image_begin: id that begins an image.
        image_end: ids that stand behind an image.
        rows_begin: id between the size and the first row, of images by rows (Emu3).
        row_end: id behind each row, of images by rows.
        never: other ids that stand in no text.
        features: vectors that may stand in the place of an image that is given, and their width, from an encoder that
            reads images for what they show (Janus); None where an image is always its codes. They begin by id `size`,
            whose embedding is that of `image_begin` in the published model.
    """

    size: int
    image_first: int
    image_begin: int
    image_end: tuple[int, ...] = ()
    rows_begin: int | None = None
    row_end: int | None = None
    never: tuple[int, ...] = ()
    features: tuple[int, int] | None = None

    def text_ids(self, text: TextTokenizer, codes: int) -> tuple[int, ...]:
        """List the ids that may stand in a text."""
        structure = {text.pad_id, text.begin_id, text.end_id, self.image_begin, *self.image_end, self.rows_begin}
        outside = structure | {self.row_end, *self.never, *range(self.image_first, self.image_first + codes)}
        return tuple(id for id in range(min(self.size, text.vocab_size)) if id not in outside)


def published_layout(
    vocabulary: Vocabulary,
    text: TextTokenizer,
    *,
    text_length: int,
    grid: tuple[int, ...],
    codes: int,
    interleaved: bool,
    rows: bool,
    text_weight: float = 1.0,
    image_weight: float = 1.0,
) -> SegmentLayout:
    """Make the layout of a caption and an image with the ids of a published vocabulary.

    Where the image follows the caption always (not `interleaved`), its first id is what ends the caption, and the end
    of the text stands behind the image (Emu3).

    Args:
        vocabulary: where ids stand.
        text: the text tokenizer.
        text_length: the most ids of a caption, its begin and end among them.
        grid: of the image's ids.
        codes: ids of an image.
        interleaved: whether the image may stand before the caption too; else it follows it.
        rows: whether the size stands in front of the image and an end behind each row.
        text_weight, image_weight: of each in the loss.

    Raises:
        ValueError: a text tokenizer without begin and end, or rows of a vocabulary without ids for them.
    """
    if text.begin_id is None or text.end_id is None:
        raise ValueError("the text tokenizer puts no begin and end around a text, by which a caption is told")
    begin: tuple[int, ...] = (vocabulary.image_begin,)
    if rows:
        if vocabulary.rows_begin is None or vocabulary.row_end is None:
            raise ValueError("image_format='rows' of a published vocabulary needs its rows_begin and row_end")
        begin = (*begin, *text.ids("*".join(map(str, grid))), vocabulary.rows_begin)
    end, end_of_text = vocabulary.image_end, (text.end_id,)
    if not interleaved:
        begin, end, end_of_text = begin[1:], (*end, *end_of_text), begin[:1]
    caption = Segment(
        name="text",
        shape=(text_length - 2,),
        ids=range(vocabulary.size),
        variable=True,
        allowed=vocabulary.text_ids(text, codes),
        begin_ids=(text.begin_id,),
        end_ids=end_of_text,
        loss_weight=text_weight,
    )
    image = Segment(
        name="image",
        shape=grid,
        ids=range(vocabulary.image_first, vocabulary.image_first + codes),
        begin_ids=begin,
        end_ids=end,
        row_end_id=vocabulary.row_end if rows else None,
        loss_weight=image_weight,
    )
    segments = [caption, image]
    if vocabulary.features is not None:
        places, width = vocabulary.features
        segments.append(
            Segment(
                name="features",
                shape=(places,),
                input_dim=width,
                loss_weight=0,
                begin_ids=(vocabulary.size,),
                end_ids=vocabulary.image_end,
            )
        )
    most = text_length + max(segment.elements for segment in segments[1:])
    return SegmentLayout(segments=tuple(segments), interleaved=interleaved, most_elements=most if interleaved else None)
