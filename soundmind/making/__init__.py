"""Data of one's own: each stage of `soundmind.make_data` in a file.

May import `task`, `system`, `model`, `data`, `standin`, `speech`. Read first: `stages.py`, then
`triples.py`, `words.py` and `reasoning.py`.
"""
