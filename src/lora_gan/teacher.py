"""Teachers: other predictions of the next token than the base's, towards which the KL terms pull.

On-policy distillation (arXiv 2306.13649): the student samples, and the teacher says at each token how likely it was.
With ``coefficients.kl_penalty: 1`` and no other reward, a token's reward is log p_teacher − log π, whose mean is the
negative reverse KL; ``lora_gan.advantages.RewardToGo`` gives each token its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from lora_gan.backbone import Backbone, BackboneSettings, LoraSettings
from lora_gan.errors import LoraGANError
from lora_gan.types import PromptBatch

Completions = Mapping[str, Sequence[Sequence[Tensor]]]  # kind → for each prompt its completions (T,)


class Teacher(ABC):
    """Predicts completions in place of the base. A subclass says with which model, and after which prompts."""

    def check(self, student: Backbone) -> None:  # noqa: B027
        """Refuse wrong settings, and a student whose tokens this teacher cannot read.

        The module calls it: an error where settings are parsed ends in a traceback.
        """

    @abstractmethod
    def backbone(self, student: Backbone) -> Backbone:
        """The backbone whose base predicts."""

    def prompts(self, student: Backbone, batch: PromptBatch, completions: Completions) -> Sequence[Tensor]:
        """The prompts that it reads."""
        return batch.prompt_ids

    def logprobs(
        self,
        student: Backbone,
        batch: PromptBatch,
        completions: Completions,
        parts: Sequence[Sequence[int]],
        temperature: Mapping[str, float],
    ) -> dict[str, Tensor]:
        """Log-probability of every token of the completions, by kind: (M, T), 0 where masked; no gradient.

        Args:
            student: The backbone that learns.
            batch: B examples.
            completions: What is predicted.
            parts: The prompts of each pass.
            temperature: By kind, the divisor of the logits; 1 for missing kinds.
        """
        backbone = self.backbone(student)
        prompts = self.prompts(student, batch, completions)
        with backbone.reference():
            return backbone.logprobs_of(prompts, completions, parts, temperature)


class TeacherModel(Teacher):
    """Another causal language model with the student's tokenizer.

    Args:
        base: A local folder, such as a merged export, a hub id, or another name of a base.
        backbone: How it is loaded.
    """

    def __init__(self, base: str, backbone: BackboneSettings = BackboneSettings()) -> None:
        self.base = base
        self.settings = backbone

    @cached_property
    def model(self) -> Backbone:
        """Loaded by :meth:`check`."""
        unused = LoraSettings(rank=1)  # a backbone has adapters; as the reference it runs without them
        return Backbone(self.base, unused, unused, self.settings)

    def check(self, student: Backbone) -> None:
        if self.model.tokenizer.get_vocab() != student.tokenizer.get_vocab():
            raise LoraGANError(
                f"the teacher {self.base!r} has another tokenizer than the base: distillation compares the two token "
                "by token, so take a teacher of the same family"
            )

    def backbone(self, student: Backbone) -> Backbone:
        return self.model if self.model.device == student.device else self.model.to(student.device)


class HintedBase(Teacher):
    """The base itself with a hint before each prompt, which the student does not see.

    Args:
        hint: The text; "{target}" in it stands for the prompt's target.
    """

    def __init__(self, hint: str) -> None:
        self.hint = hint

    def check(self, student: Backbone) -> None:
        if not self.hint.strip():
            raise LoraGANError("the hint of HintedBase is empty, so the teacher would be the base; write one")

    def backbone(self, student: Backbone) -> Backbone:
        return student

    def prompts(self, student: Backbone, batch: PromptBatch, completions: Completions) -> Sequence[Tensor]:
        """The prompts after the hint.

        Raises:
            LoraGANError: With the hint, a prompt and its completion exceed the context.
        """
        prompts = [self._hinted(student, *pair) for pair in zip(batch.targets, batch.prompt_ids, strict=True)]
        room = student.context_length - max(
            len(prompt) + max((len(ids) for rows in completions.values() for ids in rows[b]), default=0)
            for b, prompt in enumerate(prompts)
        )
        if room < 0:
            raise LoraGANError(
                f"with the hint, prompt and completion have {-room} tokens more than the context of "
                f"{student.context_length}: shorten the hint, or lower data.max_prompt_tokens"
            )
        return prompts

    def _hinted(self, student: Backbone, target: str, prompt: Tensor) -> Tensor:
        """The prompt after the hint; a token that begins all texts stays first."""
        tokenizer = student.tokenizer
        ids = tokenizer.encode(self.hint.replace("{target}", target), add_special_tokens=False)
        first = int(len(prompt) > 0 and int(prompt[0]) == tokenizer.bos_token_id)
        return torch.cat([prompt[:first], prompt.new_tensor(ids), prompt[first:]])
