"""Both sides of each benchmark do the same work; ``python -m tests.benchmarks`` measures the time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .growth import SIDES, Point, measure, plot, points, table
from .memory import CASES, OURS, SHAPES, USUAL, Head, row
from .memory import measure as measure_memory
from .passes import Passes
from .peak import peak_megabytes
from .population import PopulationSides
from .setting import SIZES, save_model
from .workers import KINDS, Traffic, run

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
    assert sides.one_model().ids.shape == (6, TINY.completion_tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_generations_and_their_traffic(kind: str, folder: Path) -> None:
    traffic = Traffic()
    assert len(run(kind, TINY, folder, traffic, 1)) == 1
    assert traffic.sent > traffic.received > 0


def test_steps_have_completions_of_equal_length(folder: Path) -> None:
    pytest.importorskip("trl")
    from .steps import time_steps

    counts = {name: len(seconds) for name, seconds in time_steps(TINY, folder, repeats=1).items()}
    assert counts == dict.fromkeys(["trl", "rl", "adversarial", "rl int8", "adversarial int8"], 1)


def test_growth_measures_every_side_and_each_size_from_the_middle_point(tmp_path: Path) -> None:
    small = Point(prompt_tokens=6, completion_tokens=3, num_generations=2, vocabulary=300, prompts=1)
    threads = torch.get_num_threads()
    try:
        costs = measure(small, repeats=1)
    finally:
        torch.set_num_threads(threads)
    assert set(costs) == set(SIDES) and all(cost.seconds > 0 for cost in costs.values())
    for name, varied in points().items():
        low, middle, high = (getattr(point, name) for point in varied)
        assert (middle, high) == (4 * low, 4 * middle) and varied[1] == Point()
    everywhere = dict.fromkeys((point for varied in points().values() for point in varied), costs)
    assert len(everywhere) == 9 and len(table(everywhere).splitlines()) == 2 + 9
    plot(everywhere, tmp_path / "growth.svg")
    assert (tmp_path / "growth.svg").read_text(encoding="utf-8").count("<svg") == 1


def test_the_peak_is_that_of_the_work_alone() -> None:
    held = torch.ones(50_000_000)  # 200 MB
    assert 100 < peak_megabytes(lambda: torch.ones(25_000_000).add(1)) < 300, "two tensors of 100 MB"
    del held


@pytest.mark.parametrize("with_entropy", [False, True])
def test_both_sides_of_the_memory_give_the_same_gradient(with_entropy: bool) -> None:
    sides = Head(SHAPES["tiny"], with_entropy)
    ours, usual = sides.ours(), sides.usual()
    assert usual.norm() > 0
    torch.testing.assert_close(ours, usual, rtol=1e-4, atol=1e-6 * usual.norm().item())


def test_memory_is_measured_of_heads_and_steps() -> None:
    threads = torch.get_num_threads()
    try:
        costs = [
            measure_memory(f"tiny {what}", side, 1) for what in ("both", "apart", "coupled") for side in (USUAL, OURS)
        ]
    finally:
        torch.set_num_threads(threads)
    assert all(cost.seconds > 0 for cost in costs)
    assert {case.split()[1] for case in CASES} == {"logprobs", "both", "step", "apart", "coupled"}
    assert row("a step", *costs[:2]).count("|") == 8
