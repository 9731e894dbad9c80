"""Look at one prepared row as the model will get it, and listen to it.

    python -m soundmind.inspect data/alr/parquet/audio/dev.parquet
    python -m soundmind.inspect data/practice/parquet/audio/train.parquet --row 7 --model DIR

Shows the rendered chat template, tokens by kind, durations and what the reward compares with, and
writes the clip as the model hears it: mono, 16 kHz.

    clip          placeholder tokens of the sound, 25 a second
    question      written question, in the modes that have one
    instruction   what every mode ends on
    system        system line
    frame         everything else: the chat template's own tokens

Reads   the Parquet file, its clip, and chat template and tokenizer of `--model` (a checkpoint
        folder); without one the template's published form is shown and words are counted
Writes  <output-dir>/<split>-<id>.wav
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from soundmind.data.audio import ClipError
from soundmind.data.inspect import default_model, describe_row, write_clip
from soundmind.data.rows import read_row
from soundmind.system.errors import command


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns 0, or 2 where there is nothing to show."""
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.inspect", description="Show a prepared row as the model gets it."
    )
    add = parser.add_argument
    add("parquet", type=Path, help="file written by soundmind.preprocess")
    add("--row", type=int, default=0, help="position in the file, from 0 (default: 0)")
    add("--model", type=Path, help="checkpoint folder with chat template and tokenizer")
    add("--audio-root", help="folder that clip paths are relative to, if the data was moved apart")
    add("--output-dir", type=Path, default=Path("outputs/inspect"), help="where the wav goes")
    arguments = parser.parse_args(argv)
    try:
        row = read_row(str(arguments.parquet), arguments.row, arguments.audio_root)
        print(describe_row(row, arguments.model or default_model(row), str(arguments.parquet)))
        if row["_clip"] is not None:
            print(f"clip written to {write_clip(row, arguments.output_dir)}")
    except (OSError, IndexError, ClipError, ValueError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # of a file: `command` says what to do
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (KeyError, TypeError) as error:
        print(
            f"error: {arguments.parquet} has another layout inside its rows ({error!r}). Make it with: "
            "python -m soundmind.preprocess",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
