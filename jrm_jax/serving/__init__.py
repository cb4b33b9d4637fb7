"""What a trained model does: scores and critiques. Begin at `reward_model.py`.

`trained.py` reads a model from the disk, `groups.py` says what is scored, `ladder.py` and `programs.py`
which programs there are, `device_call.py` runs them; `generate.py` writes critiques, `sheet.py` draws
results.
"""
