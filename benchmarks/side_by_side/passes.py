"""The passes of a network alone, as a sampler of several tokens a pass or a training step makes them."""

from collections.abc import Callable

import torch
from torch import Tensor

from discrete_lit.backbones import Backbone
from discrete_lit.tokenizers import VQGAN


def bare_passes(backbone: Backbone, labels: Tensor, passes: int, *, guided: bool = True) -> Callable[[], None]:
    """Make the forward passes that a draw needs, with the cache that the sampler has.

    Args:
        backbone: bidirectional, or block-causal: then its scales are the passes.
        labels: `(B,)`.
        passes: of a bidirectional backbone.
        guided: over the labels and as many null labels.
    """
    layout = backbone.layout
    if guided:
        labels = torch.cat((labels, torch.full_like(labels, layout.null_label)))
    tokens = torch.full((len(labels), layout.length), layout.mask_id, device=labels.device)
    inputs = [torch.randn(len(labels), count, layout.input_dim or 0, device=labels.device) for count in layout.scales]
    time = torch.ones(len(labels), device=labels.device) if layout.timed else None

    def masked() -> None:
        cache = backbone.new_cache(labels)
        for _ in range(passes):
            backbone(tokens, labels, cache, None, time)

    def scales() -> None:
        cache = backbone.new_cache(labels)
        for number, vectors in enumerate(inputs):
            backbone(vectors[:, : 0 if number == 0 else None], labels, cache)

    return scales if layout.scales else masked


class VQGANPasses:
    """The passes through the networks of a VQGAN in training, one after the other."""

    def __init__(self, module: VQGAN, images: Tensor) -> None:
        self.module = module
        self.images = images
        assert module.objective.perceptual is not None and module.objective.adversarial is not None
        self.perceptual = module.objective.perceptual
        self.discriminator = module.objective.adversarial.discriminator

    def run(self, steps: int) -> None:
        """Make the passes of a number of steps."""
        network, judge, weights = self.module.network, self.discriminator, list(self.module.network.parameters())
        for _ in range(steps):
            latents = network.encode(self.images)
            codes = latents.detach().requires_grad_()
            outputs = network.decode(codes)
            seen = outputs.detach().requires_grad_()
            (at_outputs,) = torch.autograd.grad(self.perceptual(seen, self.images), seen)
            fake, real = judge(seen), judge(self.images)
            torch.autograd.grad(fake.mean(), seen, retain_graph=True)
            torch.autograd.grad(fake.mean() - real.mean(), list(judge.parameters()))
            at_codes, *_ = torch.autograd.grad(outputs, [codes, *weights], at_outputs, allow_unused=True)
            torch.autograd.grad(latents, weights, at_codes, allow_unused=True)
