"""Frozen text encoders: published ones give the reference's vectors, and a checkpoint carries them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.random_weights import randomise
from safetensors.torch import save_file
from torch import Tensor

from discrete_lit.tokenizers import (
    StaticTextEncoder,
    T5TextEncoder,
    TextTokenizer,
    TransformerTextEncoder,
    text_encoder_from_files,
)

TEXTS = ["a dark coat", "a bright t-shirt and more", "x"]


@pytest.fixture(scope="module")
def text_tokenizer() -> TextTokenizer:
    return TextTokenizer.learn(["a dark coat", "a bright t-shirt"], 280)


def published(kind: str, text_tokenizer: TextTokenizer, **changes: Any) -> tuple[Any, dict[str, Any]]:
    """A model of `transformers` with random weights, and its config.json."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": text_tokenizer.vocab_size,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "max_position_embeddings": 40,
        "attn_implementation": "eager",
        **changes,
    }
    if kind == "t5":
        t5 = {"d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 4}
        sizes = {"vocab_size": text_tokenizer.vocab_size + 5, **t5, **changes}
        made = transformers.T5EncoderModel(transformers.T5Config(**sizes))
    elif kind == "bert":
        made = transformers.BertModel(transformers.BertConfig(**sizes), add_pooling_layer=False)
    else:
        made = transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes))
    randomise(made, 0.3)
    return made.eval(), made.config.to_dict()


def written(folder: Path, model: Any, config: dict[str, Any], text_tokenizer: TextTokenizer) -> dict[str, str]:
    shared = "encoder.embed_tokens.weight"  # of T5 the same tensor as shared.weight
    state = {name: value.contiguous() for name, value in model.state_dict().items() if name != shared}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(text_tokenizer.json, encoding="utf-8")
    return {"weights": str(folder / "model.safetensors"), "tokenizer": str(folder / "tokenizer.json")}


@pytest.mark.parity
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("bert", {}),
        ("clip", {"hidden_act": "quick_gelu"}),
        ("clip", {"hidden_act": "gelu"}),
        ("t5", {"feed_forward_proj": "relu"}),
        ("t5", {"feed_forward_proj": "gated-gelu"}),
        # Distances of all kinds of buckets among 20 ids.
        (
            "t5",
            {
                "feed_forward_proj": "gated-gelu",
                "relative_attention_num_buckets": 8,
                "relative_attention_max_distance": 9,
            },
        ),
    ],
)
def test_vectors_are_those_of_transformers(
    kind: str, changes: dict[str, Any], text_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    model, config = published(kind, text_tokenizer, **changes)
    encoder = text_encoder_from_files(**written(tmp_path, model, config, text_tokenizer), length=20)
    vectors, valid = encoder(TEXTS)
    ids, lengths = text_tokenizer.encode(TEXTS, 20)
    mask = torch.arange(20) < lengths[:, None]
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    assert torch.equal(valid, mask) and vectors.shape == (3, 20, 16)
    torch.testing.assert_close(vectors[valid], expected[valid], rtol=1e-5, atol=1e-5)
    assert float(expected[valid].std()) > 0.1 and not vectors[~valid].any()


def test_a_table_of_vectors(text_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    table = torch.randn(text_tokenizer.vocab_size + 3, 6).half()
    save_file({"embedding.weight": table}, tmp_path / "table.safetensors")
    (tmp_path / "tokenizer.json").write_text(text_tokenizer.json, encoding="utf-8")
    files = {"weights": str(tmp_path / "table.safetensors"), "tokenizer": str(tmp_path / "tokenizer.json")}
    encoder = text_encoder_from_files(**files, length=12)
    vectors, valid = encoder(["a coat"])
    ids, lengths = text_tokenizer.encode(["a coat"], 12)
    assert encoder.dim == 6 and valid.sum() == lengths[0]
    assert torch.equal(vectors[0, : lengths[0]], table.float()[ids[0, : lengths[0]]])
    assert text_encoder_from_files(**files, length=12, sha256=encoder.fingerprint()).dim == 6
    with pytest.raises(ValueError, match="have fingerprint"):
        text_encoder_from_files(**files, sha256="0" * 64)


@pytest.fixture
def encoder(text_tokenizer: TextTokenizer) -> TransformerTextEncoder:
    made = TransformerTextEncoder(text_tokenizer, 8, depth=1, heads=2, mlp_dim=8, positions=12, length=12)
    randomise(made, 0.3)
    return made.requires_grad_(False)


def test_a_text_does_not_depend_on_the_others(encoder: TransformerTextEncoder) -> None:
    together, valid = encoder(TEXTS[:1] + TEXTS[2:])
    for row, text in enumerate(TEXTS[:1] + TEXTS[2:]):
        alone, own = encoder([text])
        assert torch.equal(own[0], valid[row])
        torch.testing.assert_close(alone[0], together[row])


def test_an_empty_text_has_no_vector(encoder: TransformerTextEncoder) -> None:
    vectors, valid = encoder(["", "  ", "a"])
    assert valid.any(dim=1).tolist() == [False, False, True]
    assert not vectors[:2].any() and bool(vectors.isfinite().all())


def test_it_is_never_trained_nor_rounded(encoder: TransformerTextEncoder) -> None:
    expected, _ = encoder(TEXTS[:1])
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = torch.nn.ModuleList([encoder]).train()[0](TEXTS[:1])
    assert torch.equal(found, expected) and not encoder.training and not expected.requires_grad


def test_its_description_builds_it_again(encoder: TransformerTextEncoder, text_tokenizer: TextTokenizer) -> None:
    from discrete_lit.checkpoints import instantiate

    t5 = T5TextEncoder(text_tokenizer, 8, depth=1, heads=2, head_dim=3, mlp_dim=8, gated=False, length=7)
    for made in (encoder, StaticTextEncoder(text_tokenizer, 4, length=9, too_long="cut"), t5):
        again: Any = instantiate(dict(made.hparams))
        again.load_state_dict(made.state_dict())
        assert again.fingerprint() == made.fingerprint()
        assert (again.length, again.too_long, again.dim) == (made.length, made.too_long, made.dim)


def changed(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {**config, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'; read are bert, clip, clip_text_model, t5 and mt5"),
        ({"model_type": "clip_text_model"}, "holds no clip_text_model"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'"),
        ({"position_embedding_type": "relative_key"}, "positions are none that this encoder has"),
        ({"intermediate_size": 25}, "does not fit its config: layers.0.linear1.weight is"),
        ({"num_attention_heads": 3}, "dim=16 must be a multiple of heads=3"),
        ({"max_position_embeddings": 10}, "length=32 is above the 10 positions"),
    ],
)
def test_files_of_another_model_are_refused(
    changes: dict[str, Any], message: str, text_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    model, config = published("bert", text_tokenizer)
    files = written(tmp_path, model, {**config, **changes}, text_tokenizer)
    with pytest.raises(ValueError, match=message):
        text_encoder_from_files(**files)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj 'gated-silu' is none that this encoder has"),
        ({"feed_forward_proj": "gated-gelu"}, "does not fit its config: layers.0.expand.weight is missing"),
        ({"num_layers": 3}, "does not fit its config: layers.2.attention_norm.weight is missing"),
        ({"d_kv": 7}, "does not fit its config: layers.0.query_key_value.weight is"),
        ({"relative_attention_num_buckets": 6}, "buckets a multiple of 4"),
    ],
)
def test_files_of_another_t5_are_refused(
    changes: dict[str, Any], message: str, text_tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    model, config = published("t5", text_tokenizer)
    files = written(tmp_path, model, {**config, **changes}, text_tokenizer)
    with pytest.raises(ValueError, match=message):
        text_encoder_from_files(**files)


def test_files_that_are_not_there(text_tokenizer: TextTokenizer, tmp_path: Path) -> None:
    model, config = published("bert", text_tokenizer)
    files = written(tmp_path, model, config, text_tokenizer)
    with pytest.raises(ValueError, match=r"nowhere\.safetensors': no such file"):
        text_encoder_from_files("nowhere.safetensors", files["tokenizer"])
    with pytest.raises(ValueError, match="is no safetensors file"):
        text_encoder_from_files(files["tokenizer"], files["tokenizer"])
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"give the config\.json that belongs to"):
        text_encoder_from_files(**files)


def test_ids_beyond_the_table_are_refused(tmp_path: Path, text_tokenizer: TextTokenizer) -> None:
    rows: Tensor = torch.zeros(text_tokenizer.vocab_size - 1, 4)
    save_file({"embedding.weight": rows}, tmp_path / "table.safetensors")
    (tmp_path / "tokenizer.json").write_text(text_tokenizer.json, encoding="utf-8")
    with pytest.raises(ValueError, match=r"has \d+ vectors, and tokenizer=.* \d+ ids"):
        text_encoder_from_files(str(tmp_path / "table.safetensors"), str(tmp_path / "tokenizer.json"))
