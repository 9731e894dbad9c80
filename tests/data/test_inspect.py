from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from processes import REPOSITORY

from soundmind import inspect as soundmind_inspect
from soundmind import preprocess
from soundmind.data import inspect
from soundmind.data.audio import load_waveform
from soundmind.data.rows import read_row, with_clip

MakeData = Callable[..., Path]


def prepare(root: Path, mode: str, *arguments: str) -> Path:
    command = ["--mode", mode, "--data-dir", str(root), "--splits", "dev", "--tokenizer", "none"]
    assert preprocess.main([*command, *arguments]) == 0
    return root / "parquet" / mode / "dev.parquet"


@pytest.mark.parametrize("embed", [False, True])
def test_row_is_shown_and_its_clip_written(
    make_github: MakeData, tmp_path: Path, capsys: pytest.CaptureFixture[str], embed: bool
) -> None:
    root = make_github({"dev": 3})
    path = prepare(root, "dual", *["--embed-audio"] * embed)
    capsys.readouterr()
    assert (
        soundmind_inspect.main([str(path), "--row", "1", "--output-dir", str(tmp_path / "out")])
        == 0
    )
    page = capsys.readouterr().out
    for expected in ("dev/0001", "entailed  (label 1)", "<|audio_bos|><|AUDIO|>", "clip  "):
        assert expected in page
    assert "Major premise" in page and page.count("<|im_start|>") == 3
    written, rate = soundfile.read(tmp_path / "out/dev-0001.wav", dtype="float32")
    assert rate == 16_000
    heard = load_waveform(root / "dev/0001/question.wav")
    np.testing.assert_allclose(written, heard, atol=2 / 32_768)


def test_counts_by_kind_add_up_to_what_the_processor_makes(
    make_github: MakeData, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    tiny = pytest.importorskip("soundmind.standin.tiny")
    processor = tiny.build_processor(tiny.build_tokenizer(tiny.tokenizer_corpus()))
    processor.save_pretrained(tmp_path / "model")
    path = prepare(make_github({"dev": 2}), "dual")
    row = read_row(str(path), 1)
    messages = with_clip(row["prompt"], row["_clip"])
    template = inspect.chat_template(tmp_path / "model")
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert inspect.render_prompt(messages, template) == rendered
    clip = load_waveform(row["_clip"])
    inputs = processor(text=rendered, audio=[clip], sampling_rate=16_000)
    kinds, unit = inspect.count_kinds(messages, row["extra_info"], template, tmp_path / "model")
    assert unit == "tokens"
    assert sum(kinds.values()) == len(inputs["input_ids"][0])
    assert kinds["clip"] == row["extra_info"]["audio_tokens"]
    assert list(kinds) == ["clip", "system", "question", "instruction", "frame"]


def test_text_row_has_no_clip(
    make_github: MakeData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prepare(make_github({"dev": 2}), "text")
    assert soundmind_inspect.main([str(path), "--output-dir", str(tmp_path / "out")]) == 0
    assert "none in this mode" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_row_that_is_not_there_is_a_plain_message(
    make_github: MakeData, capsys: pytest.CaptureFixture[str]
) -> None:
    path = prepare(make_github({"dev": 2}), "text")
    assert soundmind_inspect.main([str(path), "--row", "2"]) == 2
    assert "has rows 0 to 1, asked for 2" in capsys.readouterr().err
    assert soundmind_inspect.main([str(path.with_name("none.parquet"))]) == 2


def test_data_modules_import_without_torch_or_verl() -> None:
    heavy = ["torch", "verl", "vllm", "transformers", "datasets", "qwen_omni_utils", "librosa"]
    code = f"import sys\nfor name in {heavy}: sys.modules[name] = None\n"
    names = sorted(path.stem for path in (REPOSITORY / "soundmind/data").glob("[a-z]*.py"))
    code += "".join(f"import soundmind.data.{name}\n" for name in names)
    code += "import soundmind.preprocess, soundmind.inspect\n"
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_crafted_row_writes_inside_the_folder_only(make_github: MakeData, tmp_path: Path) -> None:
    row = read_row(str(prepare(make_github({"dev": 1}), "audio")), 0)
    output = tmp_path / "a/out"
    for split, row_id in (("../../x", "1"), ("/etc/x", "1"), ("dev", "../y"), ("dev", "z" * 300)):
        row["extra_info"].update(split=split, id=row_id)
        path = inspect.write_clip(row, output)
        assert path.resolve().parent == output.resolve() and path.is_file()
    assert [p.name for p in tmp_path.iterdir() if p.name not in ("data", "a")] == []
    assert len(list(output.iterdir())) == 4  # and nothing temporary


@pytest.mark.parametrize(
    "files,words",
    [
        ({}, "holds no chat template"),
        (
            {"chat_template.jinja": "{% for m in messages %}{{ m.role }}{% endfor %}"},
            "leaves out the clip",
        ),
        ({"chat_template.jinja": "{% for m in messages %}"}, "cannot be rendered"),
        ({"chat_template.jinja": "{{ raise_exception('no system') }}"}, "no system"),
        ({"chat_template.jinja": "{{ messages[9].content }}"}, "cannot be rendered"),
        ({"chat_template.jinja": b"\xff\xfe\x00"}, "UTF-16"),
        ({"chat_template.json": "version https://git-lfs.github.com/spec/v1"}, "Git LFS pointer"),
        ({"chat_template.json": "[1]"}, "cannot be read"),
        (
            {
                "chat_template.jinja": "{{ messages[0].content }}<|AUDIO|>",
                "tokenizer.json": "<html>",
            },
            "web page",
        ),
    ],
)
def test_a_checkpoint_that_cannot_show_the_prompt_is_an_error_in_words(
    make_github: MakeData,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    files: dict[str, str | bytes],
    words: str,
) -> None:
    path = prepare(make_github({"dev": 1}), "audio")
    model = tmp_path / "model"
    model.mkdir()
    for name, content in files.items():
        (model / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    capsys.readouterr()
    assert soundmind_inspect.main([str(path), "--model", str(model)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and "Traceback" not in said
