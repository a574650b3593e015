"""What the tests share: a byte tokenizer, tiny random models of four architectures, batches of strings."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # a process for each core runs tests

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from lora_gan.advantages import LeaveOneOut
from lora_gan.backbone import Backbone, BackboneSettings, LoraSettings
from lora_gan.module import LoraGANModule
from lora_gan.rewards import FunctionReward
from lora_gan.sampling import Sampling
from lora_gan.types import Example, Negative, PromptBatch
from tests.helpers.settings import grouped
from tests.helpers.steps import Build, share_of_a

torch.set_num_threads(1)  # models this small gain nothing from a second thread and lose much on a busy machine

EOS = 256
CONTEXT = 256
COMMON = {"vocab_size": 257, "eos_token_id": EOS, "bos_token_id": EOS, "initializer_range": 0.3}  # peaked distributions
WIDTHS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": CONTEXT}
CONFIGS: dict[str, PreTrainedConfig] = {
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, **COMMON),
    "llama": LlamaConfig(intermediate_size=48, num_key_value_heads=2, **WIDTHS, **COMMON),  # grouped-query attention
    "qwen2": Qwen2Config(intermediate_size=48, num_key_value_heads=2, **WIDTHS, **COMMON),
    "gpt_neox": GPTNeoXConfig(intermediate_size=48, **WIDTHS, **COMMON),
}


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """256 bytes and EOS: a text has as many ids as bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<|endoftext|>"])}
    bytes_only = Tokenizer(models.BPE(vocabulary, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bytes_only,
        eos_token="<|endoftext|>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    """Folder of a small random model by architecture."""
    folders = {}
    for name, config in CONFIGS.items():
        folders[name] = str(tmp_path_factory.mktemp(name))
        torch.manual_seed(1)
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
        tokenizer.save_pretrained(folders[name])
    return folders


@pytest.fixture(params=list(CONFIGS))
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_backbone(bases: dict[str, str]) -> Callable[..., Backbone]:
    """A backbone whose adapters matter: their B matrices are random instead of 0."""

    def make(architecture: str = "gpt2", dtype: str = "float32", trained: bool = True) -> Backbone:
        torch.manual_seed(2)
        backbone = Backbone(bases[architecture], LoraSettings(4, 8), LoraSettings(2, 4), BackboneSettings(dtype))
        if trained:
            randomise(backbone)
        return backbone

    return make


@pytest.fixture
def backbone(make_backbone: Callable[..., Backbone]) -> Backbone:
    """GPT-2 with adapters that matter."""
    return make_backbone()


@pytest.fixture(scope="session")
def make_batch(tokenizer: PreTrainedTokenizerFast) -> Callable[..., PromptBatch]:
    """PromptBatch of (prompt, target, *negatives); each prompt is a group of its own."""

    def ids(text: str, *end: int) -> Tensor:
        return torch.tensor([*tokenizer.encode(text, add_special_tokens=False), *end], dtype=torch.long)

    def make(*rows: tuple[str, ...]) -> PromptBatch:
        return PromptBatch(
            examples=tuple(
                Example(prompt, target, (target,), tuple(Negative(n, "wrong") for n in negatives), group=prompt)
                for prompt, target, *negatives in rows
            ),
            prompt_ids=tuple(ids(row[0]) for row in rows),
            target_ids=tuple(ids(row[1], EOS) for row in rows),
            negative_ids=tuple(tuple(ids(n, EOS) for n in row[2:]) for row in rows),
        )

    return make


def tiny(base: str) -> dict[str, Any]:
    """Settings of a module on a small base that needs no encoder."""
    return {
        "base": base,
        "num_generations": 2,
        "sampling": Sampling(max_new_tokens=5),
        "rewards": [FunctionReward(share_of_a)],
        "advantage": LeaveOneOut(),
        "generator_lora": LoraSettings(4, 8),
        "discriminator_lora": LoraSettings(4, 8),
    }


@pytest.fixture
def build(bases: dict[str, str]) -> Build:
    """A module on the tiny GPT-2 that needs no encoder."""

    def build(architecture: str = "gpt2", **settings: Any) -> LoraGANModule:
        torch.manual_seed(4)
        return LoraGANModule(**grouped({**tiny(bases[architecture]), **settings}))

    return build


@pytest.fixture
def batch(make_batch: Callable[..., PromptBatch]) -> PromptBatch:
    return make_batch(("Say a", "a", "b"), ("Q: hello?", "hi", "x", "yz"), ("2+2=", "4"))


def randomise(backbone: Backbone, scale: float = 0.2) -> None:
    """LoRA's B starts at 0 and would hide the adapter."""
    with torch.no_grad():
        for name, parameter in backbone.lm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, scale)


@pytest.fixture
def work_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to run in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
