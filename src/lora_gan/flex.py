"""FlexAttention: long prompt trees on a GPU, without the blocks of their mask in which nothing is visible.

SDPA computes all L² scores of a tree of L columns and reads a mask of that size. FlexAttention reads a function instead
that says which token sees which, and leaves out the blocks of 128 × 128 scores that it empties.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, PreTrainedModel

from lora_gan.tree import PROMPT, PromptTree

FLEX = "lora_gan_flex"  # among the attention functions of transformers
# Columns. On an H200 others measured 0.72 times the speed of SDPA at 512 tokens and 2.3 times at 8,192
# (KempnerForge #207).
LONG = 2048


def is_long(tree: PromptTree) -> bool:
    """Whether the tree is on a GPU and longer than from where FlexAttention is faster."""
    return tree.ids.is_cuda and tree.ids.shape[1] > LONG


def block_mask(tree: PromptTree) -> BlockMask:
    """:attr:`PromptTree.attention_mask` as FlexAttention takes it."""
    segments, positions = tree.segments, tree.position_ids

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (segments[row, key] == PROMPT) | (segments[row, key] == segments[row, query])
        return near & (positions[row, key] <= positions[row, query])

    trees, columns = tree.ids.shape
    mask = create_block_mask(sees, trees, None, columns, columns, device=tree.ids.device)
    vars(mask)["ndim"] = 4  # GPT-2 asks for it
    return mask


@contextmanager
def attention_by(model: PreTrainedModel, name: str | None) -> Iterator[None]:
    """Let the model's text part compute its attention by the function of transformers with this name.

    The layers read it from their configuration in every pass.
    """
    config = model.config.get_text_config(decoder=True)
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


def attention_of(model: PreTrainedModel) -> str | None:
    """The name of the function by which the model's text part computes its attention now."""
    name: str | None = model.config.get_text_config(decoder=True)._attn_implementation
    return name


def _attend(
    layer: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention (B, L, heads, size) of queries (B, heads, L, size), as the layers of transformers call it.

    Its own FlexAttention is compiled anew for other lengths.
    """
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if not isinstance(attention_mask, BlockMask) or dropout or unknown:
        raise TypeError(f"no FlexAttention with {unknown or 'dropout or another mask'}")  # the model falls back to SDPA
    if torch.is_autocast_enabled(query.device.type):  # which casts the inputs of SDPA, but not those of FlexAttention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    found = _function(query.is_cuda)(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=grouped)
    return found.transpose(1, 2).contiguous(), None


@cache
def _function(compiled: bool) -> Any:
    """FlexAttention, compiled once for all lengths; without that it forms all scores, as is enough for tests."""
    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


AttentionInterface.register(FLEX, _attend)
