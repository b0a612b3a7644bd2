"""EnCodec: causality, streaming, bit rates by dropped books, its training, and waveforms that it refuses."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sounds import waveforms, write_tones
from lightning import Trainer
from torch import Tensor

from discrete_lit.data import AudioClips
from discrete_lit.tokenizers import ChunkedEnCodec, EnCodec
from discrete_lit.tokenizers.losses import GradientBalancer, MultiScaleSTFTDiscriminator, SpectrogramAdversarialLoss
from discrete_lit.tokenizers.networks import SEANet

SMALL: dict[str, Any] = {"filters": 4, "ratios": (4, 2), "kernel": 5, "last_kernel": 3}


def codec_of(network: dict[str, Any] | None = None, **settings: Any) -> EnCodec:
    torch.manual_seed(0)
    given = {"codebook_size": 16, "code_dim": 8, "depth": 3, "sample_rate": 8000, "codebook_init": "normal", **settings}
    codec = EnCodec(partial(SEANet, **SMALL, **(network or {})), **given).eval()
    # As new, the codes would be far apart from the latents.
    with torch.no_grad():
        scale = codec.latents(waveforms(2, codec.image_channels, 400)).std()
        for depth, book in enumerate(codec.quantizer.codebooks):
            book.codes.mul_(scale * 8**0.5 * 0.6**depth)
    return codec


def test_shapes_and_values() -> None:
    codec = codec_of()
    tokens = codec.encode(waveforms(2, 1, 83))
    assert tokens.shape == (2, 11, 3) == (2, *codec.token_shape((83,))) and tokens.dtype == torch.int64
    assert codec.decode(tokens).shape == (2, 1, 88) and codec.embed(tokens).shape == (2, 8, 11)
    assert codec.decode(tokens).abs().max() <= 1
    assert codec.bits_per_second == 3 * 4 * 1000 and codec.hop == 8
    assert len(tokens.unique()) > 3  # not all one code
    for size in ((8, 8), (0,)):
        with pytest.raises(ValueError, match="image_size of audio"):
            codec.token_shape(size)


@pytest.mark.parametrize(
    ("network", "causal"),
    [
        ({}, True),
        ({"residual_layers": 2, "norm": "none"}, True),
        ({"causal": False}, False),
        ({"norm": "group"}, False),
    ],
)
def test_later_samples_do_not_change_earlier_codes_of_a_causal_codec(network: dict[str, Any], causal: bool) -> None:
    codec, clip = codec_of(network), waveforms(1, 1, 160)
    other = clip.clone()
    other[..., 80:] = waveforms(1, 1, 80, seed=1)
    latents = [codec.latents(each)[:, :10] for each in (clip, other)]
    assert torch.allclose(*latents, atol=1e-6) == causal
    codes = codec.latents(clip).movedim(-1, 1)
    changed = codes.clone()
    changed[..., 10:] += 1
    heads = [codec.network.decode(each)[..., :80] for each in (codes, changed)]
    assert torch.allclose(*heads, atol=1e-6) == causal


@pytest.mark.parametrize("padding", ["constant", "reflect", "replicate"])
@pytest.mark.parametrize("pieces", [(1,) * 12, (5, 1, 6), (12,)])
def test_streaming_is_the_whole(padding: str, pieces: tuple[int, ...]) -> None:
    codec = codec_of({"padding": padding, "residual_layers": 2})
    tokens = codec.encode(waveforms(2, 1, 96))
    decode = codec.streaming_decoder()
    found = torch.cat([decode(piece) for piece in tokens.split(pieces, dim=1)], dim=-1)
    assert torch.allclose(found, codec.decode(tokens), atol=1e-5)
    if padding == "constant":
        assert codec.streaming_decoder()(tokens[:, :1]).shape == (2, 1, 8)  # the first frame sounds at once


def test_a_clip_shorter_than_the_first_kernel_is_decoded_at_the_end() -> None:
    codec = codec_of({"padding": "reflect"})
    codes = codec.latents(waveforms(1, 1, 16)).movedim(-1, 1)
    stream = codec.network.streaming_decoder()
    assert stream(codes).shape[-1] == 0
    assert torch.equal(stream.finish(), codec.network.decode(codes)) and stream.finish() is None


@pytest.mark.parametrize("network", [{"causal": False}, {"norm": "group"}, {"trim_right": 0.5}])
def test_networks_that_cannot_be_streamed(network: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="cannot decode piece by piece"):
        codec_of(network).streaming_decoder()


def test_fewer_books_are_the_first_ones_and_say_less() -> None:
    codec, clip = codec_of(), waveforms(2, 1, 400)
    whole = codec.encode(clip)
    for books in (1, 2):
        assert torch.equal(codec.encode(clip, books=books), whole[..., :books])
    latents = codec.latents(clip).detach()
    errors = [float((latents - codec.quantizer.lookup(whole[..., :books])).norm()) for books in (1, 2, 3)]
    assert errors[2] < errors[1] < errors[0]
    fewer = codec_of(books=2)
    assert fewer.token_shape((400,)) == (50, 2) and torch.equal(fewer.encode(clip), whole[..., :2])
    assert fewer.fingerprint() != codec.fingerprint()


def test_more_books_than_there_are() -> None:
    codec, clip = codec_of(), waveforms(1, 1, 80)
    for refused in (
        lambda: codec.encode(clip, books=4),
        lambda: codec.decode(torch.zeros(1, 10, 4, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match="has 3 codes for each latent, 4 are asked for"):
            refused()
    for settings in ({"books": 4}, {"training_books": (1, 4)}, {"training_books": ()}):
        with pytest.raises(ValueError, match=r"this codec has 3 codebooks \(depth\)"):
            codec_of(**settings)


def bad_waveforms() -> dict[str, tuple[Tensor, str]]:
    holes = waveforms(3, 1, 80)
    holes[1, 0, 5] = torch.nan
    return {
        "stereo": (waveforms(1, 2, 80), "takes waveforms .B, 1, T. of T > 0 samples"),
        "no channel": (waveforms(1, 80), "takes waveforms .B, 1, T. of T > 0 samples"),
        "empty": (waveforms(1, 1, 0), "takes waveforms .B, 1, T. of T > 0 samples"),
        "nan": (holes, "1 of 3 waveforms have samples that are not finite numbers; their positions in the batch: 1"),
    }


@pytest.mark.parametrize("name", list(bad_waveforms()))
def test_waveforms_that_are_refused(name: str) -> None:
    clip, message = bad_waveforms()[name]
    with pytest.raises(ValueError, match=message):
        codec_of().encode(clip)


def test_silence_and_clips_shorter_than_a_frame() -> None:
    codec = codec_of({"padding": "reflect"})
    assert codec.decode(codec.encode(torch.zeros(1, 1, 80))).isfinite().all()
    tokens = codec.encode(waveforms(1, 1, 3))
    assert tokens.shape == (1, 1, 3) and codec.decode(tokens).shape == (1, 1, 8)


def test_ids_that_are_no_codes() -> None:
    with pytest.raises(ValueError, match=r"token ids must lie in \[0, 16\)"):
        codec_of().decode(torch.full((1, 2, 3), 16))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"filters": 0}, "filters of SEANet must be at least 1"),
        ({"ratios": ()}, "SEANet needs ratios of at least 1"),
        ({"compress": 3}, "a compress that divides filters"),
        ({"norm": "batch"}, "norm of SEANet must be"),
        ({"trim_right": 2.0}, "trim_right of SEANet must lie in"),
    ],
)
def test_settings_of_the_network(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SEANet(8, 8, **{**SMALL, **settings})


def test_it_learns_and_is_measured(tmp_path: Path) -> None:
    """Two steps with everything on: books are dropped, both players move, validation logs what it says."""
    write_tones(tmp_path / "tones")
    data = AudioClips(
        str(tmp_path / "tones"), str(tmp_path / "tones"), sample_rate=8000, length=256, batch_size=4, num_workers=0
    )
    adversarial = SpectrogramAdversarialLoss(MultiScaleSTFTDiscriminator(filters=2, windows=(32, 64)))
    codec = codec_of(
        codebook_init="kmeans",
        training_books=(1, 3),
        spectral_windows=(32, 64),
        adversarial_loss=adversarial,
        balancer=GradientBalancer(),
        optimizer=partial(torch.optim.Adam, lr=1e-3),
    )
    before = {name: value.clone() for name, value in codec.train().state_dict().items()}
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(codec, datamodule=data)
    for part in ("network.encoder", "network.decoder", "quantizer.codebooks.0", "objective.adversarial"):
        moved = [
            name
            for name, value in codec.state_dict().items()
            if name.startswith(part) and (value != before[name]).any()
        ]
        assert moved, part
    logged = trainer.callback_metrics
    assert {
        *(
            "validation/si_snr",
            "validation/si_snr/books_1",
            "validation/si_snr/books_3",
            "validation/spectral_distance",
        ),
        *("validation/bits_per_second", "validation/entropy_bits_per_second", "validation/codebook_usage/depth_2"),
        *("train/waveform", "train/spectral", "train/generator", "train/features", "train/discriminator"),
        *("train/commitment", "train/loss"),
    } <= set(logged)
    assert logged["validation/bits_per_second"] == 3 * 4 * 1000
    assert 0 < logged["validation/entropy_bits_per_second"] <= 12000
    assert logged["validation/si_snr"] == pytest.approx(float(logged["validation/si_snr/books_3"]), abs=1e-3)


def test_books_of_a_step_follow_from_the_step() -> None:
    codec = codec_of(training_books=(1, 2, 3))
    drawn = [codec._books_at(step) for step in range(60)]
    assert drawn == [codec._books_at(step) for step in range(60)] and set(drawn) == {1, 2, 3}
    made = codec.reconstruct(waveforms(1, 1, 80), step=drawn.index(1))
    assert made.tokens is not None and made.tokens.shape == (1, 10, 1)
    assert codec.reconstruct(waveforms(1, 1, 80)).tokens.shape == (1, 10, 3)


def test_data_of_another_sample_rate_are_refused(tmp_path: Path) -> None:
    write_tones(tmp_path)
    data = AudioClips(str(tmp_path), str(tmp_path), sample_rate=16000, length=256, batch_size=2, num_workers=0)
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with pytest.raises(ValueError, match=r"the data have 16000 samples a second .* the codec was made for 8000"):
        trainer.validate(codec_of(), datamodule=data, verbose=False)


def test_the_first_steps_pass_latents_on() -> None:
    """Until `autoencoder_steps` no code is made; then codes begin at the latents of that step."""
    codec, clip = codec_of(autoencoder_steps=2, codebook_init="data").train(), waveforms(4, 1, 83)
    made = codec.reconstruct(clip, step=1)
    assert made.tokens is None and made.losses == {} and made.outputs.shape == clip.shape
    assert torch.equal(made.outputs, codec.outputs(codec.latents(clip))[..., :83])
    assert not codec.quantizer.codebook(0).started
    made = codec.reconstruct(clip, step=2)
    assert made.tokens is not None and "commitment" in made.losses and codec.quantizer.codebook(0).started
    assert codec.reconstruct(clip).tokens is not None
    with pytest.raises(ValueError, match="autoencoder_steps must be at least 0, got -1"):
        codec_of(autoencoder_steps=-1)


def test_squared_errors_of_samples() -> None:
    clip, outputs = waveforms(2, 1, 256), waveforms(2, 1, 256, seed=1)
    squared = codec_of(waveform_loss="l2", waveform_weight=3.0, spectral_windows=(32,)).objective
    assert squared(outputs, clip).terms["waveform"] == pytest.approx(3 * float((outputs - clip).square().mean()))
    with pytest.raises(ValueError, match="waveform_loss must be 'l1' or 'l2', got 'l3'"):
        codec_of(waveform_loss="l3")


def test_chunks_are_cut_and_joined() -> None:
    """Any clip comes back whole from its chunks, each of which has a loudness of 1; a codec of chunks learns."""
    torch.manual_seed(0)
    given = {"codebook_size": 16, "code_dim": 8, "depth": 2, "sample_rate": 8000, "spectral_windows": (32,)}
    network = partial(SEANet, **SMALL, causal=False, norm="group", audio_channels=2)
    codec = ChunkedEnCodec(network, **given, chunk_length=64, overlap=8)
    for length in (3, 56, 57, 300):
        clip = waveforms(2, 2, length)
        parts, scales = codec.cut(clip)
        assert parts.shape[1] == codec.chunks(length)
        assert torch.allclose(codec.join(parts * scales[..., None, None])[..., :length], clip, atol=1e-6)
    assert torch.allclose(parts[:, :-1].mean(dim=2).square().mean(dim=-1), torch.tensor(1.0), atol=1e-4)
    loss, terms, made = codec.train().loss(clip, step=0)
    loss.backward()
    assert made.tokens is not None and made.tokens.shape == (2, *codec.token_shape((300,)))
    assert codec.network.encoder[0].conv.bias.grad.any() and {"waveform", "commitment"} <= set(terms)
    louder = ChunkedEnCodec(network, **given, chunk_length=64, overlap=8, loudness=0.2)
    louder.load_state_dict(codec.state_dict())
    assert louder.fingerprint() != codec.fingerprint()
    with pytest.raises(ValueError, match="decodes whole chunks"):
        codec.streaming_decoder()
    silence = codec.eval().reconstruct_by(torch.zeros(1, 2, 100), 2)
    assert silence.shape == (1, 2, 100) and silence.abs().max() < 1e-4
    for settings in ({"chunk_length": 60}, {"chunk_length": 64, "overlap": 64}, {"chunk_length": 64, "loudness": 0}):
        with pytest.raises(ValueError, match="a chunk must be a multiple of the network's hop, 8 samples"):
            ChunkedEnCodec(network, **given, **{"overlap": 8, **settings})
