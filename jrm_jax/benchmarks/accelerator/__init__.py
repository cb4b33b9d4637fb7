"""What an accelerator can do: `python -m jrm_jax.benchmarks.accelerator`. The command
(`__main__`), its measurements in a table (`parts`), what they measure (`case`), one file a side
(`ours`, `theirs`), whole commands (`commands`), and the page made from the numbers (`page`)."""
