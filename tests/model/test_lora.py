"""LoRA on the language model: what is trained, what the rollout gets, and the reference."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import REPOSITORY, clean_environment, start_ranks
from reloading import assert_loaded_again

from soundmind.model import checkpoints, lora
from soundmind.model.export import export
from soundmind.model.parts import LANGUAGE_MODEL_LINEARS, language_model_targets, part_of

torch = pytest.importorskip("torch")
pytest.importorskip("verl")
pytest.importorskip("peft")

RANK, ALPHA = 4, 16
LORA = [
    "train.audio_tower=false",
    f"actor_rollout_ref.model.lora_rank={RANK}",
    f"actor_rollout_ref.model.lora_alpha={ALPHA}",
    "actor_rollout_ref.model.lora.merge=true",
]
OPTIMIZER = [
    "actor_rollout_ref.actor.optim.lr=1e-2",
    "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
    "actor_rollout_ref.actor.optim.weight_decay=0.5",
]


def train(model: Path, folder: Path, ranks: int, *arguments: str) -> dict[str, Any]:
    """Two updates on `ranks` ranks of the real engine; see tests/support/parts_rank.py."""
    output, root = folder / "result.pt", folder / "checkpoints"
    command = [sys.executable, "-W", "ignore", str(REPOSITORY / "tests/support/parts_rank.py")]
    command += ["--model", str(model), "--ranks", str(ranks), "--output", str(output)]
    command += ["--rendezvous", str(folder / "rendezvous"), "--reference-first"]
    command += ["--checkpoint", str(root / checkpoints.WRITING / "global_step_1")]
    results, log = start_ranks([*command, *arguments, *LORA, *OPTIMIZER], ranks, output)
    checkpoint = checkpoints.publish(root, 1, model)
    export(checkpoint, model, folder / "export")
    return {**results, "log": log, "checkpoint": checkpoint, "export": folder / "export"}


@pytest.fixture(scope="module")
def one_rank(random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return train(random_stand_in, tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def two_ranks(
    one_rank: dict[str, Any], random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Continues the exported adapter: one rank with clips, the other with text, a bfloat16 base."""
    return train(
        random_stand_in,
        tmp_path_factory.mktemp("two"),
        2,
        *("--batch", "sides", "actor_rollout_ref.actor.fsdp_config.model_dtype=bf16"),
        "actor_rollout_ref.model.enable_gradient_checkpointing=true",
        f"actor_rollout_ref.model.lora_adapter_path='{one_rank['export'] / 'adapter'}'",
    )


@pytest.fixture(params=["one_rank", "two_ranks"])
def run(request: pytest.FixtureRequest) -> dict[str, Any]:
    return request.getfixturevalue(request.param)


def test_only_the_adapter_is_trained(run: dict[str, Any]) -> None:
    adapters = {name for name in run["gradients"] if lora.is_adapter(name)}
    # Two layers with seven linear layers each, and two matrices beside each of these.
    assert len(adapters) == 2 * 7 * 2
    assert {part_of(name) for name in adapters} == {"language_model"}
    assert run["optimized"] == run["state"] == adapters
    for name, gradient in run["gradients"].items():
        assert (gradient is not None) == (name in adapters), name
    for name in adapters:
        assert not torch.equal(run["after"][name], run["before"][name]), name


def test_the_base_stays_as_it_was(run: dict[str, Any]) -> None:
    base = [name for name in run["before"] if not lora.is_adapter(name)]
    assert len(base) > 50
    for name in base:
        for moment in ("after", "after_sync"):
            assert torch.equal(run[moment][name], run["before"][name]), (moment, name)


def test_the_rollout_gets_the_base_plus_the_scaled_product(run: dict[str, Any]) -> None:
    state = run["after"]
    changed = 0
    wanted = {}
    for name, weight in state.items():
        if lora.is_adapter(name):
            continue
        own = name.removeprefix("base_model.model.")
        if ".base_layer.weight" in name:
            stem = name.replace(".base_layer.weight", "")
            product = (
                state[f"{stem}.lora_B.default.weight"] @ state[f"{stem}.lora_A.default.weight"]
            )
            merged = (weight.float() + ALPHA / RANK * product.float()).to(weight.dtype)
            changed += not torch.equal(merged, weight)
            weight = merged
        wanted["thinker." + own.replace(".base_layer.", ".")] = weight
    assert changed == 2 * 7
    assert run["sent"].keys() == wanted.keys()
    for name, weight in wanted.items():
        assert run["sent"][name].dtype == weight.dtype
        torch.testing.assert_close(run["sent"][name], weight, rtol=1e-6, atol=1e-7)


def test_every_name_sent_is_one_of_the_base_folder(
    run: dict[str, Any], random_stand_in: Path
) -> None:
    from soundmind.model.folder import folder_shapes

    shapes = folder_shapes(random_stand_in)
    missing = {n for n in shapes if n.startswith("thinker.")} - run["sent"].keys()
    assert {part_of(name) for name in missing} == {"vision"}
    assert run["sent"].keys() <= shapes.keys()


def test_sending_leaves_the_adapter_alone(run: dict[str, Any]) -> None:
    for name, tensor in run["after"].items():
        assert torch.equal(run["after_sync"][name], tensor), name


def test_the_seed_decides_what_an_adapter_starts_from(
    one_rank: dict[str, Any], random_stand_in: Path, tmp_path: Path
) -> None:
    starts = {}
    for seed in (0, 1):
        output = tmp_path / f"{seed}.pt"
        command = [sys.executable, "-W", "ignore", str(REPOSITORY / "tests/support/parts_rank.py")]
        command += ["--model", str(random_stand_in), "--ranks", "1", "--output", str(output)]
        command += ["--rendezvous", str(tmp_path / f"rendezvous{seed}"), "--updates", "0"]
        starts[seed] = start_ranks([*command, *LORA, f"run.seed={seed}"], 1, output)[0]["before"]
    matrices = [name for name in starts[0] if ".lora_A." in name]
    assert len(matrices) > 10
    for name in matrices:
        assert torch.equal(starts[0][name], one_rank["before"][name]), name
        assert not torch.equal(starts[1][name], starts[0][name]), name


def test_a_checkpoint_of_an_adapter_loads_into_a_scrambled_engine(run: dict[str, Any]) -> None:
    assert_loaded_again(run)


def test_the_reference_is_the_actor_without_its_adapter(run: dict[str, Any]) -> None:
    for before, after in zip(run["reference_before"], run["reference_after"], strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    moved = [
        (after - before).abs().max()
        for after, before in zip(run["policy_after"], run["policy_before"], strict=True)
    ]
    assert min(moved) > 1e-4


def test_a_fresh_adapter_is_the_reference(one_rank: dict[str, Any]) -> None:
    # Reading the reference first must not cost the adapter its gradients.
    for before, policy in zip(one_rank["reference_before"], one_rank["policy_before"], strict=True):
        torch.testing.assert_close(policy, before, rtol=0, atol=0)


def test_an_exported_adapter_is_continued_where_it_stood(
    one_rank: dict[str, Any], two_ranks: dict[str, Any]
) -> None:
    compared = [name for name in one_rank["after"] if lora.is_adapter(name)]
    assert compared
    for name in compared:
        assert torch.equal(two_ranks["before"][name], one_rank["after"][name]), name


def test_an_export_of_a_lora_run_changes_what_was_adapted_and_nothing_else(
    run: dict[str, Any], random_stand_in: Path
) -> None:
    from safetensors.torch import load_file

    base = load_file(random_stand_in / "model.safetensors")
    exported = load_file(run["export"] / "model.safetensors")
    changed = {name for name in base if not torch.equal(exported[name], base[name])}
    wanted = {f"thinker.{name}" for name in lora.pairs(run["after"])}
    assert changed == wanted
    for name in changed:
        # The rollout's weights; those of a bfloat16 trainer have eight bits behind the point.
        sent = run["sent"][name]
        tolerance = 1e-6 if sent.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(exported[name], sent.float(), rtol=tolerance, atol=tolerance)


def test_a_frozen_tower_keeps_no_activations(run: dict[str, Any]) -> None:
    # PEFT asks gradients of every encoder's input; the tower would follow with its whole graph.
    tower = [name for name in run["in_graph"] if ".audio_tower." in name]
    assert len(tower) > 10
    assert not any(run["in_graph"][name] for name in tower)
    assert any(run["in_graph"][name] for name in run["in_graph"] if ".model.layers.1" in name)


def test_adapters_are_float32_beside_a_bfloat16_base(two_ranks: dict[str, Any]) -> None:
    for name, dtype in two_ranks["dtypes"].items():
        assert dtype == ("torch.float32" if lora.is_adapter(name) else "torch.bfloat16"), name


def test_the_table_counts_the_adapter(one_rank: dict[str, Any], random_stand_in: Path) -> None:
    from soundmind.model.parts import format_table, rows

    settings = {"audio_tower": False, "projector": False}
    assert format_table(rows(random_stand_in, settings, RANK)) in one_rank["log"]


def test_a_checkpoint_keeps_the_settings_of_its_adapter(run: dict[str, Any]) -> None:
    settings = json.loads((run["checkpoint"] / "actor/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (RANK, ALPHA)
    assert settings["target_modules"] == LANGUAGE_MODEL_LINEARS


# --- targets --------------------------------------------------------------------------------------

LINEARS = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.11.mlp.down_proj",
    "audio_tower.layers.0.self_attn.q_proj",
    "audio_tower.layers.0.fc1",
    "audio_tower.proj",
    "lm_head",
]


@pytest.mark.parametrize(
    ("chosen", "hit"),
    [
        ("all-linear", LINEARS[:2]),
        (None, LINEARS[:2]),
        (["q_proj"], LINEARS[:1]),
        (["q_proj", "mlp.down_proj"], LINEARS[:2]),
    ],
)
def test_targets_stay_in_the_language_model(chosen: Any, hit: list[str]) -> None:
    import re

    pattern = language_model_targets(chosen)
    assert [name for name in LINEARS if re.fullmatch(pattern, name)] == hit


def test_a_pattern_that_leaves_the_language_model_is_refused() -> None:
    names = [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.audio_tower.layers.0.self_attn.q_proj.lora_A.default.weight",
    ]
    lora.require_language_model(names[:1], "x")
    with pytest.raises(lora.LoraError, match=r"audio tower \(audio_tower\.layers\.0"):
        lora.require_language_model(names, r".*q_proj")
    with pytest.raises(lora.LoraError, match="matches no layer"):
        lora.require_language_model(["base_model.model.lm_head.weight"], "nothing")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_dora", True),
        ("use_rslora", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("rank_pattern", {"q_proj": 8}),
    ],
)
def test_an_adapter_that_is_more_than_lora_is_refused(key: str, value: Any) -> None:
    assert lora.scale_of({"r": 4, "lora_alpha": 16}) == 4
    with pytest.raises(lora.LoraError, match=key):
        lora.scale_of({"r": 4, "lora_alpha": 16, key: value})


def test_half_a_pair_is_refused() -> None:
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight"
    with pytest.raises(lora.LoraError, match=r"up_proj.*only matrix A"):
        lora.pairs([name])


def test_merging_needs_no_second_matrix_type() -> None:
    weight = torch.ones(3, 2, dtype=torch.bfloat16)
    merged = lora.merge(weight, torch.ones(1, 2), torch.full((3, 1), 2.0), 0.5)
    assert merged.dtype == torch.bfloat16
    assert torch.equal(merged, torch.full((3, 2), 2.0, dtype=torch.bfloat16))
    assert torch.equal(weight, torch.ones(3, 2, dtype=torch.bfloat16)), "the base is not touched"


# --- through verl and vLLM ------------------------------------------------------------------------

STEPS = 3


@pytest.fixture(scope="module")
def trained(
    random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """The run folder of three steps with a LoRA adapter, and its lines of metrics."""
    pytest.importorskip("vllm")
    from soundmind import preprocess

    folder = tmp_path_factory.mktemp("lora run")
    arguments = ["--mode", "audio", "--task", "practice", "--workers", "1"]
    arguments += ["--data-dir", str(REPOSITORY / "data/sample")]
    arguments += ["--output-dir", str(folder / "parquet"), "--tokenizer", str(random_stand_in)]
    assert preprocess.main(arguments) == 0
    command = [
        *(sys.executable, "-m", "soundmind.train", "--config-name", "grpo_tiny_cpu"),
        *LORA,
        f"run.root='{folder / 'outputs'}'",
        f"data.train_files='{folder}/parquet/audio/train.parquet'",
        f"data.val_files='{folder}/parquet/audio/test.parquet'",
        f"actor_rollout_ref.model.path='{random_stand_in}'",
        "data.train_batch_size=4",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
        "actor_rollout_ref.rollout.n=2",
        "actor_rollout_ref.actor.use_kl_loss=true",
        "actor_rollout_ref.actor.optim.lr=1e-2",
        "actor_rollout_ref.actor.optim.lr_warmup_steps=0",
        f"trainer.total_training_steps={STEPS}",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        f"trainer.save_freq={STEPS}",
    ]
    result = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-4000:]
    run = next((folder / "outputs/grpo_tiny_cpu").iterdir())
    return run, [json.loads(line) for line in (run / "metrics.jsonl").open()]


@pytest.mark.e2e
def test_rollout_and_trainer_agree_after_every_update_of_the_adapter(
    trained: tuple[Path, list[dict[str, Any]]],
) -> None:
    lines = [line for line in trained[1] if line["step"] > 0]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        assert line["training/rollout_actor_probs_pearson_corr"] >= 0.999
        assert line["training/rollout_probs_diff_max"] < 1e-4
        assert line["actor/grad_norm"] > 0


@pytest.mark.e2e
def test_the_distance_to_the_reference_starts_at_zero_and_grows(
    trained: tuple[Path, list[dict[str, Any]]],
) -> None:
    distances = [line["actor/kl_loss"] for line in trained[1] if line["step"] > 0]
    assert abs(distances[0]) < 1e-9
    assert min(distances[1:]) > 1e-7


@pytest.mark.e2e
def test_the_exported_adapter_and_the_merged_folder_are_the_same_policy(
    trained: tuple[Path, list[dict[str, Any]]], random_stand_in: Path
) -> None:
    from peft import PeftModel

    exported = trained[0] / "export"
    tokens = torch.arange(40).reshape(2, 20)
    base = load_thinker(random_stand_in)
    with torch.no_grad():
        before = base(input_ids=tokens).logits.log_softmax(-1)
        merged = load_thinker(exported)(input_ids=tokens).logits.log_softmax(-1)
        adapted = PeftModel.from_pretrained(base, str(exported / "adapter"))
        apart = adapted(input_ids=tokens).logits.log_softmax(-1)
    torch.testing.assert_close(apart, merged, rtol=0, atol=1e-5)
    assert (merged - before).abs().max() > 1e-3


def load_thinker(folder: Path) -> Any:
    """The thinker of a complete folder, in float32."""
    from transformers import AutoConfig, Qwen2_5OmniThinkerForConditionalGeneration

    config = AutoConfig.from_pretrained(folder).thinker_config
    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        folder, config=config, attn_implementation="sdpa", dtype=torch.float32
    ).eval()
