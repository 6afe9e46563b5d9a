"""Which prompt deserves how many rollouts? Estimate how often each is solved,
value each further rollout, and buy the most valuable ones.

    >>> tracker = SuccessTracker()
    >>> ids = ["easy", "hard", "half"]
    >>> tracker.update(ids, successes=[8, 0, 3], trials=[8, 8, 8])
    >>> allocate(tracker.posterior([*ids, "new"]), budget=32)
    array([ 2,  8, 12, 10])

In "Knapsack RL" (arXiv 2509.25849) a prompt is an item, its n rollouts are the cost,
and P(mixed group) x InfoGain is the value. Letters: M prompts, K options of one
prompt, p its success probability, q = 1 - p.
"""

from operator import index

import numpy as np


def _need(ok, what: str) -> None:
    if not np.all(ok):
        raise ValueError(what)


# ---- 1. Estimation: what do earlier rollouts say about p? ----
WINDOW = 16  # outcomes in the paper's estimate


class SuccessTracker:
    """S successes and F failures of a prompt give p ~ Beta(alpha0 + S, beta0 + F).

    discount: S and F are multiplied by it at each new visit, as the model has moved
        on since the last one. 1 keeps everything.
    prior_strength: the prior (alpha0, beta0) is fitted to all prompts seen so far, and
        multiplied by this. A small one trusts a prompt's own record, a large one the
        crowd's.
    drift: the log-odds of all estimates move by this share of what the newest batch
        shows the model to have moved. It takes a batch for a random sample of the
        prompts: where they come sorted, switch it off with 0.
    """

    def __init__(self, discount=0.75, prior_strength=1.0, drift=0.3):
        ok = 0 <= discount <= 1 and 0 <= drift <= 1 and prior_strength > 0
        _need(ok, "choose discount and drift from 0 to 1, prior_strength > 0")
        self.discount, self.prior_strength = discount, prior_strength
        self.drift, self.shift = drift, 0.0
        self._row = {}  # id -> its row of _seen
        # Successes and trials, (rows, 1 + WINDOW, 2): first the discounted sums,
        # then visit by visit, newest first. The last row is that of unseen ids.
        self._seen = np.zeros((1, 1 + WINDOW, 2))

    @staticmethod
    def _keys(ids):  # a str or an int each, as in JSON
        return [i if isinstance(i, str) else index(i) for i in ids]

    def _rows(self, ids):
        return [self._row.get(i, -1) for i in self._keys(ids)]

    def update(self, ids, successes, trials) -> None:
        """A visit: successes[i] of the trials[i] rollouts of ids[i] were right."""
        ids = self._keys(ids)
        s, t = both = np.array([successes, trials], float)  # (2, M)
        ok = (both % 1 == 0).all() and (0 <= s).all() and (s <= t).all()
        _need(ok and s.shape == (len(ids),), "pass whole successes <= trials, one an id")
        got = t > 0  # without a rollout it was no visit
        # An empty tracker expects nothing, so its first batch is no surprise.
        if self.drift and self._row and got.any():
            rates = (s[got] / t[got]).mean(), self.estimate(ids)[got].mean()
            rates = np.clip(rates, 0.01, 0.99)  # no infinite surprise
            came, expected = np.log(rates / (1 - rates))  # log-odds
            self.shift += float(self.drift * (came - expected))
        for i in ids:
            self._row.setdefault(i, len(self._row))
        new = len(self._row) + 1 - len(self._seen)
        self._seen = np.pad(self._seen, ((0, new), (0, 0), (0, 0)))
        # An id given twice was visited once: its counts add up.
        visit = np.zeros((len(self._seen), 2))
        np.add.at(visit, self._rows(ids), both.T)
        rows = np.flatnonzero(visit[:, 1])
        self._seen[rows, 2:] = self._seen[rows, 1:-1]  # the oldest drops out
        self._seen[rows, 1] = visit[rows]
        self._seen[rows, 0] = self.discount * self._seen[rows, 0] + visit[rows]

    def prior(self) -> tuple[float, float]:
        """(alpha0, beta0), from mean and variance of the success rates so far."""
        s, t = self._seen[self._seen[:, 0, 1] > 0, 0].T
        mean = ((s / t).sum() + 1) / (len(t) + 2)  # never exactly 0 or 1
        # Rates differ by rho = 1 / (alpha + beta + 1), and as trials are few:
        # Var[s/t] = mean (1 - mean) (rho + (1 - rho) E[1/t]).
        rho = 1 / 3  # the uniform Beta(1, 1), before there is a variance
        if len(t) > 1:
            few = min((1 / t).mean(), 0.9)
            variance = ((s / t - mean) ** 2).mean()
            rho = (variance / (mean * (1 - mean)) - few) / (1 - few)
        total = self.prior_strength * (1 / np.clip(rho, 0.01, 0.9) - 1)
        return float(total * mean), float(total * (1 - mean))

    def posterior(self, ids) -> tuple[np.ndarray, np.ndarray]:
        """(alpha, beta), each (M,). A prompt never seen has the prior."""
        alpha0, beta0 = self.prior()
        s, t = self._seen[self._rows(ids), 0].T
        alpha, beta = alpha0 + s, beta0 + (t - s)
        if not self.shift:
            return alpha, beta
        # The log-odds log(alpha / beta) move; alpha + beta stays.
        mean = alpha / (alpha + beta * np.exp(-self.shift))
        return (alpha + beta) * mean, (alpha + beta) * (1 - mean)

    def estimate(self, ids) -> np.ndarray:
        """(M,) posterior mean of p."""
        alpha, beta = self.posterior(ids)
        return alpha / (alpha + beta)

    def solved(self, ids) -> np.ndarray:
        """(M,) bool: was it ever answered right? (With discount 0: at its last visit.)"""
        return self._seen[self._rows(ids), 0, 0] > 0

    def windowed_rate(self, ids, window: int = WINDOW) -> np.ndarray:
        """(M,) the paper's estimate, NaN if unseen: the mean of the last `window`
        (<= 16) outcomes, or of the whole last visit if that had more."""
        s, t = np.moveaxis(self._seen[self._rows(ids), 1:], -1, 0)  # (M, WINDOW)
        # What the window has room for. A visit may count in part.
        used = np.clip(window - (t.cumsum(1) - t), 0, t)
        with np.errstate(invalid="ignore"):  # unseen: 0 / 0 = NaN
            return (s * used / np.maximum(t, 1)).sum(1) / used.sum(1)

    def state_dict(self) -> dict:
        """Everything, in JSON types. Ids are values: as a key, 7 would become "7"."""
        settings = {k: x for k, x in vars(self).items() if k[0] != "_"}
        return settings | {"ids": list(self._row), "seen": self._seen.tolist()}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a state_dict, bit for bit."""
        for name in ("discount", "prior_strength", "drift", "shift"):
            setattr(self, name, state[name])
        self._row = {i: row for row, i in enumerate(state["ids"])}
        self._seen = np.array(state["seen"], float)


# ---- 2. Value: what is a group of n rollouts worth? ----
def prob_nonzero_gradient(n, p) -> np.ndarray:
    """P(mixed group) = 1 - p^n - (1-p)^n, the paper's ProbNonZeroGradient: where
    all are right or all are wrong, advantages are zero. n and p broadcast."""
    n, p = np.asarray(n, float), np.asarray(p, float)
    _need((p >= 0) & (p <= 1), "pass probabilities from 0 to 1")
    m = np.minimum(p, 1 - p)  # for a tiny m, 1 - (1-m)^n would round to 0
    return np.where(n <= 1, 0.0, -np.expm1(n * np.log1p(-m)) - m**n)


def info_gain(p) -> np.ndarray:
    """The paper's InfoGain = p (1-p)^2: about how far a gradient step lifts p."""
    return np.asarray(p) * (1 - np.asarray(p)) ** 2  # highest at 1/3


def value(n, p) -> np.ndarray:
    """The paper's value of n rollouts: P(mixed group) x InfoGain."""
    return prob_nonzero_gradient(n, p) * info_gain(p)


# Rollout n + 1 adds  value(n+1, p) - value(n, p) = p q^2 (p^n q + q^n p).  It falls
# as n grows. Both terms are products, so no digits are lost in a difference.
def _gains(p, levels: int):
    """(levels, M): what rollouts 2, 3, ... add, for known p or (alpha, beta)."""
    posterior = isinstance(p, tuple)
    if posterior:  # the exact average over p ~ Beta(a, b)
        a, b = (np.asarray(x, float) for x in p)
        s = a + b
        ok = (a >= 0) & (b >= 0) & (s > 0) & (s < np.inf)
        _need(ok, "pass finite alpha, beta >= 0, not both 0")
        # E[p q^2], times which p q^2 Beta(a, b) is Beta(a + 1, b + 2).
        first = a / s * (b / (s + 1)) * ((b + 1) / (s + 2))
        a, b = a + 1, b + 2
        first = first * (a / (a + b)) * (b / (a + b + 1))
    else:
        p = np.asarray(p, float)
        q = 1 - p
        _need((p >= 0) & (q >= 0), "pass probabilities from 0 to 1")
        first = p * q * q * p * q
    gains = np.empty((levels, len(first)))
    right = wrong = first  # the two terms at n = 1
    for n, row in enumerate(gains, start=1):
        row[:] = right + wrong
        if posterior:  # E[p^(n+1) q] / E[p^n q], and the same for q
            s = a + b + (n + 1)
            p, q = (a + n) / s, (b + n) / s
        right, wrong = right * p, wrong * q
    return gains


def expected_value(n, alpha, beta) -> np.ndarray:
    """E[value(n, p)] for p ~ Beta(alpha, beta): n - 1 gains summed. Broadcasts."""
    n, alpha, beta = np.broadcast_arrays(n, alpha, beta)
    gains = _gains((alpha.ravel(), beta.ravel()), n.max(initial=1) - 1)
    worth = np.vstack([np.zeros((2, n.size)), gains]).cumsum(0)  # row n
    return worth[n.ravel(), np.arange(n.size)].reshape(n.shape)


# ---- 3. Two theorems: how many rollouts does a gradient take? ----
def expected_rollouts(p) -> np.ndarray:
    """Until a group is mixed: 1/p + 1/(1-p) - 1 rollouts on average."""
    p = np.asarray(p, float)
    with np.errstate(divide="ignore"):  # p in {0, 1}: inf
        return 1 / p + 1 / (1 - p) - 1


def rollouts_for_confidence(p, confidence) -> tuple[np.ndarray, np.ndarray]:
    """The smallest n with P(mixed group) >= confidence, and the paper's count,
    ln(1 - confidence) / ln(max(p, q)), which is too small by up to 2."""
    p, c = np.asarray(p, float), np.asarray(confidence, float)
    with np.errstate(all="ignore"):  # p in {0, 1}: inf
        paper = np.log1p(-c) / np.log1p(-np.minimum(p, 1 - p))
        n = np.ceil(paper * (1 - 1e-14))  # whole numbers come out a hair high
        # One more suffices, as p^n + q^n <= max(p, q)^(n-1).
        return n + (prob_nonzero_gradient(n, p) < c), paper


# ---- 4. The knapsack, exactly: dynamic programming ----
def solve_dp(values, capacity: int, costs=None, spend_all=False) -> np.ndarray:
    """Multiple-choice knapsack: an option of each item, (M,), of the best total.

    values (M, K): what each option is worth; -inf forbids it. costs (M, K): whole
    numbers, in sum <= capacity (spend_all: equal to it). None: option k costs k, as k
    more rollouts do."""
    values = np.asarray(values, float)
    _need(values < np.inf, "values: pass finite ones, or -inf to forbid")
    _need(capacity >= 0, f"capacity = {capacity}: pass a whole number >= 0")
    m, k = values.shape
    costs = np.broadcast_to(np.arange(k) if costs is None else costs, (m, k))
    _need((costs >= 0) & (costs % 1 == 0), "costs: pass whole numbers >= 0")
    costs = np.minimum(costs, capacity + 1).astype(int)  # dearer: out of reach
    # best[c]: the highest total of the items so far at a cost of at most c (spend_all:
    # of c).
    best = np.full(capacity + 1, -np.inf if spend_all else 0.0)
    best[0] = 0
    choice = np.empty((m, capacity + 1), np.min_scalar_type(k - 1))
    for i in range(m):
        total = np.full((k, capacity + 1), -np.inf)  # [k, c]: with option k
        for row, v, cost in zip(total, values[i], costs[i], strict=True):
            row[cost:] = best[: capacity + 1 - cost] + v
        choice[i], best = total.argmax(0), total.max(0)
    _need(best[-1] > -np.inf, f"capacity = {capacity}: no choice fits")
    picks, left = np.zeros(m, np.int64), capacity
    for i in reversed(range(m)):
        picks[i] = choice[i, left]
        left -= costs[i, picks[i]]
    return picks


def solve_dp_torch(values, capacity: int):
    """solve_dp with unit costs for a float tensor (M, K), on its device."""
    import torch  # the rest does without it

    _need(bool((values < torch.inf).all()), "values: pass finite ones, or -inf to forbid")
    _need(capacity >= 0, f"capacity = {capacity}: pass a whole number >= 0")
    wall = values.new_full((values.shape[1] - 1,), -torch.inf)
    best, choice = values.new_zeros(capacity + 1), []
    for row in values:
        # Row k of `moved` is `best`, moved to the right by k from behind a wall.
        moved = torch.cat([wall, best]).unfold(0, capacity + 1, 1).flip(0)
        best, k = (moved + row[:, None]).max(0)  # of (K, capacity + 1)
        choice.append(k.int().cpu())
    _need(bool(best[-1] > -torch.inf), f"capacity = {capacity}: no choice fits")
    picks = torch.zeros(len(values), dtype=torch.int64)
    for i in reversed(range(len(values))):
        picks[i] = choice[i][capacity - picks.sum()]
    return picks.to(values.device)


# ---- 5. The fast path: buy the best next rollout, again and again ----
def solve_greedy(values, capacity: int) -> np.ndarray:
    """solve_dp for concave rows and unit costs, (M,), all capacity spent: takes the
    largest gains. As a row's gains fall, its largest are its first: they can be had."""
    _need(_concave(values), "values are not concave: use solve_dp")
    _need(capacity >= 0, f"capacity = {capacity}: pass a whole number >= 0")
    return _largest(np.diff(np.asarray(values, float)).T, capacity)


def _concave(values) -> bool:
    size = np.abs(np.asarray(values, float))
    if not np.isfinite(size).all():
        return False
    # What three neighbours may be off by rounding.
    rounding = 1e-12 * np.maximum(np.maximum(size[:, :-2], size[:, 1:-1]), size[:, 2:])
    return bool((np.diff(values, 2) <= rounding).all())


def _largest(gains, capacity: int):
    """(M,): how many of the largest gains (levels, M) lie in each column."""
    capacity = min(capacity, gains.size)
    if capacity == 0:
        return np.zeros(gains.shape[1], int)
    price = np.partition(gains.ravel(), -capacity)[-capacity]
    counts = np.count_nonzero(gains > price, axis=0)
    # Of equal gains the lower level, then the lower index goes first.
    equal = np.flatnonzero(gains == price)[: capacity - counts.sum()]
    return counts + np.bincount(equal % len(counts), minlength=len(counts))


# ---- 6. Allocation ----
def allocate(p, budget: int, n_min=2, n_max=128, value=None) -> np.ndarray:
    """Counts (M,) from n_min to n_max, in sum the budget, of the highest value.

    p: known, (M,), or a tuple, the (alpha, beta) of a posterior. Prompts that gain
    nothing, p = 0 and p = 1, get what nobody else can use. value=None is the paper's,
    above. Your own takes counts (K,) and probabilities (M, 1); -inf forbids a count.
    Over a posterior it is averaged. If its gains fall the greedy solves it, else
    solve_dp does.

    >>> def my_value(n, p):
    ...     return prob_nonzero_gradient(n, p)  # all mixed groups are worth the same
    >>> allocate([0.1, 0.5, 0.8], 24, value=my_value)
    array([11,  5,  8])
    """
    m, room = _gains(p, 0).shape[1], n_max - n_min  # checks p, too
    spare = _spare(m, budget, n_min, n_max)
    if value is not None:
        values = _table(value, p, np.arange(n_min, n_max + 1))  # (M, K)
        _need(values < np.inf, "value: return finite numbers, or -inf to forbid a count")
        if _concave(values):
            return n_min + solve_greedy(values, spare)
        return n_min + solve_dp(values, spare, spend_all=True)
    levels = 8 + 3 * spare // max(m, 1)  # enough for most budgets
    while True:
        levels = min(levels, room)
        extra = _largest(_gains(p, n_min - 1 + levels)[n_min - 1 :], spare)
        # Who bought all levels may want more. As gains fall, nobody else does.
        if levels == room or extra.max(initial=0) < levels:
            return n_min + extra
        levels *= 2


def _spare(m: int, budget: int, n_min: int, n_max: int) -> int:
    """What is left of the budget once each of m prompts has n_min."""
    _need(1 <= n_min <= n_max, f"choose n_min = {n_min} from 1 to n_max = {n_max}")
    low, high, least = m * n_min, m * n_max, f"{m} prompts x n_min = {n_min}"
    _need(budget >= low, f"budget {budget} < {least}: raise budget, or lower n_min")
    most = f"{m} prompts x n_max = {n_max}"
    _need(budget <= high, f"budget {budget} > {most}: lower budget, or raise n_max")
    return index(budget) - m * n_min


def _table(value, p, n, points=32):
    """(M, K) of value(n, p). Over a posterior its average by Gauss-Jacobi
    quadrature, exact for polynomials in p of degree < 2 x points."""
    if not isinstance(p, tuple):
        p = np.asarray(p, float)[:, None]  # (M, 1)
        return np.broadcast_to(value(n, p), (len(p), len(n)))
    # Golub and Welsch (1969): the nodes are the eigenvalues of a tridiagonal
    # matrix of Beta's canonical moments c_1, c_2, ..., of which c_1 is the mean.
    (a, b), k = (np.reshape(np.asarray(x, float), (-1, 1)) for x in p), np.arange(points)
    odd = (a + k) / (a + b + 2 * k)  # c_1, c_3, c_5, ...
    even = k / (a + b + np.abs(2 * k - 1))  # 0, c_2, c_4, ...
    up, down = (1 - even) * odd, even * (1 - np.roll(odd, 1, axis=1))
    off = np.sqrt(np.roll(up, 1, axis=1) * down)
    matrix = (up + down)[..., None] * np.eye(points)  # (M, points, points)
    matrix += off[..., None] * np.eye(points, k=-1)  # eigh reads the lower half
    nodes, vectors = np.linalg.eigh(matrix)
    # A weight of 0 would make NaN of -inf.
    nodes, weights = nodes.clip(0, 1)[..., None], vectors[:, 0, :, None] ** 2 + 1e-300
    return sum(weights[:, j] * value(n, nodes[:, j]) for j in k) + np.zeros(len(n))


def allocate_paper(p_hat, budget: int, n_min=2, n_max=128) -> np.ndarray:
    """The paper's rule, on tracker.windowed_rate(ids). NaN (first epoch): uniform.

    All get n_min. Those with p_hat between 0 and 1 then share a knapsack. It holds at
    most what they would need, all together, to be mixed with probability 0.9 (theorem
    above). What is left goes to p_hat = 0. Where n_max is in the way, it goes back into
    the knapsack, and last to p_hat = 1."""
    p_hat = np.asarray(p_hat, float)  # (M,)
    left, room = _spare(len(p_hat), budget, n_min, n_max), n_max - n_min
    if np.isnan(p_hat).any():
        return uniform(len(p_hat), budget)
    hard, easy = p_hat == 0, p_hat == 1  # (M,) bool
    rest = ~hard & ~easy
    need, m = rollouts_for_confidence(p_hat[rest], 0.9)[1], rest.sum()
    need = np.minimum(need, n_max).astype(int).sum()
    to_hard = min(left - min(left, need, room * m), room * hard.sum())
    shared = min(left - to_hard, room * m)
    counts = np.full(len(p_hat), n_min)
    counts[rest] = allocate(p_hat[rest], shared + n_min * m, n_min, n_max)
    counts[hard] += uniform(hard.sum(), to_hard)
    counts[easy] += uniform(easy.sum(), left - to_hard - shared)
    return counts


def uniform(m: int, budget: int) -> np.ndarray:
    """GRPO's rule: budget / m each (M,). The first prompts take the remainder."""
    _need(budget >= 0 and (m or not budget), f"{m} prompts, budget = {budget}")
    return np.bincount(np.arange(budget) % max(m, 1), minlength=m)


def allocate_saving(posterior, budget: int, n_min=2, mixed=0.3) -> np.ndarray:
    """Uniform's counts (M,), but n_min where a group is mixed with a probability below
    `mixed`: fewer rollouts than the budget. P(mixed) is averaged over the posterior.

    posterior: (alpha, beta), (M,) each."""
    even = uniform(len(posterior[0]), budget)  # (M,), of two values at most
    n, which = np.unique(even, return_inverse=True)
    p_mixed = _table(prob_nonzero_gradient, tuple(posterior), n)[np.arange(len(even)), which]
    return np.where(p_mixed < mixed, np.minimum(n_min, even), even)


def shadow_price(p, counts, n_max: int = 128) -> float:
    """What one more unit of budget is worth: about the value of the last rollout that
    was bought. Rollouts that n_min forced are left out if they are worth less than the
    best one that was refused."""
    counts = np.asarray(counts, int)  # (M,)
    _need(counts >= 1, "counts: pass numbers >= 1")
    gains = _gains(p, counts.max(initial=1))
    each = np.arange(gains.shape[1])
    refused = gains[counts - 1, each][counts < n_max].max(initial=0)
    last = gains[counts - 2, each][counts > 1]  # a single one was never bought
    return float(min(last[last >= refused], default=refused))


def allocate_at_price(p, price: float, n_min=2, n_max=128) -> np.ndarray:
    """Counts (M,): n_min, and up to n_max what is worth at least `price`. At
    shadow_price(p, counts) the counts of allocate come back, but for ties."""
    _need(price >= 0 and 1 <= n_min <= n_max, "need price >= 0, 1 <= n_min <= n_max")
    worth = _gains(p, n_max - 1)[n_min - 1 :] >= price  # (levels, M)
    return n_min + np.count_nonzero(worth, axis=0)
