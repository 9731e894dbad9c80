"""Prices on length that are not the paper's: components for `reward_kwargs.components`."""

from __future__ import annotations

from typing import Any


def overlong(response: str, row: dict[str, Any], *, limit: int, buffer: float = 0.2) -> float:
    """How far a response is into the last part of its budget, in [0, 1]; give it a negative weight.

    0 up to `limit` * (1 - `buffer`) tokens, 1 at `limit`. DAPO's soft overlong punishment
    (arXiv 2503.14476). A response of unknown length counts 0.
    """
    tokens = row.get("response_tokens")
    if tokens is None or tokens < 0:
        return 0.0
    width = max(1.0, limit * buffer)
    return min(1.0, max(0.0, (tokens - (limit - width)) / width))
