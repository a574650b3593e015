"""Sampling: prompts → Rollout. Most of the time of a step is spent here.

Each prompt is computed once, and its keys and values are copied to the k completions. The cache has its final size from
the start. Finished completions leave the batch. The ids and log-probabilities are recorded as they are sampled. Uniform
numbers decide each token and are drawn for all completions beforehand, so that a completion does not depend on when
another one ends, and the same numbers can be used again.

Models whose cache is more than keys and values, such as state spaces, are sampled by transformers' own ``generate``
with the same choice of tokens: slower, exact. Which way is right is measured at the first call, as in
:mod:`lora_gan.attention`.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tensor
from transformers import Cache, DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lora_gan.attention import Mask, agree, is_coarse, small_windows, trial_ids
from lora_gan.backbone import Backbone
from lora_gan.data.templates import PromptFormat
from lora_gan.data.tokenizer import adopt_turn_end
from lora_gan.errors import LoraGANError, NonFiniteError
from lora_gan.lightning_compat import overrides
from lora_gan.onednn import onednn_layout
from lora_gan.tensors import lengths_mask, token_logprobs
from lora_gan.tree import grow_scored
from lora_gan.types import Rollout

TRIES = 8  # draws for each token under top-p, which may reject some; one more number is kept for the sorted row
log = logging.getLogger("lora_gan")
DENSITY = 0.75  # finished completions leave the batch once the unfinished ones are less than this share of it


@dataclass(frozen=True)
class Sampling:
    """Settings of sampling.

    Args:
        max_new_tokens: Length limit in tokens; a completion without EOS by then is truncated.
        temperature: Divides the logits; all log-probabilities are those of the divided logits.
        top_p: Draw from the smallest set of tokens with at least this mass. Below 1 the recorded log-probabilities
            are still over the whole vocabulary, so policy gradients are no longer exactly on-policy.
        top_k: Draw from the top_k most likely tokens; 0 is all.
        do_sample: Whether to sample; false takes the most likely token each time (greedy decoding).
        num_beams: Width of a beam search; 1 is none. Above 1 the completions are the best beams instead of samples, so
            they do not follow the policy's distribution, which the policy gradient assumes.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    do_sample: bool = True
    num_beams: int = 1

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise LoraGANError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.num_beams < 1:
            raise LoraGANError(f"num_beams must be at least 1 (1 is no beam search), got {self.num_beams}")
        if self.temperature <= 0:
            raise LoraGANError(
                f"temperature must be > 0, got {self.temperature}; for greedy decoding set do_sample: false"
            )
        if not 0 < self.top_p <= 1:
            raise LoraGANError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.top_k < 0:
            raise LoraGANError(f"top_k must be at least 0 (0 is the whole vocabulary), got {self.top_k}")


class _Buffer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values in a buffer of the final length, instead of growing by ``cat``."""

    def __init__(self, keys: Tensor, values: Tensor, k: int, capacity: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.length = keys.shape[-2]
        self.key_buffer = self._allocate(keys, k, capacity)
        self.value_buffer = self._allocate(values, k, capacity)
        self._show()

    @staticmethod
    def _allocate(prompt: Tensor, k: int, capacity: int) -> Tensor:
        rows, heads, length, size = prompt.shape
        buffer = prompt.new_empty(rows * k, heads, capacity, size)
        buffer[:, :, :length] = prompt.repeat_interleave(k, dim=0)
        return buffer

    def _show(self) -> None:
        self.keys, self.values = self.key_buffer[:, :, : self.length], self.value_buffer[:, :, : self.length]

    @overrides(DynamicLayer)
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        new = slice(self.length, self.length + key_states.shape[-2])
        self.key_buffer[:, :, new], self.value_buffer[:, :, new] = key_states, value_states
        self.length = new.stop
        self._show()
        return self.keys, self.values

    @overrides(DynamicLayer)
    def batch_select_indices(self, indices: Tensor) -> None:
        self.key_buffer, self.value_buffer = self.key_buffer[indices], self.value_buffer[indices]
        self._show()


def draw_uniform(n: int, how: Sampling, device: torch.device, rng: torch.Generator | None = None) -> Tensor:
    """Numbers (n, T, tries) in [0, 1) that decide every token of n completions.

    With ``rng`` on the CPU they are the same on every device.
    """
    tries = 1 if how.top_p == 1 else TRIES + 1
    place = device if rng is None else rng.device
    return torch.rand(n, how.max_new_tokens, tries, generator=rng, device=place, dtype=torch.float64).to(device)


@torch.no_grad()
def sample(
    backbone: Backbone,
    prompts: Sequence[Tensor],
    k: int,
    how: Sampling,
    uniform: Tensor | None = None,
    on_rows: Callable[[Tensor], None] | None = None,
    on_tokens: Callable[[Tensor], None] | None = None,
) -> Rollout:
    """Draw k completions for each of B prompts in the backbone's active mode.

    Args:
        backbone: Enter its mode first, ``with backbone.generator(): sample(…)``.
        prompts: B token tensors (P,).
        k: Completions for each prompt, at least 1.
        how: Temperature, length limit and other settings.
        uniform: Numbers from :func:`draw_uniform` for the N completions, to use the same ones again; by default they
            are drawn anew.
        on_rows: Called with the prompt index of each row of the model's batch, (n,) ascending, before the first pass
            and whenever the rows change; for models that treat rows differently, such as multi-LoRA batching.
        on_tokens: Called with each step's tokens (n,) as they are drawn, to show them; not in a beam search.

    Raises:
        LoraGANError: A prompt with its completion may exceed the context, or k is larger than ``num_beams``.
    """
    longest = max(len(p) for p in prompts)
    if longest + how.max_new_tokens > backbone.context_length:
        raise LoraGANError(
            f"the longest prompt has {longest} tokens; with max_new_tokens {how.max_new_tokens} that is more than the "
            f"model's context of {backbone.context_length}: lower data.max_prompt_tokens or sampling.max_new_tokens"
        )
    if how.num_beams > 1:
        rollout = _beam_search(backbone, prompts, k, how)
    else:
        uniform = draw_uniform(len(prompts) * k, how, prompts[0].device) if uniform is None else uniform
        rollout = _draw(backbone, prompts, k, how, uniform, on_rows or (lambda _: None), on_tokens)
    if not rollout.logprobs.isfinite().all():
        raise NonFiniteError(
            "sampling met logits that are NaN or infinite: the weights of the adapter or of the base are broken, or "
            "float16 overflows; go back to an earlier checkpoint, or set backbone.dtype to float32 or bfloat16"
        )
    return rollout


def _draw(
    backbone: Backbone,
    prompts: Sequence[Tensor],
    k: int,
    how: Sampling,
    uniform: Tensor,
    on_rows: Callable[[Tensor], None],
    on_tokens: Callable[[Tensor], None] | None = None,
) -> Rollout:
    way = _way(backbone)
    drawn = _Drawn(backbone, how, uniform, on_tokens)
    with onednn_layout(backbone.causal_lm):
        way(backbone, prompts, k, drawn, on_rows)
    return _gather(backbone, drawn.ids, drawn.logprobs, drawn.ends, drawn.finished, k)


class _Drawn:
    """The tokens drawn so far for n completions, and the choice of the next."""

    def __init__(
        self,
        backbone: Backbone,
        how: Sampling,
        uniform: Tensor,
        on_tokens: Callable[[Tensor], None] | None = None,
    ) -> None:
        self.how, self.uniform, self.vocabulary = how, uniform, backbone.vocabulary
        self.on_tokens = on_tokens or (lambda _: None)
        n, device = len(uniform), uniform.device
        self.eos = torch.tensor(eos_ids(backbone), device=device)
        self.ids = torch.zeros(n, how.max_new_tokens, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(n, how.max_new_tokens, device=device)
        self.ends = torch.full((n,), how.max_new_tokens, device=device)
        self.finished = torch.zeros(n, dtype=torch.bool, device=device)

    def draw(self, rows: Tensor, t: int, logits: Tensor) -> Tensor:
        """Token t of the completions ``rows`` (m,) from their logits (m, V)."""
        scaled = logits[:, : self.vocabulary].float() / self.how.temperature
        token = choose(scaled, self.how, self.uniform[rows, t])
        self.ids[rows, t] = token
        self.logprobs[rows, t] = token_logprobs(scaled, token)
        over = torch.isin(token, self.eos) & ~self.finished[rows]
        self.finished[rows[over]] = True
        self.ends[rows[over]] = t + 1
        self.on_tokens(token)
        return token


_Way = Callable[[Backbone, Sequence[Tensor], int, _Drawn, Callable[[Tensor], None]], None]


def _decode(
    backbone: Backbone, prompts: Sequence[Tensor], k: int, drawn: _Drawn, on_rows: Callable[[Tensor], None]
) -> None:
    """Draw all completions at once, by :class:`_Decoder`."""
    device, steps = prompts[0].device, drawn.how.max_new_tokens
    on_rows(torch.arange(len(prompts), device=device))
    decoder = _Decoder(backbone, prompts, k, steps)
    logits = decoder.first_logits
    alive = torch.arange(len(prompts) * k, device=device)  # (n,) completion of each row in the decoder's batch
    on_rows(alive // k)
    for t in range(steps):
        token = drawn.draw(alive, t, logits)
        going = ~drawn.finished[alive]
        if t + 1 == steps or not going.any():
            break
        if going.float().mean() < DENSITY:
            decoder.keep(going)
            alive, token = alive[going], token[going]
            on_rows(alive // k)
        logits = decoder.step(token)


def _generate(
    backbone: Backbone,
    prompts: Sequence[Tensor],
    k: int,
    drawn: _Drawn,
    on_rows: Callable[[Tensor], None],
    use_cache: bool = True,
) -> None:
    """Draw the completions by transformers' ``generate``, prompts of one length at a time: no padding."""
    for group in _by_length(prompts):
        on_rows(group.repeat_interleave(k))
        rows = (group[:, None] * k + torch.arange(k, device=group.device)).flatten()
        ids = torch.stack([prompts[b] for b in group.tolist()]).repeat_interleave(k, dim=0)
        settings = {"max_new_tokens": drawn.how.max_new_tokens, "use_cache": use_cache}
        with _generating(backbone, drawn.eos.tolist(), **settings) as model:
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                logits_processor=LogitsProcessorList([_Forced(drawn, rows)]),
            )


def _recompute(
    backbone: Backbone, prompts: Sequence[Tensor], k: int, drawn: _Drawn, on_rows: Callable[[Tensor], None]
) -> None:
    """As :func:`_generate`, without a cache."""
    _generate(backbone, prompts, k, drawn, on_rows, use_cache=False)


class _Forced(LogitsProcessor):  # type: ignore[misc]
    """Leaves ``generate`` no token but the one that ``drawn`` chooses."""

    def __init__(self, drawn: _Drawn, rows: Tensor) -> None:
        self.drawn, self.rows, self.t = drawn, rows, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = self.drawn.draw(self.rows, self.t, scores)
        self.t += 1
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


def _by_length(prompts: Sequence[Tensor]) -> list[Tensor]:
    """Indices of the prompts of each length, ascending."""
    groups: dict[int, list[int]] = defaultdict(list)
    for b, prompt in enumerate(prompts):
        groups[len(prompt)].append(b)
    return [torch.tensor(group, device=prompts[0].device) for group in groups.values()]


@contextmanager
def _generating(backbone: Backbone, eos: list[int], **settings: Any) -> Iterator[PreTrainedModel]:
    """The base with these settings of ``generate`` alone: those in its files would fill whatever a call leaves out."""
    model = backbone.causal_lm
    before = model.generation_config
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=eos or None, pad_token_id=(eos or [0])[0], **settings
    )
    try:
        yield model
    finally:
        model.generation_config = before


# which way is right

_WAYS: WeakKeyDictionary[Backbone, dict[tuple[torch.device, bool], _Way]] = WeakKeyDictionary()


def prepare(backbone: Backbone) -> None:
    """Find out how the base is to be sampled; needed before its layers are patched.

    Raises:
        LoraGANError: It cannot be sampled.
    """
    _way(backbone)


def _way(backbone: Backbone) -> _Way:
    """The fastest way of drawing completions with the logits of a scoring pass; measured at the first call."""
    known, where = _WAYS.setdefault(backbone, {}), (backbone.device, is_coarse(backbone.causal_lm))
    if where not in known:
        with backbone.reference(), small_windows(backbone.causal_lm):
            known[where] = _first_right(backbone)
    return known[where]


def _first_right(backbone: Backbone) -> _Way:
    name = type(backbone.causal_lm).__name__
    for way in (_decode, _generate, _recompute) if backbone.masks() is not None else (_generate, _recompute):
        if _is_right(backbone, way):
            if way is not _decode:
                log.warning("%s is sampled by transformers' generate: slower, exact", name)
            return way
    raise LoraGANError(
        f"{name} cannot be sampled: generate of transformers gives other logits than its own forward on the same text; "
        "choose the base of another architecture"
    )


def _is_right(backbone: Backbone, way: _Way) -> bool:
    """Whether the way's logits after two prompts and some tokens equal those of a scoring pass."""
    k, steps = 2, 5
    ids = trial_ids(8 + 2 * k * steps, backbone.vocabulary, backbone.device)
    prompts, tokens = [ids[:5], ids[5:8]], ids[8:].view(2 * k, steps)
    recorded = _Recorded(backbone, tokens)
    try:
        way(backbone, prompts, k, recorded, lambda _: None)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever an architecture raises, it does not work this way
        log.debug("%s: %s", way.__name__, error)
        return False
    tree = grow_scored(prompts, {"trial": [list(tokens[:k]), list(tokens[k:])]})
    wanted = backbone.predict(tree)["trial"].logits
    return agree(torch.stack(recorded.logits, 1).flatten(0, 1), wanted, is_coarse(backbone.causal_lm))


class _Recorded(_Drawn):
    """Given tokens (n, T) in place of drawn ones; keeps the logits."""

    def __init__(self, backbone: Backbone, tokens: Tensor) -> None:
        n, steps = tokens.shape
        super().__init__(backbone, Sampling(max_new_tokens=steps), torch.zeros(n, steps, 1, device=tokens.device))
        self.tokens, self.eos = tokens, self.eos[:0]
        self.logits = [torch.zeros(n, self.vocabulary, device=tokens.device) for _ in range(steps)]

    def draw(self, rows: Tensor, t: int, logits: Tensor) -> Tensor:
        self.logits[t][rows] = logits[:, : self.vocabulary].float()
        return self.tokens[rows, t]


def _beam_search(backbone: Backbone, prompts: Sequence[Tensor], k: int, how: Sampling) -> Rollout:
    """The k best completions of transformers' beam search, with their log-probabilities from a scoring pass."""
    if k > how.num_beams:
        raise LoraGANError(
            f"a beam search of {how.num_beams} beams cannot give {k} completions: raise sampling.num_beams"
        )
    eos, device = torch.tensor(eos_ids(backbone), device=prompts[0].device), prompts[0].device
    found = torch.full((len(prompts) * k, how.max_new_tokens), int(eos[0]), device=device)
    way = _way(backbone)
    for group in [torch.arange(len(prompts), device=device)] if way is _decode else _by_length(prompts):
        settings = {"num_beams": how.num_beams, "num_return_sequences": k, "max_new_tokens": how.max_new_tokens}
        with _generating(backbone, eos.tolist(), use_cache=way is not _recompute, **settings) as model:
            beams = _continued(model, [prompts[b] for b in group.tolist()], backbone.vocabulary)
        rows = (group[:, None] * k + torch.arange(k, device=device)).flatten()
        found[rows, : beams.shape[1]] = beams
    is_end = torch.isin(found, eos)
    finished = is_end.any(1)
    ends = torch.where(finished, is_end.int().argmax(1) + 1, found.shape[1])
    rollout = _gather(backbone, found, torch.zeros(found.shape, device=device), ends, finished, k)
    branches = [list(rollout.completion_ids[b * k : (b + 1) * k]) for b in range(len(prompts))]
    scored = backbone.logprobs(grow_scored(prompts, {"beams": branches}), {"beams": how.temperature})["beams"]
    return replace(rollout, logprobs=scored)


def _continued(model: PreTrainedModel, prompts: Sequence[Tensor], vocabulary: int) -> Tensor:
    """(n, T) tokens of the first ``vocabulary`` that ``generate`` adds to the prompts, anything after an EOS."""
    width, padding = max(len(p) for p in prompts), model.generation_config.pad_token_id
    ids: Tensor = model.generate(
        input_ids=torch.stack([pad_tensor(p, (width - len(p), 0), value=padding) for p in prompts]),
        attention_mask=torch.stack([pad_tensor(torch.ones_like(p), (width - len(p), 0)) for p in prompts]),
        suppress_tokens=list(range(vocabulary, len(model.get_input_embeddings().weight))) or None,
    )
    return ids[:, width:]


def _gather(backbone: Backbone, ids: Tensor, logprobs: Tensor, ends: Tensor, finished: Tensor, k: int) -> Rollout:
    """Cut each completion at its end and decode it."""
    mask = lengths_mask(ends, int(ends.max()))
    ids, logprobs = ids[:, : mask.shape[1]] * mask, logprobs[:, : mask.shape[1]] * mask
    completions = [row[:end] for row, end in zip(ids.tolist(), ends.tolist(), strict=True)]
    texts = backbone.tokenizer.batch_decode(completions, skip_special_tokens=True)
    return Rollout(ids, mask, logprobs, ~finished, tuple(texts), k)


class _Decoder:
    """Runs the model token by token after left-padded prompts."""

    def __init__(self, backbone: Backbone, prompts: Sequence[Tensor], k: int, room: int) -> None:
        masks = backbone.masks()
        assert masks is not None, "the model takes a 4-D mask"
        self.model, self.masks = backbone.causal_lm, masks
        lengths = torch.tensor([len(p) for p in prompts], device=prompts[0].device)
        width = int(lengths.max())
        column = torch.arange(width, device=lengths.device)
        real = column >= (width - lengths)[:, None]  # (B, P)
        ids = torch.stack([pad_tensor(p, (width - len(p), 0)) for p in prompts])
        causal = column <= column[:, None]
        visible = (causal & real[:, None, :]) | torch.eye(width, dtype=torch.bool, device=lengths.device)
        positions = (column - (width - lengths)[:, None]).clamp(min=0)
        cache = DynamicCache()
        output = self.model(
            input_ids=ids,
            attention_mask=None if bool(real.all()) else masks(visible[:, None], positions, positions),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = Cache(layers=[_Buffer(layer.keys, layer.values, k, width + room) for layer in cache.layers])
        self.first_logits = output.logits[:, -1].repeat_interleave(k, dim=0)  # (N, V)
        self.position = lengths.repeat_interleave(k)  # (N,) position of the next token
        padding = None if bool(real.all()) else real.repeat_interleave(k, dim=0)
        self.seen = None if padding is None else pad_tensor(padding, (0, room), value=True)
        self.columns = width

    def keep(self, rows: Tensor) -> None:
        """Keep the rows where ``rows`` (n,) is True."""
        for layer in self.cache.layers:
            layer.batch_select_indices(rows)
        self.position = self.position[rows]
        self.seen = None if self.seen is None else self.seen[rows]

    def step(self, token: Tensor) -> Tensor:
        """Append one token to each row, (n,) → logits of the next, (n, V)."""
        self.columns += 1
        output = self.model(
            input_ids=token[:, None],
            attention_mask=self._mask(),
            position_ids=self.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.position = self.position + 1
        logits: Tensor = output.logits[:, -1]
        return logits

    def _mask(self) -> Mask | None:
        if self.seen is None:
            return None
        back = torch.arange(self.columns - 1, -1, -1, device=self.position.device)  # from each column to the last
        keys = self.position[:, None] - back
        return self.masks(self.seen[:, None, None, : self.columns], self.position[:, None], keys)


def choose(logits: Tensor, how: Sampling, uniform: Tensor) -> Tensor:
    """One token for each row of ``logits`` (n, V), decided by ``uniform`` (n, tries) in [0, 1).

    The cumulative distribution is inverted at the first number. For top-p the vocabulary is not sorted: a drawn token
    belongs to the nucleus if the tokens more likely than it have less mass than ``top_p``; if it does not, the next
    number is tried. This is rejection sampling, so the distribution is exactly that of the nucleus. Rows in which all
    tries fail (one in 10⁸ at top_p 0.9) are sorted.
    """
    if not how.do_sample:
        return logits.argmax(-1)
    if how.top_k:
        smallest = logits.topk(min(how.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probabilities = logits.softmax(-1)
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    token = _invert(cumulative, uniform[:, 0])
    if how.top_p == 1:
        return token
    rows = torch.arange(len(token), device=token.device)
    for attempt in range(1, TRIES + 1):
        rows = rows[_more_likely(probabilities[rows], token[rows]) >= how.top_p]
        if len(rows) == 0:
            return token
        if attempt < TRIES:
            token[rows] = _invert(cumulative[rows], uniform[rows, attempt])
    mass, order = probabilities[rows].sort(descending=True)
    nucleus = mass * (mass.cumsum(-1) - mass < how.top_p)
    place = _invert(nucleus.cumsum(-1, dtype=torch.float64), uniform[rows, -1])
    token[rows] = order.gather(1, place[:, None]).squeeze(1)
    return token


def _invert(cumulative: Tensor, uniform: Tensor) -> Tensor:
    """Index of the first entry of ``cumulative`` (n, V) above ``uniform`` (n,) times its total."""
    place = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:], right=True)
    return place.squeeze(1).clamp(max=cumulative.shape[-1] - 1)


def _more_likely(probabilities: Tensor, token: Tensor) -> Tensor:
    """Mass of the tokens that are more likely than ``token`` (n,) in each row of ``probabilities`` (n, V)."""
    own = probabilities.gather(1, token[:, None])
    return torch.where(probabilities > own, probabilities, 0).sum(-1)


def end_turns(backbone: Backbone, prompts: PromptFormat) -> None:
    """Let completions end as the chat template ends a turn; they still end where the model's own settings say, too."""
    ends = eos_ids(backbone)
    adopt_turn_end(backbone.tokenizer, prompts)
    if prompts.chat and (settings := backbone.causal_lm.generation_config) is not None:
        settings.eos_token_id = ends


def eos_ids(backbone: Backbone) -> list[int]:
    """All tokens at which the model stops: chat models name several in their generation settings."""
    settings = backbone.causal_lm.generation_config
    named = settings.eos_token_id if settings is not None else None
    ids = named if isinstance(named, list) else [] if named is None else [named]
    return sorted({*ids, backbone.tokenizer.eos_token_id})
