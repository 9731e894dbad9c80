"""Run preprocessing in this process and read what it wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from soundmind import preprocess


def prepare_data(root: Path, *arguments: str, mode: str = "audio") -> int:
    """Exit status of `python -m soundmind.preprocess`."""
    command = ["--mode", mode, "--data-dir", str(root), "--tokenizer", "none", "--workers", "1"]
    return preprocess.main([*command, *arguments])


def rows_of(root: Path, split: str, mode: str = "audio") -> list[dict[str, Any]]:
    """Rows of a prepared split."""
    return pq.read_table(root / "parquet" / mode / f"{split}.parquet").to_pylist()


def report_of(root: Path, mode: str = "audio") -> dict[str, Any]:
    """The report beside them."""
    return json.loads((root / "parquet" / mode / "report.json").read_text("utf-8"))


def content_of(root: Path) -> dict[str, bytes]:
    """Every file that was written."""
    files = sorted(path for path in (root / "parquet").rglob("*") if path.is_file())
    return {str(path.relative_to(root)): path.read_bytes() for path in files}


def edit_line(path: Path, index: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Change one annotation."""
    lines = path.read_text("utf-8").splitlines()
    record = json.loads(lines[index])
    change(record)
    lines[index] = json.dumps(record)
    path.write_text("\n".join(lines) + "\n", "utf-8")
