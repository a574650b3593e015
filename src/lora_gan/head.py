"""Output head: log-probabilities and entropies of tokens, a few tokens at a time.

The logits of a pass, one number for each token and word of the vocabulary, would be its largest tensor: 600 MB for
1,000 tokens and 150,000 words. Where they are the product of hidden states and a frozen head, the head is part of the
loss: for a few tokens at a time logits are made, the numbers that are wanted, and their gradient at the hidden states,
which alone is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

NUMBERS = 2**23  # logits at a time, where they are made on a CPU
GIVEN = 2**20  # where they are given: 4 MB, which fit into the cache
ON_GPU = 2**26  # 1 GB with what is made of them
ROWS = 128  # tokens below which a product takes longer to read the head than to compute, on a CPU


@dataclass(frozen=True)
class Chunk:
    """The logits of some of the tokens."""

    rows: slice
    logits: Tensor  # (m, V) in float32, without gradient
    weight: Tensor | None  # (V, H) of the head

    def at_source(self, slope: Tensor) -> Tensor:
        """The gradient at the source (m, ·), from that at the logits (m, V)."""
        return slope if self.weight is None else product(slope, self.weight)


@dataclass(frozen=True)
class Logits:
    """The logits (n, V) of n tokens, made a few at a time.

    Args:
        source: (n, H) hidden states, from which the head makes them; without a head the logits themselves, (n, ≥ V).
        vocabulary: V; what a model has beyond it means nothing and is left out.
        head: A frozen linear layer.
    """

    source: Tensor
    vocabulary: int
    head: nn.Module | None = None

    def whole(self) -> Tensor:
        """All at once, in float32, with gradient."""
        return self._made(self.source, *self._head())

    @torch.no_grad()
    def chunks(self) -> Iterator[Chunk]:
        """A few tokens at a time, in order."""
        weight, bias = self._head()
        for rows in self._slices():
            yield Chunk(rows, self._made(self.source[rows], weight, bias), weight)

    def _made(self, part: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        return (part[:, : self.vocabulary] if weight is None else linear(part, weight, bias)).float()

    def _head(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias; autocast would cast them anew for each chunk."""
        if self.head is None:
            return None, None
        parts = [getattr(self.head, name, None) for name in ("weight", "bias")]
        weight, bias = (None if part is None else in_use(part[: self.vocabulary]) for part in parts)
        return weight, bias

    def _slices(self) -> Iterator[slice]:
        numbers = NUMBERS if self.head is not None else GIVEN
        least = ROWS if self.head is not None else 1
        few = max((ON_GPU if self.source.is_cuda else numbers) // self.vocabulary, least)
        yield from (slice(start, start + few) for start in range(0, len(self.source), few))


@dataclass(frozen=True)
class Statistic:
    """A number for each token, such as :func:`log_probability`.

    Args:
        of: From logits (m, V) and labels (m,) to the numbers (m,) and, if wanted, their gradient at the logits.
        temperature: Divides the logits, in float32.
    """

    of: Callable[[Tensor, Tensor, bool], tuple[Tensor, Tensor | None]]
    temperature: float = 1.0

    def __call__(self, logits: Tensor, labels: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
        """The numbers and, if wanted, ``temperature`` times their gradient at the logits."""
        return self.of(logits if self.temperature == 1 else logits / self.temperature, labels, slope)


def log_probability(logits: Tensor, labels: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """log p(label); its gradient is onehot − p."""
    logp = logits.log_softmax(-1)
    value = logp.gather(-1, labels[:, None]).squeeze(-1)
    if not slope:
        return value, None
    gradient = logp.exp_().neg_()
    gradient[torch.arange(len(labels), device=labels.device), labels] += 1
    return value, gradient


def entropy(logits: Tensor, labels: Tensor, slope: bool) -> tuple[Tensor, Tensor | None]:
    """H = −Σ p·log p in nats, whatever the labels; dH/dz = −p·(log p + H)."""
    logp = logits.log_softmax(-1)
    p = logp.exp()
    logp.masked_fill_(logp == -torch.inf, 0)
    value = -(p * logp).sum(-1)
    return value, logp.add_(value[:, None]).mul_(p).neg_() if slope else None


def statistics(logits: Logits, labels: Tensor, wanted: Sequence[Statistic]) -> Tensor:
    """Numbers of each token, with gradient, in one run through the logits → (len(wanted), n), in float32.

    Args:
        logits: Of n tokens.
        labels: (n,) the tokens.
        wanted: Which numbers.
    """
    keep = torch.is_grad_enabled() and logits.source.requires_grad
    result: Tensor = _Statistics.apply(  # type: ignore[no-untyped-call]
        logits.source, labels, logits.vocabulary, logits.head, tuple(wanted), keep
    )
    return result


class _Statistics(torch.autograd.Function):
    """With a head the gradient at the states is made in the forward pass, from logits that are there at that time.

    Without one it would be as large as the logits, which are kept anyway: it is made of them in the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        labels: Tensor,
        vocabulary: int,
        head: nn.Module | None,
        wanted: tuple[Statistic, ...],
        keep: bool,
    ) -> Tensor:
        at_once = keep and head is not None
        values = torch.empty(len(wanted), len(source), device=source.device)
        slopes = source.new_empty(len(wanted), *source.shape) if at_once else None
        for chunk in Logits(source, vocabulary, head).chunks():
            for place, statistic in enumerate(wanted):
                value, slope = statistic(chunk.logits, labels[chunk.rows], at_once)
                values[place, chunk.rows] = value
                if slopes is not None and slope is not None:
                    slopes[place, chunk.rows] = chunk.at_source(slope)
                del value, slope
            del chunk  # before the next one is made
        ctx.save_for_backward(*([slopes] if slopes is not None else [source, labels] if keep else []))
        ctx.wanted, ctx.vocabulary, ctx.dtype = wanted, vocabulary, source.dtype
        return values

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        per_token = [grad[:, None] / one.temperature for grad, one in zip(grads[0], ctx.wanted, strict=True)]
        first, *labels = ctx.saved_tensors  # the gradients at the states, or logits and labels
        if labels:
            result = _at_logits(first, labels[0], ctx.vocabulary, ctx.wanted, per_token)
        else:
            result = sum((slope * grad for slope, grad in zip(first, per_token, strict=True)), torch.zeros(()))
        return result.to(ctx.dtype), None, None, None, None, None


def _at_logits(
    source: Tensor, labels: Tensor, vocabulary: int, wanted: Sequence[Statistic], grads: Sequence[Tensor]
) -> Tensor:
    """The gradient at given logits ``source``, from that of each number (n, 1)."""
    result = torch.zeros_like(source)
    for chunk in Logits(source, vocabulary).chunks():
        for statistic, grad in zip(wanted, grads, strict=True):
            _, slope = statistic(chunk.logits, labels[chunk.rows], True)
            assert slope is not None
            result[chunk.rows, :vocabulary] += slope.mul_(grad[chunk.rows])
    return result


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probability of ``labels`` (n,) under ``logits`` (n, V) → (n,), in float32."""
    return statistics(Logits(logits, logits.shape[-1]), labels, [Statistic(log_probability)])[0]


def product(slope: Tensor, weight: Tensor) -> Tensor:
    """A gradient times a weight, (m, V) · (V, H) → (m, H), in the weight's data type.

    float16 cannot hold a small gradient, so there each row is first scaled to a sum of 1,024, from which no product of
    weights below 64 overflows; the result is in float32.
    """
    if weight.dtype != torch.float16:
        return slope.to(weight.dtype) @ weight
    size = slope.abs().sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 1024
    return ((slope / size).to(weight.dtype) @ weight).float() * size


def in_use(weight: Tensor) -> Tensor:
    """A weight in the data type in which products with it are computed now."""
    kind = weight.device.type
    return weight.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else weight
