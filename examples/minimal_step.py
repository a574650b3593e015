"""One adversarial training step in plain PyTorch and PEFT, to read from top to bottom before the real code.

A frozen base carries two LoRA adapters. The generator samples K completions of a question; a reward scores them; the
discriminator learns to predict the reward; the generator learns from the target and from its advantages.

Left out here, and where it is:

- several prompts in one pass, computed once for all branches (the prompt tree): ``tree.py``, ``backbone.py``
- an own sampler, top-p, beams: ``sampling.py``
- other rewards, what the discriminator's score is worth: ``rewards/``
- other discriminators and objectives, negatives, replay, gradients through samples: ``discriminator/``
- other advantages: ``advantages.py``; PPO, KL, value head: ``losses.py``, ``generator.py``
- clipping, batches in several passes, schedules, mixed precision: ``optimization.py``
- curricula and monitors: ``callbacks/``; checkpoints and exact resume: ``checkpointing/``
- data sets and splits: ``data/``; several processes: ``distributed.py``; populations: ``evolution/``
- the real step: ``module.py``, ``run_step``

Run: ``python examples/minimal_step.py --steps 60`` (half a minute on a CPU)
"""

from __future__ import annotations

import argparse
from importlib.resources import files

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

COUNTRIES = "France Germany Italy Spain Portugal Austria Poland Greece Norway Sweden Japan China Egypt Kenya Peru Cuba"
CAPITALS = "Paris Berlin Rome Madrid Lisbon Vienna Warsaw Athens Oslo Stockholm Tokyo Beijing Cairo Nairobi Lima Havana"
FACTS = list(zip(COUNTRIES.split(), CAPITALS.split(), strict=True))
K = 8  # completions of one prompt
NEW_TOKENS = 16
POLICY, SUPERVISED, ADVERSARIAL = 1.0, 1.0, 0.1  # coefficients


def reward(completion: str, target: str) -> float:
    """Word overlap, from 0 to 1 (1: the same words)."""
    said, wanted = set(completion.split()), set(target.split())
    return 2 * len(said & wanted) / max(len(said) + len(wanted), 1)


class MinimalGAN:
    """A generator and a discriminator on one frozen base."""

    def __init__(self, lr: float = 1e-3) -> None:
        folder = str(files("lora_gan") / "builtin")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        # all linear layers by name: PEFT's default for GPT-2 is c_attn only
        lora = LoraConfig(r=16, lora_alpha=32, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
        self.model = get_peft_model(
            base, lora, adapter_name="generator"
        ).eval()  # no dropout: log-probabilities must be reproducible
        self.model.add_adapter("discriminator", lora)
        self.score_head = nn.Linear(base.config.hidden_size, 1)
        # by name, not by requires_grad: set_adapter turns requires_grad off for the adapter that is not active
        named = list(self.model.named_parameters())
        self.generator = [p for name, p in named if ".generator." in name]
        self.discriminator = [p for name, p in named if ".discriminator." in name] + list(self.score_head.parameters())
        self.generator_optimizer = torch.optim.AdamW(self.generator, lr=lr, weight_decay=0.0)
        self.discriminator_optimizer = torch.optim.AdamW(self.discriminator, lr=lr, weight_decay=0.0)

    def step(self, question: str, target: str) -> dict[str, float]:
        """Sample, score, update the discriminator, compute advantages, update the generator."""
        eos = self.tokenizer.eos_token_id
        prompt = self.tokenizer(f"### Prompt:\n{question}\n\n### Response:\n", return_tensors="pt").input_ids
        start = prompt.shape[1]  # (1, P)

        ids = self.sample(prompt)  # (K, P + T)
        mask = (ids[:, start:] == eos).cumsum(1) - (ids[:, start:] == eos).int() == 0  # (K, T): up to the first EOS
        texts = self.tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        wanted = [*self.tokenizer(target).input_ids, eos]
        target_ids = torch.cat([prompt, torch.tensor([wanted])], 1)  # (1, P + its own T)

        rewards = torch.tensor([reward(text, target) for text in texts])  # (K,)
        predicted, disc_loss = self.update_discriminator(ids, start + mask.sum(1) - 1, rewards, target_ids)
        total = rewards + ADVERSARIAL * predicted
        advantages = total - (total.sum() - total) / (K - 1)  # against the mean of the others (leave one out)
        gen_loss = self.update_generator(ids, mask, advantages, target_ids, start)
        return {"reward": rewards.mean().item(), "discriminator_loss": disc_loss, "generator_loss": gen_loss}

    @torch.no_grad()
    def sample(self, prompt: Tensor) -> Tensor:
        """(K, P + T) prompt and completions at temperature 1, EOS behind the end."""
        self.model.set_adapter("generator")
        settings = {"do_sample": True, "top_k": 0, "num_return_sequences": K, "max_new_tokens": NEW_TOKENS}
        pad = self.tokenizer.eos_token_id
        ids: Tensor = self.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), pad_token_id=pad, **settings
        )
        return ids

    def score(self, ids: Tensor, last: Tensor) -> Tensor:
        """(rows,) the head at each row's last token; padding behind it has no influence."""
        hidden = self.model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        scores: Tensor = self.score_head(hidden[torch.arange(len(ids)), last]).squeeze(-1)
        return scores

    def update_discriminator(
        self, ids: Tensor, last: Tensor, rewards: Tensor, target_ids: Tensor
    ) -> tuple[Tensor, float]:
        """Regress the reward; return the scores from before the update, and the loss."""
        self.model.set_adapter("discriminator")
        scores = self.score(ids, last)
        target_score = self.score(target_ids, torch.tensor([target_ids.shape[1] - 1]))
        loss = F.mse_loss(torch.cat([scores, target_score]), torch.cat([rewards, torch.ones(1)]))
        self.discriminator_optimizer.zero_grad()
        loss.backward()  # before switching: the other adapter's mode would give no gradient
        self.discriminator_optimizer.step()
        return scores.detach(), loss.item()

    def logprobs(self, ids: Tensor, start: int) -> Tensor:
        """(rows, T) log-probability of each token behind the prompt."""
        logits: Tensor = self.model(input_ids=ids).logits[:, start - 1 : -1]
        return logits.log_softmax(-1).gather(-1, ids[:, start:, None]).squeeze(-1)

    def update_generator(self, ids: Tensor, mask: Tensor, advantages: Tensor, target_ids: Tensor, start: int) -> float:
        """REINFORCE on the samples and cross-entropy on the target, both a mean over tokens."""
        self.model.set_adapter("generator")
        policy = -(advantages[:, None] * self.logprobs(ids, start) * mask).sum() / mask.sum()
        supervised = -self.logprobs(target_ids, start).mean()
        loss = POLICY * policy + SUPERVISED * supervised
        self.generator_optimizer.zero_grad()
        loss.backward()
        self.generator_optimizer.step()
        return loss.item()


def main(steps: int = 60, seed: int = 0) -> list[dict[str, float]]:
    """Train; print and return the numbers of each step."""
    torch.manual_seed(seed)
    gan = MinimalGAN()
    history = []
    for step in range(steps):
        country, capital = FACTS[step % len(FACTS)]
        metrics = gan.step(f"What is the capital of {country}?", f"The capital of {country} is {capital}.")
        print(f"step {step:3d}", *(f"{name} {value:.3f}" for name, value in metrics.items()))
        history.append(metrics)
    return history


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    main(parser.parse_args().steps)
