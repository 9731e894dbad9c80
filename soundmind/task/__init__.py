"""What is asked of the model, how a verdict is read, and what it earns.

Imports nothing of ours and needs the standard library alone. Read first: `prompts.py`, then `labels.py`,
then `reward.py`.
"""
