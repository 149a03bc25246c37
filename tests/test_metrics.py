"""Metrics of retrieval and answers against closed forms, hand-made cases and naive twins."""

import math
import re
import string
from collections import Counter

import numpy as np
import pytest

from msa_hf.evaluation import metrics


def test_retrieval_metrics_by_hand():
    rankings = [[7, 1, 2, 3], [5, 6], [], [9, 8, 4]]
    gold = [(1, 3), (5,), (2,), (4, 0)]
    assert metrics.recall_at(rankings, gold, 1).tolist() == [0.0, 1.0, 0.0, 0.0]
    assert metrics.recall_at(rankings, gold, 2).tolist() == [0.5, 1.0, 0.0, 0.0]
    assert metrics.recall_at(rankings, gold, 4).tolist() == [1.0, 1.0, 0.0, 0.5]
    assert metrics.all_gold_at(rankings, gold, 3).tolist() == [0.0, 1.0, 0.0, 0.0]
    assert metrics.all_gold_at(rankings, gold, 4).tolist() == [1.0, 1.0, 0.0, 0.0]
    np.testing.assert_allclose(metrics.reciprocal_rank(rankings, gold), [1 / 2, 1.0, 0.0, 1 / 3])


def test_recall_of_random_rankings_has_its_closed_form():
    generator, documents, k = np.random.default_rng(0), 50, 8
    rankings = [generator.permutation(documents).tolist() for _ in range(4000)]
    gold = [tuple(generator.choice(documents, 2, replace=False)) for _ in rankings]
    assert metrics.recall_at(rankings, gold, k).mean() == pytest.approx(k / documents, abs=0.01)
    both = k * (k - 1) / (documents * (documents - 1))
    assert metrics.all_gold_at(rankings, gold, k).mean() == pytest.approx(both, abs=0.01)
    assert metrics.recall_at(rankings, gold, documents).min() == 1.0


def test_retrieval_metrics_refuse_what_has_no_value():
    with pytest.raises(ValueError, match="one entry per question"):
        metrics.recall_at([[1]], [], 1)
    with pytest.raises(ValueError, match="question 1 has none"):
        metrics.recall_at([[1], [2]], [(1,), ()], 1)


def squad_reference_normalize(text):
    """The text of the official evaluation, step by step, as a twin of ours."""
    text = "".join(ch for ch in text.lower() if ch not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


@pytest.mark.parametrize(
    "text",
    [
        "The  Beatles!",
        "an-apple a day",
        "U.S.A.",
        "",
        "the",
        "O'Neil & the 'An'",
        "Café\tNoir",
        "A\nthe B",
        "thea an",
    ],
)
def test_normalisation_equals_the_official_steps(text):
    assert metrics.normalize_answer(text) == squad_reference_normalize(text)


def test_exact_match_and_f1_by_hand():
    assert metrics.exact_match("The Shirley Temple.", "shirley temple") == 1.0
    assert metrics.exact_match("Shirley", "shirley temple") == 0.0
    assert metrics.token_f1("Chief of Protocol", "the chief of protocol") == 1.0
    assert metrics.token_f1("chief", "chief of protocol") == pytest.approx(2 * 1 * (1 / 3) / (1 + 1 / 3))
    assert metrics.token_f1("a b c d", "x y") == 0.0
    assert metrics.token_f1("blue blue", "blue") == pytest.approx(2 / 3)
    assert metrics.token_f1("", "the") == 1.0
    assert metrics.token_f1("word", "") == 0.0


def test_yes_and_no_are_all_or_nothing_in_hotpotqa():
    assert metrics.hotpot_f1("Yes.", "yes") == 1.0
    assert metrics.token_f1("yes, both were American", "yes") > 0
    assert metrics.hotpot_f1("yes, both were American", "yes") == 0.0
    assert metrics.hotpot_f1("no", "no man's land") == 0.0
    assert metrics.hotpot_f1("noanswer", "noanswer found") == 0.0
    assert metrics.hotpot_f1("the man in black", "man black") == metrics.token_f1(
        "the man in black", "man black"
    )


def test_f1_equals_precision_and_recall_over_random_token_bags():
    generator = np.random.default_rng(1)
    for _ in range(200):
        left, right = (generator.choice(list("bcdefg"), generator.integers(1, 7)).tolist() for _ in range(2))
        same = sum((Counter(left) & Counter(right)).values())
        precision, recall = same / len(left), same / len(right)
        expected = 2 * precision * recall / (precision + recall) if same else 0.0
        assert metrics.token_f1(" ".join(left), " ".join(right)) == pytest.approx(expected)


def test_bootstrap_agrees_with_the_normal_approximation():
    values = np.random.default_rng(2).random(2000)
    estimate = metrics.bootstrap(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert estimate.mean == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=half / 6)
    assert estimate.high == pytest.approx(values.mean() + half, abs=half / 6)
    assert metrics.bootstrap(values) == estimate
    narrow = metrics.bootstrap(values, level=0.5)
    assert estimate.low < narrow.low < narrow.high < estimate.high


def test_paired_difference_is_sharper_than_two_intervals():
    generator = np.random.default_rng(3)
    hard = generator.random(400)
    left, right = hard + 0.02 + 0.001 * generator.random(400), hard
    difference = metrics.paired_difference(left, right)
    assert 0.02 < difference.low <= difference.mean <= difference.high < 0.0211
    assert metrics.paired_difference(right, right) == metrics.Estimate(0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="equal shapes"):
        metrics.paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="no questions"):
        metrics.bootstrap([])


def test_gap_closed_is_exact_where_every_question_agrees():
    low, high = np.zeros(20), np.ones(20)
    assert metrics.gap_closed(low, np.full(20, 0.75), high) == metrics.Estimate(0.75, 0.75, 0.75)
    assert metrics.gap_closed(low, high, high).mean == 1.0
    assert math.isnan(metrics.gap_closed(high, high, low).mean)
