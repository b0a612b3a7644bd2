"""EnCodec and MusicGen's decoder as transformers computes them, at random weights; what is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sounds import waveforms
from safetensors.torch import save_file
from torch.nn import functional as F

from discrete_lit.backbones.condition import Condition
from discrete_lit.core.random import CounterRandom
from discrete_lit.pretrained import load_pretrained
from discrete_lit.samplers import DelaySampler
from discrete_lit.tokenizers import ChunkedEnCodec

pytestmark = pytest.mark.parity

SMALL: dict[str, Any] = {
    "target_bandwidths": [1.0, 2.0],
    "sampling_rate": 1600,
    "hidden_size": 8,
    "codebook_dim": 8,
    "codebook_size": 16,
    "num_filters": 4,
    "upsampling_ratios": [4, 2],
    "chunk_length_s": None,
    "overlap": None,
    "normalize": False,
}


def write(model: Any, config: dict[str, Any], folder: Path, *, old_names: bool = False) -> Path:
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    if old_names:
        state = {
            name.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ): value
            for name, value in state.items()
        }
    folder.mkdir(exist_ok=True)
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def encodec_of(settings: dict[str, Any]) -> Any:
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(0)
    model = EncodecModel(EncodecConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        # Codes as far apart as the latents, each book's a fraction of the one before.
        latents = model.encoder(waveforms(4, settings.get("audio_channels", 1), 400))
        for depth, layer in enumerate(model.quantizer.layers):
            layer.codebook.embed.normal_(std=float(latents.std()) * 0.7**depth)
    return model


KINDS: dict[str, dict[str, Any]] = {
    "24 kHz": {},
    "32 kHz": {"use_causal_conv": False, "use_conv_shortcut": False},
    "stereo, with group norms": {"audio_channels": 2, "norm_type": "time_group_norm"},
    "deeper": {"num_residual_layers": 2, "num_lstm_layers": 1, "pad_mode": "constant", "residual_kernel_size": 5},
}


@pytest.mark.parametrize("kind", list(KINDS))
@torch.no_grad()
def test_encodec_is_that_of_transformers(kind: str, tmp_path: Path) -> None:
    """Codes at every bandwidth exactly, waveforms within 1e-4, of clips that frames divide and that they do not."""
    settings = SMALL | KINDS[kind]
    theirs = encodec_of(settings)
    codec = load_pretrained(write(theirs, settings, tmp_path / "codec", old_names=kind == "24 kHz"), "encodec")
    assert codec.sample_rate == 1600 and codec.books == 2 and codec.training_books == (1, 2)
    for length in (160, 203):
        clip = waveforms(2, settings.get("audio_channels", 1), length, seed=length)
        for books, bandwidth in enumerate(settings["target_bandwidths"], start=1):
            encoded = theirs.encode(clip, bandwidth=bandwidth)
            tokens = codec.encode(clip, books=books)
            assert torch.equal(tokens, encoded.audio_codes[0].transpose(1, 2))
            expected = theirs.decode(encoded.audio_codes, encoded.audio_scales).audio_values
            found = codec.outputs(codec.quantizer.lookup(tokens))
            assert (found - expected).abs().max() < 1e-4
            assert torch.equal(codec.decode(tokens), found.clamp(-1, 1))


@torch.no_grad()
def test_encodec_in_chunks_is_that_of_transformers(tmp_path: Path) -> None:
    """The 48 kHz layout: codes and scales of each chunk, and the waveform, of clips padded as their own code does."""
    settings = SMALL | KINDS["stereo, with group norms"] | {"use_causal_conv": False}
    settings |= {"normalize": True, "chunk_length_s": 0.1, "overlap": 0.05}
    theirs = encodec_of(settings)
    codec = load_pretrained(write(theirs, settings, tmp_path / "codec"), "encodec")
    assert isinstance(codec, ChunkedEnCodec) and (codec.chunk_length, codec.overlap) == (160, 8)
    for length, chunks in ((120, 1), (152, 1), (153, 2), (400, 3)):
        clip = waveforms(2, 2, length, seed=length) * torch.linspace(0.1, 1, length)
        encoded = theirs.encode(F.pad(clip, (0, chunks * 152 + 8 - length)), bandwidth=2.0)
        tokens, scales = codec.encode(clip), codec.scales(clip)
        assert codec.chunks(length) == chunks and codec.token_shape([length]) == tokens.shape[1:] == (20 * chunks, 2)
        expected = encoded.audio_codes[:chunks].permute(1, 0, 3, 2).flatten(1, 2)
        assert torch.equal(tokens, expected)
        assert torch.allclose(scales, torch.cat(encoded.audio_scales[:chunks], dim=1))
        whole = theirs.decode(
            encoded.audio_codes, encoded.audio_scales, last_frame_pad_length=encoded.last_frame_pad_length
        ).audio_values
        found = codec.decode(tokens, scales)
        assert (found - whole[..., : found.shape[-1]].clamp(-1, 1))[..., :length].abs().max() < 1e-4
    assert not torch.allclose(codec.decode(tokens), found)
    with pytest.raises(ValueError, match="a chunk of this codec has 20 frames, got ids of 19 frames"):
        codec.decode(tokens[:, :19])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"normalize": True},
            "normalize=True, chunk_length_s=None and overlap=None: the published models",
        ),
        ({"chunk_length_s": 1.0}, "reference_config has normalize=False, chunk_length_s=1.0"),
        ({"num_filters": 8}, "num_filters"),
        ({"upsampling_ratios": [2, 4]}, "upsampling_ratios"),
        ({"pad_mode": "circular"}, "pad_mode"),
        ({"no_such_setting": 1}, "no_such_setting"),
    ],
)
def test_settings_of_encodec_that_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write(encodec_of(SMALL), SMALL | changed, tmp_path / "codec")
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder, "encodec")


DECODER: dict[str, Any] = {
    "vocab_size": 16,
    "max_position_embeddings": 9,
    "num_hidden_layers": 2,
    "ffn_dim": 48,
    "num_attention_heads": 4,
    "hidden_size": 32,
    "num_codebooks": 2,
    "audio_channels": 1,
    "pad_token_id": 16,
    "bos_token_id": 16,
    "activation_function": "gelu",
}


def musicgen_of() -> Any:
    from transformers import MusicgenForCausalLM
    from transformers.models.musicgen.configuration_musicgen import MusicgenDecoderConfig

    torch.manual_seed(0)
    model = MusicgenForCausalLM(MusicgenDecoderConfig(**DECODER)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(std=0.2).add_("norm" in name and name.endswith("weight"))
    return model


@torch.no_grad()
def test_musicgens_decoder_is_that_of_transformers(tmp_path: Path) -> None:
    """Logits behind the start and the delayed codes within 1e-4, given texts or none; and greedy codes exactly."""
    theirs = musicgen_of()
    generator = load_pretrained(write(theirs, DECODER, tmp_path / "decoder"), "musicgen_decoder")
    assert generator.token_shape == (8, 2) and generator.sampler.guidance_scale == 3.0
    context, mask = torch.randn(3, 5, 32), torch.ones(3, 5, dtype=torch.bool)
    mask[0, 3:] = False
    condition = Condition(labels=torch.zeros(3, dtype=torch.int64), context=context, context_mask=mask)
    codes = torch.randint(16, (3, 8, 2))
    sequence = generator.to_sequence(codes).unflatten(1, (-1, 2))
    ids = torch.cat((torch.full((3, 1, 2), 16), sequence.masked_fill(sequence < 0, 16)[:, :-1]), dim=1)

    def of_reference(states: torch.Tensor) -> torch.Tensor:
        flat = ids.transpose(1, 2).reshape(6, -1)
        logits = theirs(flat, encoder_hidden_states=states, encoder_attention_mask=mask.long()).logits
        return logits.unflatten(0, (3, 2)).transpose(1, 2).flatten(1, 2)

    read = sequence.masked_fill(sequence < 0, 16)[:, :-1].flatten(1)
    given = generator.backbone(read, condition)
    assert (given - of_reference(context)).abs().max() < 1e-4
    everywhere = torch.ones(3, dtype=torch.bool)
    null = generator.backbone(read, condition.dropped(everywhere, null_label=1, null_id=None))
    assert (null - of_reference(torch.zeros_like(context))).abs().max() < 1e-4

    greedy = generator.draw(condition, CounterRandom(0, torch.arange(3)), DelaySampler(top_k=1, guidance_scale=3.0))
    found = generator.to_sequence(greedy.tokens)
    read = found.masked_fill(found < 0, 16)[:, :-2]
    ids = torch.cat((torch.full((3, 1, 2), 16), read.unflatten(1, (-1, 2))), dim=1)
    guided = of_reference(torch.zeros_like(context))
    guided = guided + 3.0 * (of_reference(context) - guided)
    assert torch.equal(torch.where(found < 0, -1, guided.argmax(-1)), found)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"audio_channels": 2}, "audio_channels"),
        ({"activation_function": "relu"}, "activation_function"),
        ({"scale_embedding": True}, "scale_embedding"),
        ({"num_codebooks": 4}, "num_codebooks"),
        ({"max_position_embeddings": 1}, "too few for 2 books"),
    ],
)
def test_settings_of_musicgen_that_are_refused(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write(musicgen_of(), DECODER | changed, tmp_path / "decoder")
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder, "musicgen_decoder")


@torch.no_grad()
def test_musicgen_with_its_codec(tmp_path: Path) -> None:
    """The generator's clips are of the codec's samples; a codec with other books is refused."""
    settings = SMALL | {"target_bandwidths": [2.0]}
    theirs = encodec_of(settings)
    codec = load_pretrained(write(theirs, settings, tmp_path / "codec"), "encodec")
    folder = write(musicgen_of(), DECODER, tmp_path / "decoder")
    generator = load_pretrained(folder, "musicgen_decoder", tokenizer=codec)
    assert generator.image_size == (64,) and generator.tokenizer.modality == "audio"
    condition = Condition(labels=torch.zeros(1, dtype=torch.int64), context=torch.randn(1, 4, 32))
    assert generator.tokenizer.decode(generator.sample(condition)).shape == (1, 1, 64)
    single = load_pretrained(
        write(encodec_of(SMALL), SMALL | {"target_bandwidths": [1.0]}, tmp_path / "other"), "encodec"
    )
    with pytest.raises(ValueError, match="the codec gives 1 codes a frame, the generator was trained on 2"):
        load_pretrained(folder, "musicgen_decoder", tokenizer=single)
