"""From a user's files or the built-in world to batches: `schema.py` is one example, `pipeline.py`
one batch.

`builders.py` is the command; `ingest/` reads a user's files, `world/` draws the built-in world.
"""
