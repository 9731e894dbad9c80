"""Qwen2.5-Omni as files: folders, parts, adapters, checkpoints, exports, processor, tokens.

May import `system`. Read first: `parts.py`, then `features.py` and `tokens.py`.
"""
