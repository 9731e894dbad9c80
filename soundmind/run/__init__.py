"""A training run from configuration to summary.

May import every room. Read first: `config.py`, then `train.py`.
"""
