"""Turn published annotations and clips into the Parquet files that verl trains on.

    python -m soundmind.preprocess --mode audio                       # every split of data/alr
    python -m soundmind.preprocess --mode text --splits dev --data-dir DIR
    python -m soundmind.preprocess --mode audio --data-dir SoundMind-RL/SoundMindDataset
    python -m soundmind.preprocess --mode audio --task practice       # the stand-in's clips

Reads   annotations and clips in the GitHub or the Hugging Face layout (soundmind.data.sources)
Writes  <output-dir>/<mode>/{train,dev,test}.parquet, rows in annotation order, and report.json

Every line is checked before anything is written. With `--on-error fail` (default) any fault means:
a table of all faults, nothing written, exit status 2. With `skip` faulty lines are left out, listed
in the report, and counted on the last line printed. Files appear under their final names complete
or not at all; a run that was killed is picked up by the next one, and a run whose inputs, options
and outputs are unchanged does nothing. The output is the same for any number of workers.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soundmind.data.job import FAULTS_SHOWN, BadInput
from soundmind.data.preprocess import BASE_MODEL, make_job, make_parquet
from soundmind.system.errors import command
from soundmind.task.schema import MODES, SPLITS, TASKS

_DROP_OVERLAP: dict[str, Any] = {
    "nargs": "?",
    "const": "question",
    "choices": ("question", "premise"),
    "help": "leave rows out of train (then dev) whose question, or major premise, is in a later "
    "split; test always stays whole",
}
_TOKENIZER_HELP = (
    "checkpoint folder or Hub id whose tokens are counted, or `none` "
    f"(default: checkpoints/tiny for practice, else {BASE_MODEL} if at hand)"
)


# -- the command --------------------------------------------------------------------------------


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 0 written or up to date, 2 bad input or usage."""
    arguments = parse_arguments(argv)
    try:
        return make_parquet(make_job(**vars(arguments)))
    except BadInput as error:
        print(error.report(arguments.list_all))
    except OSError as error:
        if error.filename is not None:
            raise  # of a file: `command` says what to do
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    return 2


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Command line of `python -m soundmind.preprocess`."""
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.preprocess",
        description="Turn annotations and clips into the Parquet files that verl trains on.",
    )
    add = parser.add_argument
    add("--mode", required=True, choices=MODES, help="what a prompt carries beside the instruction")
    add("--task", default="alr", choices=TASKS, help="which written instruction (default: alr)")
    add("--data-dir", help="folder or Hub data set id (default: data/alr or data/practice)")
    add("--output-dir", type=Path, help="default: the folder `parquet` in the data folder")
    add("--splits", nargs="+", default=list(SPLITS), choices=SPLITS, help="default: all three")
    add("--on-error", default="fail", choices=("fail", "skip"), help="what a faulty row means")
    add("--embed-audio", action="store_true", help="store the clips' own bytes in the Parquet")
    add("--workers", type=int, help="processes (default: one per core, at most 8)")
    add("--drop-overlap", **_DROP_OVERLAP)
    add("--tokenizer", help=_TOKENIZER_HELP)
    add("--questions-only", action="store_true", help="neither fetch nor measure recorded answers")
    add("--list-all", action="store_true", help=f"list every fault, not {FAULTS_SHOWN} of a kind")
    arguments = parser.parse_args(argv)
    if arguments.workers is not None and arguments.workers < 1:
        parser.error(f"--workers must be at least 1, got {arguments.workers}")
    if arguments.embed_audio and arguments.mode == "text":
        print("note: text mode has no clips, --embed-audio changes nothing", file=sys.stderr)
        arguments.embed_audio = False
    return arguments


if __name__ == "__main__":
    sys.exit(main())
