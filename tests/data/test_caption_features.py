"""Vectors of captions beside arrays: made once, read as the encoder would give them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from discrete_lit.cli.encode_captions import encode_captions
from discrete_lit.data import TokenArrays, TokenWriter
from discrete_lit.tokenizers import StaticTextEncoder, TextTokenizer

TEXTS = [["abc", "a"], ["b b"], ["a", "", "ccc"], ["abc"]]


@pytest.fixture
def encoder() -> StaticTextEncoder:
    torch.manual_seed(0)
    made = StaticTextEncoder(TextTokenizer.characters("abc "), 4, length=7)
    made.embedding.weight.data = made.embedding.weight.data.half().float()
    return made


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    common = {"token_shape": (1,), "vocab_size": 4, "image_size": 8, "num_classes": 0, "classes": [], "source": "test"}
    TokenWriter.create(tmp_path, count=4, tokenizer="f", captions=True, **common)
    writer = TokenWriter(tmp_path)
    writer.write(torch.arange(4), torch.arange(4)[:, None], None, captions=TEXTS)
    writer.close()
    TokenWriter.finalise(tmp_path)
    return tmp_path


def test_batches_have_what_the_encoder_gives(tokens: Path, encoder: StaticTextEncoder) -> None:
    manifest = encode_captions(encoder, str(tokens), batch_size=2, accelerator="cpu")
    assert (manifest["captions"], manifest["different"], manifest["dim"]) == (7, 5, 4)
    data = TokenArrays(str(tokens), batch_size=2, context=True)
    seen = set()
    training = data.training_loader(0, 1)
    batches: list[Any] = [*data.evaluation_loader("train"), *(batch for _ in range(9) for batch in training)]
    for batch in batches:
        vectors, valid = encoder(batch["caption"])
        assert torch.equal(batch["context"], vectors) and torch.equal(batch["context_mask"], valid)
        seen |= set(batch["caption"])
    assert seen == {"abc", "a", "b b", "", "ccc"}
    data.check_text_encoder(encoder.fingerprint())
    with pytest.raises(ValueError, match="were made by the text encoder"):
        data.check_text_encoder("0" * 64)
    assert "context" not in next(iter(TokenArrays(str(tokens), batch_size=2).evaluation_loader("train")))


def test_arrays_without_captions_or_vectors(tokens: Path, encoder: StaticTextEncoder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="make them by `discrete-lit encode_captions`"):
        list(TokenArrays(str(tokens), batch_size=2, context=True).evaluation_loader("train"))
    with pytest.raises(ValueError, match="holds no array"):
        encode_captions(encoder, str(tmp_path / "nowhere"))
    short = StaticTextEncoder(TextTokenizer.characters("abc "), 4, length=4)
    with pytest.raises(ValueError, match="'abc' has 5 ids"):
        encode_captions(short, str(tokens), accelerator="cpu")
    # What was not finished is not read.
    with pytest.raises(ValueError, match="holds no vectors of captions"):
        list(TokenArrays(str(tokens), batch_size=2, context=True).evaluation_loader("train"))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / "context.npy").unlink(), "cannot be read"),
        (lambda folder: np.save(folder / "context.npy", np.zeros((3, 4), np.float16)), "are of other arrays"),
        (lambda folder: (folder / "context.json").write_text("{"), "cannot be read"),
    ],
)
def test_vectors_that_were_copied_in_part_are_refused(
    harm: Callable[[Path], Any], message: str, tokens: Path, encoder: StaticTextEncoder
) -> None:
    encode_captions(encoder, str(tokens), accelerator="cpu")
    harm(tokens)
    with pytest.raises(ValueError, match=message):
        list(TokenArrays(str(tokens), batch_size=2, context=True).evaluation_loader("train"))
