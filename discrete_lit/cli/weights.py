"""`discrete-lit import` and `export`: published checkpoints to ours, and ours to published layouts."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as to_safetensors

from discrete_lit.checkpoints import check_weights, load, local, read_checkpoint, rebuild, save, save_pretrained
from discrete_lit.core.files import atomic_write
from discrete_lit.fsdp2 import by_number, is_sharded
from discrete_lit.generators import Generator, LatentGenerator
from discrete_lit.pretrained import load_pretrained
from discrete_lit.pretrained.exporting import EXPORTS, export_state
from discrete_lit.pretrained.pipelines import write_pipeline
from discrete_lit.tokenizers import ContinuousTokenizer, Tokenizer


def import_weights(
    weights: str,
    family: str,
    *,
    output: str,
    reference_config: str | dict[str, Any] | None = None,
    tokenizer: str | None = None,
    text_tokenizer: str | None = None,
) -> None:
    """Read a published checkpoint and write it as a checkpoint of discrete-lit.

    The file that is written loads by `discrete_lit.load` and by `ckpt_path` of every command. No code in the published
    file is executed.

    Args:
        weights: The published file, as `torch.save` wrote it or safetensors, or a folder of Hugging Face with it.
        family: Its layout, such as taming_vqgan; a wrong name prints all of them.
        output: File to write.
        reference_config: What the weights do not say, in the reference's own argument names, or the published YAML or
            JSON file that says it.
        tokenizer: Checkpoint of discrete-lit with the tokenizer that a generator was trained on; the generator's
            checkpoint holds it too. Without one a generator makes ids or latents, but no images.
        text_tokenizer: The tokenizer.json of a model of text and image; by default the one beside the weights.

    Raises:
        ValueError: An unknown family, an unreadable file, a checkpoint of another family, tensors that do not fit, a
            tokenizer of other ids.
    """
    own = None if tokenizer is None else load(tokenizer)
    if own is not None and not isinstance(own, Tokenizer | ContinuousTokenizer):
        raise ValueError(f"tokenizer={tokenizer!r} holds a {type(own).__name__}, which is no tokenizer")
    module = load_pretrained(weights, family, reference_config, own, text_tokenizer)
    save(module, output)
    count = sum(parameter.numel() for parameter in module.parameters())
    what = f"{type(module).__name__}, {count:,} parameters"
    if isinstance(module, Generator):
        shape = " x ".join(map(str, module.token_shape))
        what += f", {shape} tokens of {module.vocab_size:,} ids from a {type(module.tokenizer).__name__}"
    elif isinstance(module, LatentGenerator):
        shape = " x ".join(map(str, module.latent_shape))
        what += f", {shape} latents of a {type(module.tokenizer).__name__}"
    elif isinstance(module, Tokenizer):
        what += f", {module.vocab_size:,} ids, fingerprint {module.fingerprint()}"
    print(f"{output}: {what}")


# Layouts that are a folder, for any module.
_FOLDERS = {"hub": save_pretrained, "diffusers": write_pipeline}


def export_weights(ckpt_path: str, family: str, *, output: str, licence: str = "") -> None:
    """Write a checkpoint in a published layout, as a folder for the Hugging Face Hub, or a sharded one as one file.

    `discrete-lit import` of a published layout gives the same weights to the bit, and `discrete_lit.load` of a folder
    the same module; what only training uses is left out.

    Args:
        ckpt_path: Checkpoint of a tokenizer with a ConvAutoencoder and a VectorQuantizer; for a folder, of any
            tokenizer or generator; for `checkpoint`, the folder of a sharded one.
        family: taming_vqgan or llamagen_vq; `checkpoint`, one file of a sharded checkpoint, with everything, also the
            optimizer's state: any strategy, on any number of ranks, goes on from it; `hub`, a folder with config.json,
            model.safetensors and a model card; or `diffusers`, a folder that `DiffusionPipeline.from_pretrained`
            reads, of a generator of images.
        output: File to write, safetensors by its suffix, else as `torch.save` does; or the folder.
        licence: For the model card of a folder, as the Hub names it, such as apache-2.0.

    Raises:
        ValueError: Not such a tokenizer, a setting that the layout cannot express, no sharded checkpoint, or a licence
            for a file.
    """
    if family in _FOLDERS:
        module = load(local(ckpt_path))
        _FOLDERS[family](module, output, licence=licence)
        print(f"{output}: a {type(module).__name__}; `hf upload OWNER/NAME {output}` brings it to the Hub")
        return
    if licence:
        raise ValueError(f"licence={licence!r} is for the model card of a folder, and {family} is a file")
    if family == "checkpoint":
        _write_one_file(ckpt_path, output)
        return
    state = export_state(load(local(ckpt_path)), family)
    file = Path(output)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as opened:
        if file.suffix == ".safetensors":
            opened.write(to_safetensors(state))
        else:
            torch.save({EXPORTS[family].wrapper: state}, opened)
    print(f"{output}: {len(state)} tensors in the layout of {family}")


def _write_one_file(folder: str, output: str) -> None:
    """Put the parts of a sharded checkpoint together."""
    if not is_sharded(folder):
        raise ValueError(f"ckpt_path={folder!r} is no folder: of a sharded checkpoint, which is one, one file is made")
    checkpoint = read_checkpoint(folder, whole=True)
    checkpoint.pop("sharded", None)
    module = rebuild(checkpoint, folder)
    check_weights(module, checkpoint, folder)
    names = [name for name, _ in module.named_parameters()]
    if "optimizer_states" in checkpoint:
        checkpoint["optimizer_states"] = [by_number(state, names) for state in checkpoint["optimizer_states"]]
    file = Path(output)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as opened:
        torch.save(checkpoint, opened)
    count = sum(parameter.numel() for parameter in module.parameters())
    print(f"{output}: {type(module).__name__}, {count:,} parameters, step {checkpoint.get('global_step')}")
