"""Train: compose a configuration, check it, then run verl's trainer on it.

    python -m soundmind.train --config-name grpo_tiny_cpu
    python -m soundmind.train --config-name grpo_7b_8gpu actor_rollout_ref.rollout.n=8
    python -m soundmind.train --config-name grpo_7b_8gpu --check                         # checks
    only

Reads   configs/<name>.yaml, composed over verl's `ppo_trainer`, and the files it points at
Writes  outputs/<name>/<timestamp>/ (see soundmind.run_folder); the last line printed is `run:
<folder>`

An interrupted run of the same configuration is continued from its last checkpoint; `run.resume=new`
starts another one. Nothing heavy starts before every check has passed. Exit status 2: a check
failed.
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from soundmind import run_folder, selection
from soundmind.run_folder import RunFolder

REPOSITORY = Path(__file__).resolve().parent.parent
CONFIG_DIR = REPOSITORY / "configs"


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key and the next step."""


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


def run_training(config: DictConfig, environment: dict[str, str]) -> None:
    """Run verl's V1 trainer to its end on a Ray cluster of its own, or the one that is "
    "configured."""
    # Composing the configuration has imported verl already; the plugin comes before verl's trainer,
    # which asks for the platform at import.
    from soundmind.verl_ext.plugin import require_loaded

    require_loaded()
    import ray
    from verl.trainer.main_ppo import run_ppo
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config
    from verl.utils.device import auto_set_device

    from soundmind.verl_ext.trainer import task_runner

    auto_set_device(config)
    validate_config(
        config=config,
        use_reference_policy=need_reference_policy(config),
        use_critic=need_critic(config),
    )
    with open_dict(config):
        runtime = config.ray_kwargs.ray_init.setdefault("runtime_env", {})
        runtime.env_vars = {**(runtime.get("env_vars") or {}), **environment}
        if not runtime.get("py_executable") and shlex.quote(sys.executable) != sys.executable:
            # Ray starts workers through a shell and quotes their arguments, but not the interpreter.
            runtime.py_executable = shlex.quote(sys.executable)
    try:
        run_ppo(config, task_runner_class=task_runner())
    finally:
        ray.shutdown()  # this driver's connection; never another cluster


def train(config: DictConfig, name: str) -> Path:
    """Train `config` in a new or continued run folder; returns the folder."""
    from soundmind import checks, report

    environment = selection.select(os.environ, cpu=config.run.device == "cpu")
    checks.require(config)
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
            folder.path / "versions.json", run_folder.versions(config.run.seed, REPOSITORY)
        )
        run_training(config, {**environment, **placed})
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
    parser.add_argument("--check", action="store_true", help="check the configuration, then stop")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, key=value")
    arguments = parser.parse_args(argv)
    from soundmind import checks

    try:
        config = compose_config(arguments.config_name, arguments.overrides, arguments.config_dir)
        if arguments.check:
            selection.select(os.environ, cpu=config.run.device == "cpu")
            checks.require(config)
            print(f"{arguments.config_name}: all checks passed")
            return 0
        folder = train(config, arguments.config_name)
    except (ConfigError, checks.CheckError, run_folder.RunFolderError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"run: {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
