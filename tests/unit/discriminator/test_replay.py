"""What the discriminator remembers."""

from __future__ import annotations

from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_gan.discriminator.replay import Episode, Replay
from lora_gan.errors import LoraGANError
from lora_gan.types import DiscriminatorOutput, PromptBatch, Rollout, Scores
from tests.helpers.steps import Build, fit, moved


def episode(number: int) -> Episode:
    """Recognised by its prompt."""
    return Episode(
        prompt=torch.tensor([number, 7]),
        target=torch.tensor([1, 256]),
        completions=(torch.tensor([2, 256]), torch.tensor([3, 4, 256])),
        reward=torch.tensor([0.25, 0.5]),
        parts={"mine": torch.tensor([1.0, 2.0])},
        target_reward=torch.tensor(0.75),
        target_parts={"mine": torch.tensor(3.0)},
    )


def numbers(episodes: list[Episode]) -> list[int]:
    return [int(e.prompt[0]) for e in episodes]


def test_the_oldest_leave_first_and_it_never_grows_beyond_its_capacity() -> None:
    replay = Replay(capacity=3)
    kept = []
    for new in ([0], [1, 2], [3], [4, 5, 6, 7]):
        replay.add([episode(n) for n in new])
        kept.append(numbers(replay.episodes))
    assert kept == [[0], [0, 1, 2], [1, 2, 3], [5, 6, 7]]


def test_different_episodes_are_drawn_up_to_as_many_as_there_are() -> None:
    replay = Replay(capacity=8, per_step=3)
    assert replay.draw() == []
    replay.add([episode(0), episode(1)])
    assert sorted(numbers(replay.draw())) == [0, 1]
    replay.add([episode(n) for n in range(2, 8)])
    torch.manual_seed(0)
    draws = [numbers(replay.draw()) for _ in range(50)]
    assert all(len(set(draw)) == 3 for draw in draws)
    assert {n for draw in draws for n in draw} == set(range(8)), "in time everyone is drawn"


def test_without_capacity_nothing_is_kept_and_no_number_is_drawn() -> None:
    replay = Replay(capacity=0)
    replay.add([episode(0)])
    before = torch.get_rng_state()
    assert replay.episodes == [] and replay.draw() == []
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("settings", [{"capacity": -1}, {"per_step": 0}])
def test_settings_are_checked(settings: dict[str, int]) -> None:
    with pytest.raises(LoraGANError, match="capacity >= 0 and per_step >= 1"):
        Replay(**settings)


def same(left: Episode, right: Episode) -> bool:
    def tensors(e: Episode) -> list[Tensor]:
        named = [*sorted(e.parts.items()), *sorted(e.target_parts.items())]
        return [e.prompt, e.target, *e.completions, e.reward, e.target_reward, *(tensor for _, tensor in named)]

    pairs = zip(tensors(left), tensors(right), strict=True)
    return left.parts.keys() == right.parts.keys() and all(torch.equal(a, b) for a, b in pairs)


def test_the_state_is_plain_tensors_and_comes_back_as_it_was(tmp_path: Path) -> None:
    replay = Replay(capacity=5)
    replay.add([episode(n) for n in range(4)])
    torch.save(replay.state_dict(), tmp_path / "replay.pt")
    state = torch.load(tmp_path / "replay.pt", weights_only=True)
    for capacity, wanted in ((5, [0, 1, 2, 3]), (2, [2, 3]), (0, [])):
        other = Replay(capacity)
        other.load_state_dict(state)
        assert numbers(other.episodes) == wanted, "as many as fit, the newest"
        assert all(same(e, replay.episodes[n]) for e, n in zip(other.episodes, wanted, strict=True))
        assert all(isinstance(e.completions, tuple) for e in other.episodes)


def test_an_episode_moves_to_a_device_with_all_it_has() -> None:
    """A checkpoint's episodes are on the processor, the steps that go on with them perhaps are not."""
    there = episode(0).to("meta")
    tensors = [there.prompt, there.target, *there.completions, there.reward, there.target_reward]
    tensors += [*there.parts.values(), *there.target_parts.values()]
    assert len(tensors) == 8 and all(tensor.is_meta for tensor in tensors)


# in a run


def run(build: Build, batch: PromptBatch, replay: Replay | None, **settings: Any) -> tuple[Any, Tensor]:
    """Reports and weights of three steps, and the next random numbers."""
    recorder, _ = fit(build(replay=replay, adversarial=0.5, **settings), [batch], 3)
    return recorder, torch.rand(4)


def test_capacity_0_is_bit_identical_to_a_run_that_cannot_remember(
    build: Build, batch: PromptBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    off, numbers_after_off = run(build, batch, Replay(capacity=0, per_step=2))
    on, _ = run(build, batch, Replay(capacity=6, per_step=2))
    monkeypatch.setattr(Replay, "draw", lambda _: [])
    monkeypatch.setattr(Replay, "add", lambda *_: None)
    without, numbers_after_without = run(build, batch, Replay(capacity=6, per_step=2))
    assert off.reports == without.reports
    assert not moved(off.weights[-1], without.weights[-1])
    assert torch.equal(numbers_after_off, numbers_after_without)

    assert on.reports[0] == off.reports[0], "in the first step there is nothing to remember"
    assert moved(off.weights[1], on.weights[1]), "in the second there is"


def test_a_run_keeps_the_last_prompts_with_their_rewards(build: Build, batch: PromptBatch) -> None:
    """Three prompts a step and room for four: the last step's three behind the last prompt of the step before."""
    module = build(replay=Replay(capacity=4, per_step=1))
    recorder, _ = fit(module, [batch], 3)
    kept = module.discriminator.replay.episodes
    order = [batch.prompt_ids[b] for b in (2, 0, 1, 2)]
    assert all(torch.equal(e.prompt, wanted) for e, wanted in zip(kept, order, strict=True))
    texts = module.backbone.tokenizer.batch_decode(
        [completion for e in kept[1:] for completion in e.completions], skip_special_tokens=True
    )
    assert tuple(texts) == recorder.outputs[-1].rollout.texts
    paid = torch.tensor([text.count("a") / max(len(text), 1) for text in texts])
    assert torch.equal(torch.cat([e.reward for e in kept[1:]]), paid)
    assert [e.target_reward.item() for e in kept[1:]] == [1.0, 0.0, 0.0]


def test_replayed_prompts_are_learned_from_but_not_counted(build: Build, batch: PromptBatch) -> None:
    """The discriminator sees 3 fresh prompts and 2 old ones, its scores and metrics the 3 fresh ones only."""
    module = build(replay=Replay(capacity=8, per_step=2))
    shown: list[dict[str, DiscriminatorOutput]] = []
    objective = module.discriminator.objective

    class Seen(type(objective)):  # type: ignore[misc]
        def __call__(self, outputs: dict[str, DiscriminatorOutput]) -> Any:
            shown.append(dict(outputs))
            return objective(outputs)

    module.discriminator.objective = Seen()
    recorder, _ = fit(module, [batch], 2)
    assert [len(outputs["target"].score) for outputs in shown] == [3, 5]
    assert [len(outputs["sampled"].score) for outputs in shown] == [6, 10]
    second, report = shown[1], recorder.reports[1]
    assert second["hard"].prompt.max() < 3, "old prompts come without new negatives"
    fresh = {kind: outputs.score[outputs.prompt < 3] for kind, outputs in second.items()}
    assert (
        report["discriminator/score_sampled"] == fresh["sampled"].mean().item() != second["sampled"].score.mean().item()
    )
    pairs = fresh["target"].repeat_interleave(2) > fresh["sampled"]
    assert report["discriminator/accuracy_sampled"] == pytest.approx(pairs.float().mean().item())
    assert len(recorder.outputs[-1].rollout) == 6


def test_old_rewards_stand_with_their_completions(build: Build, batch: PromptBatch) -> None:
    module = build(replay=Replay(capacity=8, per_step=1))
    module.discriminator.replay.add([episode(65)])
    rollout = module.sample_rollout(batch)
    scores = Scores(
        total=torch.arange(6.0),
        parts={"mine": torch.arange(6.0) * 10},
        applies={"mine": torch.tensor([True] * 5 + [False])},
        target_total=torch.tensor([7.0, 8.0, 9.0]),
        target_parts={"mine": torch.tensor([70.0, 80.0, 90.0])},
        target_applies={"mine": torch.tensor([True, False, True])},
        reference_logprobs=rollout.logprobs,
        base_logprobs=rollout.logprobs,
    )
    nothing = Rollout.empty(module.device)
    shown = module.discriminator.make_batch(module.backbone.tokenizer, batch, rollout, nothing, scores)
    assert shown.fresh == 3 and len(shown.prompts) == 4
    assert shown.rewards["sampled"].tolist() == pytest.approx([0, 1, 2, 3, 4, nan, 0.25, 0.5], nan_ok=True)
    assert shown.rewards["target"].tolist() == pytest.approx([7, nan, 9, 0.75], nan_ok=True)
    assert shown.parts["sampled"]["mine"].tolist() == [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 1.0, 2.0]
    assert shown.parts["target"]["mine"].tolist() == [70.0, 80.0, 90.0, 3.0]
    assert [completion.tolist() for completion in shown.completions["sampled"][3]] == [[2, 256], [3, 4, 256]]
    assert shown.prompt_of("sampled").tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
