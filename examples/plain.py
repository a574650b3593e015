"""The exported generator with plain transformers and PEFT, without lora-gan: are the answers those of ``generate``?

python examples/plain.py answers.jsonl merged      # a merged model
python examples/plain.py answers.jsonl exported    # a PEFT adapter, on the base that its adapter_config.json names
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(answers: str, folder: str) -> None:
    """Complete the first user turns of the rows in ``answers`` and compare."""
    adapter = Path(folder, "adapter_config.json").is_file()
    model = (AutoPeftModelForCausalLM if adapter else AutoModelForCausalLM).from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in Path(answers).read_text(encoding="utf-8").splitlines()]
    equal = 0
    for row in rows:
        question = row["messages"][:-1]
        ids = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**ids, max_new_tokens=64, do_sample=False)
        answer = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        equal += answer.strip() == row["completion"].strip()
        print(f"{question[-1]['content']}  {answer.strip()}")
    print(f"{folder}: {equal} of {len(rows)} answers as generate gives them")
    if equal < len(rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
