"""The training engine: what two ranks, packing and shared clips may not change.

The engine runs in processes of its own (tests/support/engine_rank.py), through verl's real FSDP2
code over gloo, with verl's own PPO loss.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("verl")

from processes import REPOSITORY, start_ranks

TOLERANCE = 1e-5  # relative, in fp32
ONE_RANK_CASES = [
    "mixed",
    "mixed-packed",
    "mixed-split",
    "mixed-keyed",
    "mixed-full",
    "mixed-shared",
    "mixed-sharedsplit",
    "mixed-sharedpacked",
    "equal",
    "equal-packed",
    "equal-shared",
    "text",
    "text-shared",
]
TWO_RANK_CASES = [
    "mixed",
    "mixed-packed",
    "mixed-keyed",
    "mixed-full",
    "mixed-shared",
    "equal",
    "text",
]


def run_ranks(model: Path, folder: Path, ranks: int, cases: list[str]) -> dict[str, Any]:
    """Results by case of `ranks` engine processes."""
    output = folder / f"{ranks}.pt"
    command = [sys.executable, "-W", "ignore", str(REPOSITORY / "tests/support/engine_rank.py")]
    command += ["--model", str(model), "--ranks", str(ranks), "--output", str(output)]
    command += ["--rendezvous", str(folder / f"rendezvous{ranks}"), "--cases", *cases]
    return start_ranks(command, ranks, output)[0]


@pytest.fixture(scope="module")
def one_rank(random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(random_stand_in, tmp_path_factory.mktemp("one"), 1, ONE_RANK_CASES)


@pytest.fixture(scope="module")
def two_ranks(random_stand_in: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(random_stand_in, tmp_path_factory.mktemp("two"), 2, TWO_RANK_CASES)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Same loss, log-probabilities and gradients within `TOLERANCE`, parameter by parameter."""
    assert found["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    assert found["log_probs"].keys() == expected["log_probs"].keys()
    for index, values in expected["log_probs"].items():
        torch.testing.assert_close(found["log_probs"][index], values, rtol=TOLERANCE, atol=1e-5)
    compared = 0
    for name, gradient in expected["gradients"].items():
        other = found["gradients"][name]
        if gradient is None or not gradient.any():
            assert other is None or not other.any(), name
            continue
        error = (other - gradient).norm() / gradient.norm()
        assert error < TOLERANCE, f"{name}: relative difference {error:.1e}"
        compared += 1
    assert compared > 30


@pytest.mark.parametrize("case", TWO_RANK_CASES)
def test_two_ranks_give_the_loss_and_gradients_of_one(
    one_rank: dict[str, Any], two_ranks: dict[str, Any], case: str
) -> None:
    if case == "text":
        # No clip anywhere: the audio tower ran on silence at weight zero on both ranks.
        assert two_ranks[case]["loss"] == pytest.approx(one_rank[case]["loss"], rel=TOLERANCE)
        return
    assert_same(two_ranks[case], one_rank[case])


@pytest.mark.parametrize(
    "case",
    [
        *("mixed-packed", "mixed-split", "mixed-keyed", "mixed-full"),
        *("mixed-shared", "mixed-sharedsplit", "mixed-sharedpacked"),
    ],
)
def test_packing_micro_batches_stored_clips_and_shared_prompts_change_nothing(
    one_rank: dict[str, Any], case: str
) -> None:
    assert_same(one_rank[case], one_rank["mixed"])


def test_a_batch_of_equal_lengths_trains_packed_and_padded(one_rank: dict[str, Any]) -> None:
    assert_same(one_rank["equal-packed"], one_rank["equal"])


def test_eight_responses_behind_one_prompt_train_like_eight_rows(one_rank: dict[str, Any]) -> None:
    assert_same(one_rank["equal-shared"], one_rank["equal"])
    assert one_rank["equal-shared"]["prompts"] == 1
    assert (
        one_rank["mixed-shared"]["prompts"] == 5
    )  # two pairs of clips, a pair of texts, two alone
    assert one_rank["mixed"]["prompts"] == 8
    loss = one_rank["text"]["loss"]
    assert one_rank["text-shared"]["loss"] == pytest.approx(loss, rel=TOLERANCE)


def test_audio_reaches_the_gradient_of_the_audio_tower(one_rank: dict[str, Any]) -> None:
    norms = {
        name: float(gradient.norm())
        for name, gradient in one_rank["mixed"]["gradients"].items()
        if name.startswith("audio_tower.") and gradient is not None
    }
    assert len(norms) > 20
    assert all(norm > 0 for norm in norms.values())


def test_a_text_batch_gives_the_audio_tower_zero_gradients(one_rank: dict[str, Any]) -> None:
    gradients = [
        gradient
        for name, gradient in one_rank["text"]["gradients"].items()
        if name.startswith("audio_tower.") and gradient is not None
    ]
    assert len(gradients) > 20, "the silent clip must reach every parameter of the tower"
    assert not any(gradient.any() for gradient in gradients)


def test_the_vision_tower_is_not_loaded(one_rank: dict[str, Any]) -> None:
    assert not [name for name in one_rank["mixed"]["gradients"] if "visual" in name]


def test_gradients_of_a_position_that_many_want_are_the_same_every_time() -> None:
    from soundmind.training.engine import add_in_one_order

    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4000, 128, generator=generator)
    wanted = torch.randint(0, 50, (2000,), generator=generator)
    upstream = torch.randn(2000, 128, generator=generator)

    def gradient() -> Any:
        leaf = hidden.clone().requires_grad_()
        leaf[wanted].backward(upstream)
        return leaf.grad

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    add_in_one_order()
    try:
        first = gradient()
        assert all(torch.equal(gradient(), first) for _ in range(20))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
