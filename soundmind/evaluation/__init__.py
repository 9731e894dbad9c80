"""Ask a checkpoint, grade its answers, compare, and show them.

May import every room but `training`, `standin` and `run`. Read first: `evaluate.py`, then `grade.py`.
"""
