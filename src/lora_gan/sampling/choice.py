"""Choice of the next token: uniform numbers in, tokens and their log-probabilities out.

The cumulative distribution is inverted in two levels: first over the masses of blocks of the vocabulary, then inside
the block that is hit. So there is no cumulative sum over a whole vocabulary, which is slow, and which torch refuses on
CUDA where ``deterministic`` is on. On CUDA nothing here waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lora_gan.head import token_logprobs
from lora_gan.sampling.settings import Sampling

BLOCK = 256  # tokens; about the root of a vocabulary's size
TRIES = 8  # draws for each token under top-p, which may reject some; one more number is kept for rows that reject all


@dataclass(frozen=True)
class Choice:
    """One token for each of n rows."""

    token: Tensor  # (n,)
    logprob: Tensor  # (n,) float32, under the softmax over the whole vocabulary


@dataclass(frozen=True)
class _Found:
    """Where uniform numbers fall."""

    place: Tensor  # (n,)
    rest: Tensor  # (n,) in [0, 1], the part of the place's own weight that lies below the number


def draw_uniform(n: int, how: Sampling, device: torch.device, rng: torch.Generator | None = None) -> Tensor:
    """Numbers (n, T, tries) in [0, 1) that decide every token of n completions.

    With ``rng`` on the CPU they are the same on every device.
    """
    tries = 1 if how.top_p == 1 else TRIES + 1
    place = device if rng is None else rng.device
    return torch.rand(n, how.max_new_tokens, tries, generator=rng, device=place, dtype=torch.float64).to(device)


def choose(logits: Tensor, how: Sampling, uniform: Tensor) -> Choice:
    """One token for each row of ``logits`` (n, V), decided by ``uniform`` (n, tries) in [0, 1).

    The cumulative distribution is inverted at the first number. For top-p the vocabulary is not sorted: a drawn token
    belongs to the nucleus if the tokens more likely than it have less mass than ``top_p``; if it does not, the next
    number is tried. This is rejection sampling, so the distribution is exactly that of the nucleus. Where all tries
    fail (one in 10⁸ at top_p 0.9) the nucleus itself is computed.
    """
    if not how.do_sample:
        token = logits.argmax(-1)
        return Choice(token, token_logprobs(logits, token))
    top = logits.amax(-1, keepdim=True)
    weights, blocks = _weights(logits, top)
    log_total = blocks.sum(-1).log()
    if how.top_k:
        smallest = logits.topk(min(how.top_k, logits.shape[-1])).values[:, -1:]
        weights[:, : logits.shape[-1]].masked_fill_(logits < smallest, 0)
        blocks = _blocks(weights)
    token = _draw(weights, blocks, uniform[:, 0])
    if how.top_p < 1:
        token = _within_nucleus(weights, blocks, token, how.top_p, uniform)
    logprob = (logits.gather(1, token[:, None]) - top).squeeze(1) - log_total
    return Choice(token, logprob.float())


def _weights(logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
    """exp(logits − top), padded with 0 to whole blocks (n, blocks·BLOCK), and the blocks' sums (n, blocks), float64."""
    n, size = logits.shape
    weights = logits.new_empty(n, -(-size // BLOCK) * BLOCK)
    weights[:, size:] = 0
    torch.sub(logits, top, out=weights[:, :size]).exp_()
    return weights, _blocks(weights)


def _blocks(weights: Tensor) -> Tensor:
    return weights.view(len(weights), -1, BLOCK).sum(-1).double()


def _draw(weights: Tensor, blocks: Tensor, uniform: Tensor) -> Tensor:
    """The token (n,) at which the cumulative sum of ``weights`` passes ``uniform`` (n,) times its total."""
    block = _invert(blocks, uniform)
    inside = weights.view(len(weights), -1, BLOCK)[torch.arange(len(weights), device=weights.device), block.place]
    return block.place * BLOCK + _invert(inside.double(), block.rest).place


def _invert(weights: Tensor, uniform: Tensor) -> _Found:
    """Invert the cumulative sum of ``weights`` (n, m), float64, at ``uniform`` (n,); never at a weight of 0."""
    cumulative = _cumulative(weights)
    wanted = uniform[:, None] * cumulative[:, -1:]
    place = torch.arange(weights.shape[-1], device=weights.device)
    possible = weights > 0
    last = torch.where(possible, place, 0).amax(-1)
    first = torch.where(possible & (cumulative > wanted), place, weights.shape[-1]).amin(-1)
    found = torch.minimum(first, last)[:, None]
    own = weights.gather(1, found)
    rest = (wanted - cumulative.gather(1, found) + own) / own
    return _Found(found.squeeze(1), rest.squeeze(1).clamp(0, 1))


def _cumulative(weights: Tensor) -> Tensor:
    """Cumulative sums of the rows; on CUDA as a product, which is deterministic."""
    if weights.device.type == "cpu":
        return weights.cumsum(-1)
    size = weights.shape[-1]
    return weights @ torch.ones(size, size, dtype=weights.dtype, device=weights.device).triu()


# top-p


def _within_nucleus(weights: Tensor, blocks: Tensor, token: Tensor, top_p: float, uniform: Tensor) -> Tensor:
    """``token`` (n,) where it is in the nucleus; elsewhere a token drawn with the further numbers."""
    limit = top_p * blocks.sum(-1, keepdim=True)  # (n, 1)
    if weights.device.type == "cpu":
        return _retry(weights, blocks, token, limit, uniform)
    return _masked(weights, blocks, token, limit, uniform)


def _masked(weights: Tensor, blocks: Tensor, token: Tensor, limit: Tensor, uniform: Tensor) -> Tensor:
    """Draw all tries of all rows, and take the first in the nucleus: more work, no waiting."""
    for attempt in range(1, TRIES):
        again = _draw(weights, blocks, uniform[:, attempt])
        token = torch.where(_in_nucleus(weights, token, limit), token, again)
    smallest = _smallest_by_bisection(weights, limit)
    return torch.where(_in_nucleus(weights, token, limit), token, _draw_above(weights, smallest, uniform[:, -1]))


def _retry(weights: Tensor, blocks: Tensor, token: Tensor, limit: Tensor, uniform: Tensor) -> Tensor:
    """Draw again for the rows that need it, and for no other: each number costs a pass over the vocabulary."""
    rows = torch.arange(len(token))
    for attempt in range(1, TRIES + 1):
        part = weights if len(rows) == len(weights) else weights[rows]
        rows = rows[~_in_nucleus(part, token[rows], limit[rows])]
        if len(rows) == 0:
            return token
        if attempt < TRIES:
            token[rows] = _draw(weights[rows], blocks[rows], uniform[rows, attempt])
    smallest = _smallest_by_sorting(weights[rows], limit[rows])
    token[rows] = _draw_above(weights[rows], smallest, uniform[rows, -1])
    return token


def _in_nucleus(weights: Tensor, token: Tensor, limit: Tensor) -> Tensor:
    """(n,) whether the tokens more likely than ``token`` (n,) have less mass than ``limit`` (n, 1)."""
    return _mass_above(weights, weights.gather(1, token[:, None])) < limit.squeeze(1)


def _mass_above(weights: Tensor, bound: Tensor) -> Tensor:
    """(n,) sum of the ``weights`` (n, V) above ``bound`` (n, 1)."""
    above = torch.gt(weights, bound, out=torch.empty_like(weights))  # as numbers: five times as fast as from bool
    return above.mul_(weights).sum(-1)


def _draw_above(weights: Tensor, smallest: Tensor, uniform: Tensor) -> Tensor:
    """Draw among the weights of at least ``smallest`` (n, 1)."""
    nucleus = torch.where(weights >= smallest, weights, 0)
    return _draw(nucleus, _blocks(nucleus), uniform)


def _smallest_by_sorting(weights: Tensor, limit: Tensor) -> Tensor:
    """(n, 1) the smallest weight in the nucleus."""
    mass = weights.sort(descending=True).values
    inside = mass.cumsum(-1, dtype=torch.float64) - mass < limit
    return torch.where(inside, mass, torch.inf).amin(-1, keepdim=True)


def _smallest_by_bisection(weights: Tensor, limit: Tensor) -> Tensor:
    """As :func:`_smallest_by_sorting`, up to rounding, with neither sort nor cumulative sum.

    Numbers of float32 that are not negative have the order of their bits as integers, so 31 halvings find the largest
    bound above which there is still the whole limit; the nucleus is what lies above it.
    """
    low = torch.zeros_like(limit, dtype=torch.int32)  # above it lies at least the limit
    high = weights.amax(-1, keepdim=True).view(torch.int32)  # above it lies less
    for _ in range(31):
        middle = low + (high - low) // 2
        less = _mass_above(weights, middle.view(torch.float32))[:, None] < limit
        low, high = torch.where(less, low, middle), torch.where(less, middle, high)
    return high.view(torch.float32)
