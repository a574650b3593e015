"""Best of n: the choice by hand, in a test's table, and in generate and chat."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lora_gan.best_of import agreement, choose, without_answers
from lora_gan.callbacks import TextMetrics
from lora_gan.cli import main
from lora_gan.discriminator import (
    AdapterDiscriminator,
    CompletionAndTarget,
    DiscriminatorModel,
    HiddenStatesDiscriminator,
    LikelihoodDiscriminator,
)
from lora_gan.discriminator.restored import score
from lora_gan.errors import LoraGANError
from lora_gan.final_answer import AfterMarker
from lora_gan.inference import chat, generate, load_saved
from lora_gan.module import LoraGANModule
from lora_gan.rewards import FunctionReward
from lora_gan.sampling import Sampling, sample
from lora_gan.types import PromptBatch
from tests.conftest import randomise
from tests.helpers.steps import Build, fit, share_of_a, trainer

CONFIGS = Path(__file__).parents[2] / "configs"
LETTERS = "lora_gan.rewards.FunctionReward"


def test_agreement_by_hand() -> None:
    """Two prompts, four completions each: 7, 7., 8 and none; then one answer only."""
    texts = ["a #### 7", "#### 7.", "#### 8", "7", "#### x", "#### x", "#### X", "#### x "]
    found = agreement(texts, 4, AfterMarker())
    torch.testing.assert_close(found, torch.tensor([1, 1, 0, 0, 3, 3, 3, 3]) / 3)
    assert agreement(["a"], 1, None).tolist() == [0], "with no other one, none agrees"


def test_the_highest_score_wins_and_among_equals_the_most_likely() -> None:
    scores = torch.tensor([0.0, 2.0, 2.0, 1.0, 1.0, 1.0])
    logprobs = torch.tensor([-1.0, -9.0, -8.0, -3.0, -2.0, -4.0])
    assert choose(scores, logprobs, 3) == [2, 4]
    assert choose(scores, logprobs, 2) == [1, 2, 4]
    assert choose(scores, logprobs, 1) == list(range(6))


def test_nothing_is_known_about_a_prompt_alone(batch: PromptBatch) -> None:
    alone = without_answers(batch)
    assert not any(e.target or e.references or e.answers or e.tests or e.negatives for e in alone.examples)
    assert [e.prompt for e in alone.examples] == [e.prompt for e in batch.examples]


# in a test's table


@pytest.fixture
def module(build: Build) -> LoraGANModule:
    made = build(best_of=4, rewards=[FunctionReward(share_of_a, needs_target=False)])
    randomise(made.backbone)
    return made


@torch.no_grad()
def test_a_test_has_a_column_for_each_way_of_choosing(module: LoraGANModule, batch: PromptBatch) -> None:
    """The chosen ones are those of the samples that the numbers say, drawn as the module samples."""
    torch.manual_seed(3)
    found = module.test_step(batch, 0)
    assert list(found) == [
        *("base", "trained", "sampled"),
        *("best_agreement", "best_logprob", "best_reward", "best_discriminator"),
    ]
    torch.manual_seed(3)
    module.best_of = 1
    alone = module.test_step(batch, 0)
    assert list(alone) == ["base", "trained", "sampled"] and alone["sampled"].texts == found["sampled"].texts
    with module.backbone.generator():
        rollout = sample(module.backbone, batch.prompt_ids, 4, module.sampling)
    likely = rollout.logprobs.sum(-1)
    ended = rollout.ended(len(batch), module.backbone.tokenizer.eos_token_id)
    wanted = {
        "agreement": agreement(rollout.texts, 4, None),
        "logprob": likely,
        "reward": torch.tensor([share_of_a(text, "") for text in rollout.texts]),
        "discriminator": score(module.discriminator.model, module.backbone, batch.prompt_ids, ended),
    }
    preferred = module.preferences(batch, rollout)
    chosen = module.best(batch, rollout, torch.zeros(len(batch)))
    for way, values in wanted.items():
        torch.testing.assert_close(preferred[way], values, atol=1e-5, rtol=1e-5)
        assert list(chosen[f"best_{way}"].texts) == [rollout.texts[row] for row in choose(values, likely, 4)]


@pytest.mark.parametrize(
    ("settings", "ways"),
    [
        ({"model": AdapterDiscriminator(CompletionAndTarget())}, {"agreement", "logprob", "reward"}),
        ({"model": HiddenStatesDiscriminator(8, 1, 1)}, {"agreement", "logprob", "reward", "discriminator"}),
        ({"rewards": []}, {"agreement", "logprob", "discriminator"}),
    ],
)
@torch.no_grad()
def test_ways_that_do_not_apply_are_left_out(
    settings: dict[str, Any], ways: set[str], build: Build, batch: PromptBatch
) -> None:
    module = build(best_of=2, **{"rewards": [FunctionReward(share_of_a, needs_target=False)]} | settings)
    with module.backbone.generator():
        rollout = sample(module.backbone, batch.prompt_ids, 2, module.sampling)
    new = ways - {"discriminator"} if isinstance(module.discriminator.model, AdapterDiscriminator) else ways
    assert set(module.preferences(batch, rollout)) == new, "an adapter that has never learned scores nothing"
    randomise(module.backbone)
    assert set(module.preferences(batch, rollout)) == ways


def test_the_table_is_printed_and_saved(build: Build, batch: PromptBatch, tmp_path: Path) -> None:
    module = build(best_of=3)
    runner = trainer(1, TextMetrics(), default_root_dir=str(tmp_path))
    loader = torch.utils.data.DataLoader([batch], batch_size=None)
    runner.test(module, loader, verbose=False)
    assert "| metric | base | trained | trained, sampled | best by agreement | best by logprob |" in (
        next(tmp_path.rglob("held_out.md")).read_text(encoding="utf-8")
    )


@pytest.mark.parametrize("given", [["--best_of=3"], ["--best_of", "3"]])
def test_a_training_command_has_a_short_name(given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["test", f"--config={CONFIGS / 'qa.yaml'}", *given, "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["best_of"] == 3


# in generate and chat

Make = Callable[..., str]


@pytest.fixture
def run(build: Build, batch: PromptBatch, tmp_path: Path) -> Make:
    """A checkpoint in a run's folder."""

    def make(rewards: Any = None, trained: bool = True, **settings: Any) -> str:
        module = build(**settings)
        if trained:
            randomise(module.backbone)
        path = tmp_path / "run" / "checkpoints" / "last.ckpt"
        fit(module, [batch], 1)[1].save_checkpoint(path)
        config = {"model": {"init_args": {"rewards": rewards}}, "data": {}}
        (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        return str(path)

    return make


def longest(response: str, target: str) -> float:
    """A reward of one's own."""
    return float(len(response))


OWN = [{"class_path": LETTERS, "init_args": {"function": f"{__name__}.longest", "needs_target": False}}]


@pytest.mark.parametrize("way", ["agreement", "logprob", "discriminator", "reward"])
def test_generate_and_chat_take_the_best_one(
    way: str, run: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run(OWN)
    saved = load_saved(path)
    prompt = torch.tensor(saved.backbone.tokenizer.encode("hi"))
    torch.manual_seed(0)
    with saved.backbone.generator():
        rollout = sample(saved.backbone, [prompt], 6, Sampling(max_new_tokens=5))
    likely = rollout.logprobs.sum(-1)
    values = {
        "agreement": agreement(rollout.texts, 6, None),
        "logprob": likely,
        "discriminator": saved.score([prompt], [rollout.completion_ids]),
        "reward": torch.tensor([longest(text, "") for text in rollout.texts]),
    }
    wanted = rollout.texts[choose(values[way], likely, 6)[0]]
    assert len(set(rollout.texts)) > 1
    (tmp_path / "in.txt").write_text("hi\n", encoding="utf-8")
    how: dict[str, Any] = {"template": "{prompt}", "max_new_tokens": 5, "temperature": 1.0}
    how |= {"best_of": 6, "best_by": way}
    generate(path, str(tmp_path / "in.txt"), str(tmp_path / "out.jsonl"), **how)
    assert json.loads((tmp_path / "out.jsonl").read_text(encoding="utf-8"))["completion"] == wanted
    monkeypatch.setattr("sys.stdin", io.StringIO("/temperature 0\nhi\n"))
    monkeypatch.setattr("lora_gan.inference.load_saved", lambda *_: saved)  # loading draws random numbers
    capsys.readouterr()
    torch.manual_seed(0)
    chat(path, **how)
    printed = capsys.readouterr().out
    assert f"{wanted}   (discriminator" in printed
    assert "at temperature 0 all of the 6 completions would be the same" in printed


@pytest.mark.parametrize(
    ("given", "rewards", "message"),
    [
        (["--best_of=2"], None, "best_of 2 needs different completions, and at temperature 0, .* set a temperature"),
        (["--best_of=0"], None, "best_of must be at least 1, got 0"),
        (["--best_by=luck"], None, "best_by must be agreement, logprob, discriminator or reward, got 'luck'"),
        (
            ["--best_of=2", "--temperature=1", "--best_by=reward"],
            [{"class_path": "lora_gan.rewards.AnswerReward"}],
            r"the rewards of this run \(answer\) need a target, and a prompt here has none",
        ),
        (["--best_of=2", "--temperature=1", "--best_by=reward"], [], "this run has no reward; choose agreement or"),
        (
            ["--best_of=2", "--temperature=1", "--best_by=reward"],
            [{"class_path": "no_such.Reward"}],
            "the rewards of this run cannot be built: .*start from the folder that holds them",
        ),
        (
            ["--best_of=2", "--temperature=1", "--best_by=discriminator"],
            None,
            "has never been trained; choose agreement or logprob or reward with --best_by",
        ),
    ],
)
def test_mistakes(
    given: list[str], rewards: Any, message: str, run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run(rewards, trained=False, policy=0.0, discriminator_updates=0)
    (tmp_path / "in.txt").write_text("hi\n", encoding="utf-8")
    with pytest.raises(SystemExit):
        main(["generate", f"--ckpt_path={path}", f"--input={tmp_path / 'in.txt'}", "--max_new_tokens=5", *given])
    assert re.search(message, capsys.readouterr().err, re.DOTALL)


def test_a_module_samples_at_least_one(build: Build) -> None:
    with pytest.raises(LoraGANError, match="best_of must be at least 1, got 0"):
        build(best_of=0)


# the discriminator outside of training

MODELS = "lora_gan.discriminator."


@pytest.mark.parametrize(
    ("model", "chosen"),
    [
        (LikelihoodDiscriminator(0.3), {"class_path": f"{MODELS}LikelihoodDiscriminator", "init_args": {"beta": 0.3}}),
        (
            HiddenStatesDiscriminator(8, 1, 1),
            {
                "class_path": f"{MODELS}HiddenStatesDiscriminator",
                "init_args": {"width": 8, "layers": 1, "heads": 1},
            },
        ),
    ],
)
def test_any_discriminator_that_reads_no_target_scores_as_in_training(
    model: DiscriminatorModel, chosen: dict[str, Any], build: Build, batch: PromptBatch, tmp_path: Path
) -> None:
    module = build(model=model)
    randomise(module.backbone)
    module.backbone.take_snapshot()
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    fit(module, [batch], 1)[1].save_checkpoint(path)
    config = {"model": {"init_args": {"discriminator": {"model": chosen}}}, "data": {}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    saved = load_saved(str(path))
    with module.backbone.generator():
        rollout = sample(module.backbone, batch.prompt_ids, 2, module.sampling)
    wanted = module.discriminator.judge(module.backbone, batch, rollout, [range(len(batch))])
    found = saved.score(batch.prompt_ids, rollout.by_prompt(len(batch)))
    assert wanted.std() > 0
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    (tmp_path / "run" / "config.yaml").unlink()
    reason = f"{type(model).__name__} that reads .*config.yaml is missing or another run's"
    with pytest.raises(LoraGANError, match=reason):
        load_saved(str(path)).score(batch.prompt_ids, rollout.by_prompt(len(batch)))


def test_a_likelihood_that_equals_its_reference_has_not_learned(build: Build) -> None:
    model = LikelihoodDiscriminator()
    backbone = build(model=model).backbone
    assert not model.has_learned(backbone)
    randomise(backbone)
    assert model.has_learned(backbone), "the base is the reference"
    backbone.copy_adapter("generator", "discriminator")
    backbone.take_snapshot()
    assert not model.has_learned(backbone)
    randomise(backbone)
    assert model.has_learned(backbone)
