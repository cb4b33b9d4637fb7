"""What a trained model does: scores and critiques. Begin at `reward_model.py`.

`trained.py` reads a model from the disk, `generate.py` writes critiques, `sheet.py` draws results.
"""
