"""A published model without its weights: what is wrong with the small files is said before anything."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from soundmind.model.folder import folder_shapes, weight_faults
from soundmind.planning.sizes import PUBLISHED, from_folder
from soundmind.standin import narrow


@pytest.fixture(scope="module")
def published() -> Path:
    """The real small files of Qwen2.5-Omni-3B, or a skip where they are not at hand."""
    folder = os.environ.get("SOUNDMIND_PUBLISHED_DIR", "")
    if not folder:
        pytest.skip("set SOUNDMIND_PUBLISHED_DIR to the small files of Qwen2.5-Omni-3B")
    return Path(folder)


@pytest.fixture
def copied(published: Path, tmp_path: Path) -> Path:
    for name in narrow.SMALL_FILES:
        shutil.copyfile(published / name, tmp_path / name)
    return tmp_path


def rewrite(path: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def built(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("narrow")
    narrow.write_narrow(published, folder, "Qwen2.5-Omni-7B")
    return folder


def test_a_folder_without_all_files_is_half_a_download(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (fault,) = narrow.small_file_faults(tmp_path)
    assert "tokenizer.json" in fault and "half a download" in fault


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    for name in narrow.SMALL_FILES:
        (tmp_path / name).write_text("{}")
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    (fault,) = narrow.small_file_faults(tmp_path)
    assert fault.startswith(str(tmp_path / "tokenizer.json")) and "half a download" in fault


def test_another_kind_of_config_is_named(tmp_path: Path) -> None:
    for name in narrow.SMALL_FILES:
        (tmp_path / name).write_text("{}")
    (fault,) = narrow.small_file_faults(tmp_path)
    assert "config.json" in fault and "thinker_config" in fault


def test_the_published_files_have_no_fault(published: Path) -> None:
    assert list(narrow.small_file_faults(published)) == []


def test_a_tokenizer_larger_than_the_head_is_refused(copied: Path) -> None:
    def shrink(config: Any) -> None:
        config["thinker_config"]["text_config"]["vocab_size"] = 151_600

    rewrite(copied / "config.json", shrink)
    (fault,) = narrow.small_file_faults(copied)
    assert "151,665" in fault and "151,600" in fault


@pytest.mark.parametrize("placeholders", ["", "<|AUDIO|><|AUDIO|>"])
def test_a_template_without_exactly_one_placeholder_a_clip_is_refused(
    copied: Path, placeholders: str
) -> None:
    for name in ("chat_template.json", "tokenizer_config.json"):

        def change(content: Any) -> None:
            template = content["chat_template"]
            content["chat_template"] = template.replace("<|AUDIO|>", placeholders)

        rewrite(copied / name, change)
    (fault,) = narrow.small_file_faults(copied)
    assert "chat template" in fault and "placeholder" in fault


def test_a_narrow_model_has_the_published_names_files_heads_and_vocabulary(
    published: Path, built: Path
) -> None:
    index = json.loads((published / narrow.WEIGHTS_INDEX).read_text())["weight_map"]
    kinds = {narrow.kind_of(name) for name in index}
    found = {narrow.kind_of(name) for name in folder_shapes(built)}
    # A buffer of rotary frequencies, which transformers makes anew.
    assert kinds - found == {"token2wav.code2wav_dit_model.rotary_embed.inv_freq"}
    assert found <= kinds
    assert weight_faults(built) == []
    assert len(list(built.glob("*.safetensors"))) == len(set(index.values()))
    size, real = from_folder(built).text, PUBLISHED["Qwen2.5-Omni-7B"].text
    assert (size.heads, size.kv_heads, size.vocab) == (real.heads, real.kv_heads, real.vocab)
    for name in ("chat_template.json", "tokenizer.json", "preprocessor_config.json"):
        assert (built / name).read_bytes() == (published / name).read_bytes()
