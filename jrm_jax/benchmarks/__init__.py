"""Speed and endurance measurements, one command a file: `python -m jrm_jax.benchmarks.NAME`.

`docs/benchmarks.md` has what they printed. `make_tiny_backbone.py` is how the packaged backbone
was made; `reporting.py` is what the commands that write a page have in common.
"""
