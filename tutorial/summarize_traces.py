"""What chapters 1 and 2 need of the success-rate traces of a real training run.

    python tutorial/summarize_traces.py TRACES.jsonl      # writes tutorial/results/traces_summary.json

TRACES.jsonl: one prompt a row, {"rates": [success rate at each visit], "trials_per_visit": 8}. The traces are
those of Qwen2.5-Math-1.5B in a 500-step GRPO run, published in ypwang61/One-Shot-RLVR
(data/acc_step_500.json, Apache-2.0), about half of its prompts.

Three estimators see each prompt's visits one after the other, as in training, and before each visit say what
p is and how probable a mixed group of 8 is; the visit's 8 rollouts are the answer. Written: for each visit,
how many prompts were right k times; for each estimator, a table of what was predicted and what came (by
predicted p), and its mean squared error for the rate of the 8 rollouts; how far p moves between visits.
"""

import json
import re
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import knapsack  # noqa: E402

VISITS = 44  # the shortest trace
EDGES = [0, 1e-9, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.98, 1 - 1e-9, 1.1]  # 0 and 1 apart
GRID = {"discount": [0, 0.25, 0.5, 0.75, 0.9, 1], "prior_strength": [0.05, 0.25, 1, 4]}


def predictions(tracker, ids, n: int) -> dict:
    """{estimator: (p, P(mixed group of n))}, each (M,)."""
    window, last = tracker.windowed_rate(ids), tracker.windowed_rate(ids, n)
    mixed = knapsack._table(knapsack.prob_nonzero_gradient, tracker.posterior(ids), np.array([n]))[:, 0]
    return {
        "posterior": (tracker.estimate(ids), mixed),
        "window of 16": (window, knapsack.prob_nonzero_gradient(n, window)),
        "last visit": (last, knapsack.prob_nonzero_gradient(n, last)),
    }


def table(p, mixed, rate, was_mixed) -> list[list[float]]:
    """Rows [how many, mean predicted p, mean rate that came, predicted P(mixed), share that was mixed]."""
    rows, which = [], np.digitize(p, EDGES)
    for i in np.unique(which):
        means = [np.mean(x[which == i]) for x in (p, rate, mixed, was_mixed)]
        rows.append([int((which == i).sum()), *(round(float(m), 4) for m in means)])
    return rows


def moved(right, n: int, lag: int) -> list[float]:
    """How far p moves in `lag` visits: [mean square, standard error over prompts]. The noise of the two
    rates, p(1-p)/n each, is taken off; rate (1 - rate) / (n-1) is that on average."""
    rate = right / n
    square = (rate[:, lag:] - rate[:, :-lag]) ** 2
    noise = rate * (1 - rate) / (n - 1)
    each = (square - noise[:, lag:] - noise[:, :-lag]).mean(1)  # (prompts,)
    return [round(float(x), 5) for x in (each.mean(), each.std(ddof=1) / len(each) ** 0.5)]


def main() -> None:
    rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
    (n,) = {row["trials_per_visit"] for row in rows}
    right = np.array([np.rint(np.array(row["rates"][:VISITS]) * n) for row in rows]).astype(int)
    ids, trials = list(range(len(rows))), np.full(len(rows), n)

    said, came = {}, []
    tracker = knapsack.SuccessTracker()
    for visit in range(VISITS):
        if visit:  # the first visit has nothing to be predicted from
            for name, prediction in predictions(tracker, ids, n).items():
                said.setdefault(name, []).append(prediction)
            came.append(right[:, visit])
        tracker.update(ids, right[:, visit], trials)
    came = np.concatenate(came)
    # Even the true p would miss the rate of n rollouts, by p(1-p)/n, which is what this estimates.
    noise = round(float((came / n * (1 - came / n) / (n - 1)).mean()), 5)
    estimators = {}
    for name, pairs in said.items():
        p, mixed = (np.concatenate(x) for x in zip(*pairs, strict=True))
        error = round(float(((p - came / n) ** 2).mean()), 5)
        rows_of = table(p, mixed, came / n, (came > 0) & (came < n))
        estimators[name] = {"squared_error": error, "table": rows_of}

    squared_errors = []  # (discounts, strengths)
    for discount in GRID["discount"]:
        squared_errors.append([])
        for strength in GRID["prior_strength"]:
            tracker, total = knapsack.SuccessTracker(discount, strength), 0.0
            for visit in range(VISITS):
                if visit:
                    total += ((tracker.estimate(ids) - right[:, visit] / n) ** 2).mean()
                tracker.update(ids, right[:, visit], trials)
            squared_errors[-1].append(round(total / (VISITS - 1), 5))

    result = {
        "source": "ypwang61/One-Shot-RLVR, data/acc_step_500.json (Qwen2.5-Math-1.5B, GRPO, 500 steps)",
        "prompts": len(right),
        "rollouts_per_visit": n,
        "prompts_with_k_right": [np.bincount(v, minlength=n + 1).tolist() for v in right.T],  # (visits, 9)
        "squared_error_of_the_true_p": noise,
        "p_moved": {str(lag): moved(right, n, lag) for lag in (1, 2, 4, 8, 16, 32)},
        "estimators": estimators,
        "grid": GRID | {"squared_error": squared_errors},
    }
    text = re.sub(
        r"\[\s+([^][{}]*?)\s+]", lambda m: f"[{' '.join(m[1].split())}]", json.dumps(result, indent=1)
    )
    (HERE / "results" / "traces_summary.json").write_text(text + "\n")  # one list of numbers a line


if __name__ == "__main__":
    main()
