"""Every file of lightning_configs: its command parses it; a tiny version of its model fits, reloads and samples.

The files of lightning_configs/data are tested with the DataModules.
"""

import copy
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.recipe_files import ROOT, configs_of, header_command, layered, read
from helpers.sounds import waveforms, write_tones
from PIL import Image

CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "lightning_configs").rglob("*.yaml"))
PARTS = ("lightning_configs/data/", "lightning_configs/trainer/")
QUIET = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, "enable_model_summary": False}


def named_in(model: dict[str, Any]) -> set[str]:
    """The keys of a model's settings, and of its arguments behind `init_args.`."""
    return {*model, *(f"init_args.{name}" for name in model.get("init_args", {}))}


MODELS = [config for config in CONFIGS if "model" in read(config)]
# The others are of another size or sampler than one of these, over which they are laid: the same where both are shrunk.
# One that reads texts in place of classes is not.
WHOLE = [config for config in MODELS if {"class_path", "init_args.text_encoder"} & named_in(read(config)["model"])]
WITHOUT_MODEL = [config for config in CONFIGS if config not in MODELS and not config.startswith(PARTS)]
LAYERS = [config for config in WITHOUT_MODEL if header_command(config)[0] == "fit"]
FUNCTION_COMMANDS = [config for config in WITHOUT_MODEL if config not in LAYERS]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve noise images of two classes, in folders."""
    root = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for number in range(12):
        folder = root / f"class{number % 2}"
        folder.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from discrete_lit.data.shard_writer import write_shards
    from discrete_lit.data.sources import ClassFolders

    folder = tmp_path_factory.mktemp("shards") / "train"
    write_shards(ClassFolders(str(images)), str(folder), split="train", samples_per_shard=4)
    return folder


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips of two classes, in folders."""
    from helpers.video import write_videos

    return write_videos(tmp_path_factory.mktemp("clips"), count=8, frames=5)


@pytest.fixture(scope="module")
def captioned_shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in shards, with captions beside them, which have a thought."""
    import json
    import shutil

    from discrete_lit.data.captions import Captions
    from discrete_lit.data.shard_writer import write_shards
    from discrete_lit.data.sources import ClassFolders

    root = tmp_path_factory.mktemp("captioned_shards")
    shutil.copytree(images, root / "images")
    for number, file in enumerate(sorted((root / "images").rglob("*.png"))):
        file.with_suffix(".json").write_text(json.dumps({"caption": f"a {number % 2}=1"}))
    write_shards(ClassFolders(str(root / "images"), captions=Captions(kind="json")), str(root / "train"), split="train")
    return root / "train"


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tokenizer: 8x8 images to 4x4 tokens of 16 ids."""
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"), "FSQ", {"levels": [4, 4]})


@pytest.fixture(scope="module")
def multi_scale_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tokenizer of two scales: 8x8 images to 1 + 16 tokens of 16 ids."""
    return write_tokenizer(
        tmp_path_factory.mktemp("scales"), "MultiScaleVQ", {"codebook_size": 16, "code_dim": 4, "scales": [1, 4]}
    )


@pytest.fixture(scope="module")
def hybrid_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with residuals."""
    return write_tokenizer(
        tmp_path_factory.mktemp("hybrid"), "HybridVQ", {"codebook_size": 16, "code_dim": 4, "scales": [1, 4]}
    )


@pytest.fixture(scope="module")
def bits_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tokenizer of bits at two scales: 8x8 images to 1 + 16 tokens of 4 bits."""
    quantizer = {
        "class_path": "discrete_lit.tokenizers.quantizers.MultiScaleBinarySphericalQuantizer",
        "init_args": {"bits": 4, "scales": [1, 4]},
    }
    return write_tokenizer(tmp_path_factory.mktemp("bits"), "VQGAN", {"quantizer": quantizer})


@pytest.fixture(scope="module")
def residual_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tokenizer of four codes a position: 8x8 images to 4x4x4 tokens of 16 ids."""
    return write_tokenizer(tmp_path_factory.mktemp("residual"), "RQVAE", SMALL_CODEBOOK)


@pytest.fixture(scope="module")
def codec_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained codec: frames of 8 samples to two of 16 ids each."""
    from discrete_lit.checkpoints import instantiate, save

    network = {"class_path": "discrete_lit.tokenizers.networks.SEANet", "init_args": SMALL["SEANet"]}
    settings = {**SMALL["EnCodec"], "sample_rate": 8000, "network": network}
    file = tmp_path_factory.mktemp("codec") / "tokenizer.ckpt"
    save(instantiate({"class_path": "discrete_lit.tokenizers.EnCodec", "init_args": settings}), file)
    return file


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight tones of two classes, in folders."""
    folder = tmp_path_factory.mktemp("sounds")
    write_tones(folder)
    return folder


@pytest.fixture(scope="module")
def continuous_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tokenizer of latents: 8x8 images to 4x4 of four channels."""
    return write_tokenizer(tmp_path_factory.mktemp("latents"), "KLVAE", {"latent_channels": 4, "kl_weight": 0.0})


def write_tokenizer(
    folder: Path, kind: str, settings: dict[str, Any], of_network: dict[str, Any] | None = None
) -> Path:
    from discrete_lit.checkpoints import instantiate, save

    small = {"channels": 4, "multipliers": [1, 1], "blocks": 1, "attention": False, "norm_groups": 2}
    network = {
        "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
        "init_args": {**small, **(of_network or {})},
    }
    config = {"class_path": f"discrete_lit.tokenizers.{kind}", "init_args": {**settings, "network": network}}
    save(instantiate(config), folder / "tokenizer.ckpt")
    return folder / "tokenizer.ckpt"


@pytest.fixture(scope="module")
def tokens(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of the tokenizer's tokens, of two classes."""
    return write_tokens(tmp_path_factory.mktemp("tokens"), tokenizer_file, (4, 4))


@pytest.fixture(scope="module")
def captioned_tokens(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of the same with captions."""
    captions = [[f"a {number % 2}", "a"] for number in range(12)]
    return write_tokens(tmp_path_factory.mktemp("captioned_tokens"), tokenizer_file, (4, 4), captions)


@pytest.fixture(scope="module")
def multi_scale_tokens(multi_scale_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many of the tokenizer of two scales."""
    return write_tokens(tmp_path_factory.mktemp("multi_scale_tokens"), multi_scale_file, (17,))


@pytest.fixture(scope="module")
def codec_tokens(codec_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many of the codec, with captions: eight frames of two books."""
    captions = [[f"a {number % 2}"] for number in range(12)]
    return write_tokens(tmp_path_factory.mktemp("codec_tokens"), codec_file, (8, 2), captions, image_size=(64,))


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tokenizer of clips: 5x8x8 to 3x4x4 tokens of 16 ids."""
    network = {"dims": 3, "causal": True}
    return write_tokenizer(tmp_path_factory.mktemp("clip_tokenizer"), "FSQ", {"levels": [4, 4]}, network)


@pytest.fixture(scope="module")
def clip_tokens(clip_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of its tokens with captions."""
    captions = [[f"a {number % 2}"] for number in range(12)]
    folder = tmp_path_factory.mktemp("clip_tokens")
    return write_tokens(folder, clip_file, (3, 4, 4), captions, image_size=(5, 8, 8))


@pytest.fixture(scope="module")
def text_tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chunks of eight characters."""
    from discrete_lit.data.text import write_text

    folder = tmp_path_factory.mktemp("text_tokens")
    write_text("to be or not to be " * 20, folder, length=8, source="Hamlet")
    return folder / "train"


def write_tokens(
    folder: Path,
    tokenizer_file: Path,
    token_shape: tuple[int, ...],
    captions: list[list[str]] | None = None,
    *,
    image_size: int | tuple[int, ...] = 8,
) -> Path:
    import torch

    import discrete_lit
    from discrete_lit.data.token_arrays import TokenWriter

    TokenWriter.create(
        folder,
        count=12,
        token_shape=token_shape,
        vocab_size=16,
        image_size=image_size,
        num_classes=2,
        classes=["zero", "one"],
        tokenizer=discrete_lit.load(tokenizer_file).fingerprint(),
        source="noise",
        captions=captions is not None,
    )
    writer = TokenWriter(folder)
    rows, random = torch.arange(12), torch.Generator().manual_seed(0)
    writer.write(rows, torch.randint(16, (12, *token_shape), generator=random), rows % 2, captions=captions)
    writer.close()
    TokenWriter.finalise(folder)
    return folder


@pytest.fixture(scope="module")
def latents(continuous_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of latents of the continuous tokenizer, of two classes, with captions."""
    import torch

    import discrete_lit
    from discrete_lit.data.latent_arrays import LatentWriter

    folder = tmp_path_factory.mktemp("latent_rows")
    LatentWriter.create(
        folder,
        count=12,
        latent_shape=(4, 4, 4),
        storage="moments",
        dtype="float16",
        image_size=8,
        num_classes=2,
        classes=["zero", "one"],
        tokenizer=discrete_lit.load(continuous_file).fingerprint(),
        source="noise",
        captions=True,
    )
    writer = LatentWriter(folder)
    means = torch.randn(12, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    moments, captions = (
        torch.stack((means, torch.full_like(means, -4.0)), dim=1),
        [[f"a {row % 2}"] for row in range(12)],
    )
    writer.write(torch.arange(12), moments, torch.arange(12) % 2, captions=captions)
    writer.close()
    LatentWriter.finalise(folder)
    return folder


@pytest.fixture(scope="module")
def discrete_file(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained generator of the tokens of `tokenizer_file`, of two classes."""
    from discrete_lit.checkpoints import instantiate, save

    settings = {
        "class_path": "discrete_lit.generators.Masked",
        "init_args": {
            "tokenizer": {
                "class_path": "discrete_lit.tokenizers.from_checkpoint",
                "init_args": {"checkpoint": str(tokenizer_file)},
            },
            "image_size": 8,
            "num_classes": 2,
            "backbone": {"class_path": "discrete_lit.backbones.Transformer", "init_args": SMALL_TRANSFORMER},
        },
    }
    file = tmp_path_factory.mktemp("discrete") / "generator.ckpt"
    save(instantiate(settings), file)
    return file


def shrink_data(data: dict[str, Any], folders: dict[str, Path], image_size: int) -> None:
    """Read tiny folders, by the name of the DataModule."""
    kind, arguments = data["class_path"].rpartition(".")[2], data["init_args"]
    place = str(folders[kind])
    arguments.update(train=place, validation=place, batch_size=4, num_workers=0)
    if kind.startswith("Image"):
        arguments["image_size"] = image_size
    if kind == "AudioClips":
        arguments["length"] = 256
    if kind == "VideoClips":
        arguments["image_size"] = [5, image_size, image_size]


SMALL_TRANSFORMER = {"width": 16, "depth": 1, "heads": 2}
SMALL_CODEBOOK = {"codebook_size": 16, "code_dim": 4}
# By class, what makes it fit in a second; settings that a recipe does not name are set only where they must be.
SMALL: dict[str, dict[str, Any]] = {
    "ConvAutoencoder": {"channels": 4, "blocks": 1, "norm_groups": 4},
    "LowResolutionAutoencoder": {
        "widths": [4, 4],
        "blocks": [0, 1],
        "decoder_widths": [4, 4, 4],
        "decoder_blocks": [0, 1, 1],
    },
    "ViTAutoencoder": {"encoder": SMALL_TRANSFORMER, "decoder": SMALL_TRANSFORMER},
    "TiTokAutoencoder": {
        "image_size": 32,
        "latent_tokens": 3,
        "encoder": SMALL_TRANSFORMER,
        "decoder": SMALL_TRANSFORMER,
    },
    "ProxyDecoder": SMALL_CODEBOOK,
    "VectorQuantizer": {"codebook_size": 16, "dim": 4},
    "IndexBackpropagationQuantizer": {"codebook_size": 16, "dim": 4},
    "MultiScaleBinarySphericalQuantizer": {"bits": 4, "scales": [1, 2]},  # of five levels and 32 pixels
    "VQVAE": SMALL_CODEBOOK,
    "RQVAE": SMALL_CODEBOOK,
    "MultiScaleVQ": SMALL_CODEBOOK,
    "HybridVQ": SMALL_CODEBOOK,
    "LFQ": {"bits": 4},
    "DVAE": {**SMALL_CODEBOOK, "latent_dim": 32},
    "EnCodec": {**SMALL_CODEBOOK, "depth": 2, "training_books": [1, 2], "spectral_windows": [32, 64]},
    "SEANet": {"filters": 4, "ratios": [4, 2]},
    "MultiScaleSTFTDiscriminator": {"filters": 2, "windows": [32, 64]},
    "DelayedAutoregressive": {"image_size": [64], "num_classes": 2},
    "DALLEAutoencoder": {"channels": 4, "blocks": 1},
    "KLVAE": {"latent_channels": 4},
    "RawPixels": {"image_channels": 3},  # of the tiny tokenizers
    # What an untrained tokenizer gives has any deviation.
    "LatentDiffusion": {"image_size": 8, "num_classes": 2, "check_scale": False},
    "ContinuousMasked": {"image_size": 8, "num_classes": 2, "check_scale": False},
    "NextCell": {"image_size": 8, "num_classes": 2, "check_scale": False, "cell_size": 2},
    "DimensionwiseMasked": {"image_size": 8, "num_classes": 2, "check_scale": False, "levels": 4},
    "DisCon": {"image_size": 8, "num_classes": 2, "check_scale": False},
    "HybridNextScale": {"image_size": 8, "num_classes": 2, "check_scale": False, "least_kept": 4},
    "ContinuousNextScale": {
        "image_size": 8,
        "num_classes": 2,
        "check_scale": False,
        "scales": [1, 4],
        "deviations": [0.5, 1.0],
    },
    "ScaleTransformer": {**SMALL_TRANSFORMER, "mlp_hidden": 16},
    "HybridScaleSampler": {"top_k": 8},
    "TokenDiffusionDecoder": {"image_size": 8, "check_scale": False},
    "RawFrames": {"hop": 8},
    "MaskedAutoencoder": {**SMALL_TRANSFORMER, "buffer": 2},
    "CellTransformer": SMALL_TRANSFORMER,
    "ChannelHead": {**SMALL_TRANSFORMER, "order": [2, 0, 3, 1]},
    "TokenDiffusionHead": {"width": 16, "depth": 1},
    "ContinuousAutoregressive": {"image_size": 8, "num_classes": 2, "check_scale": False, "hidden_width": 16},
    "MARSampler": {"steps": 2},
    "MaskGITSampler": {"steps": 4},
    "DimensionwiseSampler": {"steps": 2},
    "DiT": SMALL_TRANSFORMER,
    "UNet": {"channels": 4, "blocks": 1, "class_width": 4, "norm_groups": 2, "head_dim": 2},
    "DDPM": {"steps": 4},
    "DDIM": {"steps": 4},
    "EulerMaruyama": {"steps": 4},
    "Heun": {"steps": 2},
    "LPIPS": {"weights_path": "random"},
    "AlignmentLoss": {"model_name": "test_vit.r160_in1k", "weights_path": "random", "image_size": 32},
    "TimmFeatures": {"model_name": "test_convnext.r160_in1k", "weights_path": "random", "image_size": 32},
    "TorchvisionLogits": {"model_name": "squeezenet1_1", "weights_path": "random", "image_size": 32},
    "AdversarialLoss": {"start_step": 0},
    "BlurPoolDiscriminator": {"width": 4},
    "PatchGAN": {"width": 4},
    "ClipStyleGANDiscriminator": {"image_size": [5, 32, 32], "width": 4, "multipliers": [2, 2]},
    "StyleGANDiscriminator": {"image_size": 32, "width": 4, "max_width": 8},
    "DINODiscriminator": {
        "model_name": "test_vit.r160_in1k",
        "weights_path": "random",
        "layers": [0, 1],
        "image_size": 32,
    },
    "Transformer": SMALL_TRANSFORMER,
    "TextTransformer": {**SMALL_TRANSFORMER, "width": 4},
    "SegmentTransformer": SMALL_TRANSFORMER,
    "Unified": {"image_size": 8},
    "TextVideoAudio": {"image_size": [5, 8, 8], "audio_length": 64, "text_length": 8},
    "Masked": {"image_size": 8, "num_classes": 2},
    "SuperResolution": {"image_size": 8, "num_classes": 2},
    "Autoregressive": {"image_size": 8, "num_classes": 2},
    "NextScale": {"image_size": 8, "num_classes": 2},
    "BitwiseNextScale": {"image_size": 8, "num_classes": 1},
    "DiscreteDiffusion": {"image_size": 8, "num_classes": 2},
    "AncestralSampler": {"steps": 4},
    "HaltonSampler": {"steps": 4},
    "RandomOrderSampler": {"steps": 4},
    "MaskBitSampler": {"steps": 4},
    "BARSampler": {"bit_counts": [2, 2]},
    "MaskedBitHead": {"width": 8, "depth": 1},
    "BinaryFlowHead": {"width": 16, "depth": 1, "modulations": 1},
    "FactorisedHead": {"sizes": [4, 4]},
    "ImageClassifier": {"channels": [4, 4], "num_classes": 2},
}


def shrink_model(settings: Any, files: dict[str, Path]) -> None:
    """The same classes and switches at a size that fits in a second, on the checkpoints that `files` has by loader."""
    if not isinstance(settings, dict):
        return
    if "class_path" in settings:
        name = settings["class_path"].rpartition(".")[2]
        arguments = settings.setdefault("init_args", {})
        arguments.update(SMALL.get(name, {}))
        if name == "FactorisedHead" and "codes" in arguments:
            arguments["sizes"] = [16] * 4  # of `residual_file`
        if "code_dim" in arguments:
            arguments["code_dim"] = 4
        if name == "ImageClassifier" and "network" in arguments:
            del arguments["channels"]
        if name in files:
            arguments["checkpoint"] = str(files[name])
        if name == "ConvAutoencoder":
            arguments.update({key: 1 for key in ("decoder_blocks", "middle_blocks") if key in arguments})
            if "z_channels" in arguments:
                arguments["z_channels"] = 4
        if name in ("MultiScaleVQ", "HybridVQ"):
            shrink_model(arguments["network"], files)
            arguments["scales"] = [1, latent_side(arguments["network"])]
        if name == "text_encoder_from_files":
            settings["init_args"] = tiny_text_encoder()
        if name == "TextIds":
            arguments.update(text_tokenizer=dict(text_ids().hparams)["init_args"]["text_tokenizer"], length=8)
        if name == "TextTokenizer":
            settings.update(small_text_tokenizer())
        if "context_dim" in arguments:
            arguments["context_dim"] = 4
        if "grid_vocab" in arguments:
            arguments["grid_vocab"] = 16
        if "embedded_digits" in arguments:
            # Of the ids of `tokenizer_file`.
            arguments["embedded_digits"] = [4, 4]
    for value in settings.values():
        shrink_model(value, files)


@cache
def tiny_text_encoder() -> dict[str, Any]:
    """Files of a table of vectors of characters, for `text_encoder_from_files`."""
    import torch
    from safetensors.torch import save_file

    folder, words = Path(tempfile.mkdtemp()), text_ids().text_tokenizer
    save_file({"table": torch.randn(words.vocab_size, 4)}, folder / "table.safetensors")
    (folder / "tokenizer.json").write_text(words.json, encoding="utf-8")
    return {"weights": f"{folder}/table.safetensors", "tokenizer": f"{folder}/tokenizer.json", "length": 8}


@cache
def text_ids() -> Any:
    """An encoder of the ids of characters."""
    from discrete_lit.tokenizers import TextIds, TextTokenizer

    return TextIds(TextTokenizer.characters("a 01="), length=8)


def small_text_tokenizer() -> dict[str, Any]:
    """Characters, in place of a vocabulary that a command learns."""
    from discrete_lit.tokenizers import TextTokenizer

    return TextTokenizer.characters("a 01=").config()


def latent_side(network: dict[str, Any]) -> int:
    """The side of the latent grid of images of 32 pixels."""
    arguments = network["init_args"]
    halvings = len(arguments["widths"]) if "widths" in arguments else len(arguments["multipliers"]) - 1
    return (32 - 2 * arguments.get("border", 0)) // 2**halvings


def write_stages_before(model: dict[str, Any], folder: Path) -> None:
    """The checkpoints that a shrunk tokenizer begins with."""
    from discrete_lit.checkpoints import instantiate, save

    arguments = model["init_args"]
    if model["class_path"].endswith("HybridVQ"):
        arguments["first_stage"] = str(folder / "first.ckpt")
        of_codebook = (
            "codebook_size",
            "code_dim",
            "scales",
            "codebook_update",
            "codebook_init",
            "decay",
            "revive_below",
        )
        parts = {key: arguments[key] for key in ("network", *of_codebook) if key in arguments}
        first = {"class_path": "discrete_lit.tokenizers.MultiScaleVQ", "init_args": parts}
        save(instantiate(copy.deepcopy(first)), folder / "first.ckpt")
        return
    if "proxy_tokenizer" in arguments:
        arguments["proxy_tokenizer"] = str(folder / "proxy.ckpt")
        proxy = copy.deepcopy(arguments["network"]["init_args"]["proxy"])
        proxy["class_path"] = "discrete_lit.tokenizers.VQVAE"
        save(instantiate(proxy), folder / "proxy.ckpt")
    if "first_stage" in arguments:
        arguments["first_stage"] = str(folder / "first.ckpt")
        parts = {key: arguments[key] for key in ("network", "quantizer")}
        save(instantiate(copy.deepcopy({**model, "init_args": parts})), folder / "first.ckpt")


def write_base(model: dict[str, Any], file: Path) -> None:
    """The checkpoint that a second stage is given: the generator of small images, of the same tokens and texts."""
    from discrete_lit.checkpoints import instantiate, save

    arguments = copy.deepcopy({**model["init_args"], "optimizer": None, "scheduler": None})
    arguments.pop("discrete")
    arguments["backbone"]["init_args"].pop("grid_vocab")
    save(instantiate({"class_path": "discrete_lit.generators.Masked", "init_args": arguments}), file)
    model["init_args"]["discrete"]["init_args"]["checkpoint"] = str(file)


def first_of_each_kind(configs: list[str]) -> list[Any]:
    """The recipes as cases: the first of each class of model, network and quantizer, and the others as slow ones."""
    kinds = []
    for config in configs:
        model = layered(config)["model"]
        parts = model, model["init_args"].get("backbone"), model["init_args"].get("quantizer")
        kinds.append(tuple((part or {}).get("class_path", "").rpartition(".")[2] for part in parts))
    return [
        pytest.param(config, marks=() if kinds.index(kind) == place else pytest.mark.slow)
        for place, (config, kind) in enumerate(zip(configs, kinds, strict=True))
    ]


@pytest.mark.parametrize("config", first_of_each_kind(WHOLE))
def test_models_fit_reload_and_sample(
    config: str,
    images: Path,
    shards: Path,
    captioned_shards: Path,
    clips: Path,
    tokens: Path,
    captioned_tokens: Path,
    multi_scale_tokens: Path,
    text_tokens: Path,
    tokenizer_file: Path,
    multi_scale_file: Path,
    bits_file: Path,
    residual_file: Path,
    hybrid_file: Path,
    continuous_file: Path,
    latents: Path,
    discrete_file: Path,
    codec_file: Path,
    codec_tokens: Path,
    clip_file: Path,
    clip_tokens: Path,
    sounds: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    import discrete_lit
    from discrete_lit.callbacks import Throughput
    from discrete_lit.cli.commands import main
    from discrete_lit.evaluation.classifier import load_classifier
    from discrete_lit.generators import TokenDiffusionDecoder
    from discrete_lit.tokenizers import ContinuousTokenizer

    # A quarter of the time, and tested in tests/callbacks/test_throughput.py.
    monkeypatch.setattr(Throughput, "_flops", lambda *_: 0)
    settings = layered(config)
    is_generator = "backbone" in settings["model"]["init_args"]
    kind = settings["model"]["class_path"].rpartition(".")[2]
    of_scales = kind == "NextScale"
    own_files = {
        "NextScale": multi_scale_file,
        "BitwiseNextScale": bits_file,
        "HybridNextScale": hybrid_file,
    }
    own_file = own_files.get(kind, tokenizer_file)
    if settings["model"]["init_args"].get("stacked_codes"):
        own_file = residual_file
    of_audio = is_generator and isinstance(settings["model"]["init_args"]["image_size"], list)
    of_audio = of_audio and len(settings["model"]["init_args"]["image_size"]) == 1
    own_file = codec_file if of_audio else own_file
    of_text = is_generator and settings["model"]["init_args"]["tokenizer"]["class_path"].endswith("Characters")
    encodes_text = "text_encoder" in settings["model"]["init_args"]
    reads_text = encodes_text or kind in ("Unified", "TextVideoAudio")
    own_tokens = multi_scale_tokens if of_scales else text_tokens if of_text else tokens
    own_tokens = captioned_tokens if reads_text else own_tokens
    own_tokens = codec_tokens if of_audio else own_tokens
    folders = {
        "ImageShards": captioned_shards if reads_text else shards,
        "ImageFolder": images,
        "VideoClips": clips,
        "TokenArrays": own_tokens,
        "PairedTokenArrays": clip_tokens,
        "LatentArrays": latents,
        "AudioClips": sounds,
    }
    if reads_text and "captions" in settings["data"]["init_args"]:
        settings["data"]["init_args"]["captions"] = {"kind": "txt"}  # as `shards` writes them
    shrink_data(settings["data"], folders, image_size=8 if is_generator else 32)
    if is_generator and "image_channels" in settings["data"]["init_args"]:
        settings["data"]["init_args"]["image_channels"] = 3  # of the tiny tokenizers
    files = {
        "from_checkpoint": own_file,
        "continuous_from_checkpoint": continuous_file,
        "generator_from_checkpoint": discrete_file,
    }
    shrink_model(settings["model"], files)
    if kind == "TextVideoAudio":
        for name, file in (("tokenizer", clip_file), ("audio_tokenizer", codec_file)):
            settings["model"]["init_args"][name]["init_args"]["checkpoint"] = str(file)
        settings["data"]["init_args"].update(audio_train=str(codec_tokens), audio_validation=str(codec_tokens))
        settings["model"]["init_args"]["sampler"]["init_args"]["settings"]["video"]["top_k"] = 8
    if encodes_text:
        settings["model"]["init_args"]["num_classes"] = 1
    if of_audio:
        settings["model"]["init_args"]["image_size"] = [64]
        if "length" in settings["data"]["init_args"]:
            settings["data"]["init_args"]["length"] = 64
        head = settings["model"]["init_args"]["backbone"]["init_args"].get("place_head", {"init_args": {}})
        head["init_args"]["sizes"] = [16] * 2
    if kind == "SuperResolution":
        write_base(settings["model"], tmp_path / "base.ckpt")
    write_stages_before(settings["model"], tmp_path)
    settings["run_dir"] = str(tmp_path / "run")
    settings["trainer"].update(QUIET, max_steps=1, limit_val_batches=1, val_check_interval=1)
    settings["trainer"].pop("check_val_every_n_epoch", None)
    settings["trainer"].pop("accumulate_grad_batches", None)  # there are twelve samples
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.safe_dump(settings))
    main(["fit", "--config", str(file)])

    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    if settings["model"]["class_path"].endswith("ImageClassifier"):
        assert load_classifier(checkpoint).training is False
        return
    module = discrete_lit.load(checkpoint)
    if isinstance(module, TokenDiffusionDecoder):
        decoded = module.decode(torch.randint(16, (3, *module.token_shape)))
        assert decoded.shape == ((3, 1, 64) if of_audio else (3, 3, 8, 8))
        return
    if is_generator:
        output = tmp_path / "samples"
        prompts = ["--prompt", "a 1"] if reads_text else []
        main(["sample", "--ckpt_path", str(checkpoint), "--num_samples", "3", "--output", str(output), *prompts])
        with np.load(output / "samples.npz") as samples:
            if of_audio:
                assert samples["audio"].shape == (3, 64, 1) and (output / "clips" / "000002.wav").is_file()
                return
            if kind == "TextVideoAudio":
                assert samples["arr_0"].shape == (3, 5, 8, 8, 3)
                return
            assert samples["tokens"].shape == (3, 8) if of_text else samples["arr_0"].shape == (3, 8, 8, 3)
        return
    if kind == "EnCodec":
        assert module.decode(module.encode(waveforms(2, 1, 64))).shape == (2, 1, 64)
        return
    size = (5, 32, 32) if module.modality == "video" else (32, 32)
    images_32 = torch.rand(2, module.image_channels, *size) * 2 - 1
    codes = module.encode(images_32)
    continuous = isinstance(module, ContinuousTokenizer)
    assert codes.shape[1:] == (module.latent_shape(size) if continuous else module.token_shape(size))
    assert module.decode(codes).shape == images_32.shape


def printed(arguments: list[str], capsys: pytest.CaptureFixture) -> dict[str, Any]:
    """What the command prints with --print_config."""
    from discrete_lit.cli.commands import main

    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*arguments, "--print_config"])
    assert stopped.value.code in (0, None)
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("config", first_of_each_kind(MODELS) + LAYERS)
def test_the_command_of_the_comment_parses_at_full_size(
    config: str, tokenizer_file: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    command = header_command(config)
    if "--init_from" in command:  # any file: before it prints settings, a command looks whether there is one
        command[command.index("--init_from") + 1] = str(tokenizer_file)
    assert config in configs_of(command)
    settings = printed(command, capsys)
    said = layered(config)
    said.pop("trainer", None)
    check_said(said, settings)
    assert settings["run_dir"], "the recipe's command names a run folder"


def check_said(said: dict[str, Any], settings: dict[str, Any], place: str = "") -> None:
    """What the files say, one laid over the other, is what the command understands, which may fill in more."""
    for key, value in said.items():
        if key.endswith("+"):
            # Added to the list that is there.
            check_value(value, settings[key.removesuffix("+")][-len(value) :], f"{place}{key}")
        else:
            check_value(value, settings[key], f"{place}{key}")


def check_value(said: Any, value: Any, place: str) -> None:
    if isinstance(said, dict):
        assert isinstance(value, dict), place
        check_said(said, value, f"{place}.")
    elif isinstance(said, list):
        assert isinstance(value, list) and len(value) == len(said), place
        for number, (one, other) in enumerate(zip(said, value, strict=True)):
            check_value(one, other, f"{place}[{number}]")
    elif place.endswith("class_path"):
        # Recipes give short names, the command their full paths.
        assert value.rpartition(".")[2] == said.rpartition(".")[2], place
    else:
        assert value == said, place


@pytest.mark.parametrize("config", [config for config in CONFIGS if config.startswith(PARTS[1])])
def test_trainers_parse_with_a_model(
    config: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    base = "lightning_configs/quickstart/masked.yaml"
    settings = printed(["fit", "--config", base, "--config", config], capsys)
    check_said(read(config), settings)


@pytest.mark.parametrize("config", FUNCTION_COMMANDS)
def test_commands_parse(config: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    command = header_command(config)
    assert configs_of(command) == [config]
    settings = printed(command, capsys)
    check_said(read(config), settings)


def class_paths(settings: Any) -> set[str]:
    """Every class path in nested settings."""
    if isinstance(settings, list):
        return set().union(*map(class_paths, settings))
    if not isinstance(settings, dict):
        return set()
    own = {settings["class_path"]} if "class_path" in settings else set()
    return own.union(*map(class_paths, settings.values()))


def test_recipes_name_classes_by_their_short_names() -> None:
    """Functions have no short name."""
    named = set().union(*(class_paths(read(config)) for config in CONFIGS))
    functions = (
        "tokenizers.from_checkpoint",
        "tokenizers.continuous_from_checkpoint",
        "tokenizers.text_encoder_from_files",
        "generators.generator_from_checkpoint",
    )
    assert {path for path in named if "." in path} <= {f"discrete_lit.{name}" for name in functions}


@pytest.mark.slow
def test_a_fresh_fit_knows_every_short_name() -> None:
    """In a process of its own, where no test has imported anything: a name is known once its module is imported."""
    recipes = [config for config in CONFIGS if config in MODELS + LAYERS or config.startswith(PARTS)]
    named = set().union(*(class_paths(read(config)) for config in recipes))
    script = (
        "import discrete_lit.cli.train as train, sys\n"
        "try: train.run_training('fit', ['--print_config'])\n"
        "except (SystemExit, ValueError): pass\n"
        "known, left = set(), [object]\n"
        "while left:\n"
        "    found = set(type.__subclasses__(left.pop())) - known\n"
        "    known |= found; left += found\n"
        "print(*sorted({kind.__name__ for kind in known}), file=sys.__stderr__)\n"
    )
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    known = set(process.stderr.splitlines()[-1].split())
    assert {name for name in named if "." not in name} - known == set()
