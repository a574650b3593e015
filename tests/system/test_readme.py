"""README, docs and CONTRIBUTING: their code blocks run, and the names, files and links in them exist."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lora_gan
from lora_gan.cli import main
from tests.system.test_cli import data as data  # the fixture
from tests.system.test_cli import settings, torch_state
from tests.system.test_imports import LAYERS

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
TEXT = "\n".join([README, *DOCS.values()])
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
PACKAGE = Path(lora_gan.__file__).parent


def block(name: str) -> str:
    """The code block that begins with "# name"."""
    found = re.search(rf"```\w+\n(# {re.escape(name)}\n.*?)```", TEXT, re.DOTALL)
    assert found, f"neither README.md nor docs has a block {name}"
    return found[1]


def test_own_reward_and_metric(
    bases: dict[str, str], data: Path, work_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are in files outside the package."""
    monkeypatch.syspath_prepend(str(work_in))
    for name in ("my_rewards.py", "mine.yaml"):
        (work_in / name).write_text(block(name), encoding="utf-8")
    with torch_state():
        main(["fit", *settings(bases["gpt2"], data, work_in), "--config=mine.yaml", "--trainer.max_steps=2"])
    (folder,) = work_in.glob("qa/version_*")
    events = EventAccumulator(str(folder)).Reload()
    names = set(events.Tags()["scalars"])
    assert {"reward/share_of_a", "reward/brevity", "text/mentions_target", "text/rouge_l"} <= names
    assert "test/trained/mentions_target" in names
    assert [event.step for event in events.Scalars("text/rouge_l")] == [0, 2], "measured once at each validation"


def test_own_experiment(work_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work_in / "my_experiment.yaml").write_text(block("my_experiment.yaml"), encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config=my_experiment.yaml", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert stopped.value.code == 0
    chosen = printed["model"]["init_args"]
    assert chosen["coefficients"]["kl"] == 0.05
    assert chosen["generator"]["policy_loss"]["init_args"]["num_iterations"] == 2
    callbacks = [callback["class_path"].rsplit(".", 1)[1] for callback in printed["trainer"]["callbacks"]]
    assert callbacks[-1] == "Curriculum" and "LastCheckpoint" in callbacks, "appended to those of base.yaml"


@pytest.mark.parametrize("name", ["library.py", "twin.py"])
def test_the_library_examples_run(name: str, work_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with torch_state():
        exec(compile(block(name), name, "exec"), {})
    printed = capsys.readouterr().out
    assert all(f"'{key}'" in printed for key in re.findall(r'"(\w+)"', block(name).split("# {")[1].split("}")[0]))


@pytest.mark.parametrize("name", ["fit.py", "with_trainer.py", "own_parts.py"])
def test_the_training_examples_run(name: str, work_in: Path) -> None:
    with torch_state():
        exec(compile(block(name), name, "exec"), {"__name__": name})
    assert name != "fit.py" or (work_in / "exported" / "model.safetensors").is_file()


def test_the_files_exist() -> None:
    pattern = r"(?<![\w/…-])(?:configs|tests|src|examples)/[\w/.-]+\.(?:yaml|py|jsonl?)"
    named = set(re.findall(pattern, TEXT + CONTRIBUTING))
    assert len(named) > 20
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_readme_is_a_page() -> None:
    assert len(README.splitlines()) <= 150


def test_the_links_lead_somewhere() -> None:
    for folder, text in ((ROOT, README), (ROOT, CONTRIBUTING), *((ROOT / "docs", text) for text in DOCS.values())):
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
            assert link.startswith("https://") or (folder / link).exists(), link


def test_the_class_paths_exist() -> None:
    named = set(re.findall(r"lora_gan\.([\w.]+)\.([A-Z]\w+)", TEXT))
    assert len(named) > 10
    missing = [f"{module}.{name}" for module, name in named if not hasattr(import_module(f"lora_gan.{module}"), name)]
    assert missing == []


def test_the_table_of_parts_names_classes() -> None:
    """In a cell, names without a module belong to the module of the first."""
    table = DOCS["configuration.md"].split("## Parts and settings")[1].split("\n## ")[0]
    checked = 0
    for cell in re.findall(r"\| (`(?:rewards|advantages|losses|discriminator|callbacks)\.[A-Z].*) \|", table):
        module = import_module(f"lora_gan.{cell[1:].split('.')[0]}")
        for name in re.findall(r"`(?:\w+\.)?([A-Z]\w+)`", cell):
            assert hasattr(module, name), name
            checked += 1
    assert checked > 40


WEIGHTS = ("builtin/", "digits/")  # folders of the bases


def test_the_layout_names_every_module() -> None:
    layout = README.split("## Files")[1]
    parts = {path.name + ("/" if path.is_dir() else "") for path in PACKAGE.iterdir()}
    parts = {
        part for part in parts if part.endswith((".py", "/")) and not part.startswith("__") and part not in WEIGHTS
    }
    assert [part for part in sorted(parts) if part not in layout] == []


def test_the_order_of_imports_is_the_tested_one() -> None:
    lines = CONTRIBUTING.split("```text\n")[1].split("```")[0].splitlines()
    assert [set(line.split()) for line in lines] == LAYERS
