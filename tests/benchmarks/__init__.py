"""Speed of the tree, the sampler and a whole step against the usual alternatives.

From the root of the repository, with ``pip install trl==1.16.0`` for the steps (nothing else needs it)::

    python -m tests.benchmarks                    # both sizes, five pairs of each: 25 minutes on 2 cores
    python -m tests.benchmarks --size builtin     # the size of the built-in base only: 2 minutes
    python -m tests.benchmarks --only tree sampler --repeats 9 --json speed.json
    python -m tests.benchmarks --size builtin --only workers --threads 1    # two processes, pip install ray: 5 minutes

The two sides take turns (A B A B …) in one process; each ratio is of one such pair, so other load
on the machine affects both. The first pair warms up and does not count. On a busy machine threads wait for each other
and wall time is unreliable: with ``--threads 1`` CPU time is measured. Generations with workers are measured
in wall time, all of one process before all of two workers: the machine must be idle.

Both sides have the same random weights, prompts, LoRA (r = 8, all linear layers), temperature 1, float32, no dropout,
and produce completions of exactly the same length: the bias of the last layer norm and the row of EOS in the (tied)
embeddings are set so that EOS is never drawn.
"""
