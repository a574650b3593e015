"""Code reward, by hand, and a run that learns from tests alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from lora_gan import sandbox
from lora_gan.errors import LoraGANError
from lora_gan.final_answer import AfterMarker, FinalAnswer, Parts
from lora_gan.rewards import CodeReward, weighted_sum
from lora_gan.rewards.code import code_in
from lora_gan.types import Example, PromptBatch, RewardContext
from tests.helpers.steps import Build, fit, moved

ADD = Example("Q", "", tests=("assert add(1, 2) == 3", "assert add(0, 0) == 0", "assert add(2, 2) == 4"))
RIGHT, MINUS, ZERO = (f"def add(a, b): return {value}" for value in ("a + b", "a - b", "0"))


def batch_of(*examples: Example) -> PromptBatch:
    ids = tuple(torch.tensor([65, 66]) for _ in examples)
    end = tuple(torch.tensor([256]) for _ in examples)
    return PromptBatch(examples, ids, end, tuple(() for _ in examples))


def context(count: int, k: int, final_answer: FinalAnswer | None = None) -> RewardContext:
    return RewardContext(k, torch.zeros(count, 1), torch.ones(count, 1, dtype=torch.bool), final_answer)


def scores(reward: CodeReward, said: Sequence[str], final_answer: FinalAnswer | None = None) -> list[float]:
    return reward(said, batch_of(ADD), context(len(said), len(said), final_answer)).tolist()


def test_where_the_code_stands() -> None:
    block = "Here:\n```python\na = 1\n```\nand\n  ```Py title\n  b = 2\n  ```\nDone.\n```\nno code\n```"
    assert code_in(block, None) == "  b = 2"
    assert code_in("```python\na = 1\nb = 2", AfterMarker()) == "a = 1\nb = 2", "cut off"
    assert code_in("I add. #### def add(): pass", AfterMarker()) == "def add(): pass"
    assert code_in("x = '```python'", None) == "x = '```python'"
    assert code_in("def add(): pass\n", None) == "def add(): pass"
    assert code_in("no marker", AfterMarker()) == code_in(" \n", None) == code_in("```python\n```", None) == ""


def test_code_reward_by_hand() -> None:
    said = [RIGHT, MINUS, ZERO, f"So:\n```python\n{RIGHT}\n```", "def add(a, b) return", "Add them.", "", RIGHT]
    assert scores(CodeReward(), said) == pytest.approx([1, 1 / 3, 1 / 3, 1, 0, 0, 0, 1])
    assert scores(CodeReward(partial=False), said) == [1, 0, 0, 1, 0, 0, 0, 1]
    assert scores(CodeReward(), [f"I add. #### {RIGHT}", RIGHT], AfterMarker()) == [1, 0]


def test_only_prompts_with_tests_count() -> None:
    batch = batch_of(Example("Q", "def add(): pass"), ADD, Example("Q", "", answers=("3",)))
    found = weighted_sum([CodeReward(2.0)], [RIGHT, MINUS] * 3, batch, context(6, 2))
    assert found.applies["code"].tolist() == [False] * 2 + [True] * 2 + [False] * 2
    assert found.total.tolist() == pytest.approx([0, 0, 2, 2 / 3, 0, 0])


def test_a_test_that_cannot_be_run_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    reward, example = CodeReward(), Example("Q", "", tests=("assert run(len, []) == 0", "assert run(abs, 1)"))
    for _ in range(2):
        found = reward(["def run(f, x): return f(x)"], batch_of(example), context(1, 1))
        assert found.tolist() == [0]
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ["reward code"] * 2
    assert "no completion can pass the test 'assert run(len, []) == 0': it gives the code a" in caplog.text


def test_what_the_kernel_does_not_keep_is_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Here the sandbox runs as it would on a machine that permits no namespaces, such as many containers."""
    copy = tmp_path / "child.py"
    copy.write_text(sandbox.CHILD.read_text().replace("network = leave_network()", "network = False"))
    monkeypatch.setattr(sandbox, "CHILD", copy)
    assert scores(CodeReward(), [RIGHT]) == [1]
    assert "reward code: the kernel does not keep completions from network here; a hook" in caplog.text


@pytest.mark.parametrize("setting", [{"timeout": 0.0}, {"timeout": math.inf}, {"memory": 0}, {"workers": 0}])
def test_limits_out_of_range_are_refused(setting: dict[str, float]) -> None:
    with pytest.raises(LoraGANError, match="timeout must be above 0, memory and workers at least 1; got"):
        CodeReward(**setting)  # type: ignore[arg-type]


def test_a_run_learns_from_tests_of_prompts_without_targets(build: Build) -> None:
    """The program names the first character, of which some are letters in the samples of a random model."""
    batch = batch_of(Example("AB", "", tests=("assert value.islower()", "assert value > 'm'")), Example("AB", ""))
    settings = {"final_answer": _FirstCharacter(), "num_generations": 8, "supervised": 0.0}
    module = build(rewards=[CodeReward()], **settings)
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    recorder, _ = fit(module, [batch], 3)
    assert all(math.isfinite(value) for report in recorder.reports for value in report.values())
    first = recorder.outputs[0]
    assert first.scores is not None
    shares = [(text[:1].islower() + (text[:1] > "m")) / 2 for text in first.rollout.texts[:8]]
    assert first.scores.parts["code"].tolist() == [*shares, *[0.0] * 8]
    assert len(set(shares)) > 1
    assert any(".generator." in name for name in moved(before, dict(module.named_parameters())))


class _FirstCharacter(FinalAnswer):
    def split(self, text: str) -> Parts:
        return Parts("", "", f"value = {text[:1]!r}")
