"""A user's files become groups in a prepared data set. Begin at `building.py`.

`layout.py` is what every kind of source answers; each kind has a file: `pairs`, `judged`,
`records`, `table`.
"""
