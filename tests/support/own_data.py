"""Running `soundmind.make_data` in tests, and what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def arguments(output: Path, source: Path, url: str, *more: str) -> list[str]:
    """Command line with short answers allowed and no Parquet unless asked for."""
    base = ["--output", str(output), "--source", str(source), "--teacher-url", url]
    return [*base, "--teacher-model", "m", "--workers", "2", "--tokenizer", "none", *more]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def contents(output: Path) -> dict[str, bytes]:
    """Every published file; of the report what does not depend on tries that were lost."""
    files = {
        path.relative_to(output).as_posix(): path.read_bytes()
        for path in sorted(output.rglob("*"))
        if path.is_file() and path.relative_to(output).parts[0] not in ("work", "report.json")
    }
    report = json.loads((output / "report.json").read_text())
    del report["stages"]["reasoning"]["spent"]
    parquet = "parquet/audio/report.json"
    known = json.loads(files[parquet])
    for split in known["splits"].values():
        del split["input"]["fingerprint"]  # of the clips' times
    return {
        **files,
        parquet: json.dumps(known).encode(),
        "report.json": json.dumps(report).encode(),
    }
