"""Tensor functions: pure, with every denominator stated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import TypeVar

import torch
from torch import Tensor, nn

Number = TypeVar("Number", float, Tensor)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``x`` where ``mask``, of the same shape, is True; 0 if it is True nowhere."""
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def masked_row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of each row of ``x`` (N, T) where ``mask`` (N, T) is True → (N,); 0 for a row without any."""
    return torch.where(mask, x, 0).sum(-1) / mask.sum(-1).clamp(min=1)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """``x`` (N, T) with mean 0 and standard deviation 1 over the places where ``mask`` is True; 0 elsewhere."""
    mean = masked_mean(x, mask)
    variance = masked_mean((x - mean).square(), mask)
    return torch.where(mask, (x - mean) * (variance + 1e-8).rsqrt(), 0)


def moving_average(old: Number, new: Number, decay: float) -> Number:
    """Exponential moving average: decay·old + (1 − decay)·new."""
    return decay * old + (1 - decay) * new


def group_normalise(x: Tensor, k: int, epsilon: float) -> Tensor:
    """``x`` (B·k,) minus the mean of its group of k, divided by (the group's std + ``epsilon``) → (B·k,)."""
    groups = x.view(-1, k)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + epsilon)).flatten()


def leaders(shares: Tensor) -> Tensor:
    """1 where a share (B, k) is the largest of its row, or equal to it but for rounding, and above 0; else 0."""
    largest = shares.amax(-1, keepdim=True)
    return ((shares >= largest * (1 - 1e-6)) & (shares > 0)).to(shares.dtype)


def ranking_auc(scores: Tensor, values: Tensor, counted: Tensor, k: int) -> Tensor:
    """How often, of two of a prompt's k completions, the one of higher value has the higher score, in [0, 1].

    Equal scores count half; pairs of equal value do not count. 1 where there is no pair, ().

    Args:
        scores: (B·k,)
        values: (B·k,)
        counted: (B·k,) bool, the completions that count.
        k: Completions for each prompt.
    """
    score, value, there = (x.view(-1, k) for x in (scores, values, counted))
    pairs = (value[:, :, None] > value[:, None, :]) & there[:, :, None] & there[:, None, :]
    won = (score[:, :, None] - score[:, None, :]).sign() / 2 + 0.5
    return torch.where(pairs.any(), masked_mean(won, pairs), 1.0)


def kl_k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(π‖reference) at each sampled token: exp(r) − r − 1, r = log reference − log π.

    Unbiased and never negative (http://joschu.net/blog/kl-approx.html). Both have the same shape, such as (N, T).
    """
    r = reference - logprobs
    return r.exp() - r - 1


def davidson(margin: Tensor, tie_logit: Tensor) -> Tensor:
    """Probabilities that a side of a comparison wins, loses and ties (Davidson 1970): (M,), (M,) → (3, M).

    P(win) ∝ e^{s/2}, P(loss) ∝ e^{−s/2} and P(tie) ∝ e^t for the side's margin s and the tie's logit t.
    """
    return torch.stack([margin / 2, -margin / 2, tie_logit]).softmax(0)


def pad(rows: Sequence[Tensor], value: int = 0) -> Tensor:
    """Rows of unequal length → (len(rows), longest), filled with ``value`` on the right."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def join(parts: Sequence[Tensor]) -> Tensor:
    """The rows of tensors (m, T) of unequal width → (Σ m, longest), filled with 0 on the right."""
    rows = [row for part in parts for row in part]
    return pad(rows) if len(parts) > 1 and rows else parts[0]


def fingerprint(tensors: Mapping[str, Tensor], probes: int = 16) -> str:
    """A hash of the names, the shapes and up to ``probes`` values of each tensor."""
    digest = sha256()
    for name, tensor in tensors.items():
        values = tensor.detach().flatten()[:: max(1, tensor.numel() // probes)][:probes]
        digest.update(f"{name} {tuple(tensor.shape)} {values.tolist()}".encode())
    return digest.hexdigest()[:16]


def scaled_gradient(loss: Tensor, inputs: Tensor) -> Tensor:
    """Gradient of a scalar at ``inputs``, in float32.

    float16 cannot hold a small one, so there the scalar is first multiplied by a power of 2, a smaller one where that
    is too much, as ``torch.amp.GradScaler`` does for the gradient of the weights.
    """
    kind = inputs.device.type
    half = torch.float16 in (inputs.dtype, torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None)
    scales = [2.0**16, 2.0**12, 2.0**8, 2.0**4, 1.0] if half else [1.0]
    for scale in scales:
        (scaled,) = torch.autograd.grad(loss * scale, inputs, retain_graph=scale > 1)
        gradient: Tensor = scaled.float() / scale
        if scale == 1 or gradient.isfinite().all():
            break
    return gradient


def in_float32(head: nn.Module, states: Tensor) -> Tensor:
    """A head's output in float32, also under autocast, whose 16 bits would make ties of scores that differ."""
    with torch.autocast(states.device.type, enabled=False):
        output: Tensor = head(states.float())
        return output


def lengths_mask(lengths: Tensor, width: int) -> Tensor:
    """(N,) lengths → (N, width) bool, True on the first ``length`` columns of each row."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]
