"""Which prompt deserves how many rollouts? Estimate each prompt's success probability, put a value
on each further rollout, and spend a fixed budget where the values are highest.

    >>> tracker = SuccessTracker()
    >>> tracker.update(["easy", "hard", "half"], successes=[8, 0, 3], trials=[8, 8, 8])
    >>> allocate(tracker.posterior(["easy", "hard", "half", "new"]), budget=32)
    array([ 2,  5, 16,  9])

"Knapsack RL" (Li et al., arXiv 2509.25849) calls a prompt an item, its rollouts the item's cost, and
P(mixed group) x InfoGain the item's value. Letters: M prompts, p success probability, q = 1 - p,
n rollouts of one prompt, B budget, K options of one prompt.
"""

from __future__ import annotations

import numpy as np

# ----------------------------------------------------------------------------------------------
# 1. Estimation: what do earlier rollouts say about p?
# ----------------------------------------------------------------------------------------------

VISITS_KEPT = 16  # enough for the paper's window of 16 outcomes: a visit has at least one


class SuccessTracker:
    """Counts successes per prompt and turns them into a Beta posterior over p.

    The paper estimates p by a mean of recent outcomes, and needs rules for 0, 1 and "never seen".
    A posterior needs none:  p_i ~ Beta(alpha0 + S_i, beta0 + F_i)  with
      S_i, F_i       successes and failures, multiplied by `discount` at each new visit, because the
                     model that produced the old ones has moved. 1 forgets nothing, 0 keeps one visit.
      alpha0, beta0  empirical Bayes: the Beta fitted (by moments) to the prompts seen so far, times
                     `prior_strength`. Small: a prompt's own record decides. Large: the crowd does.

    After 4 failures of 4, then 4 successes of 4 (nothing else seen):

    >>> for discount, strength in [(1, 0.25), (0.75, 0.25), (0, 0.25), (0.75, 4.0)]:
    ...     tracker = SuccessTracker(discount, strength)
    ...     for successes in (0, 4):
    ...         tracker.update(["a"], [successes], [4])
    ...     print(discount, strength, tracker.estimate(["a"]).round(3))
    1 0.25 [0.5]
    0.75 0.25 [0.568]
    0 0.25 [0.963]
    0.75 4.0 [0.546]
    """

    def __init__(self, discount: float = 0.75, prior_strength: float = 0.25):
        if not 0 <= discount <= 1:
            raise ValueError(f"discount = {discount}: choose it in [0, 1]")
        if not 0 < prior_strength < np.inf:
            raise ValueError(f"prior_strength = {prior_strength}: choose it positive and finite")
        self.discount, self.prior_strength = discount, prior_strength
        self._row: dict[str | int, int] = {}  # id -> row of the arrays below
        self._counts = np.zeros((0, 2))  # (rows, 2) discounted successes, trials
        self._visits = np.zeros((0, VISITS_KEPT, 2), np.int64)  # newest first, as observed

    def _rows(self, ids) -> np.ndarray:
        """(M,) row of each id, -1 where unseen."""
        return np.fromiter((self._row.get(i, -1) for i in ids), np.int64, len(ids))

    def update(self, ids, successes, trials) -> None:
        """One visit: `successes[i]` of `trials[i]` rollouts of prompt `ids[i]` were right."""
        s, t = np.asarray(successes, float), np.asarray(trials, float)  # (M,)
        if s.shape != (len(ids),) or t.shape != (len(ids),):
            raise ValueError(
                f"shapes {s.shape}, {t.shape} for {len(ids)} ids: pass one count an id"
            )
        if not (np.all(s == np.floor(s)) and np.all(t == np.floor(t)) and np.all(s >= 0)):
            raise ValueError(
                "successes and trials must be whole numbers >= 0: pass counts, not rates"
            )
        if not np.all(s <= t):
            raise ValueError("successes > trials: pass the successes first, then the trials")
        for i in ids:
            if not isinstance(i, (str, int, np.integer)):
                raise ValueError(f"id {i!r} is a {type(i).__name__}: use str or int")
            self._row.setdefault(i.item() if isinstance(i, np.integer) else i, len(self._row))
        room = 2 * len(self._row)
        if len(self._counts) < len(self._row):  # grow by doubling
            self._counts = _grown(self._counts, room)
            self._visits = _grown(self._visits, room)
        # An id that occurs twice in a batch was still visited once: add its counts first.
        rows, where = np.unique(self._rows(ids), return_inverse=True)
        visit = np.stack([np.bincount(where, s), np.bincount(where, t)], axis=1)  # (rows, 2)
        rows, visit = rows[visit[:, 1] > 0], visit[visit[:, 1] > 0]
        self._counts[rows] = self.discount * self._counts[rows] + visit
        self._visits[rows, 1:] = self._visits[rows, :-1]
        self._visits[rows, 0] = visit

    def prior(self) -> tuple[float, float]:
        """(alpha0, beta0): moments of the success rates of all prompts seen so far."""
        s, t = self._counts[: len(self._row)].T
        s, t = s[t > 0], t[t > 0]
        rate = s / t
        mean = (rate.sum() + 1) / (len(rate) + 2)  # never exactly 0 or 1
        # Var(rate) = mean (1 - mean) (h + (1 - h) rho), h = E[1 / trials], rho = 1 / (1 + alpha + beta)
        rho = 1 / 3  # nothing known: the uniform distribution, Beta(1, 1)
        if len(rate) > 1:
            h = min(np.mean(1 / t), 0.9)
            rho = (np.mean((rate - mean) ** 2) / (mean * (1 - mean)) - h) / (1 - h)
        strength = self.prior_strength * (1 / np.clip(rho, 0.01, 0.9) - 1)
        return float(strength * mean), float(strength * (1 - mean))

    def posterior(self, ids) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, beta), each (M,): p of prompt ids[i] is Beta(alpha[i], beta[i])."""
        rows, (alpha0, beta0) = self._rows(ids), self.prior()
        s, t = np.where(rows[:, None] < 0, 0.0, np.vstack([self._counts, [[0, 0]]])[rows]).T
        return alpha0 + s, beta0 + (t - s)

    def estimate(self, ids) -> np.ndarray:
        """(M,) posterior mean of p."""
        alpha, beta = self.posterior(ids)
        return alpha / (alpha + beta)

    def windowed_rate(self, ids, window: int = 16) -> np.ndarray:
        """(M,) the paper's estimate: mean of the newest `window` outcomes, of the last visit alone
        when that had as many; NaN if unseen. Where the window cuts a visit in two, its outcomes
        count in proportion (their order says nothing: they are exchangeable)."""
        if not 1 <= window <= VISITS_KEPT:
            raise ValueError(f"window = {window}: choose it in 1..{VISITS_KEPT}")
        rows = self._rows(ids)
        visits = np.vstack([self._visits, np.zeros((1, VISITS_KEPT, 2), np.int64)])[rows]
        visits = np.where(rows[:, None, None] < 0, 0, visits)
        s, t = visits[..., 0], visits[..., 1]  # (M, VISITS_KEPT)
        newer = np.cumsum(t, axis=1) - t
        take = np.clip(window - newer, 0, t)
        take[:, 0] = t[:, 0]
        total = take.sum(axis=1)
        hits = (s * take / np.maximum(t, 1)).sum(axis=1)
        return np.where(total > 0, hits / np.maximum(total, 1), np.nan)

    def state_dict(self) -> dict:
        """Everything, as JSON types. Ids are list entries, not keys: JSON would turn 7 into "7"."""
        m = len(self._row)
        return {
            "discount": self.discount,
            "prior_strength": self.prior_strength,
            "ids": list(self._row),
            "counts": self._counts[:m].tolist(),
            "visits": self._visits[:m].tolist(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.discount, self.prior_strength = state["discount"], state["prior_strength"]
        self._row = {i: row for row, i in enumerate(state["ids"])}
        self._counts = np.array(state["counts"], float).reshape(-1, 2)
        self._visits = np.array(state["visits"], np.int64).reshape(-1, VISITS_KEPT, 2)


def _grown(a: np.ndarray, rows: int) -> np.ndarray:
    out = np.zeros((rows, *a.shape[1:]), a.dtype)
    out[: len(a)] = a
    return out


# ----------------------------------------------------------------------------------------------
# 2. Value: what is a group of n rollouts worth?
# ----------------------------------------------------------------------------------------------


def prob_nonzero_gradient(n, p) -> np.ndarray:
    """P(mixed group) = 1 - p^n - (1-p)^n (Sec. 3): right and wrong answers both occur.

    n and p broadcast. Accurate to a few ulps: with m = min(p, q), 1 - (1-m)^n goes through
    expm1/log1p, and m^n is then at most a third of it.
    """
    n, p = np.asarray(n, float), np.asarray(p, float)
    _check(np.all(n >= 1), "n", n, "a group has at least 1 rollout")
    _check(np.all((p >= 0) & (p <= 1)), "p", p, "probabilities lie in [0, 1]")
    m = np.minimum(p, 1 - p)
    return np.where(n == 1, 0.0, -np.expm1(n * np.log1p(-m)) - m**n)


def info_gain(p) -> np.ndarray:
    """InfoGain = p (1-p)^2 (Sec. 4): about the rise of p in one gradient step. Peak at p = 1/3."""
    p = np.asarray(p, float)
    return p * (1 - p) ** 2


def value(n, p) -> np.ndarray:
    """Value of n rollouts at a known p (Sec. 4): P(mixed group) x InfoGain."""
    return prob_nonzero_gradient(n, p) * info_gain(p)


class _Gains:
    """What one more rollout adds, level by level: value(n+1, p) - value(n, p) = p q^2 (p^n q + q^n p).

    With T1 = E[p^(n+1) q^3] and T2 = E[p^2 q^(n+2)] the gain is T1 + T2, both for a known p and
    averaged over p ~ Beta(a, b), and a level up costs one ratio each:
        known p      T1 *= p                          T2 *= q
        Beta(a, b)   T1 *= (a+n+1) / (a+b+n+4)        T2 *= (b+n+2) / (a+b+n+4)
    All terms are positive: nothing cancels (differences of log-gammas lose every digit by a = 1e4),
    and all ratios are below 1: gains fall with n, values are concave.
    """

    def __init__(self, p, weights=None):
        if isinstance(p, tuple):
            a, b = (np.asarray(x, float) for x in p)
            s = a + b
            # E[p^2 q^3], rising factorials: a(a+1) b(b+1)(b+2) / s(s+1)(s+2)(s+3)(s+4)
            t = (
                a
                / s
                * ((a + 1) / (s + 1))
                * (b / (s + 2))
                * ((b + 1) / (s + 3))
                * ((b + 2) / (s + 4))
            )
            self.up1, self.up2, self.down, self.step = a + 1, b + 2, s + 4, 1
        else:
            t = p**2 * (1 - p) ** 3
            self.up1, self.up2, self.down, self.step = p, 1 - p, np.ones_like(p), 0
        self.t1 = t if weights is None else t * weights
        self.t2 = self.t1.copy()
        self.n = 1  # the gains now held are those of rollout n + 1

    def __call__(self) -> np.ndarray:
        return self.t1 + self.t2

    def advance(self) -> None:
        d = self.n * self.step
        self.t1 *= (self.up1 + d) / (self.down + d)
        self.t2 *= (self.up2 + d) / (self.down + d)
        self.n += 1

    def keep(self, mask) -> None:
        """Forget the prompts outside mask."""
        self.t1, self.t2 = self.t1[mask], self.t2[mask]
        self.up1, self.up2, self.down = self.up1[mask], self.up2[mask], self.down[mask]


def expected_value(n, alpha, beta) -> np.ndarray:
    """E[value(n, p)] for p ~ Beta(alpha, beta): the sum of the first n - 1 expected gains."""
    n, alpha, beta = np.broadcast_arrays(*(np.asarray(x, float) for x in (n, alpha, beta)))
    _check(np.all(n >= 1), "n", n, "a group has at least 1 rollout")
    _check_p((alpha, beta))
    gains, total = _Gains((alpha, beta)), np.zeros(n.shape)
    for k in range(1, int(n.max(initial=1))):
        total += np.where(k < n, gains(), 0.0)
        gains.advance()
    return total


def expected_rollouts(p) -> np.ndarray:
    """Expected rollouts until a group is mixed (Thm. 1): 1/p + 1/(1-p) - 1."""
    p = np.asarray(p, float)
    with np.errstate(divide="ignore"):
        return 1 / p + 1 / (1 - p) - 1


def rollouts_for_confidence_approx(p, confidence) -> np.ndarray:
    """The paper's N (Thm. 2), ln(1-c) / ln(max(p, q)): necessary, but not always sufficient."""
    p = np.asarray(p, float)
    with np.errstate(divide="ignore"):
        return np.log1p(-np.asarray(confidence, float)) / np.log1p(-np.minimum(p, 1 - p))


def rollouts_for_confidence(p, confidence) -> np.ndarray:
    """Smallest n with P(mixed group) >= confidence, exactly: the paper's N rounded up, or one more,
    because p^n + q^n <= max(p, q)^(n-1)."""
    n = np.maximum(np.ceil(rollouts_for_confidence_approx(p, confidence) - 1e-9), 2)
    p = np.asarray(p, float)
    short = p**n + (1 - p) ** n > 1 - np.asarray(confidence, float)
    return n + short


# ----------------------------------------------------------------------------------------------
# 3. The knapsack, exactly: dynamic programming
# ----------------------------------------------------------------------------------------------


def solve_dp(values, capacity: int, costs=None) -> np.ndarray:
    """Multiple-choice knapsack: one option k for each item, total cost <= capacity, highest value.

    values (M, K): values[i, k] of option k; any shape of curve, -inf forbids an option.
    costs  (M, K) whole numbers; None: option k costs k.
    Returns (M,) the option of each item; of equal ones the smallest.

    best[c] is the value of the items so far at cost <= c; one row is kept. For the way back, choice
    (M, capacity + 1) holds one byte a cell while K <= 256, two beyond.
    """
    values = np.asarray(values, float)
    m, k = values.shape
    costs = np.broadcast_to(np.arange(k), (m, k)) if costs is None else np.asarray(costs)
    best = np.zeros(capacity + 1)
    choice = np.empty((m, capacity + 1), np.uint8 if k <= 256 else np.uint16)
    for i in range(m):
        reach = int(costs[i].max(initial=0))
        padded = np.concatenate([np.full(reach, -np.inf), best])
        windows = np.lib.stride_tricks.sliding_window_view(padded, capacity + 1)
        total = windows[reach - costs[i]] + values[i][:, None]  # (K, C+1): best[c - cost_k] + v_k
        choice[i] = total.argmax(axis=0)
        best = total.max(axis=0)
    if not np.isfinite(best[-1]):
        raise ValueError(f"capacity {capacity} holds no choice of options: raise it")
    picks, c = np.zeros(m, np.int64), capacity
    for i in reversed(range(m)):
        picks[i] = choice[i, c]
        c -= int(costs[i, picks[i]])
    return picks


def solve_dp_torch(values, capacity: int):
    """solve_dp for unit costs on a torch tensor, on its device; returns an int64 tensor there."""
    import torch

    m, k = values.shape
    wall = values.new_full((k - 1,), -torch.inf)
    best = values.new_zeros(capacity + 1)
    choice = torch.empty((m, capacity + 1), dtype=torch.int16, device=values.device)
    for i in range(m):
        windows = torch.cat([wall, best]).unfold(0, capacity + 1, 1).flip(0)  # (K, C+1)
        best, pick = (windows + values[i][:, None]).max(dim=0)
        choice[i] = pick
    choice = choice.cpu()
    picks, c = torch.zeros(m, dtype=torch.int64), capacity
    for i in reversed(range(m)):
        picks[i] = choice[i, c]
        c -= int(picks[i])
    return picks.to(values.device)


# ----------------------------------------------------------------------------------------------
# 4. The fast path: marginal gains
# ----------------------------------------------------------------------------------------------


def _best(gains: np.ndarray, items: np.ndarray, capacity: int):
    """The `capacity` largest gains (of equal ones the first), their items, and the smallest taken."""
    if len(gains) <= capacity:
        return gains, items, -np.inf
    price = np.partition(gains, len(gains) - capacity)[len(gains) - capacity]
    take = gains > price
    take[np.flatnonzero(gains == price)[: capacity - np.count_nonzero(take)]] = True
    return gains[take], items[take], price


def _buy(gains: _Gains, m: int, levels: int, capacity: int) -> np.ndarray:
    counts = np.zeros(m, np.int64)
    if capacity == 0:
        return counts
    items, price = np.arange(m), -np.inf
    held_g, held_i = np.empty(0), np.empty(0, np.int64)
    fresh: list = []
    size = 0
    for _ in range(levels):
        g = gains()
        keep = g > price
        if not keep.all():
            items, g = items[keep], g[keep]
            gains.keep(keep)
        if not len(items):
            break
        fresh.append((g, items))
        size += len(g)
        if size >= capacity + m:
            held_g = np.concatenate([held_g] + [f[0] for f in fresh])
            held_i = np.concatenate([held_i] + [f[1] for f in fresh])
            held_g, held_i, price = _best(held_g, held_i, capacity)
            fresh, size = [], len(held_g)
        gains.advance()
    held_g = np.concatenate([held_g] + [f[0] for f in fresh])
    held_i = np.concatenate([held_i] + [f[1] for f in fresh])
    return np.bincount(_best(held_g, held_i, capacity)[1], minlength=m)


def solve_greedy(values, capacity: int) -> np.ndarray:
    """solve_dp for concave rows and unit costs: take the `capacity` largest gains."""
    values = np.asarray(values, float)
    gains = np.diff(values, axis=1)
    m, k = gains.shape
    items = np.tile(np.arange(m), k)
    return np.bincount(_best(gains.T.ravel(), items, capacity)[1], minlength=m)


# ----------------------------------------------------------------------------------------------
# 5. Allocation
# ----------------------------------------------------------------------------------------------


def _check(ok, name: str, got, fix: str) -> None:
    if not ok:
        raise ValueError(f"{name} = {np.array2string(np.asarray(got), threshold=6)}: {fix}")


def _check_p(p):
    if isinstance(p, tuple):
        a, b = (np.asarray(x, float) for x in p)
        for name, x in (("alpha", a), ("beta", b)):
            _check(np.all((x > 0) & np.isfinite(x)), name, x, "must be positive and finite")
        _check(a.shape == b.shape, "(alpha, beta) shapes", (a.shape, b.shape), "must be equal")
        return a, b
    p = np.asarray(p, float)
    _check(np.all((p >= 0) & (p <= 1)), "p", p, "probabilities lie in [0, 1]")
    return p


def _size(p) -> int:
    return len(p[0] if isinstance(p, tuple) else p)


def _check_bounds(m, budget, n_min, n_max):
    if not 1 <= n_min <= n_max:
        raise ValueError(f"n_min = {n_min}, n_max = {n_max}: choose 1 <= n_min <= n_max")
    if budget < m * n_min:
        raise ValueError(
            f"budget {budget} < {m} prompts x n_min {n_min}: raise budget or lower n_min"
        )
    if budget > m * n_max:
        raise ValueError(
            f"budget {budget} > {m} prompts x n_max {n_max}: lower budget or raise n_max"
        )


def allocate(p, budget: int, n_min: int = 2, n_max: int = 128, weights=None) -> np.ndarray:
    """Counts (M,) that maximise the summed (expected) value with sum(counts) == budget.

    p: (M,) known probabilities, or the pair (alpha, beta) of Beta posteriors.
    """
    p = _check_p(p)
    m = _size(p)
    _check_bounds(m, budget, n_min, n_max)
    gains = _Gains(p, weights)
    for _ in range(n_min - 1):
        gains.advance()
    return n_min + _buy(gains, m, n_max - n_min, budget - m * n_min)


def allocate_paper(p_hat, budget: int, n_min: int = 2, n_max: int = 128) -> np.ndarray:
    """The paper's rule on its windowed estimate; NaN anywhere (first epoch): uniform.

    Prompts with p_hat in {0, 1} get n_min outside the knapsack. The others get a knapsack of at most
    what they are estimated to need (Thm. 2 at confidence 0.9); what that leaves goes to p_hat = 0.
    """
    p_hat = np.asarray(p_hat, float)  # (M,)
    m = len(p_hat)
    _check_bounds(m, budget, n_min, n_max)
    if np.isnan(p_hat).any():
        return uniform(m, budget)
    inside = np.flatnonzero((p_hat > 0) & (p_hat < 1))
    zeros, ones = np.flatnonzero(p_hat == 0), np.flatnonzero(p_hat == 1)
    need = np.minimum(rollouts_for_confidence_approx(p_hat[inside], 0.9).astype(int), n_max).sum()
    left, room = budget - m * n_min, n_max - n_min
    knapsack = min(left, need, room * len(inside))
    to_zeros = min(left - knapsack, room * len(zeros))
    knapsack += min(left - knapsack - to_zeros, room * len(inside) - knapsack)
    counts = np.full(m, n_min)
    if len(inside):
        counts[inside] = allocate(p_hat[inside], knapsack + n_min * len(inside), n_min, n_max)
    for group, extra in ((zeros, to_zeros), (ones, left - knapsack - to_zeros)):
        if len(group):
            counts[group] += uniform(len(group), extra)
    return counts


def uniform(m: int, budget: int) -> np.ndarray:
    """GRPO's rule: budget / m rollouts each; a remainder goes to the first prompts."""
    return budget // m + (np.arange(m) < budget % m)


def shadow_price(p, counts, n_max: int = 128) -> float:
    """Value of the last rollout bought: the knapsack's shadow price."""
    p, counts = _check_p(p), np.asarray(counts)
    gains = _Gains(p)
    last, following = np.zeros(len(counts)), np.zeros(len(counts))
    for n in range(1, int(counts.max(initial=1)) + 1):
        g = gains()
        last = np.where(counts == n + 1, g, last)
        following = np.where((counts == n) & (n < n_max), g, following)
        gains.advance()
    refused = following.max(initial=0.0)  # the best rollout not bought
    bought = last[(last >= refused) & (counts > 1)]  # n_min forces some that are worth less
    return float(bought.min(initial=np.inf)) if len(bought) else float(refused)


def allocate_at_price(p, price: float, n_min: int = 2, n_max: int = 128) -> np.ndarray:
    """Counts (M,): buy every rollout worth at least `price`. The budget follows from the price."""
    p = _check_p(p)
    gains = _Gains(p)
    counts = np.full(_size(p), n_min)
    for n in range(1, n_max):
        if n >= n_min:
            counts += gains() >= price
        gains.advance()
    return counts
