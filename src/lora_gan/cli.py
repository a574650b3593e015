"""``python -m src.cli`` or ``lora-gan``: LightningCLI's fit, validate, test, predict; data, chat, generate, export."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from jsonargparse import Namespace, auto_cli
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from transformers.utils.logging import disable_progress_bar

from lora_gan.adapters import PLAYERS, save_player
from lora_gan.callbacks.last import last_checkpoint, resume_command
from lora_gan.checkpoint_files import LAST, CheckpointFiles, intact_checkpoint, read_checkpoint
from lora_gan.data.report import report
from lora_gan.errors import LoraGANError
from lora_gan.export import export
from lora_gan.module import LoraGANModule
from lora_gan.saved import chat, generate

logger = logging.getLogger("lora_gan")

SHORT = {"--gens": "--trainer.max_steps", "--pop": "--model.init_args.population"}  # of evolution
COMMANDS: dict[str, Callable[..., None]] = {"chat": chat, "export": export, "generate": generate}


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
                "Start: fit --config configs/gan.yaml. Further commands: data, chat, generate, export. "
                "Short for evolution: --gens (--trainer.max_steps), --pop (--model.init_args.population).",
            },
            parser_class=Parser,
            args=args,
        )

    def _parse_ckpt_path(self) -> None:
        """Find a checkpoint that is whole; Lightning would let settings that it holds override those given here."""
        settings = self.config[self.config["subcommand"]]
        given = settings.get("ckpt_path")
        if given == "last":
            given = newest_run(_runs_folder(settings))
            if given is None and self.config["subcommand"] == "fit":  # so that a job can say it from its first start
                logger.warning("no run to resume in %s yet: a new one starts", _runs_folder(settings))
            elif given is None:
                raise LoraGANError(f"no run with a checkpoint in {_runs_folder(settings)}; give the checkpoint's path")
        if given and str(given) not in ("best", "hpc"):
            given = str(intact_checkpoint(Path(given)))
            logger.info("checkpoint: %s", given)
        settings["ckpt_path"] = given

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A trainer that writes checkpoints safely and, on a resume, goes on in the run's folder."""
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()
        resumed = self._get(self.config, "ckpt_path") if self.subcommand == "fit" else None
        if resumed is not None:
            run = Path(resumed).resolve().parents[1]
            for sink in trainer.loggers:
                if isinstance(sink, TensorBoardLogger) and run.parent == Path(sink.root_dir).resolve():
                    sink._version = run.name
        return trainer

    def before_fit(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if isinstance(self.model, LoraGANModule) and not isinstance(seed, bool):
            self.model.seed = seed

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
            self.model.load_state_dict(read_checkpoint(best)["state_dict"], strict=False)
        if self._get(self.config["fit"], "test_after_fit") and is_overridden("test_dataloader", self.datamodule):
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        folder, told = self.trainer.log_dir, closing_lines(self.trainer, best)  # broadcast: every device asks
        if self.trainer.is_global_zero and folder:
            for player in PLAYERS:
                save_player(self.model, player, Path(folder) / "adapters" / player)
            print(told)


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


def newest_run(folder: Path) -> Path | None:
    """Where the run in ``folder`` that wrote a checkpoint last has its newest one."""
    written = sorted(folder.glob("*/checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)
    return written[-1].with_name(LAST) if written else None


def _runs_folder(settings: Any) -> Path:
    """Where the runs of this configuration lie."""
    given = settings.get("trainer.logger")
    given = given[0] if isinstance(given, list) and given else given
    where = given.get("init_args", {}) if isinstance(given, Namespace) else {}
    root = where.get("save_dir") or settings.get("trainer.default_root_dir") or "."
    return Path(root) / (where.get("name") or "lightning_logs")


def closing_lines(trainer: L.Trainer, best: str) -> str:
    """Where the run's results lie and how to go on."""
    folder, newest = _relative(trainer.log_dir or ""), last_checkpoint(trainer)
    last = str(newest) if newest.is_file() else best
    lines = [f"run          {folder}", f"adapters     {folder}/adapters/generator, {folder}/adapters/discriminator"]
    if best:
        lines += [
            f"checkpoints  best {_relative(best)}, last {_relative(last)}",
            f"resume       {resume_command(trainer)} --trainer.max_steps <rounds>",
            f"chat         python -m src.cli chat --ckpt_path {_relative(best)}",
            f"export       python -m src.cli export --ckpt_path {_relative(best)} --merge true --output exported",
        ]
    return "\n".join(lines)


def _relative(path: str) -> str:
    return os.path.relpath(path) if path else path


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; mistakes of the user end in one message and exit status 2, without a traceback."""
    arguments = [_long(argument) for argument in (sys.argv[1:] if args is None else args)]
    _quiet()
    try:
        if arguments and arguments[0] in COMMANDS:
            auto_cli(COMMANDS[arguments[0]], args=arguments[1:], as_positional=False)
        elif arguments and arguments[0] == "data":
            DataCLI(["fit", *arguments[1:]])
        else:
            CLI(arguments)
    except Exception as error:
        mistake = _mistake_behind(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None


def _long(argument: str) -> str:
    """An argument without its abbreviation."""
    name, *value = argument.split("=", 1)
    return "=".join([SHORT.get(name, name), *value])


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
