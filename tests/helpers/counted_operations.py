"""The operations of a real training step, to compare those with that are counted without data."""

from types import SimpleNamespace
from typing import Any

from lightning import LightningModule
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def counted(module: LightningModule, batch: dict[str, Any]) -> int:
    """Count what torch counts of a real step."""
    counter: Any = FlopCounterMode(display=False)
    # Its tracker of modules does not bear the gradients that an adversarial loss takes.
    counter.mod_tracker = SimpleNamespace(parents={"Global"}, __enter__=lambda: None, __exit__=lambda *_: None)
    with sdpa_kernel(SDPBackend.MATH), counter:
        outputs = module.training_step(batch, 0)
        (outputs["loss"] if isinstance(outputs, dict) else outputs).backward()
    return counter.get_total_flops()
