"""Model folders as people have them: one judge, and every reader reads the same files."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from soundmind.model.checkpoints import weights_fingerprint
from soundmind.model.folder import (
    WEIGHTS,
    WEIGHTS_INDEX,
    ModelError,
    check_omni_folder,
    folder_shapes,
    weight_faults,
)
from soundmind.model.processor import load_processor, quiet_published_ids

pytest.importorskip("transformers")


@pytest.fixture
def folder(random_stand_in: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(random_stand_in, tmp_path / "model"))


def split(folder: Path, parts: int, index: bool = True) -> None:
    """The folder's weights in shards, with an index unless told otherwise."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / WEIGHTS)
    names = sorted(tensors)
    where: dict[str, str] = {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        mine = names[part::parts]
        save_file({name: tensors[name] for name in mine}, folder / file, {"format": "pt"})
        where.update(dict.fromkeys(mine, file))
    if index:
        (folder / WEIGHTS_INDEX).write_text(json.dumps({"weight_map": where}))


def shards_without_index(folder: Path) -> None:
    split(folder, 3, index=False)
    (folder / WEIGHTS).unlink()


def adapter_alone(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "adapter_model.safetensors")


def single_beside_index(folder: Path) -> None:
    split(folder, 2)


def download_elsewhere(folder: Path) -> None:
    (folder / "._____temp").mkdir()
    (folder / WEIGHTS).rename(folder / "._____temp" / WEIGHTS)


def pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\nsize 1843244\n")


def index_that_is_none(folder: Path) -> None:
    split(folder, 2)
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS_INDEX).write_text("[]")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shards_without_index, "3 shards and no model.safetensors.index.json"),
        (adapter_alone, "is a LoRA adapter"),
        (single_beside_index, "lies beside model.safetensors.index.json"),
        (download_elsewhere, "has no"),
        (pointer, "a Git LFS pointer"),
        (index_that_is_none, "cannot be read"),
    ],
)
def test_a_folder_that_would_be_read_in_part_is_named_for_training_and_evaluation(
    folder: Path, damage: Callable[[Path], None], says: str
) -> None:
    damage(folder)
    (fault,) = weight_faults(folder)
    assert says in fault
    with pytest.raises(ModelError) as error:
        check_omni_folder(folder, speech=False)
    assert says in str(error.value)


def test_shards_of_another_download_beside_the_index_belong_to_no_model(folder: Path) -> None:
    whole, shapes = weights_fingerprint(folder), folder_shapes(folder)
    split(folder, 3)
    for stale in folder.glob("model-*.safetensors"):
        stale.write_bytes(b"of an earlier download")
    split(folder, 2)
    (folder / WEIGHTS).unlink()
    assert weight_faults(folder) == []
    assert folder_shapes(folder) == shapes
    assert weights_fingerprint(folder) == whole


def test_a_template_in_the_tokenizers_settings_alone_is_found(folder: Path) -> None:
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_processor(str(folder)).chat_template == template


@pytest.mark.parametrize(
    ("template", "says"),
    [
        (None, "no prompt can be built by its chat template"),
        ("{{ undefined.attribute }}", "no prompt can be built by its chat template"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "renders a clip as 0 placeholders"),
    ],
)
def test_a_template_that_is_missing_or_drops_the_clip_is_refused(
    folder: Path, template: str | None, says: str
) -> None:
    path = folder / "chat_template.jinja"
    path.unlink() if template is None else path.write_text(template)
    with pytest.raises(ValueError, match=says):
        load_processor(str(folder))


def test_ids_of_every_published_folder_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    quiet_published_ids()
    logger = logging.getLogger("transformers.configuration_utils")
    logger.addHandler(caplog.handler)
    text = (
        "Model config: {} must be `None` or an integer within the vocabulary (between 0 and 8447)"
    )
    logger.warning(text.format("tts_text_end_token_id"))
    logger.warning(text.format("eos_token_id"))
    logger.removeHandler(caplog.handler)
    found = [record.getMessage() for record in caplog.records]
    assert found
    assert all("eos_token_id" in message for message in found)
