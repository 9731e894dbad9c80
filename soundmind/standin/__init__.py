"""The practice set and the small model: everything runs without a GPU and without downloads.

May import `task` to `planning`. Read first: `practice.py`, then `tiny.py`.
"""
