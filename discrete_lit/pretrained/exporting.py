"""Write our tokenizers in published layouts, for code that reads those."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from discrete_lit.pretrained import llamagen, taming
from discrete_lit.pretrained.layouts import ConvLayout
from discrete_lit.tokenizers.autoencoder import AutoencoderTokenizer
from discrete_lit.tokenizers.networks import ConvAutoencoder
from discrete_lit.tokenizers.quantizers import VectorQuantizer


@dataclass(frozen=True, kw_only=True)
class ExportLayout:
    """A published layout that can be written, with the settings that are built into the code that reads it."""

    layout: ConvLayout
    wrapper: str
    """The key under which its files keep the weights."""
    normalize: bool
    """Whether codes lie on the unit sphere."""
    attention_anywhere: bool
    """Whether attention may stand at any resolution; else it is at the lowest one and in the middle."""
    same_widths: bool
    """Whether encoder and decoder have the same widths."""
    extra: Mapping[str, tuple[int, ...]]
    """Shapes of tensors that the code demands but never uses."""


EXPORTS = {
    "taming_vqgan": ExportLayout(
        layout=taming.LAYOUT, wrapper="state_dict", normalize=False, attention_anywhere=True, same_widths=True, extra={}
    ),
    "llamagen_vq": ExportLayout(
        layout=llamagen.LAYOUT,
        wrapper="model",
        normalize=True,
        attention_anywhere=False,
        same_widths=False,
        extra={"quantize.codebook_used": (65536,)},
    ),
}

# Settings that both have built in.
_BUILT_IN = {
    "middle_blocks": 2,
    "norm_groups": 32,
    "bias": True,
    "shortcut": "input",
    "encoder_out_kernel": 3,
    "latent_kernel": 1,
    "downsampling": "right",
    "upsampling": "nearest",
    "adaptive_norm": False,
    "pixels": "signed",
    "dims": 2,
    "causal": False,
}


def export_state(tokenizer: Any, family: str) -> dict[str, Tensor]:
    """Return the weights of a tokenizer under the names of a published layout.

    The weights that decide the ids and the images are kept to the bit. Those that only training uses, such as running
    means of the codebook and a discriminator, are left out.

    Args:
        tokenizer: a tokenizer with a `ConvAutoencoder` and a `VectorQuantizer`, built from a configuration.
        family: a name in `EXPORTS`.

    Raises:
        ValueError: the family is unknown, or the layout cannot express the tokenizer; the message says which setting.
    """
    if family not in EXPORTS:
        raise ValueError(
            f"family={family!r} is not written; the layouts are {', '.join(EXPORTS)}, checkpoint, hub, diffusers"
        )
    export = EXPORTS[family]
    _check_parts(tokenizer, family)
    settings = _network_settings(tokenizer)
    wrong = _differences(settings, tokenizer.quantizer, export)
    if wrong:
        raise ValueError(f"the {family} layout cannot express this tokenizer: {'; '.join(wrong)}")
    renaming = export.layout.renaming(len(settings["multipliers"]), [taming.CODES])
    state: dict[str, Tensor] = {}
    for name, value in tokenizer.state_dict().items():
        names = renaming.published(name)
        assert names or not name.startswith("network."), f"no rule for {name}"
        if names:
            parts = value.detach().cpu().chunk(len(names))
            state |= {key: part.clone() for key, part in zip(names, parts, strict=True)}
    return state | {name: torch.zeros(shape) for name, shape in export.extra.items()}


def _check_parts(tokenizer: Any, family: str) -> None:
    kind = type(tokenizer).__name__
    if not isinstance(tokenizer, AutoencoderTokenizer):
        raise ValueError(f"a {kind} cannot be written as {family}: that is a codebook inside a ConvAutoencoder")
    if type(tokenizer.quantizer) is not VectorQuantizer:
        quantizer = type(tokenizer.quantizer).__name__
        raise ValueError(f"a {kind} with a {quantizer} cannot be written as {family}, which has a VectorQuantizer")
    if not isinstance(tokenizer.network, ConvAutoencoder):
        network = type(tokenizer.network).__name__
        raise ValueError(f"a {kind} with a {network} cannot be written as {family}, which has a ConvAutoencoder")
    if "init_args" not in tokenizer.hparams:
        raise ValueError(f"this {kind} was not built from a configuration, so its network's settings are not known")


def _network_settings(tokenizer: AutoencoderTokenizer) -> dict[str, Any]:
    """Return every argument of the network, with defaults resolved."""
    defaults = inspect.signature(ConvAutoencoder).parameters
    settings = {
        name: parameter.default for name, parameter in defaults.items() if name not in ("code_dim", "latent_dim")
    }
    settings |= tokenizer.hparams["init_args"]["network"].get("init_args", {})
    lowest = len(settings["multipliers"]) - 1
    for ours, other in (("decoder_multipliers", "multipliers"), ("decoder_attention", "attention")):
        settings[ours] = settings[other] if settings[ours] is None else settings[ours]
    for name in ("attention", "decoder_attention"):
        settings[name] = [lowest] if settings[name] is True else settings[name]
    if settings["decoder_blocks"] is None:
        settings["decoder_blocks"] = settings["blocks"] + 1
    return {
        name: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
        for name, value in settings.items()
    }


def _differences(settings: Mapping[str, Any], quantizer: VectorQuantizer, export: ExportLayout) -> list[str]:
    expected = {**_BUILT_IN, "decoder_blocks": settings["blocks"] + 1}
    if export.same_widths:
        expected["decoder_multipliers"] = settings["multipliers"]
    if export.attention_anywhere:
        expected["decoder_attention"] = settings["attention"]
    else:
        expected["attention"] = expected["decoder_attention"] = [len(settings["multipliers"]) - 1]
    wrong = [
        f"network.{name} is {settings[name]}, the layout has {value}"
        for name, value in expected.items()
        if settings[name] != value
    ]
    if quantizer.codebook.normalize != export.normalize:
        wrong.append(f"the quantizer's normalize is {quantizer.codebook.normalize}, the layout has {export.normalize}")
    return wrong
