"""Run by tests/evaluation/test_evaluate_engine.py in a process of its own: every evaluation of one engine.

    python tests/support/evaluate_stand_in.py WORK

vLLM takes half a minute to start, so all cases share one engine through the real command's code;
only the moment of building it is replaced. WORK holds tiny/ and the Parquet files.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from soundmind.evaluation import evaluate
from soundmind.evaluation.store import PREDICTIONS

SHARED: list[evaluate.TextBackend] = []
BUILD = evaluate.make_backend


def shared_backend(model, examples, settings, options, output):  # type: ignore[no-untyped-def]
    if not SHARED:
        SHARED.append(BUILD(model, examples, settings, options, output))
    backend = SHARED[0]
    backend._output = output
    backend._engine.settings = replace(settings, max_model_len=backend._engine.max_model_len)
    return backend


def main() -> None:
    work = Path(sys.argv[1])
    evaluate.make_backend = shared_backend
    options = evaluate.Options(
        model=str(work / "tiny"),
        data=work / "parquet/audio/test.parquet",
        output_dir=work / "whole",
        max_tokens=24,
        batch_rows=3,
        max_model_len=400,
    )
    evaluate.evaluate(options)

    killed = work / "killed"  # as a kill in the third batch leaves it: six rows and a piece
    killed.mkdir()
    shutil.copy(work / "whole/config.yaml", killed)
    lines = (work / "whole" / PREDICTIONS).read_bytes().splitlines(keepends=True)
    (killed / PREDICTIONS).write_bytes(b"".join(lines[:7]) + lines[7][:40])
    evaluate.evaluate(replace(options, output_dir=killed))

    for mode in ("text", "dual"):
        data = work / f"parquet/{mode}/test.parquet"
        evaluate.evaluate(replace(options, data=data, output_dir=work / mode))

    for name in ("faulty", "embedded"):
        data = work / name / "audio/test.parquet"
        evaluate.evaluate(replace(options, data=data, output_dir=work / f"{name}_out"))

    sampled = replace(options, samples=3, limit=4, batch_rows=2)
    evaluate.evaluate(replace(sampled, output_dir=work / "sampled"))
    evaluate.evaluate(replace(sampled, output_dir=work / "sampled_again"))

    sys.stdout.flush()
    os._exit(0)  # past vLLM's leak warnings


if __name__ == "__main__":
    main()
