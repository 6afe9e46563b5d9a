"""tutorial/neighbours.py: each published rule against an oracle, then in its place in train.py."""

import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "tutorial"))
import neighbours

import evaluate
import grpo
import knapsack
import train

P = np.array([0.04, 0.3, 0.55, 0.9])
AB = np.array([0.5, 2, 5.5, 9.0]), np.array([7.5, 4, 5.5, 1.0])


def beta_density(p, a, b):
    return np.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) * p ** (a - 1) * (1 - p) ** (b - 1)


def average(f, a, b, points=20_001):
    """E f(p), p ~ Beta(a, b), by the midpoint rule in x: p = sin(x)^2 tames the ends."""
    x = (np.arange(points) + 0.5) * math.pi / 2 / points
    p = np.sin(x) ** 2
    weights = beta_density(p, a, b) * 2 * np.sin(x) * np.cos(x)
    return (f(p) * weights).sum() / weights.sum()


def binomial_push(n, p):
    return sum(math.comb(n, m) * p**m * (1 - p) ** (n - m) * math.sqrt(m * (n - m)) for m in range(n + 1))


def coba_value(failure):
    """Eq. 5 to 9 once more; the density is normed by summing it up."""
    f = failure if failure > 0.5 else 1 / (1 + math.exp(-10 * (failure - 0.5)))
    a, tau = 1 + 9 * f, 3 + 9 * np.var(P) / 0.1667
    grid = (np.arange(100_000) + 0.5) / 100_000
    norm = (grid ** (a - 1) * (1 - grid) ** (10 - a)).mean()

    def value(n, p):
        density = p ** (a - 1) * (1 - p) ** (10 - a) / norm
        return (1 - math.exp(-n * p * (1 - p) / tau)) * density * (0.05 <= p < 0.99)

    return value


# rule: (function, what it makes largest). What averages over a posterior is told apart below.
OF_P = {
    "neyman": (neighbours.neyman, lambda n, p: -p * (1 - p) / (n - 1)),
    "ada-est": (neighbours.ada_est, lambda n, p: -1 / (p + 1e-3) / n),
    "ada-1/p": (lambda *a: neighbours.ada_est(*a, power=1.0), lambda n, p: -1 / (p + 1e-3) ** 2 / n),
    "hora": (neighbours.hora, lambda n, p: 1 - (1 - p) ** n),
    "push": (neighbours.expected_push, binomial_push),
    "coba, hard": (lambda *a: neighbours.coba(*a, failure=0.8), coba_value(0.8)),
    "coba, easy": (lambda *a: neighbours.coba(*a, failure=0.2), coba_value(0.2)),
}


def best_total(value, p, budget, n_min, n_max):
    table = [{n: value(n, x) for n in range(n_min, n_max + 1)} for x in p]
    ways = itertools.product(range(n_min, n_max + 1), repeat=len(p))
    return max(sum(t[n] for t, n in zip(table, c, strict=True)) for c in ways if sum(c) == budget)


@pytest.mark.parametrize("rule", OF_P)
@pytest.mark.parametrize("budget", [8, 13, 21, 36])
def test_no_other_counts_are_better(rule, budget):
    """All counts tried. Catches: a formula off by one rollout, a greedy on gains that do not fall."""
    allocate, value = OF_P[rule]
    counts = allocate(P, budget, 2, 9)
    assert counts.sum() == budget and counts.min() >= 2 and counts.max() <= 9
    total = sum(value(int(n), p) for n, p in zip(counts, P, strict=True))
    assert np.isclose(total, best_total(value, P, budget, 2, 9), rtol=1e-9)


@pytest.mark.parametrize("rule", ["neyman", "hora", "push"])
def test_posteriors_are_averaged(rule):
    """Against numerical integration. Catches: a posterior's mean taken for p where the rule averages."""
    allocate, value = OF_P[rule]
    counts = allocate(AB, 26, 2, 9)
    each = [
        {n: average(np.vectorize(lambda p, n=n: value(n, p)), a, b, 2001) for n in range(2, 10)}
        for a, b in zip(*AB, strict=True)
    ]
    best = max(
        (c for c in itertools.product(range(2, 10), repeat=4) if sum(c) == 26),
        key=lambda c: sum(e[n] for e, n in zip(each, c, strict=True)),
    )
    worth = [sum(e[n] for e, n in zip(each, c, strict=True)) for c in (counts, best)]
    assert np.isclose(*worth, rtol=1e-5)


@pytest.mark.parametrize("rule", ["ada-est", "coba, hard"])
def test_points_are_posterior_means(rule):
    """Catches: alpha alone, or alpha + beta, where the mean is meant."""
    allocate, _ = OF_P[rule]
    assert np.array_equal(allocate(AB, 40, 2, 20), allocate(AB[0] / (AB[0] + AB[1]), 40, 2, 20))


def test_proportions_at_a_large_budget():
    """Closed forms. Catches: 1/p where 1/sqrt(p) is meant, or the other way round."""
    n = neighbours.neyman(P, 40_000, 2, 10**5) - 1
    assert np.allclose(n / n.sum(), np.sqrt(P * (1 - P)) / np.sqrt(P * (1 - P)).sum(), atol=1e-3)
    for power in (0.5, 1.0):
        n = neighbours.ada_est(P, 40_000, 2, 10**5, power=power)
        w = (P + 1e-3) ** -power
        assert np.allclose(n / n.sum(), w / w.sum(), atol=1e-3)


def test_push_is_what_group_advantages_add_up_to():
    """Every outcome through grpo. Catches: another advantage's push; a table shifted by one rollout."""
    worth = neighbours.push(9, P)
    for n in range(2, 10):
        positive = []
        for m in range(n + 1):
            A = grpo.group_advantages(np.arange(n) < m, np.zeros(n), eps=1e-12)
            positive.append(A[A > 0].sum() / math.sqrt((n - 1) / n))
        chances = [[math.comb(n, m) * p**m * (1 - p) ** (n - m) for m in range(n + 1)] for p in P]
        assert np.allclose(worth[:, n], np.array(chances) @ positive)


def test_push_does_not_saturate():
    """Catches: a push that levels off, as P(mixed) does. Its gain tends to sqrt(p q)."""
    gains = np.diff(neighbours.push(400, P), axis=1)
    assert np.allclose(gains[:, -1], np.sqrt(P * (1 - P)), rtol=0.02)
    assert not knapsack._concave(neighbours.push(20, P)[:, 2:])  # so a greedy would not do


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1e-9, 0.02, 0.3, 0.5, 0.97, 1.0]), min_size=1, max_size=8),
    st.integers(0, 60),
    st.sampled_from(sorted(OF_P)),
    st.booleans(),
)
@example([0.0], 1, "push", False)  # nothing to gain, and still to be spent
def test_budget_and_bounds(p, extra, rule, posterior):
    """Certain prompts included. Catches: NaN at p = 0 or 1; a budget not spent, or a limit passed."""
    p, n_max = np.array(p), 10
    budget = min(2 * len(p) + extra, n_max * len(p))
    known = (20 * p + 1e-3, 20 * (1 - p) + 1e-3) if posterior else p
    counts = OF_P[rule][0](known, budget, 2, n_max)
    assert counts.sum() == budget and counts.min() >= 2 and counts.max() <= n_max
    assert counts.dtype.kind == "i"
    if rule != "push":  # its gains rise at first, so of two equals one may get all
        for x in set(p):
            assert np.ptp(counts[p == x]) <= 1


@pytest.mark.parametrize("rule", OF_P)
def test_certain_prompts(rule):
    """p = 0 and 1 beside one half. Catches: rollouts bought where nothing can be gained."""
    p = np.array([0.0, 0.5, 1.0])
    counts = OF_P[rule][0](p, 24, 2, 20)
    if rule.startswith("ada"):
        assert counts[0] == 20 and counts[1] >= counts[2]  # the hopeless one gets all it may
    else:
        assert counts[1] == 20 and {*counts[[0, 2]]} == {2}


@pytest.mark.parametrize("rule", OF_P)
def test_budgets_that_cannot_be(rule):
    """Catches: counts that quietly add up to another sum."""
    for budget in (7, 37):
        with pytest.raises(ValueError, match=f"budget {budget}"):
            OF_P[rule][0](P, budget, 2, 9)


def test_coba_moves_from_easy_to_hard():
    """Catches: alpha and beta exchanged; a jump where the failure rate passes one half."""
    p = np.linspace(0.02, 0.98, 49)
    favourite = [p[neighbours.coba(p, 392, failure=f).argmax()] for f in (0.9, 0.7, 0.5, 0.3, 0.1)]
    assert favourite == sorted(favourite, reverse=True) and favourite[0] > 0.7 and favourite[-1] < 0.2
    near = [neighbours.coba(p, 392, failure=f) for f in (0.5 - 1e-9, 0.5 + 1e-9)]
    assert np.abs(near[0] - near[1]).max() <= 1


# ---- Rules that look at outcomes -----------------------------------------------------------------------
class Tape:
    """Each prompt's outcomes, fixed beforehand; what was drawn is counted."""

    def __init__(self, p, seed=0, length=400):
        self.rows = np.random.default_rng(seed).random((len(p), length)) < np.asarray(p)[:, None]
        self.used, self.calls = np.zeros(len(p), int), []

    def __call__(self, prompts, counts):
        out = []
        for i, n in zip(prompts, counts, strict=True):
            out.append(self.rows[i, self.used[i] : self.used[i] + n].astype(float))
            self.used[i] += n
        self.calls.append(dict(zip(map(int, prompts), map(int, counts), strict=True)))
        return out


@pytest.mark.parametrize("name", ["ada-seq", "ar3po"])
def test_rounds_stop_where_they_should(name):
    """A naive loop a prompt. Catches: a stop a round late or early, outcomes lost, a prompt asked twice."""
    p = np.array([0.0, 0.05, 0.2, 0.5, 0.8, 1.0] * 3)
    tape = Tape(p)
    if name == "ada-seq":
        rewards, most = neighbours.ada_seq(tape, len(p), 10**6), 32
    else:
        rewards, most = neighbours.ar3po(tape, len(p), 10**6), 16
    for i, got in enumerate(rewards):
        n = 4
        while n < most:
            right = tape.rows[i, :n].sum()
            if (right >= 2 and n - right >= 2) if name == "ada-seq" else right:
                break
            n += 4
        assert np.array_equal(got, tape.rows[i, :n]) and tape.used[i] == n


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 200), st.integers(1, 9), st.integers(0, 5))
def test_rounds_keep_the_budget(budget, m, seed):
    """Catches: a last round that overdraws; rollouts drawn and not counted."""
    wanted = {  # until when, and how many at most
        neighbours.ada_seq: (lambda r: r.sum() >= 2 and (1 - r).sum() >= 2, 32),
        neighbours.ar3po: (np.any, 16),
    }
    for rule, (enough, most) in wanted.items():
        tape = Tape(np.linspace(0, 1, m), seed)
        rewards = rule(tape, m, budget)
        assert tape.used.sum() == sum(map(len, rewards)) <= budget
        done = tape.used.sum() + 4 > budget  # or nobody wanted more
        assert done or all(len(r) == most or enough(r) for r in rewards)


def test_until_one_is_right_takes_one_over_p():
    """The paper's claim: E n = 1 / p. Catches: rounds of one that draw more."""
    p = np.repeat([0.5, 0.2, 0.1], 4000)
    tape = Tape(p, length=200)
    neighbours.in_rounds(tape, len(p), 10**9, 1, 200, lambda r: r.any())
    n = tape.used.reshape(3, -1)
    assert np.all(np.abs(n.mean(1) - [2, 5, 10]) < 4 * n.std(1) / np.sqrt(4000))


def test_hora_in_two_stages():
    """Brute force over the second stage. Catches: the first stage's rollouts counted as hits to come."""
    tape = Tape([0.0, 0.3, 0.9], seed=1)
    rewards = neighbours.hora_staged(tape, 3, 24, n_max=20)
    assert tape.used.sum() == sum(map(len, rewards)) == 24 and min(map(len, rewards)) >= 4
    right = tape.rows[:, :4].sum(1)

    def hits(extra):
        return sum(
            1 - average(lambda p, m=m: (1 - p) ** m, 1 + s, 5 - s, 4001)
            for m, s in zip(extra, right, strict=True)
        )

    best = max(hits(e) for e in itertools.product(range(13), repeat=3) if sum(e) == 12)
    assert np.isclose(hits([len(r) - 4 for r in rewards]), best, atol=1e-6)
    for i, r in enumerate(rewards):
        assert np.array_equal(r, tape.rows[i, : len(r)])


def test_dapo_against_a_loop():
    """Catches: silent groups kept, mixed ones out of order, an update before enough are there."""
    rng = np.random.default_rng(0)
    batches, mixed = [], []
    for b in range(6):
        group = np.repeat(np.arange(5), 4)
        rewards = (rng.random(20) < np.repeat(rng.random(5), 4)).astype(float)
        batches.append((rewards, group))
        mixed += [(b, g) for g in range(5) if 0 < rewards[4 * g : 4 * g + 4].sum() < 4]
        for keep in (1, 7, len(mixed), len(mixed) + 1):
            expected = mixed[:keep] if len(mixed) >= keep else None
            assert neighbours.dapo(batches, keep) == expected


# ---- Advantages ----------------------------------------------------------------------------------------
@pytest.fixture
def batch():
    """(rewards, group): ragged, the first silent ones among it."""
    group = np.repeat(np.arange(6), [4, 6, 3, 5, 8, 2])
    rewards = np.array([0] * 4 + [1] * 6 + [1, 0, 0] + [1, 1, 0, 1, 1] + [0] * 7 + [1] + [1, 0], float)
    return rewards, group


def test_spo(batch):
    """Closed form. Catches: the group's own mean as the baseline; silent groups without advantage."""
    rewards, group = batch
    value = np.linspace(0.1, 0.9, 6)
    A = neighbours.spo(rewards, group, value)
    raw = rewards - value[group]
    assert np.allclose(A, (raw - raw.mean()) / raw.std()) and A[:4].any() and A[4:10].any()
    alone = neighbours.spo(np.array([1.0, 0, 1]), np.arange(3), np.array([0.5, 0.5, 0.9]))
    assert alone[0] > alone[2] > alone[1]  # groups of one; the less expected success counts more


def test_mapo(batch):
    """Group by group. Catches: the weights exchanged, which are alike only at p = 1/2."""
    rewards, group = batch
    A = neighbours.mapo(rewards, group)
    for g in range(6):
        r = rewards[group == g]
        if r.std() == 0:
            assert not A[group == g].any()
            continue
        p = r.mean()
        expected = (4 * p * (1 - p)) * (r - p) / r.std() + (1 - 4 * p * (1 - p)) * (r - p) / p
        assert np.allclose(A[group == g], expected)
    half = neighbours.mapo(np.array([1.0, 0]), np.zeros(2, int))
    assert np.allclose(half, [1, -1])


def test_dcpo_against_all_rewards(batch):
    """Every reward kept. Catches: a visit counted twice, or the larger of both taken."""
    rewards, group = batch
    rng = np.random.default_rng(0)
    past = [[] for _ in range(6)]
    for i in range(1, 5):
        if i > 1:
            rewards = np.where(group < 2, rewards, rng.integers(0, 2, len(group))).astype(float)
        right, trials = np.array([[sum(x), len(x)] for x in past]).T
        A = neighbours.dcpo(rewards, group, right, trials, np.full(6, i))
        for g in range(6):
            now = rewards[group == g]
            past[g] += now.tolist()
            both = []
            for x in (now, np.array(past[g])):
                both.append((now - x.mean()) / x.std() if x.std() > 0 else 0 * now)
            mixed = [(i - 1) / i * both[0] + both[1] / i, both[0] / i + (i - 1) / i * both[1]]
            expected = np.where(np.abs(mixed[0]) < np.abs(mixed[1]), *mixed)
            assert np.allclose(A[group == g], expected)


def test_dcpo_silent_groups_still_teach():
    """The paper's case: A = all / i. Catches: silence that stays silent."""
    A = neighbours.dcpo(np.ones(4), np.zeros(4, int), [2], [8], [3])
    p = 6 / 12
    assert np.allclose(A, (1 - p) / math.sqrt(p * (1 - p)) / 3)
    assert not neighbours.dcpo(np.ones(4), np.zeros(4, int), [8], [8], [3]).any()  # never anything else


def test_dcpo_clip():
    """At the ends |r - 1| p_new = epsilon; where GRPO clips at 0.8 and 1.2, so does it. Catches: old_p
    where the new one is meant; a bound that crosses 1."""
    q = torch.tensor([0.65, 0.8, 1.0], dtype=torch.float64)
    low, high = neighbours.dcpo_clip(q)
    assert torch.allclose((1 - low) * low * q, torch.tensor(0.16, dtype=torch.float64))
    assert torch.allclose((high - 1) * high * q, torch.tensor(0.2, dtype=torch.float64))
    assert low[2].item() == pytest.approx(0.8)
    assert neighbours.dcpo_clip(torch.tensor([1 / 1.2]))[1].item() == pytest.approx(1.2)
    rare = neighbours.dcpo_clip(torch.tensor([1e-6]))
    assert (rare[0].item(), rare[1].item()) == (0.5, 10)


def test_copo(batch):
    """A naive loop. Catches: the entropy of rewards, not of answers; local and global exchanged."""
    rewards, group = batch
    answers = ["7"] * 4 + ["1"] * 6 + ["1", "2", "3"] + list("11911") + list("abcdefgh") + ["x", "y"]
    local = grpo.group_advantages(rewards, group)
    A = neighbours.copo(local, rewards, group, answers)
    means = np.array([rewards[group == g].mean() for g in range(6)])
    for g in range(6):
        mine = [a for a, i in zip(answers, group, strict=True) if i == g]
        H = -sum(mine.count(a) / len(mine) * math.log2(mine.count(a) / len(mine)) for a in set(mine))
        w = rewards[group == g] / (1 + math.exp(-5 * (H - 1)))
        expected = w * local[group == g] + (1 - w) * (means[g] - means.mean()) / means.std()
        assert np.allclose(A[group == g], expected)
    assert A[:4].max() < 0 < A[4:10].min()  # silent groups: all wrong is pushed down, all right up
    right = (group == 4) & (rewards == 1)
    assert np.allclose(A[right], local[right], atol=1e-3)  # eight answers, three bits: local


def test_ada_advantages(batch):
    """The rest of the weight 1 / p. Catches: a std, or the wrong root."""
    rewards, group = batch
    for power in (0, 0.5):
        A = neighbours.ada_advantages(rewards, group, power)
        for g in range(6):
            r = rewards[group == g]
            assert np.allclose(A[group == g], (r - r.mean()) / (r.mean() + 1e-3) ** power)


def test_ar3po_reuse(batch):
    """Catches: the stored answer learned from, or lent to groups that need none or have none."""
    rewards, group = batch
    plain = grpo.group_advantages(rewards, group)
    for stored in ([False] * 6, [True] * 6):
        A = neighbours.ar3po_advantages(grpo.group_advantages, rewards, group, stored)
        assert np.array_equal(A[4:], plain[4:])
        lent = grpo.group_advantages([0.0, 0, 0, 1], [0] * 4)
        assert np.allclose(A[:4], [*lent[:3], 0] if stored[0] else 0)


def test_majority():
    """Catches: votes of several prompts in one ballot; a number in the working taken for the answer."""
    tasks = [SimpleNamespace(id=i) for i in "aaabbb"]
    texts = ["3+4=7", "it is 7", "8", "8", "8 or 1", "8"]
    assert neighbours.majority(tasks, texts) == [1, 1, 0, 1, 0, 1]


# ---- In train.py ---------------------------------------------------------------------------------------
SMALL = "--prompts 16 --budget 128 --held-out 8 --eval-samples 1 --lr 1e-4 --save-every 9 --engine hf".split()


@pytest.fixture
def restored(monkeypatch):
    """Whatever a rule exchanges is put back."""
    monkeypatch.setattr(train, "ALLOCATORS", dict(train.ALLOCATORS))
    names = [(grpo, n) for n in ("group_advantages", "update", "clipped_loss")]
    for module, name in [(train, "set_up"), (train, "PATIENCE"), *names]:
        monkeypatch.setattr(module, name, getattr(module, name))


def two_steps(name, main, folder):
    seen = neighbours.plug(name)
    advantages = []
    inner = grpo.group_advantages
    grpo.group_advantages = lambda *a: advantages.append(inner(*a)) or advantages[-1]
    flags = "--prompts 128 --n-min 1".split() if name == "spo-1" else []
    code, said = main(*SMALL, *flags, "--steps", 2, "--allocator", name, "--out", folder)
    assert code == 0, said
    groups = list(evaluate.each_row(folder / "groups.jsonl"))
    return seen, advantages, groups, list(evaluate.each_row(folder / "metrics.jsonl"))[1:]


def test_a_sequential_rule_in_the_loop(restored, main, tmp_path):
    """Catches: rollouts sampled again after the rule drew them; counts that are not what was drawn."""
    seen, advantages, groups, metrics = two_steps("ar3po", main, tmp_path / "run")
    for g, row in zip(groups, metrics, strict=True):
        n, s = np.array(g["counts"]), np.array(g["successes"])
        assert n.sum() == row["budget"] <= 128 and set(n) <= {0, 4, 8, 12, 16}
        assert not ((n > 4) & (s > 4)).any()  # a right one in an earlier stage would have ended it
    assert len(seen.rollouts) and len(advantages[0]) == metrics[0]["budget"]


@pytest.mark.parametrize("name", [name for name in neighbours.RULES if name != "uniform"])
def test_a_rule_is_in_its_place(name, restored):
    """Catches: one that plug forgets, so that its run is uniform under another name."""
    parts = grpo.group_advantages, grpo.update, grpo.clipped_loss
    neighbours.plug(name)
    exchanged = parts != (grpo.group_advantages, grpo.update, grpo.clipped_loss)
    tracker, ids = knapsack.SuccessTracker(), list("abcd")
    tracker.update(ids, [1, 16, 30, 8], [32] * 4)
    if not exchanged and name not in neighbours.DRAWS:
        counts = train.ALLOCATORS[name](tracker, ids, train.Config(prompts=4, budget=64))
        assert len(set(counts)) > 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [*neighbours.RULES, "neyman+spo"])
def test_rules_run(name, restored, main, tmp_path):
    """Catches: a rule that no longer fits train.py, or that spends too much."""
    _, advantages, groups, metrics = two_steps(name, main, tmp_path / "run")
    for g, row in zip(groups, metrics, strict=True):
        counts = np.array(g["counts"])
        assert counts.sum() == row["budget"] <= 128
        assert row["budget"] == 128 or name in ("ada-seq", "ar3po")
    if any(part in name for part in ("spo", "copo")):
        assert (advantages[0] != 0).mean() > 0.9  # silent groups teach, too
    if name == "dapo":
        assert metrics[0]["loss"] is None and metrics[0]["skipped_tokens"] == 1  # not all 16 are mixed
    if name == "dcpo":
        assert all(row["loss"] is not None for row in metrics)


def test_silent_groups_that_teach(restored):
    """Catches: a rule of single rollouts that train.py stops, as all of its groups are silent; one to which
    silent groups teach nothing, and which goes on for ever."""
    silent = {"steps_skipped": 0, "effective_rollouts": 0.0, "all_right": 0.1}
    for name in ("neyman", "mapo", "ada-est"):
        neighbours.plug(name)
        assert "every group was silent" in train.hopeless(20 * [silent])
    neighbours.plug("spo-1")
    assert train.hopeless(1000 * [silent]) is None


def test_an_unknown_rule(restored):
    """Catches: a misspelt rule that runs as uniform."""
    with pytest.raises(ValueError, match="no rule 'sop'"):
        neighbours.plug("neyman+sop")


def test_dapo_waits(restored):
    """Catches: groups of two batches under one label; an update of what was not asked for."""

    class R:
        def __init__(self, group):
            self.group = group

    seen = []
    grpo.update = lambda model, optimizer, rollouts, A: seen.append(([r.group for r in rollouts], A)) or {}
    mp = pytest.MonkeyPatch()
    mp.setattr(neighbours, "replace", lambda r, group: R(group))
    neighbours.dapo_updates(SimpleNamespace(run=SimpleNamespace(config=SimpleNamespace(prompts=3))))
    rollouts, A = [R(g) for g in (0, 0, 1, 1, 2, 2)], np.array([1.0, -1, 0, 0, 1, -1])
    assert grpo.update(None, None, rollouts, A)["skipped_tokens"] == 1 and not seen
    grpo.update(None, None, rollouts, 2 * A)
    ((labels, used),) = seen
    assert labels == [0, 0, 1, 1, 2, 2] and np.array_equal(used, [1, -1, 1, -1, 2, -2])
    assert grpo.update(None, None, rollouts, A)["loss"] is None  # it begins anew
    mp.undo()
