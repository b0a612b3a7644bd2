"""What segments cost: a packed training step of text and image, and drawing an image of ids that a grammar allows.

    OMP_NUM_THREADS=2 python benchmarks/segments.py
    OMP_NUM_THREADS=1 python benchmarks/segments.py --width 192 --depth 4 --heads 4 --rounds 8

Two arms train: `SegmentTransformer` on captions of 10 to 30 ids, each in front of an image of 8 x 8 ids, put together
and packed into rows of 256 elements, mask included; and `Transformer` of as many blocks of the same width on as many
rows of 256 ids, causal, without a mask. A step is what is read, the passes forward and backward, and the softmax over
all ids, without an optimizer.

Four arms draw 64 ids: `RasterSampler` from the class-conditional transformer, which knows no grammar, behind its
class, and behind as many known ids as a prompt has elements; `SegmentSampler` behind prompts of one length; and behind
prompts of lengths of their own, where each row has its own mask. The ids that the grammar allows are the image's, in
all four as many. The arms take turns; their ratio by processor time is the one that other programs disturb least.

Measured on 28 November 2026, 2 threads on 2 cores of an AMD EPYC with avx512_bf16 that did nothing else, the first
command: a packed step 1.02 times the plain one.

The draws on 29 November 2026 by processor time, `--width 384 --depth 6 --heads 6 --rounds 4` on 1 thread of such cores
that other programs shared: behind prompts 0.99 times behind as many known ids, 1.21 times behind the class alone, and
1.37 times that where prompts differ in length. Before padding that all prompts have was left unread, the same command
on quiet cores gave 1.06, 1.25 and 1.37.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from side_by_side.published_shapes import autocast
from side_by_side.timing import alternate, milliseconds, ratio

from discrete_lit.backbones import Segment, SegmentLayout, SegmentTransformer, SequenceLayout, Transformer
from discrete_lit.backbones.segment_sequence import SegmentPart, assemble, pack
from discrete_lit.core.random import CounterRandom
from discrete_lit.samplers import RasterSampler, SegmentSampler

WORDS, CODES, SIDE, ROW = 512, 510, 8, 256
SHORTEST, LONGEST = 10, 30


def layout() -> SegmentLayout:
    """Chameleon's: a text, and images anywhere in it."""
    text = Segment(
        name="text",
        shape=(LONGEST,),
        ids=range(WORDS),
        variable=True,
        allowed=tuple(range(3, WORDS)),
        begin_ids=(1,),
        end_ids=(2,),
    )
    first = WORDS + CODES
    image = Segment(name="image", shape=(SIDE, SIDE), ids=range(WORDS, first), begin_ids=(first,), end_ids=(first + 1,))
    return SegmentLayout(segments=(text, image), interleaved=True, most_elements=100)


def captions(batch: int, device: torch.device) -> SegmentPart:
    return SegmentPart(
        segment="text",
        content=torch.randint(3, WORDS, (batch, LONGEST), device=device),
        lengths=torch.randint(SHORTEST, LONGEST + 1, (batch,), device=device),
    )


def plain(vocab: int, shape: tuple[int, ...], options: argparse.Namespace) -> Transformer:
    """The blocks of `SegmentTransformer` over one sequence of ids, with a class in front."""
    return Transformer(
        SequenceLayout(vocab, shape, num_classes=1, attention="causal"),
        width=options.width,
        depth=options.depth,
        heads=options.heads,
        norm="rms",
        mlp="swiglu",
        bias=False,
        positions="rope_1d",
    ).to(options.device)


def training(network: SegmentTransformer, options: argparse.Namespace) -> dict[str, Callable[[], None]]:
    """A step over packed segments, and one over as many elements in plain causal rows."""
    device = torch.device(options.device)
    grammar, text = network.grammar, captions(options.batch, device)
    image = SegmentPart(
        segment="image", content=torch.randint(WORDS, WORDS + CODES, (options.batch, SIDE**2), device=device)
    )

    def rows() -> int:
        return len(pack(assemble(grammar, [text, image]), ROW, padding=grammar.done))

    other = plain(network.layout.vocab_size, (ROW,), options).train()
    ids = torch.randint(network.layout.vocab_size, (rows(), ROW - 1), device=device)
    labels = torch.zeros(len(ids), dtype=torch.int64, device=device)

    def segmented() -> None:
        with autocast(device, options.precision):
            sequence = pack(assemble(grammar, [text, image]), ROW, padding=grammar.done)
            loss = network.logits(network(sequence)).logsumexp(dim=-1).mean()
        loss.backward()

    def causal() -> None:
        with autocast(device, options.precision):
            loss = other(ids, labels).logsumexp(dim=-1).mean()
        loss.backward()

    return {"segments": segmented, "plain": causal}


def drawing(network: SegmentTransformer, options: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """Draws of 64 ids: given a class, given texts of one length, given texts of several."""
    device = torch.device(options.device)
    text = captions(options.batch, device)
    assert text.lengths is not None
    words = (SHORTEST + LONGEST) // 2
    even = assemble(network.grammar, [replace(text, lengths=torch.full_like(text.lengths, words))], begun="image")
    ragged = assemble(network.grammar, [text], begun="image")
    other = plain(CODES, (SIDE, SIDE), options).eval()
    # Begin, words and the image's begin, in the place of which the class stands.
    longer = plain(CODES, (words + 1 + SIDE**2,), options).eval()
    known = torch.randint(CODES, (options.batch, words + 1 + SIDE**2), device=device)
    known[:, words + 1 :] = -1
    labels = torch.zeros(options.batch, dtype=torch.int64, device=device)
    random = CounterRandom(0, torch.arange(options.batch, device=device))
    sampler, raster = SegmentSampler(), RasterSampler()

    def within(draw: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode(), autocast(device, options.precision):
                return draw()

        return run

    return {
        "class": within(lambda: raster(other, labels, random)),
        "class, longer": within(lambda: raster(longer, labels, random, known=known)),
        "text": within(lambda: sampler(network, [even], random, segments=["image"])),
        "text, ragged": within(lambda: sampler(network, [ragged], random, segments=["image"])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--depth", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--batch", type=int, default=16, help="captions and images")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    network = SegmentTransformer(layout(), width=options.width, depth=options.depth, heads=options.heads)
    network = network.to(options.device).train()
    print(
        f"{options.depth} blocks of width {options.width}, batch {options.batch}, {options.precision}, "
        f"{torch.get_num_threads()} threads"
    )
    steps = alternate(training(network, options), options.rounds)
    draws = alternate(drawing(network.eval(), options), options.rounds)
    for name, taken in {**steps, **draws}.items():
        print(f"  {name:14s} {milliseconds(taken)}")
    print(f"  segments / plain       {ratio(steps['segments'], steps['plain'], 'at most 1.05')}")
    print(f"  text / class, longer   {ratio(draws['text'], draws['class, longer'], 'at most 1.03')}")
    print(f"  text / class           {ratio(draws['text'], draws['class'])}")
    print(f"  text, ragged / class   {ratio(draws['text, ragged'], draws['class'])}")


if __name__ == "__main__":
    main()
