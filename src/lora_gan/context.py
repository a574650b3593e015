"""Context lengths: how many tokens a model or a tokenizer takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

UNLIMITED = 1_000_000  # tokens; a tokenizer that knows no context length says 1e30


def model_context(config: PretrainedConfig) -> int:
    """The most positions that the model has; ``UNLIMITED`` where they are not limited, as in a recurrent network."""
    text = config.get_text_config(decoder=True)
    return int(getattr(text, "max_position_embeddings", None) or UNLIMITED)


def tokenizer_context(tokenizer: PreTrainedTokenizerBase) -> int:
    """The most tokens that the tokenizer's model takes, as far as the tokenizer knows."""
    return min(int(tokenizer.model_max_length), UNLIMITED)
