"""Input of both sides of a benchmark: a random model, its tokenizer, prompts with targets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from torch.nn.functional import pad
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lora_gan.backbone import Backbone, LoraSettings
from lora_gan.data.tokenizer import Encoded, encode
from lora_gan.types import Example

LORA = LoraSettings(rank=8, alpha=16)


@dataclass(frozen=True)
class Size:
    """A model and the shape of its step."""

    name: str
    model: dict[str, Any]
    prompts: int
    prompt_tokens: int  # on average; lengths differ by up to ``spread`` of it
    completion_tokens: int
    num_generations: int = 4
    spread: float = 0.1


BUILTIN_MODEL = {
    "n_layer": 4,
    "n_embd": 256,
    "n_head": 4,
    "vocab_size": 4096,
    "n_positions": 512,
    "activation_function": "gelu_pytorch_tanh",
}
SIZES = {
    "gpt2": Size("GPT-2 124M", {}, prompts=4, prompt_tokens=70, completion_tokens=48),
    "builtin": Size("built-in size", BUILTIN_MODEL, prompts=16, prompt_tokens=20, completion_tokens=16),
    "tiny": Size(
        "tiny", BUILTIN_MODEL | {"n_layer": 1, "n_embd": 32}, prompts=2, prompt_tokens=10, completion_tokens=4
    ),
}


def save_model(size: Size, folder: Path) -> Path:
    """Write random weights and a tokenizer with the words "t0", "t1", …; EOS is never drawn."""
    torch.manual_seed(0)
    vocabulary = size.model.get("vocab_size", GPT2Config().vocab_size)
    eos = vocabulary - 1
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(**size.model, **dropout, bos_token_id=eos, eos_token_id=eos))
    with torch.no_grad():
        model.transformer.ln_f.bias.fill_(0.1)
        model.transformer.wte.weight[eos] = -0.5  # times the bias: a logit of −0.05 · n_embd
    model.save_pretrained(folder)
    words_tokenizer(vocabulary).save_pretrained(folder)
    return folder


def words_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer with the words "t0", "t1", …; the last one is EOS."""
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = f"t{vocabulary - 1}"
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end, pad_token=end, bos_token=end)


def left_padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts as rows (B, P), and their mask."""
    width = max(map(len, prompts))
    ids, real = ([pad(x, (width - len(x), 0)) for x in rows] for rows in (prompts, map(torch.ones_like, prompts)))
    return torch.stack(ids), torch.stack(real)


def generated(
    backbone: Backbone, padded: Tensor, real: Tensor, new_tokens: int, k: int = 1, top_p: float = 1.0
) -> Tensor:
    """(B·k, T) completions by transformers, in the active mode, without log-probabilities."""
    sequences: Tensor = backbone.causal_lm.generate(
        input_ids=padded,
        attention_mask=real,
        max_new_tokens=new_tokens,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=top_p,
        num_return_sequences=k,
        pad_token_id=backbone.tokenizer.pad_token_id,
    )
    return sequences[:, padded.shape[1] :]


def make_items(size: Size, tokenizer: PreTrainedTokenizerFast) -> list[Encoded]:
    """The prompts of a step, with targets as long as the completions."""
    generator = torch.Generator().manual_seed(1)
    spread = torch.linspace(-size.spread, size.spread, size.prompts) * size.prompt_tokens
    lengths = [size.prompt_tokens + round(d) for d in spread.tolist()]

    def text(length: int) -> str:
        return " ".join(f"t{i}" for i in torch.randint(0, len(tokenizer) - 1, (length,), generator=generator).tolist())

    examples = [Example(text(n), text(size.completion_tokens - 1), group=str(b)) for b, n in enumerate(lengths)]
    return encode(tokenizer, examples)
