"""The end of a run as a user meets it: adapters, the best checkpoint and why, the held-out test, the closing lines."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_gan.callbacks.best_checkpoint import REWARD
from lora_gan.cli import main
from lora_gan.results import read_results
from tests.system.test_cli import CONFIGS, ROOT, settings, torch_state

GAN, SFT = (next(path for path in CONFIGS if path.stem == name) for name in ("qa", "sft"))
ROWS = [
    {
        "instruction": f"Describe {n}.",
        "output": f"{n} is a number that comes after {n - 1} and, as you know, before {n + 1}.",
    }
    for n in range(40)
]


@dataclass(frozen=True)
class Run:
    folder: Path
    printed: str

    @property
    def checkpoints(self) -> set[str]:
        return {path.name for path in (self.folder / "checkpoints").iterdir()}

    @property
    def closing(self) -> dict[str, str]:
        """The closing lines by their first word."""
        lines = self.printed[self.printed.rindex("\nrun   ") :].splitlines()
        return {line.split()[0]: line.partition(" ")[2].strip() for line in lines if line.strip()}

    def scalars(self, tag: str) -> dict[int, float]:
        events = EventAccumulator(str(self.folder)).Reload()
        return {event.step: event.value for event in events.Scalars(tag)}  # type: ignore[no-untyped-call]


def fit(base: str, folder: Path, rows: int, *more: str, config: Path = SFT, steps: int = 4) -> Run:
    """A validation after every second step."""
    folder.mkdir(exist_ok=True)
    (folder / "rows.json").write_text(json.dumps(ROWS[:rows]), encoding="utf-8")
    given = settings(base, folder / "rows.json", folder)[2:]
    given = [f"--config={config}", *given, f"--trainer.max_steps={steps}", "--trainer.log_every_n_steps=1", *more]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch_state():
        main(["fit", *given])
    name = yaml.safe_load(config.read_text())["trainer"]["logger"]["init_args"]["name"]
    return Run(sorted(folder.glob(f"{name}/version_*"))[-1], printed.getvalue())


@pytest.fixture(scope="module")
def sft(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Supervised learning on free text."""
    return fit(bases["gpt2"], tmp_path_factory.mktemp("sft"), 40)


def test_free_text_is_judged_by_the_held_out_loss(sft: Run) -> None:
    """N1: the best was the first validation, and nothing said which step it was, or by what."""
    losses = sft.scalars("validation/loss")
    assert list(losses) == [0, 2, 4] and losses[4] < losses[2] < losses[0]
    best = sft.folder / "checkpoints" / "best-4.ckpt"
    assert sft.closing["best"].startswith(
        f"step 4, by validation/loss {losses[4]:.3f}, before training {losses[0]:.3f}: "
    )
    assert sft.closing["best"].endswith("best-4.ckpt") and best.is_file()
    assert sft.closing["last"].startswith("step 4: ") and sft.closing["chat"].endswith("best-4.ckpt")
    weights = torch.load(best, weights_only=True)["state_dict"]
    adapter = load_file(sft.folder / "adapters" / "generator" / "adapter_model.safetensors")
    saved = {name.split("base_model.")[-1]: tensor for name, tensor in adapter.items()}
    there = {name.split("base_model.")[-1].replace(".generator.", "."): tensor for name, tensor in weights.items()}
    assert saved and all(torch.equal(tensor, there[name]) for name, tensor in saved.items())


def test_all_records_of_a_run_count_steps_alike(sft: Run) -> None:
    """N7: training began at 0, validations lay one step before their samples, and nothing showed the start."""
    assert list(sft.scalars("loss/generator")) == [1, 2, 3, 4]
    assert list(sft.scalars("text/rouge_l")) == [0, 2, 4] == list(sft.scalars("validation/perplexity"))
    assert list(sft.scalars("test/trained/loss")) == [4] == list(sft.scalars("test/base/rouge_l"))
    events = EventAccumulator(str(sft.folder)).Reload()
    assert [text.step for text in events.Tensors("samples/text_summary")] == [0, 2, 4]
    assert [text.step for text in events.Tensors("held_out/text_summary")] == [4]
    tags = events.Tags()["scalars"]
    assert {"generator/learning_rate", "generator/grad_norm"} == {
        tag for tag in tags if "/learning_" in tag or "norm" in tag
    }
    coefficients = {tag: sft.scalars(tag) for tag in tags if tag.startswith("coefficient/")}
    assert coefficients == {"coefficient/supervised": {1: 1.0}}, "the only one that counts, and it does not change"


def test_the_report_shows_the_run(sft: Run) -> None:
    assert sft.closing["report"].endswith("version_0/report.html")
    text = (sft.folder / "report.html").read_text(encoding="utf-8")
    assert "4 of 4" in text and "step 4, by validation/loss" in text and text.count("<svg") >= 3
    (result,) = read_results(sft.folder)
    assert result.counted == {"exact_match": result.prompts} and f"{result.prompts} prompts" in text and " ± " in text
    assert "<td>model.coefficients.policy</td><td>0</td>" in text


def test_the_settings_are_hyperparameters(sft: Run) -> None:
    """N7: hparams.yaml was {}."""
    found = yaml.safe_load((sft.folder / "hparams.yaml").read_text())
    assert found["seed_everything"] == 0 and found["max_steps"] == 4 and found["model"] == "LoraGANModule"
    assert found["model.generator.optimizer"] == "AdamW" and found["model.generator.optimizer.lr"] == 0.002
    assert found["model.coefficients.policy"] == 0 and not any(name.startswith("trainer") for name in found)
    assert "model.sampling.temperature" not in found and "model.coefficients.supervised" not in found, "the defaults"
    assert sft.scalars("best/validation/loss") == {4: pytest.approx(sft.scalars("validation/loss")[4])}


def test_the_results_name_the_weights_that_were_tested(sft: Run, bases: dict[str, str]) -> None:
    """N11: a table without a word of whose results they are; ``test`` of another checkpoint adds its own."""
    (result,) = read_results(sft.folder)
    assert (result.checkpoint, result.step) == ("best-4.ckpt", 4) and result.prompts > 0 and "rows.json" in result.data
    assert result.metrics["trained"]["loss"] == pytest.approx(sft.scalars("test/trained/loss")[4])
    assert result.metrics["trained"]["loss"] < result.metrics["base"]["loss"]
    assert result.table in sft.printed
    with torch_state():
        other = torch.load(sft.folder / "checkpoints" / "last.ckpt", weights_only=True)
        torch.save(other | {"global_step": 3}, sft.folder / "checkpoints" / "third.ckpt")
        main(["test", f"--config={sft.folder / 'config.yaml'}", f"--ckpt_path={sft.folder}/checkpoints/third.ckpt"])
    assert [(one.checkpoint, one.step) for one in read_results(sft.folder)] == [("best-4.ckpt", 4), ("third.ckpt", 3)]
    assert read_results(sft.folder, step=3)[0].metrics["base"] == result.metrics["base"]


def test_a_discriminator_that_never_learned_is_not_handed_over(sft: Run) -> None:
    """N10: 20 MB of random numbers."""
    assert [path.name for path in (sft.folder / "adapters").iterdir()] == ["generator"]
    assert "discriminator" not in sft.closing["adapters"]


def test_the_reward_judges_a_policy_that_learns_from_it(bases: dict[str, str], tmp_path: Path) -> None:
    few = f"--config={ROOT / 'configs' / 'overlay' / 'few_steps.yaml'}"
    run = fit(bases["gpt2"], tmp_path, 40, few, "--trainer.max_steps=2", "--trainer.val_check_interval=2", config=GAN)
    assert run.closing["best"].startswith(f"step 2, by {REWARD} ")
    assert {path.name for path in (run.folder / "adapters").iterdir()} == {"generator", "discriminator"}
    shares, totals = run.scalars("reward/adversarial"), run.scalars("reward/total")
    assert set(shares) == set(totals) == {1, 2}
    for step, total in totals.items():
        assert shares[step] == pytest.approx(total - run.scalars("reward/share_of_a")[step], abs=1e-5)


def test_a_run_without_validation_says_how_to_go_on(bases: dict[str, str], tmp_path: Path) -> None:
    """C15: no line about checkpoint, resume, chat, export."""
    run = fit(
        bases["gpt2"],
        tmp_path,
        20,
        "--trainer.limit_val_batches=0",
        "--test_after_fit=false",
        "--report_after_fit=false",
        steps=1,
    )
    assert not (run.folder / "report.html").exists()
    assert list(run.closing) == ["run", "adapters", "last", "resume", "chat", "export"]
    assert run.closing["chat"].endswith("last.ckpt") and run.checkpoints == {"last.ckpt"}


def test_a_small_file_without_test_rows_loses_nothing(bases: dict[str, str], tmp_path: Path) -> None:
    """N2, B3: the whole training ran, then an error, no adapters and no closing lines."""
    run = fit(bases["gpt2"], tmp_path, 1, steps=2)  # a validation would be due, of no prompts
    assert (run.folder / "adapters" / "generator" / "adapter_model.safetensors").is_file()
    assert torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    assert {"run", "adapters", "last", "resume", "chat", "export"} <= set(run.closing)
    assert read_results(run.folder) == []


def test_the_command_that_resumes_a_run_whose_rate_fell_to_0_is_accepted(bases: dict[str, str], tmp_path: Path) -> None:
    schedule = "--model.init_args.generator.scheduler=lora_gan.optimization.WarmupCosine"
    run = fit(bases["gpt2"], tmp_path, 40, schedule, "--test_after_fit=false", steps=2)
    _, _, more = run.closing["resume"].partition(" <steps> ")
    assert more == "--model.generator.scheduler.init_args.floor 0.1"
    last = f"--ckpt_path={run.folder / 'checkpoints' / 'last.ckpt'}"
    longer = fit(bases["gpt2"], tmp_path, 40, schedule, last, *more.split(), "--test_after_fit=false", steps=4)
    assert longer.folder == run.folder and longer.closing["last"].startswith("step 4: ")
    assert longer.closing["resume"].endswith("<steps>")


def test_a_refused_resume_leaves_the_configuration_of_the_run(
    sft: Run, bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "sft" / "version_0"
    shutil.copytree(sft.folder, folder)
    before = (folder / "config.yaml").read_text(encoding="utf-8")
    last = f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
    with pytest.raises(SystemExit):
        fit(bases["gpt2"], tmp_path, 30, last, "--model.init_args.generator.lora.rank=3", steps=8)
    assert "does not fit this configuration" in capsys.readouterr().err
    assert (folder / "config.yaml").read_text(encoding="utf-8") == before


def test_adapters_are_written_before_a_test_that_fails(
    bases: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metric: list[dict[str, Any]] = [{"class_path": "lora_gan.callbacks.TextMetrics"}]
    metric[0]["init_args"] = {"metrics": [f"{__name__}.fails_in_the_test"], "before_training": False}
    with pytest.raises(SystemExit):
        fit(
            bases["gpt2"], tmp_path, 40, f"--trainer.callbacks+={json.dumps(metric)}", "--data.validation=0", steps=1
        )  # fmt: skip
    assert "must return a finite number" in capsys.readouterr().err
    (folder,) = tmp_path.glob("sft/version_*")
    assert (folder / "adapters" / "generator" / "adapter_model.safetensors").is_file()


def fails_in_the_test(completions: list[str], targets: list[str]) -> float:
    return float("nan")


def test_a_moved_run_is_resumed_where_it_is(sft: Run, bases: dict[str, str], tmp_path: Path) -> None:
    """B4: after the training, an error that there is no checkpoint in the old folder, or the old folder's best."""
    folder = tmp_path / "moved" / "sft" / "version_0"
    shutil.copytree(sft.folder, folder)
    last = f"--ckpt_path={folder / 'checkpoints' / 'last.ckpt'}"
    run = fit(bases["gpt2"], tmp_path / "moved", 40, last, "--trainer.limit_val_batches=0", steps=5)
    assert run.folder == folder and "no checkpoint" not in run.printed
    assert run.closing["best"].startswith("step 4, by validation/loss ")
    assert run.closing["best"].endswith("moved/sft/version_0/checkpoints/best-4.ckpt")
    assert run.closing["last"].startswith("step 5: ")


def test_the_documented_resume_of_a_finished_run_tests_it_and_ends_well(sft: Run, tmp_path: Path) -> None:
    """The training was over, and then the configuration of the run itself was said to be in the way."""
    folder = tmp_path / "sft" / "version_0"
    shutil.copytree(sft.folder, folder)
    (folder / "results.json").unlink()
    before = (folder / "config.yaml").read_text(encoding="utf-8")
    last, here = folder / "checkpoints" / "last.ckpt", f"--trainer.logger.init_args.save_dir={tmp_path}"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch_state():
        main(["fit", f"--config={folder / 'config.yaml'}", f"--ckpt_path={last}", here])
    assert read_results(folder)[0].step == 4 and read_results(folder)[0].table in printed.getvalue()
    assert Run(folder, printed.getvalue()).closing["last"].startswith("step 4: ")
    assert (folder / "config.yaml").read_text(encoding="utf-8") == before


class Terminates(L.Callback):
    """Sends SIGTERM in the first batch of a test."""

    def on_test_batch_start(self, *_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_sigterm_in_the_final_test_says_how_to_run_it(
    bases: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It ended with status 0, without a table and without a word; its resume was refused."""
    with pytest.raises(SystemExit) as stopped:
        fit(bases["gpt2"], tmp_path, 40, f"--trainer.callbacks+={__name__}.Terminates", steps=1)
    assert stopped.value.code == 128 + signal.SIGTERM
    _, _, command = caplog.text.partition("the test was stopped and has no results; the run is complete. Test it: ")
    arguments = shlex.split(command.splitlines()[0])
    (folder,) = tmp_path.glob("sft/version_*")
    with torch_state():
        main([*arguments[arguments.index("test") :], "--trainer.callbacks=null"])
    assert len(read_results(folder)) == 0  # without TextMetrics there is no table
    with pytest.raises(SystemExit) as again, torch_state():
        main(arguments[arguments.index("test") :])
    assert again.value.code == 128 + signal.SIGTERM and caplog.text.rstrip().endswith("SIGTERM: stopped")
