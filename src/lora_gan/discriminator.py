"""The second player: who judges, what it is shown, and what it remembers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from lora_gan.backbone import Backbone
from lora_gan.errors import LoraGANError
from lora_gan.judges import Judge
from lora_gan.negatives import Negatives
from lora_gan.objectives import OPPONENT, SAMPLED, TARGET, DiscriminatorObjective
from lora_gan.replay import Episode, Replay
from lora_gan.types import Candidates, Judged, PromptBatch, Rollout, Scores


@dataclass(frozen=True)
class Exhibit:
    """What one round shows to the discriminator: fresh prompts first, replayed ones behind them."""

    candidates: Candidates
    rewards: Mapping[str, Tensor]  # kind → (M,)
    parts: Mapping[str, Mapping[str, Tensor]]  # kind → name of the reward → (M,)
    fresh: int  # prompts of this round


class Discriminator(nn.Module):
    """Judges answers, and learns what its objective says.

    Args:
        judge: Its architecture.
        objective: What it learns.
        negatives: What it is shown besides targets and samples.
        replay: What it remembers of earlier rounds.
    """

    def __init__(
        self, judge: Judge, objective: DiscriminatorObjective, negatives: Sequence[Negatives], replay: Replay
    ) -> None:
        super().__init__()
        kinds = [source.kind for source in negatives]
        twice = {kind for kind in kinds if kinds.count(kind) > 1}
        if twice:
            raise LoraGANError(f"negatives of kind {min(twice)!r} are named twice: name them once and raise per_prompt")
        self.judge = judge
        self.objective = objective
        self.negatives = list(negatives)
        self.replay = replay

    def exhibit(
        self,
        tokenizer: PreTrainedTokenizerBase,
        batch: PromptBatch,
        rollout: Rollout,
        opponent: Rollout,
        scores: Scores,
    ) -> Exhibit:
        """Targets, samples, negatives, the opponent's answers and some old samples, all ending in EOS."""
        old = [episode.to(rollout.ids.device) for episode in self.replay.draw()]
        answered = set(batch.answered)
        answers: dict[str, list[list[Tensor]]] = {
            SAMPLED: [*ended(rollout, len(batch), tokenizer.eos_token_id), *(list(e.answers) for e in old)],
            TARGET: [
                *([target] if b in answered else [] for b, target in enumerate(batch.target_ids)),
                *([e.target] for e in old),
            ],
        }
        nothing: list[list[Tensor]] = [[] for _ in old]
        if len(opponent):
            answers[OPPONENT] = ended(opponent, len(batch), tokenizer.eos_token_id) + nothing
        for source in self.negatives:
            answers[source.kind] = source(batch, tokenizer) + nothing
        return Exhibit(
            Candidates(
                (*batch.prompt_ids, *(e.prompt for e in old)), (*batch.target_ids, *(e.target for e in old)), answers
            ),
            {
                SAMPLED: torch.cat([scores.total, *(e.reward for e in old)]),
                TARGET: torch.cat([scores.target_total, *(e.target_reward[None] for e in old)]),
            },
            {
                SAMPLED: {n: torch.cat([part, *(e.parts[n] for e in old)]) for n, part in scores.parts.items()},
                TARGET: {
                    n: torch.cat([part, *(e.target_parts[n][None] for e in old)])
                    for n, part in scores.target_parts.items()
                },
            },
            len(batch),
        )

    def forward(self, backbone: Backbone, exhibit: Exhibit) -> dict[str, Judged]:
        """The opinion of every candidate, with gradient where it is on; the caller is in the judge's mode."""
        candidates = exhibit.candidates
        result = {}
        for kind, outputs in self.judge(backbone, candidates).items():
            prompt = candidates.prompt_of(kind)
            answers = [answer for row in candidates.answers[kind] for answer in row]
            same = [candidates.is_target(answer, b) for answer, b in zip(answers, prompt.tolist(), strict=True)]
            result[kind] = Judged(
                score=outputs[:, 0],
                auxiliary=outputs[:, 1],
                prompt=prompt,
                length=prompt.new_tensor([len(answer) for answer in answers]),
                is_target=torch.tensor(same, dtype=torch.bool, device=prompt.device),
                reward=exhibit.rewards.get(kind),
                parts=exhibit.parts.get(kind, {}),
            )
        return result

    def remember(self, exhibit: Exhibit) -> None:
        """Put the fresh prompts of a round into the replay buffer."""
        if self.replay.capacity == 0:
            return
        candidates, k = exhibit.candidates, len(exhibit.candidates.answers[SAMPLED][0])
        self.replay.add(
            [
                Episode(
                    candidates.prompts[b],
                    candidates.targets[b],
                    tuple(candidates.answers[SAMPLED][b]),
                    exhibit.rewards[SAMPLED][b * k : (b + 1) * k],
                    {name: part[b * k : (b + 1) * k] for name, part in exhibit.parts[SAMPLED].items()},
                    exhibit.rewards[TARGET][place],
                    {name: part[place] for name, part in exhibit.parts[TARGET].items()},
                )
                for place, b in enumerate(b for b in range(exhibit.fresh) if candidates.answers[TARGET][b])
            ]
        )


def ended(rollout: Rollout, prompts: int, eos: int) -> list[list[Tensor]]:
    """The answers to each prompt, all ending in EOS, so that nothing can be told from the format."""
    end = rollout.ids.new_tensor([eos])
    answers = [
        torch.cat([answer if cut else answer[:-1], end])
        for answer, cut in zip(rollout.answer_ids, rollout.truncated.tolist(), strict=True)
    ]
    return [answers[b * rollout.k : (b + 1) * rollout.k] for b in range(prompts)]
