"""Checkpointing: what a checkpoint of a run holds, checkpoint files, and adapter folders."""
