"""Which estimate of p foresees the next visit best? No training: recorded outcomes are replayed.

    python tutorial/compare_estimates.py [GROUPS.jsonl ...] [--traces TRACES.jsonl]

A run's groups.jsonl says, step by step, which prompts were visited and how many of how many
rollouts were right. Before each visit an estimator states its Beta posterior; its score is the
log-probability that it gave to what then came, in nats a rollout, over prompts seen before. That
is a proper score: nobody does better on average than with the true distribution. Each is compared
with the default, step by step; ± is the standard error of the mean difference over steps, taken as
independent, which they need not be.

The recorded runs of results/ are always replayed. TRACES.jsonl holds one prompt a row, {"rates":
[success rate at each visit], "trials_per_visit": 8}, as of a real run of Qwen2.5-Math-1.5B. The
table goes to results/estimates.json, where other records stay as they are. (long-uniform there is
a run of where_it_pays.py, uniform with 203 rollouts a step, whose groups.jsonl was not kept.)
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import evaluate  # noqa: E402
import reward  # noqa: E402
from knapsack import SuccessTracker  # noqa: E402

RECORDED = ["tiny-knapsack-seed0", *(f"smollm2-{rule}-seed0" for rule in ("uniform", "knapsack", "paper"))]


# ---- Estimators: SuccessTrackers with another posterior(ids) -> (alpha, beta) --------------------------
# Moves the log-odds of Beta(alpha, beta); alpha + beta stays.
def moved(alpha, beta, shift):
    mean = alpha / (alpha + beta * np.exp(-shift))
    return (alpha + beta) * mean, (alpha + beta) * (1 - mean)


class Window(SuccessTracker):
    """The paper's mean of the newest outcomes, kept away from 0 and 1, or nobody could score it."""

    def posterior(self, ids, least=0.05, sure=1e6):
        p = np.nan_to_num(self.windowed_rate(ids), nan=0.5).clip(least, 1 - least)
        return sure * p, sure * (1 - p)


class Aging(SuccessTracker):
    """A record weighs less with each step since its prompt's last visit: it loses a share of itself."""

    share = 0.03

    def __init__(self, *settings):
        super().__init__(*settings)
        self.step, self.visited = 0, {}

    def posterior(self, ids):
        age = np.array([self.step - self.visited.get(i, self.step) for i in ids])
        prior = moved(*self.prior(), self.shift)
        both = zip(prior, super().posterior(ids), strict=True)
        return tuple(a0 + (a - a0) * (1 - self.share) ** age for a0, a in both)

    def update(self, ids, successes, trials):
        super().update(ids, successes, trials)
        self.step += 1
        self.visited |= dict.fromkeys(ids, self.step)


class DiscountFirst(SuccessTracker):
    """The record is discounted when it is asked, and not only when the next outcomes are added."""

    def posterior(self, ids):
        s, t = self.discount * self._seen[self._rows(ids), 0].T
        alpha0, beta0 = self.prior()
        return moved(alpha0 + s, beta0 + t - s, self.shift)


class Fitted(SuccessTracker):
    """The drift is fitted: a Kalman filter of one common shift, which walks at random. `walk`, the
    variance of its steps, is learned from how large the surprises of revisited prompts are."""

    variance = walk = 0.02

    def update(self, ids, successes, trials):
        seen = np.array([i in self._row for i in ids])
        if seen.any():
            alpha, beta = (x[seen] for x in self.posterior(ids))
            s, t = np.array(successes)[seen], np.array(trials)[seen]
            p = alpha / (alpha + beta)
            spread = 1 + (t - 1) / (alpha + beta + 1)  # of a Beta-binomial, over a binomial's
            noise = 1 / (t * p * (1 - p) / spread).sum()
            surprise = np.clip(noise * ((s - t * p) / spread).sum(), -1, 1)  # in log-odds
            self.variance += self.walk
            gain = self.variance / (self.variance + noise)
            unexplained = surprise**2 - self.variance - noise
            self.walk = max(1e-4, self.walk + 0.1 * gain * unexplained)
            self.shift += gain * surprise
            self.variance *= 1 - gain
        super().update(ids, successes, trials)  # whose own drift is 0


class ByFeatures(SuccessTracker):
    """The prior's mean depends on the prompt: a logistic regression on all that was seen, with a ridge."""

    features = None  # {id: (F,)}
    ridge = 0.1

    def __init__(self, *settings):
        super().__init__(*settings)
        self.weights = np.zeros(len(next(iter(self.features.values()))))  # (F,)

    def known_of(self, ids):
        return np.array([self.features[i] for i in ids])  # (M, F)

    def posterior(self, ids):
        odds = np.clip(self.known_of(ids) @ self.weights, -30, 30)
        s, t = self._seen[self._rows(ids), 0].T
        total = sum(self.prior())
        p = 1 / (1 + np.exp(-odds))
        return moved(total * p + s, total * (1 - p) + t - s, self.shift)

    def update(self, ids, successes, trials):
        super().update(ids, successes, trials)
        x, (s, t), w = self.known_of(self._row), self._seen[:-1, 0].T, self.weights
        for _ in range(5):  # Newton's steps
            p = 1 / (1 + np.exp(np.clip(-x @ w, -30, 30)))
            slope = x.T @ (s - t * p) - self.ridge * w
            curvature = (x.T * (t * p * (1 - p))) @ x + self.ridge * np.eye(len(w))
            w = w + np.linalg.solve(curvature, slope)
        self.weights = w


class ByLength(ByFeatures):
    """The prompt's length, and its square."""


class ByHidden(ByFeatures):
    """The mean hidden state of the prompt's tokens before training, each number standardised."""

    ridge = 10.0


# What the two know of the embedded model's problems.
def features() -> tuple[dict, dict]:
    import torch

    import rollout

    tasks = reward.load_tasks("arithmetic")
    model, tokenizer = rollout.load_model(rollout.resolve_model("tiny"))
    with torch.no_grad():
        ids = [torch.tensor([x]) for x in rollout.encode_tasks(tokenizer, tasks).values()]
        states = [model.model(x).last_hidden_state[0].mean(0).numpy() for x in ids]
    hidden = (np.array(states) - np.mean(states, 0)) / np.std(states, 0)
    lengths = np.array([len(t.prompt) for t in tasks]) / 20
    ones = np.ones((len(tasks), 1))
    both = np.stack([lengths, lengths**2], axis=1), hidden
    return tuple(dict(zip([t.id for t in tasks], np.hstack([ones, x]), strict=True)) for x in both)


DEFAULT = "default: discount .75, prior 1, drift .3"
ESTIMATORS = {
    DEFAULT: SuccessTracker,
    "the paper's window": Window,
    "mean of all outcomes": lambda: SuccessTracker(1, 1, 0),
    "former default: prior .25, no drift": lambda: SuccessTracker(0.75, 0.25, 0),
    "no drift": lambda: SuccessTracker(0.75, 1, 0),
    "drift .1": lambda: SuccessTracker(0.75, 1, 0.1),
    "drift .6": lambda: SuccessTracker(0.75, 1, 0.6),
    "drift fitted online": lambda: Fitted(0.75, 1, 0),
    "prior .25": lambda: SuccessTracker(0.75, 0.25, 0.3),
    "prior .5": lambda: SuccessTracker(0.75, 0.5, 0.3),
    "prior 2": lambda: SuccessTracker(0.75, 2, 0.3),
    "discount 0": lambda: SuccessTracker(0, 1, 0.3),
    "discount .5": lambda: SuccessTracker(0.5, 1, 0.3),
    "discount .9": lambda: SuccessTracker(0.9, 1, 0.3),
    "discount 1": lambda: SuccessTracker(1, 1, 0.3),
    "aging": lambda: Aging(0.75, 1, 0.3),
    "discount first": lambda: DiscountFirst(0.75, 1, 0.3),
    "discount first, .5": lambda: DiscountFirst(0.5, 1, 0.3),
    "prior by length": lambda: ByLength(0.75, 1, 0.3),
    "prior by hidden state": lambda: ByHidden(0.75, 1, 0.3),
}


# ---- Scores --------------------------------------------------------------------------------------------
def log_score(alpha, beta, successes, trials) -> np.ndarray:
    """log P(these outcomes in this order) for p ~ Beta(alpha, beta), (M,): with
    x^(k) = x (x + 1) ... (x + k - 1) it is log alpha^(s) + log beta^(t-s) - log (alpha + beta)^(t)."""

    def log_rising(x, k):
        j = np.arange(max(k.max(), 1))
        return np.where(j < k[:, None], np.log(x[:, None] + j), 0).sum(1)

    s, t = np.asarray(successes), np.asarray(trials)
    return log_rising(alpha, s) + log_rising(beta, t - s) - log_rising(alpha + beta, t)


# What a tracker scores on a record, a row a step: (steps, 4), sums over prompts seen before, of the
# score and of the rollouts, then the same of new ones.
def replay(tracker, steps) -> np.ndarray:
    found, seen = [], set()
    for ids, s, t in steps:
        old = np.array([i in seen for i in ids])
        score = log_score(*tracker.posterior(ids), s, t)  # (M,)
        found.append([score[old].sum(), t[old].sum(), score[~old].sum(), t[~old].sum()])
        tracker.update(ids, s, t)
        seen.update(ids)
    return np.array(found)


# A ratio of sums over steps, and the standard error of its difference from `base`'s.
def compare(steps: np.ndarray, base: np.ndarray) -> dict:
    each = (steps[:, 0] - base[:, 0]) / base[:, 1].mean()  # (steps,): its mean is the difference
    new = steps[:, 3].sum()
    return {
        "score": round(float(steps[:, 0].sum() / steps[:, 1].sum()), 4),
        "minus_default": round(float(each.mean()), 4),
        "se": round(float(each.std(ddof=1) / len(each) ** 0.5), 4),
        "new_prompts": round(float(steps[:, 2].sum() / new), 4) if new else None,
    }


# ---- Records -------------------------------------------------------------------------------------------
def of_run(path: Path) -> list[tuple]:
    return [(g["ids"], np.array(g["successes"]), np.array(g["counts"])) for g in evaluate.each_row(path)]


# Each visit comes in a shuffled order of batches of 128, as in training.
def of_traces(path: Path, batch=128) -> list[tuple]:
    rows, rng, steps = list(evaluate.each_row(path)), np.random.default_rng(0), []
    for visit in range(min(len(row["rates"]) for row in rows)):
        order = rng.permutation(len(rows))
        for part in np.split(order, range(batch, len(rows), batch)):
            t = np.array([rows[i]["trials_per_visit"] for i in part])
            s = np.rint([rows[i]["rates"][visit] for i in part] * t).astype(int)
            steps.append((part.tolist(), s, t))
    return steps


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("groups", nargs="*", type=Path, metavar="GROUPS.jsonl", help="of other runs")
    parser.add_argument("--traces", type=Path, help="success rates, a prompt a row")
    args = parser.parse_args()
    records = {name: of_run(HERE / "results" / name / "groups.jsonl") for name in RECORDED}
    records |= {path.name.removesuffix(".groups.jsonl"): of_run(path) for path in args.groups}
    if args.traces:
        records["Qwen2.5-Math-1.5B"] = of_traces(args.traces)
    ByLength.features, ByHidden.features = features()
    path = HERE / "results" / "estimates.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    for record, steps in records.items():
        base = replay(SuccessTracker(), steps)
        known = {i for ids, _, _ in steps for i in ids} <= set(ByLength.features)
        result[record] = {"rollouts": int(base[:, 1].sum())}
        print(f"{record}: {result[record]['rollouts']:,} rollouts of prompts seen before")
        for name, make in ESTIMATORS.items():
            if known or not name.startswith("prior by"):
                row = result[record][name] = compare(replay(make(), steps), base)
                print(f"  {name:42} {row['score']:.4f}  {row['minus_default']:+.4f} ± {row['se']:.4f}")
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
