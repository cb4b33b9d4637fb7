"""Public benchmarks: their files become `cases.py`'s Case, a model's answers become numbers.

Begin at `layouts.py`, the table of benchmarks; each has a file. The command is
`jrm_jax/evaluate.py`.
"""
