"""Building blocks of published layouts: convolutional autoencoders, and generators around a transformer.

- `ConvLayout` reads the sizes of a published autoencoder from its tensors, and maps the names of our `ConvAutoencoder`
  to the published ones. The descendants of taming's VQGAN differ in a few of these names only.
- `generator_conversion` puts a generator's parts together; `TIMM_BLOCK`, `in_blocks`, `class_count` and `square` serve
  several of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor

from discrete_lit.pretrained.conversion import Arrangement, Conversion, Renaming, Tokens, arrange
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

IN_TRAINING = "it acts only in training, where ours has settings of its own"
"""Why dropout and the like have no effect on a model that is loaded."""

_MIDDLE = "encoder.mid"
_BLOCK = [("shortcut.{rest}", "nin_shortcut.{rest}"), ("{rest}", "{rest}")]


@dataclass(frozen=True, kw_only=True)
class ConvLayout:
    """The names under which a layout keeps the parts of encoder and decoder; the defaults are taming's.

    `{level}` counts the encoder's levels from the full resolution and the decoder's from the lowest one, `{mirror}`
    the decoder's from the full one.
    """

    encoder_level: str = "encoder.down.{level}"
    decoder_level: str = "decoder.up.{mirror}"
    block: str = "block.{block}"
    attention: str = "attn.{block}"
    query_key_value: str = "{q|k|v}"
    downsample: str = "downsample.conv"
    upsample: str = "upsample.conv"
    middle: str | None = None
    """With `{index}`; if None, taming's `mid.block_1`, `mid.attn_1`, `mid.block_2`."""
    adaptive_norm: str = "decoder.adaptive.{mirror}"

    def network(self, state: State, *, with_decoder: bool = True, **options: Any) -> dict[str, Any]:
        """Return the configuration of our network: the sizes that shapes tell, and the family's options."""
        return {
            "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
            "init_args": self.sizes(state, with_decoder=with_decoder) | options,
        }

    def levels(self, state: State) -> int:
        """Return the number of resolutions."""
        return state.count(self.encoder_level.replace("{level}", "{}"))

    def renaming(self, levels: int, extra: Sequence[tuple[str, str]] = ()) -> Renaming:
        """Return the renaming from a tokenizer of ours to a checkpoint in this layout; `extra` rules go first."""
        attention = [
            ("query_key_value.{rest}", f"{self.query_key_value}.{{rest}}"),
            ("out.{rest}", "proj_out.{rest}"),
            ("norm.{rest}", "norm.{rest}"),
        ]
        rules = list(extra)
        for half, level, resample in (
            ("encoder", self.encoder_level, self.downsample),
            ("decoder", self.decoder_level, self.upsample),
        ):
            ours = f"network.{half}"
            containers = [
                (f"{ours}.levels.{{level}}.blocks.{{block}}", f"{level}.{self.block}", _BLOCK),
                (f"{ours}.levels.{{level}}.attention.{{block}}", f"{level}.{self.attention}", attention),
            ]
            if self.middle is not None:
                theirs = f"{half}.{self.middle}"
                containers += [(f"{ours}.middle.{{index}}", theirs, tails) for tails in (attention, _BLOCK)]
            else:
                # The second of ours is attention, or a block where there is none.
                named = [
                    (0, "block_1", _BLOCK),
                    (1, "attn_1", attention),
                    (1, "block_2", _BLOCK),
                    (2, "block_2", _BLOCK),
                ]
                containers += [(f"{ours}.middle.{index}", f"{half}.mid.{name}", tails) for index, name, tails in named]
            rules += [
                (f"{own}.{own_tail}", f"{theirs}.{their_tail}")
                for own, theirs, tails in containers
                for own_tail, their_tail in tails
            ]
            rules.append((f"{ours}.levels.{{level}}.resample.conv.{{rest}}", f"{level}.{resample}.{{rest}}"))
            names = ("conv_in", "norm_out", "conv_out")
            rules += [(f"{ours}.{name}.{{rest}}", f"{half}.{name}.{{rest}}") for name in names]
        rules += [
            ("network.encoder.to_latents.{rest}", "quant_conv.{rest}"),
            ("network.decoder.from_codes.{rest}", "post_quant_conv.{rest}"),
            ("network.decoder.adaptive_norms.{level}.gain.{rest}", f"{self.adaptive_norm}.gamma.{{rest}}"),
            ("network.decoder.adaptive_norms.{level}.offset.{rest}", f"{self.adaptive_norm}.beta.{{rest}}"),
        ]
        return Renaming(rules, levels)

    def sizes(self, state: State, *, with_decoder: bool = True) -> dict[str, Any]:
        """Return the arguments of `ConvAutoencoder` that shapes tell; of an encoder alone without a decoder's.

        Raises:
            ValueError: a key that every such network has is missing, or its widths are no multiples of the first.
        """
        levels = self.levels(state)
        conv_in = state["encoder.conv_in.weight"]
        channels = conv_in.shape[0]
        encoder = [self.encoder_level.format(level=level) for level in range(levels)]
        # Like the encoder's, these go from the full resolution down.
        decoder = [self.decoder_level.format(level=levels - 1 - level, mirror=level) for level in range(levels)]
        widths, decoder_widths = (
            [state[f"{level}.{self.block.format(block=0)}.conv1.weight"].shape[0] for level in half]
            for half in (encoder, decoder if with_decoder else encoder)
        )
        uneven = [width for width in widths + decoder_widths if width % channels]
        if uneven:
            raise ValueError(f"{state.source!r} has widths {uneven} that are no multiples of its first one, {channels}")
        block = self.block.replace("{block}", "{}")
        sizes: dict[str, Any] = {
            "image_channels": conv_in.shape[1],
            "out_channels": state["decoder.conv_out.weight"].shape[0] if with_decoder else None,
            "channels": channels,
            "multipliers": [width // channels for width in widths],
            "decoder_multipliers": [width // channels for width in decoder_widths],
            "blocks": state.count(f"{encoder[0]}.{block}"),
            "decoder_blocks": state.count(f"{decoder[0]}.{block}"),
            "middle_blocks": sum(name.startswith(_MIDDLE) and name.endswith(".conv1.weight") for name in state),
            "attention": self._attention(state, "encoder", encoder),
            "decoder_attention": self._attention(state, "decoder", decoder),
            "bias": "encoder.conv_in.bias" in state,
            "encoder_out_kernel": state["encoder.conv_out.weight"].shape[-1],
            "latent_kernel": None,
        }
        if "quant_conv.weight" in state:
            sizes["latent_kernel"] = state["quant_conv.weight"].shape[-1]
            inner = state["decoder.conv_in.weight"].shape[1] if with_decoder else len(state["encoder.conv_out.weight"])
            sizes["z_channels"] = inner
        if not with_decoder:
            of_decoder = ("out_channels", "decoder_multipliers", "decoder_blocks", "decoder_attention")
            sizes = {name: size for name, size in sizes.items() if name not in of_decoder} | {"with_decoder": False}
        return sizes

    def _attention(self, state: State, half: str, levels: Sequence[str]) -> bool | list[int]:
        name = self.attention.format(block=0)
        found = [number for number, level in enumerate(levels) if f"{level}.{name}.norm.weight" in state]
        in_middle = any(name.startswith(f"{half}.mid") and name.endswith(".proj_out.weight") for name in state)
        return found if found or in_middle else False


Rules = Sequence[tuple[str, str]]
"""Pairs of templates of one of our names and of the published one."""

# timm's names of the parts of a transformer block.
TIMM_BLOCK: Rules = (
    ("attention.query_key_value.{rest}", "attn.qkv.{rest}"),
    ("attention.out.{rest}", "attn.proj.{rest}"),
    ("attention_norm.{rest}", "norm1.{rest}"),
    ("mlp_norm.{rest}", "norm2.{rest}"),
    ("mlp.expand.{rest}", "mlp.fc1.{rest}"),
    ("mlp.contract.{rest}", "mlp.fc2.{rest}"),
)


def in_blocks(theirs: str, rules: Rules, ours: str = "blocks.{block}") -> list[tuple[str, str]]:
    """Repeat the rules of a block for all blocks, whose published names are `theirs`."""
    return [(f"{ours}.{own}", f"{theirs}.{published}") for own, published in rules]


def sampled_by(kind: str, **settings: Any) -> dict[str, Any]:
    """Return the configuration of a sampler, with the settings of the published evaluation where they are known."""
    return {"class_path": f"discrete_lit.samplers.{kind}", "init_args": settings}


def generator_conversion(
    kind: str,
    state: State,
    *,
    tokens: Tokens,
    num_classes: int,
    backbone: dict[str, Any],
    rules: Rules,
    arrangements: Sequence[Arrangement] = (),
    dropped: Sequence[str] = (),
    kept: Sequence[str] = (),
    tokenizer: Conversion | None = None,
    beside: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Conversion:
    """Return the conversion of a generator around the `Transformer`.

    Args:
        kind: name of our class.
        state: the published tensors.
        tokens: the tokens that it models.
        num_classes: the number of labels that it knows.
        backbone: switches of the `Transformer`.
        rules: from names of the backbone to published ones, as these are after the arrangements.
        arrangements: changes of the published tensors, in this order.
        dropped, kept, tokenizer, beside: as in `Conversion`.
        options: other arguments of our class.
    """
    transformer = {"class_path": "discrete_lit.backbones.Transformer", "init_args": backbone}
    config = {
        "class_path": f"discrete_lit.generators.{kind}",
        "init_args": {"num_classes": num_classes, "backbone": transformer, **options},
    }
    arranged = arrange(state, arrangements)
    return Conversion(
        config=config,
        tensors=arranged,
        renaming=Renaming(rules),
        dropped=dropped,
        kept=kept,
        tokens=tokens,
        tokenizer=tokenizer,
        beside=beside or {},
    )


def head_count(settings: Settings, name: str, default: int, width: int) -> int:
    """Return the number of attention heads, which the tensors do not tell.

    Raises:
        ValueError: it does not divide the width.
    """
    heads = settings.take(name, default)
    if heads < 1 or width % heads:
        raise ValueError(
            f"reference_config has {settings.where(name)}={heads}, which does not divide the {width} channels"
        )
    return heads


def class_count(state: State, embedding: Tensor, before: int = 0) -> int:
    """Return the number of classes of an embedding with rows for `before` other ids, the classes, and no class.

    Raises:
        ValueError: there is no class at all.
    """
    count = len(embedding) - before - 1
    if count < 1:
        raise ValueError(f"{state.source!r} has {len(embedding)} embeddings for {before} ids: no class is among them")
    return count


def given_length(arguments: Settings, usual: int, *, name: str = "block_size") -> int:
    """Take the number of tokens of a square image from the reference configuration.

    Raises:
        ValueError: it is no square number.
    """
    length = arguments.take(name, usual)
    if length < 1 or isqrt(length) ** 2 != length:
        raise ValueError(
            f"reference_config has {arguments.where(name)}={length}: accepted are square numbers of tokens"
        )
    return length


def square(state: State, length: int) -> tuple[int, int]:
    """Return the token grid of a square image of `length` tokens.

    Raises:
        ValueError: the number of tokens is no square.
    """
    side = isqrt(length)
    if side**2 != length:
        raise ValueError(f"{state.source!r} has {length} tokens, which is no square grid")
    return side, side
