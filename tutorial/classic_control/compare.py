"""Which variant deserves how many episodes? Four rules at equal environment steps, with the same PPO.

    python compare.py reacher pong              # all runs; goes on where it was cut off
    python compare.py reacher --rule steps --seed 0 --lr 2e-3      # one run, to look at
    python report.py                            # tables and figures of what has been run

An update: the rule says how many episodes each variant gets, for about the same number of steps; they are
played to their end; PPO learns from them; the tracker remembers who succeeded. `knapsack.py` is the
repository's, as it is; it needs NumPy only, so for a project of your own copy that one file.
Letters: M variants, E episodes, K options of a variant.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from ppo import Episodes, Learner, collect
from report import COMPARED, EVALUATIONS, RATES, TUNING_SEEDS, best_rate, load
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
import knapsack  # noqa: E402

N_MAX = 32  # episodes of a variant in an update


@dataclass(frozen=True)
class Settings:
    """Of a family of tasks; the same for every rule."""

    total: int  # environment steps of a run
    steps: int  # of an update, about
    minibatch: int
    side_by_side: int  # episodes played in lockstep
    seeds: int  # of the comparison
    evaluate: int  # episodes of each held-out variant


SETTINGS = {
    "reacher": Settings(132_000, 4800, minibatch=512, side_by_side=32, seeds=5, evaluate=2),
    "pong": Settings(28_800, 1800, minibatch=256, side_by_side=16, seeds=5, evaluate=1),
}


# ---- 1. The rules ----
@dataclass(frozen=True)
class Known:
    """What a rule may look at before an update."""

    posterior: tuple  # (alpha, beta), each (M,), from knapsack.SuccessTracker
    lengths: np.ndarray  # (M,) expected steps of an episode
    steps: int  # to spend, in expectation
    progress: float  # from 0 at the run's start to 1 at its end
    price: float  # for at_price: the least a further episode must be worth
    rng: np.random.Generator


def within(counts_of, known: Known) -> np.ndarray:
    """(M,) counts of the largest budget of episodes whose expected steps fit. Every variant gets one."""
    low, high = len(known.lengths), len(known.lengths) * N_MAX
    while low < high:  # more episodes are more steps, so bisect
        middle = (low + high + 1) // 2
        fits = counts_of(middle) @ known.lengths <= known.steps
        low, high = (middle, high) if fits else (low, middle - 1)
    return counts_of(low)


def random_starts(known: Known) -> np.ndarray:
    """PPO's own way: each episode starts from a variant drawn at random."""
    m = len(known.lengths)
    return known.rng.multinomial(known.steps / known.lengths.mean(), np.full(m, 1 / m))


def uniform(known: Known) -> np.ndarray:
    return within(lambda budget: knapsack.uniform(len(known.lengths), budget), known)


def by_knapsack(known: Known) -> np.ndarray:
    return within(lambda budget: knapsack.allocate(known.posterior, budget, n_min=1, n_max=N_MAX), known)


def more_early(known: Known) -> np.ndarray:
    """The knapsack at a price that is low at first and rises: from 1.5 times the steps to half of them."""
    return by_knapsack(replace(known, steps=int(known.steps * (1.5 - known.progress))))


def at_price(known: Known) -> np.ndarray:
    """No budget at all: episodes are bought as long as the next one is worth the price."""
    return knapsack.allocate_at_price(known.posterior, known.price, n_min=1, n_max=N_MAX)


def by_steps(known: Known, grain=200) -> np.ndarray:
    """The knapsack whose costs are steps: n episodes of a variant weigh n times its expected length."""
    n = np.arange(1, N_MAX + 1)
    alpha, beta = (x[:, None] for x in known.posterior)  # (M, 1)
    values = knapsack.expected_value(n, alpha, beta)  # (M, K)
    # solve_dp wants whole costs: grains of a few steps, rounded up so that the sum still fits.
    costs = np.ceil(n * known.lengths[:, None] * grain * 8 / known.steps)
    return n[knapsack.solve_dp(values, grain * 8, costs)]


RULES = {
    "random starts": random_starts,
    "uniform": uniform,
    "knapsack": by_knapsack,
    "more early": more_early,
    # Two to look at; they are not in the comparison.
    "price": at_price,
    "steps": by_steps,
}


# ---- 2. One run ----
class Lengths:
    """Expected steps of an episode of each variant; older visits fade as they do in the tracker."""

    def __init__(self, m: int, cap: int, discount=0.75):
        self.steps, self.episodes, self.discount = np.full(m, float(cap)), np.ones(m), discount

    def update(self, group, lengths) -> None:
        """lengths (E,) of the episodes of variants group (E,)."""
        m = len(self.steps)
        fade = np.where(np.bincount(group, minlength=m) > 0, self.discount, 1.0)
        self.steps = fade * self.steps + np.bincount(group, lengths, m)
        self.episodes = fade * self.episodes + np.bincount(group, minlength=m)

    def mean(self) -> np.ndarray:
        return self.steps / self.episodes


def run(task: str, rule: str, lr: float, seed: int, settings: Settings, price=0.0, show=print, bar=None):
    """Trains once. Returns the row that is recorded."""
    import tasks  # here, so that everything else works without gymnasium

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    family = {"reacher": tasks.Reacher, "pong": tasks.Pong}[task]
    copies = [family(seed=1000 * seed + i) for i in range(settings.side_by_side)]
    variants, held_out = family.variants("train"), family.variants("held-out")
    learner = Learner(family.observations, family.actions, family.discrete, lr)
    # The defaults, written out: recorded runs can be repeated when those change.
    tracker = knapsack.SuccessTracker(discount=0.75, prior_strength=1.0, drift=0.3)
    lengths = Lengths(len(variants), family.cap)
    curve, updates, steps, cpu, wall = [], [], 0, 0.0, 0.0

    def evaluate():
        each = np.repeat(held_out, settings.evaluate)
        # The same luck for every rule and every evaluation, as far as starts and poses go.
        result = collect(learner, copies, each, np.random.default_rng(seed), greedy=True)
        curve.append([steps, round(result.success.mean(), 4), round(cpu, 2), round(wall, 2)])

    evaluate()
    while steps < settings.total:
        clocks = time.process_time(), time.perf_counter()
        # In an order of its own each time: what does not divide evenly goes to other variants.
        order = rng.permutation(len(variants))
        ids = [variants[i] for i in order]
        posterior = tracker.posterior(ids)
        progress = steps / settings.total
        known = Known(posterior, lengths.mean()[order], settings.steps, progress, price, rng)
        counts = RULES[rule](known)  # (M,)
        group = np.repeat(np.arange(len(ids)), counts)  # (E,)
        episodes: Episodes = collect(learner, copies, [ids[g] for g in group], rng)
        learnt = learner.update(episodes, settings.minibatch, rng)
        wins = np.bincount(group, episodes.success, len(ids)).astype(int)
        tracker.update(ids, wins, counts)
        lengths.update(order[group], episodes.lengths)
        steps += int(episodes.lengths.sum())
        cpu += time.process_time() - clocks[0]
        wall += time.perf_counter() - clocks[1]

        mixed = (wins > 0) & (wins < counts)
        worth = knapsack.shadow_price(posterior, np.maximum(counts, 1), N_MAX)
        updates.append([steps, len(group), int(mixed.sum()), int(mixed @ counts), int(counts.max()), worth])
        if steps >= settings.total * len(curve) / EVALUATIONS:
            evaluate()
        show(
            f"{task} {rule:13} lr {lr:g} seed {seed:3}: update {len(updates):2}, {steps:7,} steps, "
            f"{len(group):3} episodes, {episodes.success.mean():.2f} succeed, {mixed.mean():.2f} of groups "
            f"mixed, largest {counts.max():2}, critic explains {learnt['critic_explains']:5.2f}, "
            f"held out {curve[-1][1]:.2f}"
        )
        if bar is not None:
            bar.update(min(steps, settings.total) - bar.n % settings.total)
    names = ["steps", "episodes", "mixed_groups", "episodes_in_mixed_groups", "largest", "shadow_price"]
    return {
        "task": task, "rule": rule, "lr": lr, "seed": seed, "total": settings.total,
        "variants": len(variants),
        "curve": curve,  # steps, held-out success, CPU seconds, wall seconds (evaluations not counted)
        "updates": dict(zip(names, map(list, zip(*updates, strict=True)), strict=True)),
    }  # fmt: skip


# ---- 3. The comparison: each run a row, each row written once ----
def compare(task: str, file: Path, settings: Settings, rates=RATES) -> None:
    """All runs of a task that the file does not hold yet."""
    rows = load(file)
    if any(r["total"] != settings.total for r in rows):
        raise ValueError(f"{file} holds runs of another length than {settings.total}: pass another --out")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))  # without a torn last row
    done = {(r["rule"], r["lr"], r["seed"]) for r in rows}
    runs = len(COMPARED) * (len(rates) * len(TUNING_SEEDS) + settings.seeds)
    bar = tqdm(total=runs * settings.total, initial=len(rows) * settings.total, unit="step", unit_scale=True)
    for tuning in (True, False):
        for seed in TUNING_SEEDS if tuning else range(settings.seeds):
            # A seed's rules one after the other: whatever else the machine does meets all of them.
            for rule in COMPARED:
                for lr in rates if tuning else [best_rate(rows, rule)]:
                    if (rule, lr, seed) in done:
                        continue
                    row = run(task, rule, lr, seed, settings, show=bar.write, bar=bar)
                    rows.append(row)
                    with file.open("a") as f:
                        f.write(json.dumps(row) + "\n")
    bar.close()


def main(words=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("tasks", nargs="+", choices=SETTINGS)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--total", type=int, help="environment steps of a run")
    parser.add_argument("--seeds", type=int, help="how many, in the comparison")
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, help="learning rates to choose from")
    parser.add_argument("--rule", choices=RULES, help="one run of this rule, and nothing is recorded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=RATES[1])
    parser.add_argument("--price", type=float, default=0.008, help="for one run at a price")
    c = parser.parse_args(words)
    torch.set_num_threads(1)  # the networks are small: a second thread only waits
    for task in c.tasks:
        changed = {k: v for k, v in (("total", c.total), ("seeds", c.seeds)) if v is not None}
        settings = Settings(**(vars(SETTINGS[task]) | changed))
        if c.rule:
            run(task, c.rule, c.lr, c.seed, settings, c.price)
        else:
            compare(task, c.out / f"{task}.jsonl", settings, c.rates)


if __name__ == "__main__":
    main()
