"""Settings read from sources: the same as those of the imported classes, as help, check of names and JSON schema."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from lora_gan.cli import main
from lora_gan.cli.configuration import with_extended
from lora_gan.cli.names import Names
from lora_gan.cli.schema import OFFER, SchemaWriter
from lora_gan.cli.signatures import accepts_anything, exported, settings_of, stub
from lora_gan.errors import LoraGANError
from lora_gan.inference import chat

CONFIGS = Path(__file__).parents[3] / "configs"
CLASSES = [path for package in OFFER if package.startswith("lora_gan") for path in exported(package)]


def imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)


def test_what_is_read_from_the_sources_is_what_the_classes_take() -> None:
    assert len(CLASSES) > 80
    for path in CLASSES:
        if issubclass(imported(path), Exception | tuple):
            continue
        parameters = inspect.signature(imported(path)).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        settings = settings_of(path)
        assert {p.name for p in named} <= set(settings) or accepts_anything(path), path
        if len(named) == len(parameters):
            assert [p.name for p in named] == list(settings), path
        for parameter in named if settings else ():
            assert (settings[parameter.name].default is None) == (parameter.default is parameter.empty), path


def test_arguments_that_are_passed_on_are_those_of_the_base_class() -> None:
    settings = settings_of("lora_gan.data.InstructionDataModule")
    assert {"source", "path", "batch_size", "chat"} <= set(settings)
    assert settings["batch_size"].text == "Prompts in a training step."
    assert not accepts_anything("lora_gan.data.InstructionDataModule")
    assert accepts_anything("lightning.pytorch.loggers.TensorBoardLogger"), "what it passes to another library"


def test_a_stub_takes_what_its_function_takes_and_returns_it() -> None:
    taken = stub("lora_gan.inference.chat")
    assert str(inspect.signature(taken)).split(" ->")[0] == str(inspect.signature(chat)).split(" ->")[0]
    assert taken.__doc__ == chat.__doc__
    assert taken("a.ckpt", temperature=0.5)["temperature"] == 0.5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            ["--model.init_args.sampling.temprature=1"],
            "model.sampling has no setting 'temprature'; did you mean temper",
        ),
        (["--model.generator.optimizer.init_args.lrr=1"], "torch.optim.AdamW has no setting 'lrr'; did you mean lr?"),
        (
            ["--trainer.callbacks=null", "--trainer.max_stepz", "3"],
            "Trainer has no setting 'max_stepz'; did you mean max_s",
        ),
        (
            ["--data.source=lora_gan.data.BuiltinWorld", "--data.source.target=x"],
            "lora_gan.data.BuiltinWorld has no setting 'target'",
        ),
        (["--data.lora_r=3"], "it is model.generator.lora.rank here"),
        (["--lr", "1"], "no option --lr; it is model.generator.optimizer.init_args.lr"),
    ],
)
def test_a_name_that_no_class_has(given: list[str], message: str) -> None:
    with pytest.raises(LoraGANError) as error:
        Names().read(with_extended([f"--config={CONFIGS / 'qa.yaml'}", *given]))
    assert message in str(error.value)


@pytest.mark.parametrize(
    "given",
    [
        ["--data.source", "lora_gan.data.OwnFile", "--data.source.target=x"],
        ["--trainer.callbacks+=lora_gan.callbacks.Throughput", "--trainer.callbacks.init_args.anything=1"],
        ["--model=my.Model", "--model.own=1"],
        ["--trainer.logger=false", "--model.rewards+", "{class_path: my.Reward, init_args: {x: 1}}"],
        ["--model.generator.scheduler=torch.optim.lr_scheduler.StepLR", "--model.generator.scheduler.step_size=3"],
        [
            "--model.generator.policy_loss=lora_gan.losses.Reinforce",
            "--model.generator.policy_loss=ClippedPPO",
            "--model.generator.policy_loss.epsilon=0.1",
        ],
        ["--print_config", "--ckpt_path=last", "--seed_everything", "1"],
    ],
)
def test_names_that_are_right_or_unknown_here_pass(given: list[str]) -> None:
    Names().read(with_extended([f"--config={CONFIGS / 'qa.yaml'}", *given]))


def test_the_schema_takes_every_configuration_and_refuses_mistakes() -> None:
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft7Validator(SchemaWriter().write())
    for path in CONFIGS.rglob("*.yaml"):
        errors = [error.message for error in validator.iter_errors(yaml.safe_load(path.read_text(encoding="utf-8")))]
        assert not errors, path
    model = "class_path: lora_gan.LoraGANModule, init_args:"
    for wrong in (
        "trainer: {max_stepz: 3}",
        "modell: {}",
        f"model: {{{model} {{num_generations: many}}}}",
        f"model: {{{model} {{sampling: {{temprature: 1}}}}}}",
        f"model: {{{model} {{rewards: [{{class_path: lora_gan.rewards.BleuReward, init_args: {{wight: 1}}}}]}}}}",
    ):
        assert not validator.is_valid(yaml.safe_load(wrong)), wrong
    assert validator.is_valid(yaml.safe_load("model: {class_path: my.Model, init_args: {x: 1}}")), "any class"


def test_completion_names_shtab_where_it_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "shtab", None)
    with pytest.raises(SystemExit):
        main(["completion", "bash"])
    assert "error: completion needs shtab: pip install shtab" in capsys.readouterr().err
    monkeypatch.undo()
    pytest.importorskip("shtab")
    main(["completion", "bash"])
    assert "--model.sampling.temperature" in capsys.readouterr().out
