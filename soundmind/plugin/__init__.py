"""How we enter other processes: entry points of verl, vLLM and torch, and every patch.

May import `model`. Read first: `environment.py`, then `patches.py`.
"""
