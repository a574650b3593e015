"""Evolution of LoRA weights: a population of generators on one frozen base."""
