"""Prompt tree: one prompt and many branches in one row.

A step evaluates K sampled completions, the target and some negatives for each prompt. Separate rows would compute the
prompt again for each of them. Here they share it::

    [ prompt | completion 1 | completion 2 | … | target | negatives ]      ids            (L,)
      0..P-1   P..        P..            P..      P..         position_ids   (L,)
      0        1          2              …        …           segments       (L,)

A token attends only to the prompt and to the earlier tokens of its own branch, so each branch is computed as if it were
the only one after the prompt: logits, losses and gradients equal those of separate rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from lora_gan.tensors import lengths_mask, pad

PROMPT, PADDING = 0, -1  # segments; branches count from 1


@dataclass(frozen=True)
class Branches:
    """All branches of one kind (sampled, target, …) of all trees, prompt by prompt."""

    row: Tensor  # (M,) index of each branch's tree
    ids: Tensor  # (M, T) tokens of each branch, 0 after its end
    mask: Tensor  # (M, T) bool: True on its tokens
    columns: Tensor  # (M, T) column of each token in its tree, 0 where masked
    parents: Tensor  # (M, T) column of the token before it, which predicts it, 0 where masked

    @property
    def last(self) -> Tensor:
        """Column of each branch's last token in its tree, (M,)."""
        return self.columns.amax(-1) if len(self.row) else self.row


@dataclass(frozen=True)
class PromptTree:
    """B prompts with their branches; ``branches`` names them by kind."""

    ids: Tensor  # (B, L)
    position_ids: Tensor  # (B, L) continue from the prompt in each branch
    segments: Tensor  # (B, L) PROMPT, 1, 2, … for the row's branches, PADDING
    branches: Mapping[str, Branches]

    @property
    def attention_mask(self) -> Tensor:
        """(B, 1, L, L) bool, True where the query (third axis) sees the key (fourth)."""
        query, key = self.segments[:, :, None], self.segments[:, None, :]
        not_after = self.position_ids[:, None, :] <= self.position_ids[:, :, None]
        return (((key == PROMPT) | (key == query)) & not_after)[:, None]


def grow(prompts: Sequence[Tensor], completions: Mapping[str, Sequence[Sequence[Tensor]]]) -> PromptTree:
    """Build the tree of a batch.

    Args:
        prompts: B token tensors (P,), none empty: a branch's first token is predicted from the prompt's last.
        completions: By kind, the branches of each prompt: token tensors (T,), none empty.

    Raises:
        ValueError: A prompt or a branch is empty.
    """
    _check(prompts, completions)
    return _grow(prompts, completions)


def grow_scored(prompts: Sequence[Tensor], completions: Mapping[str, Sequence[Sequence[Tensor]]]) -> PromptTree:
    """:func:`grow` without each branch's last token, for log-probabilities only: nothing is predicted from it.

    ``branches`` still holds all tokens of the branches, but their ``columns`` lack the last one.
    """
    _check(prompts, completions)
    tree = _grow(prompts, {kind: [[a[:-1] for a in row] for row in rows] for kind, rows in completions.items()})
    prompt_end = torch.tensor([len(p) for p in prompts], device=tree.ids.device) - 1
    branches = {}
    for kind, short in tree.branches.items():
        whole = [a for row in completions[kind] for a in row]
        length = torch.tensor([len(a) for a in whole], dtype=torch.long, device=tree.ids.device)
        mask = lengths_mask(length, max((len(a) for a in whole), default=0))
        parents = torch.cat([prompt_end[short.row, None], short.columns], 1)[:, : mask.shape[1]]
        ids = pad(whole) if whole else short.ids
        branches[kind] = replace(short, ids=ids, mask=mask, parents=torch.where(mask, parents, 0))
    return replace(tree, branches=branches)


def grow_parts(
    prompts: Sequence[Tensor], completions: Mapping[str, Sequence[Sequence[Tensor]]], parts: Iterable[Sequence[int]]
) -> list[PromptTree]:
    """:func:`grow_scored` for each part of the prompts, given by their indices."""
    return [
        grow_scored([prompts[b] for b in part], {kind: [rows[b] for b in part] for kind, rows in completions.items()})
        for part in parts
    ]


def _check(prompts: Sequence[Tensor], completions: Mapping[str, Sequence[Sequence[Tensor]]]) -> None:
    branches = (branch for rows in completions.values() for row in rows for branch in row)
    if any(len(tokens) == 0 for tokens in (*prompts, *branches)):
        raise ValueError("a prompt tree needs at least one token in the prompt and in each branch")


def _grow(prompts: Sequence[Tensor], completions: Mapping[str, Sequence[Sequence[Tensor]]]) -> PromptTree:
    shapes = {kind: [[len(a) for a in row] for row in rows] for kind, rows in completions.items()}
    rows, positions, segments = [], [], []
    for b, prompt in enumerate(prompts):
        branches = [branch for per_prompt in completions.values() for branch in per_prompt[b]]
        lengths = [len(branch) for branch in branches]
        rows.append(torch.cat([prompt, *branches]))
        positions.append(torch.cat([torch.arange(len(prompt)), *(len(prompt) + torch.arange(n) for n in lengths)]))
        segments.append(torch.repeat_interleave(torch.arange(len(lengths) + 1), torch.tensor([len(prompt), *lengths])))
    device = prompts[0].device
    return PromptTree(
        ids=pad(rows),
        position_ids=pad(positions).to(device),
        segments=pad(segments, PADDING).to(device),
        branches=_locate([len(p) for p in prompts], shapes, completions, device),
    )


def _locate(
    prompt_lengths: Sequence[int],
    shapes: Mapping[str, Sequence[Sequence[int]]],
    completions: Mapping[str, Sequence[Sequence[Tensor]]],
    device: torch.device,
) -> dict[str, Branches]:
    """Columns of the tokens of each branch; branches follow the prompt in the order of the kinds."""
    starts = list(prompt_lengths)
    located = {}
    for kind, per_prompt in shapes.items():
        begin: list[int] = []
        for b, lengths in enumerate(per_prompt):
            ends = list(accumulate(lengths, initial=starts[b]))
            begin += ends[:-1]
            starts[b] = ends[-1]
        row = torch.tensor([b for b, lengths in enumerate(per_prompt) for _ in lengths], dtype=torch.long)
        length = torch.tensor([n for lengths in per_prompt for n in lengths], dtype=torch.long)
        mask = lengths_mask(length, int(length.max()) if len(length) else 0)
        columns = torch.where(mask, torch.tensor(begin, dtype=torch.long)[:, None] + torch.arange(mask.shape[1]), 0)
        parents = torch.where(mask, columns - 1, 0)
        if parents.numel():
            parents[:, 0] = torch.tensor(prompt_lengths)[row] - 1
        ids = [branch for branches in completions[kind] for branch in branches]
        located[kind] = Branches(
            row.to(device),
            pad(ids) if ids else torch.zeros(0, 0, dtype=torch.long, device=device),
            mask.to(device),
            columns.to(device),
            parents.to(device),
        )
    return located
