"""Parameter counts from dimensions equal those of transformers' own classes, tensor by tensor."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from soundmind.model.parts import PARTS, part_of
from soundmind.planning import sizes
from soundmind.standin.random_thinker import random_thinker_config


def counted(thinker: Any) -> dict[str, int]:
    """Parameters of a thinker by part, counted on its tensors."""
    counts: Counter[str] = Counter()
    for name, parameter in thinker.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


def meta_thinker(config: Any) -> Any:
    """transformers' thinker without memory for its weights."""
    import torch
    from transformers import Qwen2_5OmniThinkerForConditionalGeneration

    with torch.device("meta"):
        return Qwen2_5OmniThinkerForConditionalGeneration(config)


@pytest.mark.parametrize("size", sizes.PUBLISHED.values(), ids=lambda size: size.name)
def test_a_published_thinker_has_exactly_as_many_parameters(size: sizes.OmniSize) -> None:
    pytest.importorskip("transformers")
    expected = sizes.parameters(size)
    found = counted(meta_thinker(random_thinker_config(size)))
    assert found == {part: expected[part] for part in found}
    assert sum(found.values()) == size.thinker_parameters


def test_the_7b_has_the_defaults_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    text, audio = transformers.Qwen2_5OmniThinkerConfig().text_config, None
    audio = transformers.Qwen2_5OmniThinkerConfig().audio_config
    size = sizes.QWEN2_5_OMNI_7B
    assert size.text == sizes.TextSize(
        text.hidden_size,
        text.num_hidden_layers,
        text.num_attention_heads,
        text.num_key_value_heads,
        text.intermediate_size,
        text.vocab_size,
    )
    assert size.audio == sizes.AudioSize(
        audio.d_model,
        audio.encoder_layers,
        audio.encoder_attention_heads,
        audio.encoder_ffn_dim,
        audio.output_dim,
        audio.num_mel_bins,
        audio.n_window,
    )


def test_published_totals() -> None:
    # Held against change by accident; 8.93 is the 7B's thinker alone.
    seven, three = sizes.QWEN2_5_OMNI_7B, sizes.QWEN2_5_OMNI_3B
    assert tuple(sizes.parameters(seven)) == PARTS[:4]
    assert seven.thinker_parameters == 8_931_813_888
    assert three.thinker_parameters == 4_703_464_448
    assert (seven.folder_bytes, three.folder_bytes) == (22_362_553_472, 11_972_343_936)


def test_a_tied_head_is_read_where_published_folders_write_it() -> None:
    config = random_thinker_config(sizes.QWEN2_5_OMNI_3B)
    for level in ("text_config", None):
        thinker = json.loads(json.dumps(config.to_dict(), default=str))
        for part in (thinker, thinker["text_config"]):
            part.pop("tie_word_embeddings", None)
        (thinker[level] if level else thinker)["tie_word_embeddings"] = True
        size = sizes.from_config({"thinker_config": thinker}, "x", "test")
        assert size.text.tied, level


def test_a_folder_tells_its_own_dimensions(random_stand_in: Path) -> None:
    from transformers import Qwen2_5OmniConfig

    size = sizes.model_size(str(random_stand_in))
    expected = sizes.parameters(size)
    thinker = meta_thinker(Qwen2_5OmniConfig.from_pretrained(random_stand_in).thinker_config)
    found = counted(thinker)
    assert found == {part: expected[part] for part in found}


def test_a_model_that_is_not_there_is_told_by_its_name() -> None:
    assert sizes.model_size("checkpoints/Qwen2.5-Omni-7B") is sizes.QWEN2_5_OMNI_7B
    assert sizes.model_size("Qwen/Qwen2.5-Omni-3B") is sizes.QWEN2_5_OMNI_3B
    with pytest.raises(sizes.SizeError, match="is not a published model"):
        sizes.model_size("checkpoints/other")


def test_a_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(sizes.SizeError, match="not found"):
        sizes.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(sizes.SizeError, match="download the folder again"):
        sizes.from_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(sizes.SizeError, match="'thinker_config' is missing"):
        sizes.from_folder(tmp_path)
