"""A score under optimisation, where the truth is known: `python -m jrm_jax.rl`.

Begin at `editing.py` (what a policy chooses) and `policy.py` (how it chooses). `drawing.py` makes
pictures of it, `reward.py` has them scored by trained models, `gold.py` says what they are worth.
`base.py` makes the policy that all runs start from. `grpo.py` is one update, `training.py` the loop
over updates, `best_of_n.py` the optimiser without a loop. `runner.py` makes what a config asks for,
`numbers.py` and `report.py` the page.
"""
