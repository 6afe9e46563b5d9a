"""Allocation rules replayed on the success rates of a real training run, at equal rollouts.

    python tests/bench/bench_allocation.py TRACES.jsonl [--seeds 20] [--tune] [--out RESULT.json]

TRACES.jsonl holds one prompt a row, {"rates": [success rate at each visit], "trials_per_visit": 8}. Each
trace is smoothed (a Gaussian of 3 visits, plus a quarter of a success and of a failure, so that no prompt
is certain) and then taken as the true p of that visit. Every epoch visits every prompt once, in batches of
128; a rule spends 8 rollouts a prompt; Binomial(N, p) outcomes feed the tracker. The rules do not change
p: a replay shows what a rule would have sampled on this model's way, not what the model would have learnt.

Columns: effective_rollouts, share of rollouts in mixed groups; effective_prompts, share of visits whose
group is mixed; solved, prompts answered right at least once; value, the mean true value of a group (the
knapsack's own objective); largest group. +- is the standard error over seeds; uniform, paper, knapsack
and the others use the same seeds and the same batches.

--tune prints a grid of bonuses on one half of the prompts, takes of those that reach the aims (solved
within 2% of uniform's, as many mixed prompts, effective_rollouts over .70) the one with the most effective
rollouts, and reports it on the other half; then with the halves exchanged. --out writes the results.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import knapsack

BATCH, EACH, VISITS = 128, 8, 44  # the shortest trace has 44 visits
# The tracker's former defaults, with which the rules are compared; the last table has today's.
FORMER = {"discount": 0.75, "prior_strength": 0.25, "drift": 0.0}
SOLVED, UNSOLVED = 0.01, 0.3  # the bonus, chosen by --tune on the first half
BONUS = f"knapsack, bonus {SOLVED} / {UNSOLVED}"


def load(path, width=3.0, pseudo=0.25):
    """(prompts, VISITS) smoothed success rates."""
    p = []
    for line in open(path, encoding="utf-8"):
        row = json.loads(line)
        rates, n = np.array(row["rates"]), row["trials_per_visit"]
        visit = np.arange(len(rates))
        w = n * np.exp(-0.5 * ((visit[:, None] - visit) / width) ** 2)
        p.append(((w @ rates + pseudo) / (w.sum(1) + 2 * pseudo))[:VISITS])
    return np.array(p)


def with_bonus(solved, unsolved):
    """P(mixed) x (InfoGain + bonus)."""

    def rule(tracker, ids, p, budget):
        bonus = np.where(tracker.solved(ids), solved, unsolved)[:, None]  # (M, 1)

        def value(n, p):
            return knapsack.prob_nonzero_gradient(n, p) * (knapsack.info_gain(p) + bonus)

        return knapsack.allocate(tracker.posterior(ids), budget, value=value)

    return rule


def with_floor(floor):
    """The obvious alternative: never-solved prompts get at least `floor`, the knapsack the rest."""

    def rule(tracker, ids, p, budget):
        counts = np.full(len(ids), 2)
        counts[~tracker.solved(ids)] = floor
        if counts.sum() > budget:
            return knapsack.uniform(len(ids), budget)
        gains = np.diff(
            knapsack.expected_value(np.arange(2, 129), *(x[:, None] for x in tracker.posterior(ids)))
        )
        gains[np.arange(126) < (counts - 2)[:, None]] = 1  # bought already, before anything else
        values = np.cumsum(np.pad(gains, ((0, 0), (1, 0))), axis=1)
        return 2 + knapsack.solve_greedy(values, budget - 2 * len(ids))

    return rule


def with_weight(weight):
    def rule(tracker, ids, p, budget):
        weights = np.where(tracker.solved(ids), 1.0, weight)[:, None]  # (M, 1)
        return knapsack.allocate(
            tracker.posterior(ids), budget, value=lambda n, p: weights * knapsack.value(n, p)
        )

    return rule


RULES = {
    "uniform": lambda tracker, ids, p, budget: knapsack.uniform(len(ids), budget),
    "paper": lambda tracker, ids, p, budget: knapsack.allocate_paper(tracker.windowed_rate(ids), budget),
    "knapsack": lambda tracker, ids, p, budget: knapsack.allocate(tracker.posterior(ids), budget),
    "oracle of p": lambda tracker, ids, p, budget: knapsack.allocate(p, budget),
    BONUS: with_bonus(SOLVED, UNSOLVED),
}
OTHERS = {
    f"bonus only for unsolved (0 / {UNSOLVED})": with_bonus(0, UNSOLVED),
    "bonus for all (0.05)": with_bonus(0.05, 0.05),
    "floor of 6 for unsolved": with_floor(6),
    "floor of 8 for unsolved": with_floor(8),
    "weight 10 for unsolved": with_weight(10),
}


def replay(p, rule, seed, **tracker_settings):
    rng, tracker = np.random.default_rng(seed), knapsack.SuccessTracker(**FORMER | tracker_settings)
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


NAMES = ("effective_rollouts", "effective_prompts", "solved", "value", "largest")


def run(p, rule, seeds, **tracker_settings):
    """{name: (mean, standard error)} over seeds."""
    x = np.array([replay(p, rule, seed, **tracker_settings) for seed in range(seeds)])
    error = x.std(0, ddof=1) / seeds**0.5
    return {
        k: (round(float(m), 5), round(float(e), 5)) for k, m, e in zip(NAMES, x.mean(0), error, strict=True)
    }


def show(name, r):
    cells = [f"{r[k][0]:.3f} +- {r[k][1]:.4f}" for k in NAMES[:2]]
    cells += [
        f"{r['solved'][0]:6.1f} +- {r['solved'][1]:.1f}",
        f"{r['value'][0]:.4f}",
        f"{r['largest'][0]:5.1f}",
    ]
    print(f"{name:34}" + "".join(f"{c:>19}" for c in cells[:3]) + f"{cells[3]:>9}{cells[4]:>9}", flush=True)


def meets(r, base):
    """The aims: solved within 2% of uniform's, as many mixed prompts, effective_rollouts over .70."""
    fine = r["solved"][0] >= 0.98 * base["solved"][0] and r["effective_rollouts"][0] > 0.7
    return fine and r["effective_prompts"][0] >= base["effective_prompts"][0]


def against(r, base):
    solved = r["solved"][0] / base["solved"][0] - 1
    mixed = r["effective_prompts"][0] - base["effective_prompts"][0]
    return (
        f"  against uniform: solved {solved:+.1%} (aim: -2% or better), mixed prompts {mixed:+.4f} (aim: 0),"
        f" effective_rollouts {r['effective_rollouts'][0]:.3f} (aim: over .70)"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("traces", help="JSON Lines of success-rate traces")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tune", action="store_true", help="print the grid that chose the bonus")
    parser.add_argument("--out", help="write the results to this JSON file")
    args = parser.parse_args()

    p = load(args.traces)
    halves = np.array_split(np.random.default_rng(0).permutation(len(p)), 2)
    head = f"{'':34}" + "".join(f"{c:>19}" for c in NAMES[:3]) + f"{'value':>9}{'largest':>9}"
    result = {"visits": VISITS, "batch": BATCH, "rollouts_per_prompt": EACH, "seeds": args.seeds}

    if args.tune:
        for tune, report in (halves, halves[::-1]):
            print(f"tuning on {len(tune)} prompts, {args.seeds} seeds\n{head}")
            base, grid = run(p[tune], RULES["uniform"], args.seeds), {}
            show("uniform", base)
            for solved, unsolved in itertools.product((0.0, 0.005, 0.01, 0.02), (0.25, 0.3, 0.35, 0.4, 0.5)):
                r = grid[solved, unsolved] = run(p[tune], with_bonus(solved, unsolved), args.seeds)
                show(f"bonus {solved} / {unsolved}" + "  *" * meets(r, base), r)
            # Of the settings that reach the aims (*), the one with the most effective rollouts.
            best = max(grid, key=lambda k: (meets(grid[k], base), grid[k]["effective_rollouts"][0]))
            print(f"reported on the other {len(report)}: bonus {best[0]} / {best[1]}")
            base, r = (run(p[report], x, args.seeds) for x in (RULES["uniform"], with_bonus(*best)))
            show("uniform", base)
            show(f"bonus {best[0]} / {best[1]}", r)
            print(against(r, base) + "\n")
            fold = {
                "solved": best[0],
                "unsolved": best[1],
                "prompts": len(report),
                "rules": {"uniform": base},
            }
            fold["rules"]["bonus"] = r
            result.setdefault("tuned on one half, reported on the other", []).append(fold)

    for name, part in (("the half not tuned on", p[halves[1]]), ("all prompts", p)):
        print(f"{name}: {len(part)} prompts, {VISITS} visits, {args.seeds} seeds\n{head}")
        rows = RULES | (OTHERS if name != "all prompts" else {})
        rows = {rule: run(part, call, args.seeds) for rule, call in rows.items()}
        for rule, r in rows.items():
            show(rule, r)
        result[name] = {"prompts": len(part), "rules": rows}
        print(against(rows[BONUS], rows["uniform"]) + "\n")
    print(f"(discount, prior_strength, drift), knapsack without a bonus, all prompts\n{head}")
    for key in (
        (0.75, 0.25, 0),
        (0.75, 1, 0),
        (0.5, 1, 0),
        (0.9, 0.25, 0),
        (0.75, 0.25, 0.3),
        (0.75, 1, 0.3),
    ):
        settings = dict(zip(("discount", "prior_strength", "drift"), key, strict=True))
        r = run(p, RULES["knapsack"], args.seeds, **settings)
        show(str(key), r)
        result.setdefault("trackers", []).append(settings | r)
    print(f"\nother readings of the traces as true p, all prompts: does the bonus still hold?\n{head}")
    for width, pseudo in ((2.0, 0.25), (3.0, 0.1), (5.0, 0.25)):
        print(f"smoothing over {width} visits, pseudo-count {pseudo}")
        other = load(args.traces, width, pseudo)
        for rule in ("uniform", "knapsack", BONUS):
            show("  " + rule, run(other, RULES[rule], args.seeds))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
