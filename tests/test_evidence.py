"""tutorial/evidence.py: the recorded rows are what it would run, and its variants do what they say."""

import argparse
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "tutorial"))
import evidence

import evaluate
import grpo
import knapsack
import train

RUN = Path(__file__).parent.parent / "tutorial" / "results" / "tiny-knapsack-seed0"
SMALL = "--prompts 16 --budget 128 --held-out 8 --eval-samples 1 --steps 2 --lr 1e-4 --save-every 9".split()


@pytest.fixture
def restored(monkeypatch):
    """Whatever a variant exchanges is put back."""
    monkeypatch.setattr(train, "ALLOCATORS", dict(train.ALLOCATORS))
    for module, name in ((train, "set_up"), (grpo, "update"), (knapsack, "SuccessTracker")):
        monkeypatch.setattr(module, name, getattr(module, name))


def test_rows_are_those_runs():
    """Catches: flags or learning rates edited after the runs; a run twice; a hand-made row."""
    rows = evidence.load()
    wanted = {job[:4]: " ".join(job[4]) for part in evidence.SEEDS for job in evidence.jobs(part, rows)}
    found = {(row["part"], row["name"], row["lr"], row["seed"]): row["flags"] for row in rows}
    assert found == wanted and len(rows) == len(found)


def test_summary():
    """Catches: columns mixed up on the way from a run folder to its row."""
    row, metrics = evidence.summary(RUN), list(evaluate.each_row(RUN / "metrics.jsonl"))
    assert row["evaluations"][-1][:3] == [100, 51_200, metrics[-1]["eval_success"]]
    assert row["evaluations"][0][:3] == [0, 0, metrics[0]["eval_success"]]
    for name, values in row["means"].items():
        assert np.isclose(np.mean(values), np.mean([m[name] for m in metrics[1:]]), atol=1e-4), name
    assert row["solved"][-1] == metrics[-1]["distinct_solved"] and len(row["solved"]) == 10
    groups, mixed, _, inside = np.sum(list(row["groups_up_to_2_to_the"].values()), 0)
    assert (groups, mixed) == (6400, round(sum(64 * m["effective_prompts"] for m in metrics[1:])))
    assert 0.2 < inside / groups < 0.6


def test_when_reached():
    """Catches: the first crossing taken a step late, or a curve that never arrives."""
    spent, success = np.array([0, 10, 20, 30.0]), np.array([0.2, 0.4, 0.8, 0.6])
    assert evidence.when_reached(spent, success, 0.5) == 12.5
    assert evidence.when_reached(spent, success, 0.2) == 0
    assert evidence.when_reached(spent, success, 0.9) == np.inf


def test_verdict():
    """Catches: wins and losses exchanged; a difference within its error published as one."""
    assert evidence.verdict([0.02, 0.03, 0.02, 0.03]) == "win"
    assert evidence.verdict([-0.02, -0.03, -0.02, -0.03]) == "loss"
    assert evidence.verdict([0.05, -0.03, 0.02, -0.01]) == "tie"


@pytest.mark.parametrize("name", evidence.VARIANTS["budgets"])
def test_budgets_add_up(name, monkeypatch):
    """Catches: a schedule that spends more or less than the constant budget it is compared with."""
    tracker, rng = knapsack.SuccessTracker(), np.random.default_rng(0)
    monkeypatch.setattr(evidence, "mean_price", lambda work, seed: 1e-3)
    allocate = evidence.VARIANTS["budgets"][name][2](0, None)
    c, ids, spent = train.Config(prompts=64), list(range(64)), []
    while len(spent) < evidence.STEPS and sum(spent) < evidence.TOTAL:
        spent.append(int(allocate(tracker, ids, c).sum()))
        tracker.update(ids, rng.binomial(8, np.linspace(0, 1, 64)), np.full(64, 8))
    assert sum(spent) == evidence.TOTAL
    assert len(spent) > 20 and len(set(spent)) > 2


def test_mean_price(tmp_path):
    """Catches: a price of the run's own seed; counts of one step beside the estimates of another."""
    for seed in (1, 2, 3):
        (tmp_path / f"main-knapsack-seed{seed}").symlink_to(RUN)
    tracker, prices = knapsack.SuccessTracker(), []
    for g in evaluate.each_row(RUN / "groups.jsonl"):
        counts = np.array(g["counts"])
        now, less = (knapsack.expected_value(counts - k, *tracker.posterior(g["ids"])) for k in (0, 1))
        prices.append((now - less)[counts > 2].min())
        tracker.update(g["ids"], g["successes"], g["counts"])
    assert np.isclose(evidence.mean_price(tmp_path, 0), np.mean(prices), rtol=0.01)


CHANGED = {
    name: part
    for part, variants in evidence.VARIANTS.items()
    for name, (_, _, change) in variants.items()
    if change and name not in ("warm start", "a price")  # these two need other runs
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGED)
def test_variants_run(name, restored, main, tmp_path):
    """Catches: a variant that no longer fits train.py, or that changes nothing it should."""
    part = CHANGED[name]
    allocator = evidence.VARIANTS[part][name][0]
    evidence.exchange(part, name, seed=0, work=tmp_path)
    code, said = main(*SMALL, "--allocator", allocator, "--out", tmp_path / "run")
    assert code == 0, said
    groups = list(evaluate.each_row(tmp_path / "run" / "groups.jsonl"))
    assert all(min(g["counts"]) >= 2 for g in groups)
    if part == "budgets":
        assert sum(groups[0]["counts"]) != 128
    if name.startswith("discount"):
        assert knapsack.SuccessTracker().discount == float(name.split()[1])


def test_warm_start(tmp_path):
    """Catches: a warm start that hands over nothing, or more than the first epoch."""
    (tmp_path / "main-uniform-seed4").symlink_to(RUN)
    allocate = evidence.warm(0, tmp_path)
    tracker, g = knapsack.SuccessTracker(), next(evaluate.each_row(RUN / "groups.jsonl"))
    counts = allocate(tracker, g["ids"], train.Config())
    assert len(set(counts)) > 5 and len(tracker.state_dict()["ids"]) == 1024
    assert np.array_equal(tracker.windowed_rate(g["ids"], 8), np.array(g["successes"]) / 8)


def test_estimates_and_values():
    """Catches: counts of another estimate or value than the variant's name says."""
    c, ids, tracker = train.Config(prompts=4, budget=64), list("abcd"), knapsack.SuccessTracker()
    variants = evidence.VARIANTS["long"] | evidence.VARIANTS["estimates"] | evidence.VARIANTS["ablations"]

    def decide(name):
        return variants[name][2](0, None)(tracker, ids, c)

    stale = variants["an epoch stale"][2](0, None)
    assert decide("no fallback").tolist() == [16] * 4  # nothing is known: uniform
    unknown = stale(tracker, ids, c)
    tracker.update(ids, [0, 1, 4, 8], [8] * 4)
    alpha, beta = (x[:, None] for x in tracker.posterior(ids))  # (4, 1) each
    n, k = np.arange(2, 129), np.arange(128)
    # E p^n = prod_k (alpha + k) / (alpha + beta + k), k = 0 .. n - 1, and the same for q
    powers = [np.cumprod((x + k) / (alpha + beta + k), axis=1) for x in (alpha, beta)]  # (4, 128) each
    mixed = 1 - sum(powers)[:, n - 1]  # (4, K)
    extra = np.array([[0.3], [0.01], [0.01], [0.01]])
    both = knapsack.expected_value(n, alpha, beta) + extra * mixed
    for name, values in (("P(mixed) only", mixed), ("bonus", both)):
        best = 2 + knapsack.solve_dp(values, 64 - 8)
        assert decide(name).tolist() == best.tolist()
    rates = np.array([0, 1, 4, 8]) / 8
    for name, p in (("point estimate", tracker.estimate(ids)), ("no fallback", rates)):
        values = np.array([knapsack.value(k, p) for k in n]).T  # (4, K)
        best = 2 + knapsack.solve_dp(values, 64 - 8)
        assert np.isclose(knapsack.value(decide(name), p).sum(), knapsack.value(best, p).sum())
    # Until 16 steps later it knows nothing.
    for _ in range(16):
        assert np.array_equal(stale(tracker, ids, c), unknown)
    assert np.array_equal(stale(tracker, ids, c), train.ALLOCATORS["knapsack"](tracker, ids, c))


def test_the_loss_is_changed(restored):
    """Catches: a prompt mean that leaves prompts with many rollouts heavier, or a sequence mean long
    responses; a filter that keeps all; a change that never reaches grpo.update."""

    class R:
        def __init__(self, group):
            self.group, self.response_ids = group, [7] * (group + 1)

    rollouts = [R(g) for g in (0,) * 6 + (1,) * 2 + (2,) * 4]
    advantages = np.array([1.0] * 6 + [0.0] * 2 + [2.0] * 4)
    _, changed = evidence.prompt_mean(rollouts, advantages)
    summed = np.bincount([r.group for r in rollouts], changed)
    assert np.allclose(summed, [4, 0, 8])  # 12 rollouts, three prompts: each counts as four
    _, changed = evidence.sequence_mean(rollouts, advantages)
    T = np.array([len(r.response_ids) for r in rollouts])
    # The mean over all tokens is now the mean over the responses.
    assert np.isclose((changed * T).sum() / T.sum(), advantages.mean())

    seen = []
    grpo.update = lambda model, optimizer, *changed: seen.append(changed)
    evidence.updating(evidence.first_mixed(1))
    grpo.update(None, None, rollouts, advantages)
    assert [r.group for r in seen[0][0]] == [0] * 6 and np.array_equal(seen[0][1], np.ones(6))


@pytest.mark.slow
def test_a_run(monkeypatch, tmp_path):
    """Catches: a run in a process of its own that does not start, or exchanges nothing there."""
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "rows.jsonl")
    monkeypatch.setattr(evidence, "jobs", lambda part, rows: [("budgets", "more early", 1e-4, 0, SMALL)])
    args = argparse.Namespace(parts=["budgets"], work=tmp_path / "work", workers=1)
    evidence.run(args)
    evidence.run(args)  # what has a row is not run again
    (row,) = evidence.load()
    assert (row["name"], row["flags"]) == ("more early", " ".join(SMALL))
    assert row["evaluations"][-1][:2] == [2, 768 + 763]
