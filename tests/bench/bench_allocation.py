"""Allocation rules replayed on the success rates of a real training run, at equal rollouts.

    python tests/bench/bench_allocation.py TRACES.jsonl [--seeds 20]     # three minutes on one core

TRACES.jsonl holds one prompt a row, {"rates": [success rate at each visit], "trials_per_visit": 8}. Each
trace is smoothed (a Gaussian of 3 visits, plus a quarter of a success and of a failure, so that no prompt
is certain) and then taken as the true p of that visit. Every epoch visits every prompt once, in batches of
128; a rule spends 8 rollouts a prompt; Binomial(N, p) outcomes feed the tracker. The rules do not change
p: a replay shows what a rule would have sampled on this model's way, not what the model would have learnt.

Columns: effective_rollouts, share of rollouts in mixed groups; effective_prompts, share of visits whose
group is mixed; solved, prompts answered right at least once; value, the mean true value of a group (the
knapsack's own objective); largest group. +- is the standard error over seeds; all rules have the same seeds
and the same batches. Writes tutorial/results/allocation_replay.json.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import knapsack  # noqa: E402

OUT = ROOT / "tutorial" / "results" / "allocation_replay.json"
BATCH, EACH, VISITS = 128, 8, 44  # the shortest trace has 44 visits


def load(path):
    """(prompts, VISITS) smoothed success rates."""
    p = []
    for line in open(path, encoding="utf-8"):
        row = json.loads(line)
        rates, n = np.array(row["rates"]), row["trials_per_visit"]
        visit = np.arange(len(rates))
        w = n * np.exp(-0.5 * ((visit[:, None] - visit) / 3) ** 2)
        p.append(((w @ rates + 0.25) / (w.sum(1) + 0.5))[:VISITS])
    return np.array(p)


# P(mixed) x (InfoGain + bonus): chapter 9's example of a value of one's own. The two numbers were chosen with
# a former tracker, and not again.
def with_bonus(tracker, ids, p, budget):
    bonus = np.where(tracker.solved(ids), 0.01, 0.3)[:, None]  # (M, 1)

    def value(n, p):
        return knapsack.prob_nonzero_gradient(n, p) * (knapsack.info_gain(p) + bonus)

    return knapsack.allocate(tracker.posterior(ids), budget, value=value)


RULES = {
    "uniform": lambda tracker, ids, p, budget: knapsack.uniform(len(ids), budget),
    "paper": lambda tracker, ids, p, budget: knapsack.allocate_paper(tracker.windowed_rate(ids), budget),
    "knapsack": lambda tracker, ids, p, budget: knapsack.allocate(tracker.posterior(ids), budget),
    "oracle of p": lambda tracker, ids, p, budget: knapsack.allocate(p, budget),
    "knapsack with a bonus": with_bonus,
}
NAMES = ("effective_rollouts", "effective_prompts", "solved", "value", "largest")


def replay(p, rule, seed):
    rng, tracker = np.random.default_rng(seed), knapsack.SuccessTracker()
    rollouts = prompts = worth = largest = 0
    for visit in range(p.shape[1]):
        order = rng.permutation(len(p))
        for ids in np.split(order, range(BATCH, len(p), BATCH)):
            now = p[ids, visit]
            counts = rule(tracker, ids, now, EACH * len(ids))
            s = rng.binomial(counts, now)
            mixed = (s > 0) & (s < counts)
            rollouts += counts[mixed].sum()
            prompts += mixed.sum()
            worth += knapsack.value(counts, now).sum()
            largest = max(largest, counts.max())
            tracker.update(ids, s, counts)
    solved = tracker.solved(np.arange(len(p))).sum()
    return rollouts / (EACH * p.size), prompts / p.size, solved, worth / p.size, largest


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("traces", help="JSON Lines of success-rate traces")
    parser.add_argument("--seeds", type=int, default=20)
    args = parser.parse_args()

    p, rules = load(args.traces), {}
    print(f"{len(p)} prompts, {VISITS} visits, {args.seeds} seeds")
    print(f"{'':22}" + "".join(f"{name:>20}" for name in NAMES))
    for name, rule in RULES.items():
        x = np.array([replay(p, rule, seed) for seed in range(args.seeds)])  # (seeds, columns)
        error = x.std(0, ddof=1) / args.seeds**0.5
        pairs = [(round(float(m), 5), round(float(e), 5)) for m, e in zip(x.mean(0), error, strict=True)]
        rules[name] = dict(zip(NAMES, pairs, strict=True))
        print(f"{name:22}" + "".join(f"{m:11.4f} +- {e:.4f}" for m, e in pairs), flush=True)
    result = {"prompts": len(p), "visits": VISITS, "batch": BATCH, "rollouts_per_prompt": EACH}
    OUT.write_text(json.dumps(result | {"seeds": args.seeds, "rules": rules}, indent=1) + "\n")


if __name__ == "__main__":
    main()
