"""Is lora-gan right and fast on this device?

From the root of the repository::

    python -m tests.gpu                         # all rows that fit this device: under 10 minutes on one H100
    python -m tests.gpu --only tree sample      # some groups
    python -m tests.gpu --large --json gpu.json # also 8B shapes; all numbers to a file

Each row is a measurement on the real parts of the library with its threshold, and PASS, FAIL or SKIP with the reason.
The exit code is 1 if a row fails. No network is needed: the large models have the configurations of Qwen3 and random
weights, made on the device. On a CPU the models are small, and speed is measured but not judged.
"""
