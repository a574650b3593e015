"""Straight-through coupling: a gradient from discriminator to generator through relaxed samples."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from lora_gan.backbone import Backbone, Predicted
from lora_gan.discriminator.models import DiscriminatorModel
from lora_gan.discriminator.objectives import SAMPLED
from lora_gan.errors import LoraGANError
from lora_gan.head import in_use, product
from lora_gan.losses import straight_through
from lora_gan.tensors import scaled_gradient
from lora_gan.types import DiscriminatorBatch, PromptBatch, Rollout


class StraightThrough:
    """−log P(close), P = σ(score), differentiated through straight-through Gumbel samples (arXiv 1611.01144).

    The discriminator reads the sampled tokens; the gradient at their embeddings is passed on to the generator's
    distribution of each token. The end of a completion is not differentiated.

    Args:
        temperature: Temperature of the relaxation.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        if not temperature > 0:
            raise LoraGANError(f"temperature of the straight-through samples must be > 0, got {temperature}")
        self.temperature = temperature

    def __call__(
        self, backbone: Backbone, model: DiscriminatorModel, predicted: Predicted, rollout: Rollout, batch: PromptBatch
    ) -> Tensor:
        """Mean loss of the completions; its gradient reaches the generator only.

        Args:
            backbone: The backbone, in any mode.
            model: A differentiable model, such as ``AdapterDiscriminator``.
            predicted: The generator's pass over the sampled completions, with gradient.
            rollout: The sampled completions.
            batch: Their prompts and targets.
        """
        completions = {SAMPLED: rollout.ended(len(batch), backbone.tokenizer.eos_token_id)}
        tree = model.tree(backbone, DiscriminatorBatch(batch.prompt_ids, batch.target_ids, completions))
        ids = rollout.ids[rollout.mask]
        is_word = rollout.mask.clone()
        last = rollout.mask.sum(-1) - 1
        is_word[torch.arange(len(last)), last] = rollout.truncated  # EOS is not differentiated
        branches = tree.branches[SAMPLED]
        rows = branches.row[:, None].expand_as(is_word)[is_word]
        columns = branches.columns[:, : is_word.shape[1]][is_word]

        with model.mode(backbone):
            table = in_use(backbone.word_embeddings())
            embedded = backbone.causal_lm.get_input_embeddings()(tree.ids).detach().requires_grad_()
            loss = -logsigmoid(model.score_embedded(backbone, tree, embedded)[SAMPLED][:, 0]).mean()
            gradient = scaled_gradient(loss, embedded)
        slope = gradient.new_zeros(len(ids), gradient.shape[-1])
        slope[is_word[rollout.mask]] = gradient[rows, columns]
        passed_on = (predicted.logits.source * self._at_source(predicted, ids, slope, table)).sum()
        result: Tensor = loss.detach() + passed_on - passed_on.detach()
        return result

    def _at_source(self, predicted: Predicted, ids: Tensor, slope: Tensor, table: Tensor) -> Tensor:
        """The gradient at the source of the logits, a few tokens at a time: of each there are numbers for all words.

        Args:
            predicted: Of n tokens.
            ids: (n,) the tokens.
            slope: (n, H) gradient at their embeddings.
            table: (V, H) all embeddings.
        """
        parts = []
        for chunk in predicted.logits.chunks():
            uniform = torch.rand(chunk.logits.shape, device=ids.device).clamp_(1e-9, 1 - 1e-7)
            logits, at_words = chunk.logits / predicted.temperature, product(slope[chunk.rows], table.T).float()
            found = straight_through(logits, ids[chunk.rows], self.temperature, uniform, at_words)
            parts.append(chunk.at_source(found) / predicted.temperature)
        return torch.cat(parts)
