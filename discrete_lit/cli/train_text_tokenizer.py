"""`discrete-lit text_tokenizer`: the captions of shards to a tokenizer.json."""

from collections.abc import Iterator
from pathlib import Path

from discrete_lit.core.files import atomic_write_text
from discrete_lit.data.captions import Captions
from discrete_lit.data.shard_captions import shard_captions
from discrete_lit.tokenizers.text_tokenizer import TextTokenizer

_MEASURED = 1000


def text_tokenizer(
    shards: str | list[str], output: str, *, vocab_size: int, captions: Captions | None = None
) -> TextTokenizer:
    """Learn byte-level BPE from the captions of shards, and write it as a tokenizer.json.

    The same captions give the same file, in whatever order they lie. Any text can be coded by it, also of other words.

    Args:
        shards: what has the captions: a folder of shards, a pattern, a URL, or a list of these.
        output: the file to write, such as `tokenizer.json`.
        vocab_size: ids in all, at least 259: 256 bytes, and the tokens of padding, begin and end. Few captions may
            give fewer.
        captions: where the captions are; by default in `<key>.txt`, one on each line.

    Returns:
        The tokenizer.

    Raises:
        ValueError: no shards, no captions in them, or a vocabulary that is too small.
    """
    if Path(output).is_dir():
        raise ValueError(f"output={output!r} is a folder: name a file, such as {Path(output) / 'tokenizer.json'}")
    images, texts, first = 0, 0, []

    def learned() -> Iterator[str]:
        nonlocal images, texts
        for found in shard_captions(shards, captions or Captions()):
            images, texts = images + 1, texts + len(found)
            first.extend(found[: max(0, _MEASURED - len(first))])
            yield from found

    tokenizer = TextTokenizer.learn(learned(), vocab_size)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    atomic_write_text(output, tokenizer.json)
    longest = max(len(tokenizer.ids(text)) for text in first)
    print(
        f"{output}: {tokenizer.vocab_size:,} ids, learned from {texts:,} captions of {images:,} images; the first "
        f"{len(first):,} have at most {longest} ids beside begin and end; sha256 {tokenizer.fingerprint()}"
    )
    return tokenizer
