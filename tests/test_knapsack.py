"""knapsack.py against oracles: exact rationals, mpmath, brute force, simulation. Each test names its bug."""

import itertools
import json
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import knapsack
from knapsack import (
    SuccessTracker,
    allocate,
    allocate_at_price,
    allocate_paper,
    allocate_saving,
    expected_rollouts,
    expected_value,
    info_gain,
    prob_nonzero_gradient,
    rollouts_for_confidence,
    shadow_price,
    solve_dp,
    solve_dp_torch,
    solve_greedy,
    uniform,
    value,
)

many = settings(derandomize=True, deadline=None, max_examples=250)

# Probabilities that hit the special cases as often as the ordinary ones; equal ones make ties.
probability = st.one_of(st.sampled_from([0.0, 1.0, 0.5, 1e-12, 1 - 1e-12]), st.floats(0, 1))
positive = st.one_of(st.sampled_from([0.01, 1.0, 3.0]), st.floats(1e-3, 50))
prompts = st.one_of(
    st.lists(probability, min_size=1, max_size=4).map(np.array),
    st.lists(st.tuples(positive, positive), min_size=1, max_size=4).map(
        lambda x: (np.array(x)[:, 0], np.array(x)[:, 1])
    ),
)


def size(p):
    return len(p[0]) if isinstance(p, tuple) else len(p)


def moment(a, b, i, j):
    """E[p^i q^j] under Beta(a, b), a ratio of rising factorials; exact if a and b are Fractions."""
    m = 1 + 0 * a
    for k in range(i):
        m *= a + k
    for k in range(j):
        m *= b + k
    for k in range(i + j):
        m /= a + b + k
    return m


def exact_value(n, a, b):
    return moment(a, b, 1, 2) - moment(a, b, 1 + n, 2) - moment(a, b, 1, 2 + n)


def table(p, n_max, weights=1.0, bonus=0.0):
    """(M, n_max + 1) of weights x P(mixed) x (InfoGain + bonus), the slow way: by the definition."""
    n = np.arange(n_max + 1)
    if isinstance(p, tuple):
        v = np.array([exact_value(k, *p) for k in n]).T
        mixed = np.array([1 - moment(*p, k, 0) - moment(*p, 0, k) for k in n]).T
    else:
        mixed = 1 - p[:, None] ** n - (1 - p[:, None]) ** n
        v = mixed * (p * (1 - p) ** 2)[:, None]
    return np.reshape(weights, (-1, 1)) * (v + mixed * np.reshape(bonus, (-1, 1)))


def totals(values, costs, options):
    """The value and the cost of every way to choose one option a row."""
    ways = np.array(list(itertools.product(options, repeat=len(values))))  # (ways, M)
    rows = np.arange(len(values))
    return values[rows, ways].sum(1), costs[rows, ways].sum(1)


# ---- estimation ----------------------------------------------------------------------------------------


def naive_posterior(history, ids, discount, strength):
    """The tracker as a loop over prompts, from the whole history of visits."""
    s, t = {}, {}
    for visit in history:
        for i, (right, trials) in visit.items():
            s[i] = discount * s.get(i, 0) + right
            t[i] = discount * t.get(i, 0) + trials
    rates = [s[i] / t[i] for i in s]
    mean = (sum(rates) + 1) / (len(rates) + 2)
    rho = 1 / 3
    if len(rates) > 1:
        few = min(sum(1 / t[i] for i in s) / len(rates), 0.9)
        spread = sum((r - mean) ** 2 for r in rates) / len(rates) / (mean * (1 - mean))
        rho = min(max((spread - few) / (1 - few), 0.01), 0.9)
    total = strength * (1 / rho - 1)
    a = [total * mean + s.get(i, 0) for i in ids]
    b = [total * (1 - mean) + t.get(i, 0) - s.get(i, 0) for i in ids]
    return np.array(a), np.array(b)


def random_history(rng, visits=30, pool=12):
    ids = [i if i % 2 else f"prompt-{i}" for i in range(pool)]
    for _ in range(visits):
        batch = [ids[k] for k in rng.permutation(pool)[: rng.integers(1, pool)]]
        trials = rng.integers(1, 24, len(batch))
        yield batch, rng.binomial(trials, rng.random(len(batch))), trials


@pytest.mark.parametrize("discount, strength", [(0.75, 0.25), (1.0, 1.0), (0.0, 4.0)])
def test_posterior_is_the_naive_loop(discount, strength):
    """Catches: rows mixed up as the arrays grow, discounting unvisited prompts, unseen != prior."""
    tracker, history = SuccessTracker(discount, strength, drift=0), []
    for ids, s, t in random_history(np.random.default_rng(0)):
        tracker.update(ids, s, t)
        history.append({i: x for i, *x in zip(ids, s, t, strict=True)})
        asked = [*ids, "never seen", 10**12]
        for got, want in zip(
            tracker.posterior(asked), naive_posterior(history, asked, discount, strength), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-15)


def test_prior_recovers_the_beta_that_made_the_prompts():
    """Catches: a variance that keeps the binomial noise in (few trials would look like spread)."""
    rng = np.random.default_rng(1)
    for a, b in [(0.5, 0.5), (2, 6), (8, 2)]:
        tracker = SuccessTracker(prior_strength=1)
        p = rng.beta(a, b, 20_000)
        tracker.update(range(len(p)), rng.binomial(8, p), np.full(len(p), 8))
        np.testing.assert_allclose(tracker.prior(), (a, b), rtol=0.1)


@pytest.mark.parametrize("s", [0, 8])
def test_prior_survives_batches_without_variance(s):
    """Catches: 0/0 when every prompt so far failed (or succeeded): a NaN would stop the run."""
    tracker = SuccessTracker()
    assert tracker.estimate(["new"]) == 0.5
    tracker.update(["a", "b"], [s, s], [8, 8])
    assert np.all(np.array(tracker.posterior(["a", "b", "new"])) > 0)
    assert (tracker.estimate(["a"])[0] < tracker.estimate(["new"])[0]) == (s == 0)


def test_windowed_rate_is_the_papers():
    """Catches: averaging visits instead of outcomes, and mixing old ones into a visit of 16 or more."""
    tracker = SuccessTracker()
    assert np.isnan(tracker.windowed_rate(["a"]))
    tracker.update(["a"], [8], [8])
    assert tracker.windowed_rate(["a"]) == 1
    tracker.update(["a"], [0], [4])
    assert tracker.windowed_rate(["a"]) == 8 / 12  # fewer than 16: all of them
    tracker.update(["a"], [3], [8])
    assert tracker.windowed_rate(["a"]) == (3 + 0 + 4) / 16  # 8 + 4 + half of the oldest 8
    tracker.update(["a"], [5], [20])
    assert tracker.windowed_rate(["a"]) == 5 / 20  # 16 or more new ones: these alone
    for _ in range(30):
        tracker.update(["a"], [1], [1])
    tracker.update(["a"], [0], [1])
    assert tracker.windowed_rate(["a"]) == 15 / 16 and tracker.windowed_rate(["a"], window=1) == 0


def test_windowed_rate_against_the_list_of_outcomes():
    """Catches: an off-by-one in the window. Visits of equal outcomes, so that their order is known."""
    rng, tracker, outcomes = np.random.default_rng(2), SuccessTracker(), []
    for _ in range(200):
        n, right = int(rng.integers(1, 7)), int(rng.integers(0, 2))
        tracker.update([7], [right * n], [n])
        outcomes += [right] * n
        np.testing.assert_allclose(tracker.windowed_rate([7]), np.mean(outcomes[-16:]), rtol=1e-15)


def test_repeated_id_is_one_visit():
    """Catches: fancy indexing that keeps only the last of two entries of one prompt."""
    twice, once = SuccessTracker(), SuccessTracker()
    for _ in range(2):
        twice.update(["a", "b", "a"], [1, 2, 3], [4, 4, 4])
        once.update(["a", "b"], [4, 2], [8, 4])
    assert np.array_equal(twice.posterior(["a", "b"]), once.posterior(["a", "b"]))


def test_visit_without_trials_is_no_visit():
    """Catches: forgetting (or dividing by zero) when a prompt was drawn but got no rollouts."""
    tracker = SuccessTracker()
    tracker.update(["a", "b"], [2, 0], [8, 0])
    before = tracker.posterior(["a", "b"])
    tracker.update(["a"], [0], [0])
    assert np.array_equal(before, tracker.posterior(["a", "b"]))
    assert np.isnan(tracker.windowed_rate(["b"])) and not tracker.solved(["b"])


def test_solved_remembers():
    """Catches: a success that discounting forgets."""
    tracker = SuccessTracker()
    tracker.update(["a", "b"], [1, 0], [8, 8])
    for _ in range(500):
        tracker.update(["a", "b"], [0, 0], [8, 8])
    assert tracker.solved(["a", "b", "new"]).tolist() == [True, False, False]


def test_drift_is_the_naive_loop():
    """Catches: a shift that forgets, is applied twice, learns from what it has not yet predicted, takes
    the first batch for a change, or is NaN after a prompt without a rollout."""
    plain, drifting, shift, most = SuccessTracker(drift=0), SuccessTracker(drift=0.3), 0.0, 0.0
    for ids, s, t in random_history(np.random.default_rng(6)):
        odds = [p / (1 - p) * np.exp(shift) for p in plain.estimate(ids)]
        moved = [o / (1 + o) for o in odds]
        np.testing.assert_allclose(drifting.estimate(ids), moved, rtol=1e-12)
        both = zip(plain.posterior(ids), drifting.posterior(ids), strict=True)
        np.testing.assert_allclose(*(a + b for a, b in zip(*both, strict=True)), rtol=1e-12)
        came, expected = (min(max(float(np.mean(x)), 0.01), 0.99) for x in (s / t, moved))
        if plain.state_dict()["ids"]:
            shift += 0.3 * (np.log(came / (1 - came)) - np.log(expected / (1 - expected)))
        for tracker in (plain, drifting):
            tracker.update(ids, s, t)
        most = max(most, abs(shift))
    assert most > 0.1
    before = drifting.shift
    drifting.update(["idle"], [0], [0])
    assert drifting.shift == before
    drifting.update([1, "idle"], [1, 0], [2, 0])
    assert np.isfinite(drifting.shift)


def test_drift_follows_a_model_that_learns():
    """200 prompts, 50 a step; everybody's log-odds rise by 0.1 a step for 40 steps, then stay. Catches: a
    shift of the wrong sign, and one that stays when there is nothing left to follow."""
    rng, start = np.random.default_rng(0), np.random.default_rng(1).normal(-2, 1.5, 200)
    trackers = SuccessTracker(drift=0), SuccessTracker()
    error = np.zeros((2, 160))
    for step in range(160):
        ids = np.arange(200)[step % 4 :: 4]
        p = 1 / (1 + np.exp(-start[ids] - 0.1 * min(step, 40)))
        s = rng.binomial(8, p)
        for k, tracker in enumerate(trackers):
            error[k, step] = np.mean(tracker.estimate(ids) - p)
            tracker.update(ids, s, np.full(50, 8))
    late = np.abs(error[:, 8:40].mean(1))
    assert late[0] > 0.1 and late[1] < late[0] / 5
    assert abs(error[1, 100:].mean()) < 0.01 and abs(trackers[1].shift) < 0.3


def test_state_round_trips_through_json():
    """Catches: int ids that come back as strings, and estimates that differ in the last bit."""
    rng = np.random.default_rng(3)
    tracker = SuccessTracker(0.9, 0.3, drift=0.2)
    empty = SuccessTracker()
    empty.load_state_dict(json.loads(json.dumps(SuccessTracker(0.5).state_dict())))
    assert empty.discount == 0.5 and np.array_equal(empty.estimate([1]), SuccessTracker(0.5).estimate([1]))
    tracker.update(np.arange(3), [1, 2, 3], [8, 8, 8])  # NumPy ints are ints too
    history = list(random_history(rng))
    for ids, s, t in history[:10]:
        tracker.update(ids, s, t)
    assert tracker.shift and len(history) > 10
    restored = SuccessTracker()
    restored.load_state_dict(json.loads(json.dumps(tracker.state_dict())))
    for ids, s, t in history[10:]:
        for x in (tracker, restored):
            x.update(ids, s, t)
        asked = [*ids, 0, 1, 2, "1"]
        assert np.array_equal(tracker.posterior(asked), restored.posterior(asked))
        assert np.array_equal(tracker.windowed_rate(asked), restored.windowed_rate(asked), equal_nan=True)
    assert json.dumps(tracker.state_dict()) == json.dumps(restored.state_dict())
    assert not np.array_equal(restored.estimate([1]), restored.estimate(["1"]))


def test_ids_in_a_tensor_are_ints():
    """Catches: counts of ids that hash by identity, which end in the row of unseen prompts."""
    plain, tensor = SuccessTracker(), SuccessTracker()
    plain.update([4, 5], [8, 0], [8, 8])
    tensor.update(torch.tensor([4, 5]), [8, 0], [8, 8])
    assert plain.state_dict() == tensor.state_dict()
    assert np.array_equal(plain.estimate([4, 5, 9]), tensor.estimate(torch.tensor([4, 5, 9])))


@pytest.mark.parametrize("visit", [(["b", 1.5], [1, 0], [2, 2]), (["b"], [[1]], [[2]]), (["b"], 1, 2)])
def test_a_refused_visit_changes_nothing(visit):
    tracker = SuccessTracker()
    tracker.update(["a"], [1], [2])
    before = tracker.state_dict()
    with pytest.raises((ValueError, TypeError)):
        tracker.update(*visit)
    assert tracker.state_dict() == before


# ---- value ---------------------------------------------------------------------------------------------

EXTREME = [1e-300, 1e-150, 1e-20, 1e-16, 1e-9, 0.003, 0.25, 1 / 3, 0.5, 0.7, 1 - 1e-9, 1 - 1e-16]
COUNTS = [2, 3, 8, 128, 10_007, 10**6]


def test_prob_nonzero_gradient_to_1e_12():
    """Catches: 1 - (1-p)^n rounding to 0 for small p, and the same at the other end."""
    with mpmath.workdps(800):
        for n, p in itertools.product(COUNTS, EXTREME):
            x = mpmath.mpf(p)
            want = 1 - x**n - (1 - x) ** n
            assert abs(float(mpmath.mpf(float(prob_nonzero_gradient(n, p))) / want - 1)) < 1e-12, (n, p)
            if p >= 1e-150:
                want *= x * (1 - x) ** 2
                assert abs(float(mpmath.mpf(float(value(n, p))) / want - 1)) < 1e-12, (n, p)


def test_one_rollout_is_worth_nothing():
    """Catches: 1 - p - q = 1e-17, and the formula's -1 at n = 0."""
    p = np.random.default_rng(0).random(1000)
    assert not prob_nonzero_gradient(1, p).any() and not value(1, p).any()
    assert not expected_value(1, p + 0.1, 1.0).any()
    assert not value(8, [0.0, 1.0]).any() and np.all(value(2, [1e-150, 0.5, 1 - 1e-16]) > 0)
    assert value(0, 0.5) == expected_value(0, 1.0, 1.0) == 0


def test_info_gain_peaks_at_a_third():
    p = np.linspace(0, 1, 3001)
    assert p[info_gain(p).argmax()] == pytest.approx(1 / 3)
    assert info_gain(1 / 3) == pytest.approx(4 / 27)


@pytest.mark.parametrize("a", [1e-3, 0.3, 1.0, 7.5, 1e4, 1e8])
@pytest.mark.parametrize("b", [1e-3, 1.0, 12.0, 1e4, 1e8])
def test_expected_value_to_1e_11(a, b):
    """Catches: differences of log-gammas, which have no digits left at a = b = 1e4."""
    n = np.array([1, 2, 3, 8, 128, 1000, 10_000])
    got = expected_value(n, a, b)
    with mpmath.workdps(120):
        x, y = mpmath.mpf(a), mpmath.mpf(b)

        def e(i, j):
            return mpmath.beta(x + i, y + j) / mpmath.beta(x, y)

        for k, v in zip(n.tolist(), got, strict=True):
            want = e(1, 2) - e(1 + k, 2) - e(1, 2 + k)
            assert (v == 0) if k == 1 else abs(float(mpmath.mpf(float(v)) / want - 1)) < 1e-11, k


@given(st.integers(1, 40), positive, positive)
@many
def test_expected_value_is_the_exact_rational(n, a, b):
    """Catches: a wrong rising factorial, without trusting a special-function library."""
    want = float(exact_value(n, Fraction(a), Fraction(b)))
    assert float(expected_value(n, a, b)) == pytest.approx(want, rel=1e-13, abs=0)


@given(prompts, st.integers(2, 200))
@many
def test_gains_are_differences_of_value(p, n_max):
    """Catches: the solver and the printed value using two different formulas."""
    n = np.arange(1, n_max + 1)
    v = expected_value(n, *(x[:, None] for x in p)) if isinstance(p, tuple) else value(n, p[:, None])
    g = knapsack._gains(p, n_max - 1).T
    np.testing.assert_allclose(g, np.diff(v), rtol=1e-9, atol=1e-16)
    assert np.all(np.diff(g) <= 0)  # concave, also after rounding: greedy relies on it


# ---- theorems ------------------------------------------------------------------------------------------


def test_expected_rollouts_by_simulation():
    """Catches: 1/p + 1/q (counting the first rollout twice)."""
    rng = np.random.default_rng(0)
    for p in (0.03, 0.2, 0.5, 0.9):
        first = rng.random(200_000) < p  # then wait for the other outcome
        n = 1 + rng.geometric(np.where(first, 1 - p, p))
        assert abs(n.mean() - expected_rollouts(p)) < 4 * n.std() / len(n) ** 0.5
    assert np.isinf(expected_rollouts([0.0, 1.0])).all()


@given(st.fractions(Fraction(1, 60), Fraction(59, 60), max_denominator=60), st.sampled_from([1, 5, 9, 99]))
@many
def test_rollouts_for_confidence_is_the_smallest(p, c):
    """Catches: rounding the paper's count, which is necessary but one short where p = 1/2."""
    c = Fraction(c, 10 if c < 10 else 100)
    got, paper = rollouts_for_confidence(float(p), float(c))
    n = 1
    while 1 - p**n - (1 - p) ** n < c:
        n += 1
    # Where P(mixed) = c exactly, both n and n + 1 are right within one rounding of c or p.
    assert got == n or (got == n + 1 and 1 - p**n - (1 - p) ** n == c)
    assert paper <= n + 1e-9 and n <= np.ceil(paper - 1e-9) + 1


def test_rollouts_for_confidence_by_hand():
    # 5 > ln 0.1 / ln 0.5 = 3.3 rounded up: what the paper's count misses.
    assert rollouts_for_confidence(0.5, 0.9)[0] == 5
    assert np.isinf(rollouts_for_confidence([0.0, 1.0], 0.9)[0]).all()
    assert rollouts_for_confidence(1e-300, 0.9)[0] > 1e300


# ---- solvers -------------------------------------------------------------------------------------------


@st.composite
def tables(draw):
    m, k = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    cell = st.one_of(st.integers(-4, 9).map(float), st.just(-np.inf), st.floats(-3, 9))
    values = np.array(draw(st.lists(st.lists(cell, min_size=k, max_size=k), min_size=m, max_size=m)))
    costs = draw(st.lists(st.lists(st.integers(0, 6), min_size=k, max_size=k), min_size=m, max_size=m))
    return values, np.array(costs), draw(st.integers(0, 25))


@given(tables())
@settings(many, max_examples=500)
def test_solve_dp_is_brute_force(case):
    """Catches: a DP that assumes concavity, drops 'take nothing', or backtracks one cell off."""
    values, costs, capacity = case
    for c, spend_all in itertools.product((None, costs), (False, True)):
        price = np.tile(np.arange(values.shape[1]), (len(values), 1)) if c is None else c
        total, spent = totals(values, price, range(values.shape[1]))
        fits = spent == capacity if spend_all else spent <= capacity
        best = total[fits].max(initial=-np.inf)
        if best == -np.inf:
            with pytest.raises(ValueError, match="capacity"):
                solve_dp(values, capacity, c, spend_all)
            continue
        ks, rows = solve_dp(values, capacity, c, spend_all), np.arange(len(values))
        cost = price[rows, ks].sum()
        assert cost == capacity if spend_all else cost <= capacity
        assert values[rows, ks].sum() == pytest.approx(best, rel=1e-12, abs=1e-12)
        if c is None and not spend_all:
            assert np.array_equal(solve_dp_torch(torch.tensor(values), capacity).numpy(), ks)


def test_solve_dp_sizes():
    """Catches: a byte that cannot name option 256, and an empty table."""
    values = np.zeros((2, 400))
    values[:, 399] = 1
    assert solve_dp(values, 398 + 399).tolist() in ([399, 0], [0, 399])
    assert solve_dp(values, 2 * 399).tolist() == [399, 399]
    assert solve_dp_torch(torch.tensor(values), 2 * 399).tolist() == [399, 399]
    assert solve_dp(np.zeros((0, 3)), 5).shape == solve_dp_torch(torch.zeros(0, 3), 5).shape == (0,)


@given(prompts, st.integers(1, 3), st.integers(0, 5), st.floats(0, 1))
@settings(many, max_examples=300)
def test_greedy_is_the_dp(p, n_min, extra, share):
    """Catches: greedy on gains that are not concave, and ties that leave budget unspent."""
    values = table(p, n_min + extra)[:, n_min:]
    capacity = round(share * extra * size(p))
    picks, rows = solve_greedy(values, capacity), np.arange(size(p))
    assert picks.sum() == capacity and picks.max(initial=0) <= extra
    best = values[rows, solve_dp(values, capacity)].sum()
    assert values[rows, picks].sum() == pytest.approx(best, rel=1e-9, abs=1e-13)


# ---- allocate ------------------------------------------------------------------------------------------


def best_of_all(values, n_min, budget):
    """The highest total of all counts >= n_min with that sum, and all options of a row tried."""
    options = range(n_min, values.shape[1])
    total, spent = totals(values, np.tile(np.arange(values.shape[1]), (len(values), 1)), options)
    return total[spent == budget].max()


@given(prompts, st.integers(1, 3), st.integers(0, 4), st.floats(0, 1), st.booleans(), st.data())
@settings(many, max_examples=500)
def test_allocate_is_brute_force(p, n_min, extra, share, own, data):
    """Catches: any rule that is not optimal, for known p or a posterior, with the paper's value or with a
    closure over arrays of one number a prompt (given row by row to the wrong prompts)."""
    m, n_max, how = size(p), n_min + extra, ()
    if own:
        floats = st.lists(st.floats(0, 3), min_size=2 * m, max_size=2 * m)
        how = np.array(data.draw(floats)).reshape(2, m)
        weights, bonus = how[..., None]  # each (M, 1)

    def my_value(n, p):
        assert n.shape == (extra + 1,) and p.shape == (m, 1)
        return weights * prob_nonzero_gradient(n, p) * (info_gain(p) + bonus)

    budget = m * n_min + round(share * m * extra)
    counts = allocate(p, budget, n_min, n_max, value=my_value if own else None)
    assert counts.dtype == np.int64 and counts.shape == (m,) and counts.sum() == budget
    assert counts.min() >= n_min and counts.max() <= n_max
    values = table(p, n_max, *how)
    got = values[np.arange(m), counts].sum()
    assert got == pytest.approx(best_of_all(values, n_min, budget), rel=1e-9, abs=1e-12)


@given(prompts, st.integers(1, 3), st.integers(0, 4), st.floats(0, 1), st.data())
@many
def test_any_curve_goes_to_the_dp(p, n_min, extra, share, data):
    """Catches: a curve that is not concave solved greedily, budget left over where a rollout more is worth
    nothing or less, and a size that a penalty forbids, whose digits hide all others."""
    m, budget = size(p), size(p) * n_min + round(share * size(p) * extra)
    width = n_min + extra + 1
    cell = st.one_of(*[st.integers(-4, 9).map(float)] * 3, st.sampled_from([-1e12, -np.inf]))
    cells = st.lists(cell, min_size=m * width, max_size=m * width)
    values = np.array(data.draw(cells)).reshape(m, width)
    if best_of_all(values, n_min, budget) == -np.inf:
        with pytest.raises(ValueError, match="no choice fits"):
            allocate(p, budget, n_min, n_min + extra, value=lambda n, p: values[:, n])
        return
    counts = allocate(p, budget, n_min, n_min + extra, value=lambda n, p: values[:, n])
    assert counts.sum() == budget and counts.min() >= n_min and counts.max() <= n_min + extra
    assert values[np.arange(m), counts].sum() == pytest.approx(best_of_all(values, n_min, budget), abs=1e-9)


@pytest.mark.parametrize("a, b", [(1e-3, 5), (0.06, 8.2), (0.5, 0.5), (1, 1), (3, 12), (1e4, 1e4), (1e6, 30)])
def test_quadrature_is_the_integral(a, b):
    """Catches: wrong nodes or weights of the Beta average, which the closed form of the paper's value and
    mpmath's integral of another one both know."""
    n, posterior = np.arange(2, 129), (np.array([a]), np.array([b]))
    mine = knapsack._table(value, posterior, n)[0]
    np.testing.assert_allclose(mine, expected_value(n, a, b), rtol=0, atol=2e-15)
    got = knapsack._table(lambda n, p: np.sin(3 * p) / n, posterior, n)[0, 0]
    want, term = mpmath.mpf(0), mpmath.mpf(1)  # sin(3p) = 3p - (3p)^3 / 3! + ..., and E[p^k] is known
    for k in range(1, 60):
        term *= 3 * (mpmath.mpf(a) + k - 1) / (mpmath.mpf(a) + b + k - 1) / k
        want += (0, 1, 0, -1)[k % 4] * term
    assert abs(got - float(want) / 2) < 1e-13


def test_the_papers_value_given_by_hand():
    """Catches: the two ways of allocate that differ, or prompts mixed up between them."""
    rng = np.random.default_rng(0)
    for m in (1, 7, 60):
        for p in (rng.uniform(0.01, 0.99, m), (rng.gamma(1, 1, m) + 0.01, rng.gamma(1, 1, m) + 0.01)):
            assert np.array_equal(allocate(p, 8 * m), allocate(p, 8 * m, value=value))


@given(prompts, st.integers(1, 3), st.integers(1, 12), st.floats(0, 1))
@many
def test_more_budget_takes_nothing_away(p, n_min, extra, share):
    """Catches: ties broken differently at different budgets."""
    m = size(p)
    budgets = [n_min * m + int(share * (extra * m - 1)) + k for k in (0, 1)]
    less, more = (allocate(p, b, n_min, n_min + extra) for b in budgets)
    assert np.all(less <= more)
    assert np.array_equal(less, allocate(p, budgets[0], n_min, n_min + extra))  # deterministic


@given(st.integers(0, 10**6), st.integers(1, 30), st.booleans())
@many
def test_permuting_prompts_permutes_counts(seed, m, posterior):
    """Catches: an order-dependent solver. (Continuous p, so that there are no ties.)"""
    rng = np.random.default_rng(seed)
    p = (rng.gamma(1, 1, m) + 0.01, rng.gamma(1, 1, m) + 0.01) if posterior else rng.uniform(0.01, 0.99, m)
    perm = rng.permutation(m)
    q = tuple(x[perm] for x in p) if posterior else p[perm]
    assert np.array_equal(allocate(p, 6 * m)[perm], allocate(q, 6 * m))


def test_ties_level_by_level_then_by_index():
    """Catches: giving a leftover to one prompt, or to the last ones."""
    assert allocate([0.5] * 4, 10).tolist() == [3, 3, 2, 2]
    assert allocate([0.0, 1.0, 0.0], 11).tolist() == [4, 4, 3]
    assert allocate([0.0, 0.5, 1.0], 14, n_max=6).tolist() == [4, 6, 4]
    assert allocate([0.0, 0.5, 0.0], 15, n_max=6).tolist() == [5, 6, 4]


def test_a_forbidden_count_where_p_is_certain():
    """Catches: 0 x -inf, where a posterior leaves nothing open."""
    posterior = np.array([0.0, 1.0]), np.array([1.0, 1.0])
    counts = allocate(posterior, 9, n_max=6, value=lambda n, p: np.where(n == 3, -np.inf, value(n, p)))
    assert counts.sum() == 9 and 3 not in counts


def test_limits_of_the_budget():
    """Catches: off-by-one at both ends, and an empty batch."""
    p = [0.1, 0.5, 0.9]
    assert allocate(p, 6).tolist() == [2, 2, 2]
    assert allocate(p, 3 * 128).tolist() == [128] * 3
    assert allocate(p, 9, n_min=3, n_max=3).tolist() == [3, 3, 3]
    for empty in ([], (np.zeros(0), np.zeros(0))):
        assert allocate(empty, 0).shape == allocate(empty, 0, value=value).shape == (0,)
        assert allocate_at_price(empty, 0.1).shape == (0,)
    assert allocate_paper([], 0).shape == uniform(0, 0).shape == (0,)


def test_unseen_prompts_need_no_special_case():
    """Catches: a first epoch that is not uniform, an estimate of 0 or 1 that gets nothing ever again."""
    tracker = SuccessTracker()
    ids = list("abcdefgh")
    assert allocate(tracker.posterior(ids), 64).tolist() == [8] * 8
    tracker.update(ids, [0, 0, 8, 8, 1, 4, 7, 2], [8] * 8)
    hard, easy = allocate(tracker.posterior(ids), 400)[[0, 2]]
    assert hard > easy > 2  # a failure that may be luck is worth more than a success that may be


def big_batches(rng, m):
    p = rng.beta(0.5, 0.5, m)
    s = rng.binomial(8, p)
    yield "sorted p", np.sort(p), 8 * m
    yield "posterior", (s + 0.1, 8.1 - s), 8 * m
    yield "all silent", rng.integers(0, 2, m).astype(float), 3 * m + 17
    yield "one in 64 worth anything", np.where(np.arange(m) % 64 == 0, 0.4, 1e-9), 8 * m
    yield "tiny p", np.full(m, 1e-12), 2 * m + 5
    yield "little to spend", p, 2 * m + 9
    yield "few are worth much", np.where(np.arange(m) < m // 50, 0.01, 0.0), 3 * m
    yield "all but all of it", p, 12 * m - 9


@pytest.mark.parametrize("budget, n_min", [(100, 2), (203, 3), (512, 2), (5000, 4)])
def test_saving_gives_n_min_where_silence_is_likely(budget, n_min):
    """Against 1 - E[p^n] - E[q^n], factor by factor. Catches: a group one too large, a prompt that gets more
    than uniform, another threshold."""
    rng = np.random.default_rng(budget)
    alpha, beta = rng.gamma(1, 2, 64) + 0.05, rng.gamma(1, 2, 64) + 0.05
    even, counts = uniform(64, budget), allocate_saving((alpha, beta), budget, n_min)
    all_right, all_wrong = (
        np.array([np.prod((x + np.arange(n)) / (a + b + np.arange(n))) for x, a, b, n in rows])
        for rows in (zip(x, alpha, beta, even, strict=True) for x in (alpha, beta))
    )
    assert np.array_equal(counts, np.where(all_right + all_wrong > 0.7, np.minimum(n_min, even), even))
    assert (counts.sum() < budget) == (even.max() > n_min) and allocate_saving(([], []), 0).shape == (0,)
    assert np.array_equal(allocate_saving((alpha, beta), budget, mixed=0), even)


def test_thousands_of_prompts():
    """Catches: a table of gains that stops before the last one worth buying, and wrong ties."""
    m, grown = 3_000, []
    for name, p, budget in big_batches(np.random.default_rng(0), m):
        got = allocate(p, budget)
        g = knapsack._gains(p, 127)[1:]  # (126, M)
        grown.append(got.max() > 10 + 3 * (budget - 2 * m) // m)  # the first table was too small
        order = np.argsort(-g.ravel(), kind="stable")[: budget - 2 * m]
        assert np.array_equal(got, 2 + np.bincount(order % m, minlength=m)), name
    assert any(grown)


@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(4, 9), st.booleans())
@many
def test_shadow_price_and_back(seed, m, per_prompt, posterior):
    """Catches: a price taken from a rollout that n_min forced, or that n_max forbids."""
    rng = np.random.default_rng(seed)
    p = (rng.gamma(1, 1, m) + 0.01, rng.gamma(1, 1, m) + 0.01) if posterior else rng.uniform(0.01, 0.99, m)
    counts = allocate(p, per_prompt * m, n_max=10)
    price = shadow_price(p, counts, n_max=10)
    assert np.array_equal(allocate_at_price(p, price, n_max=10), counts)
    assert np.all(allocate_at_price(p, price * 1.5, n_max=10) <= counts)
    one_more = allocate(p, min(per_prompt * m + 1, 10 * m), n_max=10)
    assert shadow_price(p, one_more, n_max=10) <= price


def test_prices_at_the_ends():
    """Catches: an infinite price where nothing was bought, rollouts for nothing at price > 0."""
    assert shadow_price([0.3, 0.3], [1, 1]) == pytest.approx(float(value(2, 0.3)))  # nothing bought yet
    assert shadow_price([0.3], [3]) == pytest.approx(float(value(3, 0.3) - value(2, 0.3)))
    assert shadow_price([0.3], [128]) == pytest.approx(float(value(128, 0.3) - value(127, 0.3)))
    assert shadow_price([], []) == 0 and shadow_price([0.0, 1.0], [8, 8]) == 0
    assert allocate_at_price([0.0, 0.3, 1.0], 1e-6).tolist()[::2] == [2, 2]
    assert allocate_at_price([0.0, 0.3], 0).tolist() == [128, 128]
    assert allocate_at_price([0.3], 1.0, n_min=5).tolist() == [5]


def test_uniform():
    """Catches: losing the remainder."""
    assert uniform(3, 11).tolist() == [4, 4, 3] and uniform(2, 0).tolist() == [0, 0]


# ---- the paper's rule ----------------------------------------------------------------------------------


@given(
    st.lists(st.one_of(st.sampled_from([0.0, 1.0, 1 / 16]), st.floats(0, 1)), min_size=1, max_size=12),
    st.integers(1, 3), st.integers(0, 20), st.floats(0, 1),
)  # fmt: skip
@settings(many, max_examples=250)
def test_paper_rule_keeps_every_limit(p, n_min, extra, share):
    """Catches: the published code's fallback above n_max, and its failed assertion when every prompt is
    informative and needs less than there is."""
    m = len(p)
    budget = n_min * m + round(share * extra * m)
    counts = allocate_paper(p, budget, n_min, n_min + extra)
    assert counts.sum() == budget and counts.min() >= n_min and counts.max() <= n_min + extra


def test_paper_rule():
    """Catches: hard prompts served before the knapsack has what it needs, easy ones before hard ones."""
    p = np.array([0.0, 1.0, 0.5, 0.9])
    # ln 0.1 / ln 0.5 = 3.3, ln 0.1 / ln 0.9 = 21.8: the knapsack needs 3 + 21 beyond n_min.
    counts = allocate_paper(p, 8 + 24 + 10)
    assert counts[:2].tolist() == [12, 2] and counts[2:].sum() == 4 + 24
    assert np.array_equal(counts[2:], allocate(p[2:], 4 + 24))
    assert allocate_paper(p, 8 + 24)[:2].tolist() == [2, 2]
    # n_max stops the hard one: back to the knapsack (also at n_max here), and then to the easy one.
    assert allocate_paper(p, 8 + 24 + 10, n_max=12).tolist() == [12, 6, 12, 12]
    assert allocate_paper([0.5, 0.5], 40).tolist() == [20, 20]
    assert allocate_paper([0.0, 1.0, 1.0], 24).tolist() == [20, 2, 2]
    assert allocate_paper([1.0, 1.0], 9).tolist() == [5, 4]
    assert allocate_paper([0.5, np.nan, 0.0], 25).tolist() == [9, 8, 8]  # first epoch: uniform


# ---- bad input -----------------------------------------------------------------------------------------

BAD = [
    (lambda: allocate([0.5, np.nan], 8), "pass probabilities from 0 to 1"),
    (lambda: allocate([0.5, 1.5], 8), "pass probabilities"),
    (lambda: allocate([0.5, -0.1], 8, value=value), "pass probabilities"),
    (lambda: allocate(([-1.0], [1.0]), 8), "pass finite alpha, beta >= 0, not both 0"),
    (lambda: allocate(([0.0], [0.0]), 8), "pass finite alpha"),
    (lambda: allocate(([np.inf], [1.0]), 8), "pass finite alpha"),
    (lambda: allocate([0.5, 0.5], 3), "budget 3 < 2 prompts x n_min = 2: raise budget, or lower n_min"),
    (lambda: allocate([0.5, 0.5], 300), "budget 300 > 2 prompts x n_max = 128: lower budget, or raise n_max"),
    (lambda: allocate([0.5], np.nan), "budget nan < 1 prompts"),
    (lambda: allocate([0.5], 8, n_min=0), "choose n_min = 0 from 1 to n_max = 128"),
    (lambda: allocate([0.5], 8, n_min=9, n_max=8), "choose n_min = 9 from 1 to n_max = 8"),
    (lambda: allocate([], 8), "budget 8 > 0 prompts"),
    (lambda: allocate([0.5], 8, value=lambda n, p: n * np.nan), "value: return finite numbers"),
    (lambda: allocate([0.5], 9, value=lambda n, p: np.where(n % 2, -np.inf, 1)), "no choice fits"),
    (lambda: allocate([0.5], 8, value=lambda n, p: n * np.inf), "value: return finite numbers, or -inf"),
    (lambda: solve_greedy([[0.0, 3.0, 4.0]], -1), "capacity = -1: pass a whole number"),
    (lambda: solve_dp([[0.0, 3.0]], -1), "capacity = -1: pass a whole number"),
    (lambda: solve_dp_torch(torch.tensor([[0.0, 3.0]]), -1), "capacity = -1: pass a whole number"),
    (lambda: solve_greedy([[0, -np.inf, 5.0]], 2), "use solve_dp"),
    (lambda: solve_dp_torch(torch.tensor([[0.0, np.nan]]), 3), "values: pass finite ones"),
    (lambda: solve_dp_torch(torch.tensor([[-np.inf, 1.0], [-np.inf, 1.0]]), 1), "no choice fits"),
    (lambda: allocate_paper([0.5, 2.0], 8), "pass probabilities"),
    (lambda: allocate_paper([0.5], 8, n_min=0), "n_min = 0"),
    (lambda: allocate_at_price([0.5], np.nan), "need price >= 0"),
    (lambda: allocate_at_price([0.5], 0.1, n_min=9, n_max=8), "n_min <= n_max"),
    (lambda: shadow_price([0.5], [0]), "counts: pass numbers >= 1"),
    (lambda: uniform(0, 5), "0 prompts, budget = 5"),
    (lambda: uniform(2, -1), "budget = -1"),
    (lambda: solve_dp([[0.0, np.nan]], 3), "values: pass finite ones"),
    (lambda: solve_dp([[0.0, 1.0]], 3, [[0, -1]]), "costs: pass whole numbers"),
    (lambda: solve_dp([[0.0, 1.0]], 3, [[0, 0.5]]), "costs: pass whole numbers"),
    (lambda: solve_dp([[-np.inf, 1.0]], 0), "capacity = 0: no choice fits"),
    (lambda: solve_greedy([[0.0, 1.0, 5.0]], 1), "values are not concave: use solve_dp"),
    (lambda: SuccessTracker(discount=1.5), "choose discount"),
    (lambda: SuccessTracker(prior_strength=0), "prior_strength > 0"),
    (lambda: SuccessTracker(drift=-0.1), "drift from 0 to 1"),
    (lambda: SuccessTracker().update(["a"], [2], [1]), "pass whole successes <= trials"),
    (lambda: SuccessTracker().update(["a"], [0.5], [1]), "pass whole"),
    (lambda: SuccessTracker().update(["a"], [0], [np.nan]), "pass whole"),
    (lambda: SuccessTracker().update(["a", "b"], [0], [1]), "one an id"),
]


@pytest.mark.parametrize("call, message", BAD, ids=[m[:40] for _, m in BAD])
def test_bad_input_is_one_line_that_says_what_to_do(call, message):
    """Catches: a traceback from inside NumPy, or a quiet wrong answer."""
    with pytest.raises(ValueError, match=message) as e:
        call()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda: allocate([0.5], 8.5),
        lambda: uniform(2, 8.5),
        lambda: solve_dp([[0.0, 1.0]], 1.5),
        lambda: SuccessTracker().update([1.5], [0], [1]),
    ],
)
def test_fractions_are_not_rounded(call):
    """Catches: a budget of 8.5 that spends 8, or an id 1.5 that is 1 after a restart."""
    with pytest.raises(TypeError):
        call()


def test_arguments_are_left_alone():
    """Catches: an in-place step that changes the caller's posterior or table."""
    a, b = np.array([0.5, 2.0]), np.array([1.0, 3.0])
    p, w = np.array([0.2, 0.9]), np.array([2, 1])
    values, costs = table(p, 5)[:, 1:], np.array([[0, 1, 2, 9, 4]] * 2)
    given = (a, b, p, w, values, costs)
    before = [x.copy() for x in given]
    for x in ((a, b), p):
        allocate(x, 20), allocate(x, 20, value=value), shadow_price(x, w), allocate_at_price(x, 0.01)
    allocate_saving((a, b), 20), allocate_paper(p, 20)
    solve_dp(values, 3, costs), solve_greedy(values, 3), solve_dp_torch(torch.from_numpy(values), 3)
    assert all(np.array_equal(x, y) for x, y in zip(given, before, strict=True))
