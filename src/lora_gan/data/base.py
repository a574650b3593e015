"""What every data module of prompts shares: its tokenizer, its limits and how a batch is put together."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch import Tensor

from lora_gan.bases import OBJECTS, locate
from lora_gan.context import UNLIMITED, model_context
from lora_gan.data.fitting import LengthFilter, LengthLimits
from lora_gan.data.source import Source
from lora_gan.data.templates import PromptFormat, writes_chat
from lora_gan.data.tokenizer import Encoded, Ids, load_tokenizer
from lora_gan.errors import LoraGANError
from lora_gan.types import PromptBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TextDataModule(L.LightningDataModule):
    """Prompts with targets as token ids. A subclass serves the batches."""

    source: Source

    def __init__(
        self,
        tokenizer: str = "builtin",
        batch_size: int = 16,
        eval_batch_size: int = 64,
        max_prompt_tokens: int = 512,
        max_target_tokens: int = 512,
        max_tokens: int | None = None,
        chat: bool | None = None,
        system: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        """
        Args:
            tokenizer: A local folder, a hub id, or "builtin"; must belong to the model.
            batch_size: Prompts in a training step.
            eval_batch_size: Prompts in a batch of validation, test and prediction.
            max_prompt_tokens: Longer prompts lose the beginning of their longest field, or are dropped and counted.
            max_target_tokens: Longer targets (EOS included) are dropped and counted.
            max_tokens: The most tokens of prompt and completion together; by default, and at most, the context length
                of the model.
            chat: Write prompts with the chat template of the tokenizer instead of the templates of the source; by
                default where the tokenizer has one and the source gives dialogues.
            system: The system message of every dialogue, in place of its own, which counts as repaired; needs a chat
                template. By default that of the source or of each row, where there is one.
            chat_template_kwargs: Further variables of the chat template, such as {enable_thinking: false}.
        """
        super().__init__()
        sizes = {
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            "max_prompt_tokens": max_prompt_tokens,
            "max_target_tokens": max_target_tokens,
            "max_tokens": max_tokens,
        }
        check_sizes(sizes)
        self.tokenizer_name = tokenizer
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_prompt_tokens = max_prompt_tokens
        self.max_target_tokens = max_target_tokens
        self.max_tokens = max_tokens
        self.chat = chat
        self.system = system
        self.chat_template_kwargs = chat_template_kwargs
        self.has_dialogues = True  # whether every example is a dialogue

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.tokenizer_name)

    @property
    def limits(self) -> LengthLimits:
        """The most tokens of prompts, of completions, and of both together."""
        sizes = self.max_prompt_tokens, self.max_target_tokens, self.max_tokens
        model = getattr(self.trainer, "lightning_module", None)
        if model is None or not hasattr(model, "backbone"):
            return LengthLimits.of(self.tokenizer, *sizes, context=base_context(self.tokenizer_name))
        context, completion = model.backbone.context_length, model.sampling.max_new_tokens
        return LengthLimits.of(self.tokenizer, *sizes, context=context, completion=completion)

    @property
    def prompts(self) -> PromptFormat:
        """How prompts are written."""
        source = self.source
        wanted = None if self.has_dialogues else False
        chat = writes_chat(self.tokenizer, wanted if self.chat is None else self.chat)
        templates = source.prompt_templates
        return PromptFormat(
            templates=tuple(source.said(template) for template in templates) if chat else templates,
            turns=source.turn_templates,
            chat=chat,
            system=source.system if self.system is None else self.system,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    def length_filter(self) -> LengthFilter:
        """Tokenises examples and leaves out what is too long; it counts from 0.

        Raises:
            LoraGANError: There is a system message, and no chat template that writes it.
        """
        if self.system is not None and not self.prompts.chat:
            raise LoraGANError(
                f"data.init_args.system has no effect: prompts are written {describe_prompts(self)}; leave it out and "
                "write the instruction into the rows or the template of the source, or take a base made for chat"
            )
        return LengthFilter(self.tokenizer, self.limits, self.prompts)


@cache
def base_context(name: str) -> int:
    """The context length of a base by its configuration, without its weights; none of a tokenizer alone."""
    from transformers import AutoConfig

    if name in OBJECTS:
        return model_context(OBJECTS[name][0].config)
    try:
        return model_context(AutoConfig.from_pretrained(locate(name)))
    except (OSError, ValueError):
        return UNLIMITED


def describe_prompts(data: TextDataModule) -> str:
    """How prompts are written and how to change it, in one line."""
    if data.prompts.chat:
        return "with the tokenizer's chat template (data.init_args.chat: false uses the template of the source)"
    if data.tokenizer.chat_template:
        return "with the template of the source (data.init_args.chat: true uses the tokenizer's chat template)"
    return "with the template of the source (the tokenizer has no chat template)"


def check_sizes(sizes: Mapping[str, int | None]) -> None:
    """Refuse a setting below 1; None is no limit."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise LoraGANError(f"{name} must be at least 1, got {size}; set data.init_args.{name}")


def collate(items: Sequence[Encoded]) -> PromptBatch:
    """B examples as one batch, ragged."""
    return PromptBatch(
        examples=tuple(item.example for item in items),
        prompt_ids=tuple(_tensor(item.prompt_ids) for item in items),
        target_ids=tuple(_tensor(item.target_ids) for item in items),
        negative_ids=tuple(tuple(_tensor(ids) for ids in item.negative_ids) for item in items),
    )


def format_counts(counts: Counter[str]) -> str:
    """The counts by reason, in one line."""
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted((+counts).items())) or "none"


def silence_resume_advice() -> None:
    """Lightning warns that a data loader cannot resume; those of this package do, by the data module's state."""
    warnings.filterwarnings("ignore", message=".*your dataloader is not resumable")


def _tensor(ids: Ids) -> Tensor:
    return torch.tensor(ids, dtype=torch.long)
