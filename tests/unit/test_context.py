"""Context lengths of models and tokenizers."""

from __future__ import annotations

from transformers import GPT2Config, LlamaConfig, MambaConfig

from lora_gan.context import UNLIMITED, model_context, tokenizer_context
from lora_gan.data.tokenizer import load_tokenizer


def test_the_context_of_a_model() -> None:
    assert model_context(LlamaConfig(max_position_embeddings=128)) == 128
    assert model_context(GPT2Config(n_positions=64)) == 64
    assert model_context(MambaConfig()) == UNLIMITED


def test_the_context_of_a_tokenizer() -> None:
    tokenizer = load_tokenizer("builtin")
    assert tokenizer_context(tokenizer) == 512
    tokenizer.model_max_length = int(1e30)
    assert tokenizer_context(tokenizer) == UNLIMITED
