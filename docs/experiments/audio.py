"""The codec and the speech of lightning_configs/quickstart_audio: against classical codecs, and heard by a classifier.

    python docs/experiments/audio.py
    python docs/experiments/audio.py --choose    # settings of the sampler, on pairs of training

after the commands of quickstart_audio, in the order of docs/audio.md. Writes audio.md, audio.png (spectrograms) and, to
listen to, runs/quickstart_audio/listen. Needs the extras `audio` and `video` (PyAV's encoders are the classical
codecs).

The codec is measured on whole prompts that it was not trained on. Bits a second are those of a file: of the codec its
ids, each in log2(K) bits, whether its own decoder makes sound of them or diffusion; of the others the file that PyAV or
soundfile writes. The output of a classical codec comes late by some milliseconds: it is moved by the number of samples
that gives it the best SI-SNR.

The classifier of words is a convolution over mel spectra, trained on the ten real recordings, changed in speed, place,
loudness, band and noise. It never hears the codec or the generator.
"""

import argparse
import io
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, log2
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import soundfile
import torch
from PIL import Image, ImageDraw
from shared import processor_minutes, stamp
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.checkpoints import load
from discrete_lit.core.audio import to_int16, write_wav
from discrete_lit.data.audio_clips import decode_audio
from discrete_lit.data.sources import SpokenDigits, SpokenPrompts
from discrete_lit.data.sources.spoken_digits import SLOT, at_speed
from discrete_lit.data.sources.spoken_prompts import DIGITS
from discrete_lit.generators import DelayedAutoregressive, TokenDiffusionDecoder
from discrete_lit.metrics.spectral import MultiScaleSpectralDistance, mel_spectrum, si_snr, spectrogram_image
from discrete_lit.samplers import DelaySampler
from discrete_lit.tokenizers import EnCodec

RATE, LONGEST, MOST_DELAY = 8000, 4 * 8000, 480
WINDOWS = (64, 128, 256, 512, 1024)
CLASSIFIER_STEPS, CLASSIFIER_BATCH = 600, 40
# Guidance and temperature.
SETTINGS = ((1.0, 1.0), (2.0, 0.7), (2.0, 0.5), (3.0, 0.7), (3.0, 0.5))


@dataclass(kw_only=True)
class Row:
    """A codec at a bit rate, over all test clips."""

    name: str
    bits_per_second: float
    si_snr: float
    spectral: float


def prompts(root: Path) -> list[Tensor]:
    """The test prompts, float32 `(1, T)`, four seconds of each at most; those of silence and of tones are left out."""
    source = SpokenPrompts(root, "test")
    clips = [torch.from_numpy(decode_audio(source.read(index), RATE, channels=1)) for index in range(len(source))]
    spoken = zip(clips, source.entries, strict=True)
    return [clip[:, :LONGEST] for clip, entry in spoken if not any(word in entry.key for word in ("silence", "beep"))]


def row(name: str, clips: list[Tensor], made: list[tuple[Tensor, int]]) -> Row:
    """Compare clips `(1, T)` with what a codec makes of them, `(1, T')`, and with the bytes of its file."""
    distance = MultiScaleSpectralDistance(RATE, windows=WINDOWS)
    ratios, distances = [], []
    for clip, (output, _) in zip(clips, made, strict=True):
        padded = F.pad(output, (0, max(clip.shape[1] - output.shape[1], 0)))[:, : clip.shape[1]]
        ratios.append(si_snr(padded[None], clip[None]))
        distances.append(distance(padded[None], clip[None]))
    seconds = sum(clip.shape[1] for clip in clips) / RATE
    rate = 8 * sum(size for _, size in made) / seconds
    return Row(
        name=name,
        bits_per_second=rate,
        si_snr=float(torch.cat(ratios).nanmean()),
        spectral=float(torch.cat(distances).mean()),
    )


def bytes_of(codec: EnCodec, tokens: Tensor) -> int:
    """Count the bytes that ids take, each in log2(K) bits."""
    return ceil(tokens.numel() * log2(codec.vocab_size) / 8)


@torch.no_grad()
def by_books(codec: EnCodec, clips: list[Tensor], books: int) -> list[tuple[Tensor, int]]:
    """Decode clips by their first codes, with the bytes that these take."""
    made = []
    for clip in clips:
        tokens = codec.encode(clip[None], books=books)
        made.append((codec.decode(tokens)[0], bytes_of(codec, tokens)))
    return made


@torch.no_grad()
def by_diffusion(codec: EnCodec, decoder: TokenDiffusionDecoder, clips: list[Tensor]) -> list[tuple[Tensor, int]]:
    """Decode all codes by diffusion, second by second, with the bytes that they take."""
    (frames, _), made = decoder.discrete.token_shape(decoder.image_size), []
    for number, clip in enumerate(clips):
        tokens = codec.encode(clip[None])[0]
        whole = F.pad(tokens, (0, 0, 0, -len(tokens) % frames)).unflatten(0, (-1, frames))
        decoded = decoder.decode(whole, seed=number)
        made.append((decoded.movedim(0, 1).flatten(1)[:, : clip.shape[1]], bytes_of(codec, tokens)))
    return made


def classical(clips: list[Tensor], code: Callable[[np.ndarray], tuple[np.ndarray, int]]) -> list[tuple[Tensor, int]]:
    """Code clips by a function from int16 samples to samples and the bytes of the file, and undo its delay."""
    made = []
    for clip in clips:
        samples, size = code(to_int16(clip)[0].numpy())
        output = torch.from_numpy(samples.astype(np.float32) / 32768)
        output = F.pad(output, (0, max(clip.shape[1] + MOST_DELAY - len(output), 0)))
        moved = torch.stack([output[late : late + clip.shape[1]] for late in range(MOST_DELAY)])
        ratios = si_snr(moved[:, None], clip[None].expand(MOST_DELAY, -1, -1))
        best = 0 if bool(ratios.isnan().all()) else int(ratios.nan_to_num(-1e9).argmax())
        made.append((moved[best][None], size))
    return made


def by_pyav(name: str, container: str, bits: int) -> Callable[[np.ndarray], tuple[np.ndarray, int]]:
    """A codec of FFmpeg, by PyAV."""

    def code(samples: np.ndarray) -> tuple[np.ndarray, int]:
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=container) as file:
            stream = cast(Any, file.add_stream(name, rate=RATE))
            stream.bit_rate, stream.layout = bits, "mono"
            frame = av.AudioFrame.from_ndarray(samples[None], format="s16", layout="mono")
            frame.sample_rate = RATE
            size = stream.codec_context.frame_size or 160
            padded = np.pad(samples, (0, -len(samples) % size))
            for number, start in enumerate(range(0, len(padded), size)):
                part = np.ascontiguousarray(padded[None, start : start + size])
                frame = av.AudioFrame.from_ndarray(part, format="s16", layout="mono")
                frame.sample_rate, frame.pts = RATE, number * size
                for packet in stream.encode(frame):
                    file.mux(packet)
            for packet in stream.encode(None):
                file.mux(packet)
        data = buffer.getvalue()
        resampler = av.AudioResampler(format="s16", layout="mono", rate=RATE)
        with av.open(io.BytesIO(data)) as file:
            found = [part.to_ndarray()[0] for frame in file.decode(audio=0) for part in resampler.resample(frame)] + [
                part.to_ndarray()[0] for part in resampler.resample(None)
            ]
        return np.concatenate(found), len(data)

    return code


def by_soundfile(kind: str, subtype: str) -> Callable[[np.ndarray], tuple[np.ndarray, int]]:
    """A codec of libsndfile."""

    def code(samples: np.ndarray) -> tuple[np.ndarray, int]:
        buffer = io.BytesIO()
        soundfile.write(buffer, samples, RATE, format=kind, subtype=subtype)
        found, _ = soundfile.read(io.BytesIO(buffer.getvalue()), dtype="int16")
        return found, len(buffer.getvalue())

    return code


CLASSICAL = {
    "AMR-NB, 4.75 kbit/s": by_pyav("libopencore_amrnb", "amr", 4750),
    "AMR-NB, 12.2 kbit/s": by_pyav("libopencore_amrnb", "amr", 12200),
    "Opus, 6 kbit/s": by_pyav("libopus", "ogg", 6000),
    "Opus, 12 kbit/s": by_pyav("libopus", "ogg", 12000),
    "GSM 6.10": by_soundfile("WAV", "GSM610"),
    "Vorbis (libsndfile)": by_soundfile("OGG", "VORBIS"),
    "IMA ADPCM": by_soundfile("WAV", "IMA_ADPCM"),
    "G.711 (mu-law)": by_soundfile("WAV", "ULAW"),
}


class WordClassifier(nn.Module):
    """Tell which of ten words a clip of `SLOT` samples says, by its mel spectrum."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 32, 64, 64)
        self.first = nn.Conv1d(32, widths[0], 5, padding=2)
        self.layers = nn.ModuleList(nn.Conv1d(a, b, 5, stride=2, padding=2) for a, b in pairwise(widths))
        self.last = nn.Linear(widths[-1], len(DIGITS))

    def forward(self, clips: Tensor) -> Tensor:  # (B, T) -> (B, 10)
        clips = clips / clips.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-4) * 0.1
        mel = (mel_spectrum(clips[:, None], RATE, window=256, bands=32)[:, 0] + 1e-2).log()
        x = F.gelu(self.first(mel - mel.mean(dim=(1, 2), keepdim=True)))
        for layer in self.layers:
            x = F.gelu(layer(x))
        return self.last(x.mean(dim=-1))


def changed(word: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A real recording, changed in speed (within 12%), place, band, noise: float32 `(SLOT,)`."""
    spoken = at_speed(word, random.uniform(0.88, 1.12))
    # The band: a filter of three taps, from dull to sharp.
    spoken = np.convolve(spoken, [random.uniform(-0.4, 0.4), 1, random.uniform(-0.4, 0.4)], mode="same")
    late = int(random.integers(-400, 400))
    spoken = spoken[max(-late, 0) :]
    clip = np.zeros(SLOT)
    part = spoken[: SLOT - max(late, 0)]
    clip[max(late, 0) : max(late, 0) + len(part)] = part
    return (clip + random.normal(size=SLOT) * np.exp(random.uniform(-8, -3))).astype(np.float32)


def train_classifier(root: Path, seed: int = 0) -> WordClassifier:
    """Train on the ten real recordings."""
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    source = SpokenPrompts(root, "train", part="digits")
    words = [decode_audio(source.read(index), RATE, channels=1)[0].astype(np.float64) for index in range(len(DIGITS))]
    labels_of = [entry.label for entry in source.entries]
    classifier = WordClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3)
    for _ in range(CLASSIFIER_STEPS):
        chosen = random.integers(len(words), size=CLASSIFIER_BATCH)
        clips = torch.from_numpy(np.stack([changed(words[number], random) for number in chosen]))
        loss = F.cross_entropy(classifier(clips), torch.tensor([labels_of[number] for number in chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier.eval()


@torch.no_grad()
def recognised(classifier: WordClassifier, clips: Tensor, texts: list[str]) -> tuple[float, int]:
    """The share of words that the classifier recognises in clips `(N, 2 * SLOT)` of two words, and how many they are.

    Returns:
        The share, and the number of words.
    """
    labels = torch.tensor([[DIGITS.index(word) for word in text.split()] for text in texts])
    halves = clips[:, : 2 * SLOT].unflatten(1, (2, SLOT)).flatten(0, 1)
    right = classifier(halves).argmax(dim=-1) == labels.flatten()
    return float(right.float().mean()), len(right)


def real_pairs(root: Path, count: int) -> tuple[Tensor, list[str]]:
    """Held-out pairs put together from recordings, `(count, 2 * SLOT)`, and what they say."""
    source = SpokenDigits(root, "test", count=count, seed=1)
    clips = [torch.from_numpy(decode_audio(source.read(index), RATE, channels=1)[0]) for index in range(count)]
    return torch.stack(clips), [source.captions(index)[0] for index in range(count)]


@torch.no_grad()
def spoken(
    generator: DelayedAutoregressive, texts: list[str], seed: int, *, sampler: DelaySampler | None = None
) -> Tensor:
    """Draw a clip of each text, `(N, 2 * SLOT)`."""
    tokens = generator.sample(generator.condition_of_texts(texts), sampler, seed=seed)
    return generator.tokenizer.decode(tokens)[:, 0, : 2 * SLOT]


def choose(runs: Path, root: Path) -> None:
    """Print how many words are recognised in 40 pairs of training, by some settings of the sampler."""
    source, classifier = SpokenDigits(root, "train"), train_classifier(root)
    texts = [source.captions(number)[0] for number in range(0, 800, 20)]
    generator = cast(DelayedAutoregressive, load(runs / "speech/checkpoints/last.ckpt"))
    print("| guidance | temperature | words recognised |\n| --: | --: | --: |")
    for guidance, temperature in SETTINGS:
        sampler = DelaySampler(guidance_scale=guidance, temperature=temperature)
        share, _ = recognised(classifier, spoken(generator, texts, 1, sampler=sampler), texts)
        print(f"| {guidance:g} | {temperature:g} | {share:.1%} |")


def draw(pictures: dict[str, Tensor], path: Path) -> None:
    """Write spectrograms, one above another, each of a waveform `(1, T)`, with what it is."""
    images = [(name, spectrogram_image(clip).mul(255).byte().numpy()) for name, clip in pictures.items()]
    high = images[0][1].shape[0] + 18
    sheet = Image.new("L", (max(image.shape[1] for _, image in images), high * len(images)), 255)
    for number, (name, image) in enumerate(images):
        ImageDraw.Draw(sheet).text((2, number * high + 3), name, fill=0)
        sheet.paste(Image.fromarray(image), (0, number * high + 18))
    sheet.quantize(16).save(path, optimize=True)


def listen(folder: Path, name: str, clip: Tensor) -> None:
    """Write a waveform `(1, T)` as a file that plays."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.wav").open("wb") as file:
        write_wav(file, to_int16(clip).T.numpy(), RATE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/quickstart_audio"))
    parser.add_argument("--root", type=Path, default=None, help="the folder of Asterisk's sounds")
    parser.add_argument("--output", type=Path, default=Path("docs/experiments"))
    parser.add_argument("--count", type=int, default=200, help="clips of held-out pairs")
    parser.add_argument("--choose", action="store_true", help="compare settings of the sampler on pairs of training")
    given = parser.parse_args()
    root = given.root or given.runs / "package/usr/share/asterisk/sounds/en_US_f_Allison"
    if given.choose:
        return choose(given.runs, root)
    begun = processor_minutes()
    codec, heard = cast(EnCodec, load(given.runs / "codec/checkpoints/last.ckpt")), given.runs / "listen"
    clips = prompts(root)
    rows, pictures = [], {"original": clips[2]}
    for books in range(1, codec.depth + 1):
        made = by_books(codec, clips, books)
        rows.append(row(f"EnCodec, {books} of {codec.depth} books", clips, made))
        pictures[rows[-1].name] = made[2][0]
    decoder = cast(TokenDiffusionDecoder, load(given.runs / "decoder/checkpoints/last.ckpt"))
    made = by_diffusion(codec, decoder, clips)
    rows.append(row(f"the same {codec.depth} books, decoded by diffusion", clips, made))
    pictures[rows[-1].name] = made[2][0]
    for name, code in CLASSICAL.items():
        made = classical(clips, code)
        rows.append(row(name, clips, made))
        if name.startswith(("AMR-NB, 4", "GSM")):
            pictures[name] = made[2][0]
    for name, clip in pictures.items():
        listen(heard, name.replace(" ", "_").replace(",", "").replace("/", "_per_"), clip)
    lines = [
        *("# Audio: a codec of speech, and words from text", ""),
        f"`python docs/experiments/audio.py`, {stamp()}.",
        *("", f"{len(clips)} prompts that the codec was not trained on, {RATE} Hz.", ""),
        *("| codec | bits/s | SI-SNR (dB) | spectral distance |", "| :-- | --: | --: | --: |"),
        *(f"| {each.name} | {each.bits_per_second:,.0f} | {each.si_snr:.2f} | {each.spectral:.3f} |" for each in rows),
    ]
    classifier = train_classifier(root)
    real, texts = real_pairs(root, given.count)
    share, words = recognised(classifier, real, texts)
    coded = torch.cat([codec.decode(codec.encode(part[:, None]))[:, 0] for part in real.split(20)])
    through, _ = recognised(classifier, coded, texts)
    lines += [
        *("", f"{words} words of {len(set(texts))} held-out pairs; chance is {1 / len(DIGITS):.0%}.", ""),
        *("| clips | words recognised |", "| :-- | --: |"),
        *(f"| recordings | {share:.1%} |", f"| recordings through the codec | {through:.1%} |"),
    ]
    generator = cast(DelayedAutoregressive, load(given.runs / "speech/checkpoints/last.ckpt"))
    drawn = torch.cat([spoken(generator, texts[at : at + 20], at) for at in range(0, len(texts), 20)])
    said, _ = recognised(classifier, drawn, texts)
    confused, _ = recognised(classifier, drawn, texts[1:] + texts[:1])
    lines += [
        f"| generated from the text | {said:.1%} |",
        f"| the same, against the text of another clip | {confused:.1%} |",
    ]
    for number in range(10):
        listen(heard, f"said_{texts[number].replace(' ', '_')}", drawn[number][None])
    pictures[f"recordings: {texts[0]}"], pictures[f"generated: {texts[0]}"] = real[0][None], drawn[0][None]
    pictures[f"generated: {texts[7]}"] = drawn[7][None]
    draw(pictures, given.output / "audio.png")
    lines += ["", f"{processor_minutes() - begun:.1f} minutes of processor.", "", "![Spectrograms](audio.png)", ""]
    (given.output / "audio.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
