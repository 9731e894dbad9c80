"""Train: compose a configuration, check it, then run verl's trainer on it.

    python -m soundmind.train --config-name grpo_tiny_cpu
    python -m soundmind.train --config-name grpo_7b_8gpu actor_rollout_ref.rollout.n=8
    python -m soundmind.train --config-name grpo_7b_8gpu modality=text --dry-run

Reads   configs/<name>.yaml, composed over verl's `ppo_trainer`, and the files it points at
Writes  outputs/<name>/<timestamp>/ (see soundmind.run_folder); the last line printed is `run:
<folder>`

An interrupted run of the same configuration is continued from its last checkpoint; `run.resume=new`
starts another one. Nothing heavy starts before every check has passed; `--dry-run` does all of that,
prints what would be trained and where it would go, and starts and writes nothing. Exit status 2: a
check failed.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from soundmind import parts, run_folder, selection
from soundmind.run_folder import RunFolder

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG_DIR = REPOSITORY / "configs"


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key and the next step."""


class NodeLostError(RuntimeError):
    """A machine of the run's cluster went away; the message says how to go on."""


def config_names(config_dir: Path = CONFIG_DIR) -> list[str]:
    """Experiments in `config_dir`, by name."""
    return sorted(path.stem for path in config_dir.glob("*.yaml"))


def compose_config(
    name: str, overrides: Sequence[str] = (), config_dir: Path = CONFIG_DIR
) -> DictConfig:
    """configs/<name>.yaml over verl's `ppo_trainer`, with Hydra `overrides` applied."""
    from hydra import compose, initialize_config_dir
    from hydra.errors import ConfigCompositionException, HydraException

    if name not in config_names(config_dir):
        raise ConfigError(
            f"no configuration {name!r} in {config_dir}; there are: "
            + ", ".join(config_names(config_dir))
        )
    try:
        with initialize_config_dir(config_dir=str(config_dir.resolve()), version_base=None):
            return compose(config_name=name, overrides=list(overrides))
    except ConfigCompositionException as error:
        raise ConfigError(_explain_override(error, name, config_dir)) from error
    except HydraException as error:
        raise ConfigError(f"{name}: {error}") from error


def _explain_override(error: Exception, name: str, config_dir: Path) -> str:
    """Hydra's refusal in one line, with the existing keys that look alike."""
    message = " ".join(str(part) for part in (error, error.__cause__) if part)
    match = re.search(r"Could not override '([^']+)'", message)
    if match is None:
        return f"{name}: {message}"
    unknown = match.group(1)
    known = list(_keys(compose_config(name, config_dir=config_dir)))
    close = difflib.get_close_matches(unknown, known, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return (
        f"unknown override {unknown!r}: neither verl nor {name}.yaml has this key.{hint} "
        f"To add a key on purpose write +{unknown}=..."
    )


def _keys(node: Any, prefix: str = "") -> Iterator[str]:
    for key in node:
        path = f"{prefix}{key}"
        yield path
        if OmegaConf.is_dict(node) and not OmegaConf.is_missing(node, key):
            child = node._get_node(key)
            if isinstance(child, DictConfig) and not child._is_interpolation():
                yield from _keys(child, path + ".")


def place_run(config: DictConfig, folder: RunFolder, attempt: int, ray_dir: Path) -> dict[str, str]:
    """Point every output of verl into the run folder; returns environment variables for that."""
    path = folder.path.resolve()
    with open_dict(config):
        config.run.dir = str(path)
        config.run.metrics_path = str(path / "metrics.jsonl")
        config.trainer.default_local_dir = str(path / "checkpoints")
        config.trainer.rollout_data_dir = str(path / "rollouts")
        config.trainer.validation_data_dir = str(path / "validation")
        config.trainer.experiment_name = f"{folder.path.parent.name}/{folder.path.name}"
        if folder.last_checkpoint() is not None:
            # The interrupted run has validated its start already.
            config.trainer.val_before_train = False
        if not config.ray_kwargs.ray_init.get("address"):
            config.ray_kwargs.ray_init._temp_dir = str(ray_dir)
    (path / "logs").mkdir(exist_ok=True)
    return {
        "TENSORBOARD_DIR": str(path / "tensorboard"),
        # verl's file logger truncates its file, so every attempt gets its own.
        "VERL_FILE_LOGGER_PATH": str(path / "logs" / f"verl-metrics-{attempt}.jsonl"),
    }


@contextmanager
def short_temporary_folder() -> Iterator[Path]:
    """A folder for Ray, its path short enough for sockets (107 characters), removed afterwards.

    Folders of launchers that were killed are removed as well.
    """
    base = Path("/tmp" if os.access("/tmp", os.W_OK) else tempfile.gettempdir())
    for stale in base.glob("sm-ray-*-*"):
        owner = stale.name.split("-")[2]
        if owner.isdigit() and not _is_running(int(owner)):
            shutil.rmtree(stale, ignore_errors=True)
    path = Path(tempfile.mkdtemp(prefix=f"sm-ray-{os.getpid()}-", dir=base))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def verl_problems(config: DictConfig) -> Iterator[str]:
    """What verl would refuse once its processes run: its own checks, and every settings class.

    Builds what the workers build from the configuration (actor, reference, rollout, algorithm and,
    where the model is a local folder, both model configs with tokenizer and processor) and no
    weights. `config` is left as it is.
    """
    from soundmind.verl_ext.plugin import require_loaded

    require_loaded()
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config
    from verl.workers.config.model import HFModelConfig

    config = config.copy()
    roles = config.actor_rollout_ref

    def validate() -> None:
        validate_config(
            config=config,
            use_reference_policy=need_reference_policy(config),
            use_critic=need_critic(config),
        )

    steps: list[tuple[str, Callable[[], Any]]] = [
        ("verl's validate_config", validate),
        ("algorithm", lambda: omega_conf_to_dataclass(config.algorithm)),
        ("actor_rollout_ref.actor", lambda: omega_conf_to_dataclass(roles.actor)),
        ("actor_rollout_ref.ref", lambda: omega_conf_to_dataclass(_reference(config))),
        ("actor_rollout_ref.rollout", lambda: omega_conf_to_dataclass(roles.rollout)),
    ]
    if Path(str(roles.model.path)).expanduser().is_dir():
        # The trainer's class, and the plain one that verl's vLLM server builds from the same keys.
        for built in (None, HFModelConfig):
            model = partial(omega_conf_to_dataclass, roles.model, dataclass_type=built)
            steps.append(("actor_rollout_ref.model", model))
    for name, build in steps:
        try:
            with warnings.catch_warnings():
                # The server's class cannot make this model's processor; ours has, just before.
                warnings.filterwarnings("ignore", message="Failed to create processor")
                warnings.filterwarnings("ignore", message=".* engine is not available")
                build()
        except Exception as error:  # whatever a settings class raises is a problem to report
            yield f"{name}: {type(error).__name__}: {' '.join(str(error).split())}"


def _reference(config: DictConfig) -> DictConfig:
    """The reference's settings under the names of an actor's, as verl's worker renames them."""
    reference = config.actor_rollout_ref.ref.copy()
    with open_dict(reference):
        reference.ppo_mini_batch_size = config.actor_rollout_ref.actor.ppo_mini_batch_size
        for ours, theirs in (
            ("ppo_micro_batch_size", "log_prob_micro_batch_size"),
            ("ppo_micro_batch_size_per_gpu", "log_prob_micro_batch_size_per_gpu"),
            ("use_dynamic_bsz", "log_prob_use_dynamic_bsz"),
            ("ppo_max_token_len_per_gpu", "log_prob_max_token_len_per_gpu"),
        ):
            reference[ours] = reference.pop(theirs, None)
    return reference


def require(config: DictConfig) -> None:
    """Raise `checks.CheckError` with every problem that shows before Ray starts."""
    from soundmind import checks

    problems = [*checks.find_problems(config), *verl_problems(config)]
    if problems:
        raise checks.CheckError(problems)


def dry_run(config: DictConfig, name: str) -> str:
    """Everything up to the start of Ray; returns what would be trained and where it would go.

    Raises `checks.CheckError` like `train`. Starts no process and writes no file.
    """
    selection.select(os.environ, cpu=config.run.device == "cpu", training=True)
    require(config)
    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    prompts, responses = config.data.train_batch_size, config.data.train_batch_size * rollout.n
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node
    lines = [
        f"{name}: all checks passed, nothing was started",
        "",
        f"algorithm  {config.algorithm.adv_estimator}, {prompts} prompts x {rollout.n} responses = "
        f"{responses} a step, {config.actor_rollout_ref.actor.ppo_mini_batch_size} prompts an update",
        f"ranks      {config.trainer.nnodes} x {config.trainer.n_gpus_per_node} = {ranks}",
        f"train      {_listed(config.data.train_files)}",
        f"validate   {_listed(config.data.val_files)}",
        f"model      {model.path}",
        f"output     {_destination(config, name)}",
    ]
    if table := _parts(config):
        lines += ["", parts.format_table(table)]
    return "\n".join(lines)


def _parts(config: DictConfig) -> list[parts.Row]:
    """What is trained of the model, part by part; empty where its folder is not on this disk."""
    model = config.actor_rollout_ref.model
    folder = Path(str(model.path)).expanduser()
    if not folder.is_dir():
        return []
    targets = model.target_modules
    targets = OmegaConf.to_container(targets) if OmegaConf.is_config(targets) else targets
    return parts.rows(folder, config.train, model.lora_rank, targets)


def _listed(files: Any) -> str:
    return ", ".join(files) if OmegaConf.is_list(files) else str(files)


def _destination(config: DictConfig, name: str) -> str:
    """Where `train` would write now, in words."""
    if config.run.resume not in ("auto", "new"):
        return f"{config.run.resume} (continued)"
    parent = Path(config.run.root) / name
    found = run_folder.unfinished(parent, run_folder.config_fingerprint(config))
    if found and config.run.resume == "auto":
        step = RunFolder(found[0], resumed=True).last_checkpoint() or 0
        return f"{found[0]} (continued from step {step})"
    return f"{parent}/<timestamp> (new)"


def run_training(config: DictConfig, environment: dict[str, str]) -> None:
    """Run verl's V1 trainer to its end on a Ray cluster of its own, or on the configured one.

    `config` has passed `require`; `environment` reaches every process of the run.
    """
    # Composing the configuration has imported verl already; the plugin comes before verl's trainer,
    # which asks for the platform at import.
    from soundmind.verl_ext.plugin import require_loaded

    require_loaded()
    import ray
    from verl.trainer.main_ppo import run_ppo
    from verl.utils.device import auto_set_device

    from soundmind.verl_ext.trainer import task_runner

    auto_set_device(config)
    with open_dict(config):
        runtime = config.ray_kwargs.ray_init.setdefault("runtime_env", {})
        runtime.env_vars = {**(runtime.get("env_vars") or {}), **environment}
        if not runtime.get("py_executable") and shlex.quote(sys.executable) != sys.executable:
            # Ray starts workers through a shell and quotes their arguments, but not the interpreter.
            runtime.py_executable = shlex.quote(sys.executable)
    try:
        run_ppo(config, task_runner_class=task_runner())
    except Exception as error:
        # Which exception a lost node shows itself by depends on who was waiting for it.
        if lost := _lost_nodes(config):
            raise NodeLostError(
                f"{lost} of {config.trainer.nnodes} nodes left the cluster: start a node in its place"
            ) from error
        raise
    finally:
        ray.shutdown()  # this driver's connection; never another cluster


def _lost_nodes(config: DictConfig, patience: float = 40.0) -> int:
    """How many of a run's machines its Ray cluster lacks; 0 for a run on one machine.

    Waits up to `patience` seconds for Ray to notice: a broken connection is seen before the
    cluster gives up the machine at its other end (15 s by Ray's defaults).
    """
    import ray

    wanted, ranks = config.trainer.nnodes, config.trainer.n_gpus_per_node
    if wanted < 2 or not ray.is_initialized():
        return 0
    deadline = time.monotonic() + patience
    while True:
        able = [node["Alive"] and node["Resources"].get("GPU", 0) >= ranks for node in ray.nodes()]
        lost = wanted - sum(able)
        if lost > 0 or time.monotonic() > deadline:
            return max(0, lost)
        time.sleep(1)


def train(config: DictConfig, name: str) -> Path:
    """Train `config` in a new or continued run folder; returns the folder.

    Raises `NodeLostError` if a machine of its cluster went away.
    """
    from soundmind import report

    environment = selection.select(os.environ, cpu=config.run.device == "cpu", training=True)
    require(config)
    fingerprint = run_folder.config_fingerprint(config)
    folder = RunFolder.open(Path(config.run.root), name, fingerprint, config.run.resume)
    folder.prune_checkpoints(config.trainer.max_actor_ckpt_to_keep)
    attempt = folder.begin_attempt()
    checkpoint = folder.last_checkpoint()
    print(
        f"run folder: {folder.path}"
        + (f" (continued from step {checkpoint or 0})" if folder.resumed else ""),
        flush=True,
    )
    with short_temporary_folder() as ray_dir:
        placed = place_run(config, folder, attempt, ray_dir)
        os.environ.update(placed)
        OmegaConf.save(config, folder.path / "config.yaml", resolve=True)
        run_folder.write_json(
            folder.path / "versions.json",
            {
                **run_folder.versions(config.run.seed, REPOSITORY),
                "parts": [asdict(row) for row in _parts(config)],
            },
        )
        try:
            run_training(config, {**environment, **placed})
        except NodeLostError as error:
            step = folder.last_checkpoint() or 0
            raise NodeLostError(
                f"{error}, and the same command continues from step {step}"
            ) from error.__cause__
    report.finish(folder, config)
    return folder.path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m soundmind.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-name", required=True, help="an experiment in --config-dir")
    parser.add_argument("--config-dir", type=Path, default=CONFIG_DIR)
    parser.add_argument(
        "--dry-run", action="store_true", help="everything up to the start of Ray, then stop"
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, key=value")
    arguments = parser.parse_args(argv)
    from soundmind import checks

    try:
        config = compose_config(arguments.config_name, arguments.overrides, arguments.config_dir)
        if arguments.dry_run:
            print(dry_run(config, arguments.config_name))
            return 0
        folder = train(config, arguments.config_name)
    except (ConfigError, checks.CheckError, run_folder.RunFolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except NodeLostError as error:
        traceback.print_exception(error.__cause__)
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"run: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
