"""The backbone: Qwen2.5-VL and Qwen3-VL as Flax modules, weights from a Hugging Face folder.

Begin at `backbone.py`; `weights.py` reads the folder. Nothing outside this room imports flax.
"""
