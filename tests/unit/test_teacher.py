"""Teachers against plain rows of the model, and on-policy distillation as a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from lora_gan.advantages import RewardToGo
from lora_gan.errors import LoraGANError
from lora_gan.module import LoraGANModule
from lora_gan.sampling import Sampling
from lora_gan.teacher import HintedBase, TeacherModel
from lora_gan.types import PromptBatch
from tests.conftest import Build, randomise
from tests.helpers.steps import fit

RATE = {"lr": 3e-3}


@pytest.fixture
def other(bases: dict[str, str], tmp_path: Path) -> str:
    """The folder of a model like the base, with other weights."""
    model = AutoModelForCausalLM.from_pretrained(bases["gpt2"])
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(bases["gpt2"]).save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def scored(module: LoraGANModule, batch: PromptBatch) -> tuple[Any, torch.Tensor]:
    randomise(module.backbone)
    torch.manual_seed(8)
    rollout = module.sample_rollout(batch)
    return rollout, module.score(rollout, batch, with_targets=True).reference_logprobs


@torch.no_grad()
def by_hand(folder: str, prompts: list[torch.Tensor], rollout: Any, temperature: float) -> torch.Tensor:
    """Log-probabilities of the completions by plain rows, one at a time."""
    model, found = AutoModelForCausalLM.from_pretrained(folder).eval(), torch.zeros(rollout.ids.shape)
    for n, completion in enumerate(rollout.completion_ids):
        prompt = prompts[n // rollout.num_generations]
        logits = model(torch.cat([prompt, completion])[None]).logits[0, len(prompt) - 1 : -1, :257]
        logp = (logits / temperature).log_softmax(-1)
        found[n, : len(completion)] = logp.gather(-1, completion[:, None])[:, 0]
    return found


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_a_teacher_predicts_as_its_own_model_does(
    micro_batch_size: int | None, other: str, build: Build, batch: PromptBatch
) -> None:
    how = Sampling(max_new_tokens=5, temperature=0.7)
    module = build(kl_reference=TeacherModel(other), sampling=how, micro_batch_size=micro_batch_size)
    rollout, found = scored(module, batch)
    torch.testing.assert_close(found, by_hand(other, list(batch.prompt_ids), rollout, 0.7), atol=1e-4, rtol=0)


def test_a_hint_stands_before_the_prompt(bases: dict[str, str], build: Build, batch: PromptBatch) -> None:
    module = build(kl_reference=HintedBase("The answer: {target}\n"), sampling=Sampling(max_new_tokens=5))
    rollout, found = scored(module, batch)
    encode = module.backbone.tokenizer.encode
    prompts = [torch.tensor(encode(f"The answer: {e.target}\n") + encode(e.prompt)) for e in batch.examples]
    torch.testing.assert_close(found, by_hand(bases["gpt2"], prompts, rollout, 1.0), atol=1e-4, rtol=0)


def test_distillation_lowers_the_reverse_kl(other: str, build: Build, batch: PromptBatch) -> None:
    """No target and no reward: the teacher alone. Its weights are not in the checkpoint."""
    module = build(
        kl_reference=TeacherModel(other),
        advantage=RewardToGo(),
        num_generations=8,
        sampling=Sampling(max_new_tokens=6),
        rewards=[],
        supervised=0.0,
        policy=1.0,
        kl_penalty=1.0,
        discriminator_updates=0,
        generator_optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-2),
    )
    recorder, _ = fit(module, [batch], 40)
    kl = [report["policy/kl"] for report in recorder.reports]
    assert sum(kl[-5:]) < 0.6 * sum(kl[:5])
    assert not any("kl_reference" in name or "teacher" in name for name in module.state_dict())


def test_mistakes(other: str, build: Build, batch: PromptBatch) -> None:
    with pytest.raises(LoraGANError, match="the hint of HintedBase is empty"):
        build(kl_reference=HintedBase(" "))
    with pytest.raises(LoraGANError, match="has another tokenizer"):
        build(kl_reference=TeacherModel("builtin"))
    with pytest.raises(LoraGANError, match="cannot load base 'nowhere/at-all'"):
        build(kl_reference=TeacherModel("nowhere/at-all"))
    module = build(kl_reference=HintedBase("word " * 500), sampling=Sampling(max_new_tokens=3))
    with pytest.raises(LoraGANError, match="shorten the hint"):
        scored(module, batch)
