"""Does the knapsack train better? The runs behind chapters 7 and 8, one small JSON row each.

    python tutorial/evidence.py run                              # hours; goes on where it was
    python tests/test_tutorial.py tutorial/7_evidence.md         # the chapter's tables and figures, anew

The parts, in this order; every run of a part spends the same number of rollouts unless it says so:

    lr          {uniform, paper, knapsack} x 3 learning rates x seeds 100, 101; 100 steps of 512 rollouts
    main        the three, each at its best learning rate, seeds 0 to 7, 100 steps
    long        four changes over the whole 100 steps, to see why; seeds 0 to 7; told p samples thrice as many
    estimates   another estimate of p, and
    ablations   one other thing changed at a time: seeds 0 to 3, 20,480 rollouts; compared with `main` there
    budgets     a budget that changes as training goes on, seeds 0 to 3; 51,200 rollouts in all

The best learning rate has the highest held-out success, averaged over the evaluations from step 60 on and
over the two seeds, which no other part uses. A run is train.py itself, one of its parts exchanged (see
VARIANTS); its folder stays under --work, its summary is a row of results/evidence.jsonl. What has a row is
not run again. One thread a run, --workers runs at a time: on two cores a run of 100 steps takes 3 minutes.
"""

import argparse
import collections
import contextlib
import copy
import itertools
import multiprocessing
import os
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import evaluate  # noqa: E402
import knapsack  # noqa: E402
import reward  # noqa: E402
import train  # noqa: E402

RESULTS = HERE / "results" / "evidence.jsonl"
ALLOCATORS, RATES = ("uniform", "paper", "knapsack"), (1e-4, 3e-4, 1e-3)
EACH_STEP, STEPS, SHORT = 512, 100, 40
TOTAL = EACH_STEP * STEPS  # rollouts of a main run


# ---- Other allocators: functions (tracker, ids, config) -> counts, as in train.ALLOCATORS --------------
# The knapsack on estimate(tracker, ids), with value(tracker, ids) in place of the paper's value.
def counts_by(estimate=lambda tracker, ids: tracker.posterior(ids), value=lambda tracker, ids: None):
    def allocate(tracker, ids, c):
        p = estimate(tracker, ids)
        if np.isnan(p).any():  # the paper's estimate of a prompt never seen
            return knapsack.uniform(len(ids), c.budget)
        return knapsack.allocate(p, c.budget, c.n_min, c.n_max, value(tracker, ids))

    return allocate


# P(mixed) alone, without InfoGain.
def p_mixed(tracker, ids):
    return knapsack.prob_nonzero_gradient


# InfoGain and a bonus, the larger one for prompts that were never solved.
def bonus(tracker, ids):
    extra = np.where(tracker.solved(ids), 0.01, 0.3)[:, None]  # (M, 1)
    return lambda n, p: knapsack.prob_nonzero_gradient(n, p) * (knapsack.info_gain(p) + extra)


# What was known so many steps ago.
def stale(steps):
    past = collections.deque(maxlen=steps + 1)

    def estimate(tracker, ids):
        past.append(copy.deepcopy(tracker))
        return past[0].posterior(ids)

    return counts_by(estimate)


# Before each step, so many more answers of today's model to each prompt say how hard it is. They are not
# counted and not learned from. It shows about what allocation could do if it knew p.
def told(samples):
    plain, runs = train.set_up, []
    seeds = itertools.count(500_000)  # no step of seeds 0 to 7 has such a one

    def set_up(*args):
        runs.append(plain(*args))
        return runs[-1]

    def estimate(tracker, ids):
        run, trials = runs[-1], np.full(len(ids), samples)
        tasks = {t.id: t for t in run.train_tasks}
        extra = run.sampler.sample([run.prompts[i] for i in ids], trials, next(seeds))
        asked, texts = [tasks[ids[r.group]] for r in extra], [r.text for r in extra]
        right = reward.grade(run.judge, asked, texts)  # (M x samples,)
        now = knapsack.SuccessTracker()
        now.update(ids, np.bincount([r.group for r in extra], right, minlength=len(ids)), trials)
        return now.posterior(ids)

    train.set_up = set_up
    return counts_by(estimate)


# Before step 1 the tracker is handed another run's first epoch: 8 outcomes a prompt, not counted.
def warm(seed, work):
    groups, known = work / f"main-uniform-seed{seed + 4}" / "groups.jsonl", []

    def estimate(tracker, ids):
        for g in () if known else evaluate.each_row(groups):
            if g["ids"][0] in known:
                break  # the second epoch begins
            known.extend(g["ids"])
            tracker.update(g["ids"], g["successes"], g["counts"])
        return tracker.posterior(ids)

    return counts_by(estimate)


# A budget of `first` rollouts at step 1, of `last` at the last step, on a straight line between.
def budget_from(first, last):
    # Differences of a rounded running sum: whole numbers that add up to TOTAL.
    budgets = iter(np.diff(np.linspace(first, last, STEPS).cumsum().round(), prepend=0).astype(int))
    return lambda tracker, ids, c: knapsack.allocate(tracker.posterior(ids), next(budgets), c.n_min, c.n_max)


# Every rollout that is worth the price, until TOTAL is spent; from then on a step buys n_min only.
def at_price(price):
    left = TOTAL

    def allocate(tracker, ids, c):
        nonlocal left
        p = tracker.posterior(ids)
        counts = knapsack.allocate_at_price(p, price, c.n_min, c.n_max)
        if counts.sum() > left:
            counts = knapsack.allocate(p, max(left, len(ids) * c.n_min), c.n_min, c.n_max)
        left -= counts.sum()
        return counts

    return allocate


# What the last rollout of a step was worth, on average, in the main knapsack runs of other seeds.
def mean_price(work, seed) -> float:
    prices = []
    for other in {0, 1, 2, 3} - {seed}:
        tracker = knapsack.SuccessTracker()
        for g in evaluate.each_row(work / f"main-knapsack-seed{other}" / "groups.jsonl"):
            prices.append(knapsack.shadow_price(tracker.posterior(g["ids"]), g["counts"]))
            tracker.update(g["ids"], g["successes"], g["counts"])
    return float(np.mean(prices))


# ---- Other memories and losses: these exchange a part of a module --------------------------------------
# These runs were made when the tracker's defaults were these. Today's are the variant "drifting".
FORMER = dict(discount=0.75, prior_strength=0.25, drift=0.0)


def remembering(**settings):
    knapsack.SuccessTracker = partial(knapsack.SuccessTracker, **settings)


# grpo.update, with change(rollouts, advantages) in their place.
def updating(change):
    import grpo

    plain = grpo.update

    def update(model, optimizer, rollouts, advantages, *rest, **more):
        return plain(model, optimizer, *change(rollouts, advantages), *rest, **more)

    grpo.update = update


# Every response weighs the same in the loss, however long: GRPO as first published (chapter 5).
def sequence_mean(rollouts, advantages):
    T = np.array([len(r.response_ids) for r in rollouts])  # (R,)
    return rollouts, advantages * T.mean() / T


# Every prompt weighs the same in the loss, however many rollouts it got.
def prompt_mean(rollouts, advantages):
    group = np.array([r.group for r in rollouts])  # (R,)
    n = np.bincount(group)  # (M,)
    return rollouts, advantages * (n.mean() / n[group])


# DAPO's dynamic sampling: of a larger batch, only the first `keep` mixed groups are used.
def first_mixed(keep):
    def change(rollouts, advantages):
        mixed = list(dict.fromkeys(r.group for r, a in zip(rollouts, advantages, strict=True) if a))
        used = [i for i, r in enumerate(rollouts) if r.group in mixed[:keep]]
        return [rollouts[i] for i in used], advantages[used]

    return change


# ---- The runs ------------------------------------------------------------------------------------------
# As many rollouts as SHORT steps of 512, warm-up and all.
HALF = "--budget 256 --steps 80 --warmup-steps 20 --eval-every 40"
DOUBLE = "--budget 1024 --steps 20 --warmup-steps 5 --eval-every 10"

# part: {name: (allocator, flags, change)}. change(seed, work) returns the function that takes the
# allocator's place in train.ALLOCATORS, or None if what it changes is something else.
VARIANTS = {
    "main": {a: (a, "", None) for a in ALLOCATORS},
    "long": {
        "P(mixed) only": ("knapsack", "", lambda *_: counts_by(value=p_mixed)),
        "told p": ("knapsack", "", lambda *_: told(16)),
        "prior_strength 1": ("knapsack", "", lambda *_: remembering(prior_strength=1.0)),
        "drifting": ("knapsack", "", lambda *_: remembering(prior_strength=1.0, drift=0.3)),
    },
    "estimates": {
        "point estimate": ("knapsack", "", lambda *_: counts_by(lambda t, ids: t.estimate(ids))),
        "no fallback": ("paper", "", lambda *_: counts_by(lambda t, ids: t.windowed_rate(ids))),
        "discount 0": ("knapsack", "", lambda *_: remembering(discount=0.0)),
        "discount 1": ("knapsack", "", lambda *_: remembering(discount=1.0)),
        "an epoch stale": ("knapsack", "", lambda *_: stale(16)),
        "warm start": ("knapsack", "", warm),
    },
    "ablations": {
        "bonus": ("knapsack", "", lambda *_: counts_by(value=bonus)),
        "n_max 16": ("knapsack", "--n-max 16", None),
        "sequence mean, uniform": ("uniform", "", lambda *_: updating(sequence_mean)),
        "sequence mean": ("knapsack", "", lambda *_: updating(sequence_mean)),
        "prompt mean": ("knapsack", "", lambda *_: updating(prompt_mean)),
        "4 a prompt, uniform": ("uniform", HALF, None),
        "4 a prompt": ("knapsack", HALF, None),
        "16 a prompt, uniform": ("uniform", DOUBLE, None),
        "16 a prompt": ("knapsack", DOUBLE, None),
        "filtered": ("uniform", DOUBLE + " --prompts 128", lambda *_: updating(first_mixed(64))),
    },
    "budgets": {
        "more early": ("knapsack", "", lambda *_: budget_from(768, 256)),
        "more late": ("knapsack", "", lambda *_: budget_from(256, 768)),
        "a price": ("knapsack", "", lambda seed, work: at_price(mean_price(work, seed))),
    },
}
SHORTER = ("estimates", "ablations")
SEEDS = {"lr": (100, 101), "main": range(8), "long": range(8)}
SEEDS |= {part: range(4) for part in ("estimates", "ablations", "budgets")}


# The rows of results/evidence.jsonl: of one part or of all, of one name or of all, in order of the seed.
def load(part=None, name=None) -> list[dict]:
    rows = evaluate.each_row(RESULTS) if RESULTS.exists() else ()
    found = [r for r in rows if part in (None, r["part"]) and name in (None, r["name"])]
    return sorted(found, key=lambda r: r["seed"]) if name else found


# {learning rate: held-out success, mean over the evaluations from step 60 on and over the seeds}
def scores(allocator, rows) -> dict[float, float]:
    found = collections.defaultdict(list)
    for row in rows:
        if (row["part"], row["name"]) == ("lr", allocator):
            found[row["lr"]] += [s for step, _, s, _ in row["evaluations"] if step >= 60]
    return {lr: float(np.mean(x)) for lr, x in found.items()}


# (part, name, lr, seed, train.py's flags) of each run; `rows` are those that decided about the rates.
def jobs(part, rows) -> list[tuple]:
    found = []
    for seed in SEEDS[part]:  # seed by seed, so that what was cut short is still balanced
        for name, (allocator, flags, _) in VARIANTS["main" if part == "lr" else part].items():
            of = scores(allocator, rows)
            rates = RATES if part == "lr" else [max(of, key=of.get)]
            common = f"--steps {SHORT if part in SHORTER else STEPS} --eval-every 20"
            for lr in rates:
                words = f"--allocator {allocator} --lr {lr} --seed {seed} {common} {flags}".split()
                found.append((part, name, lr, seed, words))
    return found


def run(args) -> None:
    from tqdm import tqdm

    os.environ["OMP_NUM_THREADS"] = "1"  # of each run; two of them share two cores
    # A fresh process for each run: what is exchanged there touches no other.
    fresh = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    for part in args.parts or SEEDS:
        done = {(r["part"], r["name"], r["lr"], r["seed"]) for r in load()}
        left = [job for job in jobs(part, load()) if job[:4] not in done]
        with ProcessPoolExecutor(args.workers, **fresh) as pool:
            folders = tqdm(pool.map(partial(one, args.work), left), part, len(left), unit="run", disable=None)
            for (_, name, lr, seed, words), folder in zip(left, folders, strict=True):
                row = {"part": part, "name": name, "lr": lr, "seed": seed, "flags": " ".join(words)}
                train.log(RESULTS.parent, RESULTS.stem, row | summary(folder))


# A run. Returns its folder.
def one(work, job) -> Path:
    part, name, lr, seed, words = job
    slug = name.replace(", ", "-").replace(" ", "_") + (f"-lr{lr:g}" if part == "lr" else "")
    folder = work / f"{part}-{slug}-seed{seed}"
    if not (folder / "final").exists():
        # A variant's own memory is not in a checkpoint: a run that was cut short starts again.
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        exchange(part, name, seed, work)
        with folder.with_name(folder.name + ".log").open("w") as log:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                train.main([*words, "--out", str(folder)])
    return folder


# Make train.py the variant that is asked for.
def exchange(part, name, seed, work) -> None:
    remembering(**FORMER)
    allocator, _, change = VARIANTS["main" if part == "lr" else part][name]
    rule = change and change(seed, work)
    if rule:
        train.ALLOCATORS[allocator] = rule


# What is worth keeping of a run folder.
def summary(folder) -> dict:
    untouched, *rows = evaluate.each_row(folder / "metrics.jsonl")
    spent = [0, *np.cumsum([row["budget"] for row in rows]).tolist()]
    # [step, rollouts spent, held-out success, its standard error]
    evaluations = [
        [row["step"], so_far, row["eval_success"], round(row["eval_success_se"], 4)]
        for row, so_far in zip([untouched, *rows], spent, strict=True)
        if row["eval_success"] is not None
    ]
    shares = ("effective_rollouts", "effective_prompts", "all_right", "all_wrong")
    means = {}  # of ten steps each
    for name in (*shares, "reward_mean", "budget"):
        each = [[row[name] for row in rows[k : k + 10]] for k in range(0, len(rows), 10)]
        means[name] = [round(float(np.mean(ten)), 4) for ten in each]
    # Groups by size: how many, how many mixed, the estimates' sum, how many had a p_hat neither 0 nor 1.
    sizes, tracker = collections.defaultdict(lambda: np.zeros(4)), knapsack.SuccessTracker()
    for g in evaluate.each_row(folder / "groups.jsonl"):
        p_hat = tracker.windowed_rate(g["ids"])  # the paper's estimate; NaN in the first epoch
        for n, right, p, rate in zip(g["counts"], g["successes"], g["estimate"], p_hat, strict=True):
            sizes[int(np.ceil(np.log2(n)))] += 1, 0 < right < n, p, 0 < rate < 1
        tracker.update(g["ids"], g["successes"], g["counts"])
    phases = ("allocate", "sample", "verify", "update", "eval")
    return {
        "evaluations": evaluations,
        "means": means,
        "solved": [row["distinct_solved"] for row in rows[9::10]],
        "largest": max(row["n_largest"] for row in rows),
        "groups_up_to_2_to_the": {k: x.round(2).tolist() for k, x in sorted(sizes.items())},
        "seconds": {p: round(sum(row.get(f"time_{p}") or 0 for row in rows), 2) for p in phases},
    }


# ---- What the rows say ---------------------------------------------------------------------------------
# (rollouts spent (E,), held-out success (seeds, E)) of a part's variant, up to so many rollouts.
def curves(part, name, last=10**9) -> tuple[np.ndarray, np.ndarray]:
    points = [[e[1:3] for e in row["evaluations"] if e[1] <= last] for row in load(part, name)]
    spent, success = np.moveaxis(np.array(points), 2, 0)  # (seeds, E) each
    return spent.mean(0), success


# Held-out success at the end (seeds,).
def ends(part, name) -> np.ndarray:
    return curves(part, name)[1][:, -1]


# A share of ten steps each, the mean over the seeds (STEPS / 10,).
def tens(part, name, key) -> np.ndarray:
    return np.mean([row["means"][key] for row in load(part, name)], 0)


def with_error(values, form=".3f") -> str:
    """Mean and standard error over seeds; form "+.3f" for a difference."""
    se = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{np.mean(values):{form}} ± {se:{form.lstrip('+')}}"


# Student's t at 97.5% for n - 1 degrees of freedom: standard errors of n seeds are themselves uncertain.
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}


def half_width(differences) -> float:
    """Of the 95% interval of their mean, over seeds."""
    n = len(differences)
    return float(T95[n] * np.std(differences, ddof=1) / np.sqrt(n))


def verdict(differences) -> str:
    """A win or a loss if the 95% interval over seeds leaves out zero; anything less is a tie."""
    mean, half = np.mean(differences), half_width(differences)
    return "win" if mean > half else "loss" if mean < -half else "tie"


def when_reached(spent, success, target) -> float:
    """Rollouts at which a curve first reaches the target, between two evaluations on a straight line."""
    above = np.flatnonzero(success >= target)
    if not len(above):
        return np.inf
    around = slice(max(above[0] - 1, 0), above[0] + 1)
    return float(np.interp(target, success[around], spent[around]))


# ---- Tables --------------------------------------------------------------------------------------------
def table(head, lines) -> str:
    cells = [head.split("|"), ["---"] * (head.count("|") + 1), *lines]
    return "\n".join("| " + " | ".join(str(c).strip() for c in line) + " |" for line in cells)


# `scores`; a star marks the rate that was taken.
def lr_table() -> str:
    of = {name: scores(name, load()) for name in ALLOCATORS}
    best = {name: max(x, key=x.get) for name, x in of.items()}
    lines = [[n, *(f"{of[n][lr]:.3f}" + "*" * (lr == best[n]) for lr in RATES)] for n in ALLOCATORS]
    return table("allocator | " + " | ".join(f"{lr:g}" for lr in RATES), lines)


MAIN = [("main", name) for name in ALLOCATORS]
LONG = [MAIN[0], MAIN[2], *(("long", name) for name in VARIANTS["long"])]


# Eight seeds each, and their differences from other runs, seed by seed: at the end, and the mean over all
# evaluations after the start. The last column: where the mean curve reaches uniform's end, as a share of
# all rollouts, and the 95% interval over seeds drawn again. Uniform's own curve may be there early.
def long_table(runs, *others) -> str:
    end, lines = ends("main", "uniform"), []
    drawn = np.random.default_rng(0).integers(0, len(end), (4000, len(end)))
    for part, name in runs:
        spent, s = curves(part, name)
        cells = [name, f"{tens(part, name, 'effective_rollouts').mean():.2f}", with_error(s[:, -1])]
        for other in others:
            d = s - curves("main", other)[1]  # (seeds, E)
            both = (d[:, -1], d[:, 1:].mean(1))
            cells += [f"{with_error(x, '+.3f')} {verdict(x)}" if d.any() else "" for x in both]
        which = [np.arange(len(s)), *drawn]
        at, *again = (when_reached(spent, s[w].mean(0), end[w].mean()) / TOTAL for w in which)
        interval = np.quantile(again, (0.025, 0.975), method="nearest")
        said = [f"{x:.2f}" if x < np.inf else "never" for x in (at, *interval)]
        lines.append([*cells, "{} ({} to {})".format(*said)])
    minus = " | ".join(f"minus {other} | all the way" for other in others)
    return table(f"8 seeds | effective rollouts | final | {minus} | rollouts to uniform's end", lines)


# Where the rollouts went, means over steps and seeds.
def rollouts_table() -> str:
    lines, base = [], np.array([row["solved"][-1] for row in load("main", "uniform")])
    for name in ALLOCATORS:
        rows = load("main", name)
        solved, largest = np.array([r["solved"][-1] for r in rows]), max(r["largest"] for r in rows)
        ms = np.mean([1000 * r["seconds"]["allocate"] / STEPS for r in rows])
        shares = [f"{tens('main', name, k).mean():.3f}" for k in ("effective_rollouts", "effective_prompts")]
        of = [with_error(solved - base, "+.0f"), verdict(solved - base)] if name != "uniform" else ["", ""]
        lines.append([name, *shares, with_error(solved, ".0f"), *of, largest, f"{ms:.1f}"])
    head = "allocator | effective rollouts | effective prompts | ever solved | minus uniform | | largest"
    return table(head + " | allocation, ms", lines)


# Groups by size: how many, how many mixed, what was expected of them.
def groups_table(name) -> str:
    total = collections.defaultdict(lambda: np.zeros(4))
    for row in load("main", name):
        for k, x in row["groups_up_to_2_to_the"].items():
            total[int(k)] += x
    lines = [
        [f"{2 ** (k - 1) + 1} to {2**k}" if k > 1 else "2", int(n), *(f"{x / n:.2f}" for x in rest)]
        for k, (n, *rest) in sorted(total.items())
    ]
    return table("rollouts | groups | mixed | mean posterior | 0 < p̂ < 1", lines)


# What a variant is compared with, where that is not `main`'s knapsack.
AGAINST = {"no fallback": ("main", "paper"), "filtered": ("main", "uniform")}
AGAINST |= {n: ("ablations", f"{n}, uniform") for n in ("sequence mean", "4 a prompt", "16 a prompt")}


# A row a variant of a part. What it is compared with is read where as much was spent, between two
# evaluations on a straight line.
def change_table(part) -> str:
    lines = []
    for name in VARIANTS[part]:
        if name.endswith("uniform"):  # others are compared with it
            continue
        where, other = AGAINST.get(name, ("main", "knapsack"))
        (spent, s), (at, base) = curves(part, name), curves(where, other)
        same = [np.interp(spent[-1], at, b) for b in base[: len(s)]]  # main has more seeds
        d = s[:, -1] - same  # (seeds,)
        effective = f"{tens(part, name, 'effective_rollouts').mean():.2f}"
        cells = [with_error(s[:, -1]), other, with_error(d, "+.3f"), verdict(d)]
        lines.append([name, f"{spent[-1]:,.0f}", effective, *cells])
    head = "changed | rollouts | effective rollouts | held-out success | against | difference | "
    return table(head, lines)


# ---- Figures -------------------------------------------------------------------------------------------
GREEN, RED = "#2e7d32", "#b03060"


def styled(color, line="-") -> dict:
    return dict(color=color, linestyle=line)


# Mean and standard error over the seeds, or the first so many.
def band(axis, part, name, seeds=None, label=None, **look) -> None:
    spent, s = curves(part, name)
    mean, se = s[:seeds].mean(0), s[:seeds].std(0, ddof=1) / np.sqrt(len(s[:seeds]))
    axis.plot(spent / 1000, mean, marker="o", ms=3, label=label or name, **look)
    axis.fill_between(spent / 1000, mean - se, mean + se, color=look["color"], alpha=0.2, lw=0)


def draw_main(path) -> None:
    middle = (np.arange(STEPS // 10) + 0.5) * 10 * EACH_STEP / 1000  # of each ten steps
    with evaluate.picture(path, 2, 2) as (_, ((a, b), (c, d))):
        for name in ALLOCATORS:
            look = evaluate.look(name)
            band(a, "main", name, **look)
            b.plot(middle, tens("main", name, "effective_rollouts"), **look)
            c.plot(middle, tens("main", name, "effective_prompts"), **look)
            d.plot(middle + middle[0], np.mean([r["solved"] for r in load("main", name)], 0), **look)
        # A title says one number for each allocator.
        final = [f"{name} {ends('main', name).mean():.2f}" for name in ALLOCATORS]
        a.set(title=", ".join(final), ylabel="held-out success")
        for axis, key, what in ((b, "effective_rollouts", "rollouts"), (c, "effective_prompts", "groups")):
            shares = " / ".join(f"{tens('main', name, key).mean():.0%}" for name in ALLOCATORS)
            axis.set(title=f"{shares} of {what} teach", ylabel=f"share of {what}", ylim=(0, 1))
        solved = [np.mean([r["solved"][-1] for r in load("main", name)]) for name in ALLOCATORS]
        of = " / ".join(f"{n:.0f}" for n in solved)
        d.set(title=f"{of} prompts ever solved", ylabel="training prompts, of 1024")
        for axis in (a, b, c, d):
            axis.set(xlabel="thousand rollouts")
        a.legend(loc="lower right")


def draw_long(path) -> None:
    with evaluate.picture(path, 1, 1) as (_, axis):
        for name in ("uniform", "knapsack"):
            band(axis, "main", name, **evaluate.look(name))
        band(axis, "long", "told p", **styled(GREEN, "--"))
        band(axis, "long", "drifting", **styled(RED, "-."))
        axis.set(title="Good estimates lift the knapsack", ylabel="held-out success")
        axis.set(xlabel="thousand rollouts")
        axis.legend(loc="lower right")


def draw_budgets(path) -> None:
    colors = (evaluate.ORANGE, evaluate.GREY, GREEN)
    looks = dict(zip(VARIANTS["budgets"], map(styled, colors, ("--", "-.", ":")), strict=True))
    constant, seeds = styled(evaluate.BLUE), len(SEEDS["budgets"])
    with evaluate.picture(path, 1, 2) as (_, (a, b)):
        band(a, "main", "knapsack", seeds, label="constant", **constant)
        b.axhline(EACH_STEP, **constant)
        for name, look in looks.items():
            band(a, "budgets", name, **look)
            spent = tens("budgets", name, "budget")
            b.plot((np.arange(len(spent)) + 0.5) * 10, spent, **look)
        final = [ends("budgets", name).mean() for name in looks] + [ends("main", "knapsack")[:seeds].mean()]
        a.set(title=f"All end within {np.ptp(final):.2f} of one another", ylabel="held-out success")
        a.set(xlabel="thousand rollouts")
        b.set(title="A fixed price buys most in the middle", xlabel="step", ylabel="rollouts a step")
        b.set_ylim(0, None)
        a.legend(loc="lower right")


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("run", choices=["run"], help="so that nothing takes hours unasked")
    parser.add_argument("--parts", nargs="+", choices=SEEDS, help="which of the above [all]")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="run folders [%(default)s]")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time [%(default)s]")
    args = parser.parse_args()
    run(args)


if __name__ == "__main__":
    main()
