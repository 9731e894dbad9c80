"""Host memory, disk, rows and ground truths are looked at before anything starts."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf

pytest.importorskip("verl")

from soundmind.run import data_checks, machine_checks
from soundmind.run.config import compose_config
from soundmind.run.train import hide_gpus
from soundmind.system import machine

GB = 10**9


def host(name: str, gigabytes: int, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[str]:
    monkeypatch.setattr(machine, "memory_bytes", lambda: gigabytes * GB)
    return list(machine_checks.host_memory_fits(compose_config(name, overrides)))


def test_host_memory_that_is_planned_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = host("grpo_7b_8gpu", 128, monkeypatch)
    assert "this process may use 128 GB" in problem
    assert "optimizer, offloaded 66" in problem and "param_offload" in problem
    assert not host("grpo_7b_8gpu", 512, monkeypatch)
    # The machines of a cluster are not this one.
    assert not host("grpo_7b_2x8gpu", 4, monkeypatch)


def disk(free: float, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> list[str]:
    def usage(path: Path) -> Any:
        return SimpleNamespace(total=4000 * GB, used=(4000 - free) * GB, free=free * GB)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    return list(machine_checks.disk_fits(compose_config("grpo_7b_8gpu", overrides)))


def test_checkpoints_and_export_must_fit_the_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = f"run.root={tmp_path}/outputs"
    (problem,) = disk(300, monkeypatch, root)
    assert "checkpoints, 4 at once 396" in problem and "export 22" in problem
    assert "300 GB are free" in problem and "trainer.max_actor_ckpt_to_keep" in problem
    assert not disk(2000, monkeypatch, root)
    assert not disk(1000, monkeypatch, root, "trainer.save_freq=-1")


def test_ray_stops_on_a_disk_that_is_nearly_full(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (problem,) = disk(150, monkeypatch, f"run.root={tmp_path}", "trainer.save_freq=-1")
    assert "Ray stops where" in problem and "95% full" in problem


def test_checkpoints_that_a_continued_run_has_are_not_counted_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    held = tmp_path / "grpo_7b_8gpu/2026-11-25_10-00-00/checkpoints/global_step_100/actor/model.pt"
    held.parent.mkdir(parents=True)
    with held.open("wb") as file:
        file.truncate(297 * GB)  # sparse
    root = f"run.root={tmp_path}"
    assert not disk(400, monkeypatch, root)
    assert disk(400, monkeypatch, root, "run.resume=new")
    (held.parents[3] / "summary.json").write_text("{}")
    assert disk(400, monkeypatch, root)


def write_rows(path: Path, truths: list[str]) -> str:
    rows = [{"reward_model": {"style": "rule", "ground_truth": truth}} for truth in truths]
    pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def test_labels_that_are_not_the_data_s_are_refused(tmp_path: Path) -> None:
    config = compose_config(
        "grpo_tiny_cpu",
        [
            f"data.train_files={write_rows(tmp_path / 'a.parquet', ['entailed', 'not-entailed'])}",
            f"data.val_files={write_rows(tmp_path / 'b.parquet', ['entailed', 'maybe'])}",
        ],
    )
    (problem,) = data_checks.ground_truths(config)
    assert "b.parquet has the ground truth 'maybe'" in problem
    OmegaConf.set_struct(config, False)
    config.reward.custom_reward_function.reward_kwargs.labels = ["A", "B", "C", "D"]
    found = list(data_checks.ground_truths(config))
    assert len(found) == 2
    assert all("A, B, C, D" in problem for problem in found)
    config.reward.custom_reward_function.reward_kwargs.labels = [
        "entailed",
        "not-entailed",
        "maybe",
    ]
    assert not list(data_checks.ground_truths(config))


@pytest.mark.parametrize(("batch", "limit", "fits"), [(3, -1, True), (4, -1, False), (3, 2, False)])
def test_a_batch_that_the_rows_cannot_fill_is_refused(
    tmp_path: Path, batch: int, limit: int, fits: bool
) -> None:
    rows = write_rows(tmp_path / "a.parquet", ["entailed"] * 3)
    settings = [f"data.train_batch_size={batch}", f"data.train_max_samples={limit}"]
    config = compose_config("grpo_tiny_cpu", [f"data.train_files={rows}", *settings])
    found = list(data_checks.filled_batches(config))
    assert bool(found) == (not fits)
    assert all("set it to at most" in problem for problem in found)


def test_lengths_in_tokens_need_references_counted_in_tokens(tmp_path: Path) -> None:
    for name, tokens in (("counted", 12), ("words", None)):
        info = [{"reference_tokens": 12, "reference_words": 9}]
        info += [{"reference_tokens": tokens, "reference_words": 9}] * 3
        pq.write_table(pa.table({"extra_info": info}), tmp_path / f"{name}.parquet")
    found = {}
    for name in ("counted", "words"):
        file = f"data.train_files={tmp_path}/{name}.parquet"
        for unit in ("tokens", "words"):
            key = "reward.custom_reward_function.reward_kwargs.length_unit"
            config = compose_config("grpo_tiny_cpu", [file, f"{key}={unit}"])
            found[name, unit] = list(data_checks.counted_lengths(config))
    (problem,) = found.pop(("words", "tokens"))
    assert "has 3 rows" in problem and "--tokenizer checkpoints/tiny" in problem
    assert not any(found.values())


def test_what_a_download_must_bring_is_named_at_once_and_the_model_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from soundmind import prepare

    monkeypatch.chdir(tmp_path)
    assert prepare.main(["--config-name", "grpo_7b_8gpu"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "hf download Qwen/Qwen2.5-Omni-7B" in first
    assert "PARTS=questions bash scripts/download_data.sh" in second and "20 GB" in second
    assert prepare.main(["--config-name", "grpo_7b_8gpu", "modality=text"]) == 2
    assert "PARTS=text bash scripts/download_data.sh" in capsys.readouterr().err


@pytest.mark.parametrize("hidden", ["", "0", "3,4,5"])
def test_hidden_gpus_leave_ray_as_many_devices_as_ranks_on_a_cpu(hidden: str) -> None:
    """Ray refuses more devices than the variable lists; CUDA takes -1 for none."""
    from ray._private.accelerators import NvidiaGPUAcceleratorManager

    environment = {"CUDA_VISIBLE_DEVICES": hidden}
    hide_gpus(environment, 2)
    assert environment == {"CUDA_VISIBLE_DEVICES": "-1,-1"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", environment["CUDA_VISIBLE_DEVICES"])
        ids = NvidiaGPUAcceleratorManager.get_current_process_visible_accelerator_ids()
    assert ids is not None and len(ids) == 2
    assert not machine.gpu_names()


def test_nothing_is_hidden_where_nobody_asked() -> None:
    environment: dict[str, str] = {}
    hide_gpus(environment, 2)
    assert environment == {}
