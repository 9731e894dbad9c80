"""Score saved responses again; and the place by which verl names the reward.

    python -m soundmind.rewards outputs/run/rollouts/100.jsonl
    python -m soundmind.rewards predictions.jsonl --preset guarded --output rescored.jsonl
    python -m soundmind.rewards rollouts/*.jsonl --config configs/grpo.yaml --length-unit words

What is read and printed: `soundmind.task.rescore`. What a response earns, and how
`reward.custom_reward_function` names it: `soundmind.task.reward`. Importing this module needs the
standard library alone.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from soundmind.system.errors import command
from soundmind.system.files import replacing
from soundmind.task.labels import LabelSet
from soundmind.task.rescore import component_table, read_saved, rescore
from soundmind.task.reward import compute_score
from soundmind.task.reward_settings import PRESETS, resolve

__all__ = ["LabelSet", "compute_score", "main"]  # documented names, handed on


def _write_lines(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines whole or not at all."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps({k: v for k, v in line.items() if k != "row"}) + "\n")


def _kwargs_from_config(path: Path) -> dict[str, Any]:
    """`reward.custom_reward_function.reward_kwargs` of a YAML file, as plain containers."""
    from omegaconf import OmegaConf

    node = OmegaConf.select(OmegaConf.load(path), "reward.custom_reward_function.reward_kwargs")
    if node is None:
        raise ValueError(f"{path}: no reward.custom_reward_function.reward_kwargs in it")
    plain: dict[str, Any] = OmegaConf.to_container(node, resolve=True)  # type: ignore[assignment]
    return plain


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.rewards",
        description="Score saved responses again and print what every component earned.",
    )
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.jsonl")
    parser.add_argument("--config", type=Path, help="YAML whose reward_kwargs to use")
    parser.add_argument("--preset", choices=list(PRESETS), help="default: the config's, or paper")
    parser.add_argument("--length-unit", choices=["tokens", "words"], help="default: tokens")
    parser.add_argument("--labels", help="other labels, comma-separated: A,B,C,D")
    parser.add_argument("--output", type=Path, help="write the lines with their new scores here")
    return parser


LINES_SHOWN = 10  # of those that were passed over


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module docstring. Returns 2 for input that cannot be read."""
    options = _parser().parse_args(argv)
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s: %(message)s")
    try:
        kwargs = _kwargs_from_config(options.config) if options.config else {}
        if options.preset:
            kwargs["preset"] = options.preset
        if options.length_unit:
            kwargs["length_unit"] = options.length_unit
        if options.labels:
            kwargs["labels"] = options.labels.split(",")
        reward = resolve(**kwargs)
        faults: list[str] = []
        graded = [
            line
            for path in options.files
            for line in rescore(read_saved(path, reward.labels, faults), **kwargs)
        ]
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for fault in faults[:LINES_SHOWN]:
        print(fault, file=sys.stderr)
    if not graded:
        print(f"{options.files[0]}: no responses in it", file=sys.stderr)
        return 2
    if faults:
        print(f"{len(faults)} lines were passed over, {len(graded)} are graded", file=sys.stderr)

    sources = sorted({str(line.get("data_source", "")) for line in graded})
    for source in sources:
        part = [line for line in graded if str(line.get("data_source", "")) == source]
        of = f" of {source}" if source else ""
        print(f"{len(part)} responses{of}, preset {reward.preset}, labels {reward.labels.name}")
        print(component_table(part, reward), end="\n\n")
    if options.output:
        _write_lines(options.output, graded)
        print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
