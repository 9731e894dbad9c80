from __future__ import annotations

import asyncio
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("verl")
tiny = pytest.importorskip("soundmind.standin.tiny")

from omegaconf import OmegaConf
from verl.utils.dataset.rl_dataset import (
    RLHFDataset,
    collate_fn,
    get_dataset_class,
)

from soundmind import preprocess
from soundmind.data.audio import load_waveform
from soundmind.task.prompts import build_messages
from soundmind.training.dataset import AudioRLHFDataset

CUSTOM = {"path": "pkg://soundmind.training.dataset", "name": "AudioRLHFDataset"}
MakeData = Callable[..., Path]


@pytest.fixture(scope="module")
def processor() -> Any:
    return tiny.build_processor(tiny.build_tokenizer(tiny.tokenizer_corpus()))


@pytest.fixture(scope="module")
def tokenizer_folder(processor: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    processor.tokenizer.save_pretrained(folder)
    return folder


def prepare(root: Path, mode: str, tokenizer: object = "none", *arguments: str) -> Path:
    command = ["--mode", mode, "--data-dir", str(root), "--tokenizer", str(tokenizer)]
    assert preprocess.main([*command, "--splits", "train", "--workers", "1", *arguments]) == 0
    return root / "parquet" / mode / "train.parquet"


def load(paths: list[Path], processor: Any, kind: type = AudioRLHFDataset, **settings: Any) -> Any:
    values = {"max_prompt_length": 2048, "filter_overlong_prompts": False, **settings}
    config = OmegaConf.create({**values, "custom_cls": CUSTOM})
    return kind([str(path) for path in paths], processor.tokenizer, config, processor=processor)


def decode(messages: list[dict[str, Any]], **settings: Any) -> list[np.ndarray] | None:
    """What the agent loop gets when it asks the class for a prompt's clips."""
    config = OmegaConf.create(settings)
    hook = AudioRLHFDataset.process_multi_modal_info
    images, videos, audios = asyncio.run(hook(messages, image_patch_size=14, config=config))
    assert images is None and videos is None
    return audios


def true_length(processor: Any, row: dict[str, Any]) -> int:
    """Prompt length by doing it: template, decoding, processor."""
    text = processor.apply_chat_template(
        row["raw_prompt"], add_generation_prompt=True, tokenize=False
    )
    clips = decode(row["raw_prompt"])
    keys = {"audio": clips, "sampling_rate": 16_000} if clips else {}
    return len(processor(text=text, **keys)["input_ids"][0])


def test_class_is_found_by_its_package_path() -> None:
    assert get_dataset_class(OmegaConf.create({"custom_cls": CUSTOM})) is AudioRLHFDataset


@pytest.mark.parametrize("mode", ["audio", "text", "dual"])
@pytest.mark.parametrize("embed", [False, True])
def test_messages_are_the_prompt_with_a_reference(
    make_github: MakeData, processor: Any, mode: str, embed: bool
) -> None:
    root = make_github({"train": 3})
    rows = load([prepare(root, mode, "none", *["--embed-audio"] * embed)], processor)
    assert len(rows) == 3
    row = rows[1]
    question = json.loads((root / "train.jsonl").read_text().splitlines()[1])["user_content"]
    references = [
        part["audio"] for m in row["raw_prompt"] for part in m["content"] if "audio" in part
    ]
    clip = references[0] if references else None
    assert row["raw_prompt"] == build_messages(mode, question, clip)  # type: ignore[arg-type]
    assert len(pickle.dumps(row)) < 5_000  # no samples, no bytes
    clips = decode(row["raw_prompt"])
    if mode == "text":
        assert clips is None
        return
    assert clips is not None and len(clips) == 1
    expected = load_waveform(root / "train/0001/question.wav")
    np.testing.assert_array_equal(clips[0], expected)
    assert clips[0].dtype == np.float32


def test_item_has_the_keys_that_rollout_reads(make_github: MakeData, processor: Any) -> None:
    rows = load([prepare(make_github({"train": 2}), "audio")], processor)
    assert set(rows[0]) == {
        "data_source", "ability", "reward_model", "extra_info", "raw_prompt", "index",
        "tools_kwargs", "interaction_kwargs", "dummy_tensor",
    }  # fmt: skip
    batch = collate_fn([rows[0], rows[1]])
    assert list(batch["index"]) == [0, 1]


@pytest.mark.parametrize("mode", ["audio", "text", "dual"])
@pytest.mark.parametrize("counted", [True, False])
def test_stored_numbers_add_up_to_the_real_prompt_length(
    make_github: MakeData,
    processor: Any,
    tokenizer_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    counted: bool,
) -> None:
    root = make_github({"train": 12})
    path = prepare(root, mode, tokenizer_folder if counted else "none")
    with monkeypatch.context() as patch:  # no clip is decoded at start-up
        patch.setattr("soundmind.training.dataset.load_clip", None)
        rows = load([path], processor)
    lengths = rows.prompt_lengths(rows.dataframe)
    assert list(lengths) == [true_length(processor, rows[i]) for i in range(12)]


def test_counts_of_another_tokenizer_are_noticed(
    make_github: MakeData, processor: Any, bpe_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = make_github({"train": 3})
    lines = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    lines[2]["user_content"] *= 30
    (root / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = load([prepare(root, "text", bpe_folder)], processor, max_prompt_length=20_000)
    assert "with this tokenizer" in caplog.text
    lengths = rows.prompt_lengths(rows.dataframe)
    assert list(lengths) == [true_length(processor, rows[i]) for i in range(3)]


def test_prompt_that_does_not_fit_is_an_error_with_its_need(
    make_github: MakeData, processor: Any, noise_clip: Any, tokenizer_folder: Path
) -> None:
    root = make_github({"train": 4})
    noise_clip(root / "train/0002/question.wav", 40.0)
    path = prepare(root, "audio", tokenizer_folder)
    longest = true_length(processor, load([path], processor)[2])
    with pytest.raises(ValueError, match=rf"1 of 4.*train/0002 needs {longest} tokens"):
        load([path], processor, max_prompt_length=longest - 1)
    assert len(load([path], processor, max_prompt_length=longest)) == 4


def test_filter_leaves_out_what_does_not_fit_and_says_how_many(
    make_github: MakeData,
    processor: Any,
    noise_clip: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root = make_github({"train": 4})
    noise_clip(root / "train/0002/question.wav", 40.0)
    settings = {"max_prompt_length": 1000, "filter_overlong_prompts": True}
    rows = load([prepare(root, "audio")], processor, **settings)
    assert [rows[i]["extra_info"]["id"] for i in range(3)] == ["0000", "0001", "0003"]
    assert "left out 1 of 4 rows" in capsys.readouterr().out
    with pytest.raises(ValueError, match="none of the 4"):
        load(
            [root / "parquet/audio/train.parquet"],
            processor,
            **{**settings, "max_prompt_length": 9},
        )


def test_clip_beyond_the_window_is_refused_not_cut(
    make_github: MakeData, processor: Any, noise_clip: Any
) -> None:
    root = make_github({"train": 2})
    noise_clip(root / "train/0001/question.wav", 301.0, rate=8_000)
    with pytest.raises(ValueError, match=r"train/0001 has a clip of 301\.0 s"):
        load([prepare(root, "audio")], processor, max_prompt_length=20_000)


def test_missing_clip_is_an_error_not_a_lost_row(make_github: MakeData, processor: Any) -> None:
    root = make_github({"train": 3})
    path = prepare(root, "audio")
    rows = load([path], processor, filter_overlong_prompts=True)
    (root / "train/0002/question.wav").unlink()
    assert len(load([path], processor, filter_overlong_prompts=True)) == 3
    with pytest.raises(ValueError, match=r"0002/question\.wav not found"):
        decode(rows[2]["raw_prompt"])


def test_data_folder_can_move_as_a_whole(make_github: MakeData, processor: Any) -> None:
    root = make_github({"train": 2})
    prepare(root, "audio")
    moved = root.rename(root.with_name("elsewhere, with spaces"))
    rows = load([moved / "parquet/audio/train.parquet"], processor)
    clips = decode(rows[0]["raw_prompt"])
    assert clips is not None
    np.testing.assert_array_equal(clips[0], load_waveform(moved / "train/0000/question.wav"))


def test_parquet_moved_alone_names_the_setting(make_github: MakeData, processor: Any) -> None:
    root = make_github({"train": 2})
    alone = root.parent / "other" / "deep" / "train.parquet"
    alone.parent.mkdir(parents=True)
    shutil.move(prepare(root, "audio"), alone)
    with pytest.raises(FileNotFoundError, match=r"data\.audio_root"):
        load([alone], processor)
    assert len(load([alone], processor, audio_root=str(root))) == 2


def test_embedded_parquet_travels_alone(
    make_github: MakeData, processor: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("soundmind.data.write.ROW_GROUP_BYTES", 150_000)
    root = make_github({"train": 6})
    expected = [load_waveform(root / f"train/000{i}/question.wav") for i in range(6)]
    path = prepare(root, "audio", "none", "--embed-audio")
    alone = root.parent / "a # b %20.parquet"
    shutil.move(path, alone)
    shutil.rmtree(root)
    rows = load([alone], processor)
    for index in (5, 0, 3, 1):
        clips = decode(rows[index]["raw_prompt"])
        assert clips is not None
        np.testing.assert_array_equal(clips[0], expected[index])


def test_files_of_different_modes_mix(make_github: MakeData, processor: Any) -> None:
    root = make_github({"train": 2})
    paths = [prepare(root, mode) for mode in ("audio", "text", "dual")]
    embedded = prepare(root, "audio", "none", "--embed-audio", "--output-dir", str(root / "e"))
    del embedded
    rows = load([*paths, root / "e/audio/train.parquet"], processor)
    modes = [rows[i]["extra_info"]["mode"] for i in range(len(rows))]
    assert modes == ["audio"] * 2 + ["text"] * 2 + ["dual"] * 2 + ["audio"] * 2
    counts = [len(decode(rows[i]["raw_prompt"]) or []) for i in range(len(rows))]
    assert counts == [1, 1, 0, 0, 1, 1, 1, 1]


def test_verls_own_class_reads_and_renders_the_same(make_github: MakeData, processor: Any) -> None:
    root = make_github({"train": 3})
    for mode in ("audio", "text", "dual"):
        path = prepare(root, mode)
        theirs, ours = load([path], processor, RLHFDataset), load([path], processor)
        for index in range(3):
            rendered = [
                processor.apply_chat_template(rows[index]["raw_prompt"], tokenize=False)
                for rows in (theirs, ours)
            ]
            assert rendered[0] == rendered[1]
            assert theirs[index]["extra_info"] == ours[index]["extra_info"]


def test_foreign_parquet_is_refused_with_the_command_to_run(processor: Any, tmp_path: Path) -> None:
    table = pa.table({"prompt": ["hello"]})
    pq.write_table(table, tmp_path / "foreign.parquet")
    with pytest.raises(ValueError, match=r"no column audio, extra_info.*soundmind\.preprocess"):
        load([tmp_path / "foreign.parquet"], processor)


def test_settings_may_be_absent_from_a_closed_config(make_github: MakeData, processor: Any) -> None:
    path = prepare(make_github({"train": 2}), "audio")
    config = OmegaConf.create({"max_prompt_length": 512, "filter_overlong_prompts": False})
    OmegaConf.set_struct(config, True)
    rows = AudioRLHFDataset([str(path)], processor.tokenizer, config, processor)
    messages = rows[0]["raw_prompt"]
    assert len(AudioRLHFDataset._process_multi_modal_info(messages, 14, config)[2] or []) == 1


def test_max_samples_takes_the_first_rows(make_github: MakeData, processor: Any) -> None:
    path = prepare(make_github({"train": 5}), "audio")
    config = OmegaConf.create({"max_prompt_length": 512, "filter_overlong_prompts": False})
    rows = AudioRLHFDataset(str(path), processor.tokenizer, config, processor, max_samples=2)
    assert [rows[i]["index"] for i in range(len(rows))] == [0, 1]


def test_pickled_dataset_resumes_from_its_files(make_github: MakeData, processor: Any) -> None:
    rows = load([prepare(make_github({"train": 3}), "audio")], processor)
    resumed = pickle.loads(pickle.dumps(rows))
    resumed.resume_dataset_state()
    assert resumed[2]["raw_prompt"] == rows[2]["raw_prompt"]


def test_a_curriculum_orders_training_rows_and_leaves_validation_alone(
    make_github: MakeData, processor: Any, tmp_path: Path
) -> None:
    path = prepare(make_github({"train": 4}), "text")
    lines = [
        {"split": "train", "id": f"{number:04d}", "mode": "text", "ground_truth": "entailed"}
        | {"verdict": "entailed" if number in (1, 3) else None}
        for number in range(4)
    ]
    saved = tmp_path / "predictions.jsonl"
    saved.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def order(train_files: list[str]) -> list[str]:
        rows = load([path], processor, curriculum=str(saved), train_files=train_files)
        return [rows[index]["extra_info"]["id"] for index in range(len(rows))]

    assert order([str(path)]) == ["0001", "0003", "0000", "0002"]
    assert order(["another.parquet"]) == ["0000", "0001", "0002", "0003"]
