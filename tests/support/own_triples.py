"""Triples of invented words in English sentences: no two share a premise, both labels as often."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

_PLACES = "river harbour forest village mountain bridge market island lake tower".split()  # noqa: SIM905


def own_triples(count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Plain triples, entailed where they are even."""
    generator = random.Random(seed)
    words: list[str] = []
    seen: set[str] = set()
    while len(words) < 4 * count:
        word = "".join(generator.choice("bdfgklmnprst") + generator.choice("aeiou") for _ in "abc")
        if word not in seen:
            seen.add(word)
            words.append(word + generator.choice("lmnr"))
    rows = []
    for i in range(count):
        kind, other, name, third = words[4 * i : 4 * i + 4]
        place = _PLACES[i % len(_PLACES)]  # so that the first rows do not depend on `count`
        rows.append(
            {
                "major": f"Every {kind} that lives near the {place} is a {other}",
                "minor": f"{name.capitalize()} is a {kind} that lives near the {place}",
                "conclusion": f"{name.capitalize()} is a {other if i % 2 == 0 else third}",
                "label": 1 - i % 2,
            }
        )
    return rows


def write_triples(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path
