"""What a run trains: the table, and that frozen parts get no gradient, no state and no decay."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from processes import REPOSITORY, start_ranks
from reloading import assert_loaded_again

from soundmind.model import parts
from soundmind.run import lora_checks

ALL = {"audio_tower": True, "projector": True}
NONE = {"audio_tower": False, "projector": False}
OPTIMIZER = [
    "actor_rollout_ref.actor.optim.lr=1e-3",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
    "actor_rollout_ref.actor.optim.weight_decay=0.5",
]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("thinker.model.embed_tokens.weight", "language_model"),
        ("thinker.lm_head.weight", "language_model"),
        ("model.layers.3.mlp.up_proj.weight", "language_model"),
        ("base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias", "language_model"),
        ("thinker.audio_tower.proj.bias", "projector"),
        ("audio_tower.proj.weight", "projector"),
        ("audio_tower.layers.0.self_attn.out_proj.weight", "audio_tower"),
        ("thinker.audio_tower.audio_bos_eos_token.weight", "audio_tower"),
        ("thinker.visual.blocks.0.attn.proj.weight", "vision"),
        ("talker.model.layers.0.self_attn.q_proj.weight", "talker"),
        ("token2wav.code2wav_bigvgan_model.conv_pre.weight", "vocoder"),
    ],
)
def test_every_tensor_has_its_part(name: str, part: str) -> None:
    assert parts.part_of(name) == part


def test_an_unknown_tensor_is_named() -> None:
    with pytest.raises(ValueError, match=r"decoder\.weight"):
        parts.part_of("decoder.weight")


def test_the_parts_of_a_folder_add_up_to_transformers_own_count(random_stand_in: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(random_stand_in)
    thinker = transformers.Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        random_stand_in, config=config.thinker_config
    )
    wanted = {
        "audio_tower": thinker.audio_tower.num_parameters() - _size(thinker.audio_tower.proj),
        "projector": _size(thinker.audio_tower.proj),
        "vision": thinker.visual.num_parameters(),
        "language_model": thinker.model.num_parameters() + _size(thinker.lm_head),
    }
    found = {row.part: row.parameters for row in parts.rows(random_stand_in, ALL)}
    assert {part: found[part] for part in wanted} == wanted
    assert found["talker"] > 0
    assert found["vocoder"] > 0


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize(
    ("train", "rank", "states"),
    [
        (ALL, 0, ["trained", "trained", "trained"]),
        (NONE, 0, ["trained", "frozen", "frozen"]),
        ({"audio_tower": False, "projector": True}, 0, ["trained", "trained", "frozen"]),
        ({"audio_tower": False}, 0, ["trained", "frozen", "frozen"]),
        (NONE, 4, ["LoRA rank 4", "frozen", "frozen"]),
    ],
)
def test_the_table_says_what_is_trained(
    random_stand_in: Path, train: dict[str, bool], rank: int, states: list[str]
) -> None:
    rows = parts.rows(random_stand_in, train, rank)
    assert [row.part for row in rows] == list(parts.PARTS)
    assert [row.state for row in rows] == [*states, *["not loaded"] * 3]
    for row in rows:
        if row.state == "trained":
            assert row.trained == row.parameters > 0
        elif row.state.startswith("LoRA"):
            assert 0 < row.trained < row.parameters
        else:
            assert row.trained == 0
    text = parts.format_table(rows)
    assert text.splitlines()[-1].split() == [
        "total",
        f"{sum(row.parameters for row in rows):,}",
        f"{sum(row.trained for row in rows):,}",
    ]


# --- the engine -----------------------------------------------------------------------------------


def train(model: Path, folder: Path, ranks: int, *arguments: str) -> tuple[dict[str, Any], str]:
    """Two updates on `ranks` ranks of the real engine; see tests/support/parts_rank.py."""
    pytest.importorskip("torch")
    pytest.importorskip("verl")
    output = folder / "result.pt"
    command = [sys.executable, "-W", "ignore", str(REPOSITORY / "tests/support/parts_rank.py")]
    command += ["--model", str(model), "--ranks", str(ranks), "--output", str(output)]
    command += ["--rendezvous", str(folder / "rendezvous"), *arguments, *OPTIMIZER]
    return start_ranks(command, ranks, output)


@pytest.fixture(scope="module")
def ears_frozen(
    random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    """One rank, the projector trained and the rest of the tower frozen; saved and loaded again."""
    folder = tmp_path_factory.mktemp("ears")
    arguments = ["--checkpoint", str(folder / "global_step_1")]
    arguments += ["train.audio_tower=false", "train.projector=true"]
    return train(random_stand_in, folder, 1, *arguments)


@pytest.fixture(scope="module")
def two_ranks(
    random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], str]:
    """Two ranks, one with clips and one with text; everything but the language model frozen."""
    return train(
        random_stand_in,
        tmp_path_factory.mktemp("ranks"),
        2,
        *("--batch", "sides", "train.audio_tower=false"),
        "actor_rollout_ref.model.enable_gradient_checkpointing=true",
    )


def by_part(names: Any, trained: set[str]) -> tuple[list[str], list[str]]:
    """Names of trained parts and names of frozen ones; both must be there."""
    mine = [name for name in names if parts.part_of(name) in trained]
    others = [name for name in names if parts.part_of(name) not in trained]
    assert mine
    assert others
    return mine, others


@pytest.mark.parametrize(
    ("run", "trained"),
    [("ears_frozen", {"language_model", "projector"}), ("two_ranks", {"language_model"})],
)
def test_a_frozen_part_has_no_gradient_no_state_and_no_decay(
    run: str, trained: set[str], request: pytest.FixtureRequest
) -> None:
    import torch

    found, _ = request.getfixturevalue(run)
    mine, frozen = by_part(found["gradients"], trained)
    for name in mine:
        gradient = found["gradients"][name]
        assert gradient is not None, name
        assert name in found["state"]
        assert not torch.equal(found["after"][name], found["before"][name]), name
    for name in frozen:
        assert found["gradients"][name] is None, name
        # A weight decay of 0.5 would show.
        assert torch.equal(found["after"][name], found["before"][name]), name
    assert found["optimized"] == found["state"] == set(mine)


@pytest.mark.parametrize("run", ["ears_frozen", "two_ranks"])
def test_a_frozen_tower_keeps_no_activations(run: str, request: pytest.FixtureRequest) -> None:
    found, _ = request.getfixturevalue(run)
    layers = [n for n in found["in_graph"] if n.startswith("audio_tower.layers.")]
    assert layers
    assert not any(found["in_graph"][name] for name in layers)
    assert found["in_graph"]["model.layers.1"]
    assert found["in_graph"].get("audio_tower.proj") == (run == "ears_frozen")


@pytest.mark.parametrize("run", ["ears_frozen", "two_ranks"])
def test_every_loaded_tensor_reaches_the_rollout_under_its_full_name(
    run: str, request: pytest.FixtureRequest
) -> None:
    import torch

    found, _ = request.getfixturevalue(run)
    assert {f"thinker.{name}" for name in found["after"]} == found["sent"].keys()
    assert not any("visual" in name for name in found["sent"])
    for name, tensor in found["after"].items():
        assert torch.equal(found["sent"][f"thinker.{name}"], tensor)


def test_a_checkpoint_of_a_partly_frozen_model_loads_into_a_scrambled_engine(
    ears_frozen: tuple[dict[str, Any], str],
) -> None:
    assert_loaded_again(ears_frozen[0])


def test_the_engine_prints_the_table_that_the_headers_give(
    ears_frozen: tuple[dict[str, Any], str], random_stand_in: Path
) -> None:
    settings = {"audio_tower": False, "projector": True}
    assert parts.format_table(parts.rows(random_stand_in, settings)) in ears_frozen[1]


# --- bad input ------------------------------------------------------------------------------------


def lora_config(model: Path, **changes: Any) -> Any:
    values = {"path": str(model), "lora_rank": 4, "lora": {"merge": True}, **changes}
    return OmegaConf.create({"actor_rollout_ref": {"model": values}, "train": NONE})


def test_a_lora_run_freezes_the_whole_base(random_stand_in: Path) -> None:
    config = lora_config(random_stand_in)
    assert list(lora_checks.part_problems(config)) == []
    config.train.audio_tower = True
    (problem,) = lora_checks.part_problems(config)
    assert "train.audio_tower=false" in problem
    assert "projector=false" not in problem


def test_lora_without_merging_is_refused(random_stand_in: Path) -> None:
    (problem,) = lora_checks.part_problems(lora_config(random_stand_in, lora={}))
    assert "lora.merge=true" in problem


def write_adapter(folder: Path, shape: tuple[int, int], rank: int = 4) -> Path:
    """An adapter of one matrix A for the first layer's queries, written without torch."""
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    size = 4 * shape[0] * shape[1]
    entry = {"dtype": "F32", "shape": list(shape), "data_offsets": [0, size]}
    header = json.dumps({name: entry}).encode()
    folder.mkdir(exist_ok=True)
    (folder / "adapter_model.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(size)
    )
    settings = {
        "r": rank,
        "lora_alpha": 8,
        "base_model_name_or_path": "checkpoints/Qwen2.5-Omni-7B",
    }
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder


def test_an_adapter_is_matched_with_its_base(random_stand_in: Path, tmp_path: Path) -> None:
    good = write_adapter(tmp_path / "good", (4, 128))
    assert not list(lora_checks.adapter_problems(good, random_stand_in, 4))
    (problem,) = lora_checks.adapter_problems(good, random_stand_in, 8)
    assert "rank 4" in problem
    (good / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8, "use_dora": true}')
    (problem,) = lora_checks.adapter_problems(good, random_stand_in, 4)
    assert "use_dora" in problem
    (good / "adapter_config.json").write_text('{"r": 4,')
    assert len(list(lora_checks.adapter_problems(good, random_stand_in, 4))) == 1
    wide = write_adapter(tmp_path / "wide", (4, 3584))
    (problem,) = lora_checks.adapter_problems(wide, random_stand_in, 4)
    assert "layers.0.self_attn.q_proj" in problem
    assert "does not belong to" in problem


def test_an_adapter_without_its_base_names_the_base(tmp_path: Path) -> None:
    adapter = write_adapter(tmp_path / "adapter", (4, 128))
    config = lora_config(tmp_path / "missing", lora_adapter_path=str(adapter))
    (problem,) = lora_checks.part_problems(config)
    assert "checkpoints/Qwen2.5-Omni-7B" in problem
    assert str(tmp_path / "missing") in problem


def test_a_folder_that_is_no_adapter_is_named(random_stand_in: Path, tmp_path: Path) -> None:
    config = lora_config(random_stand_in, lora_adapter_path=str(tmp_path))
    (problem,) = lora_checks.part_problems(config)
    assert "adapter_config.json" in problem


def test_an_adapter_path_without_a_rank_would_be_ignored(
    random_stand_in: Path, tmp_path: Path
) -> None:
    adapter = write_adapter(tmp_path / "adapter", (4, 128))
    config = lora_config(random_stand_in, lora_rank=0, lora_adapter_path=str(adapter))
    assert any("lora_rank=0" in problem for problem in lora_checks.part_problems(config))
