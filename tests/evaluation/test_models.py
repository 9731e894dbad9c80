"""Which models an evaluation opens, and what is said of the others."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from soundmind.evaluation.models import ADAPTERS, known_models, open_model, render
from soundmind.model.folder import ModelError
from soundmind.system import hub


@pytest.fixture
def omni(tmp_path: Path, random_stand_in: Path) -> Path:
    """A stand-in's folder that a test may damage."""
    folder = tmp_path / "model"
    shutil.copytree(random_stand_in, folder)
    return folder


def drop_weights(folder: Path, *prefixes: str) -> None:
    """Write the weights again without tensors of these prefixes."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = {n: t for n, t in load_file(path).items() if not n.startswith(prefixes)}
    save_file(tensors, path, {"format": "pt"})


def test_a_complete_folder_opens_for_text_and_speech(omni: Path) -> None:
    model = open_model(str(omni), speech=True)
    assert model.is_omni and model.stand_in == "stand-in with random weights"
    digest = model.digest
    weights = bytearray((omni / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (omni / "model.safetensors").write_bytes(weights)
    assert open_model(str(omni)).digest != digest


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tokenizer.json", r"tokenizer\.json \(or vocab\.json"),
        ("*processor_config.json", "preprocessor_config"),
        ("model.safetensors", r"model\.safetensors \(or its index"),
        ("spk_dict.pt", "voices"),
        ("config.json", "no config.json"),
    ],
)
def test_missing_files_of_a_model_are_named(omni: Path, name: str, message: str) -> None:
    for path in omni.glob(name):
        path.unlink()
    with pytest.raises(ModelError, match=message):
        open_model(str(omni), speech=True)


def test_a_missing_shard_is_named(omni: Path) -> None:
    (omni / "model.safetensors").unlink()
    table = {"thinker.a": "model-00001-of-00002.safetensors", "talker.b": "model-2.safetensors"}
    (omni / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    with pytest.raises(ModelError, match=r"model-00001-of-00002\.safetensors is missing.*model-2"):
        open_model(str(omni))


def test_a_cut_weight_file_is_told(omni: Path) -> None:
    data = (omni / "model.safetensors").read_bytes()
    (omni / "model.safetensors").write_bytes(data[:100])
    with pytest.raises(ModelError, match="cut short"):
        open_model(str(omni))


def test_a_folder_without_talker_writes_but_does_not_speak(omni: Path) -> None:
    drop_weights(omni, "talker.", "token2wav.")
    assert open_model(str(omni)).is_omni
    with pytest.raises(ModelError, match=r"talker\.\*.*token2wav\.\*"):
        open_model(str(omni), speech=True)


def test_a_thinker_alone_is_explained_and_the_export_named(omni: Path) -> None:
    config = json.loads((omni / "config.json").read_text())
    (omni / "config.json").write_text(json.dumps(config["thinker_config"]))
    with pytest.raises(ModelError, match=r"thinker alone.*soundmind\.export"):
        open_model(str(omni))


def test_thinker_weights_under_a_complete_configuration_are_explained_too(omni: Path) -> None:
    drop_weights(omni, "thinker.", "talker.", "token2wav.")
    drop = {"audio_tower.x": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    text = json.dumps(drop).encode()
    (omni / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b" ")
    with pytest.raises(ModelError, match=r"soundmind\.export"):
        open_model(str(omni))


def test_a_training_checkpoint_is_explained(tmp_path: Path) -> None:
    (tmp_path / "actor").mkdir()
    with pytest.raises(ModelError, match=r"training checkpoint.*soundmind\.export"):
        open_model(str(tmp_path))


def test_unknown_models_get_the_list_of_known_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="no adapter for model type 'llama'") as error:
        open_model(str(tmp_path))
    assert all(adapter.name in str(error.value) for adapter in ADAPTERS.values())
    assert known_models() in str(error.value)


def test_no_model_and_no_hub_are_plain_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelError, match="no such folder, and not a Hub id"):
        open_model(str(tmp_path / "nowhere"))
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: False)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(ModelError, match=r"cannot be reached.*hf download"):
        open_model("nobody-here/no-model-9f2")


def test_speech_of_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_audio"}')
    with pytest.raises(ModelError, match="Qwen2-Audio; use --output-modality text"):
        open_model(str(tmp_path), speech=True)


def test_placeholders_are_those_of_the_installed_vllm() -> None:
    found = importlib.util.find_spec("vllm")
    if found is None or not found.submodule_search_locations:
        pytest.skip("vLLM is not installed")
    folder = Path(found.submodule_search_locations[0]) / "model_executor/models"
    files = {
        "qwen2_5_omni": "qwen2_5_omni_thinker",
        "qwen3_omni_moe": "qwen3_omni_moe_thinker",
        "gemma3n": "gemma3n_mm",
    }
    for key, adapter in ADAPTERS.items():
        source = (folder / f"{files.get(key, key)}.py").read_text()
        text = adapter.placeholder.replace("Audio 1: ", "").replace("\n", "")
        assert text in source or text.replace("1", "{i}") in source, key


def test_other_models_get_plain_strings_with_their_own_placeholder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_audio"}')
    model = open_model(str(tmp_path))

    class Template:
        def apply_chat_template(self, messages: list[dict[str, Any]], **_: Any) -> str:
            return json.dumps(messages)

    messages = [
        {"role": "system", "content": [{"type": "text", "text": "You are Qwen."}]},
        {
            "role": "user",
            "content": [{"type": "audio", "audio": "x.wav"}, {"type": "text", "text": "Think."}],
        },
    ]
    rendered = json.loads(render(model, Template(), messages))
    text = "Audio 1: <|audio_bos|><|AUDIO|><|audio_eos|>\nThink."
    assert rendered == [{"role": "user", "content": text}]
