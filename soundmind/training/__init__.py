"""verl's classes with ours in their place; with `plugin` the only room that imports verl.

May import every room from `task` to `plugin`. Read first: `trainer.py`, then
`agent_loop.py` and `engine.py`.
"""
