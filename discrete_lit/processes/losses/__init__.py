"""Losses of discrete diffusion: nats of each token at one time of each sequence. Plain PyTorch."""

from discrete_lit.processes.losses.continuous_bound import ContinuousBound
from discrete_lit.processes.losses.diffusion_loss import DiffusionLoss, LossKind
from discrete_lit.processes.losses.discrete_time_bound import DiscreteTimeBound, HybridBound
from discrete_lit.processes.losses.flow_matching import FlowMatching
from discrete_lit.processes.losses.masked_cross_entropy import MaskedCrossEntropy
from discrete_lit.processes.losses.score_entropy import ScoreEntropy

__all__ = [
    "ContinuousBound",
    "DiffusionLoss",
    "DiscreteTimeBound",
    "FlowMatching",
    "HybridBound",
    "LossKind",
    "MaskedCrossEntropy",
    "ScoreEntropy",
]
