"""The layout of a sequence of text and image whose ids stand where a published vocabulary has them."""

from dataclasses import dataclass, replace

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
        mask_id: stands for an id of an image that is not known yet, of a model that predicts them where they stand
            (Show-o); None for others. The image then sees what begins and ends it, and is seen by it.
        text_begin: id in front of the begin of a caption whose image is drawn, of such a model.
        given_begin: id in front of an image that is described, of such a model.
        question: texts in front of an image that is described and behind it, of a model of order `"text_first"` that
            answers (Emu3-Chat); None for one that draws alone.
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
    mask_id: int | None = None
    text_begin: int | None = None
    given_begin: int | None = None
    question: tuple[str, str] | None = None
    features: tuple[int, int] | None = None

    def text_ids(self, text: TextTokenizer, codes: int) -> tuple[int, ...]:
        """List the ids that may stand in a text."""
        structure = {text.pad_id, text.begin_id, text.end_id, self.image_begin, *self.image_end, self.rows_begin}
        tasks = {self.text_begin, self.given_begin}
        outside = structure | tasks | {self.row_end, *self.never, *range(self.image_first, self.image_first + codes)}
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
    weights: tuple[float, float] = (1.0, 1.0),
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
        weights: of text and image in the loss.

    Raises:
        ValueError: a text tokenizer without begin and end, rows of a vocabulary without ids for them, or masks in an
            image that stands in front of its caption or has rows.
    """
    if text.begin_id is None or text.end_id is None:
        raise ValueError("the text tokenizer puts no begin and end around a text, by which a caption is told")
    if vocabulary.mask_id is not None:
        if interleaved or rows:
            raise ValueError("a vocabulary with a mask_id has captions in front of images: set order='text_first'")
        return _masked_layout(vocabulary, text, text_length=text_length, grid=grid, codes=codes, weights=weights)
    if vocabulary.question is not None and interleaved:
        raise ValueError("a question is asked in a sequence of another kind than a drawing: set order='text_first'")
    begin: tuple[int, ...] = (vocabulary.image_begin,)
    if rows:
        if vocabulary.rows_begin is None or vocabulary.row_end is None:
            raise ValueError("image_format='rows' of a published vocabulary needs its rows_begin and row_end")
        begin = (*begin, *text.ids("*".join(map(str, grid))), vocabulary.rows_begin)
    end, end_of_text, whole = vocabulary.image_end, (text.end_id,), begin
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
        loss_weight=weights[0],
    )
    image = Segment(
        name="image",
        shape=grid,
        ids=range(vocabulary.image_first, vocabulary.image_first + codes),
        begin_ids=begin,
        end_ids=end,
        row_end_id=vocabulary.row_end if rows else None,
        loss_weight=weights[1],
    )
    segments = [caption, image]
    if vocabulary.question is not None:
        before, behind = (tuple(text.ids(each)) for each in vocabulary.question)
        given = {"begin_ids": (text.begin_id, *before, *whole), "end_ids": (*vocabulary.image_end, *behind)}
        segments += [
            replace(image, name="given_image", modality="image", first=True, loss_weight=0, **given),
            replace(caption, name="caption", modality="text", begin_ids=(), end_ids=(text.end_id,)),
        ]
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


def _masked_layout(
    vocabulary: Vocabulary,
    text: TextTokenizer,
    *,
    text_length: int,
    grid: tuple[int, ...],
    codes: int,
    weights: tuple[float, float],
) -> SegmentLayout:
    """Make Show-o's two kinds of sequences: a caption and the image that is drawn, an image and what it shows."""
    begin_of_text, end_of_text = text.begin_id, text.end_id
    assert begin_of_text is not None and end_of_text is not None
    words = {
        "shape": (text_length - 2,),
        "modality": "text",
        "ids": range(vocabulary.size),
        "variable": True,
        "allowed": vocabulary.text_ids(text, codes),
        "end_ids": (end_of_text,),
        "loss_weight": weights[0],
    }
    pixels = {
        "shape": grid,
        "modality": "image",
        "ids": range(vocabulary.image_first, vocabulary.image_first + codes),
        "attention": "bidirectional",
        "end_ids": vocabulary.image_end,
        "ends_inside": True,
    }
    task = () if vocabulary.text_begin is None else (vocabulary.text_begin,)
    begins = (vocabulary.image_begin,)
    segments = [
        Segment(name="text", begin_ids=(*task, begin_of_text), **words),
        Segment(name="image", begin_ids=begins, mask_id=vocabulary.mask_id, loss_weight=weights[1], **pixels),
    ]
    if vocabulary.given_begin is not None:
        given = (vocabulary.given_begin, *begins)
        segments += [
            Segment(name="given_image", begin_ids=given, first=True, loss_weight=0, **pixels),
            Segment(name="caption", begin_ids=(begin_of_text,), **words),
        ]
    return SegmentLayout(segments=tuple(segments))
