"""Whole training steps against those of TRL's GRPOTrainer.

TRL's settings are its defaults except: ``gradient_checkpointing`` and ``bf16`` off (both on by default in 1.x; the
first costs a second forward, the second is not used here), on the CPU, no logs, no files, no shuffling. One
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
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from lora_gan.advantages import GroupNormalised
from lora_gan.coefficients import Coefficients
from lora_gan.data.datamodule import collate
from lora_gan.discriminator import DiscriminatorSettings
from lora_gan.generator import GeneratorSettings
from lora_gan.module import LoraGANModule
from lora_gan.rewards import FunctionReward
from lora_gan.sampling import Sampling

from .setting import LORA, Size, make_items
from .timing import Comparison, clock

LEARNING_RATE, BETA = 1e-4, 0.04
RL = {"supervised": 0.0, "adversarial": 0.0, "discriminator_updates": 0.0}
ADVERSARIAL = {"supervised": 1.0, "adversarial": 0.5, "discriminator_updates": 1.0}


def adamw(parameters: Iterable[Any]) -> AdamW:
    return AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)


def constant(response: str, target: str) -> float:
    """The reward of our side."""
    return 1.0


class _Stopwatch(L.Callback):
    """Seconds of the last step without the data loader and the start of the Trainer, as for TRL."""

    def on_train_batch_start(self, *_: Any) -> None:
        self.begun = clock()

    def on_train_batch_end(self, trainer: L.Trainer, module: LoraGANModule, outputs: dict[str, Any], *_: Any) -> None:
        self.seconds = clock() - self.begun
        self.length = float(trainer.callback_metrics["completions/mean_length"])


class Ours:
    """Our module, run for one step at a time with given coefficients."""

    def __init__(self, size: Size, folder: Path) -> None:
        self.module = LoraGANModule(
            base=str(folder),
            num_generations=size.num_generations,
            sampling=Sampling(max_new_tokens=size.completion_tokens),
            rewards=[FunctionReward(constant)],
            advantage=GroupNormalised(),
            coefficients=Coefficients(kl=BETA),
            generator=GeneratorSettings(lora=LORA, optimizer=adamw),
            discriminator=DiscriminatorSettings(lora=LORA, optimizer=adamw),
        )
        items = make_items(size, self.module.backbone.tokenizer)
        self.batches = DataLoader(items, batch_size=size.prompts, collate_fn=collate)  # type: ignore[arg-type]

    def step(self, coefficients: dict[str, float]) -> _Stopwatch:
        """One step in a real Trainer."""
        self.module.coefficients.set(**coefficients)
        stopwatch = _Stopwatch()
        trainer = L.Trainer(
            max_steps=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[stopwatch],
        )
        trainer.fit(self.module, self.batches)
        return stopwatch


class _AlternatingSteps(TrainerCallback):
    """Times each of TRL's steps, then runs and times ours."""

    def __init__(self, ours: Ours) -> None:
        self.ours = ours
        self.seconds: dict[str, list[float]] = {"trl": [], "rl": [], "adversarial": []}
        self.lengths: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begun = clock()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds["trl"].append(clock() - self.begun)
        for name, coefficients in (("rl", RL), ("adversarial", ADVERSARIAL)):
            stopwatch = self.ours.step(coefficients)
            self.seconds[name].append(stopwatch.seconds)
            self.lengths.append(stopwatch.length)


def _trl(size: Size, folder: Path, output: str, steps: int, turns: _AlternatingSteps) -> GRPOTrainer:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [{"prompt": item.example.prompt} for item in make_items(size, tokenizer)]
    return GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa"),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [1.0] * len(completions),
        train_dataset=Dataset.from_list(prompts * steps),
        peft_config=LoraConfig(
            r=LORA.rank,
            lora_alpha=LORA.alpha,
            target_modules="all-linear",
            fan_in_fan_out=True,
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
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            shuffle_dataset=False,
            dataloader_num_workers=0,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        ),
        callbacks=[turns],
    )


def time_steps(size: Size, folder: Path, repeats: int) -> dict[str, tuple[float, ...]]:
    """Seconds of TRL's steps and of ours, run in turns; the first of each is dropped.

    Raises:
        RuntimeError: A completion had another length, so the sides did not do the same work.
    """
    turns = _AlternatingSteps(Ours(size, folder))
    with TemporaryDirectory() as output:
        trainer = _trl(size, folder, output, repeats + 1, turns)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    lengths = [trainer.state.log_history[-1][f"completions/{which}_length"] for which in ("min", "max")]
    wrong = {length for length in [*lengths, *turns.lengths] if length != size.completion_tokens}
    if wrong:
        raise RuntimeError(
            f"all completions must have {size.completion_tokens} tokens on both sides, got mean lengths {wrong}"
        )
    return {name: tuple(seconds[1:]) for name, seconds in turns.seconds.items()}


def compare_steps(size: Size, folder: Path, repeats: int) -> Iterator[Comparison]:
    """A step of policy gradient, and one with discriminator and supervised term, each against TRL's."""
    seconds = time_steps(size, folder, repeats)
    for name, what, target in (
        ("rl", "step, the same work", 2.0),
        ("adversarial", "step with D and supervised term", 1.0),
    ):
        yield Comparison(size.name, what, "TRL GRPO step", seconds[name], seconds["trl"], target)
