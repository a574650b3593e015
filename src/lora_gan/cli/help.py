"""Help: what the commands do and which settings they take, printed without importing what runs them."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator, Mapping

from lora_gan.cli.signatures import Setting, find, is_group, resolve, settings_of, summary
from lora_gan.errors import LoraGANError
from lora_gan.program import program_name

COMMANDS = {
    "fit": "train, test on held-out data, write the adapters, and say how to go on",
    "validate": "compute the validation metrics of a checkpoint",
    "test": "compare a checkpoint with its base on the held-out test split",
    "predict": "complete the test prompts with a checkpoint, into predictions.jsonl",
    "data": "show what fit would train on: counts, lengths, dropped rows, examples",
    "chat": "talk to a trained generator",
    "generate": "complete the prompts of a file with a trained generator",
    "report": "write curves, results and samples of runs to one HTML file",
    "ui": "serve a page to talk to trained generators, rate answers and see runs",
    "export": "write a trained generator as a PEFT adapter or a merged model",
    "schema": "print the JSON schema of configuration files, for editors",
    "completion": "print a completion script for bash, zsh or tcsh",
}
FUNCTIONS = {  # commands that are one function
    "chat": "lora_gan.inference.chat",
    "export": "lora_gan.export.export",
    "generate": "lora_gan.inference.generate",
    "report": "lora_gan.report.write.report",
    "ui": "lora_gan.ui.command.ui",
}
PRINTED = {"schema": "> schema.json", "completion": "SHELL"}  # commands that print a file, and how they are used
TOPICS = {
    "model": "lora_gan.module.LoraGANModule",
    "data": "lora_gan.data.InstructionDataModule",
    "trainer": "lightning.pytorch.Trainer",
}
OPTIONS = {
    "--config FILE": "settings in YAML; may be given several times, later files and options change earlier ones",
    "--ckpt_path FILE": "go on from a checkpoint, or from last: the newest of this experiment",
    "--seed_everything N": "seed of everything random",
    "--test_after_fit BOOL": "whether fit ends with the held-out test",
    "--report_after_fit BOOL": "whether fit ends with report.html in the run's folder",
    "--print_config": "print the whole configuration, and stop",
    "--gens N, --pop N": "of evolution: trainer.max_steps, model.population",
}
WIDTH = 110


def overview() -> str:
    """Help of the whole program."""
    name = program_name()
    return f"""usage: {name} COMMAND …

Adversarial, reward-guided fine-tuning of one frozen language model with two LoRA adapters.

commands:
{_columns(COMMANDS)}

begin:    {name} fit --config configs/gan.yaml
more:     {name} COMMAND --help, {name} --version"""


def of_command(command: str, topic: str = "") -> str:
    """Help of a command that is no function; of a topic or a class where one is named."""
    if topic:
        return of_class(topic)
    name = f"{program_name()} {command}"
    if command in PRINTED:
        return f"usage: {name} {PRINTED[command]}\n\n{_sentence(COMMANDS[command])}"
    options = {key: text for key, text in OPTIONS.items() if command != "data" or key == "--config FILE"}
    parts = [
        f"usage: {name} --config FILE [--config FILE …] [--SETTING VALUE …]",
        _sentence(COMMANDS[command]),
        f"examples:\n  {name} --config configs/gan.yaml\n"
        f"  {name} --config configs/gpt2_alpaca.yaml --model.base my-model --data.path my.jsonl",
        f"options:\n{_columns(options)}",
    ]
    if command != "data":
        parts.append(_main_settings("model", "of the model (--help model explains each of them)"))
    parts.append(_main_settings("data", "of the data (--help data explains each of them)"))
    parts.append(f"more:\n{_columns(_more(name, command))}")
    return "\n\n".join(parts)


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def of_class(topic: str) -> str:
    """Every setting of the model, the data or the trainer, or of a class by its import path.

    Raises:
        LoraGANError: There is no such topic or class.
    """
    path = TOPICS.get(topic, topic)
    found = find(path) if "." in path else None
    if found is None or not isinstance(found.node, ast.ClassDef):
        raise LoraGANError(
            f"no help on {topic}; --help takes {', '.join(TOPICS)}, or a class such as {TOPICS['model']}"
        )
    prefix = f"--{topic}." if topic in TOPICS else ""
    lines = [f"{topic}: {path}", "", *_wrapped(summary(path), ""), ""]
    for name, setting in listed(path, prefix):
        lines += _wrapped(f"{name}  {shown(setting)}", "  ") + _wrapped(setting.text, "      ")
    return "\n".join(lines)


def listed(path: str, prefix: str) -> Iterator[tuple[str, Setting]]:
    """The settings of a class by the names that one types; groups of settings are listed one by one."""
    for name, setting in settings_of(path).items():
        group = group_of(setting)
        if group:
            yield from listed(group, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", setting


def group_of(setting: Setting) -> str | None:
    """The class of a setting that is a group of settings."""
    path = resolve(setting.type, setting.module) if isinstance(setting.type, ast.Name) else None
    return path if path and is_group(path) else None


def shown(setting: Setting) -> str:
    """Type and default, as the source writes them; a constant by its value."""
    kind = ast.unparse(setting.type) if setting.type else "any"
    default = setting.default
    constant = find(f"{setting.module}.{default.id}") if isinstance(default, ast.Name) else None
    if constant is not None and isinstance(constant.node, ast.Assign):
        default = constant.node.value
    return f"({kind}; {'required' if default is None else f'default {ast.unparse(default)}'})"


def _main_settings(topic: str, title: str) -> str:
    settings = settings_of(TOPICS[topic])
    rows = {}
    for name, setting in settings.items():
        more = f".{{{', '.join(settings_of(group))}}}" if (group := group_of(setting)) else ""
        rows[f"--{topic}.{name}"] = setting.text.split("; ")[0].rstrip(".") + (f": {more}" if more else "")
    return f"settings {title}:\n{_columns(rows)}"


def _more(name: str, command: str) -> dict[str, str]:
    topics = ["data"] if command == "data" else ["model", "data", "trainer"]
    return {
        **{f"{name} --help {topic}": f"every setting of the {topic}, with types and defaults" for topic in topics},
        f"{name} --help lora_gan.rewards.SemanticReward": "the settings of any class, for its init_args",
    }


def _columns(rows: Mapping[str, str]) -> str:
    width = min(max(map(len, rows)), 34) + 2
    lines = []
    for name, text in rows.items():
        first, *rest = textwrap.wrap(text, WIDTH - width) or [""]
        lines += [f"  {name:<{width}}{first}"] if len(name) < width else [f"  {name}", f"  {'':<{width}}{first}"]
        lines += [f"  {'':<{width}}{line}" for line in rest]
    return "\n".join(lines)


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent)
