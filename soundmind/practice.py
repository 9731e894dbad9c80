"""Speak the practice set: syllogisms whose label can only be heard, in the authors' layout.

    python -m soundmind.practice --output data/practice              # 6,000 rows, under 1 GB
    python -m soundmind.practice --output data/practice --verify     # compare every file's digest
    python -m soundmind.practice --sample data/sample                # the committed two dozen rows

Writes, exactly as the real data set is laid out,

    {train,dev,test}.jsonl                    id, user_content, answer, label
    {train,dev,test}/NNNN/question.wav        user_content spoken, 16 kHz
    {train,dev,test}/NNNN/answer_{label}.wav  answer spoken, 8 kHz to keep the set small
    voices.jsonl                              how each question was spoken: voice, speed, pitch ...
    manifest.json                             seed, settings, digests, counts, controls

The language is that of soundmind.standin.syllogism. Half of the rows of each split are entailed. Sixteen
voices speak train and dev; half of the test clips are in five voices that occur nowhere else.
Speed, pitch, loudness and the silence around the sentence vary from clip to clip.

What it shows: with audio prompts the text is one constant instruction, so without the clip nothing
beats 50 %; one comparison of words reaches 75 %; more needs both. What it cannot show: four nouns,
one form and 240 sentences that occur in every split make held-out clips new recordings, not new
sentences, and synthetic voices are easier than people.

Controls: `length_control` is the best that clip length alone can do (in the manifest, near 50 %).
`swapped_partners` pairs clips with rows so that whoever follows the sound scores 50 %.

A row is a function of (seed, split, index) alone: the same bytes whatever the number of rows and
workers. A split's `.jsonl` appears only when all its clips are there; a killed run is continued by
the next one, and a complete set is left as it is.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from soundmind.standin.practice import MANIFEST, ROWS, SAMPLE_ROWS, build_practice, verify
from soundmind.system.errors import command


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Command line; see the module docstring."""
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.practice", description="Speak the practice set."
    )
    parser.add_argument("--output", type=Path, default=Path("data/practice"))
    parser.add_argument("--seed", type=int, default=0)
    for split, count in ROWS.items():
        parser.add_argument(f"--{split}", type=int, default=count, help=f"rows ({count})")
    parser.add_argument("--workers", type=int, default=None, help="processes (one per core)")
    parser.add_argument("--sample", type=Path, metavar="DIR", help="write the two dozen rows here")
    parser.add_argument("--verify", action="store_true", help="read every file, write nothing")
    arguments = parser.parse_args(argv)
    if arguments.verify:
        different = verify(arguments.output)
        for split in different:
            print(
                f"{arguments.output / split}: differs from {MANIFEST}. Delete "
                f"{arguments.output} and run this command without --verify",
                file=sys.stderr,
            )
        if not different:
            print(f"{arguments.output}: every file as in {MANIFEST}")
        return 1 if different else 0
    rows = {split: getattr(arguments, split) for split in ROWS}
    for split, count in rows.items():
        if count < 2:
            parser.error(f"--{split} {count}: a split needs at least two rows")
    if arguments.sample is not None:
        build_practice(arguments.sample, seed=arguments.seed, rows=SAMPLE_ROWS, workers=1)
    else:
        build_practice(arguments.output, seed=arguments.seed, rows=rows, workers=arguments.workers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
