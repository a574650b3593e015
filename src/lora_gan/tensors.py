"""Pure functions on tensors: no state, every denominator named."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``x`` where ``mask`` is True; 0 where nothing counts. Both of one shape, (N, T) say."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def masked_row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row of ``x`` (N, T) where ``mask`` (N, T) is True → (N,); 0 for a row where nothing counts."""
    return torch.where(mask, x, 0).sum(-1) / mask.sum(-1).clamp(min=1)


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of ``labels`` (n,) under ``logits`` (n, V) → (n,), in float32."""
    return -F.cross_entropy(logits.float(), labels, reduction="none")


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(π‖reference) at each sampled token: exp(r) − r − 1, r = log reference − log π.

    Unbiased and never negative (http://joschu.net/blog/kl-approx.html). Shapes as given, (N, T) say.
    """
    r = reference - logprobs
    return r.exp() - r - 1


def pad(rows: Sequence[Tensor], value: int = 0) -> Tensor:
    """Rows of unequal length → (len(rows), longest), filled with ``value`` on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def lengths_mask(lengths: Tensor, width: int) -> Tensor:
    """(N,) lengths → (N, width) bool, True on the first ``length`` columns of each row."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]
