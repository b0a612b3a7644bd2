"""The layout of models of text and image in huggingface/transformers: Llama with an image tokenizer beside it.

Each such model is loaded as a `Unified` from its folder: `config.json`, the weights, and the `tokenizer.json`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from torch import Tensor

from discrete_lit.core.trust import printable
from discrete_lit.pretrained.conversion import Arrangement, Conversion, Renaming, TextPart, Tokens, arrange
from discrete_lit.pretrained.layouts import IN_TRAINING, Rules, in_blocks
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

_IMAGE_TOKENIZER = "model.vqmodel."
ABOUT_THE_FILE = "it is about the file, and about the code that reads it"
FILE_KEYS = (
    *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "auto_map"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict", "is_encoder_decoder", "problem_type"),
    *(
        "pretraining_tp",
        "_attn_implementation_autoset",
        "attn_implementation",
        "pruned_heads",
        "chunk_size_feed_forward",
    ),
)


class LlamaLayout:
    """The language model of a file: the arguments of our network, and what becomes of its tensors.

    Args:
        state: the tensors of the file, without those of the image tokenizer.
        settings: its part of the configuration.
        prefix: of its names, but that of the logits.
        heads, context, rotary_base, epsilon: of the published models, where the configuration does not say them.
    """

    def __init__(
        self,
        state: State,
        settings: Settings,
        *,
        prefix: str,
        heads: int,
        context: int,
        rotary_base: float,
        epsilon: float = 1e-5,
    ) -> None:
        self.state, self.prefix = state, prefix
        attention = f"{prefix}.layers.0.self_attn"
        self.size, self.width = state[f"{prefix}.embed_tokens.weight"].shape
        self.tied = "lm_head.weight" not in state
        self.normed = f"{attention}.q_norm.weight" in state
        depth, hidden = state.count(f"{prefix}.layers.{{}}"), len(state[f"{prefix}.layers.0.mlp.gate_proj.weight"])
        rows, shared_rows = (len(state[f"{attention}.{part}_proj.weight"]) for part in "qk")
        if self.normed:
            heads = len(state[f"{attention}.q_norm.weight"])
            settings.agree({"num_attention_heads": heads})
        self.heads = head_number(settings, "num_attention_heads", heads, rows)
        head_dim = rows // self.heads
        self.shared = shared_rows // head_dim
        settings.agree(
            {
                "vocab_size": self.size,
                "hidden_size": self.width,
                "intermediate_size": hidden,
                "num_hidden_layers": depth,
                "num_key_value_heads": self.shared,
                "head_dim": head_dim,
                "tie_word_embeddings": self.tied,
            }
        )
        settings.agree(
            {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "rope_scaling": None}, "what is read has"
        )
        settings.without_effect(IN_TRAINING, "attention_dropout", "initializer_range")
        settings.without_effect(ABOUT_THE_FILE, *FILE_KEYS)
        rotary = settings.section("rope_parameters")
        rotary.agree({"rope_type": "default"}, "what is read has")
        base = rotary.take("rope_theta", settings.take("rope_theta", rotary_base))
        self.context = settings.take("max_position_embeddings", context)
        self.arguments = {
            "width": self.width,
            "depth": depth,
            "heads": self.heads,
            "head_dim": head_dim,
            "key_value_heads": None if self.shared == self.heads else self.shared,
            "mlp_hidden": hidden,
            "norm_epsilon": settings.take("rms_norm_eps", epsilon),
            "rotary_base": base,
            "tied": self.tied,
        }

    def rules(self) -> list[tuple[str, str]]:
        """Give the rules of its names."""
        norms: Rules = (
            ("attention.norms.gains", "self_attn.{q_norm|k_norm}.weight"),
            ("attention.norms.offsets", "self_attn.{q_norm|k_norm}.bias"),
        )
        block = [
            ("attention.query_key_value.weight", "self_attn.{q_proj|k_proj|v_proj}.weight"),
            ("attention.out.weight", "self_attn.o_proj.weight"),
            ("attention_norm.weight", "input_layernorm.weight"),
            ("mlp_norm.weight", "post_attention_layernorm.weight"),
            ("mlp.expand.weight", "mlp.{gate_proj|up_proj}.weight"),
            ("mlp.contract.weight", "mlp.down_proj.weight"),
            *(norms if self.normed else ()),
        ]
        return [
            ("table.weight", f"{self.prefix}.embed_tokens.weight"),
            ("head.weight", "lm_head.weight"),
            ("final_norm.weight", f"{self.prefix}.norm.weight"),
            *in_blocks(f"{self.prefix}.layers.{{block}}", block),
        ]

    def arrangements(self) -> list[Arrangement]:
        """Put the channels of a head that turn together beside each other: Llama's are half a head apart."""

        def paired(heads: int, *, flat: bool = False) -> Callable[[Tensor], list[Tensor]]:
            def make(rows: Tensor) -> list[Tensor]:
                flattened = rows.flatten() if flat else rows
                return [flattened.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)]

            return make

        layer = f"{self.prefix}.layers.{{layer}}.self_attn"
        made = []
        for part, heads in (("q", self.heads), ("k", self.shared)):
            name = f"{layer}.{part}_proj.weight"
            made.append(Arrangement([name], [name], paired(heads)))
            if self.normed:
                for kind in ("weight", "bias"):
                    name = f"{layer}.{part}_norm.{kind}"
                    made.append(Arrangement([name], [name], paired(heads, flat=True)))
        return made


class LanguageLayout(Protocol):
    """A language model, as a conversion to a `Unified` is told of it."""

    state: State
    prefix: str
    context: int
    arguments: dict[str, Any]

    def rules(self) -> list[tuple[str, str]]: ...

    def arrangements(self) -> list[Arrangement]: ...


def unified_conversion(
    language: LanguageLayout,
    *,
    tokenizer: Conversion | None,
    grid: tuple[int, int],
    codes: int,
    text: TextPart,
    vocabulary: dict[str, Any],
    surrounding: int,
    arrangements: list[Arrangement] | None = None,
    rules: list[tuple[str, str]] | None = None,
    backbone: dict[str, Any] | None = None,
    beside: Mapping[str, Tensor] | None = None,
    encodes_only: bool = False,
    text_length: int | None = None,
    **options: Any,
) -> Conversion:
    """Put a conversion to a `Unified` together.

    Args:
        tokenizer: in the same file; None where there is none.
        surrounding: elements around the ids of an image; what then is left of the context is a text's.
        text_length: the most ids of a caption, where it is less than that.
        arrangements, rules: beside those of the language model.
        backbone: switches of the network beside its sizes.
        options: other arguments of `Unified`.
    """
    length = language.context - grid[0] * grid[1] - surrounding
    if text_length is not None and not 3 <= text_length <= length:
        raise ValueError(
            f"reference_config has max_seq_length={text_length}: from 3 to {length} ids fit beside an image of "
            f"{grid[0]} x {grid[1]} ids in max_position_embeddings={language.context}"
        )
    length = length if text_length is None else text_length
    if length < 3:
        raise ValueError(
            f"reference_config has max_position_embeddings={language.context}, which leaves no text beside an image of "
            f"{grid[0]} x {grid[1]} ids"
        )
    network = {
        "class_path": "discrete_lit.backbones.SegmentTransformer",
        "init_args": {**language.arguments, **(backbone or {})},
    }
    config = {
        "class_path": "discrete_lit.generators.Unified",
        "init_args": {"text_length": length, "backbone": network, "vocabulary": vocabulary, **options},
    }
    tensors = arrange(language.state, [*language.arrangements(), *(arrangements or [])])
    return Conversion(
        config=config,
        tensors=tensors,
        renaming=Renaming([*language.rules(), *(rules or [])]),
        dropped=(f"{language.prefix}.layers.*.self_attn.rotary_emb.inv_freq",),
        beside=beside or {},
        tokens=Tokens(codes, grid),
        tokenizer=tokenizer,
        encodes_only=encodes_only,
        text=text,
    )


def image_tokenizer_apart(state: State) -> tuple[State, State]:
    """Take the tensors of the language model and those of the image tokenizer apart."""
    first = {name: value for name, value in state.items() if name.startswith(_IMAGE_TOKENIZER)}
    own = {name: value for name, value in state.items() if name not in first}
    renamed = {name.removeprefix(_IMAGE_TOKENIZER): value for name, value in first.items()}
    return State(own, state.source), State(renamed, state.source)


def ids_of(names: Mapping[str, int], *tokens: str) -> list[int]:
    """Return the ids of tokens.

    Raises:
        ValueError: there is no such token.
    """
    missing = [token for token in tokens if token not in names]
    if missing:
        raise ValueError(
            f"the tokenizer.json has no token {printable(missing[0])!r}, which this family's has: it is another model's"
        )
    return [names[token] for token in tokens]


def vocabulary_of(settings: Settings, *tokens: str) -> dict[str, int]:
    """Return the ids of all tokens by their names: those of the configuration, and of the `tokenizer.json`.

    Args:
        tokens: which both have alike.

    Raises:
        ValueError: the `tokenizer.json` lacks one of them, or has it elsewhere.
    """
    said = settings.table("vocabulary_map")
    for token, found in zip(tokens, ids_of(settings.tokens, *tokens), strict=True):
        if said.get(token, found) != found:
            raise ValueError(
                f"the tokenizer.json has {printable(token)!r} at {found} and the vocabulary_map of reference_config at "
                f"{said[token]}: one is another model's"
            )
    return dict(settings.tokens) | said


def head_number(settings: Settings, name: str, default: int, width: int) -> int:
    """Return a number of heads, which the tensors do not tell.

    Raises:
        ValueError: it does not divide the width.
    """
    heads = settings.take(name, default)
    if heads < 1 or width % heads:
        raise ValueError(f"reference_config has {settings.where(name)}={heads}, which does not divide {width} channels")
    return heads


def agree_network(settings: Settings, sizes: Mapping[str, Any], codebook_size: int, code_dim: int) -> None:
    settings.agree(
        {
            "embed_dim": code_dim,
            "num_embeddings": codebook_size,
            "latent_channels": sizes["z_channels"],
            "in_channels": sizes["image_channels"],
            "base_channels": sizes["channels"],
            "channel_multiplier": sizes["multipliers"],
            "num_res_blocks": sizes["blocks"],
        }
    )
    settings.agree({"double_latent": False}, "a model with a codebook has")
    settings.without_effect(IN_TRAINING, "dropout", "initializer_range")
    settings.without_effect(ABOUT_THE_FILE, *FILE_KEYS)
