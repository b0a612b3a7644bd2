"""The memory that a recipe needs on each GPU under FSDP2, calculated without a GPU and without its weights.

    python benchmarks/memory_plan.py                                  # the recipes of docs/scaling.md's table
    python benchmarks/memory_plan.py --recipes rar_xl_imagenet256 --ranks 4 --batch_size 64

The generator of the recipe is built at full size of tensors that have a shape and no values (PyTorch's fake tensors, on
a CUDA device that need not be there), and its loss is computed on a batch of them, under the autocast of `bf16-mixed`.
Counted on each rank are

- states: weights, gradients, AdamW's two moments, and averages if the recipe keeps them, 4 bytes each: the rank's shard
  of each parameter as `fully_shard` cuts it, by its first dimension and rounded up;
- gathered: what is in no block, which stays whole, and two blocks at once (one computes, the next is fetched), each as
  weights, the buffer that they came in, and gradients in float32;
- kept: every tensor that autograd keeps for the backward pass, once for each storage, without the parameters but with
  their copies in bfloat16, which autocast makes of the whole network. Attention is that of FlashAttention, and with a
  mask the memory-efficient one: queries, keys, values, output and a number for each row;
- computed again: with activation checkpointing, what one block keeps while its backward pass runs, or the copies of
  weights that autocast holds until the end of the forward pass, whichever is larger;
- temporary: twice the largest tensor that is kept, for a gradient and what it is computed from;
- a reserve for what PyTorch cannot see: CUDA's context, NCCL's buffers, fragmentation; and the frozen tokenizer.

With `--ranks 1` the model is whole on the GPU, as under DDP, whose own copy of the gradients is not counted.

So it is an estimate of eager PyTorch. What a frozen tokenizer needs to encode images is not in it: that is over before
the network begins. `torch.compile` keeps less.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ("rar_xxl_imagenet256", "var_d30_imagenet256")
GB = 1e9


@dataclass(frozen=True)
class Memory:
    """Bytes on each GPU."""

    parameters: int  # that are trained, of the whole network: a number, not bytes
    states: float
    gathered: float
    kept: float
    again: float
    temporary: float
    reserve: float

    @property
    def total(self) -> float:
        return self.states + self.gathered + self.kept + self.again + self.temporary + self.reserve


class GPUAttention(TorchFunctionMode):
    """Has attention keep what it keeps on a GPU, where the choice of a kernel would ask for one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is not F.scaled_dot_product_attention:
            return func(*args, **given)
        query, key, value = args
        mask, dropout = given.pop("attn_mask", None), given.pop("dropout_p", 0.0)
        causal, scale = given.pop("is_causal", False), given.pop("scale", None)
        if given:
            raise NotImplementedError(f"attention with {sorted(given)} is not counted")
        if torch.is_autocast_enabled(query.device.type):
            query, key, value = (each.to(torch.get_autocast_dtype(query.device.type)) for each in (query, key, value))
        if mask is None:
            return torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout, causal, False, scale=scale
            )[0]
        if mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -torch.inf)
        mask = mask.to(query.dtype).expand(*query.shape[:-1], key.shape[-2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, mask, True, dropout, causal, scale=scale
        )[0]


@contextmanager
def autocast(device: str) -> Iterator[None]:
    """bfloat16 as in `bf16-mixed`; `torch.autocast` turns itself off where there is no GPU."""
    before = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
    torch.set_autocast_enabled(device, True)
    torch.set_autocast_dtype(device, torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(device, before[0])
        torch.set_autocast_dtype(device, before[1])


def kept(loss: Callable[[], Any], parameters: list[nn.Parameter], device: str) -> list[int]:
    """Bytes of each storage that autograd keeps of a loss, the parameters' own left out."""
    own = {each.untyped_storage()._cdata for each in parameters}
    found: dict[int, torch.UntypedStorage] = {}  # which holds them, so that no other gets the address of one

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in own:
            found.setdefault(storage._cdata, storage)
        return value

    with autocast(device), torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        result = loss()
    del result
    return [storage.nbytes() for storage in found.values()]


def loss_of(generator: Any, batch_size: int, device: str) -> Callable[[], Any]:
    """The loss of a batch of ids, a tenth of whose classes may be dropped."""
    from discrete_lit.core.random import CounterRandom

    generator.check_labels = lambda *_, **__: None  # it reads values
    tokens = torch.zeros((batch_size, *generator.token_shape), dtype=torch.int64, device=device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    random = CounterRandom(0, torch.arange(batch_size, device=device))
    return lambda: generator.loss(tokens, labels, random, dropped=labels.bool())


def shard(weight: Tensor, ranks: int) -> int:
    """Numbers of a parameter on the rank that has most of it."""
    return -(-weight.shape[0] // ranks) * (weight.numel() // weight.shape[0]) if weight.ndim and weight.numel() else 1


def memory_of(recipe: str, *, ranks: int, batch_size: int, recompute: bool = False, reserve: float = 6 * GB) -> Memory:
    """Calculate what a generator's recipe needs on each of some GPUs.

    Args:
        recipe: of `lightning_configs/generators`.
        ranks: GPUs that share the model.
        batch_size: images on each of them.
        recompute: `activation_checkpointing` of the backbone.
        reserve: bytes for what is not counted.
    """
    sys.path.insert(0, str(ROOT / "tests"))
    from training_proof.recipes import WithoutData, model_of, settings_of

    from discrete_lit.checkpoints import instantiate
    from discrete_lit.generators import Generator

    trainer = settings_of(f"generators/{recipe}")["trainer"]
    averaged = "ExponentialMovingAverage" in f"{trainer.get('callbacks+', '')}{trainer.get('callbacks', '')}"
    with WithoutData():
        generator: Any = instantiate(model_of(f"generators/{recipe}"))
    if not isinstance(generator, Generator):
        raise ValueError(f"{recipe} trains a {type(generator).__name__}; accepted: recipes of generators of ids")
    with FakeTensorMode(allow_non_fake_inputs=True), GPUAttention():
        generator = generator.to_empty(device="cuda").train()
        trained = [weight for weight in generator.backbone.parameters() if weight.requires_grad]
        blocks = [sum(weight.numel() for weight in block.parameters()) for block in generator.backbone.fsdp_units()]

        def storages(checkpointed: bool) -> list[int]:
            generator.backbone.activation_checkpointing = checkpointed
            return kept(loss_of(generator, batch_size, "cuda"), list(generator.parameters()), "cuda")

        whole = storages(False)
        held = storages(True) if recompute else whole
    total = sum(weight.numel() for weight in trained)
    return Memory(
        parameters=total,
        states=4 * (4 + averaged) * sum(shard(weight, ranks) for weight in trained),
        gathered=4 * (2 * (total - sum(blocks)) + 2 * 3 * max(blocks)) if ranks > 1 else 0,
        kept=sum(held),
        again=max((sum(whole) - sum(held)) / len(blocks), 2.0 * total) if recompute else 0,
        temporary=2 * max(whole),
        reserve=reserve,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=RECIPES, help="of lightning_configs/generators")
    parser.add_argument("--ranks", type=int, default=8, help="GPUs that share the model")
    parser.add_argument("--batch_size", nargs="+", type=int, default=(16, 32, 64, 128), help="images on each GPU")
    parser.add_argument("--memory", type=float, default=80.0, help="of a GPU in GB")
    given = parser.parse_args()
    print(
        "| recipe, batch of each GPU | recomputed | states | gathered | kept | again | temporary | total, GB | fits |"
    )
    print("|---|---|--:|--:|--:|--:|--:|--:|---|")
    for recipe in given.recipes:
        for batch_size in given.batch_size:
            for recompute in (False, True):
                found = memory_of(recipe, ranks=given.ranks, batch_size=batch_size, recompute=recompute)
                parts = (found.states, found.gathered, found.kept, found.again, found.temporary, found.total)
                cells = " | ".join(f"{part / GB:.1f}" for part in parts)
                fits = "yes" if found.total <= given.memory * GB else "no"
                print(f"| {recipe}, {batch_size} | {'yes' if recompute else 'no'} | {cells} | {fits} |", flush=True)


if __name__ == "__main__":
    main()
