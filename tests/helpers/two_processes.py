"""Programs for tests/system/test_distributed.py in one or two processes; each process writes its results to files.

Run: python -m tests.helpers.two_processes main|epochs <base> <processes> <folder> …
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import SGD
from torch.utils.data import DataLoader

from lora_gan.advantages import LeaveOneOut, MovingAverage
from lora_gan.backbone import LoraSettings
from lora_gan.callbacks import CollapseMonitor, MovingAverageBaseline
from lora_gan.data import InstructionDataModule, Mixture, Source
from lora_gan.data.datamodule import collate
from lora_gan.data.tokenizer import encode
from lora_gan.discriminator.objectives import SAMPLED, BradleyTerry
from lora_gan.discriminator.replay import Replay
from lora_gan.losses import ClippedPPO
from lora_gan.module import LoraGANModule
from lora_gan.rewards import FunctionReward
from lora_gan.sampling import Sampling
from lora_gan.step_callback import OUTPUT
from lora_gan.tree import grow
from lora_gan.types import Example, PromptBatch, Rollout
from tests.helpers.settings import grouped
from tests.helpers.steps import Recorder, share_of_a, state, trainer

K, STEPS = 2, 3
TARGETS = ["a", "a long completion that goes on and on", "b", "", "of some length", "c", "d", "the end, nearly"] * 2


class Scripted(LoraGANModule):
    """Completions depend on the prompt only: two processes sample what one samples for the union of their batches."""

    def sample_rollout(self, batch: PromptBatch) -> Rollout:
        completions = [self.completions_to(example.prompt) for example in batch.examples]
        tree = grow(batch.prompt_ids, {SAMPLED: completions})
        with self.backbone.generator(), torch.no_grad():
            logprobs = self.backbone.logprobs(tree)[SAMPLED]
        branches = tree.branches[SAMPLED]
        flat = [completion for row in completions for completion in row]
        texts = tuple(self.backbone.tokenizer.batch_decode(flat, skip_special_tokens=True))
        truncated = torch.tensor([int(completion[-1]) != 256 for completion in flat])
        return Rollout(branches.ids * branches.mask, branches.mask, logprobs, truncated, texts, K)

    def completions_to(self, prompt: str) -> list[Tensor]:
        draw = torch.Generator().manual_seed(sum(map(ord, prompt)))
        lengths = torch.randint(1, 12, (K,), generator=draw).tolist()
        return [
            torch.cat([torch.randint(60, 80, (length,), generator=draw), torch.tensor([256])]) for length in lengths
        ]


def main(base: str, processes: int, folder: str, case: str, accelerator: str = "cpu") -> None:
    """Train three steps on batches dealt out to the processes; in one case each of two takes a prompt at a time."""
    at_once = None if processes == 1 else 1
    settings: dict[str, dict[str, Any]] = {
        "moving average": {"advantage": MovingAverage(), "kl": 0.3, "entropy": 0.1, "micro_batch_size": at_once},
        "ppo": {"advantage": LeaveOneOut(), "policy_loss": ClippedPPO(num_iterations=2, target_kl=1e-4)},
        "missing targets": {"advantage": LeaveOneOut(), "policy": 0.0},
        "pairs in one process": {"advantage": LeaveOneOut(), "objective": BradleyTerry()},
    }
    torch.manual_seed(4)
    common = {
        "num_generations": K,
        "sampling": Sampling(max_new_tokens=12),
        "rewards": [FunctionReward(share_of_a, needs_target=False)],
        "negatives": [],
        "generator_lora": LoraSettings(4, 8),
        "discriminator_lora": LoraSettings(4, 8),
        "generator_optimizer": lambda p: SGD(p, lr=0.1),
        "discriminator_optimizer": lambda p: SGD(p, lr=0.1),
        "max_grad_norm": 1e9,
    }
    module = Scripted(base, **grouped({**common, **settings[case]}))
    targets = TARGETS if case == "missing targets" else [target or "e" for target in TARGETS]
    if case == "missing targets":
        targets = ["", "x", "", "", *targets[4:]]
    if case == "pairs in one process":
        targets = [target if n % 2 == 0 else "" for n, target in enumerate(targets)]
    examples = [Example(f"Prompt {n}:", t, (t,) if t else (), group=str(n)) for n, t in enumerate(targets)]
    items = encode(module.backbone.tokenizer, examples)
    recorder = Recorder()
    runner = trainer(
        STEPS,
        recorder,
        *([MovingAverageBaseline(0.5)] if case == "moving average" else []),
        accelerator=accelerator,
        devices=processes,
        strategy="ddp_find_unused_parameters_true" if processes > 1 else "auto",
        default_root_dir=folder,
        use_distributed_sampler=False,
    )
    batch_size = {"missing targets": 2}.get(case, 4) // processes
    mine = items[int(os.environ.get("LOCAL_RANK", 0)) :: processes]
    runner.fit(module, DataLoader(mine, batch_size=batch_size, collate_fn=collate))  # type: ignore[arg-type]
    results = {"reports": recorder.reports, "logged": {n: float(v) for n, v in runner.callback_metrics.items()}}
    out = Path(folder, f"{processes}_{runner.global_rank}")
    out.with_suffix(".json").write_text(json.dumps(results), encoding="utf-8")
    torch.save({"first": recorder.weights[0], "last": state(module)}, out.with_suffix(".pt"))


# a resumed run


class Counted(Source):
    """``count`` prompts that begin with a word."""

    def __init__(self, word: str, count: int) -> None:
        super().__init__()
        self.word, self.count = word, count

    def rows(self) -> Iterator[Example]:
        for n in range(self.count):
            prompt, target = f"{self.word} {n}" + "!" * (n % 5), f"{self.word[0]} {n}."
            yield Example(prompt, target, (target,), group=prompt, source=self.word)


class Journal(L.Callback):
    """Keeps the prompts and the metrics of each step, and writes a checkpoint after it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        prompts = [example.prompt for example in batch.examples]
        self.steps.append(
            {"prompts": prompts, "report": {name: float(value) for name, value in outputs[OUTPUT].metrics.items()}}
        )
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def epochs(base: str, processes: int, folder: str, ckpt_path: str | None = None) -> None:
    """Train twelve steps, five an epoch, with all that a checkpoint holds: replay, baseline, monitor."""
    torch.manual_seed(4)
    settings = {
        "num_generations": K,
        "sampling": Sampling(max_new_tokens=6),
        "rewards": [FunctionReward(share_of_a)],
        "replay": Replay(4, 2),
        "adversarial": 0.3,
        "generator_lora": LoraSettings(4, 8),
        "discriminator_lora": LoraSettings(4, 8),
    }
    module = LoraGANModule(base, **grouped(settings))
    sources: list[Source] = [Counted("Say", 14), Counted("Count", 10)]
    data = InstructionDataModule(
        Mixture(sources, [2.0, 1.0]),
        tokenizer=base,
        batch_size=4 // processes,
        bucket_batches=2,
        validation=0,
        test=0,
    )
    journal = Journal(Path(folder))
    runner = trainer(
        12,
        MovingAverageBaseline(0.5),
        CollapseMonitor(every_n_steps=4),
        journal,
        devices=processes,
        strategy="ddp_find_unused_parameters_true",
        default_root_dir=folder,
        limit_val_batches=0,
    )
    runner.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    results = {"steps": journal.steps, "logged": {n: float(v) for n, v in runner.callback_metrics.items()}}
    Path(folder, f"{runner.global_rank}.json").write_text(json.dumps(results), encoding="utf-8")
    torch.save(state(module), Path(folder, f"{runner.global_rank}.pt"))


if __name__ == "__main__":
    program, base, processes, *more = sys.argv[1:]
    {"main": main, "epochs": epochs}[program](base, int(processes), *more)
