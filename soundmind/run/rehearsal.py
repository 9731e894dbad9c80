"""A configuration rehearsed where there is no GPU: the published small files, narrow weights, two
steps of the real trainer and the real vLLM, export, reload, evaluation. [ours]

What a first hour on rented cards can show wrong without needing a card: a vocabulary larger than
the tokenizer, a template or a processor that another version reads differently, an export that
does not reload, a prompt budget that is too small, settings that no device would take. What needs
one is listed at the end as not rehearsed.

Folder of a rehearsal, `<root>/<config>/`: `model/` (narrow), `data/` and `parquet/` (the committed
sample in all three modes), `runs/`, `eval/`, `*.log`, and `rehearsal.json`, written last.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from soundmind.data.preprocess import make_job, make_parquet
from soundmind.model.folder import WEIGHTS_INDEX, folder_shapes, weight_faults
from soundmind.model.tokens import response_banned_token_ids
from soundmind.planning.sizes import PUBLISHED
from soundmind.run.checks import longest_prompt_tokens
from soundmind.run.config import CONFIG_DIR
from soundmind.run.records import CORRELATION, PROBABILITY_GAP, read_metrics
from soundmind.standin import narrow
from soundmind.system.errors import UserError
from soundmind.system.files import REPOSITORY, replace_folder, write_json
from soundmind.task.schema import MODES, Task

ROWS_A_MODE = 4  # of each mode: with three modes and PROMPTS a step, one pass over all of them
STEPS, PROMPTS, RESPONSES, TOKENS = 2, 6, 2, 16
EVALUATED = 8
LEAST_CORRELATION = 0.9999
LARGEST_GAP = 1e-4  # in float32, of a probability and of a mean log-probability
LOG_GAP = "rollout_corr/log_ppl_abs_diff"  # verl's: a response's mean log-probability, both ways
# What base/cpu.yaml sets for speed or taste, which a rehearsal leaves as the experiment has it.
NOT_FORCED = (
    "train.share_prompts",
    "actor_rollout_ref.model.use_remove_padding",
    "actor_rollout_ref.model.enable_gradient_checkpointing",
    "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes",
)
REWARD_COMPONENTS = "reward.custom_reward_function.reward_kwargs.components"
NOT_REHEARSED = (
    "CUDA, NCCL and weights over CUDA IPC",
    "flash-attention (sdpa here) and CUDA graphs",
    "bfloat16 (float32 here): bash scripts/gpu_check.sh has its error on a card",
    "memory and speed of the real width: python -m soundmind.plan",
    "several ranks and nodes; vLLM's sleep between steps",
    "the published weights themselves, and what they answer",
)


class RehearsalError(UserError):
    """A rehearsal that could not be held, with its log and the next step."""


@dataclass(frozen=True)
class Change:
    """A setting of the experiment that this machine forces to another value."""

    key: str
    before: Any
    after: Any


@dataclass
class Report:
    """What a rehearsal found. `rows` are (what, found), `problems` what did not hold."""

    config: str
    model: str
    changes: list[Change]
    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    def row(self, what: str, found: str, holds: bool = True) -> None:
        self.rows.append((what, found))
        if not holds:
            self.problems.append(f"{what}: {found}")


# --- what is rehearsed ----------------------------------------------------------------------------


def forced_settings(
    config: DictConfig, folder: Path, vocabulary: int, width: int
) -> dict[str, Any]:
    """Settings that a machine without a GPU and a rehearsal of minutes need, by key."""
    base = OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "base/cpu.yaml"))
    forced = {key: value for key, value in _leaves(base) if key not in NOT_FORCED}
    precision = "actor_rollout_ref.{}.fsdp_config.{}"
    forced |= {
        "ray_kwargs.ray_init.num_gpus": 1,
        "ray_kwargs.ray_init.address": None,
        precision.format("actor", "model_dtype"): "fp32",
        "actor_rollout_ref.model.path": str(folder / "model"),
        "data.train_files": [str(folder / f"parquet/{mode}/train.parquet") for mode in MODES],
        "data.val_files": str(folder / f"parquet/{_mode_of(config)}/test.parquet"),
        "data.train_batch_size": PROMPTS,
        "data.max_response_length": TOKENS,
        "actor_rollout_ref.actor.ppo_mini_batch_size": PROMPTS,
        # Steps so large that what vLLM is given differs from what it was loaded with.
        "actor_rollout_ref.actor.optim.lr": 1e-3,
        "actor_rollout_ref.actor.optim.lr_warmup_steps": 0,
        "actor_rollout_ref.rollout.n": RESPONSES,
        "actor_rollout_ref.rollout.max_num_seqs": 16,  # vLLM tries so many rows of logits at once
        "actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes": math.ceil(
            vocabulary * width * 4 / 2**20
        ),
        "train.max_failed_share": 1.0,  # some are made to fail
        # Random answers earn nothing alike; a group of equal rewards has no gradient.
        REWARD_COMPONENTS: [
            *(OmegaConf.select(config, REWARD_COMPONENTS) or []),
            {"name": "rehearsal", "path": f"pkg://{narrow.__name__}:any_reward", "weight": 1.0},
        ],
        "trainer.total_epochs": 1,
        "trainer.total_training_steps": STEPS,
        "trainer.save_freq": STEPS,
        "trainer.test_freq": STEPS,
        "trainer.val_before_train": False,
        "trainer.logger": ["console", "file"],
        "run.root": str(folder / "runs"),
        "run.resume": "new",
    }
    return forced


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting in nested dictionaries as (dotted key, value)."""
    for key, child in node.items():
        if isinstance(child, dict):
            yield from _leaves(child, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", child


def changes(config: DictConfig, forced: dict[str, Any]) -> list[Change]:
    """Those of `forced` that differ from the experiment."""
    found = []
    for key, after in forced.items():
        before = OmegaConf.select(config, key)
        before = list(before) if isinstance(before, ListConfig) else before
        if before != after:
            found.append(Change(key, before, after))
    return found


def as_override(key: str, value: Any) -> str:
    """`key` set to `value` in Hydra's grammar, whether the experiment has it or not."""
    return f"++{key}={_grammar(value)}"


def _grammar(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ",".join(f"{name}:{_grammar(child)}" for name, child in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_grammar, value)) + "]"
    return json.dumps(value)


def _mode_of(config: DictConfig) -> str:
    files = config.data.val_files
    name = Path(files[0] if isinstance(files, ListConfig) else files).parent.name
    return name if name in MODES else "audio"


# --- the stages -----------------------------------------------------------------------------------


def write_data(folder: Path, tokenizer: Path, task: Task) -> None:
    """The committed sample as Parquet in all three modes, one clip damaged behind its checks.

    The damaged clip's sessions fail while they roll out, as one on a flaky disk would: the step
    goes on without them and pads its batch.
    """
    data = folder / "data"
    shutil.copytree(REPOSITORY / "data/sample", data, dirs_exist_ok=True)
    lines = (data / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(lines[:ROWS_A_MODE]), encoding="utf-8")
    for mode in MODES:
        job = make_job(
            mode=mode,
            task=task,
            data_dir=str(data),
            output_dir=folder / "parquet",
            splits=("train", "test"),
            workers=1,
            tokenizer=str(tokenizer),
        )
        with contextlib.redirect_stdout(io.StringIO()):
            make_parquet(job)
    clip = data / "train" / json.loads(lines[0])["id"] / "question.wav"
    clip.write_bytes(b"\0" * clip.stat().st_size)


def rehearse_stage(arguments: Sequence[str], log: Path, limit: float) -> None:
    """Run one of our commands with its output in `log`; `RehearsalError` with its last lines."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            status: int | str = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = f"no end within {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-12:])
        raise RehearsalError(
            f"python -m {arguments[0]}: {status if isinstance(status, str) else f'exit {status}'}; "
            f"all of it is in {log}, the end is\n{tail}"
        )


def rehearse(
    config: DictConfig,
    name: str,
    overrides: Sequence[str],
    published: Path,
    root: Path,
    tell: Callable[[str], None] = print,
    limit: float = 1200.0,
) -> Report:
    """Hold the rehearsal of `config` (composed from `name` and `overrides`); see the module.

    `limit` seconds is what the training and the evaluation may each take.
    """
    if found := list(narrow.small_file_faults(published)):
        raise RehearsalError("\n".join(found))
    folder = (root / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rehearsal.json").unlink(missing_ok=True)
    for stale in ("data", "parquet", "runs", "eval"):
        shutil.rmtree(folder / stale, ignore_errors=True)
    model = Path(str(config.actor_rollout_ref.model.path)).name
    model_name = model if model in PUBLISHED else None
    clock = _Clock()
    replace_folder(folder / "model", lambda new: narrow.write_narrow(published, new, model_name))
    text = json.loads((folder / "model/config.json").read_text())["thinker_config"]["text_config"]
    forced = forced_settings(config, folder, text["vocab_size"], text["hidden_size"])
    report = Report(
        name, model_name or str(published), changes(config, forced), seconds=clock.seconds
    )
    tell(f"{name} on this machine, with {len(report.changes)} settings changed:")
    for change in report.changes:
        tell(f"  {change.key}: {change.before} -> {change.after}")
    write_data(folder, folder / "model", "practice" if config.run.prepare == "practice" else "alr")
    clock.stage("model and data")
    settings = [*overrides, *(as_override(key, value) for key, value in forced.items())]
    rehearse_stage(
        ["soundmind.train", "--config-name", name, *settings], folder / "train.log", limit
    )
    clock.stage("train and export")
    run = next((folder / "runs" / name).iterdir())
    _prompts(report, config, folder)
    _steps(report, run)
    _export(report, folder / "model", run / "export")
    clock.stage("reload in transformers")
    _evaluate(report, folder, run / "export", _mode_of(config), limit)
    clock.stage("evaluate")
    write_json(folder / "rehearsal.json", {**asdict(report), "not rehearsed": NOT_REHEARSED})
    return report


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def stage(self, name: str) -> None:
        now = time.monotonic()
        self.seconds[name] = round(now - self._since, 1)
        self._since = now


def _prompts(report: Report, config: DictConfig, folder: Path) -> None:
    from soundmind.model.processor import load_processor

    processor = load_processor(str(folder / "model"))
    budget = int(config.data.max_prompt_length)
    for mode in MODES:
        row, tokens = longest_prompt_tokens(
            str(folder / f"parquet/{mode}/train.parquet"), processor
        )
        report.row(f"longest prompt, {mode}", f"{tokens} of {budget} tokens (row {row})")
    tokenizer = processor.tokenizer
    head = json.loads((folder / "model/config.json").read_text())["thinker_config"]["text_config"]
    spare = head["vocab_size"] - len(tokenizer)
    banned = response_banned_token_ids(tokenizer, folder / "model")
    report.row("tokens never sampled", f"{len(banned)}, {banned[0]} to {banned[-1]}")
    report.row("rows of the head without a token", f"{spare} of {head['vocab_size']:,}")


def _steps(report: Report, run: Path) -> None:
    steps = [line for line in read_metrics(run) if line.get("step", 0) > 0]
    report.row("steps", f"{len(steps)} of {STEPS}", len(steps) == STEPS)
    correlation = min(line[CORRELATION] for line in steps)
    gap = max(line[PROBABILITY_GAP] for line in steps)
    report.row(
        "rollout against trainer, correlation",
        f"{correlation:.7f}",
        correlation >= LEAST_CORRELATION,
    )
    report.row("the same, largest gap", f"{gap:.1e}", gap <= LARGEST_GAP)
    nats = max(line[LOG_GAP] for line in steps)
    report.row("the same, log-probabilities", f"{nats:.1e} apart", nats <= LARGEST_GAP)
    failed = int(sum(line["rollout/failed_sessions"] for line in steps))
    # The damaged clip is asked in two modes.
    report.row(
        "sessions that failed", f"{failed}, by design {2 * RESPONSES}", failed == 2 * RESPONSES
    )
    moved = min(line["actor/grad_norm"] for line in steps)
    report.row("gradient", f"at least {moved:.1e}", moved > 0)


def _export(report: Report, base: Path, export: Path) -> None:
    """The export has the published layout, and transformers loads all of it and nothing else."""
    import torch
    import transformers

    faults = weight_faults(export)
    shards = len(list(export.glob("*.safetensors")))
    report.row("export", faults[0] if faults else f"complete, {shards} files", not faults)
    for name in (WEIGHTS_INDEX, "chat_template.json", "tokenizer.json"):
        report.row(f"export has {name}", "yes" if (export / name).is_file() else "no")
        if not (export / name).is_file():
            report.problems.append(f"export lacks {name}")
    same = folder_shapes(export) == folder_shapes(base)
    report.row("names and shapes in the export", "as in the base" if same else "differ", same)
    transformers.logging.set_verbosity_error()
    thinker = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    loaded: Any = thinker.from_pretrained(export, dtype=torch.float32, output_loading_info=True)
    model, found = loaded
    lost = sorted(found["missing_keys"])
    report.row("transformers loads it", f"{lost[0]} is missing" if lost else "yes", not lost)
    before = thinker.from_pretrained(base, dtype=torch.float32)
    layer = [each.model.layers[0].self_attn.q_proj.weight.detach() for each in (model, before)]
    moved = float((layer[0] - layer[1]).abs().max())
    report.row("trained weights in the export", f"moved by up to {moved:.1e}", moved > 0)


def _evaluate(report: Report, folder: Path, export: Path, mode: str, limit: float) -> None:
    parquet = folder / f"parquet/{mode}/test.parquet"
    output = folder / "eval"
    arguments = ["--model", str(export), "--data", str(parquet), "--limit", str(EVALUATED)]
    arguments += ["--output-dir", str(output), "--max-tokens", str(TOKENS)]
    rehearse_stage(["soundmind.evaluate", *arguments], folder / "evaluate.log", limit)
    lines = (output / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    answered = sum(1 for line in lines if not json.loads(line).get("error"))
    report.row(
        "vLLM loads it and answers", f"{answered} of {EVALUATED} rows", answered == EVALUATED
    )
