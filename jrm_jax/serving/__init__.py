"""What a trained model does: scores and critiques. Begin at `reward_model.py`.

`trained.py` reads a model from the disk, `groups.py` what is to be scored. `rows.py`, `ladder.py`
and `programs.py` say in which static sizes; `runner.py` brings groups through programs, with the
threads of `planned.py`; `placing.py` and `device_call.py` know the devices. `generate.py` writes
critiques, `sheet.py` draws results.
"""
