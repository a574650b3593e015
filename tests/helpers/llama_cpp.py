"""Checks that llama.cpp completes the prompts of a file as the file says, in a process of its own.

python tests/helpers/llama_cpp.py model.gguf predictions.jsonl 48     # needs pip install xllamacpp
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import xllamacpp  # type: ignore[import-not-found]


def main(model: str, predictions: str, length: str) -> None:
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.cpuparams.n_threads = model, 1024, 1, 1
    server = xllamacpp.Server(settings)
    for line in Path(predictions).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked = {"prompt": row["prompt"], "max_tokens": int(length), "temperature": 0}
        said = server.handle_completions(asked)["choices"][0]["text"]
        assert said == row["completion"], (said, row)


if __name__ == "__main__":
    main(*sys.argv[1:])
