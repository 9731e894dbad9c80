"""What a configuration needs and costs, before anything is bought, downloaded or started.

    python -m soundmind.plan --config-name grpo_7b_8gpu
    python -m soundmind.plan --config-name grpo_7b_8gpu_fast --gpus 4 --gpu-memory 141 --card H200
    python -m soundmind.plan --config-name grpo_7b_lora_1gpu --clip-seconds 120 --json plan.json \\
        actor_rollout_ref.rollout.n=4

Prints the memory of a GPU in every phase of a step, part by part; the memory of a node; tokens a
step; an estimate of time; the longest prompt that the budgets hold; and every divisibility rule that
fails, with the nearest values that work. Runs on any machine: no GPU, no model, no data needed.

Reads   configs/<name>.yaml; the model's config.json and the Parquet files where they are there
Writes  the tables; with --json also a file

The arithmetic is in `soundmind.planning.memory` and `soundmind.planning.flops`, its formulas in
docs/planning.md.
Exit status 1: it does not fit, or a rule fails. Exit status 2: the configuration cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from soundmind.data.audio import AUDIO_TOKENS_PER_SECOND
from soundmind.planning.plan import Plan, as_json, make_plan
from soundmind.planning.setup import (
    CARDS,
    GB,
    PUBLISHED_SECONDS,
    RESPONSE_TOKENS,
    assumptions,
)
from soundmind.system.errors import command


def print_plan(plan: Plan) -> None:
    """Tables on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=110)

    def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        view = Table(title=title, title_justify="left", header_style="bold")
        for index, column in enumerate(columns):
            view.add_column(column, justify="left" if index == 0 else "right")
        for row in rows:
            view.add_row(*row)
        console.print(view)

    def gigabytes(value: float) -> str:
        return f"{value / GB:.2f}"

    console.print(
        f"[bold]{plan.config}[/bold]: {plan.model} on {plan.gpus} x {plan.card.name}, "
        f"{plan.card.memory / GB:.0f} GB each, {plan.nodes} node{'s' * (plan.nodes > 1)}"
    )
    names = list(dict.fromkeys(chain.from_iterable(phase.parts for phase in plan.phases)))
    rows = [
        [name.replace("_", " "), *(gigabytes(phase.parts.get(name, 0)) for phase in plan.phases)]
        for name in names
    ]
    rows.append(["total", *(gigabytes(phase.total) for phase in plan.phases)])
    rows.append(["largest at", *(phase.moment for phase in plan.phases)])
    table("Memory of a GPU, GB", ["", *(phase.name for phase in plan.phases)], rows)
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    console.print(
        f"{verdict}: {gigabytes(plan.largest.total)} GB ({plan.largest.name}) and a reserve of "
        f"{gigabytes(plan.reserve)} GB, of {gigabytes(plan.card.memory)} GB"
    )
    console.print(f"KV cache: {gigabytes(plan.kv_cache)} GB, {plan.kv_tokens:,} tokens a replica\n")
    host = [[name, gigabytes(value)] for name, value in plan.host.items()]
    host.append(["total", gigabytes(sum(plan.host.values()))])
    table("Memory of a node's host, GB", ["", "GB"], host)
    disk = [[name, gigabytes(value)] for name, value in plan.disk.items()]
    disk.append(["total", gigabytes(sum(plan.disk.values()))])
    table("Disk, GB", ["", "GB"], disk)
    table(
        "Tokens a step", ["kind", "tokens"], [[name, f"{n:,}"] for name, n in plan.tokens.items()]
    )
    total = sum(plan.seconds.values())
    timing = [[name, f"{seconds:.1f}"] for name, seconds in plan.seconds.items()]
    table("Seconds a step, estimated", ["", "s"], [*timing, ["total", f"{total:.1f}"]])
    assumed = plan.assumptions
    console.print(
        f"{plan.steps:,} steps ({plan.steps_per_epoch:,} an epoch of {plan.rows:,} rows, "
        f"{plan.rows_source}): {plan.steps * total / 3600:.1f} hours, "
        f"{plan.gpus * plan.steps * total / 3600:.0f} GPU hours, without validation.\n"
        f"Assumed, not measured: {assumed.clip_share:.0%} of the prompts with a clip of "
        f"{assumed.clip_seconds:g} s, answers of "
        f"{assumed.response_tokens} tokens and at most {assumed.longest_answer:g} times that, "
        f"{assumed.prompt_text_tokens} tokens of prompt text, {assumed.mfu:.0%} of the peak in forward "
        f"and backward, {assumed.decode_share:.0%} of the bandwidth in decoding.\n"
    )
    limits = {name: value for name, value in plan.longest_prompt.items() if name != "one sequence"}
    smallest = min(limits.values())
    text = assumed.prompt_text_tokens
    table(
        "Longest prompt by",
        ["budget", "tokens", "seconds of audio"],
        [
            [
                name + (" (decides)" if value == smallest else ""),
                f"{value:,}",
                f"{max(0, value - text) / AUDIO_TOKENS_PER_SECOND:.0f}",
            ]
            for name, value in limits.items()
        ],
    )
    for problem in plan.problems:
        console.print(f"[red]rule broken:[/red] {problem}", highlight=False)
    if not plan.problems:
        console.print("Every divisibility rule holds.")


@command
def main(argv: Sequence[str] | None = None) -> int:
    from soundmind.run.config import CONFIG_DIR, compose_config
    from soundmind.run.sft_checks import require_stage

    parser = argparse.ArgumentParser(
        prog="python -m soundmind.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-name", required=True, help="an experiment in --config-dir")
    parser.add_argument("--config-dir", type=Path, default=CONFIG_DIR)
    parser.add_argument("--gpus", type=int, help="over all nodes; default: the configuration's")
    parser.add_argument("--gpu-memory", type=float, metavar="GB", help="default: the card's")
    parser.add_argument("--card", choices=sorted(CARDS), default="H100", help="for time estimates")
    parser.add_argument("--clip-seconds", type=float, help=f"mean ({PUBLISHED_SECONDS})")
    parser.add_argument(
        "--response-tokens", type=int, help=f"mean ({RESPONSE_TOKENS}, or the limit)"
    )
    parser.add_argument("--prompt-text-tokens", type=int, help="mean (by the rows' modes)")
    parser.add_argument("--mfu", type=float, help="assumed share of peak (0.4)")
    parser.add_argument("--json", type=Path, help="write the plan to this file too")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, key=value")
    arguments = parser.parse_args(argv)
    config = compose_config(arguments.config_name, arguments.overrides, arguments.config_dir)
    require_stage(config, arguments.config_name, "train")
    if arguments.gpus is not None:
        config = with_gpus(config, arguments.gpus)
    card = CARDS[arguments.card]
    if arguments.gpu_memory is not None:
        card = replace(card, memory=int(arguments.gpu_memory * GB))
    assumed = assumptions(
        config,
        clip_seconds=arguments.clip_seconds,
        response_tokens=arguments.response_tokens,
        prompt_text_tokens=arguments.prompt_text_tokens,
        mfu=arguments.mfu,
    )
    plan = make_plan(config, arguments.config_name, card, assumed)
    print_plan(plan)
    if arguments.json:
        arguments.json.write_text(json.dumps(as_json(plan), indent=2) + "\n", encoding="utf-8")
    return 0 if plan.fits and not plan.problems else 1


def with_gpus(config: DictConfig, gpus: int) -> DictConfig:
    """`config` for `gpus` GPUs, on as many nodes as it has. Raises `ConfigError` if uneven."""
    from soundmind.run.config import ConfigError

    nodes = int(config.trainer.nnodes)
    if gpus < 1 or gpus % nodes:
        raise ConfigError(
            f"--gpus {gpus} does not divide over trainer.nnodes={nodes}; give a multiple of {nodes}, or "
            "trainer.nnodes=1"
        )
    changed = config.copy()
    OmegaConf.update(changed, "trainer.n_gpus_per_node", gpus // nodes)
    return changed


if __name__ == "__main__":
    sys.exit(main())
