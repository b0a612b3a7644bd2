"""Text to ids and back: byte-level BPE, the `tokenizer.json` of any other model, or characters.

The ids of a text are what a sequence of text and image, or a text encoder, reads. Everything is done by the package
`tokenizers`, and the whole state is its `tokenizer.json`, one string: a checkpoint carries it, so that it loads without
the file, and its weights carry the state's hash, so that they load into no other vocabulary.
"""

import base64
import json
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from discrete_lit.core.bounded_reading import read_text
from discrete_lit.core.files import content_sha256

TooLong = Literal["error", "cut"]
SPECIAL = ("<pad>", "<begin>", "<end>")
"""The padding, begin and end tokens of tokenizers that are made here: the ids 0, 1 and 2."""
_BYTES = 256
_PADS = ("<pad>", "[PAD]", "<|pad|>", "<|padding|>")
# In a configuration the state is compressed: parsers of YAML take minutes for JSON of a vocabulary.
_COMPRESSED = "zlib:"
_LONGEST_SHOWN = 60
# Far above the JSON of any vocabulary, far below the memory.
_MOST_BYTES = 2**27


class TextTokenizer(nn.Module):
    """Turn texts into ids and back.

    What the text says is never read as a special token: `<end>` in a caption is five characters.

    Args:
        file: a `tokenizer.json`, as `discrete-lit text_tokenizer` or Hugging Face's `tokenizers` writes it; or what
            `state` holds.
        pad: the padding token, where the file names none; one that the vocabulary has.

    Attributes:
        vocab_size: ids lie in [0, vocab_size).
        pad_id: the id that fills up short texts.
        begin_id, end_id: the ids that the file puts before and behind each text; None where it puts none.

    Raises:
        ValueError: no such file, no tokenizer in it, or no padding token; the package `tokenizers` is missing.
    """

    def __init__(self, file: str, *, pad: str | None = None) -> None:
        super().__init__()
        self.json = _read(file)
        self.pad = pad
        self._open(file)

    def _open(self, name: str) -> None:
        library = _library()
        try:
            tokenizer = library.Tokenizer.from_str(self.json)
        except Exception as error:  # the package raises nothing narrower
            raise ValueError(f"file={_shown(name)} is no tokenizer.json: {error}") from error
        padding = tokenizer.padding or {}
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        names = (self.pad,) if self.pad is not None else (padding.get("pad_token"), *_PADS)
        found = [vocabulary[token] for token in names if token in vocabulary]
        if not found:
            said = "names no padding token" if self.pad is None else f"has no token pad={self.pad!r}"
            raise ValueError(f"file={_shown(name)} {said}: give `pad`, one of its {len(vocabulary):,} tokens")
        self._tokenizer: Any = tokenizer
        self.vocab_size = max(vocabulary.values()) + 1
        self.pad_id: int = found[0]
        self._before, self._behind = _added(tokenizer, vocabulary)
        self.begin_id: int | None = self._before[-1] if self._before else None
        self.end_id: int | None = self._behind[0] if self._behind else None

    @classmethod
    def learn(cls, texts: Iterable[str], vocab_size: int) -> "TextTokenizer":
        """Learn byte-level BPE (Sennrich et al. 2016; on bytes, as GPT-2): any text can be coded, and comes back.

        The same texts, in whatever order, give the same tokenizer.

        Args:
            texts: such as the captions of a data set.
            vocab_size: ids in all, the 3 special tokens and 256 bytes among them. Few texts may give fewer: merging
                ends when every word is one token.

        Raises:
            ValueError: no text, or a vocabulary without room for the bytes.
        """
        least = len(SPECIAL) + _BYTES
        if vocab_size < least:
            raise ValueError(f"vocab_size={vocab_size} is below {least}: 256 bytes and {', '.join(SPECIAL)}")
        library = _library()
        seen = 0

        def counted() -> Iterable[str]:
            nonlocal seen
            for text in texts:
                seen += 1
                yield text

        tokenizer = library.Tokenizer(library.models.BPE())
        tokenizer.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = library.decoders.ByteLevel()
        trainer = library.trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(library.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(counted(), trainer=trainer)
        if not seen:
            raise ValueError("there is no text to learn a vocabulary of")
        return cls(_with_special_tokens(tokenizer))

    @classmethod
    def characters(cls, symbols: str) -> "TextTokenizer":
        """Make a tokenizer whose ids 3, 4, ... are these characters, in this order; it refuses others.

        Raises:
            ValueError: a character twice, or none.
        """
        if not symbols or len(set(symbols)) < len(symbols):
            raise ValueError(f"symbols must be characters, each once, got {symbols!r}")
        library = _library()
        vocabulary = {token: number for number, token in enumerate((*SPECIAL, *symbols))}
        tokenizer = library.Tokenizer(library.models.WordLevel(vocabulary, unk_token=""))
        tokenizer.pre_tokenizer = library.pre_tokenizers.Split("", "isolated")
        tokenizer.decoder = library.decoders.Fuse()
        tokenizer.add_special_tokens(list(SPECIAL))
        return cls(_with_special_tokens(tokenizer))

    @property
    def state(self) -> str:
        """The whole tokenizer as one short line, from which `TextTokenizer(state)` is made again."""
        return _COMPRESSED + base64.b64encode(zlib.compress(self.json.encode(), 9)).decode()

    def config(self) -> dict[str, Any]:
        """Describe the tokenizer for a checkpoint: `{"class_path": ..., "init_args": ...}` that names no file."""
        own = {} if self.pad is None else {"pad": self.pad}
        return {"class_path": "discrete_lit.tokenizers.TextTokenizer", "init_args": {"file": self.state, **own}}

    def fingerprint(self) -> str:
        """SHA-256 of the state: equal ones give equal ids."""
        return content_sha256([type(self).__qualname__, self.json, self.pad or ""])

    # Texts to ids and back.

    def encode(self, texts: Sequence[str], length: int, *, too_long: TooLong = "error") -> tuple[Tensor, Tensor]:
        """Turn B texts into ids of one length, each with its begin and end token.

        Args:
            texts: any.
            length: ids of each, padded with `pad_id`.
            too_long: what becomes of a text of more ids: an error that names it, or it is cut before its end token.

        Returns:
            The ids `(B, length)` int64, and how many of each are no padding, `(B,)` int64.

        Raises:
            ValueError: a text that is too long, or that this vocabulary cannot code.
        """
        if too_long not in ("error", "cut"):
            raise ValueError(f"too_long={too_long!r} is not known, accepted: error, cut")
        added = len(self._before) + len(self._behind)
        if length < added + 1:
            raise ValueError(f"length={length} leaves no room for a text beside its {added} special tokens")
        ids = torch.full((len(texts), length), self.pad_id, dtype=torch.int64)
        lengths = torch.zeros(len(texts), dtype=torch.int64)
        for row, text in enumerate(texts):
            body = self.ids(text)
            if len(body) + added > length and too_long == "error":
                raise ValueError(
                    f"the text {_shown(text)} has {len(body) + added} ids with its {added} special tokens, and the "
                    f"length is {length}: take a larger length, or cut long texts by too_long: cut"
                )
            coded = [*self._before, *body[: length - added], *self._behind]
            ids[row, : len(coded)] = torch.tensor(coded, dtype=torch.int64)
            lengths[row] = len(coded)
        return ids, lengths

    def decode(self, ids: Tensor) -> list[str]:
        """Turn ids `(B, N)` back into B texts, each up to its first end token, without special tokens.

        Raises:
            ValueError: no rows of integers, or an id outside [0, vocab_size).
        """
        if ids.ndim != 2 or ids.is_floating_point():
            raise ValueError(f"texts are rows of ids (B, N), integers, got {ids.dtype} {tuple(ids.shape)}")
        if ids.numel() and not (0 <= int(ids.min()) and int(ids.max()) < self.vocab_size):
            raise ValueError(
                f"ids of text must lie in [0, {self.vocab_size}), got [{int(ids.min())}, {int(ids.max())}]: are these "
                "ids of images, or of another tokenizer?"
            )
        dropped = {self.pad_id, *self._before, *self._behind}
        texts = []
        for row in ids.tolist():
            if self.end_id is not None and self.end_id in row:
                row = row[: row.index(self.end_id)]
            kept = [number for number in row if number not in dropped]
            texts.append(self._tokenizer.decode(kept, skip_special_tokens=True))
        return texts

    def ids(self, text: str) -> list[int]:
        """Code one text, without special tokens.

        Raises:
            ValueError: it has characters that the vocabulary lacks.
        """
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except TypeError as error:
            raise ValueError(
                f"the text {_shown(text)} holds half of a surrogate pair, which is no character"
            ) from error
        except Exception as error:  # the package raises nothing narrower
            known = self._tokenizer.get_vocab(with_added_tokens=True)
            strange = sorted(character for character in set(text) if character not in known)
            raise ValueError(f"the text {_shown(text)} has {strange[:5]}, which this vocabulary lacks") from error

    # In a checkpoint.

    def get_extra_state(self) -> Tensor:
        """Give the hash of the state, which stands among the weights of whatever holds this tokenizer."""
        return torch.tensor(list(bytes.fromhex(self.fingerprint())), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse weights that were trained with another tokenizer: the rows of their embeddings are of other ids.

        Raises:
            ValueError: naming both hashes.
        """
        saved = bytes(torch.as_tensor(state).tolist()).hex()
        if saved != self.fingerprint():
            raise ValueError(
                f"the weights were trained with the text tokenizer {saved}, and this one is {self.fingerprint()}: give "
                "the tokenizer.json of that training, or load the checkpoint alone, which carries it"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_tokenizer"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._open("the state")


def _library() -> Any:
    """Import the package `tokenizers` where it is used: most models have no text."""
    try:
        import tokenizers
    except ModuleNotFoundError as error:
        raise ValueError("texts need the package `tokenizers`: pip install 'discrete-lit[text]'") from error
    return tokenizers


def _read(file: str) -> str:
    """Read the `tokenizer.json` that a file, or a state, is."""
    if file.lstrip().startswith("{"):
        return file
    if file.startswith(_COMPRESSED):
        try:
            unpack = zlib.decompressobj()
            content = unpack.decompress(base64.b64decode(file.removeprefix(_COMPRESSED), validate=True), _MOST_BYTES)
            if not unpack.eof:  # cut off, or what would fill the memory
                raise ValueError(f"it does not end within {_MOST_BYTES:,} bytes")
            return content.decode()
        except (ValueError, zlib.error) as error:
            raise ValueError(f"file={_shown(file)} is a damaged state of a text tokenizer: {error}") from error
    path = Path(file).expanduser()
    if not path.is_file():
        raise ValueError(
            f"file={_shown(file)}: no such file; a tokenizer.json is made by `discrete-lit text_tokenizer`, or comes "
            "with a model of Hugging Face"
        )
    try:
        return read_text(path, most=_MOST_BYTES)
    except ValueError as error:
        raise ValueError(f"file={_shown(file)} is no tokenizer.json: {error}") from error


def _with_special_tokens(tokenizer: Any) -> str:
    """Let a tokenizer put begin and end around each text, and name its padding: its `tokenizer.json`."""
    pad, begin, end = SPECIAL
    tokenizer.post_processor = _library().processors.TemplateProcessing(
        single=f"{begin} $A {end}", special_tokens=[(begin, 1), (end, 2)]
    )
    tokenizer.enable_padding(pad_id=0, pad_token=pad)
    return json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, sort_keys=True)


def _added(tokenizer: Any, vocabulary: dict[str, int]) -> tuple[list[int], list[int]]:
    """The ids that a tokenizer puts before and behind each text, found by coding one."""
    for text in ("a", "0", *sorted(vocabulary)):
        try:
            bare = tokenizer.encode(text, add_special_tokens=False).ids
        except Exception:  # a character that the vocabulary lacks
            continue
        whole = tokenizer.encode(text, add_special_tokens=True).ids
        starts = [start for start in range(len(whole)) if bare and whole[start : start + len(bare)] == bare]
        if starts:
            return whole[: starts[0]], whole[starts[0] + len(bare) :]
    return [], []


def _shown(text: str) -> str:
    return repr(text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 3]}...")
