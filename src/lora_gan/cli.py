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
import yaml
from jsonargparse import Namespace, auto_cli
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.model_helpers import is_overridden
from transformers.utils.logging import disable_progress_bar

from lora_gan.callbacks.last_checkpoint import last_checkpoint, resume_command
from lora_gan.checkpointing.adapters import ROLES, save_role
from lora_gan.checkpointing.files import LAST, CheckpointFiles, intact_checkpoint, read_checkpoint
from lora_gan.data.report import report
from lora_gan.errors import LoraGANError
from lora_gan.export import export
from lora_gan.inference import chat, generate
from lora_gan.lightning_compat import continue_in_folder, overrides, subcommand_setting
from lora_gan.module import LoraGANModule

logger = logging.getLogger("lora_gan")

SHORT = {"--gens": "--trainer.max_steps", "--pop": "--model.init_args.population"}  # of evolution
COMMANDS: dict[str, Callable[..., None]] = {"chat": chat, "export": export, "generate": generate}
CONFIGS = Path(__file__).parents[2] / "configs"  # of a checkout
ONCE = ("Curriculum", "LastCheckpoint", "MovingAverageBaseline", "PredictionWriter", "StepProgressBar", "TextMetrics")


class Parser(LightningArgumentParser):
    """Says what is wrong with a setting without printing the whole configuration behind it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        noise = ("Given value", "- Expected a <class 'NoneType'>", "Subtypes:")
        lines = [line for line in message.splitlines() if not line.strip().startswith(noise)]
        self.exit(2, "error: " + "\n".join(lines) + "\nfit --help lists the settings; --print_config shows them all\n")


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
            args=with_extended(sys.argv[1:] if args is None else args),
        )

    @overrides(LightningCLI)
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

    def before_instantiate_classes(self) -> None:
        """Settle the configuration that the run uses and saves: complete, and each kind of callback once."""
        settings = self.config[self.config["subcommand"]]
        settings["extends"] = None
        if isinstance(settings.get("trainer.callbacks"), list):
            settings["trainer.callbacks"] = last_of_each_kind(settings["trainer.callbacks"])

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A trainer that writes checkpoints safely and, on a resume, continues in the run's folder."""
        trainer = super().instantiate_trainer(**kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()
        resumed = subcommand_setting(self, "ckpt_path") if self.subcommand == "fit" else None
        if resumed is not None:
            run = Path(resumed).resolve().parents[1]
            for sink in trainer.loggers:
                if isinstance(sink, TensorBoardLogger) and run.parent == Path(sink.root_dir).resolve():
                    continue_in_folder(sink, run.name)
        return trainer

    def before_fit(self) -> None:
        seed = subcommand_setting(self, "seed_everything")
        if isinstance(self.model, LoraGANModule) and not isinstance(seed, bool):
            self.model.seed = seed

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.init_args.base", "data.init_args.tokenizer")
        parser.add_argument("--extends", type=str | None, default=None, help="In a file: the file that it builds on.")
        parser.add_argument("--test_after_fit", type=bool, default=True, help="End fit with the held-out test.")

    def after_fit(self) -> None:
        """Test the best checkpoint, write the adapters, and say what can be done with them."""
        assert self.trainer is not None
        if not isinstance(self.model, LoraGANModule):
            return
        best = getattr(self.trainer.checkpoint_callback, "best_model_path", "")
        if best:
            self.model.load_state_dict(read_checkpoint(best)["state_dict"], strict=False)
        if subcommand_setting(self, "test_after_fit") and is_overridden("test_dataloader", self.datamodule):
            self.trainer.test(self.model, datamodule=self.datamodule, verbose=False)
        folder, lines = self.trainer.log_dir, closing_lines(self.trainer, best)  # broadcast: every device asks
        if self.trainer.is_global_zero and folder:
            for role in ROLES:
                save_role(self.model, role, Path(folder) / "adapters" / role)
            print(lines)


class DataCLI(CLI):
    """``data``: takes what ``fit`` takes and reports what it would train on, without making the model."""

    def instantiate_classes(self) -> None:
        parser = LightningArgumentParser()
        parser.add_subclass_arguments(L.LightningDataModule, "data")
        self.datamodule = parser.instantiate_classes(
            parser.parse_object({"data": self.config["fit"]["data"].as_dict()})
        ).data

    @overrides(LightningCLI)
    def _run_subcommand(self, subcommand: str) -> None:
        print(report(self.datamodule))


def with_extended(arguments: Sequence[str]) -> list[str]:
    """The arguments with each configuration file after the one that it ``extends``.

    A file that replaces the callbacks of the files before it is logged with the names of those that it removes.
    """
    result: list[str] = []
    callbacks: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        name, *value = argument.split("=", 1)
        if name not in ("--config", "-c"):
            result.append(argument)
            continue
        for file in _chain(value[0] if value else next(rest, "")):
            result.append(f"--config={file}")
            callbacks = _callbacks_after(callbacks, file)
    return result


def _chain(file: str) -> list[str]:
    """The file after all that it extends, each looked for beside the file and in the checkout's ``configs``."""
    files = [file]
    while name := _content(files[0]).get("extends"):
        found = [path for path in (Path(files[0]).parent / name, CONFIGS / name) if path.is_file()]
        if not found or str(found[0]) in files:
            raise LoraGANError(
                f"{files[0]} extends {name}, and there is no such file in {Path(files[0]).parent} or {CONFIGS}: "
                "copy it there, or give its path"
            )
        files.insert(0, str(found[0]))
    return files


def _content(file: str) -> dict[str, Any]:
    """What a configuration file says; nothing where it cannot be read, which the parser reports."""
    try:
        content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        content = None
    return content if isinstance(content, dict) else {}


def _callbacks_after(before: list[str], file: str) -> list[str]:
    """Names of the callbacks as a further file leaves them."""
    trainer = _content(file).get("trainer")
    trainer = trainer if isinstance(trainer, dict) else {}
    if "callbacks" in trainer:
        given = _callback_names(trainer["callbacks"])
        if removed := [name for name in before if name not in given]:
            logger.warning(
                "%s replaces the callbacks before it and removes %s; callbacks+ adds instead", file, ", ".join(removed)
            )
        before = given
    return before + _callback_names(trainer.get("callbacks+"))


def _callback_names(given: Any) -> list[str]:
    entries = given if isinstance(given, list) else [given] if given else []
    paths = [entry.get("class_path", "") if isinstance(entry, dict) else entry for entry in entries]
    return [str(path).rpartition(".")[2] for path in paths]


def last_of_each_kind(callbacks: list[Namespace]) -> list[Namespace]:
    """The callbacks, where a later one takes the place of an earlier one of its kind.

    Of one kind are callbacks of which a run needs one only, and two ``ModelCheckpoint`` with the same file name.
    """
    kept: dict[Any, Namespace] = {}
    for number, callback in enumerate(callbacks):
        name, settings = callback.class_path.rpartition(".")[2], callback.get("init_args", {})
        kind: Any = name if name in ONCE else number
        if name == "ModelCheckpoint" and settings.get("filename"):
            kind = (name, settings.get("dirpath"), settings.get("filename"))
        kept[kind] = callback
    return list(kept.values())


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
    """Where the run's results lie and how to continue."""
    folder, newest = _relative(trainer.log_dir or ""), last_checkpoint(trainer)
    last = str(newest) if newest.is_file() else best
    lines = [f"run          {folder}", f"adapters     {folder}/adapters/generator, {folder}/adapters/discriminator"]
    if best:
        lines += [
            f"checkpoints  best {_relative(best)}, last {_relative(last)}",
            f"resume       {resume_command(trainer)} --trainer.max_steps <steps>",
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
