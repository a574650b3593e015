"""The examples run as they stand there."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples import functions, ratings
from examples.minimal_step import K, MinimalGAN, main, reward
from lora_gan.data.world import facts
from lora_gan.sandbox import Program, Sandbox


def weights(gan: MinimalGAN) -> dict[str, Tensor]:
    named = {**gan.model.state_dict(), **{f"head.{name}": p for name, p in gan.score_head.named_parameters()}}
    return {name: tensor.detach().clone() for name, tensor in named.items()}


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_the_minimal_step_gives_finite_numbers() -> None:
    history = main(steps=3)
    assert len(history) == 3
    assert all(math.isfinite(value) for metrics in history for value in metrics.values())
    assert set(history[0]) == {"reward", "discriminator_loss", "generator_loss"}


def test_the_file_of_functions_is_what_the_script_writes() -> None:
    """The code in it passes its tests, and that of no other function does."""
    rows = list(functions.rows())
    lines = Path(functions.__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    assert list(map(json.loads, lines)) == rows
    known = [row for row in rows if row["completion"]]
    assert len({row["prompt"] for row in rows}) == len(rows) == 288 and 50 < len(known) < 60
    programs = [Program(row["completion"], (*row["tests"], *known[i - 1]["tests"])) for i, row in enumerate(known)]
    does = [row["completion"].partition("return ")[2][1:] for row in known]
    outcomes = Sandbox().run(programs)
    wanted = [(True,) * 3 + (what == does[i - 1],) * 3 for i, what in enumerate(does)]
    assert [outcome.passed for outcome in outcomes] == wanted


def test_the_file_of_ratings_is_what_the_script_writes() -> None:
    """Their raters prefer right answers, then names; each question is about another fact."""
    rows = list(ratings.rows())
    lines = Path(ratings.__file__).with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
    assert list(map(json.loads, lines)) == rows
    answers = {question: fact.references for fact in facts() for question in fact.questions}
    assert len({row["prompt"] for row in rows}) == ratings.FACTS
    for row in rows:
        right = answers[row["prompt"]]
        if "label" in row:
            assert row["label"] == (row["completion"] in right)
        else:
            assert row["chosen"] in right and (row["rejected"] == right[0] or row["rejected"] not in right)


def test_only_the_right_name_is_what_the_raters_like() -> None:
    said = ["Tirana.", "tirana", "It is Tirana.", "The capital of Albania is Tirana.", "Rana.", ".", ""]
    targets = ["The capital of Albania is Tirana."] * len(said)
    assert ratings.only_named(said, targets) == pytest.approx(2 / 7)
    assert ratings.only_named(["The pound."], ["The pound."]) == 1 and ratings.only_named([], []) == 0


def test_each_update_moves_its_own_parameters_only() -> None:
    torch.manual_seed(0)
    gan = MinimalGAN()
    prompt = gan.tokenizer(
        "### Prompt:\nWhat is the capital of France?\n\n### Response:\n", return_tensors="pt"
    ).input_ids
    ids, start = gan.sample(prompt), prompt.shape[1]
    mask = torch.ones(K, ids.shape[1] - start, dtype=torch.bool)
    last = torch.full((K,), ids.shape[1] - 1)

    one = weights(gan)
    gan.update_discriminator(ids, last, torch.linspace(0, 1, K), ids[:1])
    two = weights(gan)
    gan.update_generator(ids, mask, torch.linspace(-1, 1, K), ids[:1], start)
    three = weights(gan)

    discriminator, generator = changed(one, two), changed(two, three)
    assert {"head.weight", "head.bias"} < discriminator
    assert all(".discriminator." in name for name in discriminator - {"head.weight", "head.bias"})
    assert generator and all(".generator." in name for name in generator)
    # B starts at 0, so A has no gradient in the first update: every B moves, in every layer
    for role, moved in (("generator", generator), ("discriminator", discriminator)):
        assert {name for name in one if f"lora_B.{role}." in name} <= moved


def test_a_step_trains_both_adapters_and_not_the_base() -> None:
    torch.manual_seed(0)
    gan = MinimalGAN()
    before = weights(gan)
    gan.step("What is the capital of France?", "The capital of France is Paris.")
    moved = changed(before, weights(gan))
    assert any(".generator." in name for name in moved) and any(".discriminator." in name for name in moved)
    base = {name for name in before if "lora_" not in name and not name.startswith("head.")}
    assert base and not base & moved


def test_its_reward_is_the_overlap_of_words() -> None:
    assert reward("The capital is Paris.", "The capital is Paris.") == 1
    assert reward("Paris", "The capital is Paris.") == 0
    assert reward("", "a") == 0
    assert reward("a b", "b c") == 0.5


@pytest.mark.slow
def test_the_notebook_runs(work_in: Path, capsys: pytest.CaptureFixture[str]) -> None:
    notebook = json.loads((Path(__file__).parents[2] / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert (work_in / "exported" / "model.safetensors").is_file()
    before, after = capsys.readouterr().out.splitlines()[-1].removeprefix("reward ").split(" -> ")
    assert float(after) > float(before), "the reward is learned"
