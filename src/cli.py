"""``python -m src.cli`` from a checkout is the same program as the installed ``lora-gan``."""

from lora_gan.cli import main

if __name__ == "__main__":
    main()
