"""Reward model: any Hugging Face sequence-classification model as a reward."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from lora_gan.context import model_context, tokenizer_context
from lora_gan.errors import LoraGANError
from lora_gan.number_formats import quantized, torch_dtype
from lora_gan.rewards.base import Reward
from lora_gan.types import PromptBatch, RewardContext


class Classifier:
    """A frozen sequence-classification model, loaded on first use.

    Args:
        model: Hub id or local folder.
        batch_size: Texts per forward pass.
        dtype: Data type of its weights; None: that of its files.
        quantization: "4bit" or "8bit", or None.
    """

    def __init__(
        self, model: str, batch_size: int = 32, dtype: str | None = None, quantization: str | None = None
    ) -> None:
        if batch_size < 1:
            raise LoraGANError(f"batch_size must be at least 1, got {batch_size}")
        self.name = model
        self.batch_size = batch_size
        self.dtype = dtype
        self.quantization = quantization

    @cached_property
    def model(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        how = {} if self.dtype is None else {"dtype": torch_dtype(self.dtype)}
        how |= quantized(self.quantization, self.dtype or "float32")
        model = self._load(AutoModelForSequenceClassification, **how).eval().requires_grad_(False)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        return model

    @cached_property
    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        tokenizer = self._load(AutoTokenizer)
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def _load(self, kind: Any, **how: Any) -> Any:
        try:
            return kind.from_pretrained(self.name, **how)
        except Exception as error:  # its kind depends on what is missing or damaged
            raise LoraGANError(
                f"cannot load {self.name!r} as a sequence-classification model ({error}); "
                "give a local folder or a hub id"
            ) from error

    def logits(self, texts: Sequence[str], seconds: Sequence[str] | None, device: torch.device) -> Tensor:
        """Logits (n, labels) in float32 of n texts or n pairs of texts, truncated to the model's context."""
        if self.quantization is None:  # else it is on the GPU already
            self.model.to(device)
        found = [torch.zeros(0, self.model.config.num_labels, device=device)]
        for start in range(0, len(texts), self.batch_size):
            rows = slice(start, start + self.batch_size)
            found.append(self._forward(list(texts[rows]), None if seconds is None else list(seconds[rows]), device))
        return torch.cat(found)

    def _forward(self, texts: list[str], seconds: list[str] | None, device: torch.device) -> Tensor:
        limit = min(tokenizer_context(self.tokenizer), model_context(self.model.config))
        inputs = self.tokenizer(
            texts, seconds, padding=True, truncation=True, max_length=limit, return_tensors="pt"
        ).to(device)
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            logits: Tensor = self.model(**inputs).logits
        return logits.float()

    def chat(self, prompts: Sequence[str], completions: Sequence[str]) -> list[str]:
        """Prompts and completions as conversations in the tokenizer's chat template.

        Raises:
            LoraGANError: The tokenizer has no chat template.
        """
        if self.tokenizer.chat_template is None:
            raise LoraGANError(f"the tokenizer of {self.name!r} has no chat template; set shown: pair")
        turns = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return [self.tokenizer.apply_chat_template(turn, tokenize=False) for turn in turns]

    def index_of(self, label: str) -> int:
        """Index of a label in the logits; case is ignored.

        Raises:
            LoraGANError: The model has no such label.
        """
        labels = {str(name).lower(): int(index) for index, name in self.model.config.id2label.items()}
        if label.lower() not in labels:
            raise LoraGANError(f"{self.name!r} has no label {label!r}; its labels are {', '.join(labels)}")
        return labels[label.lower()]


class RewardModel(Reward):
    """Score of prompt and completion by a Hugging Face sequence-classification model, in [0, 1].

    A model with one output (a reward model) gives the sigmoid of its logit. One with several gives the probability of
    ``label``: a softmax over the labels, or a sigmoid if the model's configuration says multi_label_classification.

    Args:
        model: Hub id or local folder.
        label: The label whose probability is the reward, such as POSITIVE; required if the model has several.
        shown: What the model reads: pair (prompt and completion as two segments), completion (alone), or chat (both in
            the chat template of its tokenizer). The prompt is formatted as for the generator.
        weight: Factor in the total reward.
        batch_size: Completions per forward pass.
        name: Name in the logs, ``reward/<name>``.
        dtype: Data type of its weights: float32, bfloat16 or float16; by default that of its files.
        quantization: "4bit" or "8bit" quantises its linear layers (bitsandbytes, on a CUDA GPU).
    """

    def __init__(
        self,
        model: str,
        label: str | None = None,
        shown: Literal["pair", "completion", "chat"] = "pair",
        weight: float = 1.0,
        batch_size: int = 32,
        name: str = "model",
        dtype: str | None = None,
        quantization: str | None = None,
    ) -> None:
        super().__init__(weight, name)
        self.classifier = Classifier(model, batch_size, dtype, quantization)
        self.label = label
        self.shown = shown

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        prompts = [batch.examples[n // context.num_generations].prompt for n in range(len(completions))]
        device = context.logprobs.device
        if self.shown == "pair":
            return self._score(self.classifier.logits(prompts, completions, device))
        texts = completions if self.shown == "completion" else self.classifier.chat(prompts, completions)
        return self._score(self.classifier.logits(texts, None, device))

    def _score(self, logits: Tensor) -> Tensor:
        """(N, labels) → (N,)."""
        config = self.classifier.model.config
        if logits.shape[1] == 1:
            return logits[:, 0].sigmoid()
        if self.label is None:
            names = ", ".join(map(str, config.id2label.values()))
            raise LoraGANError(f"{self.classifier.name!r} has several labels; set label: to one of {names}")
        several = config.problem_type == "multi_label_classification"
        probabilities = logits.sigmoid() if several else logits.softmax(-1)
        return probabilities[:, self.classifier.index_of(self.label)]
