"""Attention: how each architecture computes a prompt tree.

Many architectures take a 4-D mask that says which token sees which, so a tree is one row. Its form differs: layers with
sliding or chunked attention see the last positions only, some models want one mask for each type of layer, and few want
a mask of bool instead of one that is *added* to the scores. Other architectures have layers that ignore a mask, such as
state spaces, convolutions and linear attention, or place tokens by their column. There each branch is evaluated in a
row of its own, after its prompt.

Which of these is right is not looked up in a list of names but measured: before its first pass, a model runs on a small
tree in every form, and the first one that equals the model's own forward on separate rows is used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PretrainedConfig, PreTrainedModel

from lora_gan.errors import LoraGANError
from lora_gan.flex import FLEX, attention_by, attention_of, block_mask
from lora_gan.tree import PADDING, PROMPT, PromptTree, grow

FULL, SLIDING, CHUNKED = "full_attention", "sliding_attention", "chunked_attention"  # names of transformers
WINDOWS = {SLIDING: "sliding_window", CHUNKED: "attention_chunk_size"}  # the settings of their sizes, in tokens
ONE, WINDOWED, BY_LAYER = "one mask", "one mask with a window", "one mask for each type of layer"
SMALL = 3  # size of the windows, in tokens, while the forms are tried
TOLERANCE, COARSE = 1e-3, 5e-2  # of the logits' error in units of their standard deviation; COARSE: below 32 bits
ALIGNED = 16  # on a GPU the rows of an added mask begin at multiples of it, as SDPA's kernels want; a CPU is slower so
LARGE = 64.0  # by which hidden states are multiplied to find what is done to large logits
log = logging.getLogger("lora_gan")

Mask = Tensor | dict[str, Tensor]


@dataclass(frozen=True)
class Masks:
    """The form in which a model takes its attention mask.

    Args:
        config: The configuration of the model's text part.
        kind: ONE, WINDOWED or BY_LAYER.
        additive: Data type of a mask that is added to the scores, under autocast that of autocast; None for a mask of
            bool, which SDPA makes such a mask of in every layer, and keeps for the backward pass.
    """

    config: PretrainedConfig
    kind: str = ONE
    additive: torch.dtype | None = None

    def __call__(self, visible: Tensor, query: Tensor, key: Tensor) -> Mask:
        """The mask of a pass.

        Args:
            visible: (B, 1, Q, K) bool, True where the query may see the key apart from any window.
            query: (B, Q) positions of the queries.
            key: (B, K) positions of the keys.
        """
        if self.kind == ONE:
            return self._formed(visible)
        near = self._within_windows(visible, query[:, None, :, None], key[:, None, None, :])
        if self.kind == BY_LAYER:
            return {layer: self._formed(mask) for layer, mask in near.items()}
        return self._formed(torch.stack(list(near.values())).all(0))

    def _within_windows(self, visible: Tensor, query: Tensor, key: Tensor) -> dict[str, Tensor]:
        sizes = window_sizes(self.config)
        near = {FULL: visible}
        if SLIDING in sizes:
            near[SLIDING] = visible & (query - key < sizes[SLIDING])
        if CHUNKED in sizes:
            near[CHUNKED] = visible & (query // sizes[CHUNKED] == key // sizes[CHUNKED])
        return near

    def _formed(self, mask: Tensor) -> Tensor:
        if self.additive is None:
            return mask
        device, width = mask.device, mask.shape[-1]
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else self.additive
        multiple = ALIGNED if mask.is_cuda else 1
        aligned = torch.zeros((*mask.shape[:-1], -(-width // multiple) * multiple), dtype=dtype, device=device)
        # the smallest number and not -inf: where nothing is visible the softmax is uniform and not NaN
        return aligned[..., :width].masked_fill_(~mask, torch.finfo(dtype).min)


def window_sizes(config: PretrainedConfig) -> dict[str, int]:
    """Sizes in tokens of the windows in the model's attention, by type of layer."""
    return {layer: size for layer, name in WINDOWS.items() if (size := getattr(config, name, None))}


@dataclass(frozen=True)
class Rows:
    """The R branches of B trees as separate rows: prompt and branch, then anything up to the common length W."""

    tree: Tensor  # (R,) tree of each row
    columns: Tensor  # (R, W) its tokens' columns there
    lengths: Tensor  # (R,) tokens of prompt and branch
    row: Tensor  # (B, L) row in which each column of a tree is computed; the prompt's in its first row
    place: Tensor  # (B, L) its place there

    def of(self, values: Tensor) -> Tensor:
        """Values of the trees' columns, (B, L, …), as those of the rows' tokens, (R, W, …)."""
        return values[self.tree[:, None], self.columns]


def separate(tree: PromptTree) -> Rows:
    """The branches of the trees as separate rows; a prompt without branches is a row, too."""
    count = tree.segments.amax(1).clamp(min=1)  # (B,)
    first = count.cumsum(0) - count
    owner = torch.repeat_interleave(torch.arange(len(count), device=count.device), count)
    branch = 1 + torch.arange(len(owner), device=count.device) - first[owner]
    segments = tree.segments[owner]  # (R, L)
    inside = (segments == PROMPT) | (segments == branch[:, None])
    lengths = inside.sum(1)
    columns = inside.int().argsort(dim=1, descending=True, stable=True)[:, : int(lengths.max())]
    row = first[:, None] + (tree.segments - 1).clamp(min=0)
    return Rows(owner, columns, lengths, row, tree.position_ids)


@dataclass(frozen=True)
class Pass:
    """What a model computes of trees."""

    hidden: Tensor  # (B, L, H) last hidden states, as the head receives them
    logits: Tensor  # (n, V) at the selected positions


class TreeForward:
    """Runs a causal language model on prompt trees: each as one row if the model allows it, else in separate rows.

    Args:
        model: The model, in evaluation mode; it may be wrapped by PEFT.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.name = f"{type(model).__name__} ({model.name_or_path})"
        self._found: dict[tuple[torch.device, bool], Masks | None] = {}
        self._plain: dict[tuple[torch.device, bool], bool] = {}
        self._blocks: dict[tuple[torch.device, bool], bool] = {}

    def __call__(
        self,
        tree: PromptTree,
        rows: Tensor,
        columns: Tensor,
        embedded: Tensor | None = None,
        blocks: bool = False,
    ) -> Pass:
        """Run the model on the trees once; the head is applied only at the n positions ``(rows, columns)``.

        Args:
            tree: B prompt trees of L columns.
            rows: (n,) tree of each selected position.
            columns: (n,) its column.
            embedded: (B, L, H) word embeddings to read instead of those of ``tree.ids``.
            blocks: Use FlexAttention, which the model must take; layers that are recomputed in the backward pass need
                ``flex.attention_by`` there.
        """
        if blocks:
            return self._in_blocks(tree, rows, columns, embedded)
        return self._run(self.masks(), tree, rows, columns, embedded)

    def masks(self) -> Masks | None:
        """The form of the model's mask; None if trees need separate rows. Measured at the first call on a device.

        Raises:
            LoraGANError: The model does not run, gives NaN, or is not causal.
        """
        if not self.is_measured:
            with torch.no_grad(), small_windows(self.model):
                self._found[self._where] = self._measure()
                self._plain[self._where] = self._has_plain_head()
        return self._found[self._where]

    @property
    def plain_head(self) -> nn.Module | None:
        """The head, where logits are its product with the hidden states and no more; :meth:`masks` measures it.

        None while another forward, such as one of 8 bits, takes the place of the head's own.
        """
        head = output_head(self.model)
        return head if self._plain[self._where] and "forward" not in vars(head) else None

    def _has_plain_head(self) -> bool:
        """Also with larger states, which show a limit on the logits."""
        head = output_head(self.model)
        return _is_frozen_matrix(head) and all(self._is_product(head, scale) for scale in (1.0, LARGE))

    def _is_product(self, head: nn.Module, scale: float) -> bool:
        tree = _trial(self.model)
        rows, columns = (tree.segments != PADDING).nonzero().T
        handle = head.register_forward_pre_hook(lambda _, inputs: (scale * inputs[0],))
        try:
            done = self._run(self._found[self._where], tree, rows, columns)
        finally:
            handle.remove()
        found = linear(done.hidden[rows, columns], head.get_parameter("weight"), getattr(head, "bias", None))
        return torch.equal(found.float(), done.logits.float())

    @torch.no_grad()
    def takes_blocks(self) -> bool:
        """Whether the model computes the same by FlexAttention. Measured at the first call on a device."""
        if self._where not in self._blocks:
            masks, sdpa = self.masks(), attention_of(self.model) == "sdpa"
            self._blocks[self._where] = sdpa and masks is not None and masks.kind == ONE and self._equals_in_blocks()
        return self._blocks[self._where]

    def _equals_in_blocks(self) -> bool:
        tree = _trial(self.model)
        rows, columns = (tree.segments != PADDING).nonzero().T
        found = self._tried(lambda: self._in_blocks(tree, rows, columns), "FlexAttention")
        wanted = self._run(self.masks(), tree, rows, columns).logits
        return found is not None and agree(found, wanted, is_coarse(self.model))

    @property
    def is_measured(self) -> bool:
        """Whether :meth:`masks` has been called on the current device, in the current precision."""
        return self._where in self._found

    @property
    def _where(self) -> tuple[torch.device, bool]:
        return self.model.device, is_coarse(self.model)

    def _measure(self) -> Masks | None:
        tree = _trial(self.model)
        rows, columns = (tree.segments != PADDING).nonzero().T
        wanted = self._alone(tree)[rows, columns]
        for masks in (*_forms(self.model), None):
            found = self._tried(partial(self._run, masks, tree, rows, columns), masks)
            if found is not None and agree(found, wanted, is_coarse(self.model)):
                if masks is None:
                    log.warning("%s is evaluated in separate rows: slower, exact", self.name)
                return masks
        raise LoraGANError(
            f"{self.name} cannot be used: its predictions depend on later tokens, so it is not a causal language "
            "model; choose a base that was trained to predict the next token"
        )

    def _tried(self, run: Callable[[], Pass], form: object) -> Tensor | None:
        """The logits of a pass; None if the model does not take its form."""
        try:
            return run().logits
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever an architecture raises
            log.debug("%s does not take %s: %s", self.name, form, error)
            return None

    def _alone(self, tree: PromptTree) -> Tensor:
        """(B, L, V) logits by the model's own forward on each branch alone, unpadded.

        Raises:
            LoraGANError: It fails, or its logits are NaN.
        """
        rows = separate(tree)
        texts = [ids[:n] for ids, n in zip(rows.of(tree.ids), rows.lengths.tolist(), strict=True)]
        try:
            alone = [self._pass(torch.zeros_like(t), torch.arange(len(t)), input_ids=t[None]).logits for t in texts]
        except (torch.OutOfMemoryError, LoraGANError):
            raise
        except Exception as error:
            raise LoraGANError(
                f"{self.name} cannot be used: it does not run on plain text ({type(error).__name__}: {error}); "
                "choose the base of another architecture"
            ) from error
        if any(logits.isnan().any() for logits in alone):
            raise LoraGANError(f"the logits of {self.name} are NaN; check its weights, or choose dtype: float32")
        return nn.utils.rnn.pad_sequence(alone, batch_first=True)[rows.row, rows.place]

    def _run(
        self, masks: Masks | None, tree: PromptTree, rows: Tensor, columns: Tensor, embedded: Tensor | None = None
    ) -> Pass:
        if masks is None:
            return self._in_rows(tree, rows, columns, embedded)
        mask = masks(tree.attention_mask, tree.position_ids, tree.position_ids)
        return self._masked(mask, tree, rows, columns, embedded)

    def _in_blocks(self, tree: PromptTree, rows: Tensor, columns: Tensor, embedded: Tensor | None = None) -> Pass:
        with attention_by(self.model, FLEX):
            return self._masked(block_mask(tree), tree, rows, columns, embedded)

    def _masked(self, mask: Any, tree: PromptTree, rows: Tensor, columns: Tensor, embedded: Tensor | None) -> Pass:
        given = {"input_ids": tree.ids} if embedded is None else {"inputs_embeds": embedded}
        return self._pass(rows, columns, **given, attention_mask=mask, position_ids=tree.position_ids)

    def _in_rows(self, tree: PromptTree, rows: Tensor, columns: Tensor, embedded: Tensor | None) -> Pass:
        """As causal models ignore what follows, rows need no mask for the padding on their right."""
        apart = separate(tree)
        given = {"input_ids": apart.of(tree.ids)} if embedded is None else {"inputs_embeds": apart.of(embedded)}
        done = self._pass(apart.row[rows, columns], apart.place[rows, columns], **given)
        return Pass(done.hidden[apart.row, apart.place], done.logits)

    def _pass(self, rows: Tensor, columns: Tensor, **inputs: Any) -> Pass:
        """One forward pass; a hook on the head selects, so that an architecture's processing of the logits applies."""
        seen: list[Tensor] = []

        def pick(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(inputs[0])
            return (inputs[0][rows, columns],)

        handle = output_head(self.model).register_forward_pre_hook(pick)
        try:
            logits = self.model(**inputs, use_cache=False).logits
        finally:
            handle.remove()
        return Pass(seen[0], logits)


def output_head(model: PreTrainedModel) -> nn.Module:
    """The layer from the last hidden states to the logits.

    Raises:
        LoraGANError: The model has none that can be found.
    """
    head: nn.Module | None = model.get_output_embeddings()
    if head is None:
        raise LoraGANError(f"{type(model).__name__} has no output embeddings, so it cannot be used as a base")
    return head


def _is_frozen_matrix(head: nn.Module) -> bool:
    """Whether a head has a weight that does not change: no adapter, not quantised, nothing that learns."""
    weight = getattr(head, "weight", None)
    plain = isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.is_floating_point()
    return plain and not isinstance(head, BaseTunerLayer) and not any(p.requires_grad for p in head.parameters())


def _forms(model: PreTrainedModel) -> Iterator[Masks]:
    """Forms of the mask that the model may take, the likely ones first."""
    config = model.config.get_text_config(decoder=True)
    own_windows = bool(window_sizes(config)) and set(getattr(config, "layer_types", None) or [SLIDING]) != {FULL}
    kinds = (BY_LAYER, WINDOWED, ONE) if own_windows else (ONE, BY_LAYER)
    added_or_bool = (model.dtype,) if config._attn_implementation == "eager" else (model.dtype, None)
    return (Masks(config, kind, additive) for additive in added_or_bool for kind in kinds)


def _trial(model: PreTrainedModel) -> PromptTree:
    """A small tree with fixed tokens, longer than the small windows."""
    ids = trial_ids(30, int(model.config.get_text_config(decoder=True).vocab_size), model.device)
    first = [ids[8:12], ids[12:17], ids[17:20]]
    second = [ids[20:23], ids[23:26], ids[26:30]]
    return grow([ids[:5], ids[5:8]], {"trial": [first, second]})


def trial_ids(n: int, vocabulary: int, device: torch.device) -> Tensor:
    """n fixed tokens, none of the first few, one of which may be the padding by which a model counts positions."""
    skipped = min(11, vocabulary // 2)
    return torch.arange(n, device=device) * 7919 % (min(vocabulary, 5000) - skipped) + skipped


def is_coarse(model: PreTrainedModel) -> bool:
    """Whether the model computes with fewer than 32 bits now."""
    kind = model.device.type
    reduced = torch.is_autocast_enabled(kind) or getattr(model, "is_quantized", False)
    tensor_float = kind == "cuda" and torch.get_float32_matmul_precision() != "highest"
    return bool(reduced or tensor_float or torch.finfo(model.dtype).bits < 32)


def agree(found: Tensor, wanted: Tensor, coarse: bool) -> bool:
    """Whether logits (n, V) are equal but for rounding: the error of each token by its standard deviation.

    A fault shows in most tokens. In a mixture of experts rounding may choose another expert for a few, so with few bits
    the median decides.
    """
    wanted = wanted.float().nan_to_num(neginf=0.0)
    error = (found.float().nan_to_num(neginf=0.0) - wanted).square().mean(-1).sqrt()
    error = error / wanted.std(-1).clamp(min=1e-6)
    return bool(error.median() < COARSE if coarse else error.max() < TOLERANCE)


@contextmanager
def small_windows(model: PreTrainedModel) -> Iterator[None]:
    """Give the model's attention windows of few tokens within the context, so that a small tree exceeds them.

    Models read the sizes from their configuration in every pass; where one does not, it fails the comparison.
    """
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    texts = {id(text): text for c in configs.values() for text in [c.get_text_config(decoder=True)]}
    before: list[tuple[PretrainedConfig, Mapping[str, int]]] = [(c, window_sizes(c)) for c in texts.values()]
    _set_windows(before, SMALL)
    try:
        yield
    finally:
        _set_windows(before, None)


def _set_windows(configs: list[tuple[PretrainedConfig, Mapping[str, int]]], size: int | None) -> None:
    """Set all windows to ``size``, or to their own sizes."""
    for config, sizes in configs:
        for layer, own in sizes.items():
            setattr(config, WINDOWS[layer], own if size is None else size)
