"""The few numbers that cross rounds."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Knobs(nn.Module):
    """What crosses rounds, as buffers and so in every checkpoint."""

    baseline: Tensor
    supervised_weight: Tensor
    policy_weight: Tensor
    adversarial_weight: Tensor
    adversarial_scale: Tensor
    adversarial_gate: Tensor
    coupled_weight: Tensor
    kl_coefficient: Tensor
    kl_penalty: Tensor
    entropy_coefficient: Tensor
    value_coefficient: Tensor
    discriminator_updates: Tensor
    discriminator_gate: Tensor
    easiest_share: Tensor

    def __init__(self, **values: float) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_buffer(name, torch.tensor(float(value)))

    def set(self, **values: float | Tensor) -> None:
        """Turn the named knobs."""
        for name, value in values.items():
            getattr(self, name).fill_(float(value))
