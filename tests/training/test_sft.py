"""Supervised fine-tuning through verl's trainer: items, ranks, resume, export and bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verl")

from alr_data import annotation, write_clip, write_lines
from omegaconf import OmegaConf
from processes import REPOSITORY, clean_environment

from soundmind import plan, preprocess, report
from soundmind.data.chains import ChainError, ChainSettings, read_chains
from soundmind.model.processor import load_processor
from soundmind.run import sft_checks
from soundmind.run.config import ConfigError, compose_config
from soundmind.training.sft_dataset import ChainDataset

STEPS = 6  # of 4 rows: an epoch is 4 steps of the 18 rows that are taught


@pytest.fixture(scope="module")
def data(random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rows each as clip and as text; one annotation of the ten contradicts its label."""
    root = tmp_path_factory.mktemp("annotated data")
    for split, count in (("train", 10), ("dev", 4)):
        lines = [annotation(number + 100 * (split == "dev"), number % 2) for number in range(count)]
        if split == "train":
            lines[3]["answer"] = "Let me think.\n\nAnswer: not entailed."
        write_lines(root / f"{split}.jsonl", lines)
        for number, line in enumerate(lines):
            write_clip(root / split / line["id"] / "question.wav", 0.5 + number / 10, seed=number)
    for mode in ("audio", "text"):
        arguments = ["--mode", mode, "--data-dir", str(root), "--splits", "train", "dev"]
        arguments += ["--workers", "1", "--tokenizer", str(random_stand_in)]
        assert preprocess.main(arguments) == 0
    return root / "parquet"


composed = lru_cache(compose_config)


def settings(**others: Any) -> dict[str, Any]:
    return {"max_prompt_length": 576, "max_response_length": 64, **others}


def dataset(model: Path, files: list[Path], **others: Any) -> ChainDataset:
    processor = load_processor(str(model))
    config = OmegaConf.create(settings(**others))
    return ChainDataset([str(path) for path in files], processor.tokenizer, config, processor)


def test_the_loss_is_on_the_response_alone_and_ends_with_the_end_token(
    data: Path, random_stand_in: Path
) -> None:
    taught = dataset(random_stand_in, [data / "audio/train.parquet", data / "text/train.parquet"])
    tokenizer = taught.processor.tokenizer
    for item in (taught[0], taught[len(taught) - 1]):
        masked = item["input_ids"][item["loss_mask"].bool()]
        assert masked.equal(item["responses"])
        assert item["input_ids"][-len(masked) :].equal(item["responses"])
        text = tokenizer.decode(masked)
        assert text.startswith("<think>Let me think about thing ")
        assert text.endswith("entailed" + tokenizer.eos_token)
        assert tokenizer.decode(item["input_ids"][~item["loss_mask"].bool()]).endswith(
            "<|im_start|>assistant\n"
        )
    assert taught[0]["multi_modal_inputs"]["input_features"].shape[0] == 1
    assert taught[len(taught) - 1]["multi_modal_inputs"] == {}


def chains(model: Path, path: Path, **others: Any) -> Any:
    tokenizer = load_processor(str(model)).tokenizer
    return read_chains(
        str(path),
        lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"],
        tokenizer.eos_token_id,
        ChainSettings(**{"max_response_length": 64, **others}),
    )


def test_rows_that_contradict_their_label_are_left_out_and_counted(
    data: Path, random_stand_in: Path
) -> None:
    found = chains(random_stand_in, data / "audio/train.parquet")
    assert found.counts == {"rows": 10, "taught": 9, "contradicts_label": 1}
    assert "0003" not in {row["extra_info"]["id"] for row in found.rows}


def test_chains_beyond_the_budget_are_left_out_cut_or_refused_never_silently(
    data: Path, random_stand_in: Path
) -> None:
    path = data / "audio/train.parquet"
    longest = max(len(ids) for ids in chains(random_stand_in, path).responses)
    tight: dict[str, Any] = {"max_response_length": longest - 1}
    gone = chains(random_stand_in, path, **tight)
    assert gone.counts["too_long"] > 0
    assert gone.counts["taught"] + gone.counts["too_long"] + 1 == gone.counts["rows"]
    cut = chains(random_stand_in, path, long_chains="cut", **tight)
    assert cut.counts["cut"] == gone.counts["too_long"] and cut.counts["taught"] == 9
    tokenizer = load_processor(str(random_stand_in)).tokenizer
    for ids in cut.responses:
        assert len(ids) < longest
        assert "</think>\nAnswer: " in tokenizer.decode(ids)
    with pytest.raises(ChainError, match="max_response_length is"):
        chains(random_stand_in, path, long_chains="error", **tight)
    with pytest.raises(ChainError, match="nothing is left to teach"):
        chains(random_stand_in, path, max_response_length=5)


def test_annotations_other_than_the_rows_were_made_from_are_refused(
    data: Path, random_stand_in: Path, tmp_path: Path
) -> None:
    path = data / "text/train.parquet"
    lines = [annotation(number, number % 2) for number in range(10)]
    lines[5]["answer"] = "Another reasoning of other length altogether.\nAnswer: entailed."
    write_lines(tmp_path / "train.jsonl", lines)
    with pytest.raises(ChainError, match=r"train/0003 was made from another annotation"):
        chains(random_stand_in, path, annotation_root=str(tmp_path))
    write_lines(tmp_path / "train.jsonl", lines[:2])
    with pytest.raises(ChainError, match=r"train/0002 has no annotation"):
        chains(random_stand_in, path, annotation_root=str(tmp_path))


def command(data: Path, model: Path, root: Path, *more: str) -> list[str]:
    def files(split: str) -> str:
        return f"['{data / 'audio' / split}.parquet','{data / 'text' / split}.parquet']"

    return [
        *(sys.executable, "-m", "soundmind.sft", "--config-name", "sft_tiny_cpu"),
        f"run.root='{root}'",
        f"data.train_files={files('train')}",
        f"data.val_files={files('dev')}",
        f"model.path='{model}'",
        *("data.max_prompt_length=576", "data.max_response_length=64"),
        *("data.train_batch_size=4", "trainer.total_epochs=2", "optim.lr=1e-2"),
        *(f"trainer.total_training_steps={STEPS}", "trainer.test_freq=4", "trainer.save_freq=2"),
        *more,
    ]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments, cwd=REPOSITORY, env=clean_environment(), capture_output=True, text=True
    )


def finished(result: subprocess.CompletedProcess[str]) -> Path:
    assert result.returncode == 0, result.stdout[-1500:] + result.stderr[-3000:]
    return Path(result.stdout.strip().splitlines()[-1].removeprefix("run: "))


def losses(folder: Path, key: str = "train/loss") -> dict[int, float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.fixture(scope="module")
def one_rank(
    data: Path, random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[str]]:
    arguments = command(data, random_stand_in, tmp_path_factory.mktemp("sft one"))
    return finished(run(arguments)), arguments


@pytest.mark.e2e
def test_two_ranks_give_the_losses_of_one(
    one_rank: tuple[Path, list[str]], data: Path, random_stand_in: Path, tmp_path: Path
) -> None:
    alone = losses(one_rank[0])
    two = finished(run(command(data, random_stand_in, tmp_path, "trainer.n_gpus_per_node=2")))
    assert losses(two) == pytest.approx(alone, rel=1e-4)
    assert losses(two, "val/loss") == pytest.approx(losses(one_rank[0], "val/loss"), rel=1e-4)
    assert alone.keys() == set(range(1, STEPS + 1))
    assert alone[STEPS] < alone[1]


@pytest.mark.e2e
def test_a_run_that_was_cut_at_the_end_of_an_epoch_goes_on_as_if_it_had_not_been(
    one_rank: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, arguments = one_rank
    before = losses(folder)
    kept = tmp_path / "finished"
    shutil.copytree(folder, kept)
    (folder / "summary.json").unlink()
    shutil.rmtree(folder / "checkpoints" / f"global_step_{STEPS}")
    result = run(arguments)
    assert finished(result) == folder
    assert "(continued from step 4)" in result.stdout
    assert losses(folder) == pytest.approx(before, rel=1e-6)


@pytest.mark.e2e
def test_a_run_leaves_rows_losses_and_a_model_that_can_be_trained_on(
    one_rank: tuple[Path, list[str]], random_stand_in: Path
) -> None:
    folder, _ = one_rank
    counts = json.loads((folder / "rows.json").read_text())
    assert [c["contradicts_label"] for path, c in counts.items() if "train" in path] == [1, 1]
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").unlink()
    assert report.main([str(folder)]) == 0
    assert json.loads((folder / "summary.json").read_text()).keys() == summary.keys()
    assert summary["val_loss_last"] < summary["val_loss_first"]
    assert (folder / "plots" / "loss.png").stat().st_size > 0
    from safetensors.torch import load_file

    base = load_file(random_stand_in / "model.safetensors")
    trained = load_file(folder / "export" / "model.safetensors")
    moved = {name for name in base if not base[name].equal(trained[name])}
    assert any(name.startswith("thinker.audio_tower.") for name in moved)
    assert all(
        name.startswith(("thinker.model.", "thinker.lm_head", "thinker.audio_tower."))
        for name in moved
    )


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("trainer.n_gpus_per_node", 3, "does not divide over 3 ranks"),
        ("trainer.nnodes", 2, "runs on one node"),
        ("trainer.save_freq", 0, "trainer.save_freq=0: a number of steps"),
        ("trainer.test_freq", "sometimes", "trainer.test_freq=sometimes: a number of steps"),
        ("data.max_token_len_per_gpu", 100, "set it to at least 224"),
        ("data.long_chains", "drop", "one of leave_out, cut, error"),
        ("data.pad_mode", "right", "set no_padding"),
        ("data.val_files", None, "set trainer.test_freq=-1"),
        ("engine.strategy", "fsdp", "needs fsdp2"),
        ("model.path", "nowhere", "nowhere not found"),
        ("data.train_files", "nowhere.parquet", "nowhere.parquet not found"),
    ],
)
def test_a_bad_setting_is_named_with_what_works(key: str, value: Any, message: str) -> None:
    config = composed("sft_tiny_cpu").copy()
    OmegaConf.update(config, key, value)
    assert message in "\n".join(sft_checks.find_sft_problems(config))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("data.train_batch_size", 64, "do not make one batch of data.train_batch_size=64"),
        ("trainer.total_training_steps", 50, "set trainer.total_epochs=25"),
        ("data.train_batch_size", 6, "4 validation rows do not fill one batch"),
    ],
)
def test_steps_that_the_rows_cannot_make_are_refused(
    data: Path, random_stand_in: Path, key: str, value: Any, message: str
) -> None:
    config = composed("sft_tiny_cpu").copy()
    config.data.train_batch_size = 4
    config.trainer.total_training_steps = None
    OmegaConf.update(config, key, value)
    train = chains(random_stand_in, data / "audio/train.parquet")
    held_out = chains(random_stand_in, data / "audio/dev.parquet")
    assert message in "\n".join(sft_checks.enough_rows(config, [train], [held_out]))


def test_the_command_names_what_is_wrong_in_two_lines_and_starts_nothing(
    data: Path, random_stand_in: Path, tmp_path: Path
) -> None:
    more = ["optim.lr_scheduler_type=square", "--dry-run"]
    result = run([*command(data, random_stand_in, tmp_path / "out"), *more])
    assert result.returncode == 2, result.stdout
    assert "optim: " in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stage", "name", "other"),
    [("sft", "grpo_tiny_cpu", "train"), ("train", "sft_tiny_cpu", "sft")],
)
def test_a_configuration_of_the_other_command_is_told_so(stage: str, name: str, other: str) -> None:
    with pytest.raises(ConfigError, match=f"is a configuration of python -m soundmind.{other};"):
        sft_checks.require_stage(composed(name), name, stage)


def test_a_plan_of_a_fine_tuning_is_refused_and_not_made_up(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert plan.main(["--config-name", "sft_7b_8gpu"]) == 2
    assert "is a configuration of python -m soundmind.sft" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["sft_7b_8gpu", "sft_7b_lora_1gpu", "sft_3b_1gpu"])
@pytest.mark.parametrize("modality", ["audio", "text", "mixed"])
def test_every_size_and_mix_misses_the_gpu_the_data_and_the_model_and_nothing_else(
    name: str, modality: str
) -> None:
    config = compose_config(name, [f"modality={modality}"])
    found = list(sft_checks.find_sft_problems(config))
    missing = [problem for problem in found if "not found" in problem or "GPU" in problem]
    assert found == missing and len(found) >= 4
