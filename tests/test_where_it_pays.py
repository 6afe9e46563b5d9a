"""The scripts that compare estimates and say where allocation pays: oracles, and recorded rows."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tutorial"))
import compare_estimates as estimates  # noqa: E402
import where_it_pays  # noqa: E402

import knapsack  # noqa: E402
import reward  # noqa: E402
import train  # noqa: E402

RESULTS = ROOT / "tutorial" / "results"
TINY = estimates.of_run(RESULTS / "tiny-knapsack-seed0" / "groups.jsonl")


# ---- estimates -----------------------------------------------------------------------------------------
def test_log_score_is_the_integral():
    """Against the integral over p on a fine grid. Catches: successes and failures exchanged, a rising
    factorial one factor too long, a binomial coefficient that makes large groups look unlikely."""
    alpha, beta = np.array([0.7, 2.0, 5.5]), np.array([1.3, 2.0, 0.9])
    s, t = np.array([0, 3, 8]), np.array([4, 8, 8])
    p = (np.arange(400_000) + 0.5)[:, None] / 400_000
    density = p ** (alpha - 1) * (1 - p) ** (beta - 1)
    expected = np.log((density * p**s * (1 - p) ** (t - s)).sum(0) / density.sum(0))
    np.testing.assert_allclose(estimates.log_score(alpha, beta, s, t), expected, atol=2e-3)


def test_the_truth_scores_best():
    """A score that another distribution than the true one could win would mean nothing."""
    rng, p = np.random.default_rng(0), np.full(20_000, 0.3)
    s = rng.binomial(8, p)
    found = {
        q: estimates.log_score(1e6 * q * p / p, 1e6 * (1 - q) * p / p, s, 8 + 0 * s).mean()
        for q in (0.2, 0.3, 0.4)
    }
    assert max(found, key=found.get) == 0.3


def test_fitted_follows_a_model_that_learns():
    """Everybody's log-odds rise by .1 a step. Catches: a gain of the wrong sign or one that dies."""
    rng, start = np.random.default_rng(0), np.random.default_rng(1).normal(-2, 1.5, 200)
    trackers = {"still": knapsack.SuccessTracker(drift=0), "fitted": estimates.Fitted(0.75, 1, 0)}
    error = {name: [] for name in trackers}
    for step in range(40):
        ids = np.arange(200)[step % 4 :: 4]
        p = 1 / (1 + np.exp(-start[ids] - 0.1 * step))
        s = rng.binomial(8, p)
        for name, tracker in trackers.items():
            error[name].append(np.mean(tracker.estimate(ids) - p))
            tracker.update(ids, s, np.full(50, 8))
    late = {name: abs(np.mean(x[8:])) for name, x in error.items()}
    assert late["fitted"] < late["still"] / 4


def test_changed_posteriors():
    """Catches: a variant that is the default under another name; one that forgets the shift."""
    base, ids = knapsack.SuccessTracker(), ["a", "b", "new"]
    estimates.ByLength.lengths = {"a": 13, "b": 30, "new": 25}
    kinds = [estimates.Window(), estimates.Aging(), estimates.DiscountFirst(), estimates.ByLength()]
    for step in range(6):
        for tracker in (base, *kinds):
            tracker.update(ids[:2] if step % 2 else ids[:1], [7, 1][: 1 + step % 2], [8, 8][: 1 + step % 2])
    for tracker in kinds:
        alpha, beta = tracker.posterior(ids)
        assert (alpha > 0).all() and (beta > 0).all()
        assert not np.allclose(alpha, base.posterior(ids)[0])
    # At once discounted, a record weighs its discount.
    one = estimates.DiscountFirst(0.5, 1, 0)
    one.update(["a"], [8], [8])
    alpha0, beta0 = one.prior()
    np.testing.assert_allclose(one.posterior(["a"]), ([alpha0 + 4], [beta0]))


def test_recorded_estimates():
    """Catches: a table that is not of the recorded runs, or a default that is not the script's."""
    found = json.loads((RESULTS / "estimates.json").read_text())["tiny-knapsack-seed0"]
    base = estimates.replay(knapsack.SuccessTracker(), TINY)
    assert found["rollouts"] == base[:, 1].sum()
    for name in (estimates.DEFAULT, "the paper's window", "drift fitted online", "aging"):
        row = estimates.compare(estimates.replay(estimates.ESTIMATORS[name](), TINY), base)
        assert found[name] == pytest.approx(row, abs=2e-4), name


# ---- where it pays -------------------------------------------------------------------------------------
@pytest.mark.parametrize("bed", where_it_pays.LONGEST)
def test_final_problems_are_fresh(bed, tmp_path):
    """Catches: problems of the last examination among those that were trained on; other lengths."""
    known = {t.prompt: t.answer for t in reward.load_tasks(where_it_pays.tasks_of(bed, tmp_path))}
    if bed == "sums":  # the same recipe as train.py's own tasks
        assert {t.prompt for t in where_it_pays.sums(1280, 10, seed=0)} == known.keys()
    fresh = where_it_pays.sums(1024, where_it_pays.LONGEST[bed], seed=1, known=known)
    assert len(known) == 1280 and len({t.prompt for t in fresh} - known.keys()) == 1024
    digits = Counter(t.prompt.count("+") + 1 for t in fresh)
    assert max(digits) == where_it_pays.LONGEST[bed]
    assert all(sum(map(int, p.strip("=").split("+"))) == int(a) for p, a in known.items())


def test_a_first_look_sees_every_problem_once(monkeypatch):
    """Catches: problems that are skipped or met twice where the first epoch ends."""
    monkeypatch.setattr(train, "batch_of", train.batch_of)
    where_it_pays.look_first(4)
    c, tasks = train.Config(), list(range(1024))
    first = [train.batch_of(tasks, step, c) for step in range(1, 5)]
    second = [train.batch_of(tasks, step, c) for step in range(5, 21)]
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == tasks
    assert {len(b) for b in first} == {256} and {len(b) for b in second} == {64}


def test_rows_are_runs():
    """Catches: a run recorded twice; a row of a rule that the script does not know."""
    rows = where_it_pays.load()
    keys = [tuple(row[name] for name in where_it_pays.KEY) for row in rows]
    assert len(keys) == len(set(keys)) > 0
    for row in rows:
        assert row["rule"] in where_it_pays.RULES and row["bed"] in where_it_pays.LONGEST
        full = row["budget"] * row["steps"]
        assert row["spent"] == full or (row["rule"] == "saving" and row["spent"] < full)
        assert row["pass1"] <= row["pass4"] and row["curve"][-1][0] == row["steps"]


@pytest.mark.slow
def test_a_run(monkeypatch, tmp_path):
    """Catches: a run in a process of its own that does not start; a row that is run again."""
    monkeypatch.setattr(where_it_pays, "RESULTS", tmp_path / "rows.jsonl")
    job = dict(zip(where_it_pays.KEY, ("sums", "saving", 16, 64, 1e-4, 0, 2), strict=True))
    for _ in range(2):
        where_it_pays.run([job], tmp_path / "work", 1)
    (row,) = where_it_pays.load()
    assert row.items() >= job.items() and 0 < row["pass1"] < row["pass4"] < row["pass16"] < 1
    assert [step for step, *_ in row["curve"]] == [0, 2]
