"""Files, machine and Hub: what any program needs, no word of the domain.

Imports nothing of ours. Read first: `files.py`.
"""
