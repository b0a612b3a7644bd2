"""What a rank needs of its GPU's memory under FSDP2, calculated from a recipe without a GPU and without its weights.

    python benchmarks/memory_plan.py
    python benchmarks/memory_plan.py --recipe rar_xl_imagenet256 --ranks 4 --batch_size 64

The network of the recipe is built at its full size of tensors that have a shape and no values (PyTorch's fake tensors,
on the meta device), and its loss is computed on a batch of them, under the autocast of `bf16-mixed`. Counted are

- weights, their averages, gradients and AdamW's two moments in float32, each rank's shard of each parameter, as
  `fully_shard` cuts it: by its first dimension, rounded up;
- the two largest blocks that are gathered at once, the one that computes and the one behind it, in float32;
- every tensor that autograd keeps for the backward pass, once for each storage, the copies of weights in bfloat16 too;
- for the backward pass twice the largest of these, a tensor and its gradient;
- 6 GB for what PyTorch cannot see: the CUDA context, NCCL's buffers, the frozen tokenizer, fragmentation.
"""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("DISCRETE_LIT_CPU_KERNELS", "0")  # own kernels read values, which there are none of

import torch
import yaml
from torch._subclasses.fake_tensor import FakeTensorMode

from discrete_lit.checkpoints import instantiate
from discrete_lit.core.random import CounterRandom

CONFIGS = Path(__file__).resolve().parents[1] / "lightning_configs" / "generators"
# Of the same ids on the same grid as the recipe's own tokenizer: frozen, and counted in the 6 GB.
TOKENIZER = {
    "class_path": "discrete_lit.tokenizers.FSQ",
    "init_args": {
        "levels": [4, 4, 4, 4, 4],
        "network": {
            "class_path": "discrete_lit.tokenizers.networks.ConvAutoencoder",
            "init_args": {
                "channels": 4,
                "multipliers": [1, 1, 1, 1, 1],
                "blocks": 1,
                "attention": False,
                "norm_groups": 2,
            },
        },
    },
}
GB = 10**9
RESERVE = 6 * GB


def settings_of(recipe: str) -> dict[str, Any]:
    """The model of a recipe, laid over the files that its opening command names before it."""
    text = (CONFIGS / f"{recipe}.yaml").read_text()
    header = [line for line in text.splitlines() if line.startswith("#")]
    names = [word.rpartition("/")[2] for line in header for word in line.split() if "/generators/" in word]
    merged: dict[str, Any] = {}
    for name in dict.fromkeys([*names, f"{recipe}.yaml"]):
        _merge(merged, yaml.safe_load((CONFIGS / name).read_text()))
    return merged["model"]


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for name, value in other.items():
        if isinstance(value, Mapping) and isinstance(into.get(name), dict):
            _merge(into[name], value)
        else:
            into[name] = value


def plan(recipe: str, *, ranks: int, batch_size: int) -> dict[str, float]:
    """Bytes of each part of a rank's memory, and their `total`; `parameters` counts those that are trained."""
    model = settings_of(recipe)
    model["init_args"]["tokenizer"] = TOKENIZER
    for name in ("optimizer", "scheduler", "sampler"):
        model["init_args"].pop(name, None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        generator: Any = instantiate(model)
        generator.train()
        trained = [weight for weight in generator.parameters() if weight.requires_grad]
        shards = sum(-(-weight.shape[0] // ranks) * weight[0].numel() if weight.ndim else 1 for weight in trained)
        blocks = sorted(sum(w.numel() for w in block.parameters()) for block in generator.backbone.fsdp_units())
        kept = _kept(generator, batch_size)
    parts: dict[str, float] = {
        "weights": 4 * shards,
        "averages": 4 * shards,
        "gradients": 4 * shards,
        "AdamW's moments": 8 * shards,
        "gathered blocks": 4 * sum(blocks[-2:]),
        "kept for the backward pass": sum(kept),
        "made in the backward pass": 2 * max(kept),
        "reserve": RESERVE,
    }
    return {"parameters": sum(weight.numel() for weight in trained), **parts, "total": sum(parts.values())}


def _kept(generator: Any, batch_size: int) -> list[int]:
    """Bytes of each storage that autograd keeps of the loss of a batch, the parameters' own left out."""
    storages = {weight.untyped_storage()._cdata: 0 for weight in generator.parameters()}
    held = []

    def pack(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        storages.setdefault(storage._cdata, storage.nbytes())
        held.append(storage)  # so that no other gets its address
        return value

    tokens = torch.zeros((batch_size, *generator.token_shape), dtype=torch.int64)
    labels = torch.zeros(batch_size, dtype=torch.int64)
    random = CounterRandom(0, torch.arange(batch_size))
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        generator.loss(tokens, labels, random, dropped=labels.bool())
    return list(storages.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="rar_xxl_imagenet256")
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=64)
    given = parser.parse_args()
    found = plan(given.recipe, ranks=given.ranks, batch_size=given.batch_size)
    print(
        f"{given.recipe}, {found.pop('parameters') / 1e9:.2f}B parameters on {given.ranks} ranks, "
        f"batches of {given.batch_size} on each"
    )
    for name, value in found.items():
        print(f"  {value / GB:6.2f} GB  {name}")


if __name__ == "__main__":
    main()
