"""A model and a step as numbers: sizes, operations, memory, rules, the plan.

May import `system`, `model`, `data`. Read first: `plan.py`.
"""
