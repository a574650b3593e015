"""Python API: LoraGAN and GPT2Twin train one step per call of ``step``.

A trainer runs inside: n steps do the same as a fit of n steps on the same batches.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from numbers import Integral
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lora_gan.advantages import PredictedReward
from lora_gan.backbone import DISCRIMINATOR, GENERATOR, BackboneSettings
from lora_gan.bases import name_object
from lora_gan.checkpointing.adapters import ROLES, load_role, write_roles
from lora_gan.checkpointing.files import read_checkpoint
from lora_gan.checkpointing.state import CHECKPOINT_VERSION
from lora_gan.coefficients import Coefficients
from lora_gan.data import InstructionDataModule, Source, StandardFormat
from lora_gan.data.dialogues import dialogue, is_dialogue
from lora_gan.data.files import Row
from lora_gan.data.sources.standard import Rows
from lora_gan.data.templates import PromptFormat
from lora_gan.data.tokenizer import encode_completions, prompt_ids
from lora_gan.discriminator import AdapterDiscriminator, ClosenessBCE, CompletionAndTarget, DiscriminatorSettings
from lora_gan.errors import LoraGANError
from lora_gan.export import write_folder
from lora_gan.module import SEEDS, LoraGANModule
from lora_gan.number_formats import default_device
from lora_gan.rewards import FunctionReward, SemanticReward
from lora_gan.sampling import sample
from lora_gan.sentence_encoder import MINILM, sentence_encoder
from lora_gan.stepper import Stepper
from lora_gan.types import Example, Message, PromptBatch, RewardContext, StepOutput

Texts = str | Sequence[str]


class _SteppedModel:
    """A module, and a trainer that runs its steps one at a time.

    Args:
        base: "builtin", a hub id, a local folder or a GGUF file of a causal language model, or a model object, which is
            frozen and gets the adapters; give its tokenizer.
        tokenizer: Of a model object.
        chat: Write prompts with the chat template of the tokenizer.
        system: The system message of a chat; needs ``chat=True``.
        checkpoints: Folder that :meth:`save_checkpoint` writes to.
        device: "cpu", "cuda", "cuda:1" or "mps"; "auto" takes a CUDA GPU if there is one.
        precision: Lightning's precision, for example "32-true"; None: "bf16-mixed" on a GPU that computes in it.
        callbacks: Callbacks of the trainer.
        seed: Seed of torch, numpy and python; None leaves their states unchanged.
        settings: Arguments of :class:`~lora_gan.module.LoraGANModule`.
    """

    def __init__(
        self,
        base: str | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat: bool = False,
        system: str | None = None,
        checkpoints: str | Path = "checkpoints",
        device: str = "auto",
        precision: Any = None,
        callbacks: Sequence[L.Callback] = (),
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        if seed is not None:
            if not isinstance(seed, Integral) or not 0 <= seed < SEEDS:
                raise LoraGANError(f"seed must be a whole number from 0 to {SEEDS - 1}, got {seed!r}")
            L.seed_everything(seed, verbose=False)
        if system is not None and not chat:
            raise LoraGANError(
                "system=… is written by a chat template only: give chat=True with a base that has one, or write the "
                "instruction into the prompts"
            )
        self.checkpoints = Path(checkpoints)
        if isinstance(base, str) == (tokenizer is not None):
            raise LoraGANError("a model object needs its tokenizer=…; a base by name brings its own")
        name = base if isinstance(base, str) else name_object(base, cast(PreTrainedTokenizerBase, tokenizer))
        chosen = default_device() if device == "auto" else torch.device(device)
        settings["backbone"] = settings.get("backbone", BackboneSettings()).on(chosen, precision)
        self.module = LoraGANModule(name, **{"num_generations": 1, "advantage": PredictedReward(), **settings})
        self.module.seed = torch.initial_seed()
        self.module.prompts = PromptFormat(chat=chat, system=system)
        self._stepper = Stepper(self.module, chosen, precision, callbacks)
        self.trainer = self._stepper.trainer

    def fit(
        self, data: str | Source | Sequence[Example] | Sequence[Mapping[str, Any]], steps: int, batch_size: int = 8
    ) -> list[dict[str, float]]:
        """Train on a data set, in a new random order in each epoch.

        Args:
            data: A file or hub id, rows (a list of dictionaries, a ``datasets.Dataset``, a ``pandas.DataFrame``) in one
                of the formats of :class:`~lora_gan.data.StandardFormat`, a source, or a list of examples, whose prompts
                and targets are joined as they are.
            steps: Training steps.
            batch_size: Prompts in a step.

        Returns:
            The metrics of each step, by the names of the logs.

        Raises:
            LoraGANError: The data or the numbers cannot be used.
        """
        if not isinstance(steps, Integral) or steps < 0:
            raise LoraGANError(f"steps must be a whole number from 0, got {steps!r}")
        served = InstructionDataModule(
            _source(data),
            tokenizer=self.module.base,
            batch_size=batch_size,
            validation=0.0,
            test=0.0,
            chat=self.module.prompts.chat,
            system=self.module.prompts.system,
        )
        served.setup()
        self.module.frozen, self.module.prompts = frozenset(), served.prompts
        batches = islice(chain.from_iterable(repeat(served.train_dataloader())), steps)
        outputs = [self._stepper.step(batch) for batch in batches]
        return [{name: float(value) for name, value in output.metrics.items()} for output in outputs]

    def export(self, folder: str | Path, merge: bool = False) -> Path:
        """Write the generator as a PEFT adapter or, merged with its base, as a model for plain transformers.

        Args:
            folder: Replaced where it holds an earlier export.
            merge: Write base + adapter as one model.

        Raises:
            LoraGANError: The folder holds other files, or cannot be written.
        """
        folder = Path(folder)
        write_folder(copy.deepcopy(self.module.backbone).cpu() if merge else self.module.backbone, folder, merge)
        return folder

    def generate(self, prompt: Texts | Sequence[Mapping[str, Any]]) -> Any:
        """The generator's greedy completion of each prompt.

        Args:
            prompt: One prompt, a list of prompts, or the messages (role, content) of one dialogue up to a question.

        Raises:
            LoraGANError: It is something else, or the model has learned no dialogues.
        """
        module, asked = self.module, is_dialogue(prompt)
        prompts = [] if asked else _listed(prompt, "prompt")
        ids = [self._dialogue(prompt)] if asked else self._batch(prompts, [""] * len(prompts)).prompt_ids
        with module.backbone.generator():
            found = sample(module.backbone, [each.to(module.device) for each in ids], 1, module.greedy).texts
        texts = [text.strip() for text in found]
        return texts[0] if asked or isinstance(prompt, str) else texts

    def _dialogue(self, given: Any) -> Tensor:
        """Token ids (P,) of a dialogue."""
        module, turns = self.module, dialogue(Row({"messages": given}, "prompt"), None, "messages")
        if not module.prompts.keeps_dialogue:
            raise LoraGANError("messages are written with a chat template: give chat=True to the model, or a text here")
        if not turns or turns[-1].role != "user":
            raise LoraGANError("the last message must be the user's: it is the one that is answered")
        tokenizer = module.backbone.tokenizer
        return torch.tensor(prompt_ids(tokenizer, [module.prompts.write(tokenizer, module.prompts.dialogue(turns))])[0])

    def save_checkpoint(self, step: int) -> Path:
        """Write ``checkpoints/step-<step>/{generator,discriminator}``: PEFT adapters with their optimizer states.

        ``state.pt`` beside them holds the rest: coefficients, replay buffer, callbacks, schedules and the seed.

        Raises:
            LoraGANError: ``step`` is no whole number from 0.
        """
        if not isinstance(step, Integral) or step < 0:
            raise LoraGANError(f"step must be a whole number from 0, got {step!r}")
        folder = self.checkpoints / f"step-{step}"
        write_roles(self.module, folder, dict(zip(ROLES, self.trainer.optimizers, strict=True)), self._state())
        return folder

    def load_checkpoint(self, step: int) -> None:
        """Restore what :meth:`save_checkpoint` wrote.

        Raises:
            LoraGANError: The checkpoint does not exist, has another format version, or belongs to another base or
                adapter shape.
        """
        folder = self.checkpoints / f"step-{step}"
        if not (folder / "state.pt").is_file():
            found = ", ".join(sorted(path.name for path in self.checkpoints.glob("step-*"))) or "none"
            raise LoraGANError(f"no checkpoint {folder}; available: {found}")
        state = read_checkpoint(folder / "state.pt")
        if state.get("version") != CHECKPOINT_VERSION:
            raise LoraGANError(
                f"{folder} has format version {state.get('version', 'below 5')}, this lora-gan reads "
                f"{CHECKPOINT_VERSION}; start a new run from its adapters: GeneratorSettings(adapter=...)"
            )
        for role, optimizer in zip(ROLES, self.trainer.optimizers, strict=True):
            load_role(self.module, role, folder / role)
            optimizer.load_state_dict(read_checkpoint(folder / role / "optimizer.pt"))
        self._restore(state)

    def _state(self) -> dict[str, Any]:
        return {
            "version": CHECKPOINT_VERSION,
            "step": self.trainer.global_step,
            "updates": dict(self.module.optimization.updates),
            "precision": self.trainer.precision_plugin.state_dict(),  # the scale of 16-mixed
            "coefficients": self.module.coefficients.state_dict(),
            "replay": self.module.discriminator.replay.state_dict(),
            "callbacks": {c.state_key: c.state_dict() for c in self._callbacks},
            "schedulers": [config.scheduler.state_dict() for config in self.trainer.lr_scheduler_configs],
            "seed": self.module.seed,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._stepper.global_step = state["step"]
        self.module.optimization.updates = dict(state["updates"])
        if state["precision"]:
            self.trainer.precision_plugin.load_state_dict(state["precision"])
        self.module.coefficients.load_state_dict(state["coefficients"])
        self.module.discriminator.replay.load_state_dict(state["replay"])
        for callback in self._callbacks:
            if callback.state_key in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.state_key])
        for config, saved in zip(self.trainer.lr_scheduler_configs, state["schedulers"], strict=True):
            config.scheduler.load_state_dict(saved)
        self.module.seed = state["seed"]

    @property
    def _callbacks(self) -> list[L.Callback]:
        return self.trainer.callbacks  # type: ignore[attr-defined, no-any-return]

    # steps

    def _step(
        self,
        prompts: Sequence[str],
        targets: Sequence[str],
        frozen: Sequence[str] = (),
        labels: Sequence[float] | None = None,
    ) -> _Stepped:
        """One training step on one batch."""
        self.module.frozen = frozenset(frozen)
        return _Stepped(prompts, self._stepper.step(self._batch(prompts, targets, labels)))

    def _batch(
        self, prompts: Sequence[str], targets: Sequence[str], labels: Sequence[float] | None = None
    ) -> PromptBatch:
        """Tokenised examples. Without chat a target follows its prompt after a space, unless that ends with one."""
        if not prompts or len(prompts) != len(targets):
            raise LoraGANError(
                f"got {len(prompts)} prompts and {len(targets)} targets; give at least one prompt, and one target each"
            )
        tokenizer, prompts_as = self.module.backbone.tokenizer, self.module.prompts
        unknown: list[float | None] = [None] * len(prompts)
        examples = [
            Example(prompt, target, (target,), group=prompt, label=label, messages=(Message("user", prompt),))
            for prompt, target, label in zip(prompts, targets, labels or unknown, strict=True)
        ]
        written = prompt_ids(tokenizer, [prompts_as.write(tokenizer, example) for example in examples])
        joined = targets if prompts_as.chat else [_after(p, t) for p, t in zip(prompts, targets, strict=True)]
        return PromptBatch(
            tuple(examples),
            tuple(torch.tensor(ids) for ids in written),
            tuple(torch.tensor(ids) for ids in encode_completions(tokenizer, joined)),
            tuple(() for _ in prompts),
        )


class LoraGAN(_SteppedModel):
    """A generator that completes prompts and a discriminator that learns to predict the reward.

    Args:
        base: "builtin", a hub id, a local folder or a GGUF file of a causal language model, or a model object with its
            ``tokenizer``.
        compute_reward: The true reward, ``f(response, target) -> float``; by default the cosine similarity of their
            sentence embeddings. It can be replaced at any time: ``gan.compute_reward = f``.
        settings: Arguments of :class:`~lora_gan.module.LoraGANModule`, and ``tokenizer``, ``chat``, ``system``,
            ``checkpoints``, ``device``, ``precision``, ``callbacks`` and ``seed``. Defaults that differ from the
            module's: one completion for each prompt; the advantage is the true reward minus the predicted one; the
            predicted reward is added to the reward with ``Coefficients(adversarial=0.1)``. A group of settings that is
            given replaces the whole default group.
    """

    def __init__(
        self,
        base: str | PreTrainedModel = "builtin",
        compute_reward: Callable[[str, str], float] | None = None,
        **settings: Any,
    ) -> None:
        if compute_reward is not None:
            self.compute_reward = compute_reward  # type: ignore[method-assign, assignment]
        super().__init__(
            base, **{"rewards": [_Computed(self)], "coefficients": Coefficients(adversarial=0.1), **settings}
        )

    def compute_reward(self, response: str, target: str) -> float:
        """The reward of a response; higher is better."""
        return float(sentence_encoder(MINILM).similarity([response], [target]).clamp(0, 1))

    def step(
        self, prompt: Texts, target_text: Texts, train_gen: bool = True, train_disc: bool = True
    ) -> dict[str, Any]:
        """Sample, score, update the discriminator, update the generator.

        Args:
            prompt: One prompt, or a list of prompts, which is one batch.
            target_text: The target completion of each prompt.
            train_gen: Whether the generator learns.
            train_disc: Whether the discriminator learns.

        Returns:
            prompt, response, true_reward, disc_loss and pred_reward (both from before the discriminator's update) and
            gen_loss. For a list of prompts, response, true_reward and pred_reward are lists; with several completions
            for each prompt, their items are lists. A loss or a score that the step does not compute is None.
        """
        frozen = [role for role, learns in zip(ROLES, (train_gen, train_disc), strict=True) if not learns]
        stepped = self._step(_listed(prompt, "prompt"), _listed(target_text, "target_text"), frozen)
        single = isinstance(prompt, str)
        return {
            "prompt": prompt,
            "response": stepped.each([text.strip() for text in stepped.output.rollout.texts], single),
            "true_reward": stepped.each(stepped.rewards, single),
            "disc_loss": stepped.loss(DISCRIMINATOR),
            "pred_reward": stepped.each(stepped.predicted.tolist(), single),
            "gen_loss": stepped.loss(GENERATOR),
        }


class GPT2Twin(_SteppedModel):
    """A generator, and a twin that reads "GEN: <completion> || TAR: <target>" and predicts whether the two are close.

    The generator's loss is L = LM + λ·(−log P(close)), differentiated through the sampled completion.

    Args:
        base: As for :class:`LoraGAN`.
        coupling: λ, the coefficient ``coupled``; at 0 the two are trained separately.
        settings: As for :class:`LoraGAN`, with ``Coefficients(policy=0)`` by default. The defaults of ``discriminator``
            are ``AdapterDiscriminator(CompletionAndTarget())`` and ``ClosenessBCE(close_from=0.95)``; the objective
            ``ClosenessRegression`` learns a score from 0 to 1 instead.
    """

    def __init__(self, base: str | PreTrainedModel = "builtin", coupling: float = 0.1, **settings: Any) -> None:
        discriminator: DiscriminatorSettings = settings.pop("discriminator", DiscriminatorSettings())
        coefficients: Coefficients = settings.pop("coefficients", Coefficients(policy=0.0))
        discriminator = replace(
            discriminator,
            model=discriminator.model or AdapterDiscriminator(CompletionAndTarget()),
            objective=discriminator.objective or ClosenessBCE(close_from=0.95),
        )
        coefficients = replace(coefficients, coupled=coupling)
        settings = {"rewards": [_Label()], **settings}
        super().__init__(base, discriminator=discriminator, coefficients=coefficients, **settings)

    def step(
        self, prompt: Texts, target_text: Texts, target_label: float | Sequence[float] | None = None
    ) -> dict[str, Any]:
        """Sample, update the twin, update the generator.

        Args:
            prompt: One prompt, or a list of prompts, which is one batch.
            target_text: The target completion of each prompt. The generator learns it; for the twin it is close.
            target_label: The twin's label for the generated completion: 1 is close, 0 is not, values between are
                scores. By default the cosine similarity to the target decides. A completion equal to the target is
                always close.

        Returns:
            loss_gen, loss_disc, gen_text (the prompt with its completion) and prob_close (from before the twin's
            update); the last two are lists for a list of prompts.
        """
        prompts = _listed(prompt, "prompt")
        if target_label is None:
            stepped = self._step(prompts, _listed(target_text, "target_text"))
        else:
            labels = list(target_label) if isinstance(target_label, Sequence) else [target_label] * len(prompts)
            if len(labels) != len(prompts) or not all(0 <= label <= 1 for label in labels):
                raise LoraGANError(f"target_label must be from 0 to 1, one for each prompt; got {target_label}")
            stepped = self._step(
                prompts, _listed(target_text, "target_text"), labels=[float(label) for label in labels]
            )
        single = isinstance(prompt, str)
        texts = [
            prompts[n // stepped.output.rollout.num_generations] + text
            for n, text in enumerate(stepped.output.rollout.texts)
        ]
        return {
            "loss_gen": stepped.loss(GENERATOR),
            "loss_disc": stepped.loss(DISCRIMINATOR),
            "gen_text": stepped.each(texts, single),
            "prob_close": stepped.each(stepped.predicted.sigmoid().tolist(), single),
        }


@dataclass(frozen=True)
class _Stepped:
    """The output of a step and its prompts."""

    prompts: Sequence[str]
    output: StepOutput

    def loss(self, role: str) -> float | None:
        value = self.output.metrics.get(f"loss/{role}")
        return None if value is None else float(value)

    @property
    def rewards(self) -> list[float]:
        """N rewards of the sampled completions."""
        return [] if self.output.scores is None else self.output.scores.total.tolist()

    @property
    def predicted(self) -> Tensor:
        """(N,) the discriminator's scores; (0,) in a step without it."""
        return torch.zeros(0) if self.output.discriminator is None else self.output.discriminator.sampled

    def each(self, values: Sequence[Any], single: bool) -> Any:
        """The values of N completions, grouped by prompt; None where a prompt has none."""
        k = self.output.rollout.num_generations
        rows = [list(values[b * k : (b + 1) * k]) or [None] for b in range(len(self.prompts))]
        shown = [row[0] if len(row) == 1 else row for row in rows]
        return shown[0] if single else shown


class _Computed(SemanticReward):
    """Calls the current ``compute_reward`` of a LoraGAN."""

    def __init__(self, gan: LoraGAN) -> None:
        super().__init__(weight=1.0, name="true")
        self.gan = gan

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        compute = self.gan.compute_reward
        texts = [completion.strip() for completion in completions]
        if getattr(compute, "__func__", None) is LoraGAN.compute_reward:  # the default: embed all texts at once
            return super().__call__(texts, batch, context)
        return FunctionReward(compute, name=self.name)(texts, batch, context)


class _Label(SemanticReward):
    """The label of each prompt, or the similarity where no label was given."""

    def __init__(self) -> None:
        super().__init__(weight=1.0, name="label")

    def __call__(self, completions: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        labels = [batch.examples[n // context.num_generations].label for n in range(len(completions))]
        if None not in labels:
            return torch.tensor(labels)
        return super().__call__([completion.strip() for completion in completions], batch, context)


def _after(prompt: str, target: str) -> str:
    return target if not target or prompt[-1:].isspace() else f" {target.lstrip()}"


class _Examples(Source):
    """Examples in memory."""

    def __init__(self, examples: Sequence[Example]) -> None:
        super().__init__()
        self.examples = examples

    def rows(self) -> list[Example]:
        return [
            each if each.messages else replace(each, messages=(Message("user", each.prompt),)) for each in self.examples
        ]


def _source(data: Any) -> Source:
    """The source of what a user gives.

    Raises:
        DataError: It is no data.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, str | Path):
        return StandardFormat(str(data))
    if isinstance(data, list | tuple) and data and all(isinstance(each, Example) for each in data):
        return _Examples(data)
    return Rows(data)


def _listed(texts: Any, name: str) -> list[str]:
    """The texts of an argument.

    Raises:
        LoraGANError: It is no text, and no list of texts.
    """
    listed = [texts] if isinstance(texts, str) else texts
    if isinstance(listed, Mapping) or not isinstance(listed, Iterable):
        raise LoraGANError(f"{name} must be a text or a list of texts, got {type(texts).__name__}")
    listed = list(listed)
    if other := [type(text).__name__ for text in listed if not isinstance(text, str)]:
        raise LoraGANError(f"{name} must be a text or a list of texts, got a list with {other[0]}")
    return listed
