"""EnCodec's encode and decode: against real time, against `transformers`, and piece by piece.

    OMP_NUM_THREADS=1 python benchmarks/audio_codec.py
    OMP_NUM_THREADS=1 python benchmarks/audio_codec.py --seconds 2 --books 8

The published 24 kHz shape (SEANet of 32 filters, 75 frames a second, 1,024 codes, up to 32 books) at random weights,
which `transformers`' `EncodecModel` and ours share: ours reads its file. The arms take turns:

- encode, decode: `EnCodec.encode` and `decode` of one clip, and the same calls of the other;
- streaming: `streaming_decoder`, given the clip's codes in pieces of `--piece` frames.

Real time is the seconds of the clip over the seconds that it takes.

Measured on 29 November 2026, 1 thread on 2 cores of an AMD EPYC with avx512_bf16 that did nothing else, `--rounds 25`:
encoding 1.03 times and decoding 1.04 times as fast as `transformers`, each 9 times real time; decoding in pieces of 25
frames takes 1.09 times the time of the whole.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from side_by_side.timing import Seconds, alternate, milliseconds, ratio
from torch import Tensor

from discrete_lit.pretrained import load_pretrained
from discrete_lit.tokenizers import EnCodec

RATE = 24_000


def both_models() -> tuple[EnCodec, Any]:
    """Ours and theirs, of one file of random weights."""
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(0)
    theirs: Any = EncodecModel(EncodecConfig()).eval()
    with torch.no_grad():
        for layer in theirs.quantizer.layers:
            layer.codebook.embed.normal_()
    with tempfile.TemporaryDirectory() as folder:
        save_file(
            {name: value.contiguous() for name, value in theirs.state_dict().items()},
            Path(folder) / "model.safetensors",
        )
        Path(folder, "config.json").write_text(json.dumps({"sampling_rate": RATE}))
        ours = load_pretrained(folder, "encodec")
    assert isinstance(ours, EnCodec)
    return ours.eval(), theirs


def arms(ours: EnCodec, theirs: Any, clip: Tensor, books: int, piece: int) -> dict[str, Callable[[], Tensor]]:
    """Encoding and decoding by both, and decoding piece by piece."""
    tokens = ours.encode(clip, books=books)
    bandwidth = ours.sample_rate / ours.hop * 10 * books / 1000
    codes = tokens.transpose(1, 2)[None].contiguous()

    def streamed() -> Tensor:
        decode = ours.streaming_decoder()
        return torch.cat([decode(part) for part in tokens.split(piece, dim=1)], dim=-1)

    found: dict[str, Callable[[], Tensor]] = {
        "encode": lambda: ours.encode(clip, books=books),
        "encode, transformers": lambda: theirs.encode(clip, bandwidth=bandwidth).audio_codes,
        "decode": lambda: ours.decode(tokens),
        "decode, transformers": lambda: theirs.decode(codes, [None]).audio_values,
        "decode in pieces": streamed,
    }
    assert torch.equal(found["encode, transformers"]()[0].transpose(1, 2), tokens)
    assert (found["decode, transformers"]().clamp(-1, 1) - found["decode"]()).abs().max() < 1e-4
    assert (found["decode"]() - found["decode in pieces"]()).abs().max() < 1e-4
    return found


def real_time(taken: list[Seconds], seconds: float) -> str:
    """How many times faster than the clip plays, by both clocks."""
    wall, processor = (seconds / median(part) for part in zip(*taken, strict=True))
    return f"{wall:.1f} times real time, {processor:.1f} by processor time"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=2.0, help="of the clip")
    parser.add_argument("--books", type=int, default=8, help="8: 6 kbit/s")
    parser.add_argument("--piece", type=int, default=25, help="frames of a piece; 25: a third of a second")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    ours, theirs = both_models()
    clip = 0.1 * torch.randn(1, 1, round(options.seconds * RATE))
    with torch.inference_mode():
        taken = alternate(arms(ours, theirs, clip, options.books, options.piece), options.rounds)
    print(f"{options.seconds} s at {RATE} Hz, {options.books} books, {torch.get_num_threads()} threads")
    for arm, times in taken.items():
        print(f"  {arm:22s} {milliseconds(times)}  {real_time(times, options.seconds)}")
    for arm in ("encode", "decode"):
        print(f"  {arm}: transformers / ours {ratio(taken[f'{arm}, transformers'], taken[arm], 'at least 1')}")
    print(f"  pieces of {options.piece} / whole {ratio(taken['decode in pieces'], taken['decode'], 'at most 1.1')}")


if __name__ == "__main__":
    main()
