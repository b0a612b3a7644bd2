"""Batch normalisation over the batches of all ranks."""

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from discrete_lit.distributed import world_size


class SynchronizedBatchNorm(nn.BatchNorm2d):
    """A BatchNorm2d whose statistics in training are those of the joined batch of all ranks.

    Whether there are other ranks is asked at every call. Unlike `torch.nn.SyncBatchNorm` it runs on every device and
    can be differentiated twice, as a gradient penalty asks.
    """

    def forward(self, input: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        if not self.training or world_size() == 1:
            return super().forward(input)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        with torch.autocast(input.device.type, enabled=False):
            # Sums around the running mean, the same on every rank: those around 0 would cancel.
            center = self.running_mean.clone()
            values = input.float() - center[:, None, None]
            count = values.new_tensor([values.numel() / values.shape[1]])
            sums = torch.cat((values.sum(dim=(0, 2, 3)), values.square().sum(dim=(0, 2, 3)), count))
            sums = all_reduce(sums)
            total = sums[-1]
            mean, square = (sums[:-1] / total).chunk(2)
            variance = (square - mean.square()).clamp(min=0)
            with torch.no_grad():
                self.num_batches_tracked.add_(1)
                momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean + center, momentum)
                self.running_var.lerp_(variance * total / (total - 1), momentum)
            normed = (values - mean[:, None, None]) * torch.rsqrt(variance + self.eps)[:, None, None]
            return (normed * self.weight[:, None, None] + self.bias[:, None, None]).to(input.dtype)
