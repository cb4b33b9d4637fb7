"""What a trained model does: scores and critiques. Begin at `reward_model.py`.

`trained.py` reads a model from the disk and `groups.py` what is to be scored; `ladder.py` and
`programs.py` say in which static sizes, and `device_call.py` runs them. `generate.py` writes
critiques, `sheet.py` draws results.
"""
