"""Text as tokens."""

import pytest
import torch

from discrete_lit.tokenizers import Characters


def test_texts_come_back() -> None:
    tokenizer = Characters()
    ids = tokenizer.ids(" the quick brown fox")
    assert ids.dtype == torch.int64 and ids[:4].tolist() == [0, 20, 8, 5]
    assert tokenizer.vocab_size == 27 and tokenizer.token_shape(20) == tuple(ids.shape)
    assert tokenizer.texts(ids[None].repeat(2, 1)) == [" the quick brown fox"] * 2
    assert torch.equal(tokenizer.embed(ids[None]).argmax(dim=1), ids[None])


def test_other_symbols_are_another_tokenizer() -> None:
    assert Characters("ab").fingerprint() != Characters("ba").fingerprint() != Characters().fingerprint()
    assert Characters("ba").ids("ab").tolist() == [1, 0]


def test_what_is_refused() -> None:
    for symbols in ("", "a", "aba"):
        with pytest.raises(ValueError, match="at least two characters, each once"):
            Characters(symbols)
    tokenizer = Characters()
    with pytest.raises(ValueError, match=r"characters \['!', 'A'\] that are not among the symbols"):
        tokenizer.ids("A b!")
    with pytest.raises(ValueError, match=r"ids must lie in \[0, 27\)"):
        tokenizer.texts(torch.tensor([[27]]))
    with pytest.raises(ValueError, match="number of characters, must be positive"):
        tokenizer.token_shape(0)
    for call in (tokenizer.encode, tokenizer.decode):
        with pytest.raises(ValueError, match="of which there are no images"):
            call(torch.zeros(1, 4, dtype=torch.int64))
