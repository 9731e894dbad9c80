"""`python -m soundmind.evaluate` with answers from a formula instead of a model.

    python tests/support/evaluate_fake.py SECONDS_PER_ROW [--file-limit BYTES] ARGUMENTS...

For tests that kill it: everything but the model is the real command.
"""

from __future__ import annotations

import resource
import sys
import time

from soundmind import evaluate as soundmind_evaluate
from soundmind.evaluation import evaluate
from soundmind.evaluation.grade import prediction
from soundmind.evaluation.text import Answer


class FormulaBackend:
    """A different answer for every row, at a fixed pace."""

    def __init__(self, seconds_per_row: float, output) -> None:  # type: ignore[no-untyped-def]
        self.seconds_per_row, self.output = seconds_per_row, output

    def predict(self, batch, on_done):  # type: ignore[no-untyped-def]
        lines = []
        for example in batch:
            time.sleep(self.seconds_per_row)
            verdict = ("entailed", "not-entailed")[example.index % 2]
            text = f"<think>{'row ' * (example.index % 50 + 1)}</think>\nAnswer: {verdict}"
            answer = Answer(text, len(text.split()), "stop", 90, self.seconds_per_row)
            lines.append(prediction(example, answer, 0, self.output))
            on_done(1)
        return lines


if __name__ == "__main__":
    seconds, arguments = float(sys.argv[1]), sys.argv[2:]
    if arguments[0] == "--file-limit":
        limit = int(arguments[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        arguments = arguments[2:]
    evaluate.make_backend = lambda model, examples, settings, options, output: FormulaBackend(
        seconds, output
    )
    sys.exit(soundmind_evaluate.main(arguments))
