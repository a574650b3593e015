"""``python -m src.cli`` or ``lora-gan``: fit, validate, test, predict, data, chat, generate, report, ui, export.

What a user types wrong is found here, before torch and lightning are imported.
"""

from __future__ import annotations

import difflib
import gc
import itertools
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any

from lora_gan.cli import help
from lora_gan.cli.configuration import with_extended
from lora_gan.cli.names import Names
from lora_gan.cli.schema import SchemaWriter, completion
from lora_gan.cli.signatures import stub
from lora_gan.errors import LoraGANError
from lora_gan.program import __version__, program_name

logger = logging.getLogger("lora_gan")

HELP = ("--help", "-h", "help")
CLOSED = 128 + 13  # exit status of a program that ends by SIGPIPE
SHORT = {  # settings of a training command that have a short name
    "--gens": "--trainer.max_steps",
    "--pop": "--model.init_args.population",
    "--best_of": "--model.init_args.best_of",
}
ADVICE = (  # of the libraries, which does not apply here
    "args parameter is intended",
    "does not have many workers",
    "LeafSpec",
    "in eval mode at the start",
    "is_gradient_checkpointing",
    "The dirpath has changed",
)


def main(args: Sequence[str] | None = None) -> None:
    """Run a command; mistakes of the user end in one message and exit status 2, without a traceback."""
    arguments = list(sys.argv[1:] if args is None else args)
    _show_log()
    try:
        _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        raise SystemExit(CLOSED) from None
    except Exception as error:
        mistake = _mistake_behind(error)
        if mistake is None:
            raise
        print(f"error: {mistake}", file=sys.stderr)
        raise SystemExit(2) from None


def _run(arguments: list[str]) -> None:
    name, *rest = arguments or ["--help"]
    if name in HELP and rest[:1] and rest[0] not in HELP:  # help fit
        name, rest = rest[0], ["--help", *rest[1:]]
    if name in HELP:
        print(help.overview())
    elif name == "--version":
        print(f"lora-gan {__version__}")
    elif name not in help.COMMANDS:
        close = difflib.get_close_matches(name, help.COMMANDS, 1)
        also = f"; did you mean {close[0]}?" if close else ""
        raise LoraGANError(f"no command {name}; the commands are {', '.join(help.COMMANDS)}{also}")
    elif name in help.FUNCTIONS:
        _call(name, _with_runs(rest) if name in ("report", "ui") else rest)
    elif rest and rest[0] in HELP:
        print(help.of_command(name, *rest[1:2]))
    elif name in help.PRINTED:
        print(_printed(name, rest))
    else:
        _train(name, rest)


def _printed(name: str, arguments: list[str]) -> str:
    """The schema or the completion script."""
    if len(arguments) > (name == "completion"):
        raise LoraGANError(f"got {' '.join(arguments)}; usage: {program_name()} {name} {help.PRINTED[name]}")
    return json.dumps(SchemaWriter().write(), indent=1) if name == "schema" else completion(*arguments or [""])


def _with_runs(arguments: list[str]) -> list[str]:
    """The arguments of ``report`` and ``ui``, which begin with the folders of runs, with their name."""
    folders = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
    rest = arguments[len(folders) :]
    return [f"--runs={json.dumps(folders)}", *rest] if folders and folders[0] not in HELP else arguments


def _call(name: str, arguments: list[str]) -> None:
    """Run a command that is a function; its arguments are read before its module is imported."""
    from jsonargparse import auto_cli

    path = help.FUNCTIONS[name]
    given = auto_cli(stub(path), args=arguments, as_positional=False, prog=f"{program_name()} {name}")
    module, _, function = path.rpartition(".")
    getattr(_load(module), function)(**given)


def _train(name: str, arguments: list[str]) -> None:
    """Run a command of the trainer, or show its data."""
    arguments = [_long(argument) for argument in arguments]
    if not any(argument.startswith(("--config", "--model", "--data", "-c", "--print")) for argument in arguments):
        raise LoraGANError(f"{name} needs a configuration: {program_name()} {name} --config configs/gan.yaml")
    arguments = with_extended(arguments)
    Names().read(arguments)
    training = _load("lora_gan.cli.training")
    if name == "data":
        print(import_module("lora_gan.data.report").report(training.read_data(arguments)))
    else:
        training.CLI([name, *arguments])


def _long(argument: str) -> str:
    """An argument without its abbreviation."""
    name, *value = argument.split("=", 1)
    return "=".join([SHORT.get(name, name), *value])


def _load(module: str) -> Any:
    """Say that the program works, then import what takes seconds; without the collector, which finds nothing in it."""
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"lora-gan {__version__}: loading …", file=sys.stderr, flush=True)
    gc.disable()
    try:
        import_module("transformers.utils.logging").disable_progress_bar()
        return import_module(module)
    finally:
        gc.enable()


def _mistake_behind(error: BaseException | None) -> str | None:
    """The user's mistake that led to ``error``, in one line; None if it is a fault of the program.

    jsonargparse wraps what a constructor raises. A file that cannot be read or written, and what Lightning's own code
    refuses, are mistakes of the settings.
    """
    for each in _causes(error):
        if isinstance(each, LoraGANError):
            return str(each)
        if isinstance(each, OSError) and each.filename is not None:
            return f"{each.strerror}: {each.filename}"
        if type(each).__name__ == "MisconfigurationException" or _refused_by_lightning(each):
            return " ".join(str(each).split())
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _refused_by_lightning(error: BaseException) -> bool:
    """Whether a check in Lightning's own code has raised it."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    raised_in = place.tb_frame.f_globals.get("__name__", "") if place else ""
    kinds = (ValueError, ImportError, NotImplementedError)
    return isinstance(error, kinds) and raised_in.startswith(("lightning.pytorch.", "lightning.fabric."))


def _show_log() -> None:
    """Show our own log lines, and leave out the libraries' advice that does not apply here."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    if not logger.handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for advice in ADVICE:
        warnings.filterwarnings("ignore", message=f".*{advice}")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda r: "litlogger" not in r.getMessage())
