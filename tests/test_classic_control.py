"""The knapsack beside PPO (tutorial/classic_control): the learner, the rules, the recorded comparison, and
each family of tasks through the real command line.

The last part needs gymnasium, MuJoCo and ALE, in a virtual environment of their own:
tutorial/classic_control/requirements.txt, and `pytest --noconftest` there. Elsewhere: skipped.
"""

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tutorial" / "classic_control"
sys.path.insert(0, str(FOLDER))
import compare  # noqa: E402
import ppo  # noqa: E402
import report  # noqa: E402

import knapsack  # noqa: E402

needs_gymnasium = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("gymnasium", "mujoco", "ale_py"))),
    reason="gymnasium is not installed: pip install -r tutorial/classic_control/requirements.txt",
)


# ---- The learner ----
def test_advantages():
    """Catches: a value or an advantage that leaks from one episode into the one before it."""
    rng = np.random.default_rng(0)
    lengths = np.array([1, 4, 2, 7])
    rewards, values = rng.normal(size=(2, lengths.sum()))
    naive, start = [], 0
    for n in lengths:
        r, v = rewards[start : start + n], [*values[start : start + n], 0.0]
        delta = [r[t] + ppo.GAMMA * v[t + 1] - v[t] for t in range(n)]
        naive += [sum((ppo.GAMMA * ppo.LAMBDA) ** k * delta[t + k] for k in range(n - t)) for t in range(n)]
        start += n
    assert np.allclose(ppo.advantages(rewards, values, lengths), naive, atol=1e-12)


class Walk:
    """A task without physics: the variant says how long an episode is; the last action 1 wins."""

    def start(self, variant, rng):
        self.variant, self.t = variant, 0
        return np.array([variant, 0], np.float32)

    def step(self, action):
        self.t += 1
        over = self.t == self.variant
        return np.array([self.variant, self.t], np.float32), bool(over and action == 1), over


@pytest.mark.parametrize("side_by_side", [1, 3, 50])
def test_collect(side_by_side):
    """Catches: steps of two episodes mixed up when one ends before the other; log-probs of other actions."""
    torch.manual_seed(0)
    learner = ppo.Learner(2, 3, discrete=True)
    starts = [3, 1, 5, 2, 2, 7, 1]
    tasks = [Walk() for _ in range(side_by_side)]
    got = ppo.collect(learner, tasks, starts, np.random.default_rng(0))
    assert got.lengths.tolist() == starts
    seen = [(v, t) for v in starts for t in range(v)]
    assert got.observations.tolist() == [list(map(float, s)) for s in seen]
    last = np.cumsum(starts) - 1
    assert (got.success == (got.actions[last] == 1)).all()
    dist = learner.distribution(torch.from_numpy(got.observations))
    again = dist.log_prob(torch.from_numpy(got.actions)).detach().numpy()
    assert np.allclose(got.logprobs, again, atol=1e-6)


def test_continuous_draws():
    """Catches: actions whose log-prob is that of another draw; noise in an evaluation."""
    learner, noise = ppo.Learner(4, 2, discrete=False), np.ones((5, 2), np.float32)
    obs = np.zeros((5, 4), np.float32)
    actions, logprobs = learner.act(obs, noise)
    expected = torch.distributions.Normal(0.0, 0.6).log_prob(torch.tensor(0.6)) * 2
    assert np.allclose(actions, 0.6, atol=1e-5) and np.allclose(logprobs, expected, atol=1e-5)
    assert np.allclose(learner.act(obs, noise, greedy=True)[0], 0)


def test_learns():
    """Catches: a sign or a clip that makes PPO unlearn."""
    torch.manual_seed(0)
    rng, learner = np.random.default_rng(0), ppo.Learner(2, 3, discrete=True, lr=3e-3)
    rates = []
    for _ in range(25):
        episodes = ppo.collect(learner, [Walk() for _ in range(8)], [1, 2, 3, 4] * 16, rng)
        learner.update(episodes, 64, rng)
        rates.append(episodes.success.mean())
    assert rates[0] < 0.5 and np.mean(rates[-3:]) > 0.9


# ---- The rules ----
def known(m=24, steps=600, progress=0.5, price=0.01, seed=0):
    rng = np.random.default_rng(seed)
    posterior = tuple(rng.uniform(0.3, 6, (2, m)))
    return compare.Known(posterior, rng.uniform(3, 12, m), steps, progress, price, rng)


@pytest.mark.parametrize("seed", range(5))
def test_counts_within_steps(seed):
    """Catches: a budget of episodes instead of steps; room for one more episode that nobody uses."""
    k = known(seed=seed)
    budgets = {
        compare.uniform: lambda b: knapsack.uniform(24, b),
        compare.by_knapsack: lambda b: knapsack.allocate(k.posterior, b, 1, compare.N_MAX),
    }
    for rule, at in budgets.items():
        counts = rule(k)
        assert counts.min() >= 1 and counts @ k.lengths <= k.steps
        assert np.array_equal(counts, at(counts.sum()))
        assert at(counts.sum() + 1) @ k.lengths > k.steps
    drawn = [compare.random_starts(k) for _ in range(500)]
    assert np.mean(drawn, 0) @ k.lengths == pytest.approx(k.steps, rel=0.02)


def test_too_few_steps():
    """Catches: an update without episodes when the steps do not suffice for one of each."""
    assert compare.uniform(known(steps=5)).tolist() == [1] * 24


def test_more_early():
    """Catches: less early and more late; an average that is not the others' number of steps."""
    spent = [compare.more_early(known(progress=x)) @ known().lengths for x in (0, 0.25, 0.5, 0.75, 1)]
    assert np.allclose(spent, [900, 750, 600, 450, 300], atol=12)
    assert np.array_equal(compare.more_early(known()), compare.by_knapsack(known()))
    prices = [
        knapsack.shadow_price(known().posterior, compare.more_early(known(progress=x))) for x in (0, 0.5, 1)
    ]
    assert prices == sorted(prices)


def test_price():
    """Catches: a price that rises and buys more; counts that are not the knapsack's at its own price."""
    spent = [compare.at_price(known(price=price)).sum() for price in (0.001, 0.004, 0.016, 0.064)]
    assert spent == sorted(spent, reverse=True) and spent[0] > 2 * spent[-1]
    k = known()
    counts = compare.by_knapsack(k)
    price = knapsack.shadow_price(k.posterior, counts, compare.N_MAX)
    assert np.array_equal(compare.at_price(known(price=price)), counts)


def test_steps_as_costs(monkeypatch):
    """Catches: costs per episode instead of per step, against all choices there are."""
    monkeypatch.setattr(compare, "N_MAX", 5)
    rng = np.random.default_rng(0)
    for _ in range(20):
        posterior, lengths = tuple(rng.uniform(0.3, 4, (2, 4))), rng.integers(1, 9, 4).astype(float)
        k = compare.Known(posterior, lengths, 40, 0.0, 0.0, rng)
        counts = compare.by_steps(k)
        assert counts @ lengths <= 40
        choices = [np.array(c) for c in itertools.product(range(1, 6), repeat=4) if c @ lengths <= 40]
        best = max(knapsack.expected_value(c, *posterior).sum() for c in choices)
        assert knapsack.expected_value(counts, *posterior).sum() == pytest.approx(best, abs=1e-12)


def test_lengths():
    """Catches: a variant that was not visited and fades; a visit that counts in another place."""
    lengths = compare.Lengths(3, cap=10)
    lengths.update(np.array([0, 0, 2]), np.array([4, 6, 1]))
    assert np.allclose(lengths.mean(), [(7.5 + 10) / 2.75, 10, (7.5 + 1) / 1.75])
    lengths.update(np.array([0]), np.array([2]))
    assert np.allclose(lengths.mean()[0], (0.75 * 17.5 + 2) / (0.75 * 2.75 + 1))


# ---- The report ----
def test_statistics():
    """Catches: one tail for two; Holm's factors in the wrong order. Against printed tables."""
    for t, df in ((2.776, 4), (2.571, 5), (12.706, 1)):
        assert report.student_p(t, df) == pytest.approx(0.05, abs=2e-4)
    assert np.allclose(report.holm([0.04, 0.001, 0.03]), [0.06, 0.003, 0.06])
    mean, error, half, p = report.paired([1, 2, 3, 4, 5])
    assert (mean, error, half) == pytest.approx((3, 0.5**0.5, 2.776 * 0.5**0.5), rel=1e-3)
    assert p == pytest.approx(0.0132, abs=1e-4)


def test_when_reached():
    """Catches: the crossing taken an evaluation late; a run that never arrives and counts as early."""
    row = {"total": 30, "curve": [[0, 0.2, 0, 0], [10, 0.4, 1, 2], [20, 0.8, 3, 4], [31, 0.6, 5, 9]]}
    assert report.when_reached(row, 0.5) == (12.5, 1.5, True)
    assert report.when_reached(row, 0.1) == (0.0, 0.0, True)
    assert report.when_reached(row, 0.9)[::2] == (30.0, False)
    late = {"total": 30, "curve": [[0, 0.2, 0, 0], [20, 0.4, 2, 2], [40, 0.8, 4, 4]]}
    assert report.when_reached(late, 0.5) == (25.0, 2.5, True)  # before its end, though seen after it
    assert report.when_reached(late, 0.7) == (30.0, 3.0, False)


@pytest.mark.parametrize("task", compare.SETTINGS)
def test_rows(task):
    """Catches: a run missing, twice, of another length, or at a rate that the tuning seeds did not choose."""
    rows, settings = report.read()[task], compare.SETTINGS[task]
    wanted = set(itertools.product(report.COMPARED, report.RATES, report.TUNING_SEEDS))
    for rule, seed in itertools.product(report.COMPARED, range(settings.seeds)):
        wanted.add((rule, report.best_rate(rows, rule), seed))
    found = [(r["rule"], r["lr"], r["seed"]) for r in rows]
    assert set(found) == wanted and len(found) == len(wanted)
    for row in rows:
        steps = row["updates"]["steps"]
        assert row["variants"] >= 64 and row["total"] == settings.total
        assert steps[-2] < settings.total <= steps[-1] == row["curve"][-1][0]
    assert not set(range(settings.seeds)) & set(report.TUNING_SEEDS)


def test_prose():
    """Catches: a sentence of chapter 11 whose numbers are those of another measure, rule or task."""
    text = " ".join((ROOT / "tutorial" / "11_beyond_language.md").read_text().split())
    rows = report.read()
    tables = {task: report.measures(r) for task, r in rows.items()}
    found = report.comparisons(tables)

    def pick(task, rule, measure, base="uniform"):
        wanted = (task, rule, base, measure)
        return next(c for c in found if (c["task"], c["rule"], c["base"], c["measure"]) == wanted)

    def saved(rule, measure):
        return tuple(f"{pick(task, rule, measure)['mean']:.0f}%" for task in ("reacher", "pong"))

    def high(task, rule, measure="steps"):
        c = pick(task, rule, measure)
        return c["mean"] + c["half"]

    assert "needs {} fewer steps on Reacher and {} fewer on Pong".format(*saved("knapsack", "steps")) in text
    assert "with more early it is {} and {}".format(*saved("more early", "steps")) in text
    assert "saves {} and {} of the CPU seconds".format(*saved("knapsack", "seconds")) in text
    assert "seconds, with more early {} and {}".format(*saved("more early", "seconds")) in text
    assert max(high("reacher", "knapsack"), high("reacher", "more early")) < 30
    assert f"(up to {high('pong', 'more early'):.0f}%)" in text and high("pong", "more early") < 30
    assert f"knapsack's (up to {high('pong', 'knapsack'):.0f}%)" in text and high("pong", "knapsack") > 30
    outside = [
        high(task, rule, "seconds") < 25
        for task, rule in itertools.product(tables, ("knapsack", "more early"))
    ]
    assert sum(outside) == 2 and "25% lies outside two of the four" in text
    against = [pick(task, "knapsack", "steps", "random starts")["mean"] for task in ("reacher", "pong")]
    assert f"it is {abs(against[0]):.0f}% on Reacher, and on Pong {-against[1]:.0f}% *more* steps" in text
    ends = {rule: [tables[t][rule]["final"].mean() for t in ("reacher", "pong")] for rule in report.COMPARED}
    (a, b), (u, v), (r, s) = (ends[rule] for rule in ("knapsack", "uniform", "random starts"))
    assert f"success is {a:.3f} against uniform's {u:.3f} on Reacher, {b:.3f} against {v:.3f} on Pong" in text
    assert f"random starts have {r:.3f} and {s:.3f}" in text and ends["more early"][1] < min(b, v)
    assert all(c["verdict"] == "tie" and abs(c["mean"]) < c["half"] for c in found)
    assert f"{min(c['p'] for c in found):.3f} before any correction" in text
    assert f"all {len(found)} comparisons" in text


def test_cost():
    """The whole comparison fits into an hour of two cores, evaluations not counted."""
    seconds = sum(r["curve"][-1][2] for rows in report.read().values() for r in rows)
    assert seconds < 4200


# ---- The tasks, where gymnasium is ----
@needs_gymnasium
def test_reacher():
    """Catches: a success that is not held; a goal of the training set among those held out."""
    import tasks

    task, rng = tasks.Reacher(), np.random.default_rng(0)
    goals = [task.goal_of(v) for split in ("train", "held-out") for v in task.variants(split)]
    assert len(set(goals)) == 128
    task.start("train-10", rng)
    task.goal = tuple(task.data.xpos[task.tip][:2])  # where the fingertip is already
    ends = [task.step(np.zeros(2))[1:] for _ in range(3)]
    assert ends == [(False, False), (False, False), (True, True)]
    task.start("train-60", rng)
    ends = [task.step(np.zeros(2))[1:] for _ in range(task.cap)]
    assert ends == [(False, False)] * (task.cap - 1) + [(False, True)]


@needs_gymnasium
def test_pong():
    """Catches: moments that differ from copy to copy, or were trained on; wins without the paddle."""
    import tasks

    copies, rng = [tasks.Pong(seed) for seed in (0, 1)], np.random.default_rng(0)
    train, held_out = (tasks.Pong.variants(split) for split in ("train", "held-out"))
    assert len(train) == len(held_out) == 64 and not set(train) & set(held_out)
    first = [[tuple(c.start(v, rng)) for v in train + held_out] for c in copies]
    assert first[0] == first[1]
    # One of those held out came out alike from three heights: the ball was there already.
    assert len(set(first[0][:64])) == 64 and len(set(first[0])) == 126

    def returned(policy):
        won = 0
        for variant in train:
            copies[0].start(variant, rng)
            over = False
            while not over:
                ram = copies[0].env.ale.getRAM()
                gap = int(ram[tasks.Pong.PADDLE]) - int(ram[tasks.Pong.BALL_Y])
                _, success, over = copies[0].step(policy(gap))
            won += success
        return won / len(train)

    assert returned(lambda gap: 0 if abs(gap) < 6 else 1 if gap > 0 else 2) > 0.5
    assert returned(lambda gap: int(rng.integers(3))) < 0.35


def command(*words):
    line = [sys.executable, str(FOLDER / "compare.py"), *map(str, words)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done


def but_times(file):
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [row | {"curve": [point[:2] for point in row["curve"]]} for row in rows]


@needs_gymnasium
def test_resume(tmp_path):
    """A comparison that was cut off inside a row ends as one that was not. Catches: a run done twice; a rate
    that depends on where it was cut; luck shared between runs of a process."""
    small = ("reacher", "--total", 5000, "--seeds", 1, "--rates", 2e-3)
    done = command(*small, "--out", tmp_path / "whole")
    whole = tmp_path / "whole" / "reacher.jsonl"
    assert len(but_times(whole)) == 12 and "update  2," in done.stdout and "it/s" not in done.stdout
    cut = tmp_path / "cut" / "reacher.jsonl"
    cut.parent.mkdir()
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:7]) + lines[7][:100])
    command(*small, "--out", cut.parent)
    assert but_times(cut) == but_times(whole)
    assert cut.read_text().splitlines(keepends=True)[:7] == lines[:7]


@needs_gymnasium
@pytest.mark.parametrize("task, rule, total", [("pong", "price", 3000), ("reacher", "steps", 5000)])
def test_runs(task, rule, total):
    """A few updates through the command line, twice to the same end."""
    words = (task, "--rule", rule, "--total", total, "--price", 0.02)
    said = command(*words).stdout
    assert said.count("update") >= 2 and "succeed" in said
    assert said == command(*words).stdout
