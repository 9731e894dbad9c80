"""One run of preprocessing: what is to be made, and what is known of each split on the way."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from soundmind.data import statistics
from soundmind.data.scan import RowOptions
from soundmind.data.sources import Fault, SplitSource
from soundmind.task.schema import Split

if TYPE_CHECKING:
    import pyarrow as pa

FAULTS_SHOWN = 50  # of each kind; --list-all shows the rest
REPORT_FORMAT = 1


@dataclass(frozen=True)
class Job:
    """One run of the command, its arguments resolved."""

    root: Path
    folder: Path  # <output-dir>/<mode>
    splits: tuple[Split, ...]
    options: RowOptions
    tokenizer: str | None
    on_error: str
    embed_audio: bool
    drop_overlap: str | None  # "question" or "premise": what is compared
    workers: int
    list_all: bool

    @property
    def work(self) -> Path:
        """Unfinished work, and a lock; gone when a run has ended by itself."""
        return self.folder / ".work"

    def parquet(self, split: str) -> Path:
        """Final name of a split's rows."""
        return self.folder / f"{split}.parquet"


@dataclass
class ScannedSplit:
    """A split after every line was looked at; `keep` says which of the fault-free rows stay."""

    source: SplitSource
    parts: list[Path] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    facts: pa.Table | None = None  # one line a fault-free row, see statistics.facts_of_part
    faults: list[Fault] = field(default_factory=list)
    faulty: list[tuple[int, str, str]] = field(default_factory=list)  # line, place, id
    keep: Any = None  # bool array over facts
    overlap_dropped: list[str] = field(default_factory=list)
    num_lines: int = 0

    @property
    def rows(self) -> pa.Table:
        """`facts`, of a split that was scanned and not only fingerprinted."""
        assert self.facts is not None, self.source.split
        return self.facts

    @property
    def fingerprint(self) -> str:
        """Hash of everything that goes into the split's rows."""
        return hashlib.sha256("\n".join(self.keys).encode()).hexdigest()


class BadInput(Exception):
    """Faults were found and the run was told to fail on them."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__(f"{len(faults)} faults")
        self.faults = faults

    def report(self, list_all: bool = False) -> str:
        """The table of faults and what to do about them."""
        table = statistics.fault_table(self.faults, None if list_all else FAULTS_SHOWN)
        return (
            f"{table}\n\n{len(self.faults)} faults "
            f"({counts_text(statistics.count_faults(self.faults))}); nothing written. "
            "Mend the data, or leave these rows out with --on-error skip"
        )


def counts_text(counts: dict[str, int]) -> str:
    """Counts by kind, on one line."""
    return ", ".join(f"{kind} {count}" for kind, count in counts.items())
