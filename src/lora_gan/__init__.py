"""lora-gan: adversarial, reward-guided fine-tuning of one frozen language model with two LoRA adapters."""
