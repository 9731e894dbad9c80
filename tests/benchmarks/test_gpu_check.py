"""scripts/gpu_check.sh: on a CPU, where only torch and transformers are, and that it can fail."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from processes import REPOSITORY, clean_environment

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import gpu_batches
import gpu_check
import gpu_speed

# As if no other package were installed: found by nobody, so `find_spec` says None as well.
HIDE = """
import importlib.machinery as machinery
stock = machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    spec = stock(name, path, target)
    installed = spec is not None and "site-packages" in str(spec.origin or spec.loader_state)
    return None if installed and name.split(".")[0] not in {allowed!r} else spec
machinery.PathFinder.find_spec = staticmethod(find_spec)
"""
SMALL = [
    *("--width", "tiny", "--layers", "1", "--audio-layers", "1", "--device", "cpu"),
    *("--clip-seconds", "1.2", "--answer-tokens", "24", "--micro-batches", "1", "2"),
    *("--repeats", "1", "--sequences", "2"),
]


def imports_of(*distributions: str) -> set[str]:
    """Names that can be imported where only `distributions` and what they require are installed."""
    wanted, queue = set(), list(distributions)
    while queue:
        name = canonicalize_name(queue.pop())
        if name in wanted:
            continue
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        wanted.add(name)
        for requirement in map(Requirement, required):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(requirement.name)
    return {
        package
        for package, owners in importlib.metadata.packages_distributions().items()
        if wanted & {canonicalize_name(owner) for owner in owners}
    }


@pytest.fixture
def check(tmp_path: Path) -> Any:
    torch.set_num_threads(1)
    return gpu_check.GpuCheck(gpu_check.parse([*SMALL, "--output", str(tmp_path / "check.json")]))


def run_script(arguments: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(REPOSITORY / "scripts/gpu_check.sh"), *arguments],
        env=clean_environment(PYTHON=sys.executable, **environment),
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The script's run in an interpreter that has torch and transformers but not our packages."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(
        HIDE.format(allowed=imports_of("torch", "transformers"))
    )
    output = folder / "results" / "check.json"
    result = run_script([*SMALL, "--profile", "--output", str(output)], PYTHONPATH=str(folder))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    report = json.loads(output.read_text())
    return {"report": report, "rows": {row["part"]: row for row in report["rows"]}, "run": result}


def test_it_runs_where_only_torch_and_transformers_are(bare: dict[str, Any]) -> None:
    status = {part: row["status"] for part, row in bare["rows"].items()}
    assert status.pop("end_to_end") == "skipped"
    assert set(status.values()) == {"ok"}
    assert "end_to_end" in bare["run"].stdout


def test_what_is_missing_is_named(bare: dict[str, Any]) -> None:
    rows = bare["rows"]
    assert {"verl", "vllm", "ray", "flash_attn"} <= set(rows["environment"]["figures"]["missing"])
    assert "verl, vllm, ray" in rows["end_to_end"]["message"]
    assert rows["packed"]["figures"]["flash_attention"] == "not installed"


def test_the_report_holds_versions_arguments_and_every_cell(bare: dict[str, Any]) -> None:
    report = bare["report"]
    assert report["versions"]["packages"]["torch"] == importlib.metadata.version("torch")
    assert report["arguments"]["clip_seconds"] == 1.2
    update = bare["rows"]["update"]["figures"]
    cells = {(cell["micro_batch"], cell["checkpointing"]) for cell in update["cells"]}
    assert cells == {(1, False), (2, False), (1, True), (2, True)}
    assert update["tokens_per_s"] == max(cell["tokens_per_s"] for cell in update["cells"])
    assert Path(bare["rows"]["profile"]["figures"]["file"]).read_text()


def test_without_a_gpu_a_check_of_one_fails_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    output = tmp_path / "check.json"
    parts = ["--device", "cuda", "--parts", "environment", "forward", "--output", str(output)]
    assert gpu_check.main([*SMALL, *parts]) == 1
    rows = json.loads(output.read_text())["rows"]
    assert [row["status"] for row in rows] == ["failed", "failed"], "the script went on"
    assert "torch sees no GPU" in capsys.readouterr().out


def test_a_missing_torch_is_named_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE.format(allowed=imports_of("transformers")))
    result = run_script([], PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert "has no torch;" in result.stderr


def row_of(check: Any, part: str) -> Any:
    return check.run([part], lambda row: None)[0]


def test_sequences_that_see_one_another_fail_the_packed_part(
    check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = gpu_batches.packed_inputs

    def running(batch: Any) -> dict[str, Any]:
        return {**stock(batch), "position_ids": torch.arange(batch.num_tokens)[None]}

    monkeypatch.setattr(gpu_batches, "packed_inputs", running)
    row = row_of(check, "packed")
    assert row.status == "failed"
    assert "packed and separate sequences differ" in row.message


def test_answers_that_see_one_another_fail_the_shared_part(
    check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = gpu_batches.share_prompts

    def leaking(*arguments: Any) -> Any:
        shared = stock(*arguments)
        length = shared.input_ids.shape[1]
        return replace(shared, attention_mask=torch.ones(1, 1, length, length).tril().bool())

    monkeypatch.setattr(gpu_batches, "share_prompts", leaking)
    row = row_of(check, "shared")
    assert row.status == "failed"
    assert "with the prompt computed once, log-probabilities differ" in row.message


def test_the_shared_part_says_what_is_saved(bare: dict[str, Any]) -> None:
    figures = bare["rows"]["shared"]["figures"]
    once, apart = figures["tokens_once"], figures["tokens_apart"]
    answers = 2 * 24
    assert once - answers == (apart - answers) / 2  # two answers to one prompt
    assert figures["speedup"] == figures["ms_apart"] / figures["ms_once"]


def test_audio_that_does_not_arrive_fails_the_audio_part(check: Any) -> None:
    tower = check.policy.audio_tower
    for weight in (tower.proj.weight, tower.proj.bias):
        weight.data.zero_()
    row = row_of(check, "audio")
    assert row.status == "failed"
    assert "the audio does not arrive" in row.message


def test_a_nan_fails_its_part_and_the_next_one_runs(check: Any) -> None:
    check.policy.lm_head.weight.data[5] = float("nan")
    rows = check.run(["forward", "environment"], lambda row: None)
    assert [row.status for row in rows] == ["failed", "ok"]
    assert "not finite" in rows[0].message


def test_a_part_without_a_gradient_fails_backward(check: Any) -> None:
    check.policy.audio_tower.requires_grad_(False)
    row = row_of(check, "backward")
    assert row.status == "failed"
    assert "projector got no gradient" in row.message


def test_running_out_of_memory_is_a_cell_not_the_end(
    check: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = type(check).run_update

    def limited(self: Any, batch: Any, micro_batch: int) -> float:
        if micro_batch == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 rows")
        return stock(self, batch, micro_batch)

    monkeypatch.setattr(type(check), "run_update", limited)
    row = row_of(check, "update")
    assert row.status == "ok"
    errors = [cell["micro_batch"] for cell in row.figures["cells"] if "error" in cell]
    assert errors == [2, 2]
    assert row.figures["micro_batch"] == 1


def test_the_fp32_copy_leaves_the_policys_attention_alone(check: Any) -> None:
    check.attention = "eager"  # written into a configuration that every layer reads
    row = row_of(check, "precision")
    assert row.status == "ok", row.message
    assert check.policy.config.text_config._attn_implementation == "eager"
    assert check.policy.config.audio_config._attn_implementation == "eager"


def test_micro_batches_and_layouts_give_one_update(check: Any) -> None:
    policy = gpu_batches.build_policy(check.size, check.device, torch.float32, "sdpa", seed=0)
    check._policy, check._trainer = policy, gpu_batches.Trainer(policy, learning_rate=0.0)
    batch = check.batch(2)
    norms = [check.run_update(batch, micro_batch) for micro_batch in (1, 2)]
    check.attention = "flash"  # names the layout; the model keeps sdpa
    norms.append(check.run_update(batch, 2))
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert norms[2] == pytest.approx(norms[0], rel=1e-4)


def test_masters_follow_adamw_in_fp32(check: Any) -> None:
    layer = torch.nn.Linear(4, 3)
    mirror = torch.nn.Linear(4, 3)
    mirror.load_state_dict(layer.state_dict())
    trainer = gpu_batches.Trainer(layer, learning_rate=1e-2)
    stock = torch.optim.AdamW(mirror.parameters(), lr=1e-2, weight_decay=0.01)
    data = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    for part in (data[:3], data[3:]):
        layer(part).square().sum().backward()
    mirror(data).square().sum().backward()
    torch.nn.utils.clip_grad_norm_(mirror.parameters(), 1.0)
    trainer.step()
    stock.step()
    torch.testing.assert_close(layer.weight, mirror.weight)


def test_the_gpu_form_of_the_end_to_end_run_composes(tmp_path: Path) -> None:
    pytest.importorskip("verl")
    from soundmind.run.config import compose_config

    overrides = gpu_speed.end_to_end_overrides(tmp_path, "cuda")
    config = compose_config("grpo_tiny_cpu", overrides)
    assert config.trainer.device == config.run.device == "cuda"
    assert config.actor_rollout_ref.rollout.dtype == "bfloat16"
    assert config.actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype == "bf16"
    assert config.trainer.total_training_steps == 2
    assert os.fspath(tmp_path) in config.data.train_files
