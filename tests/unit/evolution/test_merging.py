"""The merge of trained adapters: sums and PEFT's methods against others' arithmetic, the search, and its resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_gan.backbone import GENERATOR, LoraSettings
from lora_gan.checkpointing.adapters import save_adapter
from lora_gan.errors import LoraGANError
from lora_gan.evolution import MergeModule
from lora_gan.evolution.lowrank import Weights
from lora_gan.evolution.population import read_weights, weights_state, write_weights
from lora_gan.module import LoraGANModule
from lora_gan.rewards import FunctionReward
from lora_gan.types import PromptBatch
from tests.conftest import tiny
from tests.helpers.generations import graded, same
from tests.helpers.settings import grouped
from tests.helpers.steps import fit

Build = Callable[..., MergeModule]


@pytest.fixture
def folders(bases: dict[str, str], tmp_path: Path) -> list[str]:
    """Two adapters of different rank and scale, whose ΔW are not 0."""
    for number, (rank, alpha) in enumerate(((2, 4), (3, 3))):
        lora = LoraSettings(rank=rank, alpha=alpha)
        module = LoraGANModule(**grouped({**tiny(bases["gpt2"]), "generator_lora": lora}))
        torch.manual_seed(number)
        for x in (random := read_weights(module.backbone)).values():
            x.b.normal_(0, 0.3)
        write_weights(module.backbone, random)
        save_adapter(module.backbone, GENERATOR, tmp_path / f"adapter_{number}")
    return [str(tmp_path / f"adapter_{number}") for number in range(2)]


@pytest.fixture
def merge(bases: dict[str, str], folders: list[str]) -> Build:
    def build(rank: int = 5, **changed: Any) -> MergeModule:
        torch.manual_seed(4)
        lora = LoraSettings(rank=rank, alpha=2 * rank)
        settings = {**tiny(bases["gpt2"]), "rewards": [FunctionReward(graded)], "generator_lora": lora}
        return MergeModule(**grouped({"adapters": folders, **settings, "discriminator_updates": 0, **changed}))

    return build


def deltas(weights: Weights) -> dict[str, torch.Tensor]:
    return {name: x.delta for name, x in weights.items()}


def test_a_sum_of_all_ranks_is_exact(merge: Build) -> None:
    """2·ΔW₁ − 0.5·ΔW₂, in a generator with more rank than both together."""
    module = merge(rank=7)
    module._read()
    first, second = (deltas(part) for part in module.parts)
    for name, found in deltas(module.merged([2.0, -0.5])).items():
        torch.testing.assert_close(found, 2 * first[name] - 0.5 * second[name])
    merged, own = module.merged([1.0, 1.0]), read_weights(module.backbone)
    assert {x.rank for x in merged.values()} == {7}
    assert all(x.a[5:].equal(own[name].a[5:]) and not x.b[:, 5:].any() for name, x in merged.items()), "can still learn"


def test_too_small_a_rank_gives_the_best_approximation(merge: Build) -> None:
    """What is lost is the size of the singular values that do not fit (Eckart, Young 1936)."""
    module = merge(rank=3)
    module._read()
    first, second = (deltas(part) for part in module.parts)
    for name, found in deltas(module.merged([1.0, 1.0])).items():
        whole = first[name] + second[name]
        values = torch.linalg.svdvals(whole)
        torch.testing.assert_close((whole - found).norm(), values[3:].norm(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["ties", "dare_ties"])
def test_pefts_methods(merge: Build, method: str) -> None:
    """In a generator with more rank than the matrices have.

    TIES by hand: keep the larger half of each ΔW, elect the sign of the sum, average those that agree.

    DARE is random: its ΔW is as large as TIES' within a factor of three, and repeats with the same seed.
    """
    module = merge(rank=64)  # enough for any matrix of the tiny model
    module._read()
    parts = [deltas(part) for part in module.parts]
    before = torch.get_rng_state()
    found, again = (deltas(module.merged_by(method)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert {x.rank for x in module.merged_by(method).values()} == {64}
    for name, delta in found.items():
        torch.testing.assert_close(delta, again[name])
        kept = []
        for part in parts:
            bound = part[name].abs().flatten().topk(int(0.5 * part[name].numel())).values[-1]
            kept.append(torch.where(part[name].abs() >= bound, part[name], 0.0))
        sign = torch.stack(kept).sum(0).sign()
        agree = torch.stack([torch.where(x.sign() == sign, x, 0.0) for x in kept])
        wanted = agree.sum(0) / (agree != 0).sum(0).clamp(min=1)
        if method == "ties":
            torch.testing.assert_close(delta, wanted, rtol=1e-3, atol=1e-4)
        else:
            assert wanted.norm() / 3 < delta.norm() < 3 * wanted.norm() and not torch.allclose(delta, wanted)


def test_the_search_finds_the_coefficients_of_the_best_merge(merge: Build) -> None:
    """Of a fitness that is highest at (1.2, −0.4), without a model: the search itself, and its sign."""
    module = merge(population=8)
    module.search = module._new_search()
    untouched = np.random.get_state()[1].copy()
    for _ in range(40):
        asked = module.asked()
        module._tell(asked, [-float((c[0] - 1.2) ** 2 + (c[1] + 0.4) ** 2) for c in asked])
    assert module.search.mean.tolist() == pytest.approx([1.2, -0.4], abs=0.01)
    assert (np.random.get_state()[1] == untouched).all()


def test_the_run_starts_from_the_average_and_writes_the_merge_of_the_mean(merge: Build, batch: PromptBatch) -> None:
    module = merge(population=4)
    recorder, trainer = fit(module, [batch], 2)
    assert trainer.global_step == 2 and len(module.history) == 2 and len(module.history[0]) == 4
    written, wanted = read_weights(module.backbone), module.merged(module.search.mean)
    same(weights_state(written), weights_state(wanted))
    last = recorder.reports[-1]
    assert [last["merge/coefficient_1"], last["merge/coefficient_2"]] == pytest.approx(module.search.mean.tolist())
    assert last["fitness/best"] == pytest.approx(max(module.history[-1]))
    assert module._new_search().mean.tolist() == [0.5, 0.5]


def test_a_resumed_run_equals_an_uninterrupted_one_without_the_folders(
    merge: Build, batch: PromptBatch, tmp_path: Path, folders: list[str]
) -> None:
    whole, _ = fit(merge(population=4), [batch], 3)
    _, trainer = fit(merge(population=4), [batch], 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    for folder in folders:
        (Path(folder) / "adapter_model.safetensors").unlink()
    rest, _ = fit(merge(population=4), [batch], 3, ckpt_path=str(tmp_path / "one.ckpt"))
    assert rest.reports == whole.reports[1:]
    same(rest.weights, whole.weights[1:])


def test_the_adapters_of_a_checkpoint_follow_the_module_to_its_device(
    merge: Build, batch: PromptBatch, tmp_path: Path
) -> None:
    """Lightning loads a checkpoint before it moves the module."""
    _, trainer = fit(merge(population=4), [batch], 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    module = merge(population=4)
    module.on_load_checkpoint(torch.load(tmp_path / "one.ckpt", weights_only=True))
    module.to("meta")
    module._read()
    assert {w.device.type for part in module.parts for x in part.values() for w in (x.a, x.b)} == {"meta"}


def test_a_test_measures_each_adapter_and_the_other_merges(merge: Build, batch: PromptBatch) -> None:
    module = merge(population=4)
    fit(module, [batch], 1)
    before = weights_state(read_weights(module.backbone))
    module.on_test_start()
    outputs = module.test_step(batch, 0)
    same(weights_state(read_weights(module.backbone)), before)
    others = ["adapter_1", "adapter_2", "merge_average", "merge_sum", "merge_TIES", "merge_DARE"]
    assert list(outputs) == ["base", "trained", "sampled", *others]
    for role, weights in module.alternatives():
        write_weights(module.backbone, weights)
        with module.backbone.generator():
            assert module.complete(batch, module.greedy).texts == outputs[role].texts


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"adapters": ["one"]}, "at least two adapters"),
        ({"population": 1}, "population >= 2"),
        ({"sigma": 0.0}, "sigma > 0"),
    ],
)
def test_invalid_settings(merge: Build, changed: dict[str, Any], message: str) -> None:
    with pytest.raises(LoraGANError, match=message):
        merge(**changed)


def test_a_missing_folder_is_refused_before_the_first_step(merge: Build, batch: PromptBatch) -> None:
    module = merge(adapters=["nowhere", "neither"])
    with pytest.raises(LoraGANError, match="'nowhere' holds no adapter"):
        fit(module, [batch], 1)
    assert not module.history


@pytest.mark.parametrize("changed", [{"population": 6}, {"sigma": 0.2}, {"evolution_seed": 1}])
def test_another_search_does_not_go_on_from_a_checkpoint(
    changed: dict[str, Any], merge: Build, batch: PromptBatch, tmp_path: Path
) -> None:
    _, trainer = fit(merge(population=4), [batch], 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(LoraGANError, match=r"the search of the checkpoint has adapters 2, population 4, sigma 0\.3"):
        fit(merge(**{"population": 4, **changed}), [batch], 2, ckpt_path=str(tmp_path / "one.ckpt"))


def test_the_search_stays_where_all_members_are_equally_fit(merge: Build, batch: PromptBatch, tmp_path: Path) -> None:
    """Nothing says where to go; a resumed run is as far."""
    constant = FunctionReward(lambda response, target: 0.5, name="constant")
    module = merge(population=4, rewards=[constant])
    _, trainer = fit(module, [batch], 2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert list(module.search.mean) == [0.5, 0.5] and module.search.sigma == 0.3
    again = merge(population=4, rewards=[constant])
    fit(again, [batch], 3, ckpt_path=str(tmp_path / "two.ckpt"))
    whole = merge(population=4, rewards=[constant])
    fit(whole, [batch], 3)
    assert again.history == whole.history and np.allclose(again.asked(), whole.asked())


def test_an_untrained_discriminator_is_no_part_of_the_fitness(merge: Build, batch: PromptBatch) -> None:
    module = merge(adversarial=0.5)
    with pytest.raises(LoraGANError, match=r"nothing trains it here: set it to 0, discriminator\.adapter to "):
        fit(module, [batch], 1)
    assert not module.history
