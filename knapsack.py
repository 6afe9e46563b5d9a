"""Which prompt deserves how many rollouts? Estimate each prompt's success probability, value
each further rollout, and spend a fixed budget where the values are highest.

    >>> tracker = SuccessTracker()
    >>> tracker.update(["easy", "hard", "half"], successes=[8, 0, 3], trials=[8, 8, 8])
    >>> allocate(tracker.posterior(["easy", "hard", "half", "new"]), budget=32)
    array([ 2,  5, 16,  9])

"Knapsack RL" (arXiv 2509.25849) calls a prompt an item, its rollouts the item's cost and
P(mixed group) x InfoGain its value. Letters: M prompts, p success probability, q = 1 - p,
n rollouts of one prompt, K options of one prompt.
"""

import numpy as np

# ---- 1. Estimation: what do earlier rollouts say about p? --------------------
WINDOW = 16  # outcomes in the paper's estimate; 16 visits hold at least as many


class SuccessTracker:
    """Turns each prompt's successes S and failures F into p ~ Beta(alpha0 + S, beta0 + F).

    The paper's mean of recent outcomes needs rules for 0, for 1 and for "never seen". A
    posterior needs none. `discount` multiplies S and F before each new visit, because the
    model has moved on. The prior fits the prompts seen so far (empirical Bayes) and is
    multiplied by `prior_strength`: a small one trusts a prompt's own record, a large one
    the crowd. With `drift`, the log-odds of every posterior mean move by `shift`, and
    each `update`, which must be a whole batch, adds to it drift x (the log-odds of the
    batch's success rate - those of the mean estimate before it).
    """

    def __init__(self, discount: float = 0.75, prior_strength: float = 0.25, drift: float = 0.0):
        _numbers("discount", discount, most=1), _numbers("drift", drift, most=1)
        _require(0 < prior_strength < np.inf, "prior_strength", prior_strength, "choose it > 0")
        self.discount, self.prior_strength = discount, prior_strength
        self.drift, self.shift = drift, 0.0
        self._row = {}  # id -> its row of _seen
        # (rows, 1 + WINDOW, 2): successes and trials, first their discounted sums, then
        # visit by visit, newest first. The last row stays empty, for unseen prompts.
        self._seen = np.zeros((1, 1 + WINDOW, 2))

    def _rows(self, ids) -> np.ndarray:
        return np.array([self._row.get(i, -1) for i in ids], int)  # (M,)

    def update(self, ids, successes, trials) -> None:
        """One visit: successes[i] of the trials[i] rollouts of ids[i] were right."""
        s = _numbers("successes", successes, (len(ids),))
        t = _numbers("trials", trials, (len(ids),))
        _require(t % 1 == 0, "trials", t, "pass a count")
        _require((s % 1 == 0) & (s <= t), "successes", s, "pass a count, at most the trials")
        odd = [i for i in ids if not isinstance(i, (str, int, np.integer))]
        _require(not odd, "ids", odd[:1], "an id is a str or an int")
        got = t > 0  # without a rollout it was no visit
        # An empty tracker expects nothing, so that its first batch is no surprise.
        if self.drift and self._row and got.any():
            rates = (s[got] / t[got]).mean(), self.estimate(ids)[got].mean()
            came, expected = np.clip(rates, 0.01, 0.99)  # no infinite surprise
            surprise = np.log(came / (1 - came)) - np.log(expected / (1 - expected))
            self.shift += float(self.drift * surprise)
        for i in ids:
            self._row.setdefault(i if isinstance(i, str) else int(i), len(self._row))
        new = len(self._row) + 1 - len(self._seen)
        if new:
            self._seen = np.pad(self._seen, ((0, new), (0, 0), (0, 0)))
        # An id given twice was still visited once, so its counts are added first.
        rows, which = np.unique(self._rows(ids)[got], return_inverse=True)
        visit = np.stack([np.bincount(which, x[got], len(rows)) for x in (s, t)], axis=1)
        self._seen[rows, 2:] = self._seen[rows, 1:-1]  # the oldest drops out
        self._seen[rows, 1] = visit  # (rows, 2)
        self._seen[rows, 0] = self.discount * self._seen[rows, 0] + visit

    def prior(self) -> tuple[float, float]:
        """(alpha0, beta0), from the mean and variance of the success rates so far."""
        s, t = self._seen[self._seen[:, 0, 1] > 0, 0].T
        mean = ((s / t).sum() + 1) / (len(t) + 2)  # never exactly 0 or 1
        # Rates differ as prompts do, by rho = 1 / (alpha + beta + 1), and as trials are
        # few:  Var[s/t] = mean (1 - mean) (rho + (1 - rho) E[1/t]).  Solve for rho.
        rho = 1 / 3  # before there is a variance: Beta(1, 1), the uniform one
        if len(t) > 1:
            few = min((1 / t).mean(), 0.9)
            rho = (((s / t - mean) ** 2).mean() / (mean * (1 - mean)) - few) / (1 - few)
        total = self.prior_strength * (1 / np.clip(rho, 0.01, 0.9) - 1)
        return float(total * mean), float(total * (1 - mean))

    def posterior(self, ids) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, beta), each (M,). A prompt never seen has the prior."""
        (alpha0, beta0), (s, t) = self.prior(), self._seen[self._rows(ids), 0].T
        alpha, beta = alpha0 + s, beta0 + (t - s)
        if not self.shift:
            return alpha, beta
        # The mean's log-odds, log(alpha / beta), move by `shift`; alpha + beta stays.
        mean = alpha / (alpha + beta * np.exp(-self.shift))
        return (alpha + beta) * mean, (alpha + beta) * (1 - mean)

    def estimate(self, ids) -> np.ndarray:
        """(M,) posterior mean of p."""
        alpha, beta = self.posterior(ids)
        return alpha / (alpha + beta)

    def solved(self, ids) -> np.ndarray:
        """(M,) bool: ever answered right? (With discount 0: at the last visit?)"""
        return self._seen[self._rows(ids), 0, 0] > 0

    def windowed_rate(self, ids, window: int = WINDOW) -> np.ndarray:
        """(M,) the paper's estimate, NaN if unseen: the mean of the newest `window` outcomes,
        or of the whole last visit if that had more. A visit may count in part."""
        _require(1 <= window <= WINDOW, "window", window, f"choose 1 to {WINDOW}")
        s, t = np.moveaxis(self._seen[self._rows(ids), 1:], -1, 0)  # (M, WINDOW)
        used = np.clip(window - (t.cumsum(1) - t), 0, t)  # what the window has room for
        with np.errstate(invalid="ignore"):  # unseen: 0 / 0 = NaN
            return (s * used / np.maximum(t, 1)).sum(1) / used.sum(1)

    def state_dict(self) -> dict:
        """Everything, in JSON types. (As keys, JSON would turn the id 7 into "7".)"""
        settings = {k: x for k, x in vars(self).items() if k[0] != "_"}
        return settings | {"ids": list(self._row), "seen": self._seen.tolist()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state_dict, bit for bit."""
        for name in ("discount", "prior_strength", "drift", "shift"):
            setattr(self, name, state.get(name, 0.0))  # older ones have no drift
        self._row = {i: row for row, i in enumerate(state["ids"])}
        self._seen = np.array(state["seen"], float)


def _require(ok, name: str, value, fix: str) -> None:
    if not np.all(ok):  # of an array, show the first bad number
        bad = np.broadcast_to(value, np.shape(ok))[~ok][0] if np.ndim(ok) else value
        raise ValueError(f"{name} = {bad}: {fix}")


def _numbers(name: str, x, shape=None, most=np.inf) -> np.ndarray:
    x = np.asarray(x, float)
    _require(shape in (None, x.shape), f"{name}.shape", x.shape, f"pass {shape}")
    _require((x >= 0) & (x <= most) & (x < np.inf), name, x, f"pass numbers from 0 to {most}")
    return x


# ---- 2. Value: what is a group of n rollouts worth? --------------------------
def prob_nonzero_gradient(n, p) -> np.ndarray:
    """P(mixed group) = 1 - p^n - (1-p)^n: the paper's ProbNonZeroGradient, as a group that
    is all right or all wrong has zero advantages. n and p broadcast."""
    n, p = np.asarray(n, float), _numbers("p", p, most=1)
    _require(n >= 1, "n", n, "a group has at least 1 rollout")
    m = np.minimum(p, 1 - p)  # for a tiny m, 1 - (1-m)^n would round to 0
    return np.where(n == 1, 0.0, -np.expm1(n * np.log1p(-m)) - m**n)


def info_gain(p) -> np.ndarray:
    """The paper's InfoGain = p (1-p)^2: about how far one gradient step lifts p."""
    return _numbers("p", p, most=1) * (1 - np.asarray(p, float)) ** 2  # highest at 1/3


def value(n, p) -> np.ndarray:
    """The paper's value of n rollouts: P(mixed group) x InfoGain."""
    return prob_nonzero_gradient(n, p) * info_gain(p)


# One more rollout adds  value(n+1, p) - value(n, p) = p q^2 (p^n q + q^n p),  which falls
# as n grows. Both terms are products, so no digits are lost in a difference.
def _gains(p, levels: int) -> np.ndarray:
    """(levels, M): what rollouts 2, 3, 4, ... add, for known p or the pair (alpha, beta)."""
    if isinstance(p, tuple):
        return _gains_beta(*p, levels)
    p = _numbers("p", p, (len(p),), most=1)
    q, gains = 1 - p, np.empty((levels, len(p)))
    right = wrong = p * q * q * p * q  # the two terms at n = 1
    for row in gains:
        row[:] = right + wrong
        right, wrong = right * p, wrong * q
    return gains


def _gains_beta(alpha, beta, levels: int) -> np.ndarray:
    """(levels, M): the exact average of that over p ~ Beta(alpha, beta)."""
    alpha = _numbers("alpha", alpha, (len(alpha),))
    beta = _numbers("beta", beta, alpha.shape)
    s, gains = alpha + beta, np.empty((levels, len(alpha)))
    _require(s > 0, "alpha + beta", s, "pass numbers > 0")
    info = alpha / s * (beta / (s + 1)) * ((beta + 1) / (s + 2))  # E[p q^2]
    a, b = alpha + 1, beta + 2  # p q^2 turns Beta(alpha, beta) into info x Beta(a, b)
    right = wrong = info * (a / (a + b)) * (b / (a + b + 1))  # the two terms at n = 1
    for n, row in enumerate(gains, start=1):
        row[:] = right + wrong
        s = a + b + (n + 1)
        right = right * ((a + n) / s)  # E[p^(n+1) q] / E[p^n q] of Beta(a, b)
        wrong = wrong * ((b + n) / s)
    return gains


def expected_value(n, alpha, beta) -> np.ndarray:
    """E[value(n, p)] for p ~ Beta(alpha, beta): the sum of n - 1 gains. Broadcasts."""
    n, alpha, beta = np.broadcast_arrays(n, alpha, beta)
    _require((n >= 1) & (n % 1 == 0), "n", n, "pass whole numbers >= 1")
    gains = _gains((alpha.ravel(), beta.ravel()), int(n.max(initial=1)) - 1)
    worth = np.vstack([np.zeros(n.size), gains]).cumsum(0)  # row n - 1: n rollouts
    return worth[n.ravel().astype(int) - 1, np.arange(n.size)].reshape(n.shape)


# ---- 3. Two theorems: how many rollouts does a gradient take? ----------------
def expected_rollouts(p) -> np.ndarray:
    """Until its group is mixed, a prompt takes 1/p + 1/(1-p) - 1 rollouts on average."""
    p = _numbers("p", p, most=1)
    with np.errstate(divide="ignore"):  # p in {0, 1}: inf
        return 1 / p + 1 / (1 - p) - 1


def rollouts_for_confidence(p, confidence) -> tuple[np.ndarray, np.ndarray]:
    """The smallest n with P(mixed group) >= confidence, and beside it the paper's count,
    ln(1 - confidence) / ln(max(p, q)). Fewer do not suffice, because max(p, q)^n is then
    too large. It rounded up, or one more, does, because p^n + q^n <= max(p, q)^(n-1)."""
    p, c = _numbers("p", p, most=1), _numbers("confidence", confidence, most=1)
    m = np.minimum(p, 1 - p)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):  # m = 0: inf
        paper = np.log1p(-c) / np.log1p(-m)
        n = np.ceil(paper * (1 - 1e-14))  # a whole number may come out a hair too high
        return n + (np.exp(n * np.log1p(-m)) + m**n > 1 - c), paper


# ---- 4. The knapsack, exactly: dynamic programming ---------------------------
def solve_dp(values, capacity: int, costs=None) -> np.ndarray:
    """Multiple-choice knapsack: one option per item, total cost <= capacity, highest total.

    values[i, k] (M, K) is what option k of item i is worth; -inf forbids it. costs (M, K) are
    whole numbers; None: option k costs k, as k more rollouts do. Returns the options (M,)."""
    values = np.asarray(values, float)
    _require(values < np.inf, "values", values, "pass finite values, or -inf to forbid")
    _require(capacity >= 0 and capacity % 1 == 0, "capacity", capacity, "pass a whole number >= 0")
    (m, k), capacity = values.shape, int(capacity)
    costs = np.broadcast_to(np.arange(k) if costs is None else costs, (m, k))
    _require((costs >= 0) & (costs % 1 == 0), "costs", costs, "pass whole numbers >= 0")
    costs = np.minimum(costs, capacity + 1).astype(int)  # dearer is out of reach, too
    # best[c] is the highest total of the items so far at a cost of at most c. Only its
    # newest row is kept; the way back is `choice`, a byte a cell (two if K > 256).
    best = np.zeros(capacity + 1)
    choice = np.empty((m, capacity + 1), np.min_scalar_type(k - 1))
    for i in range(m):
        total = np.full((k, capacity + 1), -np.inf)  # [k, c]: with option k of item i
        for row, v, cost in zip(total, values[i], costs[i], strict=True):
            row[cost:] = best[: capacity + 1 - cost] + v
        choice[i], best = total.argmax(0), total.max(0)
    _require(best[-1] > -np.inf, "capacity", capacity, "no choice of options fits: raise it")
    picks, left = np.zeros(m, np.int64), capacity
    for i in reversed(range(m)):
        picks[i] = choice[i, left]
        left -= costs[i, picks[i]]
    return picks


def solve_dp_torch(values, capacity: int):
    """solve_dp with unit costs for a tensor (M, K), on its device and in its dtype."""
    import torch  # the rest does without it

    m, k = values.shape
    best, wall = values.new_zeros(capacity + 1), values.new_full((k - 1,), -torch.inf)
    choice = torch.empty((m, capacity + 1), dtype=torch.int16, device=values.device)
    for i in range(m):
        # All rows at once: row k of `moved` is `best`, moved right by k from behind a wall.
        moved = torch.cat([wall, best]).unfold(0, capacity + 1, 1).flip(0)  # (K, capacity + 1)
        best, choice[i] = (moved + values[i][:, None]).max(0)
    choice, picks, left = choice.cpu(), torch.zeros(m, dtype=torch.int64), capacity
    for i in reversed(range(m)):
        picks[i] = choice[i, left]
        left -= int(picks[i])
    return picks.to(values.device)


# ---- 5. The fast path: buy the best next rollout, again and again ------------
def solve_greedy(values, capacity: int) -> np.ndarray:
    """solve_dp for concave rows and unit costs: takes the `capacity` largest gains. As a
    row's gains fall, its largest are its first, so they can be had. Returns (M,)."""
    _require(_concave(values), "values", "not concave", "use solve_dp")
    return _largest(np.diff(np.asarray(values, float)).T, capacity)


def _concave(values) -> bool:
    return bool((np.diff(values, 2) <= 1e-12 * np.abs(values).max(initial=0)).all())


def _largest(gains, capacity: int) -> np.ndarray:
    """(M,): how many of the `capacity` largest gains (levels, M) lie in each column."""
    capacity = min(capacity, gains.size)
    price = np.partition(gains.ravel(), -capacity)[-capacity] if capacity else np.inf
    counts = np.count_nonzero(gains > price, axis=0)
    # Of equal gains the lower level, then the lower index goes first.
    equal = np.flatnonzero(gains == price)[: capacity - counts.sum()]
    return counts + np.bincount(equal % max(len(counts), 1), minlength=len(counts))


# ---- 6. Allocation -----------------------------------------------------------
def allocate(p, budget: int, n_min: int = 2, n_max: int = 128, value=None) -> np.ndarray:
    """Counts (M,) of the highest summed value, n_min <= counts <= n_max, sum == budget.

    p is (M,) known probabilities, or the pair (alpha, beta) of a posterior. Those that gain
    nothing, p = 0 and p = 1, get what nobody else can use. value=None is the paper's, above.
    Your own is value(n, p) of counts (K,) and probabilities (M, 1); over a posterior it is
    averaged. If its gains fall, the greedy solves it, else solve_dp does (slower).

    >>> posterior = np.array([0.2, 1.2, 4.2]), np.array([8.2, 7.2, 4.2])
    >>> solved = np.array([[False], [True], [True]])  # (M, 1), one row a prompt
    >>> def my_value(n, p):
    ...     bonus = np.where(solved, 0.01, 0.3)  # more for prompts never solved
    ...     return prob_nonzero_gradient(n, p) * (info_gain(p) + bonus)
    >>> allocate(posterior, 24, value=my_value)
    array([10,  8,  6])
    """
    m, room = _gains(p, 0).shape[1], n_max - n_min
    spare = _spare(m, budget, n_min, n_max)
    if value is not None:
        values = _table(value, p, np.arange(n_min, n_max + 1))  # (M, K)
        if _concave(values):  # NaN is not, and solve_dp refuses it
            return n_min + solve_greedy(values, spare)
        # One slope for all prompts makes every rollout worth buying, so the whole budget is
        # spent. It adds the same to all ways to spend it, so the best of them stays the best.
        return n_min + solve_dp(values + 2 * np.ptp(values) * np.arange(room + 1), spare)
    levels = min(8 + 3 * spare // max(m, 1), room)  # a few dozen are enough for most budgets
    while True:
        extra = _largest(_gains(p, n_min - 1 + levels)[n_min - 1 :], spare)
        # A prompt that bought all levels of the table may want more. As gains fall, no
        # other prompt does.
        if levels == room or extra.max(initial=0) < levels:
            return n_min + extra
        levels = min(2 * levels, room)


def _spare(m: int, budget: int, n_min: int, n_max: int) -> int:
    """What is left of the budget once each of m prompts has n_min."""
    _require(budget % 1 == 0, "budget", budget, "pass a whole number")
    _require(1 <= n_min <= n_max, "n_min", n_min, f"choose it from 1 to n_max = {n_max}")
    _require(budget >= m * n_min, "budget", budget, f"raise it to {m} x n_min = {m * n_min} or lower n_min")
    _require(budget <= m * n_max, "budget", budget, f"lower it to {m} x n_max = {m * n_max} or raise n_max")
    return int(budget - m * n_min)


def _table(value, p, n, points: int = 32) -> np.ndarray:
    """(M, K) of value(n, p); over a posterior its average, exact for polynomials in p of
    degree < 2 x points (Gauss-Jacobi quadrature)."""
    if not isinstance(p, tuple):
        return np.broadcast_to(value(n, np.asarray(p, float)[:, None]), (len(p), len(n)))
    # Golub and Welsch (1969): the nodes are the eigenvalues of a tridiagonal matrix of
    # Beta's canonical moments c_1, c_2, c_3, ..., of which c_1 is the mean.
    (a, b), k = (np.reshape(x, (-1, 1)) for x in p), np.arange(points)
    odd = (a + k) / (a + b + 2 * k)  # c_1, c_3, c_5, ...
    even = k / (a + b + np.abs(2 * k - 1))  # 0, c_2, c_4, ...
    up, down = (1 - even) * odd, even * (1 - np.roll(odd, 1, axis=1))  # (M, points)
    matrix = np.zeros((len(a), points, points))
    matrix[:, k, k] = up + down
    matrix[:, k[1:], k[:-1]] = np.sqrt(up[:, :-1] * down[:, 1:])  # eigh reads this half
    nodes, vectors = np.linalg.eigh(matrix)
    table = np.zeros((len(a), len(n)))
    for j in k:
        table += vectors[:, 0, j, None] ** 2 * value(n, nodes[:, j, None].clip(0, 1))
    return table


def allocate_paper(p_hat, budget: int, n_min: int = 2, n_max: int = 128) -> np.ndarray:
    """The paper's rule, on tracker.windowed_rate(ids). NaN anywhere (first epoch): uniform.

    p_hat in {0, 1} gets n_min, outside the knapsack. The others share at most the rollouts
    that they are estimated to need (section 3, at confidence 0.9). What is left goes to
    p_hat = 0; what n_max leaves of that back to the knapsack, and last to p_hat = 1."""
    p_hat = np.asarray(p_hat, float)  # (M,)
    left, room = _spare(len(p_hat), budget, n_min, n_max), n_max - n_min
    if np.isnan(p_hat).any():
        return uniform(len(p_hat), budget)
    hard, easy = p_hat == 0, p_hat == 1  # (M,) bool
    inside, m = p_hat[~hard & ~easy], (~hard & ~easy).sum()
    need = np.minimum(rollouts_for_confidence(inside, 0.9)[1], n_max).astype(int).sum()
    to_hard = min(left - min(left, need, room * m), room * hard.sum())
    shared = min(left - to_hard, room * m)
    counts = np.full(len(p_hat), n_min)
    counts[~hard & ~easy] = allocate(inside, shared + n_min * m, n_min, n_max)
    counts[hard] += uniform(hard.sum(), to_hard)
    counts[easy] += uniform(easy.sum(), left - to_hard - shared)
    return counts


def uniform(m: int, budget: int) -> np.ndarray:
    """GRPO's rule: budget / m rollouts each (M,). A remainder goes to the first prompts."""
    _require(budget >= 0 and budget % 1 == 0, "budget", budget, "pass a whole number >= 0")
    _require(m > 0 or budget == 0, "m", m, "pass the number of prompts that share the budget")
    return budget // max(m, 1) + (np.arange(m) < budget % max(m, 1))


def shadow_price(p, counts, n_max: int = 128) -> float:
    """The value of the last rollout bought: about what one more unit of budget is worth. What
    n_min forced does not count, if it is worth less than the best rollout refused."""
    counts = _numbers("counts", counts, (_gains(p, 0).shape[1],)).astype(int)
    _require(counts >= 1, "counts", counts, "a group has at least 1 rollout")
    gains, each = _gains(p, counts.max(initial=1)), np.arange(len(counts))
    last = np.vstack([np.full(len(counts), np.inf), gains])[counts - 1, each]
    refused = gains[counts - 1, each][counts < n_max].max(initial=0)
    price = last[last >= refused].min(initial=np.inf)
    return float(price if price < np.inf else refused)  # inf: nothing was bought yet


def allocate_at_price(p, price: float, n_min: int = 2, n_max: int = 128) -> np.ndarray:
    """Counts (M,): n_min, and every further rollout worth at least `price`, up to n_max.
    At shadow_price(p, counts) the counts of allocate come back, but for ties."""
    _require(price >= 0, "price", price, "pass a number >= 0; shadow_price gives the scale")
    _spare(0, 0, n_min, n_max)
    return n_min + np.count_nonzero(_gains(p, n_max - 1)[n_min - 1 :] >= price, axis=0)
