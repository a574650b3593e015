"""Whole training steps against those of TRL's GRPOTrainer.

TRL's settings are its defaults except: ``gradient_checkpointing`` and ``bf16`` off on a CPU (both on by default in 1.x;
the first costs a second forward, the second is not used there), no logs, no files, no shuffling. One
TRL step is one step: sample, reward, reference pass (beta > 0), forward, backward, AdamW.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.optim import AdamW
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
)
from transformers.pytorch_utils import Conv1D
from trl import GRPOConfig, GRPOTrainer

from lora_gan.advantages import GroupNormalised
from lora_gan.backbone import BackboneSettings
from lora_gan.coefficients import Coefficients
from lora_gan.data.datamodule import collate
from lora_gan.discriminator import DiscriminatorSettings
from lora_gan.generator import GeneratorSettings
from lora_gan.losses import Reinforce
from lora_gan.module import LoraGANModule
from lora_gan.rewards import FunctionReward
from lora_gan.sampling import Sampling
from lora_gan.sampling.settings import INT8
from lora_gan.stepper import Stepper
from lora_gan.types import StepOutput

from .setting import LORA, Size, make_items
from .timing import Comparison, Cost, Meter

LEARNING_RATE, BETA = 1e-4, 0.04
RL = {"supervised": 0.0, "adversarial": 0.0, "discriminator_updates": 0.0}
ADVERSARIAL = {"supervised": 1.0, "adversarial": 0.5, "discriminator_updates": 1.0}


def adamw(parameters: Iterable[Any]) -> AdamW:
    return AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)


def constant(response: str, target: str) -> float:
    """The reward of our side."""
    return 1.0


class _Stopwatch(L.Callback):
    """The cost of the last step without the data loader, as for TRL."""

    def __init__(self) -> None:
        self.meter = Meter()

    def on_train_batch_start(self, *_: Any) -> None:
        self.meter.start()

    def on_train_batch_end(self, trainer: L.Trainer, module: LoraGANModule, outputs: dict[str, Any], *_: Any) -> None:
        self.cost = self.meter.stop()
        self.length = float(trainer.callback_metrics["completions/mean_length"])


class Ours:
    """Our module, run for one step at a time with given coefficients.

    Args:
        size: The shape.
        base: Its base.
        device: Where it runs.
        precision: Of the trainer.
        backbone: How the base is loaded.
        int8: Whether completions are sampled with the base in 8 bits.
    """

    def __init__(
        self,
        size: Size,
        base: str,
        device: torch.device = torch.device("cpu"),
        precision: str = "32-true",
        backbone: BackboneSettings = BackboneSettings("float32"),
        int8: bool = False,
    ) -> None:
        self.module = LoraGANModule(
            base=base,
            backbone=backbone,
            num_generations=size.num_generations,
            sampling=Sampling(max_new_tokens=size.completion_tokens, base=INT8 if int8 else None),
            rewards=[FunctionReward(constant)],
            advantage=GroupNormalised(),
            coefficients=Coefficients(kl=BETA),
            generator=GeneratorSettings(lora=LORA, optimizer=adamw, policy_loss=Reinforce(2.0 if int8 else None)),
            discriminator=DiscriminatorSettings(lora=LORA, optimizer=adamw),
        )
        self.batch = collate(make_items(size, self.module.backbone.tokenizer))  # type: ignore[arg-type]
        self.stopwatch = _Stopwatch()
        self.stepper = Stepper(self.module, device, precision, [self.stopwatch])

    def step(self, coefficients: dict[str, float]) -> StepOutput:
        """One step; its cost is in ``stopwatch``."""
        self.module.coefficients.set(**coefficients)
        output: StepOutput = self.stepper.step(self.batch)
        return output


class Turns(TrainerCallback):
    """The costs of TRL's steps and of ours, which run after each of them."""

    def __init__(self, ours: Ours, int8: Ours | None = None) -> None:
        self.kinds = {"rl": (ours, RL), "adversarial": (ours, ADVERSARIAL)}
        if int8 is not None:
            self.kinds |= {"rl int8": (int8, RL), "adversarial int8": (int8, ADVERSARIAL)}
        self.meter = Meter()
        self.costs: dict[str, list[Cost]] = {name: [] for name in ("trl", *self.kinds)}
        self.phases: dict[str, dict[str, float]] = {}  # seconds by phase of our last step of each kind
        self.lengths: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.meter.start()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.costs["trl"].append(self.meter.stop())
        for name, (ours, coefficients) in self.kinds.items():
            self.phases[name] = dict(ours.step(coefficients).seconds)
            self.costs[name].append(ours.stopwatch.cost)
            self.lengths.append(ours.stopwatch.length)


def _trl(
    size: Size, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, output: str, steps: int, turns: Turns
) -> GRPOTrainer:
    on_cpu = model.device.type == "cpu"
    prompts = [{"prompt": item.example.prompt} for item in make_items(size, tokenizer)]
    return GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [1.0] * len(completions),
        train_dataset=Dataset.from_list(prompts * steps),
        peft_config=LoraConfig(
            r=LORA.rank,
            lora_alpha=LORA.alpha,
            target_modules="all-linear",
            fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
            task_type="CAUSAL_LM",
        ),
        args=GRPOConfig(
            output_dir=output,
            max_steps=steps,
            per_device_train_batch_size=size.prompts * size.num_generations,
            gradient_accumulation_steps=1,
            num_generations=size.num_generations,
            num_iterations=1,
            steps_per_generation=1,
            max_completion_length=size.completion_tokens,
            beta=BETA,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            gradient_checkpointing=not on_cpu,
            bf16=not on_cpu,
            use_cpu=on_cpu,
            shuffle_dataset=False,
            dataloader_num_workers=0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        callbacks=[turns],
    )


def take_turns(size: Size, ours: Ours, model: PreTrainedModel, repeats: int, int8: Ours | None = None) -> Turns:
    """TRL's steps and ours, in turns; the first of each is dropped.

    Args:
        size: The shape.
        ours: Our side.
        model: The base of the other side, on its device.
        repeats: Steps that count.
        int8: Our side with a base of 8 bits while it samples, on a CPU.

    Raises:
        RuntimeError: A completion had another length, so the sides did not do the same work.
    """
    turns = Turns(ours, int8)
    with TemporaryDirectory() as output:
        trainer = _trl(size, model, ours.module.backbone.tokenizer, output, repeats + 1, turns)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    lengths = [trainer.state.log_history[-1][f"completions/{which}_length"] for which in ("min", "max")]
    wrong = {length for length in [*lengths, *turns.lengths] if length != size.completion_tokens}
    if wrong:
        raise RuntimeError(
            f"all completions must have {size.completion_tokens} tokens on both sides, got mean lengths {wrong}"
        )
    turns.costs = {name: costs[1:] for name, costs in turns.costs.items()}
    return turns


def time_steps(size: Size, folder: Path, repeats: int) -> dict[str, tuple[float, ...]]:
    """Seconds of TRL's steps and of ours on the CPU, as :func:`take_turns`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    turns = take_turns(size, Ours(size, str(folder)), model, repeats, Ours(size, str(folder), int8=True))
    return {name: tuple(cost.seconds for cost in costs) for name, costs in turns.costs.items()}


def compare_steps(size: Size, folder: Path, repeats: int) -> Iterator[Comparison]:
    """A step of policy gradient, and one with discriminator and supervised term, each against TRL's."""
    seconds = time_steps(size, folder, repeats)
    for name, what, target in (
        ("rl", "step, the same work", 2.5),
        ("rl int8", "the same, `sampling.base: int8`", 3.0),
        ("adversarial", "step with D and supervised term", 1.5),
        ("adversarial int8", "the same, `sampling.base: int8`", 2.0),
    ):
        yield Comparison(size.name, what, "TRL GRPO step", seconds[name], seconds["trl"], target)
