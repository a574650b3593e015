"""Training commands: LightningCLI's fit, validate, test and predict, and data, which reads what fit would."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import jsonargparse
import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger

from lora_gan.callbacks.last_checkpoint import WITH_FOLDERS, run_folder, stopped_by_sigterm
from lora_gan.checkpointing.files import CheckpointFiles, intact_checkpoint, newest_run
from lora_gan.cli.configuration import content, last_of_each_kind, pairs
from lora_gan.cli.hyperparameters import hyperparameters
from lora_gan.cli.runs import claim_folder, claim_versions, continue_run, require_writable, runs_folder
from lora_gan.errors import LoraGANError
from lora_gan.lightning_compat import overrides, set_root, subcommand_setting
from lora_gan.number_formats import auto_precision, default_device, resolved_dtype, use_tensor_cores
from lora_gan.program import program_name
from lora_gan.report.warnings import kept_warnings

logger = logging.getLogger("lora_gan")


class Parser(LightningArgumentParser):
    """Says what is wrong with a setting without printing the whole configuration behind it."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        noise = ("Given value", "- Expected a <class 'NoneType'>", "Subtypes:")
        lines = [line for line in message.splitlines() if not line.strip().startswith(noise)]
        if "lora_gan.data.Source is abstract" in message:
            lines.append("which source? name it before its settings: --data.source lora_gan.data.StandardFormat")
        self.exit(2, "error: " + "\n".join(lines) + "\nfit --help lists the settings; --print_config shows them all\n")


class SavedConfiguration(SaveConfigCallback):
    """Writes config.yaml into the run's folder, for a fresh run: without the checkpoint that this one resumed from.

    The settings are also logged as hyperparameters: TensorBoardLogger and CSVLogger write them to hparams.yaml.
    """

    seen = False  # whether a first stage was set up; the test at the end of a fit is its second

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not self.seen:
            self.seen, self.folder = True, run_folder(trainer)
            self.config = self.config.clone()
            resumed, self.config["ckpt_path"] = self.config.get("ckpt_path"), None
            self.overwrite = stage == "fit" and _lies_in(resumed, self.folder)
            self._refuse_to_replace(trainer)
            if not self.overwrite:
                super().setup(trainer, pl_module, stage)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """A resumed run replaces its configuration once its checkpoint and schedules have been accepted."""
        if self.overwrite and not self.already_saved:
            super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = str(self.folder / self.config_filename)
        self.parser.save(self.config, path, skip_none=False, overwrite=self.overwrite, multifile=False)
        settings = hyperparameters(self.config.as_dict())
        for sink in trainer.loggers if stage == "fit" else ():
            if isinstance(sink, TensorBoardLogger):
                sink.log_hyperparams(settings, {})  # no metrics yet: those of the end of the run follow
            else:
                sink.log_hyperparams(settings)

    def _refuse_to_replace(self, trainer: L.Trainer) -> None:
        path = self.folder / self.config_filename
        there = trainer.strategy.broadcast(path.is_file())
        if there and not self.overwrite:
            raise LoraGANError(
                f"{path} is there already, and this run would replace it: give the run a folder of its own, by "
                "trainer.logger.init_args.save_dir, name and version, or resume the run there with --ckpt_path"
            )


class CLI(LightningCLI):
    """LightningCLI whose base model also names the tokenizer, and whose ``fit`` ends with the held-out test.

    Args:
        args: The arguments, with the files that others extend.
    """

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            L.LightningModule,
            L.LightningDataModule,
            save_config_callback=SavedConfiguration,
            save_config_kwargs={"save_to_log_dir": False},  # which is not the run's folder with every logger
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            seed_everything_default=0,
            parser_kwargs={"prog": program_name()},
            parser_class=Parser,
            args=args,
        )

    @overrides(LightningCLI)
    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """The test prints its own table, so it does without Lightning's."""
        super()._add_subcommands(parser, **kwargs)
        self._subcommand_parsers["test"].set_defaults({"verbose": False})

    @overrides(LightningCLI)
    def _run_subcommand(self, subcommand: str) -> None:
        with stopped_by_sigterm(), kept_warnings(self._folder_of_fit):
            super()._run_subcommand(subcommand)

    def _folder_of_fit(self) -> Path | None:
        """The run's folder, once its configuration is written there, in the process of a fit that writes."""
        callbacks: list[L.Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        saved = next((callback for callback in callbacks if isinstance(callback, SavedConfiguration)), None)
        known = self.subcommand == "fit" and _is_first_process() and saved is not None and saved.seen
        return saved.folder if saved is not None and known else None

    @overrides(LightningCLI)
    def _parse_ckpt_path(self) -> None:
        """Find a checkpoint that is whole; Lightning would let settings that it holds override those given here."""
        settings = self.config[self.config["subcommand"]]
        given = settings.get("ckpt_path")
        if given == "last":
            given = newest_run(runs_folder(settings))
            if given is None and self.config["subcommand"] == "fit":  # so that a job can say it from its first start
                logger.warning("no run to resume in %s yet: a new one starts", runs_folder(settings))
            elif given is None:
                raise LoraGANError(f"no run with a checkpoint in {runs_folder(settings)}; give the checkpoint's path")
        if given is None and self.config["subcommand"] != "fit" and _starts_untrained(settings):
            command = self.config["subcommand"]
            raise LoraGANError(
                f"{command} needs a checkpoint, or its results would be those of adapters that have learned nothing: "
                "--ckpt_path last is that of the newest run of this configuration; an adapter alone is "
                "--model.generator.adapter FOLDER"
            )
        if given == "best":
            raise LoraGANError(
                "--ckpt_path best is known to Lightning in the process of a fit only; give the file's path"
            )
        if given and str(given) != "hpc":
            given = str(intact_checkpoint(Path(given)))
            logger.info("checkpoint: %s", given)
        settings["ckpt_path"] = given

    @overrides(LightningCLI)
    def _set_seed(self) -> None:
        from lora_gan.module import SEEDS

        seed = subcommand_setting(self, "seed_everything")
        if not isinstance(seed, bool) and not 0 <= (seed or 0) < SEEDS:
            raise LoraGANError(f"--seed_everything must be from 0 to {SEEDS - 1}, got {seed}")
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Settle the configuration that the run uses and saves: complete, and each kind of callback once."""
        settings = self.config[self.config["subcommand"]]
        settings["extends"] = None
        refuse_nan(settings, "")
        settle_formats(settings)
        if isinstance(settings.get("trainer.callbacks"), list):
            settings["trainer.callbacks"] = last_of_each_kind(settings["trainer.callbacks"])
        if not settings.get("trainer.fast_dev_run"):
            require_writable(runs_folder(settings))

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """A trainer with a folder of its own, or, on a resume, the run's, that writes checkpoints safely."""
        settings = self.config[self.subcommand]
        trainer = super().instantiate_trainer(**kwargs)
        if not any(isinstance(sink, WITH_FOLDERS) for sink in trainer.loggers) and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._give_folder(trainer, runs_folder(settings))
        use_tensor_cores(trainer.strategy.root_device)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()
        if run := self._resumed_run():
            continue_run(trainer.loggers, run)
        if _is_first_process():
            claim_versions(trainer.loggers)
        if self.subcommand == "predict":
            self._add_writer(trainer)
        return trainer

    def _give_folder(self, trainer: L.Trainer, runs: Path) -> None:
        """A root folder of its own for a run whose loggers give none; it would be the working folder."""
        run = self._resumed_run()
        if run is not None and run.parent == runs.resolve():
            set_root(trainer, run)
        elif _is_first_process():
            set_root(trainer, claim_folder(runs))

    def _resumed_run(self) -> Path | None:
        """Folder of the run that ``fit`` goes on with."""
        resumed = subcommand_setting(self, "ckpt_path") if self.subcommand == "fit" else None
        return None if resumed is None else Path(resumed).resolve().parents[1]

    def _add_writer(self, trainer: L.Trainer) -> None:
        from lora_gan.callbacks import PredictionWriter

        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        if not any(isinstance(callback, PredictionWriter) for callback in callbacks):
            callbacks.append(PredictionWriter())

    def before_fit(self) -> None:
        from lora_gan.module import LoraGANModule

        seed = subcommand_setting(self, "seed_everything")
        if isinstance(self.model, LoraGANModule) and not isinstance(seed, bool):
            self.model.seed = seed

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.link_arguments("model.init_args.base", "data.init_args.tokenizer")
        parser.add_argument("--extends", type=str | None, default=None, help="In a file: the file that it builds on.")
        parser.add_argument("--test_after_fit", type=bool, default=True, help="End fit with the held-out test.")
        parser.add_argument("--report_after_fit", type=bool, default=True, help="End fit with report.html.")

    def after_fit(self) -> None:
        from lora_gan.module import LoraGANModule
        from lora_gan.run_end import end_run

        if isinstance(self.model, LoraGANModule):
            assert self.trainer is not None
            test, report = (subcommand_setting(self, f"{name}_after_fit") for name in ("test", "report"))
            end_run(self.trainer, self.model, self.datamodule, test, report)


def settle_formats(settings: jsonargparse.Namespace) -> None:
    """Fill in the precision and the base's data type where they are left to the machine."""
    device = default_device() if settings.get("trainer.accelerator") in ("auto", "gpu", "cuda") else torch.device("cpu")
    if settings.get("trainer.precision") is None and not settings.get("trainer.plugins"):
        settings["trainer.precision"] = auto_precision(device)
    if dtype := settings.get("model.init_args.backbone.dtype"):
        precision = settings.get("trainer.precision")
        settings["model.init_args.backbone.dtype"] = resolved_dtype(dtype, device, precision)


def refuse_nan(given: Any, name: str) -> None:
    """Refuse settings that are not a number, wherever they are: comparisons with them are false, so checks may pass.

    Args:
        given: A setting, or all of them.
        name: Its name.

    Raises:
        LoraGANError: One is not a number.
    """
    if isinstance(given, jsonargparse.Namespace | dict):
        for inner, value in given.items():
            refuse_nan(value, f"{name}.{inner}" if name else str(inner))
    elif isinstance(given, list | tuple):
        for number, value in enumerate(given):
            refuse_nan(value, f"{name}[{number}]")
    elif isinstance(given, float) and math.isnan(given):
        raise LoraGANError(f"{name.replace('.init_args', '')} must be a number, got nan")


def _starts_untrained(settings: jsonargparse.Namespace) -> bool:
    """Whether the generator of a configuration begins as the base."""
    generator = settings.get("model.init_args.generator")
    return generator is not None and not generator.get("adapter")


def _is_first_process() -> bool:
    """Whether this process is the one that writes; known from the environment, before there is a trainer."""
    return getattr(rank_zero_only, "rank", 0) == 0


def _lies_in(checkpoint: str | None, folder: Path) -> bool:
    """Whether a checkpoint is one of the run in the folder."""
    return checkpoint is not None and Path(checkpoint).resolve().parents[1] == folder.resolve()


def read_data(arguments: Sequence[str]) -> L.LightningDataModule:
    """The data that ``fit`` with these arguments would train on, without its model and trainer.

    Raises:
        LoraGANError: The settings of the data are wrong.
    """
    parser = Parser(prog=f"{program_name()} data")
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile)  # type: ignore[attr-defined]
    parser.add_subclass_arguments(L.LightningDataModule, "data", required=True)
    parser.set_defaults({"data": {"class_path": "lora_gan.data.InstructionDataModule"}})
    parsed = parser.parse_args(list(_of_the_data(arguments)))
    base = _base(arguments)
    if base is not None and "tokenizer" in parsed.data.init_args:
        parsed.data.init_args.tokenizer = base
    return parser.instantiate_classes(parsed).data  # type: ignore[no-any-return]


def _of_the_data(arguments: Sequence[str]) -> Iterator[str]:
    """Of the arguments those that concern the data; of each file its part about the data."""
    for name, value in pairs(arguments):
        if name == "--config":
            data = content(value).get("data")
            yield from [f"--config={json.dumps({'data': data})}"] if data else []
        elif name == "--data" or name.startswith("--data."):
            yield f"{name}={value}"


def _base(arguments: Sequence[str]) -> str | None:
    """The base model that the arguments name last; it is also the tokenizer's name."""
    base = None
    for name, value in pairs(arguments):
        if name == "--config":
            model = content(value).get("model")
            model = model if isinstance(model, dict) else {}
            base = (model.get("init_args") or {}).get("base") or model.get("base") or base
        elif name in ("--model.base", "--model.init_args.base"):
            base = value
    return base
