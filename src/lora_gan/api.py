"""The library: LoraGAN and GPT2Twin, which play one round at each ``step``.

They are the trainer: n steps do what n rounds of a fit on the same batches do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lora_gan.adapters import PLAYERS, load_player, write_players
from lora_gan.advantages import PredictedReward
from lora_gan.backbone import DISCRIMINATOR, GENERATOR
from lora_gan.data.tokenizer import encode_answers, prompt_ids
from lora_gan.embedding import MINILM, sentence_encoder
from lora_gan.errors import LoraGANError
from lora_gan.judges import AdapterJudge, AnswerAndTarget
from lora_gan.module import LoraGANModule
from lora_gan.objectives import ClosenessYesNo
from lora_gan.rewards import FunctionReward, SemanticReward
from lora_gan.sampling import sample
from lora_gan.steps import Steps
from lora_gan.types import Example, Judgement, PromptBatch, RewardContext, Rollout, Scores

Texts = str | Sequence[str]
LABEL = "label"  # in an example's meta: what GPT2Twin was told


class _Stepper:
    """A module, and a trainer that plays its rounds one at a time.

    Args:
        base: "builtin", a hub id or a local folder of a causal language model.
        checkpoints: Folder of :meth:`save_checkpoint`.
        device: "cpu", "cuda", "cuda:1", "mps"; "auto" takes a GPU where there is one.
        precision: Lightning's number format of the computation, "32-true" or "bf16-mixed" say.
        callbacks: Callbacks of the trainer.
        seed: Of torch, numpy and python; null leaves them as they are.
        settings: Arguments of :class:`~lora_gan.module.LoraGANModule`.
    """

    def __init__(
        self,
        base: str,
        *,
        checkpoints: str | Path = "checkpoints",
        device: str = "auto",
        precision: Any = "32-true",
        callbacks: Sequence[L.Callback] = (),
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        if seed is not None:
            L.seed_everything(seed, verbose=False)
        self.checkpoints = Path(checkpoints)
        self.module = LoraGANModule(base, **{"answers_per_prompt": 1, "advantage": PredictedReward(), **settings})
        self.module.seed = torch.initial_seed()
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self._steps = Steps(self.module, chosen, precision, callbacks)
        self.trainer = self._steps.trainer

    def generate(self, prompt: Texts) -> Any:
        """The generator's most likely answer to each prompt."""
        prompts = _listed(prompt)
        module = self.module
        ids = self._batch(prompts, [""] * len(prompts)).to(module.device).prompt_ids
        with module.backbone.generator():
            texts = [text.strip() for text in sample(module.backbone, ids, 1, module.greedy).texts]
        return texts[0] if isinstance(prompt, str) else texts

    def save_checkpoint(self, step: int) -> Path:
        """Write ``checkpoints/step-<step>/{generator,discriminator}``: PEFT adapters with their optimizers' states.

        ``state.pt`` beside them holds what belongs to neither: knobs, callbacks, schedules and the seed.
        """
        folder = self.checkpoints / f"step-{step}"
        write_players(self.module, folder, dict(zip(PLAYERS, self.trainer.optimizers, strict=True)), self._state())
        return folder

    def load_checkpoint(self, step: int) -> None:
        """Go on from what :meth:`save_checkpoint` wrote.

        Raises:
            LoraGANError: There is no such checkpoint, or it is one of another base or shape.
        """
        folder = self.checkpoints / f"step-{step}"
        if not (folder / "state.pt").is_file():
            there = ", ".join(sorted(path.name for path in self.checkpoints.glob("step-*"))) or "none"
            raise LoraGANError(f"no checkpoint {folder}; there are: {there}")
        for player, optimizer in zip(PLAYERS, self.trainer.optimizers, strict=True):
            load_player(self.module, player, folder / player)
            optimizer.load_state_dict(torch.load(folder / player / "optimizer.pt", weights_only=True))
        self._restore(torch.load(folder / "state.pt", weights_only=True))

    def _state(self) -> dict[str, Any]:
        return {
            "rounds": self.trainer.global_step,
            "knobs": self.module.knobs.state_dict(),
            "replay": self.module.discriminator.replay.state_dict(),
            "callbacks": {c.state_key: c.state_dict() for c in self._callbacks},
            "schedulers": [config.scheduler.state_dict() for config in self.trainer.lr_scheduler_configs],
            "seed": self.module.seed,
            "gradients": self.module.accumulated,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self._steps.rounds = state["rounds"]
        self.module.knobs.load_state_dict(state["knobs"])
        self.module.discriminator.replay.load_state_dict(state["replay"])
        for callback in self._callbacks:
            if callback.state_key in state["callbacks"]:
                callback.load_state_dict(state["callbacks"][callback.state_key])
        for config, saved in zip(self.trainer.lr_scheduler_configs, state["schedulers"], strict=True):
            config.scheduler.load_state_dict(saved)
        self.module.seed = state["seed"]
        self.module.accumulated = state["gradients"]

    @property
    def _callbacks(self) -> list[L.Callback]:
        return self.trainer.callbacks  # type: ignore[attr-defined, no-any-return]

    # rounds

    def _play(
        self, prompts: Sequence[str], targets: Sequence[str], frozen: Sequence[str] = (), **meta: Sequence[str]
    ) -> _Played:
        """One round of the trainer on one batch."""
        self.module.frozen = frozenset(frozen)
        report = self._steps.play(self._batch(prompts, targets, **meta))
        module = self.module
        assert module.scores is not None and module.judgement is not None
        return _Played(prompts, module.rollout, module.scores, module.judgement, report)

    def _batch(self, prompts: Sequence[str], targets: Sequence[str], **meta: Sequence[str]) -> PromptBatch:
        """An answer stands behind its prompt after a space, where the prompt does not end with one."""
        if not prompts or len(prompts) != len(targets):
            raise LoraGANError(f"give a target for each prompt, at least one; got {len(prompts)} and {len(targets)}")
        tokenizer = self.module.backbone.tokenizer
        spaced = [t if not t or p[-1:].isspace() else f" {t.lstrip()}" for p, t in zip(prompts, targets, strict=True)]
        told = [{name: values[b] for name, values in meta.items()} for b in range(len(prompts))]
        return PromptBatch(
            tuple(
                Example(prompt, target, (target,), group=prompt, meta=about)
                for prompt, target, about in zip(prompts, targets, told, strict=True)
            ),
            tuple(torch.tensor(prompt_ids(tokenizer, prompt)) for prompt in prompts),
            tuple(torch.tensor(ids) for ids in encode_answers(tokenizer, spaced)),
            tuple(() for _ in prompts),
        )


class LoraGAN(_Stepper):
    """A generator that answers and a discriminator that learns to predict the reward, one ``step`` at a time.

    Args:
        base: "builtin", a hub id or a local folder of a causal language model.
        compute_reward: The true reward, ``f(response, target) -> float``; by default the cosine similarity of their
            sentence embeddings. It can be replaced at any time: ``gan.compute_reward = f``.
        settings: What :class:`~lora_gan.module.LoraGANModule` takes, and ``checkpoints``, ``device``, ``precision``,
            ``callbacks`` and ``seed``. By default one answer is sampled for each prompt, its advantage is the true
            reward less the predicted one, and the predicted reward is paid with a weight of 0.1.
    """

    def __init__(
        self, base: str = "builtin", compute_reward: Callable[[str, str], float] | None = None, **settings: Any
    ) -> None:
        if compute_reward is not None:
            self.compute_reward = compute_reward  # type: ignore[method-assign, assignment]
        super().__init__(base, **{"rewards": [_Computed(self)], "adversarial_weight": 0.1, **settings})

    def compute_reward(self, response: str, target: str) -> float:
        """How good a response is, higher is better."""
        return float(sentence_encoder(MINILM).similarity([response], [target]).clamp(0, 1))

    def step(
        self, prompt: Texts, target_text: Texts, train_gen: bool = True, train_disc: bool = True
    ) -> dict[str, Any]:
        """Answer, score, judge, learn.

        Args:
            prompt: One prompt, or a list of them, which is one batch.
            target_text: The wanted answer to each.
            train_gen: Whether the generator learns.
            train_disc: Whether the discriminator learns.

        Returns:
            prompt, response, true_reward, disc_loss (before its update), pred_reward (likewise) and gen_loss. For a
            list of prompts, response, true_reward and pred_reward are lists; where several answers are sampled for each
            prompt, lists of them. What nobody needed, a loss or a score, is None.
        """
        frozen = [player for player, learns in zip(PLAYERS, (train_gen, train_disc), strict=True) if not learns]
        played = self._play(_listed(prompt), _listed(target_text), frozen)
        single = isinstance(prompt, str)
        return {
            "prompt": prompt,
            "response": played.each([text.strip() for text in played.rollout.texts], single),
            "true_reward": played.each(played.scores.total.tolist(), single),
            "disc_loss": played.loss(DISCRIMINATOR),
            "pred_reward": played.each(played.predicted.tolist(), single),
            "gen_loss": played.loss(GENERATOR),
        }


class GPT2Twin(_Stepper):
    """A generator and its twin, which reads "GEN: <answer> || TAR: <target>" and says whether the two are close.

    The generator's loss is L = LM + λ·(−log P(close)), differentiated through the sampled answer.

    Args:
        base: "builtin", a hub id or a local folder of a causal language model.
        coupling: λ; 0 trains the two apart.
        settings: As for :class:`LoraGAN`. ``objective=ClosenessScore()`` makes the twin learn a score from 0 to 1.
    """

    def __init__(self, base: str = "builtin", coupling: float = 0.1, **settings: Any) -> None:
        defaults = {
            "rewards": [_Told()],
            "judge": AdapterJudge(AnswerAndTarget()),
            "objective": ClosenessYesNo(close_from=0.95),
            "policy_weight": 0.0,
            "coupled_weight": coupling,
        }
        super().__init__(base, **{**defaults, **settings})

    def step(
        self, prompt: Texts, target_text: Texts, target_label: float | Sequence[float] | None = None
    ) -> dict[str, Any]:
        """Answer, judge, learn.

        Args:
            prompt: One prompt, or a list of them, which is one batch.
            target_text: The wanted answer to each; the generator learns to say it, the twin that it is close.
            target_label: What the twin shall learn about the generated answer: 1 close, 0 not, between them a score.
                Left out, an answer counts as close where its cosine similarity says so. The target, word for word,
                is always close.

        Returns:
            loss_gen, loss_disc, gen_text (the prompt with its answer) and prob_close (before the twin's update); the
            last two are lists for a list of prompts.
        """
        prompts = _listed(prompt)
        if target_label is None:
            played = self._play(prompts, _listed(target_text))
        else:
            labels = list(target_label) if isinstance(target_label, Sequence) else [target_label] * len(prompts)
            if len(labels) != len(prompts) or not all(0 <= label <= 1 for label in labels):
                raise LoraGANError(f"target_label must be from 0 to 1, one for each prompt; got {target_label}")
            played = self._play(prompts, _listed(target_text), **{LABEL: [str(float(label)) for label in labels]})
        single = isinstance(prompt, str)
        texts = [prompts[n // played.rollout.k] + text for n, text in enumerate(played.rollout.texts)]
        return {
            "loss_gen": played.loss(GENERATOR),
            "loss_disc": played.loss(DISCRIMINATOR),
            "gen_text": played.each(texts, single),
            "prob_close": played.each(played.predicted.sigmoid().tolist(), single),
        }


@dataclass(frozen=True)
class _Played:
    """What happened in a round."""

    prompts: Sequence[str]
    rollout: Rollout
    scores: Scores
    judgement: Judgement
    report: Mapping[str, Tensor]

    def loss(self, player: str) -> float | None:
        value = self.report.get(f"loss/{player}")
        return None if value is None else float(value)

    @property
    def predicted(self) -> Tensor:
        """(N,) the discriminator's scores; (0,) where it was not asked."""
        return self.judgement.sampled if "judge/score_sampled" in self.report else self.judgement.sampled[:0]

    def each(self, values: Sequence[Any], single: bool) -> Any:
        """The values of N answers, by prompt; None where there are none."""
        k = self.rollout.k
        rows = [list(values[b * k : (b + 1) * k]) or [None] for b in range(len(self.prompts))]
        shown = [row[0] if len(row) == 1 else row for row in rows]
        return shown[0] if single else shown


class _Computed(SemanticReward):
    """What ``compute_reward`` of a LoraGAN is at the moment."""

    def __init__(self, gan: LoraGAN) -> None:
        super().__init__(weight=1.0, name="true")
        self.gan = gan

    def __call__(self, answers: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        compute = self.gan.compute_reward
        said = [answer.strip() for answer in answers]
        if getattr(compute, "__func__", None) is LoraGAN.compute_reward:  # all of them at once
            return super().__call__(said, batch, context)
        return FunctionReward(compute, name=self.name)(said, batch, context)


class _Told(SemanticReward):
    """The label that was told for a prompt; where none was, the similarity."""

    def __init__(self) -> None:
        super().__init__(weight=1.0, name="label")

    def __call__(self, answers: Sequence[str], batch: PromptBatch, context: RewardContext) -> Tensor:
        labels = [batch.examples[n // context.k].meta.get(LABEL) for n in range(len(answers))]
        if None not in labels:
            return torch.tensor([float(label or 0) for label in labels])
        return super().__call__([answer.strip() for answer in answers], batch, context)


def _listed(texts: Texts) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)
