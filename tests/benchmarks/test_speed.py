"""Both sides of each benchmark do the same work; ``python -m tests.benchmarks`` measures the time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .passes import Passes
from .population import PopulationSides
from .setting import SIZES, save_model

pytestmark = pytest.mark.benchmark
TINY = SIZES["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(TINY, tmp_path_factory.mktemp("tiny"))


def test_tree_and_rows_give_the_same_gradient(folder: Path) -> None:
    side = Passes(TINY, folder)
    tree, rows = side.tree(), side.rows()
    assert tree.norm() > 0
    torch.testing.assert_close(tree, rows, rtol=1e-4, atol=1e-6 * tree.norm().item())


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_sampler_and_generate_draw_as_many_tokens(folder: Path, top_p: float) -> None:
    side = Passes(TINY, folder)
    rollout, generated = side.sampler(top_p), side.generate(top_p)
    assert rollout.ids.shape == generated.shape == (TINY.prompts * TINY.num_generations, TINY.completion_tokens)
    assert rollout.mask.all()
    assert not (generated == side.backbone.tokenizer.eos_token_id).any()


def test_a_population_and_its_members_draw_as_many_tokens(folder: Path) -> None:
    sides = PopulationSides(TINY, folder, members=3, prompts=2)
    together, one_by_one = sides.together(), sides.one_by_one()
    assert len(together) == len(one_by_one) == 3
    assert {r.ids.shape for r in together} == {g.shape for g in one_by_one} == {(2, TINY.completion_tokens)}
    assert all(r.mask.all() for r in together)


def test_steps_have_completions_of_equal_length(folder: Path) -> None:
    pytest.importorskip("trl")
    from .steps import time_steps

    assert {name: len(seconds) for name, seconds in time_steps(TINY, folder, repeats=1).items()} == {
        "trl": 1,
        "rl": 1,
        "adversarial": 1,
    }
