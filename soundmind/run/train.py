"""A run from a checked configuration to verl's trainer: folder, Ray, restarts, the end."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig, OmegaConf, open_dict

from soundmind.model import parts
from soundmind.plugin import environment as plugin_environment
from soundmind.run.checks import verl_problems
from soundmind.run.experiment import experiment
from soundmind.run.folder import RunFolder
from soundmind.run.machine_checks import ray_folder
from soundmind.system import files as system_files
from soundmind.system import machine
from soundmind.system.errors import UserError
from soundmind.system.files import REPOSITORY


class NodeLostError(UserError, RuntimeError):
    """A machine of the run's cluster went away; the message says how to go on."""

    status = 1


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
            # The interrupted run has validated its start already, and has checkpoints of its own.
            config.trainer.val_before_train = False
            config.trainer.resume_mode = "auto"
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
    base = Path(ray_folder())
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


def require(config: DictConfig) -> None:
    """Raise `checks.CheckError` with every problem that shows before Ray starts."""
    from soundmind.run import checks

    problems = [*checks.find_problems(config), *verl_problems(config)]
    if problems:
        raise checks.CheckError(problems)


def hide_gpus(environment: MutableMapping[str, str], ranks: int) -> None:
    """Let Ray count `ranks` devices on a CPU where somebody hides or chooses GPUs for this process.

    verl's pools ask for a "GPU" a rank, and Ray refuses more of them than `CUDA_VISIBLE_DEVICES`
    lists, none where it is empty. CUDA takes -1 for no device.
    """
    if "CUDA_VISIBLE_DEVICES" in environment:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(["-1"] * ranks)


def parts_of(config: DictConfig) -> list[parts.TableLine]:
    """What is trained of the model, part by part; empty where its folder is not on this disk."""
    model = config.actor_rollout_ref.model
    folder = Path(str(model.path)).expanduser()
    if not folder.is_dir():
        return []
    targets = model.target_modules
    targets = OmegaConf.to_container(targets) if OmegaConf.is_config(targets) else targets
    return parts.rows(folder, config.train, model.lora_rank, targets)


def wanted(config: DictConfig) -> tuple[str, int | None]:
    """`run.resume`, and the last step that is wanted where it is named."""
    return str(config.run.resume), config.trainer.total_training_steps


def run_training(config: DictConfig, environment: dict[str, str]) -> None:
    """Run verl's V1 trainer to its end on a Ray cluster of its own, or on the configured one.

    `config` has passed `require`; `environment` reaches every process of the run.
    """
    # Composing the configuration has imported verl already; the plugin comes before verl's trainer,
    # which asks for the platform at import.
    from soundmind.plugin.verl_entry import require_loaded

    require_loaded()
    import ray
    from verl.trainer.main_ppo import run_ppo
    from verl.utils.device import auto_set_device

    from soundmind.training.failures import FailedResponsesError
    from soundmind.training.trainer import task_runner

    auto_set_device(config)
    with open_dict(config):
        runtime = config.ray_kwargs.ray_init.setdefault("runtime_env", {})
        runtime.env_vars = {**(runtime.get("env_vars") or {}), **environment}
        if not runtime.get("py_executable") and shlex.quote(sys.executable) != sys.executable:
            # Ray starts workers through a shell and quotes their arguments, but not the interpreter.
            runtime.py_executable = shlex.quote(sys.executable)
    try:
        run_ppo(config, task_runner_class=task_runner())
    except FailedResponsesError as error:  # Ray's copy of it, with a traceback for a message
        raise FailedResponsesError(str(error.cause)) from None  # type: ignore[attr-defined]
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
    from soundmind.run import summary

    environment = plugin_environment.select(
        os.environ, cpu=config.run.device == "cpu", training=True
    )
    if config.run.device == "cpu":
        hide_gpus(os.environ, config.trainer.n_gpus_per_node)
    require(config)
    folder = RunFolder.open(Path(config.run.root), name, experiment(config), *wanted(config))
    for note in folder.notes:
        print(f"note: {note}", flush=True)
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
        system_files.write_json(
            folder.path / (f"versions-{attempt}.json" if attempt else "versions.json"),
            {
                **machine.versions(config.run.seed, REPOSITORY),
                "parts": [asdict(row) for row in parts_of(config)],
            },
        )
        try:
            run_training(config, {**environment, **placed})
        except NodeLostError as error:
            step = folder.last_checkpoint() or 0
            raise NodeLostError(
                f"{error}, and the same command continues from step {step}"
            ) from error.__cause__
    summary.finish_run(folder, config)
    return folder.path
