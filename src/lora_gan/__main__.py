"""``python -m lora_gan`` is the same program as ``lora-gan``."""

from lora_gan.cli import main

if __name__ == "__main__":
    main()
