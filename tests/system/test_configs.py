"""Every experiment runs: its own parts and callbacks, on a tiny model, its phases pressed into the first steps."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lora_gan.cli import main
from tests.helpers.chat_server import serving, shown

CONFIGS = Path(__file__).parents[2] / "configs"
EXPERIMENTS = [
    "qa",
    "reinforce",
    "ppo",
    "twin",
    "lora_gan",
    "rlgaf",
    "gad",
    "raro",
    "self_play",
    "online",
    "chat_gan",
]
VARIANTS = {
    "textgail": "reinforce",
    "own_discriminator": "reinforce",
    "ordinal": "twin",
    "critic": "reinforce",
    "beams": "reinforce",
}
STEPS = 5
ADVERSARIAL = [("gan", None), ("digits", "control/work_discriminator")]  # among those on the real base of digits


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "mine.jsonl"
    lines = [{"instruction": f"Say {n} twice.", "input": "", "output": f"{n} and {n}."} for n in range(60)]
    path.write_text("\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    return path


def pressed(experiment: str, base: str, rows: Path, folder: Path) -> dict[str, Any]:
    """The experiment with its phases in steps 0, 1, 2, …"""
    config: dict[str, Any] = yaml.safe_load((CONFIGS / f"{experiment}.yaml").read_text(encoding="utf-8"))
    model = config.setdefault("model", {}).setdefault("init_args", {})
    model |= {"base": base, "sampling": {"max_new_tokens": 4}, "num_generations": 2}
    data = config.setdefault("data", {}).setdefault("init_args", {})
    data |= {"source": {"class_path": "lora_gan.data.Alpaca"}, "path": str(rows), "batch_size": 3}
    if experiment == "online":
        data |= {"validation_rows": 4, "stop_after_seconds": 0.0}
    trainer = config["trainer"]
    for callback in trainer.get("callbacks", trainer.get("callbacks+", [])):
        settings = callback.get("init_args", {})
        for number, phase in enumerate(settings.get("phases", [])):
            phase["start"] = number
        settings |= {"start": 0} if callback["class_path"].endswith(("Snapshot", "EasyFirst", "KLSchedule")) else {}
    trainer |= {"max_steps": STEPS, "val_check_interval": 4, "log_every_n_steps": 1, "accelerator": "cpu"}
    trainer["logger"]["init_args"]["save_dir"] = str(folder)
    return config


def fit(config: dict[str, Any], folder: Path, *overlays: Path) -> dict[str, list[float]]:
    """Fit, and what was logged."""
    path = folder / "pressed.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    main(["fit", f"--config={path}", *(f"--config={overlay}" for overlay in overlays)])
    (run,) = folder.glob("*/version_0")
    assert (run / "adapters" / "generator" / "adapter_model.safetensors").is_file()
    return logged_by(run)


def logged_by(run: Path) -> dict[str, list[float]]:
    events = EventAccumulator(str(run)).Reload()  # type: ignore[no-untyped-call]
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}  # type: ignore[no-untyped-call]


def check(logged: dict[str, list[float]]) -> None:
    """Both roles learned, and every value is finite."""
    bad = [name for name, values in logged.items() if not all(map(math.isfinite, values))]
    assert not bad
    assert {
        "loss/policy",
        "loss/discriminator",
        "discriminator/accuracy",
        "discriminator/length_accuracy",
        "policy/kl",
    } <= set(logged)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_runs_all_its_phases(
    experiment: str, bases: dict[str, str], rows: Path, tmp_path: Path
) -> None:
    check(fit(pressed(experiment, bases["gpt2"], rows, tmp_path), tmp_path))


@pytest.mark.parametrize("experiment", ["sft", "chat_sft"])
def test_supervised_learning_alone_samples_nothing(
    experiment: str, bases: dict[str, str], rows: Path, tmp_path: Path
) -> None:
    logged = fit(pressed(experiment, bases["gpt2"], rows, tmp_path), tmp_path)
    assert len(logged["loss/supervised"]) == STEPS
    assert "completions/mean_length" not in logged and "loss/discriminator" not in logged


def test_distillation_follows_its_teacher(bases: dict[str, str], rows: Path, tmp_path: Path) -> None:
    config = pressed("distill", bases["gpt2"], rows, tmp_path)
    config["model"]["init_args"]["kl_reference"]["init_args"]["base"] = bases["gpt2"]
    logged = fit(config, tmp_path)
    assert all(map(math.isfinite, logged["policy/kl"])) and any(logged["loss/policy"])


@pytest.mark.parametrize(
    ("experiment", "difference"),
    [
        *(("digits", f"control/{name}") for name in ("answers_only", "worked_only", "self_training")),
        *(("digits", name) for name in (None, "verifree", "control/work_discriminator")),
        *(
            pytest.param("digits", f"overlay/{name}", marks=pytest.mark.slow)
            for name in ("dr_grpo", "gspo", "dapo", "continuous_batching")
        ),
        *(("gan", f"control/{name}") for name in ("answered_only", "agreement", "majority", "worked_only")),
        ("gan", None),
    ],
)
def test_final_answers_on_the_real_base(experiment: str, difference: str | None, tmp_path: Path) -> None:
    """The final answer is the reward from the second phase on; controls that only imitate sample nothing."""
    files = [CONFIGS / f"{name}.yaml" for name in (experiment, difference) if name]
    config, *overlays = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in files)
    for part in (config, *overlays):
        for callback in part.get("trainer", {}).get("callbacks+", []):
            for phase in callback["init_args"]["phases"][1:]:
                phase["start"] = 2
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    limits = {"max_steps": 4, "val_check_interval": 4, "limit_val_batches": 1, "limit_test_batches": 1}
    small = {"model": {"init_args": {"best_of": 1, "num_generations": 4}}, "data": {"init_args": {"batch_size": 6}}}
    overlays.append({"trainer": limits | {"log_every_n_steps": 1}, "test_after_fit": False, **small})
    paths = [tmp_path / f"overlay_{number}.yaml" for number, _ in enumerate(overlays)]
    for path, overlay in zip(paths, overlays, strict=True):
        path.write_text(yaml.safe_dump(overlay), encoding="utf-8")
    logged = fit(config, tmp_path, *paths)
    imitates = difference in ("control/answers_only", "control/worked_only")
    reward = "reward/likelihood" if difference == "verifree" else "reward/answer"
    assert (reward in logged) != imitates and len(logged["text/answer"]) == 2
    assert ("loss/discriminator" in logged) == ((experiment, difference) in ADVERSARIAL)
    if (experiment, difference) == ("gan", None):
        assert logged["coefficient/policy"] == logged["coefficient/adversarial"] == [0.0, 1.0]
        assert logged["coefficient/supervised"] == [1.0, 1.0, 0.0], "first, before the change, and changed"
    assert ("reward/consistency" in logged) == (difference in ("control/agreement", "control/majority"))
    assert all(map(math.isfinite, [value for values in logged.values() for value in values]))


@pytest.mark.parametrize("control", [None, "code_only"])
def test_code_is_tested_on_the_real_base(control: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)  # where the rows are
    config = yaml.safe_load((CONFIGS / "code.yaml").read_text(encoding="utf-8"))
    config["trainer"]["callbacks+"][-1]["init_args"]["phases"][1]["start"] = 1
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    config["data"]["init_args"]["batch_size"] = 4
    limits = {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 1, "limit_test_batches": 1}
    last = tmp_path / "last.yaml"
    last.write_text(
        yaml.safe_dump({"trainer": limits | {"log_every_n_steps": 1}, "test_after_fit": False}), encoding="utf-8"
    )
    logged = fit(config, tmp_path, *([CONFIGS / "control" / f"{control}.yaml"] if control else []), last)
    assert ("reward/code" in logged) == (control is None) and len(logged["text/reward"]) == 2
    assert all(map(math.isfinite, [value for values in logged.values() for value in values]))


@pytest.mark.parametrize("control", [None, "facts_agreement", "facts_majority", "facts_discriminator"])
def test_few_facts_are_known(control: str | None, bases: dict[str, str], rows: Path, tmp_path: Path) -> None:
    config = pressed("few_facts", bases["gpt2"], rows, tmp_path)
    config["data"]["init_args"]["answered"] = 0.3
    overlays = []
    if control:
        overlay = yaml.safe_load((CONFIGS / "control" / f"{control}.yaml").read_text(encoding="utf-8"))
        for callback in overlay.get("trainer", {}).get("callbacks+", []):
            callback["init_args"]["phases"][1]["start"] = 1
        overlays = [tmp_path / "overlay.yaml"]
        overlays[0].write_text(yaml.safe_dump(overlay), encoding="utf-8")
    logged = fit(config, tmp_path, *overlays)
    assert all(map(math.isfinite, [value for values in logged.values() for value in values]))
    assert len(logged["loss/policy"]) == len(logged["reward/answer"]) == STEPS - 1
    assert ("reward/consistency" in logged) != ("loss/discriminator" in logged) == (control == "facts_discriminator")


def test_a_judge_is_asked(bases: dict[str, str], rows: Path, tmp_path: Path) -> None:
    """The configuration asks a server; here a scripted one, which rates as many letters as not."""
    pytest.importorskip("openai")
    config = pressed("judge", bases["gpt2"], rows, tmp_path)
    with serving(lambda text: str(int(shown(text)["completion"][:1].isalpha()))) as server:
        config["model"]["init_args"]["rewards"][0]["init_args"] |= {"base_url": server.url, "model": "judge"}
        logged = fit(config, tmp_path)
    assert all(map(math.isfinite, [value for values in logged.values() for value in values]))
    assert len(logged["reward/judge"]) == STEPS - 1, "from the second phase on"
    assert logged["judge/requests"][-1] > logged["judge/requests"][0] > 0 == logged["judge/failed"][-1]


def test_a_discriminator_of_preferences_is_the_reward_of_another_run(bases: dict[str, str], tmp_path: Path) -> None:
    """It learns alone, nothing is sampled; afterwards it judges and does not learn."""
    rows = tmp_path / "preferences.jsonl"
    lines = [{"prompt": f"Say {n}.", "chosen": f"{n}", "rejected": f"not {n}"} for n in range(60)]
    rows.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    config = pressed("pretrain_discriminator", bases["gpt2"], rows, tmp_path)
    config["data"]["init_args"]["source"] = None
    first = fit(config, tmp_path)
    assert len(first["loss/discriminator"]) == STEPS and len(first["preference/accuracy"]) == 2
    assert not {"completions/mean_length", "loss/generator", "text/reward"} & set(first)
    events = EventAccumulator(str(tmp_path / "pretrain_discriminator" / "version_0")).Reload()  # type: ignore[no-untyped-call]
    assert [event.step for event in events.Scalars("preference/accuracy")] == [0, 4]  # type: ignore[no-untyped-call]
    (tmp_path / "second").mkdir()
    config = pressed("reward_model", bases["gpt2"], rows, tmp_path / "second")
    config["data"]["init_args"]["source"] = None
    adapter = tmp_path / "pretrain_discriminator" / "version_0" / "adapters" / "discriminator"
    config["model"]["init_args"]["discriminator"]["adapter"] = str(adapter)
    second = fit(config, tmp_path / "second")
    assert "coefficient/discriminator_updates" not in second, "0 in all steps"
    assert len(second["reward/adversarial"]) == STEPS - 1 and any(second["reward/adversarial"])
    saved = (tmp_path / "second").glob("*/version_0/adapters/discriminator/adapter_model.safetensors")
    assert next(saved).read_bytes() == (adapter / "adapter_model.safetensors").read_bytes()


def test_ratings_become_the_reward(bases: dict[str, str], tmp_path: Path) -> None:
    """The generator and the discriminator learn from choices and ratings; then the score is the only reward."""
    rows = tmp_path / "ratings.jsonl"
    lines: list[dict[str, Any]] = [
        {"prompt": f"Say {n}.", "completion": f"I say {n}.", "label": True} for n in range(30)
    ]
    lines += [{"prompt": f"Say {n}.", "completion": "No.", "label": False} for n in range(20, 40)]
    lines += [{"prompt": f"Write {n}.", "chosen": f"{n}.", "rejected": f"I write {n}."} for n in range(30)]
    rows.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    config = pressed("feedback", bases["gpt2"], rows, tmp_path)
    config["data"]["init_args"]["source"] = None
    logged = fit(config, tmp_path)
    assert len(logged["loss/supervised"]) == len(logged["discriminator/learning_rate"]) == 1, "in the first phase"
    assert len(logged["text/only_named"]) == len(logged["preference/accuracy"]) == 2
    assert len(logged["preference/length_accuracy"]) == 2
    assert len(logged["reward/adversarial"]) == STEPS - 1 and any(logged["reward/adversarial"])
    assert logged["coefficient/discriminator_updates"] == [1.0, 0.0]
    assert all(map(math.isfinite, [value for values in logged.values() for value in values]))


def test_evolution_runs_generations(bases: dict[str, str], rows: Path, tmp_path: Path) -> None:
    config = pressed("evolve", bases["gpt2"], rows, tmp_path)
    settings = config["model"]["init_args"]
    settings["start"]["init_args"] |= {"trunk": 2, "branch": 1}
    logged = fit(config, tmp_path)
    assert len(logged["fitness/best"]) == STEPS and len(logged["loss/policy"]) == STEPS
    assert all(map(math.isfinite, [*logged["fitness/held_out"], *logged["population/diversity"]]))
    (report,) = tmp_path.glob("evolve/version_0/report.html")
    text = report.read_text(encoding="utf-8")
    assert {"Fitness of the population", "Diversity and survival of members"} <= set(re.findall("[A-Z][a-z ]+", text))


@pytest.mark.parametrize("arm", ["es", "es_genetic", "es_reinforce"])
def test_metrics_of_a_set_are_learned_from(arm: str, bases: dict[str, str], rows: Path, tmp_path: Path) -> None:
    """By the evolution strategy and by its controls."""
    config = pressed("control/es_reinforce" if arm == "es_reinforce" else "es", bases["gpt2"], rows, tmp_path)
    config["extends"] = str(CONFIGS / "base.yaml")
    if arm == "es_reinforce":
        logged = fit(config, tmp_path)
        assert len(logged["loss/policy"]) == STEPS - 1, "from the second phase on"
    else:
        config["model"]["init_args"]["start"]["init_args"] |= {"trunk": 2}
        config["model"]["init_args"]["population"] = 4
        overlay = tmp_path / "overlay.yaml"
        genetic = yaml.safe_load((CONFIGS / "control" / "es_genetic.yaml").read_text(encoding="utf-8"))
        genetic["model"]["init_args"]["population"] = 4
        overlay.write_text(yaml.safe_dump(genetic), encoding="utf-8")
        logged = fit(config, tmp_path, *([overlay] if arm == "es_genetic" else []))
        assert len(logged["fitness/best"]) == STEPS and all(map(math.isfinite, logged["fitness/held_out"]))
        assert ("es/sigma" in logged) == (arm == "es")


def test_adapters_of_other_runs_are_merged(bases: dict[str, str], rows: Path, tmp_path: Path) -> None:
    """Two supervised runs; the test has a column for each adapter and for each other merge."""
    adapters = []
    for seed in range(2):
        sft = pressed("sft", bases["gpt2"], rows, tmp_path / str(seed)) | {"seed_everything": seed}
        (tmp_path / str(seed)).mkdir()
        fit(sft, tmp_path / str(seed))
        adapters += map(str, tmp_path.glob(f"{seed}/sft/version_0/adapters/generator"))
    config = pressed("merge", bases["gpt2"], rows, tmp_path)
    config["model"]["init_args"] |= {"adapters": adapters, "population": 4}
    path = tmp_path / "merge.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    main(["fit", f"--config={path}"])
    run = tmp_path / "merge" / "version_0"
    logged = logged_by(run)
    assert len(logged["fitness/best"]) == len(logged["merge/coefficient_2"]) == STEPS
    (result,) = json.loads((run / "results.json").read_text(encoding="utf-8"))
    ways = ["adapter_1", "adapter_2", "merge_average", "merge_sum", "merge_TIES", "merge_DARE"]
    assert list(result["metrics"]) == ["base", "trained", "sampled", *ways]


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_runs(variant: str, bases: dict[str, str], rows: Path, tmp_path: Path) -> None:
    config = pressed(VARIANTS[variant], bases["gpt2"], rows, tmp_path)
    check(fit(config, tmp_path, CONFIGS / "overlay" / f"{variant}.yaml"))


@pytest.mark.parametrize("ampere", [False, True], ids=["float32", "bfloat16"])
def test_the_saved_configuration_of_a_run_resumes_it(
    ampere: bool, bases: dict[str, str], rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the number formats that were chosen for it; the CPU is as good as a GPU in one case."""
    monkeypatch.setattr("lora_gan.number_formats.computes_in_bfloat16", lambda device: ampere)
    fit(pressed("reinforce", bases["gpt2"], rows, tmp_path), tmp_path)
    (run,) = tmp_path.glob("reinforce/version_0")
    saved = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    assert saved["extends"] is None, "it is complete"
    formats = ("bf16-mixed", "bfloat16") if ampere else ("32-true", "float32")
    assert (saved["trainer"]["precision"], saved["model"]["init_args"]["backbone"]["dtype"]) == formats
    last = run / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["lora_gan"]["dtype"] == formats[1]
    monkeypatch.undo()
    main(["fit", f"--config={run / 'config.yaml'}", f"--ckpt_path={last}", f"--trainer.max_steps={STEPS + 2}"])
    assert len(logged_by(run)["loss/generator"]) == STEPS + 2
    assert yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")) == saved | {
        "trainer": saved["trainer"] | {"max_steps": STEPS + 2},
    }


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_experiments_hold_what_they_are(path: Path) -> None:
    """What they share is in base.yaml, and qa.yaml explains every key."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.split("#")[0].strip()]
    assert len(lines) <= 35 or path.stem in ("base", "qa", "gan")


def test_every_experiment_and_variant_is_tried_here() -> None:
    found = {path.stem for path in CONFIGS.glob("*.yaml")}
    assert found == {
        *EXPERIMENTS,
        "base",
        "code",
        "digits",
        "few_facts",
        "gan",
        "distill",
        "es",
        "evolve",
        "merge",
        "sft",
        "chat_sft",
        "feedback",
        "judge",  # below, and with a real model in the tests of JudgeReward
        "gpt2_alpaca",
        "pretrain",
        "pretrain_digits",
        "pretrain_discriminator",
        "reward_model",
        "verifree",
    }
    assert {*VARIANTS, "quick", "gpt2", "few_steps", "multi_gpu", "dr_grpo", "gspo", "dapo", "continuous_batching"} == {
        path.stem for path in (CONFIGS / "overlay").glob("*.yaml")
    }
