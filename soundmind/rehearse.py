"""Rehearse a configuration on this machine before anything is rented: no GPU, no weights, minutes.

    python -m soundmind.rehearse --config-name grpo_7b_8gpu
    python -m soundmind.rehearse --config-name grpo_3b_1gpu --published checkpoints/Qwen2.5-Omni-3B
    python -m soundmind.rehearse --config-name grpo_7b_8gpu modality=mixed train.audio_tower=false

Takes the published small files of the configuration's model (16 MB: vocabulary, template, processor,
configuration, index; fetched, or from a folder), puts narrow random weights under them and runs the
configuration with only what this machine forces changed, each change printed: two steps through verl
and vLLM with audio, text and dual rows, a failed session and padding; export; reload in transformers
and vLLM; eight rows of an evaluation. The table at the end says what held and what was not rehearsed.

Writes  <output>/<config>/, with rehearsal.json last
Exit status: 0 all held, 1 something did not, 2 bad input or a stage that ended with an error.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from soundmind.system.errors import command


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.rehearse",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-name", required=True)
    parser.add_argument("--published", type=Path, help="folder with the published small files")
    parser.add_argument("--output", type=Path, default=Path("outputs/rehearsal"))
    parser.add_argument("--minutes", type=float, default=20, help="limit of each stage")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, key=value")
    arguments = parser.parse_args(argv)
    from soundmind.run import rehearsal
    from soundmind.run.config import compose_config
    from soundmind.standin import narrow

    config = compose_config(arguments.config_name, arguments.overrides)
    published = arguments.published
    if published is None:
        model = Path(str(config.actor_rollout_ref.model.path))
        published = model if model.is_dir() else narrow.fetch_small_files(f"Qwen/{model.name}")
    report = rehearsal.rehearse(
        config,
        arguments.config_name,
        arguments.overrides,
        published,
        arguments.output,
        limit=60 * arguments.minutes,
    )
    width = max(len(what) for what, _ in report.rows)
    print()
    for what, found in report.rows:
        print(f"{what:<{width}}  {found}")
    print(f"{'seconds':<{width}}  " + ", ".join(f"{k} {v:.0f}" for k, v in report.seconds.items()))
    print("not rehearsed: " + "; ".join(rehearsal.NOT_REHEARSED))
    for problem in report.problems:
        print(f"does not hold: {problem}", file=sys.stderr)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
