"""The command line as a user meets it: one whole experiment on a tiny model, and what mistakes look like."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_gan
from lora_gan.backbone import Backbone, LoraSettings
from lora_gan.cli import main
from lora_gan.cli.configuration import last_of_each_kind, with_extended
from lora_gan.errors import LoraGANError
from lora_gan.inference import load_saved

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
OVERLAYS = sorted((ROOT / "configs").glob("overlay/*.yaml")) + sorted((ROOT / "configs").glob("data/*.yaml"))
IDS = torch.tensor([[72, 101, 108, 108, 111]])


CONSTANT = {"class_path": "torch.optim.lr_scheduler.ConstantLR", "init_args": {"factor": 1.0}}


def share_of_a(response: str, target: str) -> float:
    """The reward of these runs, named by its import path."""
    return response.count("a") / max(len(response), 1)


def settings(base: str, data: Path, run: Path) -> list[str]:
    """configs/qa.yaml on a tiny base and a file of one's own, four steps."""
    reward = {"class_path": "lora_gan.rewards.FunctionReward", "init_args": {"function": f"{__name__}.share_of_a"}}
    return [
        f"--config={ROOT / 'configs' / 'qa.yaml'}",
        f"--config={ROOT / 'configs' / 'overlay' / 'few_steps.yaml'}",
        f"--model.init_args.base={base}",
        f"--model.init_args.rewards={json.dumps([reward])}",
        "--model.init_args.sampling.max_new_tokens=4",
        f"--model.init_args.generator.scheduler={json.dumps(CONSTANT)}",  # so that a run can be extended
        "--data.init_args.source=lora_gan.data.Alpaca",
        f"--data.init_args.path={data}",
        "--data.init_args.batch_size=3",
        "--trainer.accelerator=cpu",
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=2",
        f"--trainer.logger.init_args.save_dir={run}",
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "mine.json"
    rows = [{"instruction": f"Say number {n}.", "input": "", "output": f"It is {n}."} for n in range(40)]
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


@dataclass(frozen=True)
class Run:
    folder: Path  # of the logger's version
    printed: str
    settings: list[str]
    base: str

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last.ckpt"


@contextlib.contextmanager
def torch_state() -> Iterator[None]:
    """The command line seeds everything; the tests after it should not see that."""
    with torch.random.fork_rng():
        yield


@pytest.fixture(scope="module")
def run(bases: dict[str, str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One fit of four steps."""
    folder = tmp_path_factory.mktemp("run")
    given = settings(bases["gpt2"], data, folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), torch_state():
        main(["fit", *given])
    versions = list(folder.glob("qa/version_*"))
    assert len(versions) == 1, versions
    return Run(versions[0], printed.getvalue(), given, bases["gpt2"])


# fit


def test_fit_ends_with_the_table_and_what_to_do_next(run: Run) -> None:
    assert "Held-out test split, " in run.printed
    assert "| metric | base | trained | trained, sampled |" in run.printed
    for metric in ("reward", "exact_match", "rouge_l", "semantic", "distinct_2", "truncated"):
        assert f"| {metric} |" in run.printed
    closing = [line.split()[0] for line in run.printed.splitlines()[-8:]]
    assert closing == ["run", "report", "adapters", "best", "last", "resume", "chat", "export"]
    assert (run.folder / "held_out.md").read_text(encoding="utf-8").strip() in run.printed
    assert (run.folder / "config.yaml").exists()


def test_fit_writes_checkpoints_and_adapters(run: Run) -> None:
    names = {path.name for path in (run.folder / "checkpoints").iterdir()}
    assert names - {"best-2.ckpt", "best-4.ckpt"} == {"last.ckpt", "previous.ckpt"} and len(names) == 3
    saved = torch.load(run.last, weights_only=True)
    assert saved["global_step"] == 4
    assert not any("base_layer" in name for name in saved["state_dict"])
    (best,) = (run.folder / "checkpoints").glob("best-*.ckpt")
    trained = load_saved(str(best)).backbone
    for role in ("generator", "discriminator"):
        plain = AutoModelForCausalLM.from_pretrained(run.base)
        adapted = PeftModel.from_pretrained(plain, str(run.folder / "adapters" / role))
        with torch.no_grad(), trained._mode(role):
            wanted = trained.causal_lm(input_ids=IDS).logits
            torch.testing.assert_close(adapted(input_ids=IDS).logits, wanted, atol=1e-5, rtol=0)
    with trained.generator(), torch.no_grad():
        completion = trained.causal_lm(input_ids=IDS).logits
    with trained.reference():
        assert (completion - trained.causal_lm(input_ids=IDS).logits).abs().max() > 1e-4, "four steps changed something"


def test_tensorboard_counts_steps(run: Run) -> None:
    events = EventAccumulator(str(run.folder)).Reload()
    names = events.Tags()["scalars"]
    assert [event.step for event in events.Scalars("loss/generator")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("coefficient/baseline")] == [1, 2, 3, 4]
    assert {"reward/target", "loss/supervised", "text/exact_match", "text/rouge_l", "test/base/reward"} <= set(names)
    assert "test/trained/exact_match" in names
    assert {"samples/text_summary", "held_out/text_summary"} <= set(events.Tags()["tensors"])


def test_resume_continues(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    more = [f"--ckpt_path={run.last}", "--trainer.max_steps=6", "--test_after_fit=false"]
    with torch_state():
        main(["fit", *run.settings, *more, f"--trainer.logger.init_args.save_dir={tmp_path}"])
    (folder,) = tmp_path.glob("qa/version_*")
    steps = [event.step for event in EventAccumulator(str(folder)).Reload().Scalars("loss/generator")]
    assert steps == [5, 6]
    assert "Held-out" not in capsys.readouterr().out


def test_a_learning_rate_changed_on_resume_is_refused(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    changed = [f"--ckpt_path={run.last}", "--model.init_args.generator.optimizer.init_args.lr=0.007"]
    with torch_state(), pytest.raises(SystemExit) as stopped:
        main(["fit", *run.settings, *changed, "--trainer.max_steps=6"])
    assert stopped.value.code == 2
    assert "generator.optimizer.lr: 0.002 in the checkpoint, 0.007 now" in capsys.readouterr().err


# from a checkpoint


def test_validate_and_test(run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    there = [f"--ckpt_path={run.last}", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    with torch_state():
        main(["validate", *run.settings, *there])
        main(["test", *run.settings, *there])
    printed = capsys.readouterr().out
    assert "text/exact_match" in printed and "test/" not in printed, "Lightning's table only where there is no other"
    table = next(tmp_path.glob("qa/version_*/held_out.md")).read_text(encoding="utf-8")

    def deterministic(text: str) -> list[list[str]]:
        return [line.split("|")[1:4] for line in text.splitlines() if "|" in line][:8]

    after_fit = (run.folder / "held_out.md").read_text(encoding="utf-8")
    assert [row[:2] for row in deterministic(table)] == [row[:2] for row in deterministic(after_fit)], (
        "the base's column"
    )


def test_predict_writes_its_file_without_a_writer_in_the_configuration(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    more = [
        "--trainer.callbacks=null",
        f"--ckpt_path={run.last}",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    ]
    with torch_state(), caplog.at_level("INFO", "lora_gan"):
        main(["predict", *run.settings, *more])
    (path,) = tmp_path.glob("qa/version_*/predictions.jsonl")
    assert f"completions written to {os.path.relpath(path)}" in caplog.text
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert len(records) >= 4
    for record in records:
        assert set(record) == {"prompt", "completion", "target", "references", "negatives", "reward"}
        assert record["references"] == [record["target"]]
        assert record["prompt"].startswith("### Prompt:\nSay number ")
        assert record["reward"] == pytest.approx(share_of_a(record["completion"], ""))


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_the_untrained_are_not_called_trained(command: str, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a checkpoint the results were those of adapters at their start."""
    with torch_state(), pytest.raises(SystemExit) as stopped:
        main([command, *run.settings])
    assert stopped.value.code == 2
    assert f"{command} needs a checkpoint" in (said := capsys.readouterr().err) and "--ckpt_path last" in said


def test_an_adapter_is_tested_without_a_checkpoint(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    more = [
        f"--model.generator.adapter={run.folder}/adapters/generator",
        f"--trainer.logger.init_args.save_dir={tmp_path}",
    ]
    with torch_state():
        main(["test", *run.settings, *more])
    assert "| start |" in capsys.readouterr().out and "learned nothing" not in caplog.text


def test_a_prediction_looks_for_no_best(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It said that the best was not in its folder, and that it would be looked for."""
    more = [f"--ckpt_path={run.last}", f"--trainer.logger.init_args.save_dir={tmp_path}"]
    with torch_state(), caplog.at_level("INFO", "lora_gan"):
        main(["predict", *run.settings, *more])
    assert "completions written to" in caplog.text and "the best" not in caplog.text


def test_chat(run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Say number 3.\nSay number 3.\n\nnot asked\n"))
    main(["chat", f"--ckpt_path={run.last}", "--max_new_tokens=4"])
    printed = capsys.readouterr().out
    assert printed.count("(discriminator ") == 2
    backbone = load_saved(str(run.last)).backbone
    prompt = torch.tensor([backbone.tokenizer.encode("### Prompt:\nSay number 3.\n\n### Response:\n")])
    with backbone.generator(), torch.no_grad():
        ids = backbone.causal_lm.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=4
        )
    completion = backbone.tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True)
    assert printed.count(f"{completion}   (discriminator") == 2


def test_export_an_adapter_and_a_merged_model(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["export", f"--ckpt_path={run.last}", f"--output={tmp_path / 'adapter'}"])
    main(["export", f"--ckpt_path={run.last}", f"--output={tmp_path / 'merged'}", "--merge=true"])
    assert f"written to {tmp_path / 'merged'}" in capsys.readouterr().out
    trained = load_saved(str(run.last)).backbone
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.base), str(tmp_path / "adapter"))
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any("lora" in name for name in merged.state_dict())
    with torch.no_grad(), trained.generator():
        wanted = trained.causal_lm(input_ids=IDS).logits
        torch.testing.assert_close(adapted(input_ids=IDS).logits, wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(merged(input_ids=IDS).logits, wanted, atol=1e-5, rtol=0)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").encode("abc") == trained.tokenizer.encode("abc")
    Backbone(str(tmp_path / "merged"), LoraSettings(), LoraSettings())  # an exported model is a base again


# nothing is lost


def few(run: Run, steps: int, *more: str) -> list[str]:
    """A short fit like the run's, without its test."""
    return [
        *run.settings,
        f"--trainer.max_steps={steps}",
        "--trainer.limit_val_batches=0",
        "--test_after_fit=false",
        *more,
    ]


def test_a_run_without_a_logger_has_a_folder_of_its_own_and_leaves_the_users_config_alone(
    run: Run, work_in: Path
) -> None:
    Path("config.yaml").write_text("mine: 1 # a comment\n", encoding="utf-8")
    with torch_state():
        main(["fit", *few(run, 1, "--trainer.logger=false")])
    assert Path("config.yaml").read_text(encoding="utf-8") == "mine: 1 # a comment\n"
    assert {path.name for path in work_in.iterdir()} == {"config.yaml", "lightning_logs"}
    folder = work_in / "lightning_logs" / "version_0"
    assert {"config.yaml", "adapters", "checkpoints"} <= {path.name for path in folder.iterdir()}
    with torch_state():
        main(["fit", *few(run, 2, "--trainer.logger=false", "--ckpt_path=last")])
    assert [path.name for path in folder.parent.iterdir()] == ["version_0"], "a resumed run goes on in its folder"
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    saved = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    assert saved["ckpt_path"] is None, "so that the configuration starts a fresh run"


def test_a_run_in_the_folder_of_another_is_refused(run: Run, work_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work_in / "qa" / "mine").mkdir(parents=True)
    (work_in / "qa" / "mine" / "config.yaml").write_text("mine: 1\n", encoding="utf-8")
    there = [f"--trainer.logger.init_args.save_dir={work_in}", "--trainer.logger.init_args.version=mine"]
    with torch_state(), pytest.raises(SystemExit) as stopped:
        main(["fit", *few(run, 1, *there)])
    assert stopped.value.code == 2
    assert "config.yaml is there already, and this run would replace it" in capsys.readouterr().err
    assert (work_in / "qa" / "mine" / "config.yaml").read_text(encoding="utf-8") == "mine: 1\n"


def test_a_trial_step_leaves_the_real_checkpoint_alone(run: Run, work_in: Path) -> None:
    Path("checkpoints").mkdir()
    Path("checkpoints/last.ckpt").write_text("real", encoding="utf-8")
    with torch_state():
        main(["fit", *few(run, 4, "--trainer.fast_dev_run=true")])
    assert [str(path.relative_to(work_in)) for path in sorted(work_in.rglob("*"))] == [
        "checkpoints",
        "checkpoints/last.ckpt",
    ]
    assert Path("checkpoints/last.ckpt").read_text(encoding="utf-8") == "real"


# mistakes


def test_a_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(
    run: Run, work_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("file").touch()
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *run.settings, "--model.base=no/such-model", "--trainer.logger.init_args.save_dir=file/runs"])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert (
        "error: cannot write the run to file/runs/qa: Not a directory; set trainer.logger.init_args.save_dir" in printed
    )
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("command", "given", "message"),
    [
        ("fit", "--trainer.gradient_clip_val=1.0", "set optimization.max_grad_norm"),
        ("fit", "--trainer.accumulate_grad_batches=2", "optimization.micro_batch_size"),
        ("fit", "--trainer.strategy=nonsense", "nonsense"),
        ("fit", "--trainer.strategy=deepspeed", "DeepSpeed"),
        ("fit", "--trainer.devices=0", "devices"),
        ("fit", "--trainer.accelerator=tpu", "torch_xla"),
        ("test", "--ckpt_path=best", "give the file's path"),
    ],
)
def test_what_lightning_refuses_is_one_error(
    command: str, given: str, message: str, run: Run, work_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch_state(), pytest.raises(SystemExit) as stopped:
        main([command, *few(run, 1, f"--trainer.logger.init_args.save_dir={work_in}", given)])
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stopped.value.code == 2
    assert message in error


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("--seed_everything=-1", "--seed_everything must be from 0 to 4294967295, got -1"),
        ("--model.init_args.coefficients.policy=.nan", "model.coefficients.policy must be a number, got nan"),
        ("--model.init_args.generator.optimizer.init_args.lr=-1", "generator.optimizer cannot be made: Invalid learn"),
        ("--model.init_args.generator.lora.alpha=0", "lora.alpha must be at least 1, got 0"),
        ("--trainer.val_check_interval=0", "trainer.val_check_interval must be more than 0, got 0"),
        ("--model.init_args.num_generations=0", "num_generations must be at least 1, got 0"),
        ("--model.init_args.sampling.temperature=0", "for greedy decoding set do_sample: false"),
        ("--model.init_args.generator.lora.rank=0", "rank must be at least 1"),
        ("--model.init_args.base=no/such-model", "no/such-model"),
        ("--model.init_args.backbone.dtype=float31", "float31"),
        ("--data.init_args.path=missing.json", "missing.json"),
        ("--model.init_args.no_such_key=1", "no_such_key"),
        ("--trainer.no_such_key=1", "no_such_key"),
    ],
)
def test_mistakes_end_in_one_message(
    mistake: str, message: str, bases: dict[str, str], data: Path, work_in: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped, torch_state():
        main(["fit", *settings(bases["gpt2"], data, work_in), mistake])
    printed = capsys.readouterr().err
    assert stopped.value.code == 2
    assert message in printed
    assert "Traceback" not in printed
    assert len(printed.splitlines()) < 25, printed


@pytest.mark.parametrize("command", ["chat", "export"])
def test_a_missing_checkpoint(command: str, work_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--ckpt_path=nowhere.ckpt"])
    assert stopped.value.code == 2
    first, error = capsys.readouterr().err.splitlines()
    assert first == f"lora-gan {lora_gan.__version__}: loading …"
    assert error == "error: no checkpoint at nowhere.ckpt; fit prints the checkpoint paths when it ends"


def test_an_unknown_key_in_a_file_from_the_shell(work_in: Path) -> None:
    """As a program of its own: exit status 2, the key, no traceback."""
    Path("mine.yaml").write_text("model:\n  init_args:\n    temprature: 0.5\n", encoding="utf-8")
    command = [sys.executable, "-m", "src.cli", "fit", "--config=configs/qa.yaml", f"--config={work_in / 'mine.yaml'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, check=False)
    assert done.returncode == 2
    assert "temprature" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("config", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_config_parses(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", f"--config={config}", "--print_config"])
    assert stopped.value.code == 0
    assert "class_path:" in capsys.readouterr().out


@pytest.mark.parametrize("overlay", OVERLAYS, ids=[path.stem for path in OVERLAYS])
def test_every_overlay_parses_over_the_default(overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", f"--config={ROOT / 'configs' / 'qa.yaml'}", f"--config={overlay}", "--print_config"])
    assert stopped.value.code == 0
    assert "lora_gan.module.LoraGANModule" in capsys.readouterr().out


def printed_config(capsys: pytest.CaptureFixture[str], *files: Path) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stopped:
        main(["fit", *(f"--config={file}" for file in files), "--print_config"])
    assert stopped.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_what_files_extend_is_read_once_and_first(tmp_path: Path) -> None:
    """So a file that extends base.yaml does not undo the files before it."""
    configs = ROOT / "configs"
    mine, ppo, sft = tmp_path / "mine.yaml", configs / "ppo.yaml", configs / "sft.yaml"
    mine.write_text("trainer: {max_steps: 77}\n", encoding="utf-8")
    given = ["fit", f"--config={mine}", "--config", str(ppo), "--seed_everything=1", f"--config={sft}"]
    base, mine_, ppo_, sft_ = (f"--config={file}" for file in (configs / "base.yaml", mine, ppo, sft))
    assert with_extended(given) == ["fit", base, mine_, ppo_, "--seed_everything=1", sft_]


def test_an_own_base_extends_the_one_of_the_project(tmp_path: Path) -> None:
    own = tmp_path / "base.yaml"
    own.write_text("extends: base.yaml\n", encoding="utf-8")
    assert with_extended([f"--config={own}"]) == [f"--config={ROOT / 'configs' / 'base.yaml'}", f"--config={own}"]


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        ("other.yaml", "one.yaml", "which is the file itself or one"),
        ("[base.yaml]", "", "must be the name of one file"),
    ],
)
def test_files_that_extend_in_a_circle(one: str, other: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "one.yaml").write_text(f"extends: {one}\n", encoding="utf-8")
    (tmp_path / "other.yaml").write_text(f"extends: ../{tmp_path.name}/{other}\n", encoding="utf-8")
    with pytest.raises(LoraGANError, match=message):
        with_extended([f"--config={tmp_path / 'one.yaml'}"])


def test_callbacks_of_the_user_are_not_dropped_silently(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    best = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {filename: %s}}"
    for name in ("mine", "other"):
        content = f"trainer: {{callbacks: [{best % name}]}}\n"
        (tmp_path / f"{name}.yaml").write_text(content, encoding="utf-8")
    with caplog.at_level("WARNING", logger="lora_gan"):
        with_extended([f"--config={tmp_path / 'mine.yaml'}", f"--config={tmp_path / 'other.yaml'}"])
    assert "other.yaml replaces the callbacks before it and removes ModelCheckpoint (mine)" in caplog.text


def test_a_file_anywhere_extends_the_base(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text(
        "extends: base.yaml\ntrainer: {max_steps: 3, logger: {init_args: {name: mine}}}\n", encoding="utf-8"
    )
    config = printed_config(capsys, mine)
    assert config["trainer"]["max_steps"] == 3 and config["trainer"]["max_epochs"] == -1
    assert config["trainer"]["logger"]["init_args"]["name"] == "mine"
    assert config["trainer"]["logger"]["init_args"]["save_dir"] == "lightning_logs"
    mine.write_text("extends: base.yaml\n", encoding="utf-8")
    (tmp_path / "base.yaml").write_text("seed_everything: 7\n", encoding="utf-8")
    config = printed_config(capsys, mine)
    assert config["seed_everything"] == 7 and config["trainer"]["max_epochs"] is None, "the one beside the file"


def test_an_extended_file_that_is_missing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: nothing.yaml\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stopped:
        main(["fit", f"--config={tmp_path / 'mine.yaml'}"])
    assert stopped.value.code == 2
    assert "extends nothing.yaml, and there is no such file" in capsys.readouterr().err


def test_replaced_callbacks_are_logged(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    gan, ppo = ROOT / "configs" / "qa.yaml", ROOT / "configs" / "ppo.yaml"
    mine = tmp_path / "mine.yaml"
    mine.write_text("trainer: {callbacks+: [lora_gan.callbacks.Throughput]}\n", encoding="utf-8")
    other = tmp_path / "other.yaml"
    other.write_text("trainer: {callbacks: [{class_path: lora_gan.callbacks.TextMetrics}]}\n", encoding="utf-8")
    with caplog.at_level("WARNING", "lora_gan"):
        printed_config(capsys, gan, mine, ROOT / "configs" / "overlay" / "few_steps.yaml")
        assert not caplog.messages, "nothing is replaced"
        printed_config(capsys, ppo, mine, other)
    (message,) = caplog.messages
    assert f"{other} replaces the callbacks before it" in message
    for name in ("StepProgressBar", "BestCheckpoint", "Curriculum", "AdaptiveKL", "Throughput"):
        assert name in message
    assert "TextMetrics" not in message


def test_a_later_callback_takes_the_place_of_one_of_its_kind() -> None:
    def callback(name: str, **init_args: Any) -> Namespace:
        return Namespace(class_path=f"some.{name}", init_args=Namespace(**init_args))

    best = callback("ModelCheckpoint", dirpath=None, filename="best", monitor="a")
    newer = callback("BestCheckpoint", dirpath=None, filename="best", monitor="b")
    other = callback("ModelCheckpoint", dirpath=None, filename="each", monitor="a")
    last, later = callback("LastCheckpoint", every_n_steps=100), callback("LastCheckpoint", every_n_steps=2)
    schedule = callback("KLSchedule", coefficient="kl"), callback("KLSchedule", coefficient="kl_penalty")
    assert last_of_each_kind([best, last, *schedule, other, newer, later]) == [newer, later, *schedule, other]


QUICK = [
    (["--help"], "export      write a trained generator"),
    ([], "usage: "),
    (["--version"], f"lora-gan {lora_gan.__version__}"),
    (["fit", "--help"], "--model.num_generations"),
    (["fit", "--help", "model"], "--model.generator.lora.rank  (int; default 16)"),
    (["fit", "--help", "trainer"], "--trainer.max_steps  (int; default -1)"),
    (["fit", "--help", "lora_gan.rewards.SemanticReward"], "model  (str; default 'all-MiniLM-L6-v2')"),
    (["fit", "--help", "nothing"], "no help on nothing; --help takes model, data, trainer, or a class"),
    (["data", "--help"], "--data.max_validation"),
    (["chat", "--help"], " chat [--config CONFIG]"),
    (["help", "fit"], " fit --config FILE"),
    (["help", "chat"], " chat [--config CONFIG]"),
    (["help", "fit", "data"], "--data.max_validation"),
    (["schema", "--help"], " schema > schema.json"),
    (["schema", "--foo"], "got --foo; usage: "),
    (["completion", "bash", "more"], "got bash more; usage: "),
    (["chat"], "ckpt_path"),
    (["fti"], "no command fti; "),
    (["fti"], "did you mean fit?"),
    (["fit"], "fit needs a configuration: "),
    (["fit", "--config="], "--config needs a file"),
    (["fit", "--config=missing.yaml"], "cannot read the configuration missing.yaml: No such file or directory; "),
    (["fit", "--config", "empty.yaml"], "the configuration empty.yaml is empty"),
    (["fit", "--config", "tab.yaml"], "the configuration tab.yaml is not valid YAML: "),
    (
        ["fit", "--config", "typo.yaml"],
        "typo.yaml: lightning.pytorch.Trainer has no setting 'max_stepz'; did you mean max_steps?",
    ),
    (["fit", "--model.learning_rate", "1e-4"], "it is model.generator.optimizer.init_args.lr"),
    (["fit", "--model.temperature=1"], "did you mean model.sampling.temperature?"),
    (
        ["fit", "--data.source=lora_gan.data.OwnFile", "--data.source.targt=a"],
        "OwnFile has no setting 'targt'; did you mean target?",
    ),
    (["fit", "--model=lora_gan.LoraGANModule", "--epochs=2"], "no option --epochs; it is trainer.max_epochs here"),
    (["schema"], '"title": "Configuration of lora-gan"'),
]


def test_help_and_mistakes_of_usage_need_none_of_the_slow_imports(work_in: Path) -> None:
    """All of them in one program, which must not have imported torch in the end."""
    Path("empty.yaml").write_text("# nothing\n", encoding="utf-8")
    Path("tab.yaml").write_text("model:\n\tbase: gpt2\n", encoding="utf-8")
    Path("typo.yaml").write_text("trainer: {max_stepz: 3}\n", encoding="utf-8")
    program = f"""
import contextlib, io, json, sys
from lora_gan.cli import main
answers = []
for arguments in {[arguments for arguments, _ in QUICK]!r}:
    printed, end = io.StringIO(), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main(arguments)
        except SystemExit as stopped:
            end = stopped.code
    answers.append((printed.getvalue(), end))
print(json.dumps([answers, sorted({{"torch", "lightning", "transformers", "peft"}} & set(sys.modules))]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    answers, slow = json.loads(done.stdout)
    assert slow == []
    for (arguments, wanted), (printed, status) in zip(QUICK, answers, strict=True):
        assert wanted in printed, arguments
        assert "Traceback" not in printed
        asked = not arguments or (
            {"help", "--help", "--version", "schema"} & set(arguments) and not {"nothing", "--foo"} & set(arguments)
        )
        assert status == (0 if asked else 2), arguments
        assert asked or printed.count("error: ") == 1, printed


@pytest.mark.parametrize("started", [["-m", "src.cli"], ["-m", "lora_gan"]])
def test_the_program_names_itself_as_it_was_started(started: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *started, "chat", "--help"], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.startswith(f"usage: python {' '.join(started)} chat ")


def test_the_default_optimizer_can_be_saved(capsys: pytest.CaptureFixture[str]) -> None:
    """A run whose configuration names no optimizer can be resumed from the configuration that it saves."""
    with pytest.raises(SystemExit):
        main(["fit", "--model=lora_gan.LoraGANModule", "--data=lora_gan.InstructionDataModule", "--print_config"])
    printed = capsys.readouterr().out
    assert printed.count("optimizer: lora_gan.optimization.adamw") == 2
    assert "Unable to serialize" not in printed


def test_a_reader_that_has_seen_enough_ends_the_command_quietly() -> None:
    """As in ``data … | head``."""
    with subprocess.Popen(
        [sys.executable, "-m", "src.cli", "schema"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as started:
        assert started.stdout is not None and started.stderr is not None
        started.stdout.close()
        said = started.stderr.read().decode()
    assert started.returncode == 128 + 13
    assert "Traceback" not in said and "BrokenPipe" not in said
