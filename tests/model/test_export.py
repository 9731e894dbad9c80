"""Checkpoints that are complete or absent, and exports that refuse whatever does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from soundmind.export import main
from soundmind.model import checkpoints
from soundmind.model.export import ExportError, export, find_checkpoint
from soundmind.run.folder import RunFolder

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

STEP = 3


def thinker_weights(base: Path) -> dict[str, Any]:
    """What training loads of the base: the thinker without vision."""
    from safetensors.torch import load_file

    found = {}
    for path in sorted(base.glob("*.safetensors")):
        found.update(load_file(path))
    return {
        name.removeprefix("thinker."): tensor
        for name, tensor in found.items()
        if name.startswith("thinker.") and not name.startswith("thinker.visual.")
    }


def write(root: Path, base: Path, state: dict[str, Any], step: int = STEP) -> Path:
    """A checkpoint of one rank under `root`, published as the trainer does it."""
    actor = root / checkpoints.WRITING / f"global_step_{step}" / "actor"
    actor.mkdir(parents=True)
    torch.save(state, actor / "model_world_size_1_rank_0.pt")
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))
    return checkpoints.publish(root, step, base)


@pytest.fixture(scope="module")
def state(random_stand_in: Path) -> dict[str, Any]:
    """Weights after an update that moved everything."""
    return {name: tensor + 0.01 for name, tensor in thinker_weights(random_stand_in).items()}


@pytest.fixture
def checkpoint(random_stand_in: Path, state: dict[str, Any], tmp_path: Path) -> Path:
    return write(tmp_path / "run/checkpoints", random_stand_in, state)


# --- a checkpoint ---------------------------------------------------------------------------------


def test_a_published_checkpoint_is_complete_and_nothing_is_left_aside(checkpoint: Path) -> None:
    root = checkpoint.parent
    assert checkpoints.faults(checkpoint) == []
    assert checkpoints.newest(root) == STEP
    assert (root / checkpoints.TRACKER).read_text() == str(STEP)
    assert not (root / checkpoints.WRITING).exists()


def test_a_kill_while_writing_leaves_the_earlier_checkpoint(
    checkpoint: Path, random_stand_in: Path, state: dict[str, Any]
) -> None:
    root = checkpoint.parent
    half = root / checkpoints.WRITING / "global_step_4/actor"
    half.mkdir(parents=True)
    (half / "model_world_size_1_rank_0.pt").write_bytes(b"half")
    assert checkpoints.newest(root) == STEP
    assert find_checkpoint(root.parent) == checkpoint
    shutil.rmtree(root / checkpoints.WRITING)
    assert write(root, random_stand_in, state, step=4).name == "global_step_4"
    assert (root / checkpoints.TRACKER).read_text() == "4"


def test_a_shard_of_another_machine_that_is_not_here_is_no_checkpoint(tmp_path: Path) -> None:
    actor = tmp_path / checkpoints.WRITING / "global_step_1/actor"
    actor.mkdir(parents=True)
    (actor / "fsdp_config.json").write_text('{"world_size": 2}')
    (actor / "model_world_size_2_rank_0.pt").write_bytes(b"here")
    with pytest.raises(checkpoints.CheckpointError, match=r"rank_1\.pt.*all nodes share"):
        checkpoints.publish(tmp_path, 1, None)
    assert checkpoints.newest(tmp_path) is None


def test_a_resumed_run_goes_back_to_the_last_complete_checkpoint(
    checkpoint: Path, random_stand_in: Path, state: dict[str, Any]
) -> None:
    root = checkpoint.parent
    broken = write(root, random_stand_in, state, step=4)
    (broken / "actor/model_world_size_1_rank_0.pt").write_bytes(b"cut short")
    (root / checkpoints.TRACKER).write_text("")  # a kill between opening and writing it
    folder = RunFolder(root.parent, resumed=True)
    assert folder.last_checkpoint() == STEP
    folder.prune_checkpoints(keep=1)
    assert (root / checkpoints.TRACKER).read_text() == str(STEP)
    assert checkpoint.is_dir()
    assert broken.is_dir(), "newer than the last complete one: replaced when the step is repeated"


def test_pruning_never_removes_the_last_complete_checkpoint(
    checkpoint: Path, random_stand_in: Path, state: dict[str, Any]
) -> None:
    root = checkpoint.parent
    for step in (1, 2):
        write(root, random_stand_in, state, step)
    (checkpoints.steps(root)[2] / "data.pt").touch()
    (checkpoints.steps(root)[1] / checkpoints.COMPLETE).unlink()
    checkpoints.prune(root, None)
    assert sorted(checkpoints.steps(root)) == [1, 2, 3]
    checkpoints.prune(root, 2)
    assert sorted(checkpoints.steps(root)) == [2, 3]
    checkpoints.prune(root, 1)
    assert sorted(checkpoints.steps(root)) == [3]


def test_a_fingerprint_knows_the_weights_and_not_the_files(
    random_stand_in: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(random_stand_in / "model.safetensors")
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[::2]}, tmp_path / "b.safetensors")
    save_file({n: tensors[n] for n in names[1::2]}, tmp_path / "a.safetensors")
    placed = {n: f"{'ba'[index % 2]}.safetensors" for index, n in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    whole = checkpoints.weights_fingerprint(random_stand_in)
    assert checkpoints.weights_fingerprint(tmp_path) == whole
    changed = next(name for name in names if name.startswith("thinker.lm_head"))
    save_file(
        {
            n: tensors[n] + (0.01 if n == changed else 0)
            for n in names[names.index(changed) % 2 :: 2]
        },
        tmp_path / ("a.safetensors" if names.index(changed) % 2 else "b.safetensors"),
    )
    assert checkpoints.weights_fingerprint(tmp_path) != whole


# --- the export -----------------------------------------------------------------------------------


def test_vision_talker_and_vocoder_come_from_the_base(
    checkpoint: Path, random_stand_in: Path, state: dict[str, Any], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    output = export(checkpoint, random_stand_in, tmp_path / "export")
    exported = load_file(output / "model.safetensors")
    base = load_file(random_stand_in / "model.safetensors")
    assert exported.keys() == base.keys()
    for name, tensor in exported.items():
        trained = state.get(name.removeprefix("thinker."))
        assert torch.equal(tensor, base[name] if trained is None else trained), name
    assert any(name.startswith("thinker.visual.") for name in exported)
    assert json.loads((output / "export.json").read_text())["thinker_tensors"] == len(state)
    assert not (output / "adapter").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_an_export_may_be_repeated(checkpoint: Path, random_stand_in: Path, tmp_path: Path) -> None:
    for _ in range(2):
        output = export(checkpoint, random_stand_in, tmp_path / "export")
    assert (output / "config.json").is_file()


def test_every_file_of_an_export_has_the_users_mode(
    checkpoint: Path, random_stand_in: Path, tmp_path: Path
) -> None:
    output = export(checkpoint, random_stand_in, tmp_path / "export")
    plain = tmp_path / "plain"
    plain.touch()
    modes = {path.name: path.stat().st_mode for path in output.iterdir() if path.is_file()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {plain.stat().st_mode}


def test_two_exports_into_one_folder_never_mix(
    checkpoint: Path,
    random_stand_in: Path,
    state: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second begins when the first has written its weights, and ends before it."""
    from soundmind.model import export as module

    later = {name: tensor + 0.01 for name, tensor in state.items()}
    second = write(checkpoint.parent, random_stand_in, later, step=STEP + 1)
    output = tmp_path / "export"
    alone = export(checkpoint, random_stand_in, tmp_path / "alone")
    stock = module._write_weights

    def meanwhile(*arguments: Any) -> int:
        monkeypatch.setattr(module, "_write_weights", stock)
        used = stock(*arguments)
        export(second, random_stand_in, output)
        return used

    monkeypatch.setattr(module, "_write_weights", meanwhile)
    export(checkpoint, random_stand_in, output)
    record = json.loads((output / "export.json").read_text())
    assert Path(record["checkpoint"]) == checkpoint
    weights = checkpoints.weights_fingerprint
    assert weights(output) == weights(alone)
    assert not [path for path in output.parent.iterdir() if path.name.startswith(".export")]


class Harmful:
    """What a shard of a stranger may hold: something that is run when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_in_a_shard_is_run(checkpoint: Path, random_stand_in: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    shard = checkpoint / "actor/model_world_size_1_rank_0.pt"
    torch.save({"lm_head.weight": Harmful(trace)}, shard)
    record = json.loads((checkpoint / checkpoints.COMPLETE).read_text())
    record["files"]["actor/" + shard.name] = shard.stat().st_size
    (checkpoint / checkpoints.COMPLETE).write_text(json.dumps(record))
    with pytest.raises(ExportError, match="cannot be read"):
        export(checkpoint, random_stand_in, tmp_path / "export")
    assert not trace.exists()


def test_a_folder_that_is_no_export_is_not_overwritten(
    checkpoint: Path, random_stand_in: Path, tmp_path: Path
) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/mine.txt").write_text("keep")
    with pytest.raises(ExportError, match=r"is no export"):
        export(checkpoint, random_stand_in, tmp_path / "notes")
    with pytest.raises(ExportError, match=r"is the base itself"):
        export(checkpoint, random_stand_in, random_stand_in)
    assert (tmp_path / "notes/mine.txt").read_text() == "keep"


def copy_of(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    return folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def test_an_incomplete_checkpoint_is_refused_by_name(
    checkpoint: Path, random_stand_in: Path, tmp_path: Path
) -> None:
    shard = checkpoint / "actor/model_world_size_1_rank_0.pt"
    cut(shard)
    with pytest.raises(ExportError, match=r"incomplete: .*rank_0\.pt has [\d,]+ bytes of"):
        export(checkpoint, random_stand_in, tmp_path / "export")
    shard.unlink()
    with pytest.raises(ExportError, match=r"incomplete: .*rank_0\.pt is missing"):
        export(checkpoint, random_stand_in, tmp_path / "export")
    (checkpoint / checkpoints.COMPLETE).unlink()
    with pytest.raises(ExportError, match=r"no complete\.json: saving it was interrupted"):
        export(checkpoint, random_stand_in, tmp_path / "export")
    with pytest.raises(ExportError, match=r"no checkpoint is complete"):
        find_checkpoint(checkpoint.parents[1])
    assert not (tmp_path / "export").exists()


def test_the_newest_complete_checkpoint_is_taken(
    checkpoint: Path, random_stand_in: Path, state: dict[str, Any]
) -> None:
    newer = write(checkpoint.parent, random_stand_in, state, step=9)
    assert find_checkpoint(checkpoint.parents[1]) == newer
    (newer / checkpoints.COMPLETE).unlink()
    assert find_checkpoint(checkpoint.parents[1]) == checkpoint
    with pytest.raises(ExportError, match=r"no checkpoint of step 5; there are \[3, 9\]"):
        find_checkpoint(checkpoint.parents[1], 5)


def test_a_shard_that_is_not_there_is_named(tmp_path: Path) -> None:
    from soundmind.model.export import load_sharded_state

    (tmp_path / "fsdp_config.json").write_text('{"world_size": 2}')
    torch.save({}, tmp_path / "model_world_size_2_rank_0.pt")
    with pytest.raises(ExportError, match=r"rank_1\.pt is missing: 1 of 2 shards"):
        load_sharded_state(tmp_path)
    (tmp_path / "model_world_size_2_rank_1.pt").write_bytes(b"not torch")
    with pytest.raises(ExportError, match=r"rank_1\.pt cannot be read"):
        load_sharded_state(tmp_path)


def test_a_half_downloaded_base_is_refused(
    checkpoint: Path, random_stand_in: Path, tmp_path: Path
) -> None:
    base = copy_of(random_stand_in, tmp_path / "base")
    cut(base / "model.safetensors")
    with pytest.raises(ExportError, match=r"base is incomplete: .*model\.safetensors"):
        export(checkpoint, base, tmp_path / "export")
    shutil.copy(random_stand_in / "model.safetensors", base)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ExportError, match=r"model-00002-of-00002\.safetensors is missing"):
        export(checkpoint, base, tmp_path / "export")
    (base / "config.json").unlink()
    with pytest.raises(ExportError, match=r"no config\.json"):
        export(checkpoint, base, tmp_path / "export")
    assert not (tmp_path / "export").exists()


def test_another_base_is_refused_even_if_its_shapes_fit(
    checkpoint: Path, random_stand_in: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    base = copy_of(random_stand_in, tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    save_file({n: tensor * 2 for n, tensor in tensors.items()}, base / "model.safetensors")
    with pytest.raises(ExportError, match=r"other weights than .*global_step_3 was trained from"):
        export(checkpoint, base, tmp_path / "export")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("lm_head.weight"), r"1 thinker tensors are not in .*lm_head"),
        (lambda state: state.update(extra=torch.zeros(1)), r"no place for 1 trained .*extra"),
        (
            lambda state: state.update({"lm_head.weight": torch.zeros(2, 2)}),
            r"thinker\.lm_head\.weight: \(2, 2\) in the checkpoint",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    random_stand_in: Path, state: dict[str, Any], tmp_path: Path, change: Any, message: str
) -> None:
    state = dict(state)
    change(state)
    checkpoint = write(tmp_path / "checkpoints", random_stand_in, state)
    with pytest.raises(ExportError, match=message):
        export(checkpoint, random_stand_in, tmp_path / "export")
    assert not list(tmp_path.glob("export*"))


# --- LoRA -----------------------------------------------------------------------------------------

STEM = "model.layers.0.self_attn.q_proj"


def lora_state(base: Path) -> dict[str, Any]:
    """A base under PEFT's names with one adapted layer of rank 2."""
    generator = torch.Generator().manual_seed(0)
    found = {f"base_model.model.{n}": tensor for n, tensor in thinker_weights(base).items()}
    for kind in ("weight", "bias"):
        found[f"base_model.model.{STEM}.base_layer.{kind}"] = found.pop(
            f"base_model.model.{STEM}.{kind}"
        )
    rows, columns = found[f"base_model.model.{STEM}.base_layer.weight"].shape
    for name, shape in (("A", (2, columns)), ("B", (rows, 2))):
        found[f"base_model.model.{STEM}.lora_{name}.default.weight"] = torch.randn(
            shape, generator=generator
        )
    return found


def write_lora(root: Path, base: Path, state: dict[str, Any], **changes: Any) -> Path:
    actor = root / checkpoints.WRITING / "global_step_3/actor"
    actor.mkdir(parents=True)
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": STEM, **changes}
    (actor / "adapter_config.json").write_text(json.dumps(settings))
    torch.save(state, actor / "model_world_size_1_rank_0.pt")
    (actor / "fsdp_config.json").write_text(json.dumps({"FSDP_version": 2, "world_size": 1}))
    return checkpoints.publish(root, 3, base)


@pytest.mark.parametrize("adapter_alone", [False, True])
def test_a_lora_checkpoint_becomes_a_merged_folder_and_an_adapter(
    random_stand_in: Path, tmp_path: Path, adapter_alone: bool
) -> None:
    from safetensors.torch import load_file

    state = lora_state(random_stand_in)
    if adapter_alone:  # verl's checkpoint.save_lora_only
        state = {name: tensor for name, tensor in state.items() if ".lora_" in name}
    checkpoint = write_lora(tmp_path / "checkpoints", random_stand_in, state)
    output = export(checkpoint, random_stand_in, tmp_path / "export")
    base = load_file(random_stand_in / "model.safetensors")
    merged = load_file(output / "model.safetensors")
    a, b = (state[f"base_model.model.{STEM}.lora_{m}.default.weight"] for m in "AB")
    for name, tensor in merged.items():
        wanted = base[name] + (3.0 * (b @ a) if name == f"thinker.{STEM}.weight" else 0)
        torch.testing.assert_close(tensor, wanted, rtol=1e-6, atol=1e-6)
    adapter = load_file(output / "adapter/adapter_model.safetensors")
    assert sorted(adapter) == [f"base_model.model.{STEM}.lora_{m}.weight" for m in "AB"]
    settings = json.loads((output / "adapter/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(random_stand_in)


def test_a_lora_checkpoint_on_another_base_is_refused(
    random_stand_in: Path, tmp_path: Path
) -> None:
    state = lora_state(random_stand_in)
    state["base_model.model.lm_head.weight"] = state["base_model.model.lm_head.weight"] + 1
    checkpoint = write_lora(tmp_path / "checkpoints", random_stand_in, state)
    with pytest.raises(ExportError, match=r"thinker\.lm_head\.weight in .* differs"):
        export(checkpoint, random_stand_in, tmp_path / "export")
    assert not list(tmp_path.glob("export*"))


def test_an_adapter_without_its_settings_is_refused(random_stand_in: Path, tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "checkpoints", random_stand_in, lora_state(random_stand_in))
    with pytest.raises(ExportError, match=r"adapter_config\.json is missing"):
        export(checkpoint, random_stand_in, tmp_path / "export")


def test_a_lora_run_whose_base_is_gone_is_refused_on_the_command_line(
    random_stand_in: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = lora_state(random_stand_in)
    write_lora(tmp_path / "checkpoints", random_stand_in, state)
    gone = tmp_path / "gone"
    (tmp_path / "config.yaml").write_text(f"actor_rollout_ref: {{model: {{path: '{gone}'}}}}\n")
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(gone) in error
    assert "--base" in error
