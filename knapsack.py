"""Which prompt deserves how many rollouts? Estimate each prompt's success probability, value each further
rollout of it, and spend a fixed budget where the values are highest.

    >>> tracker = SuccessTracker()
    >>> tracker.update(["easy", "hard", "half"], successes=[8, 0, 3], trials=[8, 8, 8])
    >>> allocate(tracker.posterior(["easy", "hard", "half", "new"]), budget=32)
    array([ 2,  5, 16,  9])

"Knapsack RL" (Li et al., arXiv 2509.25849) calls a prompt an item, its rollouts the item's cost and
P(mixed group) x InfoGain the item's value. Letters: M prompts, p success probability, q = 1 - p,
n rollouts of one prompt, K options of one prompt.
"""

import copy

import numpy as np

# ---- 1. Estimation: what do earlier rollouts say about p? --------------------------------------------
VISITS_KEPT = 16  # a visit has at least one outcome, so these hold the paper's window of 16


class SuccessTracker:
    """Counts each prompt's successes and turns them into a Beta posterior over its p.

    The paper takes a mean of recent outcomes, then needs rules for p = 0, p = 1 and "never seen".
    The posterior needs none:  p_i ~ Beta(alpha0 + S_i, beta0 + F_i)  where
      S_i, F_i       are successes and failures, multiplied by `discount` at each new visit, since the
                     model that produced them has moved on (1 keeps all, 0 only the last visit);
      alpha0, beta0  is the Beta that fits the prompts seen so far (empirical Bayes), multiplied by
                     `prior_strength`: small trusts a prompt's own record, large trusts the crowd.
    After 0 of 4 and then 4 of 4 right, the estimate is .50 at (discount, prior_strength) = (1, .25): all
    counts equally; .57 at (.75, .25); .96 at (0, .25): no past; .78 at (0, 4): pulled to the crowd.

    A record is as old as its prompt's last visit; the newest batch shows how the model has moved since. With
    `drift` > 0 one number, `shift`, is added to the log-odds of every posterior mean, seen or unseen, old or
    fresh (alpha + beta stays). Each call of `update` compares the batch's mean success rate with the mean
    estimate before it, and adds `drift` times the difference of their log-odds to `shift`. So call it once
    for a batch of tens of prompts: one prompt a call makes the shift mostly noise. `solved` and
    `windowed_rate` do not use it. tutorial/7_evidence.md tries (drift, prior_strength) = (.3, 1).
    """

    def __init__(self, discount: float = 0.75, prior_strength: float = 0.25, drift: float = 0.0):
        _require(0 <= discount <= 1, "discount", discount, "choose it in [0, 1]")
        _require(0 < prior_strength < np.inf, "prior_strength", prior_strength, "choose it > 0")
        _require(0 <= drift <= 1, "drift", drift, "choose it in [0, 1]")
        self.discount, self.prior_strength, self.drift, self.shift = discount, prior_strength, drift, 0.0
        self._row: dict[str | int, int] = {}  # id -> row of _seen
        # (rows, 1 + VISITS_KEPT, 2) of (successes, trials): the discounted sums, then the visits as they
        # were, newest first. The last row stays empty: row -1, an unseen id, reads zeros.
        self._seen = np.zeros((1, 1 + VISITS_KEPT, 2))

    def _rows(self, ids) -> np.ndarray:
        return np.array([self._row.get(i, -1) for i in ids], np.int64)  # (M,)

    def update(self, ids, successes, trials) -> None:
        """One visit: successes[i] of the trials[i] rollouts of prompt ids[i] were right."""
        s, t = _vector("successes", successes, len(ids)), _vector("trials", trials, len(ids))
        _require(t % 1 == 0, "trials", t, "pass a count")
        _require((s % 1 == 0) & (s <= t), "successes", s, "pass a count, at most the trials")
        odd = [i for i in ids if not isinstance(i, (str, int, np.integer))]
        _require(not odd, "ids", odd[:1], "an id is a str or an int")
        if self.drift and self._row and (t > 0).any():  # an empty tracker expects nothing: no surprise
            expected, came = self.estimate(ids)[t > 0].mean(), (s[t > 0] / t[t > 0]).mean()
            self.shift += self.drift * (_log_odds(came) - _log_odds(expected))
        for i in ids:
            self._row.setdefault(i if isinstance(i, str) else int(i), len(self._row))
        if len(self._row) >= len(self._seen):  # twice the room, so that growing stays linear
            self._seen = np.pad(self._seen, ((0, 2 * len(self._row)), (0, 0), (0, 0)))
        # An id given twice was still visited once: its counts are added first.
        rows, which = np.unique(self._rows(ids), return_inverse=True)
        visit = np.stack([np.bincount(which, x, len(rows)) for x in (s, t)], 1)  # (rows, 2)
        rows, visit = rows[visit[:, 1] > 0], visit[visit[:, 1] > 0]
        self._seen[rows, 1:] = np.concatenate([visit[:, None], self._seen[rows, 1:-1]], 1)
        self._seen[rows, 0] = self.discount * self._seen[rows, 0] + visit

    def prior(self) -> tuple[float, float]:
        """(alpha0, beta0), from the mean and the variance of the success rates seen so far."""
        s, t = self._seen[self._seen[:, 0, 1] > 0, 0].T
        mean = ((s / t).sum() + 1) / (len(t) + 2)  # never exactly 0 or 1
        # Rates scatter because prompts differ (rho = 1 / (alpha + beta + 1)) and because trials are few:
        #     Var = mean (1 - mean) (rho + (1 - rho) E[1/t])
        rho = 1 / 3  # before there is a variance: Beta(1, 1), the uniform distribution
        if len(t) > 1:
            few = min((1 / t).mean(), 0.9)
            rho = (((s / t - mean) ** 2).mean() / (mean * (1 - mean)) - few) / (1 - few)
        total = self.prior_strength * (1 / np.clip(rho, 0.01, 0.9) - 1)
        return float(total * mean), float(total * (1 - mean))

    def posterior(self, ids) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, beta), each (M,): ids[i] has p ~ Beta(alpha[i], beta[i]); if unseen, the prior."""
        (alpha0, beta0), (s, t) = self.prior(), self._seen[self._rows(ids), 0].T
        alpha, beta = alpha0 + s, beta0 + (t - s)
        mean = alpha / (alpha + beta * np.exp(-self.shift))  # its log-odds: log(alpha / beta) + shift
        return ((alpha + beta) * mean, (alpha + beta) * (1 - mean)) if self.shift else (alpha, beta)

    def estimate(self, ids) -> np.ndarray:
        """(M,) posterior mean of p."""
        alpha, beta = self.posterior(ids)
        return alpha / (alpha + beta)

    def solved(self, ids) -> np.ndarray:
        """(M,) bool: was ids[i] ever answered right? (With discount 0: at its last visit.)"""
        return self._seen[self._rows(ids), 0, 0] > 0

    def windowed_rate(self, ids, window: int = 16) -> np.ndarray:
        """(M,) the paper's estimate: mean of the newest `window` outcomes, or of the whole last visit if
        that had more; NaN if unseen. A visit that the window cuts counts in proportion."""
        _require(1 <= window <= VISITS_KEPT, "window", window, f"choose 1 to {VISITS_KEPT}")
        s, t = np.moveaxis(self._seen[self._rows(ids), 1:], -1, 0)  # (M, VISITS_KEPT)
        used = np.clip(window - (t.cumsum(1) - t), 0, t)  # of each visit, what the window has room for
        with np.errstate(invalid="ignore"):  # unseen: 0 / 0 = NaN
            return (s * used / np.maximum(t, 1)).sum(1) / used.sum(1)

    def state_dict(self) -> dict:
        """Everything, in JSON types. Ids are list entries: as keys, JSON would turn 7 into "7"."""
        ids, seen = list(self._row), self._seen[: len(self._row) + 1].tolist()
        settings = {k: getattr(self, k) for k in ("discount", "prior_strength", "drift", "shift")}
        return settings | {"ids": ids, "seen": seen}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state_dict, bit for bit."""
        self.discount, self.prior_strength = state["discount"], state["prior_strength"]
        self.drift, self.shift = state.get("drift", 0.0), state.get("shift", 0.0)  # older files have none
        self._row = {i: row for row, i in enumerate(state["ids"])}
        self._seen = np.array(state["seen"], float)


def _log_odds(p: float) -> float:
    p = np.clip(p, 0.01, 0.99)  # a batch all right or all wrong is no infinite surprise
    return float(np.log(p / (1 - p)))


def _require(ok, name: str, value, fix: str) -> None:
    """ValueError naming the argument, its value (of an array, the first bad one) and the fix."""
    if not np.all(ok):
        bad = np.broadcast_to(value, np.shape(ok))[~ok][0] if np.ndim(ok) else value
        raise ValueError(f"{name} = {bad}: {fix}")


def _vector(name: str, x, m: int | None = None) -> np.ndarray:
    x = np.asarray(x, float)
    _require(x.ndim == 1 and m in (None, len(x)), f"{name}.shape", x.shape, f"pass ({m or 'M'},)")
    _require((x >= 0) & (x < np.inf), name, x, "pass finite numbers >= 0")
    return x


def _probability(p) -> np.ndarray:
    p = np.asarray(p, float)
    _require((p >= 0) & (p <= 1), "p", p, "pass numbers in [0, 1] (unseen prompts: a posterior)")
    return p


# ---- 2. Value: what is a group of n rollouts worth? --------------------------------------------------
def prob_nonzero_gradient(n, p) -> np.ndarray:
    """P(mixed group) = 1 - p^n - (1-p)^n, the paper's ProbNonZeroGradient: a group with no right answer,
    or no wrong one, has zero advantages and so no gradient. n and p broadcast."""
    n, p = np.asarray(n, float), _probability(p)
    _require(n >= 1, "n", n, "a group has at least 1 rollout")
    m = np.minimum(p, 1 - p)  # for a tiny m, 1 - (1-m)^n would round to 0
    return np.where(n == 1, 0.0, -np.expm1(n * np.log1p(-m)) - m**n)


def info_gain(p) -> np.ndarray:
    """The paper's InfoGain = p (1-p)^2: about how far one gradient step lifts p. Peak at p = 1/3."""
    return _probability(p) * (1 - np.asarray(p, float)) ** 2


def value(n, p) -> np.ndarray:
    """The paper's value of n rollouts of a prompt with known p: P(mixed group) x InfoGain."""
    return prob_nonzero_gradient(n, p) * info_gain(p)


class _Gains:
    """Iterator: what rollout 2, 3, 4, ... adds to each prompt's value, (M,) at a time.

    value(n+1, p) - value(n, p) = p q^2 (T1 + T2)  with T1 = p^n q and T2 = q^n p. Averaged over
    p ~ Beta(a, b), the factor p q^2 turns Beta(a, b) into E[p q^2] times Beta(a+1, b+2), and a step from
    n to n + 1 is  T1 *= (a + n) / (a + b + n + 1),  T2 *= (b + n) / (a + b + n + 1).
    For a known p it is T1 *= p, T2 *= q: the same lines with (a, b) = (p, q) and d = 0 for 1.

    Only products and sums of positive numbers, so no digits are lost (a difference of log-gammas has
    none left at a = b = 1e4). Factors are below 1: gains fall with n, so values are concave.
    """

    def __init__(self, p, weights=None, bonus=None):
        self.n, self.d = 1, int(isinstance(p, tuple))
        a = _vector("alpha", p[0]) if self.d else _vector("p", _probability(p))
        b = _vector("beta", p[1], len(a)) if self.d else 1 - a
        _require(a + b > 0, "alpha + beta", a + b, "pass numbers > 0")
        d, self.m, s = self.d, len(a), a + b
        terms = [(a / s * (b / (s + d)) * ((b + d) / (s + 2 * d)), a + d, b + 2 * d)]  # E[p q^2], tilted
        if bonus is not None:  # bonus x P(mixed): a term without the factor p q^2
            terms.append((_vector("bonus", bonus, self.m), a, b))
        scale, a, b = (np.stack(x) for x in zip(*terms, strict=True))  # each (terms, M)
        weight = 1 if weights is None else _vector("weights", weights, self.m)
        t = weight * scale * (a / (a + b)) * (b / (a + b + d))  # at n = 1, T1 and T2 are both E[p q]
        self.state = np.stack([t, t, a, b])  # (4, terms, M)

    def __next__(self) -> np.ndarray:
        t1, t2, a, b = self.state
        gains, n = (t1 + t2).sum(0), self.n * self.d
        s = a + b + (n + self.d)
        t1 *= (a + n) / s
        t2 *= (b + n) / s
        self.n += 1
        return gains

    def of(self, which):
        """A copy for the prompts at these indices."""
        part = copy.copy(self)
        part.state = self.state[..., which]
        part.m = part.state.shape[-1]
        return part


def expected_value(n, alpha, beta) -> np.ndarray:
    """E[value(n, p)] for p ~ Beta(alpha, beta): the sum of the first n - 1 gains. Broadcasts."""
    n, alpha, beta = np.broadcast_arrays(*(np.asarray(x, float) for x in (n, alpha, beta)))
    _require((n >= 1) & (n % 1 == 0), "n", n, "pass whole numbers >= 1")
    gains, total = _Gains((alpha.ravel(), beta.ravel())), np.zeros(n.size)
    for k in range(1, int(n.max(initial=1))):
        total += np.where(k < n.ravel(), next(gains), 0)
    return total.reshape(n.shape)


# ---- 3. Two theorems of the paper: how many rollouts does a gradient take? ---------------------------
def expected_rollouts(p) -> np.ndarray:
    """Sampling a prompt until its group is mixed takes 1/p + 1/(1-p) - 1 rollouts on average."""
    p = _probability(p)
    with np.errstate(divide="ignore"):  # p in {0, 1}: inf
        return 1 / p + 1 / (1 - p) - 1


def rollouts_for_confidence(p, confidence) -> tuple[np.ndarray, np.ndarray]:
    """The smallest n with P(mixed group) >= confidence, and beside it the paper's count.

    The paper's ln(1 - confidence) / ln(max(p, q)) solves max(p, q)^n = 1 - confidence: so many are needed.
    Rounded up, or one more, they suffice, as p^n + q^n <= max(p, q)^(n-1). p in {0, 1}: inf.
    """
    p, c = _probability(p), np.asarray(confidence, float)
    _require((c > 0) & (c < 1), "confidence", c, "choose it in (0, 1)")
    m = np.minimum(p, 1 - p)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        paper = np.log1p(-c) / np.log1p(-m)
        n = np.ceil(paper * (1 - 1e-14))  # a whole number may come out a rounding error too high
        return n + (np.exp(n * np.log1p(-m)) + m**n > 1 - c), paper


# ---- 4. The knapsack, exactly: dynamic programming ---------------------------------------------------
def solve_dp(values, capacity: int, costs=None) -> np.ndarray:
    """Multiple-choice knapsack: one option per item, total cost <= capacity, the highest total.

    values (M, K): values[i, k] of option k of item i, any curve; -inf forbids the option. costs (M, K):
    whole numbers; None: option k costs k (k more rollouts). Returns (M,), the option of each item.

    best[c] is the highest total of the items so far at a cost <= c. Only its newest row is kept; the way
    back is in `choice`, (M, capacity + 1) of one byte a cell (two if K > 256).
    """
    values = np.asarray(values, float)
    _require(values.ndim == 2 and values.shape[1], "values.shape", values.shape, "pass (M, K)")
    _require(values < np.inf, "values", values, "pass finite values, or -inf to forbid")  # nor NaN
    _require(capacity >= 0 and capacity % 1 == 0, "capacity", capacity, "pass a whole number >= 0")
    (m, k), capacity = values.shape, int(capacity)
    costs = np.broadcast_to(np.arange(k) if costs is None else costs, (m, k))
    _require((costs >= 0) & (costs % 1 == 0), "costs", costs, "pass whole numbers >= 0")
    costs = np.minimum(costs, capacity + 1).astype(int)  # dearer ones are out of reach just the same
    best, choice = np.zeros(capacity + 1), np.empty((m, capacity + 1), np.min_scalar_type(k - 1))
    for i in range(m):
        # Row k of `total` is best[c - cost_k] + v_k: best, moved right by cost_k from behind a wall.
        wall = np.full(costs[i].max(), -np.inf)
        moved = np.lib.stride_tricks.sliding_window_view(np.append(wall, best), capacity + 1)
        total = moved[len(wall) - costs[i]]  # (K, capacity + 1), a copy
        total += values[i][:, None]
        choice[i] = total.argmax(0)
        best = total[choice[i], np.arange(capacity + 1)]
    _require(best[-1] > -np.inf, "capacity", capacity, "no choice of options fits: raise it")
    picks, left = np.zeros(m, np.int64), capacity
    for i in reversed(range(m)):
        picks[i] = choice[i, left]
        left -= costs[i, picks[i]]
    return picks


def solve_dp_torch(values, capacity: int):
    """solve_dp with unit costs for a tensor (M, K), on its device and in its dtype."""
    import torch

    m, k = values.shape
    best, wall = values.new_zeros(capacity + 1), values.new_full((k - 1,), -torch.inf)
    choice = torch.empty((m, capacity + 1), dtype=torch.int16, device=values.device)
    for i in range(m):
        moved = torch.cat([wall, best]).unfold(0, capacity + 1, 1).flip(0)  # (K, capacity + 1)
        best, choice[i] = (moved + values[i][:, None]).max(0)
    choice, picks, left = choice.cpu(), torch.zeros(m, dtype=torch.int64), capacity
    for i in reversed(range(m)):
        picks[i] = choice[i, left]
        left -= int(picks[i])
    return picks.to(values.device)


# ---- 5. The fast path: buy the best next rollout, again and again ------------------------------------
def solve_greedy(values, capacity: int) -> np.ndarray:
    """solve_dp for concave rows and unit costs: the `capacity` largest gains. As a prompt's gains fall, its
    largest are its first, so that is a legal choice. Of equal gains the lower level, then the lower index
    goes first. Returns (M,)."""
    gains = np.diff(np.asarray(values, float)).T  # (K-1, M)
    falling = np.minimum.accumulate(gains)  # differs by rounding errors only, if values are concave
    _require(gains <= falling + 1e-12 * np.abs(values).max(initial=0), "gain", gains, "use solve_dp")
    items = np.tile(np.arange(gains.shape[1]), len(gains))
    return np.bincount(_top(falling.ravel(), items, capacity)[1], minlength=gains.shape[1])


def _top(gains, items, capacity):
    """The `capacity` largest gains, of equal ones the first; their items; the smallest of them."""
    if len(gains) <= capacity:
        return gains, items, -np.inf
    price = np.partition(gains, -capacity)[-capacity] if capacity else np.inf
    take = gains > price
    take[np.flatnonzero(gains == price)[: capacity - np.count_nonzero(take)]] = True
    return gains[take], items[take], price


def _buy(gains: _Gains, levels: int, capacity: int, price: float = -np.inf):
    """solve_greedy on the next `levels` gains, computed level by level while they are above `price`, which
    rises once we hold more than we can buy: 10^6 prompts x 128 levels are never in memory at once.
    Returns the counts (M,) and the smallest gain bought."""
    if price == -np.inf and gains.m > 2**16:
        # Guess the price on every 64th prompt, a little low: what is cheaper need never be held.
        guess = 0.98 * _buy(gains.of(np.arange(0, gains.m, 64)), levels, capacity // 64)[1]
        counts, last = _buy(gains.of(np.arange(gains.m)), levels, capacity, guess)
        if counts.sum() == capacity:  # enough lay above the guess, so the best did
            return counts, last
    m, items, held = gains.m, np.arange(gains.m), [(np.zeros(0), np.zeros(0, int))]
    for _ in range(levels):
        now = next(gains)
        keep = np.flatnonzero(now > price)  # an equal gain on an earlier level goes first
        if len(keep) < len(now):
            now, items, gains = now[keep], items[keep], gains.of(keep)
        held.append((now, items))
        if sum(len(x) for x, _ in held) >= 2 * capacity + m:
            *best, price = _top(*map(np.concatenate, zip(*held, strict=True)), capacity)
            held = [best]
        if not len(items):
            break
    bought, who, _ = _top(*map(np.concatenate, zip(*held, strict=True)), capacity)
    return np.bincount(who, minlength=m), bought.min(initial=np.inf)


def _buy_costly(gains: _Gains, levels: int, capacity: int, costs) -> np.ndarray:
    """(M,) extra rollouts, costs[i] each, of the highest total that `capacity` pays for.

    Buying by gain / cost until one does not fit stays within price x (what is left over) of `bound`, the
    optimum if rollouts could be cut. Any answer that has k of prompt i is loss[i, k] or more below it. So
    the DP runs over what loses at most `slack`: an answer that close to the bound is the optimum.
    """
    m, table = gains.m, np.reshape([next(gains) for _ in range(levels)], (levels, gains.m))
    density = (table / costs).ravel()
    order = np.argsort(-density, kind="stable")
    fit = np.searchsorted(np.cumsum(costs[order % m]), capacity, "right")
    if fit == len(order) or density[order[fit]] == 0:  # everything of value is bought
        return np.bincount(order[:fit] % m, minlength=m)
    price = density[order[fit]]
    worth = np.vstack([np.zeros(m), table.cumsum(0)]).T  # (M, levels + 1)
    surplus = worth - price * costs[:, None] * np.arange(levels + 1)
    loss, bound = surplus.max(1, keepdims=True) - surplus, surplus.max(1).sum() + price * capacity
    slack = max(price, 1e-12 * bound)
    while True:
        low, width = (loss <= slack).argmax(1), (loss <= slack).sum(1)  # loss is convex: one run each
        free, k = width > 1, np.arange(width.max())
        options = np.take_along_axis(worth, np.minimum(low[:, None] + k, levels), 1)[free]  # (free, K)
        options[k >= width[free, None]] = -np.inf
        extra = k * costs[free, None]
        room = min(capacity - low @ costs, extra.max(1).sum())
        low[free] += solve_dp(options, room, extra)
        missed = bound - worth[np.arange(m), low].sum()
        if missed <= slack:
            return low
        slack = min(4 * slack, missed)


# ---- 6. Allocation -----------------------------------------------------------------------------------
def allocate(p, budget: int, n_min: int = 2, n_max: int = 128, weights=None, bonus=None, costs=None):
    """Counts (M,) of the highest summed value, n_min <= counts <= n_max, sum(counts) == budget.

    p        (M,) known probabilities, or the pair (alpha, beta) of a Beta posterior, each (M,)
    weights  (M,) a prompt's value times this: several objectives in one knapsack
    bonus    (M,) what a mixed group is worth besides its InfoGain: P(mixed) x (InfoGain + bonus).
             InfoGain starves prompts that were never solved; tests/bench/bench_allocation.py measures what
             bonus=np.where(tracker.solved(ids), 0.01, 0.3) wins back, and what that costs.
    costs    (M,) whole numbers, the cost of one rollout (such as its expected tokens), which is what the
             budget then limits: the best counts with sum(costs * counts) <= budget
    No case is special: p = 0 and p = 1 gain nothing and get what nobody else can use. Ties as above.
    """
    gains = _Gains(p, weights, bonus)
    cost = _vector("costs", np.ones(gains.m) if costs is None else costs, gains.m)
    _require((cost >= 1) & (cost % 1 == 0), "costs", cost, "pass whole numbers >= 1")
    capacity = _spare(int(cost.sum()), budget, n_min, n_max)
    for _ in range(1, n_min):
        next(gains)
    if costs is None:
        return n_min + _buy(gains, n_max - n_min, capacity)[0]
    return n_min + _buy_costly(gains, n_max - n_min, capacity, cost.astype(int))


def _spare(m: int, budget: int, n_min: int, n_max: int) -> int:
    """What is left of the budget once every prompt has n_min. (m: prompts, or the cost of one each)"""
    for name, x in (("budget", budget), ("n_min", n_min), ("n_max", n_max)):
        _require(x % 1 == 0, name, x, "pass a whole number")
    _require(n_min >= 1, "n_min", n_min, "a group has at least 1 rollout")
    _require(n_max >= n_min, "n_max", n_max, f"raise it to n_min = {n_min} or lower that")
    _require(budget >= m * n_min, "budget", budget, f"raise it to {m} x n_min = {m * n_min} or lower n_min")
    _require(budget <= m * n_max, "budget", budget, f"lower it to {m} x n_max = {m * n_max} or raise n_max")
    return int(budget - m * n_min)


def allocate_paper(p_hat, budget: int, n_min: int = 2, n_max: int = 128) -> np.ndarray:
    """The paper's rule, on tracker.windowed_rate(ids). NaN anywhere (first epoch): uniform.

    p_hat in {0, 1}: n_min, outside the knapsack. The others share a knapsack of at most the rollouts they
    are estimated to need (section 3, at confidence 0.9); what that leaves goes to p_hat = 0. What n_max
    still leaves goes back into the knapsack, and last to p_hat = 1.
    """
    p_hat = np.asarray(p_hat, float)  # (M,)
    left, room = _spare(len(p_hat), budget, n_min, n_max), n_max - n_min
    if np.isnan(p_hat).any():
        return uniform(len(p_hat), budget)
    inside = np.flatnonzero((_probability(p_hat) > 0) & (p_hat < 1))
    hard, easy = np.flatnonzero(p_hat == 0), np.flatnonzero(p_hat == 1)
    need = np.minimum(rollouts_for_confidence(p_hat[inside], 0.9)[1], n_max).astype(int).sum()
    to_hard = min(left - min(left, need, room * len(inside)), room * len(hard))
    knapsack = min(left - to_hard, room * len(inside))
    counts = np.full(len(p_hat), n_min)
    counts[inside] = allocate(p_hat[inside], knapsack + n_min * len(inside), n_min, n_max)
    counts[hard] += uniform(len(hard), to_hard)
    counts[easy] += uniform(len(easy), left - to_hard - knapsack)
    return counts


def uniform(m: int, budget: int) -> np.ndarray:
    """GRPO's rule: budget / m rollouts each (M,); a remainder goes to the first prompts."""
    _require(budget >= 0 and budget % 1 == 0, "budget", budget, "pass a whole number >= 0")
    _require(m > 0 or m == budget == 0, "m", m, "pass the number of prompts that share the budget")
    return budget // max(m, 1) + (np.arange(m) < budget % max(m, 1))


def shadow_price(p, counts, n_max: int = 128) -> float:
    """Value of the last rollout bought: about what one more unit of budget is worth. (Rollouts that n_min
    forced are worth less than the best one not bought; beyond n_max none is for sale.)"""
    gains = _Gains(p)
    counts = _vector("counts", counts, gains.m)
    last, refused = np.full(gains.m, np.inf), 0.0
    for n in range(1, int(counts.max(initial=0)) + 1):
        now = next(gains)
        last = np.where(counts == n + 1, now, last)
        refused = now[(counts == n) & (n < n_max)].max(initial=refused)
    bought = last[last >= refused].min(initial=np.inf)
    return float(bought if bought < np.inf else refused)


def allocate_at_price(p, price: float, n_min: int = 2, n_max: int = 128) -> np.ndarray:
    """Counts (M,): n_min, and every further rollout worth at least `price`, up to n_max. The budget follows:
    large while many prompts are undecided, small once most are always right. At shadow_price(p, counts)
    the counts of allocate come back, but for ties."""
    gains = _Gains(p)
    _require(price >= 0, "price", price, "pass a number >= 0; shadow_price gives the scale")
    _spare(gains.m, gains.m * n_min, n_min, n_max)
    counts, buyers = np.full(gains.m, n_min), np.arange(gains.m)
    for n in range(1, n_max):
        keep = np.flatnonzero(next(gains) >= price)
        if len(keep) < len(buyers):  # gains fall: who stops here never buys again
            buyers, gains = buyers[keep], gains.of(keep)
        counts[buyers] += n >= n_min
    return counts
