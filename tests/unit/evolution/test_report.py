"""Outputs of an evolution run: adapters of the fittest, plot, merged model; and the short flags."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from lora_gan.callbacks import FitnessPlot, FittestMembers
from lora_gan.checkpointing.files import read_checkpoint
from lora_gan.cli import main
from lora_gan.errors import LoraGANError
from lora_gan.evolution.lowrank import Factors
from lora_gan.evolution.population import Member, positions
from lora_gan.types import PromptBatch
from tests.helpers.steps import Build, fit
from tests.system.test_cli import settings

ROOT = Path(__file__).parents[3]
IDS = torch.tensor([[72, 101, 108, 108, 111]])


@dataclass(frozen=True)
class Evolved:
    base: str
    data: Path
    folder: Path  # of the run

    @property
    def held_out(self) -> dict[int, float]:
        return {e.step: e.value for e in self.events.Scalars("fitness/held_out")}

    @property
    def events(self) -> EventAccumulator:
        return EventAccumulator(str(self.folder), size_guidance={"images": 0}).Reload()


def arguments(base: str, data: Path, run: Path) -> list[str]:
    """configs/evolve.yaml on a tiny base and a small data file, four generations of four members."""
    common = [one for one in settings(base, data, run) if not one.startswith(("--config", "--trainer.max_steps"))]
    start = {"class_path": "lora_gan.evolution.SupervisedStart", "init_args": {"trunk": 2, "branch": 2, "prompts": 2}}
    return [
        f"--config={ROOT / 'configs' / 'evolve.yaml'}",
        *common,
        "--gens=4",
        "--pop",
        "4",
        f"--model.init_args.start={json.dumps(start)}",
        "--model.init_args.refinement_steps=2",
        "--model.init_args.evaluation_prompts=2",
        "--trainer.val_check_interval=1",
        "--trainer.limit_val_batches=1",
        "--trainer.limit_test_batches=1",
    ]


def fit_it(base: str, data: Path, run: Path, *more: str) -> Path:
    main(["fit", *arguments(base, data, run), *more])
    return max((run / "evolve").glob("version_*"))


@pytest.fixture(scope="module")
def evolved(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Evolved:
    folder = tmp_path_factory.mktemp("evolved")
    rows = [{"instruction": f"Say number {n}.", "input": "", "output": f"It is {n}."} for n in range(40)]
    (folder / "mine.json").write_text(json.dumps(rows), encoding="utf-8")
    callbacks = [
        {"class_path": "lora_gan.callbacks.FitnessPlot", "init_args": {"every_n_generations": 2}},
        {
            "class_path": "lora_gan.callbacks.FittestMembers",
            "init_args": {"every_n_generations": 1, "members": 2, "keep_last": 2},
        },
        {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"monitor": "fitness/held_out", "mode": "max"},
        },
    ]
    run = fit_it(bases["gpt2"], folder / "mine.json", folder, f"--trainer.callbacks={json.dumps(callbacks)}")
    return Evolved(bases["gpt2"], folder / "mine.json", run)


def test_short_flags_set_the_sizes(evolved: Evolved) -> None:
    (file,) = (evolved.folder / "checkpoints").glob("*.ckpt")
    checkpoint = read_checkpoint(file)
    assert len(checkpoint["lora_gan"]["evolution"]["members"]) == 4
    assert len(evolved.held_out) == 4


def test_fitness_is_plotted(evolved: Evolved) -> None:
    assert (evolved.folder / "fitness.png").read_bytes().startswith(b"\x89PNG")
    assert [image.step for image in evolved.events.Images("evolution")] == [2, 4, 4]


def test_the_fittest_are_saved_as_adapters(evolved: Evolved) -> None:
    """The folders of the last generations are kept, plain PEFT loads them, and another run starts from them."""
    folders = evolved.folder / "checkpoints"
    assert {path.name for path in folders.glob("gen-*")} == {"gen-3", "gen-4"}
    first, second = (json.loads((folders / "gen-4" / n / "member.json").read_text()) for n in ("1", "2"))
    assert first["fitness"] >= second["fitness"] and first["id"] != second["id"]
    logits = []
    for rank in ("1", "2"):
        base = AutoModelForCausalLM.from_pretrained(evolved.base)
        logits.append(PeftModel.from_pretrained(base, str(folders / "gen-4" / rank))(input_ids=IDS).logits)
    assert not torch.allclose(*logits, atol=1e-5)

    members = [str(folders / "gen-4" / rank) for rank in ("1", "2")]
    start = {"class_path": "lora_gan.evolution.SavedAdapters", "init_args": {"folders": members}}
    again = evolved.folder.parent.parent / "again"
    run = fit_it(evolved.base, evolved.data, again, f"--model.init_args.start={json.dumps(start)}", "--gens=1")
    assert (run / "fitness.png").is_file()


def test_the_best_is_merged_into_its_base(evolved: Evolved, tmp_path: Path) -> None:
    (file,) = (evolved.folder / "checkpoints").glob("*.ckpt")
    main(["export", "--ckpt_path", str(file), "--merge", "true", "--output", str(tmp_path / "merged")])
    held_out = list(evolved.held_out.values())
    assert read_checkpoint(file)["global_step"] == 1 + held_out.index(max(held_out))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(evolved.base)
    adapted = PeftModel.from_pretrained(base, str(evolved.folder / "adapters" / "generator"))
    torch.testing.assert_close(merged(input_ids=IDS).logits, adapted(input_ids=IDS).logits, atol=1e-5, rtol=0)


EVOLVE, CONTROL = ROOT / "configs" / "evolve.yaml", ROOT / "configs" / "control"


@pytest.mark.parametrize("control", ["evolution_only", "random_search", "gradient_only", "supervised_only"])
def test_controls_use_the_same_compute(control: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As many completions and training prompts as evolve.yaml; supervised learning has no completions."""
    compute = compute_of([EVOLVE], capsys)
    found = compute_of([EVOLVE, CONTROL / f"{control}.yaml"], capsys)
    assert found.learned == compute.learned
    assert found.completions == compute.completions or control == "supervised_only"


@pytest.mark.parametrize("control", ["strategy_only", "strategy_gradients"])
def test_strategies_use_the_same_compute(control: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert compute_of([CONTROL / f"{control}.yaml"], capsys) == compute_of([EVOLVE], capsys)


def test_a_merge_uses_the_same_compute(capsys: pytest.CaptureFixture[str]) -> None:
    """Its adapters are trained by one run, and their coefficients are searched by another."""
    compute = compute_of([EVOLVE], capsys)
    branches = compute_of([EVOLVE, CONTROL / "branches.yaml"], capsys)
    merge = compute_of([CONTROL / "merge_branches.yaml"], capsys)
    assert branches.learned == compute.learned and merge == replace(compute, learned=0)


@dataclass(frozen=True)
class Compute:
    """What a run of evolution takes."""

    generations: int
    completions: int  # of a generation
    learned: int  # training prompts of the whole run


def compute_of(files: list[Path], capsys: pytest.CaptureFixture[str]) -> Compute:
    with pytest.raises(SystemExit):
        main(["fit", *(f"--config={file}" for file in files), "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    model, generations = config["model"]["init_args"], config["trainer"]["max_steps"]
    refined = (
        model.get("refined", int(model.get("refinement_steps", 0) > 0)) * config["data"]["init_args"]["batch_size"]
    )
    evaluated = model["population"] * model["evaluation_prompts"] * model["evaluation_num_generations"]
    start = (model["start"] or {"init_args": {"trunk": 0, "branch": 0, "prompts": 0}})["init_args"]
    branches = model["population"] if "refined" in model else 1
    supervised = (start["trunk"] + branches * start["branch"]) * start["prompts"]
    return Compute(generations, evaluated + refined * model["num_generations"], supervised + refined * generations)


def test_the_plot_continues_after_a_resume() -> None:
    plot = FitnessPlot()
    plot.load_state_dict({"history": [{"number": 1, "fitness": [0.5], "kinds": ["start"], "diversity": 0.0}]})
    other = FitnessPlot()
    other.load_state_dict(plot.state_dict())
    assert other.history == plot.history and other.history[0].mean == 0.5


def test_positions_keep_the_distances() -> None:
    """Members that differ in two directions lie in a plane, so distances of positions equal those of ΔW."""
    a = torch.eye(2, 4)
    corners = [(0.0, 0.0), (3.0, 0.0), (0.0, 4.0)]
    members = [Member({"one": Factors(a, torch.tensor([[x, y], [0.0, 0.0]]), 1.0)}) for x, y in corners]
    found = torch.cdist(positions(members), positions(members)) * 8**0.5  # 8 numbers in ΔW
    wanted = torch.cdist(torch.tensor(corners), torch.tensor(corners)).double()
    torch.testing.assert_close(found, wanted)
    assert positions(members[:1]).shape == (1, 2)


@pytest.mark.parametrize("callback", [FitnessPlot(), FittestMembers(every_n_generations=1)])
def test_callbacks_need_an_evolution_module(
    callback: FitnessPlot | FittestMembers, build: Build, batch: PromptBatch
) -> None:
    module = build()
    with pytest.raises(LoraGANError, match=f"{type(callback).__name__} needs a lora_gan.evolution.EvolutionModule"):
        fit(module, [batch], 1, callback)
    assert module.trained_steps == 0  # it is refused before the training


@pytest.mark.parametrize("changed", [{"every_n_generations": 0}, {"members": 0}, {"keep_last": -1}])
def test_invalid_settings(changed: dict[str, int]) -> None:
    with pytest.raises(LoraGANError, match="need every_n_generations >= 1"):
        FittestMembers(**changed)
