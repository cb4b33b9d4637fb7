"""What a config costs before a chip is paid for: memory, FLOPs, traffic, the fastest step possible.

Begin at `fitting.py`; `compiling.py` compiles for chips that are not there. The command is
`jrm_jax/aot.py`.
"""
