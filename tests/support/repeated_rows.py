"""A prepared file of a few rows, with every row as often as a large batch needs."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def repeat_rows(file: Path, times: int) -> None:
    """Write the rows of `file` `times` times over; what stands beside the rows is kept."""
    table = pq.read_table(file)
    pq.write_table(pa.concat_tables([table] * times), file)
