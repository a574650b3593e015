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
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from lora_gan.attention import agree, is_coarse, small_windows, trial_ids
from lora_gan.backbone import Backbone
from lora_gan.data.templates import PromptFormat
from lora_gan.data.tokenizer import adopt_turn_end
from lora_gan.errors import LoraGANError, NonFiniteError
from lora_gan.sampling.choice import choose, draw_uniform
from lora_gan.sampling.decoder import Decoder, InPlaceDecoder
from lora_gan.sampling.settings import Sampling
from lora_gan.sampling.weights import decoding_weights
from lora_gan.tensors import lengths_mask
from lora_gan.tree import grow_scored
from lora_gan.types import Rollout

log = logging.getLogger("lora_gan")
DENSITY = 0.75  # finished completions leave the batch once the unfinished ones are less than this share of it
LOOK = 16  # tokens between two looks at which completions have ended, on a GPU
FEWEST = 8  # rows of the smallest batch there


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
    if on_tokens is not None and way is _decode_in_place:
        way = _decode  # what is shown has to come to the host
    drawn = _Drawn(backbone, how, uniform, on_tokens)
    with decoding_weights(backbone.causal_lm, how, uniform[..., 0].numel()):
        way(backbone, prompts, k, drawn, on_rows)
    return gather(backbone, drawn.ids, drawn.logprobs, drawn.ends, drawn.finished, k)


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
        self.logprobs = torch.zeros(n, how.max_new_tokens, dtype=torch.float32, device=device)
        self.ends = torch.full((n,), how.max_new_tokens, device=device)
        self.finished = torch.zeros(n, dtype=torch.bool, device=device)

    def draw(self, rows: Tensor, t: int | Tensor, logits: Tensor) -> Tensor:
        """Token t of the completions ``rows`` (m,) from their logits (m, V); does not wait for the device.

        ``t`` may be a tensor (1,) on the device.
        """
        scaled = logits[:, : self.vocabulary].float()
        if self.how.temperature != 1:
            scaled = scaled / self.how.temperature
        chosen = choose(scaled, self.how, self.uniform[rows, t])
        self.ids[rows, t], self.logprobs[rows, t] = chosen.token, chosen.logprob
        over = torch.isin(chosen.token, self.eos) & ~self.finished[rows]
        self.ends[rows] = torch.where(over, t + 1, self.ends[rows])
        self.finished[rows] = self.finished[rows] | over
        self.on_tokens(chosen.token)
        return chosen.token


_Way = Callable[[Backbone, Sequence[Tensor], int, _Drawn, Callable[[Tensor], None]], None]


def _decode(
    backbone: Backbone, prompts: Sequence[Tensor], k: int, drawn: _Drawn, on_rows: Callable[[Tensor], None]
) -> None:
    """Draw all completions at once, by :class:`_Decoder`."""
    device, steps = prompts[0].device, drawn.how.max_new_tokens
    on_rows(torch.arange(len(prompts), device=device))
    decoder = Decoder(backbone, prompts, k, steps)
    logits = decoder.first_logits
    alive = torch.arange(len(prompts) * k, device=device)  # (n,) completion of each row in the decoder's batch
    on_rows(alive // k)
    for t in range(steps):
        token = drawn.draw(alive, t, logits)
        going = ~drawn.finished[alive]
        if t + 1 == steps or not going.any():
            break
        if going.float().mean() < DENSITY:
            kept = going.nonzero().squeeze(1)
            decoder.keep(kept)
            alive, token = alive[kept], token[kept]
            on_rows(alive // k)
        logits = decoder.step(token)


def _decode_in_place(
    backbone: Backbone, prompts: Sequence[Tensor], k: int, drawn: _Drawn, on_rows: Callable[[Tensor], None]
) -> None:
    """As :func:`_decode` without waiting for the device, but for a look at the ends every few tokens.

    The batch shrinks by powers of two alone, since each number of rows is a CUDA graph of its own.
    """
    device, steps = prompts[0].device, drawn.how.max_new_tokens
    on_rows(torch.arange(len(prompts), device=device))
    decoder = InPlaceDecoder(backbone, prompts, k, steps, drawn.draw, drawn.how.cuda_graphs)
    on_rows(decoder.rows // k)
    for t in range(1, steps):
        if t % LOOK == 0:
            going = ~drawn.finished[decoder.rows]
            left = int(going.sum())
            if left == 0:
                break
            if (size := max(FEWEST, 1 << (left - 1).bit_length())) < len(going):
                decoder.keep(going.int().argsort(descending=True, stable=True)[:size].sort().values)
                on_rows(decoder.rows // k)
        decoder.advance()


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

_TOGETHER: tuple[_Way, ...] = (_decode, _decode_in_place)  # take prompts of unequal length in one batch
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
    fast: tuple[_Way, ...] = (_decode_in_place, _decode) if backbone.device.type == "cuda" else (_decode,)
    for way in (*(fast if backbone.masks() is not None else ()), _generate, _recompute):
        if _is_right(backbone, way):
            if way not in fast:
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
    wanted = backbone.predict(tree)["trial"].logits.whole()
    return agree(recorded.logits.flatten(0, 1), wanted, is_coarse(backbone.causal_lm))


class _Recorded(_Drawn):
    """Given tokens (n, T) in place of drawn ones; keeps the logits."""

    def __init__(self, backbone: Backbone, tokens: Tensor) -> None:
        n, steps = tokens.shape
        super().__init__(backbone, Sampling(max_new_tokens=steps), torch.zeros(n, steps, 1, device=tokens.device))
        self.tokens, self.eos = tokens, self.eos[:0]
        self.logits = torch.zeros(n, steps, self.vocabulary, device=tokens.device)

    def draw(self, rows: Tensor, t: int | Tensor, logits: Tensor) -> Tensor:
        self.logits[rows, t] = logits[:, : self.vocabulary].float()
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
    for group in [torch.arange(len(prompts), device=device)] if way in _TOGETHER else _by_length(prompts):
        settings = {"num_beams": how.num_beams, "num_return_sequences": k, "max_new_tokens": how.max_new_tokens}
        with _generating(backbone, eos.tolist(), use_cache=way is not _recompute, **settings) as model:
            beams = _continued(model, [prompts[b] for b in group.tolist()], backbone.vocabulary)
        rows = (group[:, None] * k + torch.arange(k, device=device)).flatten()
        found[rows, : beams.shape[1]] = beams
    is_end = torch.isin(found, eos)
    finished = is_end.any(1)
    ends = torch.where(finished, is_end.int().argmax(1) + 1, found.shape[1])
    rollout = gather(backbone, found, torch.zeros(found.shape, device=device), ends, finished, k)
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


def gather(backbone: Backbone, ids: Tensor, logprobs: Tensor, ends: Tensor, finished: Tensor, k: int) -> Rollout:
    """Cut each completion at its end and decode it."""
    mask = lengths_mask(ends, int(ends.max()))
    ids, logprobs = ids[:, : mask.shape[1]] * mask, logprobs[:, : mask.shape[1]] * mask
    completions = [row[:end] for row, end in zip(ids.tolist(), ends.tolist(), strict=True)]
    texts = backbone.tokenizer.batch_decode(completions, skip_special_tokens=True)
    return Rollout(ids, mask, logprobs, ~finished, tuple(texts), k)


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
