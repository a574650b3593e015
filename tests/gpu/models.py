"""Random models with the configurations of Qwen3, made on the device; EOS is never drawn."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, Qwen3Config

from lora_gan.bases import name_object
from tests.benchmarks.setting import Size, words_tokenizer

VOCABULARY = 151_936
QWEN3_06B = {
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": VOCABULARY,
}
QWEN3_8B = QWEN3_06B | {
    "num_hidden_layers": 36,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "intermediate_size": 12_288,
}
QWEN3_TINY = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 512,
}
Q06 = Size("q06", QWEN3_06B, prompts=16, prompt_tokens=256, completion_tokens=128, num_generations=8)
Q8 = Size("q8", QWEN3_8B, prompts=16, prompt_tokens=256, completion_tokens=128, num_generations=8)
TINY = Size("tiny", QWEN3_TINY, prompts=3, prompt_tokens=12, completion_tokens=6, num_generations=3)


def random_model(size: Size, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """A model of this shape whose distributions are peaked as those of trained ones, and never end a text.

    The first component of every word embedding is large, so that of the last hidden states is positive. The head reads
    it for EOS alone, with a negative weight; it is not tied to the embeddings, for this.
    """
    eos = size.model["vocab_size"] - 1
    config = Qwen3Config(
        **size.model, tie_word_embeddings=False, bos_token_id=eos, eos_token_id=eos, max_position_embeddings=4096
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        offset = size.model["hidden_size"] ** 0.5
        words, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        words.normal_()
        words[:, 0] = offset
        head.normal_(std=2 / offset)
        head[:, 0] = 0
        head[eos] = 0
        head[eos, 0] = -offset
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=eos, bos_token_id=eos)
    return model.eval()


def random_base(size: Size, device: torch.device, dtype: torch.dtype) -> str:
    """A name of a new random model, to be given as a base."""
    return name_object(random_model(size, device, dtype), words_tokenizer(size.model["vocab_size"]))
