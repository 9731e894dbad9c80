"""Every statistic against scipy, statsmodels, jiwer or plain enumeration."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import scipy.stats

from soundmind.evaluation import intervals, metrics
from soundmind.evaluation.metrics import Prediction


def prediction(index: int, label: int, verdict: str | None, **changes: Any) -> dict[str, Any]:
    truth = ("not-entailed", "entailed")[label]
    formatted = 1.0 if verdict else 0.0
    line = {
        "index": index,
        "id": f"{index:04d}",
        "sample": 0,
        "label": label,
        "ground_truth": truth,
        "verdict": verdict,
        "finish_reason": "stop",
        "error": None,
        "teacher_verdict": truth,
        "question_seconds": 10.0 + index % 7,
        "prompt_tokens": 100,
        "response_tokens": 20 + index % 11,
        "score": formatted,
        "components": {
            "text_format": formatted,
            "audio_format": 0.0,
            "answer": float(verdict == truth),
            "text_length": 1.0,
            "audio_length": 0.0,
        },
    }
    return line | changes


def test_the_papers_figure_is_534_of_656_with_78_2_to_84_2() -> None:
    rate = intervals.rate([True] * 534 + [False] * 122)
    assert f"{100 * rate['value']:.2f}" == "81.40"
    assert [f"{100 * bound:.1f}" for bound in rate["interval"]] == ["78.2", "84.2"]


def test_wilson_intervals_agree_with_scipy() -> None:
    generator = random.Random(0)
    for _ in range(500):
        n = generator.randint(1, 2000)
        correct = generator.choice([0, n, generator.randint(0, n)])
        expected = scipy.stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
        assert intervals.wilson_interval(correct, n) == pytest.approx(
            (expected.low, expected.high), abs=1e-12
        )


@pytest.mark.parametrize("counts", [(1, 0), (-1, 5), (6, 5)])
def test_wilson_refuses_impossible_counts(counts: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no interval"):
        intervals.wilson_interval(*counts)


def test_mcnemar_agrees_with_scipy_and_statsmodels() -> None:
    tables = pytest.importorskip("statsmodels.stats.contingency_tables")
    generator = random.Random(1)
    for _ in range(200):
        won, lost = generator.randint(0, 60), generator.randint(0, 60)
        ours = intervals.mcnemar_exact(won, lost)
        theirs = tables.mcnemar([[300, lost], [won, 200]], exact=True).pvalue
        assert ours == pytest.approx(theirs, abs=1e-12)
        if won + lost:
            binomial = scipy.stats.binomtest(min(won, lost), won + lost).pvalue
            assert ours == pytest.approx(binomial, abs=1e-12)


def test_mcnemar_agrees_with_scipy_on_counts_of_thousands() -> None:
    expected = scipy.stats.binomtest(2400, 5000).pvalue
    assert intervals.mcnemar_exact(2400, 2600) == pytest.approx(expected, rel=1e-9)


def test_paired_bootstrap_agrees_with_scipy() -> None:
    generator = np.random.default_rng(2)
    for correlation in (0.2, 0.8):
        before = generator.random(656) < 0.776
        after = np.where(generator.random(656) < correlation, before, generator.random(656) < 0.85)
        ours = intervals.paired_bootstrap(before.astype(float), after.astype(float), seed=3)
        theirs = scipy.stats.bootstrap(
            (before.astype(float), after.astype(float)),
            lambda a, b, axis: b.mean(axis) - a.mean(axis),
            paired=True,
            vectorized=True,
            method="percentile",
            n_resamples=10_000,
            random_state=4,
        ).confidence_interval
        assert ours["value"] == pytest.approx(after.mean() - before.mean())
        assert ours["interval"] == pytest.approx([theirs.low, theirs.high], abs=0.003)
        normal = 2 * scipy.stats.norm.sf(abs(ours["value"]) / theirs_error(before, after))
        assert ours["p"] == pytest.approx(normal, abs=0.03)


def theirs_error(before: np.ndarray, after: np.ndarray) -> float:
    differences = after.astype(float) - before
    return float(differences.std() / np.sqrt(len(differences)))


def test_bootstrap_of_few_and_of_many_distinct_values_has_the_same_spread() -> None:
    generator = np.random.default_rng(5)
    few = generator.integers(0, 2, 400).astype(float)
    many = few + generator.normal(0, 1e-9, 400)  # all distinct, so resampled by index
    assert intervals.bootstrap_means(few).std() == pytest.approx(
        intervals.bootstrap_means(many).std(), rel=0.05
    )


def test_paired_bootstrap_of_equal_models_finds_nothing() -> None:
    result = intervals.paired_bootstrap([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (result["value"], result["interval"], result["p"]) == (0.0, [0.0, 0.0], 1.0)


def test_paired_bootstrap_refuses_unpaired_rows() -> None:
    with pytest.raises(ValueError, match="not paired"):
        intervals.paired_bootstrap([1.0], [1.0, 0.0])


def test_holm_agrees_with_statsmodels() -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    generator = random.Random(6)
    for count in (1, 2, 5, 9):
        p_values = [generator.random() ** 2 for _ in range(count)]
        expected = multitest.multipletests(p_values, method="holm")[1]
        assert intervals.holm(p_values) == pytest.approx(list(expected))


def test_pass_at_k_agrees_with_enumeration() -> None:
    for n in range(1, 7):
        for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
            samples = [True] * correct + [False] * (n - correct)
            draws = list(itertools.combinations(samples, k))
            expected = sum(map(any, draws)) / len(draws)
            assert metrics.pass_at_k(n, correct, k) == pytest.approx(expected)


def test_majority_vote_ignores_unreadable_verdicts_and_never_tosses_a_coin() -> None:
    assert metrics.majority_verdict([None, "entailed", None]) == "entailed"
    assert metrics.majority_verdict(["entailed", "not-entailed", "entailed"]) == "entailed"
    assert metrics.majority_verdict(["entailed", "not-entailed"]) is None
    assert metrics.majority_verdict([None, None]) is None


def test_word_errors_agree_with_jiwer_used_directly() -> None:
    jiwer = pytest.importorskip("jiwer")
    generator = random.Random(7)
    words = ["if", "every", "wug", "is", "a", "fep", "then", "rex", "is", "one"]
    references = [" ".join(generator.choices(words, k=generator.randint(1, 30))) for _ in range(80)]
    heard = [
        " ".join(generator.choice([w, w, w, "x", "x y", ""]) for w in reference.split())
        for reference in references
    ]
    result = metrics.word_errors(references, heard)
    direct = jiwer.process_words(references, heard)
    assert result["value"] == pytest.approx(jiwer.wer(references, heard))
    assert result["substitutions"] == direct.substitutions
    assert result["deletions"] == direct.deletions
    assert result["insertions"] == direct.insertions
    assert result["n"] == sum(len(reference.split()) for reference in references)


def test_corpus_word_error_rate_is_no_mean_over_clips() -> None:
    pytest.importorskip("jiwer")
    result = metrics.word_errors(["a b c d e f g h i", "a"], ["a b c d e f g h i", "x"])
    assert result["value"] == pytest.approx(0.1)  # the mean over clips would be 0.5


def test_references_without_words_only_add_insertions() -> None:
    pytest.importorskip("jiwer")
    assert metrics.word_errors(["", "a b"], ["x y", "a b"])["value"] == pytest.approx(1.0)
    assert metrics.word_errors([""], ["x"])["value"] is None
    assert metrics.word_errors([], [])["n"] == 0


def test_majority_floor_of_the_test_split_is_54_88_percent() -> None:
    floor = metrics.majority_floor([0] * 360 + [1] * 296)
    assert f"{100 * floor['value']:.2f}" == "54.88"
    assert floor["verdict"] == "not-entailed"


def test_rates_without_outcomes_have_no_value() -> None:
    assert intervals.rate([]) == {"n": 0, "correct": 0, "value": None, "interval": None}
    assert intervals.spread([None])["n"] == 0


def test_ranges_of_a_measure_hold_every_row_once() -> None:
    lines = [prediction(i, i % 2, "entailed") for i in range(101)]
    groups = metrics.accuracy_by(lines, lambda p: p["response_tokens"])
    assert sum(group["n"] for group in groups) == 101
    assert sum(group["correct"] for group in groups) == 50
    equal = metrics.accuracy_by(lines, lambda p: 40.0)
    assert [(g["low"], g["high"], g["n"]) for g in equal] == [(40.0, 40.0, 101)]
    assert metrics.accuracy_by(lines, lambda p: None) == []


def mixed_predictions() -> list[Prediction]:
    lines = [
        prediction(0, 1, "entailed"),
        prediction(1, 0, "entailed", teacher_verdict="entailed"),
        prediction(2, 0, None, finish_reason="length"),
        prediction(3, 1, None, error="clip not found", finish_reason="error"),
        prediction(4, 0, "not-entailed", teacher_verdict=None),
    ]
    return lines


def test_unreadable_and_failed_rows_count_as_wrong_and_are_listed() -> None:
    summary = metrics.summarise(mixed_predictions())
    assert (summary["accuracy"]["n"], summary["accuracy"]["correct"]) == (5, 2)
    assert (summary["parsed"]["n"], summary["parsed"]["correct"]) == (5, 3)
    assert summary["truncated"]["correct"] == 1
    assert summary["failed_rows"]["count"] == 1
    assert summary["failed_rows"]["rows"] == [{"index": 3, "id": "0003", "error": "clip not found"}]
    assert summary["confusion"]["counts"]["entailed"]["none"] == 1
    assert summary["teacher_disagrees_with_label"]["n"] == 1
    assert summary["teacher_agrees_with_label"]["n"] == 3


def test_several_samples_a_row_give_pass_at_k_and_a_vote_over_rows() -> None:
    lines = [
        prediction(0, 1, verdict, sample=s)
        for s, verdict in enumerate(["entailed", "entailed", None, "not-entailed"])
    ] + [prediction(1, 0, "entailed", sample=s) for s in range(4)]
    summary = metrics.summarise(lines)
    assert summary["rows"] == 2
    assert summary["accuracy"]["n"] == 2 and summary["accuracy"]["responses"] == 8
    assert summary["accuracy"]["value"] == pytest.approx(0.25)
    assert set(summary["sampled"]["pass_at"]) == {"1", "2", "4"}
    assert summary["sampled"]["pass_at"]["1"]["value"] == pytest.approx(0.25)
    assert summary["sampled"]["pass_at"]["4"]["value"] == pytest.approx(0.5)
    assert summary["sampled"]["majority_vote"]["correct"] == 1


def numbers_without_n(value: Any, path: str = "") -> list[str]:
    """Places that name a share or a mean but not the count behind it."""
    found = []
    if isinstance(value, dict):
        named = {"value", "mean", "count", "correct", "counts"} & value.keys()
        if named and "n" not in value:
            found.append(path)
        for key, item in value.items():
            found += numbers_without_n(item, f"{path}/{key}")
    elif isinstance(value, list):
        for item in value:
            found += numbers_without_n(item, f"{path}[]")
    return found


def test_no_number_is_named_without_its_n() -> None:
    assert numbers_without_n(metrics.summarise(mixed_predictions())) == []


def test_metrics_import_without_torch_verl_vllm_or_transformers() -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'verl', 'vllm', 'transformers', 'jiwer'): sys.modules[name] = None\n"
        "import soundmind.evaluation.metrics\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- what counts ----------------------------------------------------------------------------------


def test_cut_and_failed_rows_are_wrong_whatever_they_say() -> None:
    lines = [
        prediction(0, 1, "entailed"),
        prediction(1, 1, "entailed", finish_reason="length"),
        prediction(2, 0, "not-entailed", finish_reason="length"),
        prediction(3, 1, "entailed", error="clip not found", finish_reason="error"),
    ]
    summary = metrics.summarise(lines)
    for name in ("accuracy", "accuracy_lenient", "parsed"):
        assert (summary[name]["n"], summary[name]["correct"]) == (4, 1), name
    assert summary["confusion"]["counts"]["entailed"] == {
        **{"not-entailed": 0, "entailed": 1, "none": 2}
    }
    assert summary["by_label"]["not-entailed"]["correct"] == 0
    assert summary["accuracy_among_parsed"]["value"] == 1.0


def test_a_row_that_could_not_be_spoken_keeps_its_text_and_its_transcript_is_wrong() -> None:
    pytest.importorskip("jiwer")
    spoken = {"speech_transcript": None, "transcript_verdict": None}
    line = prediction(0, 1, "entailed", error="no speech: the talker gave nothing", **spoken)
    assert metrics.summarise([line])["accuracy"]["correct"] == 1
    speech = metrics.summarise_speech([line], str.lower)
    assert speech["accuracy_from_text"]["correct"] == 1
    assert speech["accuracy_from_transcript"]["correct"] == 0


def test_reasoning_and_form_are_told_apart() -> None:
    lines = [prediction(i, 1, None, lenient_verdict="entailed") for i in range(3)]
    lines += [prediction(3, 1, "entailed"), prediction(4, 1, "not-entailed")]
    summary = metrics.summarise(lines)
    assert summary["accuracy"]["value"] == pytest.approx(0.2)
    assert summary["accuracy_lenient"]["value"] == pytest.approx(0.8)
    assert summary["accuracy_among_parsed"] | {"interval": None} == {
        **{"n": 2, "correct": 1, "value": 0.5, "interval": None}
    }


def test_a_warning_says_where_few_verdicts_are_readable() -> None:
    from soundmind.evaluation.tables import headline, parse_warning

    lines = [prediction(i, 1, "entailed" if i < 17 else None) for i in range(20)]
    summary = metrics.summarise(lines) | {"paper": []}
    assert "Only 85.00 %" in (parse_warning(summary) or "")
    assert parse_warning(metrics.summarise(lines[:18]) | {"paper": []}) is None
    assert "lenient reading" in " ".join(row["what"] for row in headline(summary))


@pytest.mark.parametrize("right", [0, 4])
def test_an_interval_of_equal_rows_is_no_point(right: int) -> None:
    lines = [
        prediction(row, 1, "entailed" if sample < right else "not-entailed", sample=sample)
        for row in range(16)
        for sample in range(4)
    ]
    low, high = metrics.accuracy(lines)["interval"]
    assert high - low > 0.03 and 0.0 <= low <= right / 4 <= high <= 1.0


@pytest.mark.parametrize("answers", [2, 8])
@pytest.mark.parametrize("rows", [16, 100, 656])
@pytest.mark.parametrize(
    "beta", [(0.05, 0.05), (1, 1), (20, 20), (0.5, 9.5), (9.5, 0.5), (50, 950)]
)
def test_intervals_over_several_answers_a_row_cover(
    beta: tuple[float, float], rows: int, answers: int
) -> None:
    generator = np.random.default_rng(0)
    truth, covered, times = beta[0] / sum(beta), 0, 300
    for _ in range(times):
        shares = generator.binomial(answers, generator.beta(*beta, rows)) / answers
        low, high = intervals.clustered_interval(shares.tolist(), answers)
        covered += low <= truth <= high
    assert covered / times > 0.92


def test_clips_cut_by_our_own_limits_are_told_from_misheard_ones() -> None:
    pytest.importorskip("jiwer")
    said = {"response": "a b c d", "speech_seconds": 2.0}
    lines = [
        prediction(0, 1, "entailed", **said, speech_transcript="a b c x"),
        prediction(1, 1, "entailed", **said, speech_transcript="a", speech_truncated=True),
    ]
    speech = metrics.summarise_speech(lines, str.lower)
    assert (speech["wer"]["n"], speech["wer"]["value"]) == (8, pytest.approx(0.5))
    whole = speech["wer_without_cut"]
    assert (whole["n"], whole["clips"], whole["value"]) == (4, 1, pytest.approx(0.25))


def test_no_two_samples_share_a_stream_of_random_numbers() -> None:
    from soundmind.evaluation.text import row_seed

    for seed in (0, 1, 7):
        seeds = [row_seed(seed, row) + sample for row in range(656) for sample in range(8)]
        assert len({value % 2**32 for value in seeds}) == 656 * 8  # a CPU's generator takes 32 bits
    assert row_seed(0, 1) != row_seed(1, 0) and row_seed(0, 0) == row_seed(0, 0)
