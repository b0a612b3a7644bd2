"""Load a published checkpoint as one of our tokenizers or generators."""

from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import nn

from discrete_lit.checkpoints import instantiate
from discrete_lit.generators.generator import Generator
from discrete_lit.generators.latent_generator import LatentGenerator
from discrete_lit.generators.training import ClassConditionalTraining
from discrete_lit.generators.unified import Unified
from discrete_lit.pretrained.conversion import Conversion, TextPart, Tokens, convert, find_family, recognise
from discrete_lit.pretrained.reading import read_state
from discrete_lit.pretrained.settings import Reference, read_settings
from discrete_lit.tokenizers.autoencoder import ImageAutoencoder
from discrete_lit.tokenizers.encodec import EnCodec
from discrete_lit.tokenizers.hybrid import HybridLatents, HybridVQ
from discrete_lit.tokenizers.text_tokenizer import TextTokenizer, tokens_of
from discrete_lit.tokenizers.tokenizer import Coder, ContinuousTokenizer, Tokenizer

_LARGEST_IMAGE = 2048


def load_pretrained(
    weights: str | Path,
    family: str,
    reference_config: Reference | str | Path | None = None,
    tokenizer: Tokenizer | ContinuousTokenizer | None = None,
    text_tokenizer: TextTokenizer | str | Path | None = None,
) -> ImageAutoencoder | Generator | LatentGenerator | Unified:
    """Load a published checkpoint: our model, in eval mode, with the outputs of the code that published it.

    The model carries its configuration, so `discrete_lit.load` reads a checkpoint of it.

    Args:
        weights: the published file, `torch.save`'s or safetensors; or a folder of Hugging Face, with a file of weights
            or several and their index. No code in it is executed.
        family: a name in `discrete_lit.pretrained.FAMILIES`.
        reference_config: the settings that shapes cannot tell, in the reference's own argument names: the arguments,
            or the path of the published YAML or JSON. Without it they are those of the `config.json` of a folder, or
            the published models' values are taken. Every key is honoured, compared with the tensors, known to change
            nothing, or refused.
        tokenizer: a generator's tokenizer, from this function or `discrete_lit.load`; it is copied. Without one the
            generator has a `TokenGrid` or a `LatentGrid`: it models and samples tokens or latents, but makes no
            images.
        text_tokenizer: that of a model of text and image, or its `tokenizer.json`; by default the one that lies beside
            the weights.

    Returns:
        The tokenizer or generator.

    Raises:
        ValueError: the family is unknown; the file is missing, truncated, has pickled code, or is of another family;
            tensors are missing, unexpected or misshapen; the configuration contradicts the tensors or has a key that is
            not read; the tokenizer makes other tokens; or there is no `tokenizer.json`, or one of another vocabulary.
    """
    known = find_family(family)
    if text_tokenizer is not None and not known.reads_text:
        raise ValueError(f"family={family!r} reads no texts: give no text_tokenizer")
    folder = Path(weights)
    if reference_config is None and (folder / "config.json").is_file():
        reference_config = folder / "config.json"
    state = recognise(known, read_state(weights, known.wrappers, known.averages))
    settings = read_settings(reference_config, known.section)
    try:
        text_file = _text_file(text_tokenizer, folder) if known.reads_text else None
        if text_file is not None:
            settings.tokens = tokens_of(text_file)
        conversion = known.convert(state, settings)
        settings.finish()
        if conversion.tokens is not None:
            if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
                raise ValueError(f"family={family!r} models ids, which a {type(tokenizer).__name__} does not make")
            text = None if text_file is None else _text_tokenizer(conversion.text, text_file)
            return _generator(conversion, conversion.tokens, state.source, tokenizer, text).eval()  # type: ignore[return-value]
        if conversion.latents is not None:
            if isinstance(tokenizer, HybridVQ):
                tokenizer = HybridLatents(tokenizer)
            if tokenizer is not None and not isinstance(tokenizer, ContinuousTokenizer):
                raise ValueError(f"family={family!r} models latents, which a {type(tokenizer).__name__} does not make")
            return _latent_generator(conversion, conversion.latents, state.source, tokenizer).eval()
        if tokenizer is not None:
            raise ValueError(f"family={family!r} is a tokenizer itself: give no tokenizer")
        return _autoencoder(conversion, state.source).eval()
    except ValueError as error:
        if not settings.honoured or "reference_config" in str(error):
            raise
        given = ", ".join(f"{name}={value}" for name, value in settings.honoured.items())
        raise ValueError(f"{error} (built with {given} of reference_config)") from error


def _autoencoder(conversion: Conversion, source: str) -> ImageAutoencoder:
    module = _converted(conversion, source)
    assert isinstance(module, ImageAutoencoder)
    return module


def _converted(conversion: Conversion, source: str) -> LightningModule:
    module = instantiate(conversion.config)
    module.load_state_dict(convert(module.state_dict(), conversion, source))
    return module


def _text_file(given: TextTokenizer | str | Path | None, weights: Path) -> str:
    """Find the `tokenizer.json` that was given, or lies beside the weights.

    Raises:
        ValueError: there is none.
    """
    if isinstance(given, TextTokenizer):
        return given.json
    if given is not None:
        return str(given)
    beside = (weights if weights.is_dir() else weights.parent) / "tokenizer.json"
    if not beside.is_file():
        raise ValueError(
            f"this model reads texts, and there is no tokenizer.json beside {str(weights)!r}: put the published one "
            "there, or give it as text_tokenizer"
        )
    return str(beside)


def _text_tokenizer(part: TextPart | None, file: str) -> TextTokenizer:
    """Read the text tokenizer of a model, by what its configuration says of it.

    Raises:
        ValueError: it is another model's.
    """
    assert part is not None
    text = TextTokenizer.with_special(file, part.special)
    if text.vocab_size > part.size:
        raise ValueError(
            f"the text tokenizer has {text.vocab_size:,} ids and the model {part.size:,}: it is that of another model"
        )
    return text


def _generator(
    conversion: Conversion, tokens: Tokens, source: str, tokenizer: Tokenizer | None, text: TextTokenizer | None
) -> ClassConditionalTraining:
    if conversion.tokenizer is not None:
        if tokenizer is not None and not conversion.encodes_only:
            raise ValueError(f"{source!r} holds its own tokenizer: give no other")
        own = _autoencoder(conversion.tokenizer, source)
        assert isinstance(own, Tokenizer)
        if tokenizer is not None:
            tables = tokenizer.code_tables()
            if tables is None or not torch.equal(tables, own.code_tables()):  # type: ignore[arg-type]
                raise ValueError(f"the tokenizer has other codes than that of {source!r}, which has no decoder")
        tokenizer = tokenizer or own
    if tokenizer is None and tokens.needs_tokenizer:
        raise ValueError(f"the generator of {source!r} runs on the codes of its tokenizer: give it as tokenizer")
    described: dict[str, Any] = {
        "class_path": "discrete_lit.tokenizers.TokenGrid",
        "init_args": {"vocab_size": tokens.vocab_size, "token_shape": list(tokens.shape)},
    }
    image_size = max(tokens.shape)
    if tokenizer is not None:
        image_size, described = _image_size(tokenizer, tokens), _describe(tokenizer)
    arguments = {**conversion.config["init_args"], "tokenizer": described, "image_size": image_size}
    if text is not None:
        arguments["text_tokenizer"] = text.config()
    module = instantiate({**conversion.config, "init_args": arguments}, ClassConditionalTraining)
    assert isinstance(module, ClassConditionalTraining)
    module.backbone.load_state_dict(convert(module.backbone.state_dict(), conversion, source))
    try:
        module.load_state_dict({**module.state_dict(), **conversion.beside})
    except RuntimeError as error:
        raise ValueError(f"the weights of {source!r} do not fit: {error}") from error
    if tokenizer is not None:
        module.tokenizer.load_state_dict(tokenizer.state_dict())
        if isinstance(module, Generator):
            module.read_tokenizer()
    return module


def _latent_generator(
    conversion: Conversion, latents: tuple[int, ...], source: str, tokenizer: ContinuousTokenizer | None
) -> LatentGenerator:
    if conversion.tokenizer is not None:
        if tokenizer is not None:
            raise ValueError(f"{source!r} holds its own tokenizer: give no other")
        own = _converted(conversion.tokenizer, source)
        assert isinstance(own, ContinuousTokenizer)
        tokenizer = own
    described: dict[str, Any] = {
        "class_path": "discrete_lit.tokenizers.LatentGrid",
        "init_args": {"latent_shape": list(latents)},
    }
    image_size = max(latents[1:])
    if tokenizer is not None:
        image_size, described = _size_of_latents(tokenizer, latents), _describe(tokenizer)
    arguments = {**conversion.config["init_args"], "tokenizer": described, "image_size": image_size}
    module = instantiate({**conversion.config, "init_args": arguments}, LatentGenerator)
    assert isinstance(module, LatentGenerator)
    networks = set(module.trained_networks())
    named = nn.ModuleDict({name: network for name, network in module.named_children() if network in networks})
    # With a head beside the backbone, names begin with either.
    trained = module.backbone if len(named) == 1 else named
    trained.load_state_dict(convert(trained.state_dict(), conversion, source))
    if tokenizer is not None:
        module.tokenizer.load_state_dict(tokenizer.state_dict())
    return module


def _size_of_latents(tokenizer: ContinuousTokenizer, latents: tuple[int, ...]) -> int:
    """Return the side in pixels of the images whose latents a generator models."""
    for image_size in range(1, _LARGEST_IMAGE + 1):
        try:
            if tuple(tokenizer.latent_shape(image_size)) == latents:
                return image_size
        except ValueError:
            continue
    raise ValueError(
        f"the tokenizer gives no square image up to {_LARGEST_IMAGE} pixels latents of the shape {latents}, which the "
        "generator was trained on"
    )


def _describe(tokenizer: Coder) -> dict[str, Any]:
    if "class_path" not in tokenizer.hparams:
        raise ValueError(f"this {type(tokenizer).__name__} was not built from a configuration, which a generator keeps")
    return {name: tokenizer.hparams[name] for name in ("class_path", "init_args")}


def _image_size(tokenizer: Tokenizer, tokens: Tokens) -> int | tuple[int, ...]:
    """Return the side in pixels of the images, or the samples `(T,)` of the clips, whose tokens a generator models."""
    if tokenizer.vocab_size != tokens.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the generator was trained on {tokens.vocab_size}"
        )
    if isinstance(tokenizer, EnCodec):
        samples = (tokens.shape[0] * tokenizer.hop,)
        if tokenizer.token_shape(samples) != tokens.shape:
            raise ValueError(
                f"the codec gives {tokenizer.books} codes a frame, the generator was trained on {tokens.shape[-1]}"
            )
        return samples
    for image_size in range(1, _LARGEST_IMAGE + 1):
        try:
            if tuple(tokenizer.token_shape(image_size)) == tokens.shape:
                return image_size
        except ValueError:
            continue
    raise ValueError(
        f"the tokenizer gives no square image up to {_LARGEST_IMAGE} pixels the token shape {tokens.shape}, which the "
        "generator was trained on"
    )
