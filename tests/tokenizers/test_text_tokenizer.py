"""Text to ids and back, and what a checkpoint knows of it."""

import base64
import copy
import pickle
import random
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Published
from tokenizers import decoders, models, pre_tokenizers, processors

from discrete_lit.tokenizers import TextTokenizer, text_tokenizer

CAPTIONS = [f"a {tone} {noun}" for tone in ("dark", "grey", "bright") for noun in ("coat", "ankle boot", "t-shirt")]


@pytest.fixture(scope="module")
def trained() -> TextTokenizer:
    return TextTokenizer.learn(CAPTIONS, 300)


def any_text(number: int) -> str:
    """A text of any characters but halves of surrogate pairs."""
    draw = random.Random(number)
    ranges = ((0, 0x7F), (0, 0x2FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0, 0xD7FF), (0xE000, 0x10FFFF))
    low, high = draw.choice(ranges)
    return "".join(chr(draw.randint(low, high)) for _ in range(draw.randint(0, 40)))


TRAPS = [
    "",
    " ",
    "\n\t ",
    "<pad>",
    "a <end> b<begin>",
    "é e\u0301",
    "  two  spaces ",
    "\x00\ufffd",
    "😀‍👩",
    "it's 100%",
]


@pytest.mark.parametrize("text", [*TRAPS, *map(any_text, range(200))])
def test_any_text_comes_back(trained: TextTokenizer, text: str) -> None:
    ids, lengths = trained.encode([text], 300)
    assert trained.decode(ids) == [text]
    assert ids[0, 0] == trained.begin_id and ids[0, lengths[0] - 1] == trained.end_id
    # What a caption says is no special token.
    special = (ids == trained.pad_id) | (ids == trained.begin_id) | (ids == trained.end_id)
    assert special.sum() == 300 - lengths[0] + 2


def test_ids_of_a_batch(trained: TextTokenizer) -> None:
    ids, lengths = trained.encode(["a dark coat", "a"], 8)
    assert ids.dtype == lengths.dtype == torch.int64 and ids.shape == (2, 8)
    assert (trained.pad_id, trained.begin_id, trained.end_id) == (0, 1, 2)
    assert lengths.tolist() == [2 + len(trained.ids("a dark coat")), 3]
    assert ids[1].tolist() == [1, trained.ids("a")[0], 2, 0, 0, 0, 0, 0]
    assert trained.encode([], 8)[0].shape == (0, 8)
    # Words of the captions became few ids; without learning they would be 11 bytes.
    assert lengths[0] <= 6 and trained.vocab_size <= 300


def test_a_text_ends_at_its_first_end(trained: TextTokenizer) -> None:
    body = trained.ids("a coat")
    ids = torch.tensor([[1, *body, 2, *body], [*body, 0, *body, 0]])
    ids = torch.nn.functional.pad(ids, (0, 2))
    assert trained.decode(ids) == ["a coat", "a coata coat"]


def test_learning_does_not_depend_on_the_order_or_the_process(trained: TextTokenizer) -> None:
    assert TextTokenizer.learn(reversed(CAPTIONS), 300).json == trained.json
    # The module alone: all tokenizers take seconds to import.
    file = text_tokenizer.__file__
    script = (
        "from importlib.util import module_from_spec, spec_from_file_location as found\n"
        f"spec = found('text_tokenizer', {file!r}); module = module_from_spec(spec); spec.loader.exec_module(module)\n"
        f"print(module.TextTokenizer.learn({CAPTIONS!r}, 300).fingerprint())"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == trained.fingerprint(), done.stderr
    assert TextTokenizer.learn(CAPTIONS[1:], 300).fingerprint() != trained.fingerprint()


@pytest.mark.parametrize("again", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made)), None])
def test_the_state_is_one_string(trained: TextTokenizer, tmp_path: Path, again) -> None:
    if again is None:
        (tmp_path / "tokenizer.json").write_text(trained.json, encoding="utf-8")
        made = TextTokenizer(str(tmp_path / "tokenizer.json"))
        assert TextTokenizer(trained.state).json == trained.json
    else:
        made = again(trained)
    assert made.fingerprint() == trained.fingerprint()
    assert torch.equal(made.encode(["<end> dark"], 20)[0], trained.encode(["<end> dark"], 20)[0])
    assert len(trained.state) < len(trained.json)


def test_weights_of_another_tokenizer_are_refused(trained: TextTokenizer) -> None:
    other = TextTokenizer.learn(["something else"], 300)
    holder, strange = torch.nn.ModuleList([trained]), torch.nn.ModuleList([other])
    holder.load_state_dict(torch.nn.ModuleList([TextTokenizer(trained.state)]).state_dict())
    with pytest.raises(ValueError, match=f"text tokenizer {other.fingerprint()}, and this one is"):
        holder.load_state_dict(strange.state_dict())


def test_characters() -> None:
    made = TextTokenizer.characters("0123456789+= ")
    ids, lengths = made.encode(["2+3=5", "10 + 2"], 8)
    assert ids[0].tolist() == [1, 5, 13, 6, 14, 8, 2, 0] and lengths.tolist() == [7, 8]
    assert made.decode(ids) == ["2+3=5", "10 + 2"] and made.vocab_size == 16
    with pytest.raises(ValueError, match=r"'2\*3' has \['\*'\], which this vocabulary lacks"):
        made.encode(["2*3"], 8)
    with pytest.raises(ValueError, match="each once"):
        TextTokenizer.characters("aa")


def published(**special: str) -> str:
    """A tokenizer.json as others write them: BPE of bytes, with truncation and padding set, begin, end or neither."""
    made = Published(models.BPE({token: n for n, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special.values()))
    numbers = [(token, made.token_to_id(token)) for name, token in special.items() if name != "pad"]
    if numbers:
        single = f"{special.get('begin', '')} $A {special.get('end', '')}".strip()
        made.post_processor = processors.TemplateProcessing(single=single, special_tokens=numbers)
    made.enable_truncation(4)
    if "pad" in special:
        made.enable_padding(pad_id=made.token_to_id(special["pad"]), pad_token=special["pad"], length=9)
    return made.to_str()


@pytest.mark.parametrize(
    "special", [{"begin": "[CLS]", "end": "[SEP]", "pad": "[PAD]"}, {"end": "</s>", "pad": "<pad>"}, {"pad": "<pad>"}]
)
def test_any_tokenizer_json(special: dict[str, str]) -> None:
    made = TextTokenizer(published(**special))
    reference = Published.from_str(published(**special))
    reference.no_truncation()
    reference.no_padding()
    ids, lengths = made.encode(["a longer text"], 20)
    assert ids[0, : lengths[0]].tolist() == reference.encode("a longer text").ids
    for name in ("begin", "end", "pad"):
        expected = reference.token_to_id(special[name]) if name in special else None
        assert getattr(made, f"{name}_id") == expected
    assert made.decode(ids) == ["a longer text"]


def test_a_padding_token_can_be_named() -> None:
    text = published(begin="<s>", end="</s>")
    with pytest.raises(ValueError, match="names no padding token: give `pad`"):
        TextTokenizer(text)
    with pytest.raises(ValueError, match="has no token pad='<none>'"):
        TextTokenizer(text, pad="<none>")
    made = TextTokenizer(text, pad="</s>")
    assert made.pad_id == made.end_id and made.decode(made.encode(["ab"], 9)[0]) == ["ab"]
    assert TextTokenizer(**made.config()["init_args"]).fingerprint() == made.fingerprint()


def test_begin_and_end_can_be_named() -> None:
    """As the configuration of a published model does, whose tokenizer.json puts none around a text."""
    text = published(pad="<pad>")
    vocabulary = text_tokenizer.tokens_of(text)
    made = TextTokenizer.with_special(text, {"pad": vocabulary["<pad>"], "begin": vocabulary["a"], "end": "b"})
    assert (made.begin_id, made.end_id) == (vocabulary["a"], vocabulary["b"])
    ids, lengths = made.encode(["no"], 9)
    assert lengths.tolist() == [4] and ids[0, :4].tolist() == [made.begin_id, *made.ids("no"), made.end_id]
    again = TextTokenizer(**made.config()["init_args"])
    assert again.fingerprint() == made.fingerprint() != TextTokenizer(text).fingerprint()
    assert torch.equal(again.encode(["no"], 9)[0], ids)
    with pytest.raises(ValueError, match="has no token of the id 9999, the model's begin"):
        TextTokenizer.with_special(text, {"begin": 9999})
    with pytest.raises(ValueError, match="has no token end='<none>'"):
        TextTokenizer(text, end="<none>")


def bomb() -> str:
    """A short state that would unpack to more than any vocabulary has."""
    return "zlib:" + base64.b64encode(zlib.compress(b" " * (2**27 + 1))).decode()


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (
            lambda made: made.encode(["a dark coat, " * 9], 8),
            r"'a dark coat, a dark .*' has \d+ ids with its 2 special",
        ),
        (lambda made: made.encode(["a"], 2), "length=2 leaves no room"),
        (lambda made: made.encode(["a"], 9, too_long="no"), "too_long='no' is not known"),
        (lambda made: made.encode(["\ud83d"], 9), "half of a surrogate pair"),
        (lambda made: made.decode(torch.tensor([[300]])), r"must lie in \[0, \d+\), got \[300, 300\]"),
        (lambda made: made.decode(torch.zeros(3)), r"rows of ids \(B, N\)"),
        (lambda made: TextTokenizer("nowhere.json"), "file='nowhere.json': no such file"),
        (lambda made: TextTokenizer("{}"), "is no tokenizer.json"),
        (lambda made: TextTokenizer("zlib:AAAA"), "damaged state"),
        (lambda made: TextTokenizer(made.state[:-8]), "damaged state of a text tokenizer: .* does not end within"),
        (lambda made: TextTokenizer(bomb()), "damaged state of a text tokenizer: .* does not end within"),
        (lambda made: TextTokenizer.learn(["a"], 200), "vocab_size=200 is below 259"),
        (lambda made: TextTokenizer.learn([], 300), "no text to learn"),
    ],
)
def test_bad_input(trained: TextTokenizer, mistake, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mistake(trained)


def test_long_texts_are_cut_where_asked(trained: TextTokenizer) -> None:
    ids, lengths = trained.encode(["a dark coat", "a bright ankle boot and more"], 8, too_long="cut")
    assert lengths[1] == 8 and ids[1, -1] == trained.end_id
    assert "a bright ankle boot and more".startswith(trained.decode(ids)[1])
    assert torch.equal(ids[0], trained.encode(["a dark coat"], 8)[0][0])
