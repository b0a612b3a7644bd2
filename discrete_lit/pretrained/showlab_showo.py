"""Show-o, of showlab/Show-o: `showo`, Phi-1.5 over text and masked images."""

from collections.abc import Callable, Sequence

from torch import Tensor

from discrete_lit.pretrained.conversion import Arrangement, Conversion, TextPart, register
from discrete_lit.pretrained.layouts import IN_TRAINING, given_length, head_count, in_blocks, sampled_by, square
from discrete_lit.pretrained.llama_layout import ABOUT_THE_FILE, FILE_KEYS, ids_of, unified_conversion
from discrete_lit.pretrained.reading import State
from discrete_lit.pretrained.settings import Settings

_PREFIX = "showo.model"
# The tokens that the published code adds behind those of Phi's tokenizer, in this order.
_ADDED = ("[PAD]", "<|soi|>", "<|eoi|>", "<|sov|>", "<|eov|>", "<|t2i|>", "<|mmu|>", "<|t2v|>", "<|v2v|>", "<|lvg|>")
_END_OF_TEXT = "<|endoftext|>"


@register(
    "showo",
    marks=("showo.model.embed_tokens.weight", "showo.lm_head.weight", "showo.model.layers.0.mlp.fc1.weight"),
    section=None,
    reads_text=True,
)
def showo(state: State, settings: Settings) -> Conversion:
    """Convert the folder of `showlab/show-o` or `showlab/show-o-512x512`, beside the tokenizer.json of Phi-1.5.

    It models the ids of `showlab/magvitv2`, which is another file and has no family here: without it the model draws
    and describes ids. Settings of Phi, which the file has not, are in the section `phi`; what is published needs none.
    """
    language = PhiLayout(state, settings.section("phi"))
    words, added = settings.take("llm_vocab_size", 50295), settings.take("num_new_special_tokens", len(_ADDED))
    codes = settings.take("codebook_size", language.size - words - added - 1)
    if words < 1 or added < 1 or codes < 1 or words + added + codes + 1 != language.size:
        raise ValueError(
            f"{state.source!r} has {language.size} ids, and reference_config llm_vocab_size={words}, "
            f"num_new_special_tokens={added} and codebook_size={codes}: with the mask these must be all"
        )
    settings.agree({"vocab_size": language.size, "mask_token_id": language.size - 1, "w_clip_vit": False})
    settings.without_effect(ABOUT_THE_FILE, "_class_name", "_diffusers_version", "llm_model_path", *FILE_KEYS)
    length = settings.take("max_seq_length", 128)
    grid = square(state, given_length(settings, 256, name="num_vq_tokens"))
    steps = settings.take("timesteps", 18)
    end = ids_of(settings.tokens, _END_OF_TEXT)[0]
    # Of a tokenizer.json without them, they stand behind its tokens.
    names = {name: words + number for number, name in enumerate(_ADDED)} | dict(settings.tokens)
    special = {"pad": names["[PAD]"] if "[PAD]" in settings.tokens else end, "begin": end, "end": end}
    begins, ends, draw, describe = (names[name] for name in ("<|soi|>", "<|eoi|>", "<|t2i|>", "<|mmu|>"))
    return unified_conversion(
        language,
        tokenizer=None,
        grid=grid,
        codes=codes,
        text=TextPart(special=special, size=words + added),
        vocabulary={
            "size": words + added,
            "image_first": words + added,
            "image_begin": begins,
            "image_end": [ends],
            "mask_id": language.size - 1,
            "text_begin": draw,
            "given_begin": describe,
            "never": [names[name] for name in _ADDED if names[name] < words + added],
        },
        surrounding=3,
        text_length=length,
        order="text_first",
        image_prediction="masked",
        softmax_over="vocabulary",
        # Training predicts the captions of other samples, and not those of images that are drawn.
        text_weight=0.0,
        label_dropout=0.1,
        sampler=sampled_by(
            "SegmentSampler",
            settings={"image": {"guidance_scale": 1 + settings.take("guidance_scale", 1.75)}},
            masked={"steps": steps, "choice_temperature": 1.0, "noise": "product"},
        ),
    )


class PhiLayout:
    """Phi-1.5 in huggingface/transformers: the arguments of our network, and what becomes of the tensors.

    Args:
        state: the tensors of the file.
        settings: its part of the configuration.
    """

    prefix = _PREFIX

    def __init__(self, state: State, settings: Settings) -> None:
        self.state = state
        layer = f"{_PREFIX}.layers.0"
        self.size, self.width = state[f"{_PREFIX}.embed_tokens.weight"].shape
        depth, hidden = state.count(f"{_PREFIX}.layers.{{}}"), len(state[f"{layer}.mlp.fc1.weight"])
        self.heads = head_count(settings, "num_attention_heads", 32, self.width)
        self.head_dim = self.width // self.heads
        self.normed = f"{layer}.self_attn.q_layernorm.weight" in state
        settings.agree(
            {
                "vocab_size": self.size,
                "hidden_size": self.width,
                "intermediate_size": hidden,
                "num_hidden_layers": depth,
                "num_key_value_heads": self.heads,
                "qk_layernorm": self.normed,
                "tie_word_embeddings": False,
            }
        )
        settings.agree({"hidden_act": "gelu_new", "rope_scaling": None}, "what is read has")
        settings.without_effect(IN_TRAINING, "attention_dropout", "resid_pdrop", "embd_pdrop", "initializer_range")
        settings.without_effect(ABOUT_THE_FILE, "bos_token_id", "eos_token_id", "pad_token_id", *FILE_KEYS)
        share = settings.take("partial_rotary_factor", 0.5)
        self.turned = round(self.head_dim * share)
        if not 0 <= self.turned <= self.head_dim or self.turned % 2:
            raise ValueError(
                f"reference_config has phi.partial_rotary_factor={share}, with which {self.turned} of the "
                f"{self.head_dim} channels of a head would turn: an even number of them can"
            )
        self.context = settings.take("max_position_embeddings", 2048)
        settings.without_effect("max_seq_length says how long a text is, which must fit", "max_position_embeddings")
        self.arguments = {
            "width": self.width,
            "depth": depth,
            "heads": self.heads,
            "mlp_hidden": hidden,
            "mlp": "gelu_tanh",
            "norm": "layer",
            "norm_epsilon": settings.take("layer_norm_eps", 1e-5),
            "parallel": True,
            "bias": True,
            "qk_norm": "layer" if self.normed else None,
            "rotary_base": settings.take("rope_theta", 10000.0),
            "rotary_share": share,
        }

    def rules(self) -> list[tuple[str, str]]:
        """Give the rules of its names."""
        block = [
            ("attention.query_key_value.{rest}", "self_attn.{q_proj|k_proj|v_proj}.{rest}"),
            ("attention.norms.query.{rest}", "self_attn.q_layernorm.{rest}"),
            ("attention.norms.key.{rest}", "self_attn.k_layernorm.{rest}"),
            ("attention.out.{rest}", "self_attn.dense.{rest}"),
            ("attention_norm.{rest}", "input_layernorm.{rest}"),
            ("mlp.expand.{rest}", "mlp.fc1.{rest}"),
            ("mlp.contract.{rest}", "mlp.fc2.{rest}"),
        ]
        return [
            ("table.weight", f"{_PREFIX}.embed_tokens.weight"),
            ("head.weight", "showo.lm_head.weight"),
            ("head_bias", "showo.lm_head.bias"),
            ("final_norm.{rest}", f"{_PREFIX}.final_layernorm.{{rest}}"),
            *in_blocks(f"{_PREFIX}.layers.{{block}}", block),
        ]

    def arrangements(self) -> list[Arrangement]:
        """Put the channels of a head that turn together beside each other: Phi's are half of those apart."""
        half = self.turned // 2
        order = [channel for pair in zip(range(half), range(half, 2 * half), strict=True) for channel in pair]
        order += range(2 * half, self.head_dim)
        layer, made = f"{_PREFIX}.layers.{{layer}}.self_attn", list[Arrangement]()
        for part in ("q", "k"):
            for name in ("proj", *(("layernorm",) if self.normed else ())):
                names = [f"{layer}.{part}_{name}.{kind}" for kind in ("weight", "bias")]
                made += [Arrangement([each], [each], _in_heads(order)) for each in names]
        return made


def _in_heads(order: Sequence[int]) -> Callable[[Tensor], list[Tensor]]:
    """Make what puts the channels of each head in an order, along the first axis."""

    def make(rows: Tensor) -> list[Tensor]:
        return [rows.unflatten(0, (-1, len(order)))[:, list(order)].flatten(0, 1)]

    return make
