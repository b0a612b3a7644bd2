"""Outputs of a module from fixed inputs, by which `test_old_checkpoints.py` knows it again.

    PYTHONPATH=tests python tests/helpers/old_checkpoint_outputs.py tests/old_checkpoints/NAME.ckpt [SAMPLERS]

adds a checkpoint to the tested ones: it writes the outputs of the code at hand to `NAME.safetensors`. SAMPLERS is JSON,
`[{"name": "HaltonSampler", "arguments": {"steps": 2}}]`, of `discrete_lit.samplers`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import discrete_lit
import discrete_lit.samplers
from discrete_lit.generators import Generator
from discrete_lit.tokenizers import KLVAE, Tokenizer

Outputs = tuple[dict[str, Tensor], dict[str, str]]
"""Tensors by name, and words by name."""


def outputs_of(module: Any, samplers: list[dict[str, Any]]) -> Outputs:
    """The outputs of a Tokenizer, a Generator or a KLVAE in eval mode.

    Args:
        module: as `discrete_lit.load` gives it.
        samplers: `{"name": ..., "arguments": {...}}` of a class of `discrete_lit.samplers`, for generators.
    """
    with torch.no_grad():
        if isinstance(module, Generator):
            return _of_generator(module, samplers)
        return _of_autoencoder(module)


def write_outputs(checkpoint: Path, samplers: list[dict[str, Any]]) -> None:
    """Write the outputs of a checkpoint's module beside it."""
    tensors, words = outputs_of(discrete_lit.load(checkpoint), samplers)
    metadata = {**words, "samplers": json.dumps(samplers)}
    contiguous = {name: value.contiguous() for name, value in tensors.items()}
    save_file(contiguous, checkpoint.with_suffix(".safetensors"), metadata=metadata)


def read_outputs(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, str], list[dict[str, Any]]]:
    """Tensors, words and samplers that `write_outputs` wrote."""
    with safe_open(checkpoint.with_suffix(".safetensors"), framework="pt") as file:
        words = dict(file.metadata())
        return {name: file.get_tensor(name) for name in file.keys()}, words, json.loads(words.pop("samplers"))


def fixed_images(count: int, size: int) -> Tensor:
    """Noise, `(count, 3, size, size)` in [-1, 1], the same on every processor."""
    return fixed_ids((count, 3, size, size), 256) / 127.5 - 1


def fixed_ids(shape: tuple[int, ...], vocab_size: int) -> Tensor:
    """Ids in [0, vocab_size) that jump about."""
    number = torch.arange(torch.Size(shape).numel())
    return ((number * 7919 + number**2 * 31) % 104_729 % vocab_size).reshape(shape)


def _of_autoencoder(module: Any) -> Outputs:
    if isinstance(module, Tokenizer) and not module.makes_images:
        tokens = fixed_ids((2, *module.token_shape(6)), module.vocab_size)
        texts = module.texts(tokens)
        return {}, {
            "class": type(module).__name__,
            "fingerprint": module.fingerprint(),
            "vocab_size": str(module.vocab_size),
            "token_shape": str(module.token_shape(6)),
            "texts": "none" if texts is None else json.dumps(texts),
        }
    images = fixed_images(3, 8)
    if isinstance(module, KLVAE):
        latents = module.encode(images)
        return {"latents": latents, "images": module.decode(latents)}, {"class": "KLVAE"}
    tokens = module.encode(images)
    tensors = {"ids": tokens, "images": module.decode(tokens), "codes": module.embed(tokens)}
    words = {"class": type(module).__name__, "fingerprint": module.fingerprint(), "vocab_size": str(module.vocab_size)}
    return tensors, words


def _of_generator(module: Generator, samplers: list[dict[str, Any]]) -> Outputs:
    # The last label is the null label.
    labels = torch.arange(3) % (module.num_classes + 1)
    tokens = fixed_ids((3, *module.token_shape), module.vocab_size)
    dropped = labels == module.num_classes
    given = labels.masked_fill(dropped, 0)
    tensors = {"loss": module.loss(tokens, given, dropped=dropped)[0], "sample": module.sample(labels, seed=0)}
    module.train()
    tensors["training_loss"] = module.loss(tokens, given, dropped=dropped)[0]
    module.eval()
    likelihood = module.log_likelihood(tokens, labels)
    tensors["nats"] = likelihood.nats
    for place, described in enumerate(samplers):
        sampler = getattr(discrete_lit.samplers, described["name"])(**described["arguments"])
        tensors[f"sample_{place}_{described['name']}"] = module.sample(labels, sampler, seed=0)
    words = {
        "class": type(module).__name__,
        "kind": likelihood.kind,
        "sampler": type(module.sampler).__name__,
        "tokenizer": type(module.tokenizer).__name__,
        "fingerprint": module.tokenizer.fingerprint(),
    }
    return tensors, words


if __name__ == "__main__":
    torch.set_num_threads(1)
    write_outputs(Path(sys.argv[1]), json.loads(sys.argv[2]) if len(sys.argv) > 2 else [])
