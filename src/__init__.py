"""The import root of a source checkout; the package itself is ``lora_gan``."""
