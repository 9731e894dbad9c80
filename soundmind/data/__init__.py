"""Annotations and sound to Parquet, and back to clips and prompts.

May import `task`, `system`, `model`. Read first: `rows.py`, then `clips.py` and `audio.py`.
"""
