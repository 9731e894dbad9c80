"""Rules about token ids: placeholders for vLLM, and what a response may not hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from model_folders import SPARE_ROWS, with_two_ends
from processes import REPOSITORY, clean_environment

from soundmind.model.processor import load_processor
from soundmind.model.tokens import (
    collapse_placeholders,
    response_banned_token_ids,
    response_end_token_ids,
)

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def tokenizer(random_stand_in: Path) -> Any:
    return load_processor(str(random_stand_in)).tokenizer


def test_collapsing_leaves_one_placeholder_per_clip() -> None:
    audio = 7
    assert collapse_placeholders([1, 7, 7, 7, 2, 3, 7, 2], audio) == [1, 7, 2, 3, 7, 2]
    assert collapse_placeholders([7, 7], audio) == [7]
    assert collapse_placeholders([], audio) == []


def test_every_special_token_but_the_end_is_banned(tokenizer: Any, random_stand_in: Path) -> None:
    found = response_banned_token_ids(tokenizer, random_stand_in)
    banned = {tokenizer.convert_ids_to_tokens(index) for index in found}
    assert {"<|AUDIO|>", "<|IMAGE|>", "<|VIDEO|>", "<|im_start|>", "<|audio_bos|>"} <= banned
    assert "<|im_end|>" not in banned


def test_an_end_that_the_folder_declares_is_not_banned(
    tokenizer: Any, random_stand_in: Path, tmp_path: Path
) -> None:
    two = with_two_ends(random_stand_in, tmp_path / "two")
    before = response_banned_token_ids(tokenizer, random_stand_in)
    assert response_end_token_ids(tokenizer, two) == {
        tokenizer.eos_token_id,
        tokenizer.pad_token_id,
    }
    assert set(before) - set(response_banned_token_ids(tokenizer, two)) == {tokenizer.pad_token_id}


def test_a_folder_without_a_generation_config_ends_with_the_turn(
    tokenizer: Any, random_stand_in: Path, tmp_path: Path
) -> None:
    plain = with_two_ends(random_stand_in, tmp_path / "plain")
    (plain / "generation_config.json").unlink()
    assert response_end_token_ids(tokenizer, plain) == {tokenizer.eos_token_id}


def test_rows_of_the_head_without_a_token_are_banned(
    tokenizer: Any, random_stand_in: Path, spare_rows_stand_in: Path
) -> None:
    added = set(response_banned_token_ids(tokenizer, spare_rows_stand_in))
    added -= set(response_banned_token_ids(tokenizer, random_stand_in))
    assert added == set(range(len(tokenizer), len(tokenizer) + SPARE_ROWS))


@pytest.fixture(scope="module")
def answers(
    spare_rows_stand_in: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What vLLM says of a head with spare rows; see tests/support/vllm_check.py."""
    pytest.importorskip("vllm")
    output = tmp_path_factory.mktemp("vllm") / "rows.json"
    command = [sys.executable, "-W", "ignore", str(REPOSITORY / "tests/support/vllm_check.py")]
    command += ["--model", str(spare_rows_stand_in), "--output", str(output)]
    result = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert output.exists(), result.stderr[-4000:]
    rows: list[dict[str, Any]] = json.loads(output.read_text())
    return rows


def test_trainer_and_vllm_agree_on_a_head_with_spare_rows(
    answers: list[dict[str, Any]], tokenizer: Any
) -> None:
    assert max(max(row["response"]) for row in answers) < len(tokenizer)
    assert max(row["log_prob_gap"] for row in answers) < 1e-5


def test_a_seeded_response_is_the_same_beside_others_and_from_a_prompt_in_pieces(
    answers: list[dict[str, Any]],
) -> None:
    assert [row["response_beside_others"] for row in answers] == [r["response"] for r in answers]
    assert len({tuple(row["response"]) for row in answers}) == len(answers)
