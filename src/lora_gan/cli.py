"""``python -m src.cli`` or ``lora-gan``: fit, validate, test, predict (LightningCLI), data, chat and export."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.model_helpers import is_overridden
from transformers.utils.logging import disable_progress_bar

from lora_gan.callbacks.last import last_checkpoint
from lora_gan.data.report import report
from lora_gan.errors import LoraGANError
from lora_gan.module import LoraGANModule
from lora_gan.saved import chat, export, write_adapters

logger = logging.getLogger("lora_gan")

COMMANDS: dict[str, Callable[..., None]] = {"chat": chat, "export": export}


class Parser(LightningArgumentParser):
    """Says what is wrong with a setting without printing the whole configuration behind it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        noise = ("Given value", "- Expected a <class 'NoneType'>", "Subtypes:")
        told = [line for line in message.splitlines() if not line.strip().startswith(noise)]
        self.exit(2, "error: " + "\n".join(told) + "\nfit --help lists the settings; --print_config shows them all\n")


class CLI(LightningCLI):
    """LightningCLI whose base model also names the tokenizer, and whose ``fit`` ends with the held-out test."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            parser_kwargs={
                "prog": "python -m src.cli",
                "description": "Adversarial, reward-guided fine-tuning with two LoRA adapters on one frozen model. "
                "Start: fit --config configs/gan.yaml. Further commands: data, chat, export.",
            },
            parser_class=Parser,
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.init_args.base", "data.init_args.tokenizer")
        parser.add_argument("--test_after_fit", type=bool, default=True, help="End fit with the held-out test.")

    def after_fit(self) -> None:
        """Test the best checkpoint, write the adapters, and say what can be done with them."""
        assert self.trainer is not None
        if not isinstance(self.model, LoraGANModule):
            return
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if best:
            state = torch.load(best, map_location="cpu", weights_only=True)["state_dict"]
            self.model.load_state_dict(state, strict=False)
        if self._get(self.config["fit"], "test_after_fit") and is_overridden("test_dataloader", self.datamodule):
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        if self.trainer.is_global_zero and self.trainer.log_dir:
            write_adapters(self.model, Path(self.trainer.log_dir))
            print(closing_lines(self.trainer, best))


class DataCLI(CLI):
    """``data``: takes what ``fit`` takes and tells what it would train on, without making the model."""

    def instantiate_classes(self) -> None:
        parser = LightningArgumentParser()
        parser.add_subclass_arguments(L.LightningDataModule, "data")
        self.datamodule = parser.instantiate_classes(
            parser.parse_object({"data": self.config["fit"]["data"].as_dict()})
        ).data

    def _run_subcommand(self, subcommand: str) -> None:
        print(report(self.datamodule))


def closing_lines(trainer: L.Trainer, best: str) -> str:
    """Where the run's results lie and how to go on."""
    folder = _relative(trainer.log_dir or "")
    lines = [f"run          {folder}", f"adapters     {folder}/adapters/generator, {folder}/adapters/discriminator"]
    if best:
        newest = last_checkpoint(trainer)
        last = str(newest) if newest.is_file() else best
        lines += [
            f"checkpoints  best {_relative(best)}, last {_relative(last)}",
            f"resume       python -m src.cli fit --config {folder}/config.yaml --ckpt_path {_relative(last)} "
            "--trainer.max_steps <rounds>",
            f"chat         python -m src.cli chat --ckpt_path {_relative(best)}",
            f"export       python -m src.cli export --ckpt_path {_relative(best)} --merge true --output exported",
        ]
    return "\n".join(lines)


def _relative(path: str) -> str:
    return os.path.relpath(path) if path else path


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; mistakes of the user end in one message and exit status 2, without a traceback."""
    arguments = list(sys.argv[1:] if args is None else args)
    _quiet()
    try:
        if arguments and arguments[0] in COMMANDS:
            auto_cli(COMMANDS[arguments[0]], args=arguments[1:], as_positional=False)
        elif arguments and arguments[0] == "data":
            DataCLI(["fit", *arguments[1:]])
        else:
            CLI(None if args is None else arguments)
    except Exception as error:
        mistake = _mistake_behind(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None


def _mistake_behind(error: BaseException | None) -> LoraGANError | None:
    """The user's mistake that led to ``error``: jsonargparse wraps what a constructor raises."""
    while error is not None and not isinstance(error, LoraGANError):
        error = error.__cause__
    return error


def _quiet() -> None:
    """Show our own log lines, and leave out the libraries' advice that does not apply here."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    if not logger.handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for advice in (
        "args parameter is intended",
        "does not have many workers",
        "LeafSpec",
        "in eval mode at the start",
        "is_gradient_checkpointing",
    ):
        warnings.filterwarnings("ignore", message=f".*{advice}")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
    disable_progress_bar()
