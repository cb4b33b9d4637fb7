"""The built-in world: scenes of shapes, edits with a gold score, words, pictures.

Begin at `scenes.py` (one example of preferences); `prepare.py` draws a data set of them.
"""
