"""Decoders: the model token by token, over key-value buffers that have their final length from the start.

On a CPU a decoder sees the filled part of its buffers, which grows. On a GPU it sees all of them through a mask, and
all that changes from step to step is written in place on the device: so no step waits for the host, all steps of one
number of rows are the same operations, and they are recorded once and replayed as a CUDA graph.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from lora_gan.attention import Mask, Masks
from lora_gan.backbone import Backbone
from lora_gan.lightning_compat import overrides

WARM_UP = 2  # steps run as they are before one is recorded: libraries set themselves up in the first
log = logging.getLogger("lora_gan")


class _Buffer(DynamicLayer):  # type: ignore[misc]
    """One layer's keys and values in a buffer of the final length, instead of growing by ``cat``."""

    def __init__(self, keys: Tensor, values: Tensor, k: int, capacity: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.length = keys.shape[-2]
        self.key_buffer = self._allocate(keys, k, capacity)
        self.value_buffer = self._allocate(values, k, capacity)
        self._show()

    def _allocate(self, prompt: Tensor, k: int, capacity: int) -> Tensor:
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


class _WholeBuffer(_Buffer):
    """The same, seen whole: one token is written at ``column`` (1,), a number on the device."""

    def __init__(self, keys: Tensor, values: Tensor, k: int, capacity: int, column: Tensor) -> None:
        super().__init__(keys, values, k, capacity)
        self.column = column
        for buffer in (self.key_buffer, self.value_buffer):
            buffer[:, :, self.length :] = 0  # a masked NaN is still a NaN

    def _show(self) -> None:
        self.keys, self.values = self.key_buffer, self.value_buffer

    @overrides(DynamicLayer)
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.key_buffer.index_copy_(2, self.column, key_states)
        self.value_buffer.index_copy_(2, self.column, value_states)
        return self.keys, self.values


@dataclass(frozen=True)
class _Prompts:
    """What the model computed of B left-padded prompts."""

    cache: DynamicCache
    logits: Tensor  # (B, V) of the first token
    lengths: Tensor  # (B,)
    real: Tensor  # (B, P) False at padding
    padded: bool  # whether there is any
    masks: Masks


def _read(backbone: Backbone, prompts: Sequence[Tensor]) -> _Prompts:
    """One pass over the prompts."""
    masks = backbone.masks()
    assert masks is not None, "the model takes a 4-D mask"
    width, device = max(len(p) for p in prompts), prompts[0].device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    column = torch.arange(width, device=device)
    real = column >= (width - lengths)[:, None]
    padded = min(len(p) for p in prompts) < width
    ids = torch.stack([pad_tensor(p, (width - len(p), 0)) for p in prompts])
    visible = ((column <= column[:, None]) & real[:, None, :]) | torch.eye(width, dtype=torch.bool, device=device)
    positions = (column - (width - lengths)[:, None]).clamp(min=0)
    cache = DynamicCache()
    output = backbone.causal_lm(
        input_ids=ids,
        attention_mask=masks(visible[:, None], positions, positions) if padded else None,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return _Prompts(cache, output.logits[:, -1], lengths, real, padded, masks)


class Decoder:
    """Runs the model token by token after left-padded prompts.

    Args:
        backbone: Its mode stays the same while this is in use.
        prompts: B token tensors (P,).
        k: Rows for each prompt.
        room: Tokens that may follow.
    """

    def __init__(self, backbone: Backbone, prompts: Sequence[Tensor], k: int, room: int) -> None:
        read = _read(backbone, prompts)
        self.model, self.masks, self.columns = backbone.causal_lm, read.masks, read.real.shape[1]
        capacity = self.columns + room
        self.cache = Cache(layers=[_Buffer(layer.keys, layer.values, k, capacity) for layer in read.cache.layers])
        self.first_logits = read.logits.repeat_interleave(k, dim=0)  # (N, V)
        self.position = read.lengths.repeat_interleave(k)  # (N,) position of the next token
        real = read.real.repeat_interleave(k, dim=0)
        self.seen = pad_tensor(real, (0, room), value=True) if read.padded else None

    def keep(self, rows: Tensor) -> None:
        """Keep these rows, (m,) indices."""
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


Draw = Callable[[Tensor, Tensor, Tensor], Tensor]


class InPlaceDecoder:
    """As :class:`Decoder`, with the choice of tokens inside the step, which is always the same operations.

    Args:
        backbone: Its mode stays the same while this is in use.
        prompts: B token tensors (P,).
        k: Rows for each prompt.
        room: Tokens that may follow.
        draw: Chooses token t (1,) of the completions (n,) from their logits (n, V) and keeps it; called with tensors on
            the device, it may not wait for them.
        graphs: Whether to replay the step as a CUDA graph.
    """

    def __init__(
        self, backbone: Backbone, prompts: Sequence[Tensor], k: int, room: int, draw: Draw, graphs: bool
    ) -> None:
        read = _read(backbone, prompts)
        self.model, self.masks, self.draw = backbone.causal_lm, read.masks, draw
        width, device = read.real.shape[1], read.real.device
        self.column = torch.tensor([width], device=device)  # of the next token
        self.t = torch.zeros(1, dtype=torch.long, device=device)
        layers = [_WholeBuffer(x.keys, x.values, k, width + room, self.column) for x in read.cache.layers]
        self.cache = Cache(layers=layers)
        self.position = read.lengths.repeat_interleave(k)  # (n,) of the next token
        self.seen = pad_tensor(read.real.repeat_interleave(k, dim=0), (0, room), value=True)  # (n, capacity)
        self.rows = torch.arange(len(self.position), device=device)  # (n,) completion of each row
        self.token = draw(self.rows, self.t, read.logits.repeat_interleave(k, dim=0))
        self._graph = _Replayed(self._step) if graphs and device.type == "cuda" else None

    def advance(self) -> None:
        """Append the last token of each row and draw the next."""
        if self._graph is None:
            self._step()
        else:
            self._graph()

    def keep(self, rows: Tensor) -> None:
        """Keep these rows, (m,) ascending indices."""
        for layer in self.cache.layers:
            layer.batch_select_indices(rows)
        self.position, self.seen = self.position[rows], self.seen[rows]
        self.rows, self.token = self.rows[rows], self.token[rows]
        self._graph = None if self._graph is None else _Replayed(self._step)

    def _step(self) -> None:
        output = self.model(
            input_ids=self.token[:, None],
            attention_mask=self._mask(),
            position_ids=self.position[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        for counter in (self.position, self.column, self.t):
            counter.add_(1)
        self.token.copy_(self.draw(self.rows, self.t, output.logits[:, -1]))

    def _mask(self) -> Mask:
        back = self.column - torch.arange(self.seen.shape[1], device=self.seen.device)  # from each column to the token
        visible = self.seen & (back >= 0)
        return self.masks(visible[:, None, None], self.position[:, None], self.position[:, None] - back)


class _Replayed:
    """A function that works in place on CUDA tensors: run as it is a few times, then recorded and replayed.

    If it cannot be recorded, it is run as it is; the reason is logged once.
    """

    refused: str | None = None  # why the last recording failed; no other is tried

    def __init__(self, work: Callable[[], None]) -> None:
        self.work = work
        self.left = WARM_UP
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self) -> None:
        if self.left or _Replayed.refused:
            self.left = max(self.left - 1, 0)
            self._aside()
            return
        if self.graph is None:
            self._record()
        if self.graph is None:
            self.work()
        else:
            self.graph.replay()

    def _aside(self) -> None:
        """On another stream, as recording needs it."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            self.work()
        torch.cuda.current_stream().wait_stream(self.stream)

    def _record(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                self.work()
        except RuntimeError as error:
            _Replayed.refused = str(error)
            log.warning("a decoding step cannot be recorded as a CUDA graph, sampling is slower: %s", error)
            return
        self.graph = graph
