"""The controlled study of joint training in the built-in world: `python -m jrm_jax.study`.

Begin at `cells.py` (which runs); `runner.py` makes them, `report.py` writes docs/study.md.
The second part begins at `regimes.py`; `regimes_report.py` writes docs/regimes.md.
"""
