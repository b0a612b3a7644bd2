"""`discrete-lit export`: a checkpoint of ours to a published layout."""

from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors

from discrete_lit.checkpoints import load
from discrete_lit.files import atomic_write
from discrete_lit.pretrained.exporting import EXPORTS, export_state


def export_weights(ckpt_path: str, family: str, output: str) -> None:
    """Write a tokenizer's checkpoint in a published layout, for code that reads that layout.

    `discrete-lit import` of the result gives the same weights to the bit; what only training uses is left out.

    Args:
        ckpt_path: Checkpoint of a tokenizer with a ConvAutoencoder and a VectorQuantizer.
        family: taming_vqgan or llamagen_vq.
        output: File to write; safetensors by its suffix, else as `torch.save` does.

    Raises:
        ValueError: Not such a tokenizer, or a setting that the layout cannot express.
    """
    state = export_state(load(ckpt_path), family)
    file = Path(output)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as opened:
        if file.suffix == ".safetensors":
            opened.write(to_safetensors(state))
        else:
            torch.save({EXPORTS[family].wrapper: state}, opened)
    print(f"{output}: {len(state)} tensors in the layout of {family}")
