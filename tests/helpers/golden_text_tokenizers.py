"""The `tokenizer.json` of a golden case of a family that reads texts: the cases have none."""

import json
from pathlib import Path
from typing import Any

import tokenizers

TOKENS: dict[str, dict[int, str]] = {
    # Tokens that a published vocabulary has and a case's configuration does not name.
    "emu3": {3: "<|image start|>", 7: "<|image token|>", 8: "<|extra_201|>", 9: "<|image end|>", 40: "4", 41: "*"},
    "janus": {2: "<begin_of_image>", 4: "<end_of_image>"},
    "chameleon": {},
    "showo": {19: "<|endoftext|>", 20: "<|soi|>", 21: "<|eoi|>", 24: "<|t2i|>", 25: "<|mmu|>", 29: "[PAD]"},
}


def write_text_tokenizer(case: Any, folder: Path) -> None:
    """Write the `tokenizer.json` of a case."""
    _write(folder, words_of(case))


def words_of(case: Any) -> dict[str, int]:
    """The ids of a case's tokens, by names that the case gives, or we do."""
    settings = case.constructor
    names = {number: name for name, number in settings.get("vocabulary_map", {}).items()} | TOKENS[case.family]
    if case.family == "showo":
        return _words(names, settings["llm_vocab_size"] + settings["num_new_special_tokens"])
    return _words(names, settings.get("text_config", settings)["vocab_size"])


def write_words(folder: Path, names: dict[int, str], size: int) -> None:
    """Write a `tokenizer.json` of so many tokens of one character each, but for those that have names."""
    _write(folder, _words(names, size))


def _words(names: dict[int, str], size: int) -> dict[str, int]:
    return {names.get(number, chr(0x4E00 + number)): number for number in range(size)}


def _write(folder: Path, vocabulary: dict[str, int]) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=next(iter(vocabulary))))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(made.to_str())))
