"""tutorial/evidence.py: the recorded rows are what it would run, and its variants do what they say."""

import json
import sys
from functools import partial
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
    for module, name in (
        (train, "allocate"),
        (train, "set_up"),
        (grpo, "update"),
        (knapsack, "SuccessTracker"),
    ):
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


@pytest.mark.parametrize("name", ["more early", "more late", "a price"])
def test_budgets_add_up(name, restored):
    """Catches: a schedule that spends more or less than the constant budget it is compared with."""
    tracker, rng = knapsack.SuccessTracker(), np.random.default_rng(0)
    what = evidence.VARIANTS["budgets"][name][2]
    what(1e-3) if name == "a price" else what()
    c, ids, spent = train.Config(prompts=64), list(range(64)), []
    while len(spent) < evidence.STEPS and sum(spent) < evidence.TOTAL:
        spent.append(int(train.allocate(c, tracker, ids).sum()))
        tracker.update(ids, rng.binomial(8, np.linspace(0, 1, 64)), np.full(64, 8))
    assert sum(spent) == evidence.TOTAL
    assert len(spent) > 20 and len(set(spent)) > 2


CHANGED = {
    name: part
    for part, variants in evidence.VARIANTS.items()
    for name, (_, _, what) in variants.items()
    if what and what not in (evidence.warm, evidence.at_price)
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGED)
def test_variants_run(name, restored, main, tmp_path):
    """Catches: a variant that no longer fits train.py, or that changes nothing it should."""
    part = CHANGED[name]
    evidence.exchange(part, name, seed=0, work=tmp_path)
    code, said = main(*SMALL, "--out", tmp_path / "run")
    assert code == 0, said
    groups = [json.loads(line) for line in (tmp_path / "run" / "groups.jsonl").read_text().splitlines()]
    assert all(min(g["counts"]) >= 2 for g in groups)
    if part == "budgets":
        assert sum(groups[0]["counts"]) != 128
    if name.startswith("discount"):
        assert knapsack.SuccessTracker().discount == float(name.split()[1])


def test_warm_start(restored):
    """Catches: a warm start that hands over nothing, or more than the first epoch."""
    evidence.warm(RUN / "groups.jsonl")
    tracker, g = knapsack.SuccessTracker(), next(evaluate.each_row(RUN / "groups.jsonl"))
    counts = train.allocate(train.Config(), tracker, g["ids"])
    assert len(set(counts)) > 5 and len(tracker.state_dict()["ids"]) == 1024
    assert np.array_equal(tracker.windowed_rate(g["ids"], 8), np.array(g["successes"]) / 8)


def test_report(monkeypatch, tmp_path, capsys):
    """Catches: a report that stops at a part not run yet; tables and figures that fail on the day it is."""
    (tmp_path / "figures").mkdir()
    monkeypatch.setattr(evidence, "HERE", tmp_path)
    evidence.report(None)
    said = capsys.readouterr().out
    assert "left out" not in said and "nan" not in said
    assert all(
        f"| {name} |" in said
        for part in evidence.VARIANTS
        for name in evidence.VARIANTS[part]
        if ", uniform" not in name
    )
    assert sorted(p.stem for p in (tmp_path / "figures").iterdir()) == sorted(
        name for name, _ in evidence.FIGURES.values()
    )
    rows = [json.dumps(row) for row in evidence.load() if (row["part"], row["seed"]) != ("budgets", 3)]
    monkeypatch.setattr(evidence, "RESULTS", tmp_path / "rows.jsonl")
    evidence.RESULTS.write_text("\n".join(rows) + "\n")
    evidence.report(None)
    assert "budgets: 3 runs to go, left out" in capsys.readouterr().out


def test_the_loss_is_changed(restored):
    """Catches: a prompt mean that leaves prompts with many rollouts heavier; a filter that keeps all."""

    class R:
        def __init__(self, group):
            self.group = group

    seen, rollouts = [], [R(g) for g in (0,) * 6 + (1,) * 2 + (2,) * 4]
    advantages = np.array([1.0] * 6 + [0.0] * 2 + [2.0] * 4)
    grpo.update = lambda model, optimizer, rollouts, advantages: seen.append((rollouts, advantages))
    plain = grpo.update
    evidence.prompt_mean()
    grpo.update(None, None, rollouts, advantages)
    summed = np.bincount([r.group for r in seen[0][0]], seen[0][1])
    assert np.allclose(summed, [4, 0, 8])  # 12 rollouts, three prompts: each counts as four
    grpo.update = plain
    evidence.first_mixed(1)
    grpo.update(None, None, rollouts, advantages)
    assert [r.group for r in seen[1][0]] == [0] * 6 and np.array_equal(seen[1][1], np.ones(6))
    grpo.update = lambda *_, **more: seen.append(more)
    evidence.sequence_mean()
    assert (
        isinstance(grpo.update, partial) and grpo.update() is None and seen[2] == {"normalizer": "sequence"}
    )
