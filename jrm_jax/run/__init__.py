"""A run around its training: its folder, who may write there, what is checked before it begins.

Begin at `workdir.py`; `check_config.py` has what every field may be, `backbones.py` finds the
backbone by name, `flops.py` counts what a group costs, `buckets.py` chooses static sizes by it,
`programs.py` compiles, `held_out.py` evaluates;
`saved.py` knows which checkpoints there are.
"""
