"""Does the knapsack train better? The runs behind chapters 7 and 8, one small JSON row each.

    python tutorial/evidence.py run       # hours; goes on where it was
    python tutorial/evidence.py report    # the tables and the figures

The parts, in this order; every run of a part spends the same number of rollouts unless it says so:

    lr          {uniform, paper, knapsack} x 3 learning rates x seeds 100, 101; 100 steps of 512 rollouts
    main        the three, each at its best learning rate, seeds 0 to 7, 100 steps
    long        four changes over the whole 100 steps, to see why; seeds 0 to 7; told p samples thrice as many
    estimates   another estimate of p, and
    ablations   one other thing changed at a time: seeds 0 to 3, 20,480 rollouts; compared with `main` there
    budgets     a budget that changes as training goes on, seeds 0 to 3; 51,200 rollouts in all

The best learning rate has the highest held-out success, averaged over the evaluations from step 60 on and
over the two seeds, which no other part uses. A run is train.py itself, some of its parts exchanged (see
VARIANTS); its folder stays under --work, its summary is a row of results/evidence.jsonl. What has a row is
not run again. One thread a run, --workers runs at a time: on two cores a run of 100 steps takes 3 minutes.
"""

import argparse
import collections
import copy
import itertools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import evaluate  # noqa: E402
import knapsack  # noqa: E402
import train  # noqa: E402

RESULTS = HERE / "results" / "evidence.jsonl"
ALLOCATORS, RATES = ("uniform", "paper", "knapsack"), (1e-4, 3e-4, 1e-3)
EACH_STEP, STEPS, SHORT = 512, 100, 40
TOTAL = EACH_STEP * STEPS  # rollouts of a main run

# ------------------------------------------------------------------------- what a variant exchanges


def counts_by(estimate, bonus=None):
    """The exact knapsack on estimate(tracker, ids); uniform where that is NaN, for a prompt never seen."""

    def allocate(c, tracker, ids):
        p = estimate(tracker, ids)
        if np.isnan(p).any():
            return knapsack.uniform(len(ids), c.budget)
        return knapsack.allocate(p, c.budget, c.n_min, c.n_max, bonus=bonus and bonus(tracker, ids))

    train.allocate = allocate


def stale(steps):
    """Allocate from what was known so many steps ago."""
    past = collections.deque(maxlen=steps + 1)

    def estimate(tracker, ids):
        past.append(copy.deepcopy(tracker))
        return past[0].posterior(ids)

    counts_by(estimate)


def told(samples):
    """Before each step, so many more answers of today's model to each prompt say how hard it is. They are not
    counted and not learned from: about what allocation could do if it knew p."""
    import reward

    plain, run, verifier = train.set_up, {}, reward.Verifier()

    def set_up(c, out, tasks, checkpoint):
        parts = plain(c, out, tasks, checkpoint)
        run["answer"], run["prompts"], run["sampler"] = {t.id: t.answer for t in tasks}, *parts[2:]
        return parts

    seeds = itertools.count(500_000)  # no step of seeds 0 to 7 has such a one

    def estimate(tracker, ids):
        trials = np.full(len(ids), samples)
        extra = run["sampler"].sample([run["prompts"][i] for i in ids], trials, next(seeds))
        right = verifier.score_many([r.text for r in extra], [run["answer"][ids[r.group]] for r in extra])
        now = knapsack.SuccessTracker()
        now.update(ids, np.bincount([r.group for r in extra], right, minlength=len(ids)), trials)
        return now.posterior(ids)

    train.set_up = set_up
    counts_by(estimate)


def warm(groups):
    """Before step 1, hand the tracker another run's first epoch: 8 outcomes a prompt, not counted."""
    plain, known = train.allocate, []

    def allocate(c, tracker, ids):
        if not known:
            for line in groups.read_text().splitlines():
                g = json.loads(line)
                if known and g["ids"][0] in known:
                    break  # the second epoch begins
                known.extend(g["ids"])
                tracker.update(g["ids"], g["successes"], g["counts"])
        return plain(c, tracker, ids)

    train.allocate = allocate


def remembering(**settings):
    knapsack.SuccessTracker = partial(knapsack.SuccessTracker, **settings)


def updating(change):
    """grpo.update with (rollouts, advantages) changed first."""
    import grpo

    plain = grpo.update

    def update(model, optimizer, rollouts, advantages, *rest, **more):
        return plain(model, optimizer, *change(rollouts, advantages), *rest, **more)

    grpo.update = update


def sequence_mean():
    """Every response weighs the same in the loss, however long: GRPO as first published."""
    import grpo

    grpo.update = partial(grpo.update, normalizer="sequence")


def prompt_mean():
    """Every prompt weighs the same in the loss, however many rollouts it got."""

    def change(rollouts, advantages):
        group = np.array([r.group for r in rollouts])
        n = np.bincount(group)
        return rollouts, advantages * (n.mean() / n[group])

    updating(change)


def first_mixed(keep):
    """DAPO's dynamic sampling: of a larger batch, only the first `keep` mixed groups are used."""

    def change(rollouts, advantages):
        mixed = list(dict.fromkeys(r.group for r, a in zip(rollouts, advantages, strict=True) if a))
        used = [i for i, r in enumerate(rollouts) if r.group in mixed[:keep]]
        return [rollouts[i] for i in used], advantages[used]

    updating(change)


def budget_from(first, last):
    """A knapsack of `first` rollouts at step 1, of `last` at the last step, on a straight line between."""
    # Differences of a rounded running sum: whole numbers that add up to TOTAL.
    budgets = iter(np.diff(np.linspace(first, last, STEPS).cumsum().round(), prepend=0).astype(int))

    def allocate(c, tracker, ids):
        return knapsack.allocate(tracker.posterior(ids), next(budgets), c.n_min, c.n_max)

    train.allocate = allocate


def at_price(price):
    """Every rollout that is worth the price, until TOTAL is spent; from then on a step buys n_min only."""
    left = [TOTAL]

    def allocate(c, tracker, ids):
        p = tracker.posterior(ids)
        counts = knapsack.allocate_at_price(p, price, c.n_min, c.n_max)
        if counts.sum() > left[0]:
            counts = knapsack.allocate(p, max(left[0], len(ids) * c.n_min), c.n_min, c.n_max)
        left[0] -= counts.sum()
        return counts

    train.allocate = allocate


def no_info_gain(tracker, ids):
    return np.full(len(ids), 1e6)  # a bonus beside which InfoGain is nothing: P(mixed) alone decides


def solved_bonus(tracker, ids):
    return np.where(tracker.solved(ids), 0.01, 0.3)


# As many rollouts as SHORT steps of 512, warm-up and all.
HALF = "--budget 256 --steps 80 --warmup-steps 20 --eval-every 40"
DOUBLE = "--budget 1024 --steps 20 --warmup-steps 5 --eval-every 10"

# part: {name: (whose learning rate, flags, what to exchange)}
VARIANTS = {
    "main": {a: (a, "", None) for a in ALLOCATORS},
    "long": {
        "P(mixed) only": ("knapsack", "", lambda: counts_by(lambda t, ids: t.posterior(ids), no_info_gain)),
        "told p": ("knapsack", "", lambda: told(16)),
        "prior_strength 1": ("knapsack", "", lambda: remembering(prior_strength=1.0)),
        "drifting": ("knapsack", "", lambda: remembering(prior_strength=1.0, drift=0.3)),
    },
    "estimates": {
        "point estimate": ("knapsack", "", lambda: counts_by(lambda t, ids: t.estimate(ids))),
        "no fallback": ("paper", "", lambda: counts_by(lambda t, ids: t.windowed_rate(ids))),
        "discount 0": ("knapsack", "", lambda: remembering(discount=0.0)),
        "discount 1": ("knapsack", "", lambda: remembering(discount=1.0)),
        "an epoch stale": ("knapsack", "", lambda: stale(16)),
        "warm start": ("knapsack", "", warm),  # from the uniform run of the seed 4 above
    },
    "ablations": {
        "bonus": ("knapsack", "", lambda: counts_by(lambda t, ids: t.posterior(ids), solved_bonus)),
        "n_max 16": ("knapsack", "--n-max 16", None),
        "sequence mean, uniform": ("uniform", "", sequence_mean),
        "sequence mean": ("knapsack", "", sequence_mean),
        "prompt mean": ("knapsack", "", prompt_mean),
        "4 a prompt, uniform": ("uniform", HALF, None),
        "4 a prompt": ("knapsack", HALF, None),
        "16 a prompt, uniform": ("uniform", DOUBLE, None),
        "16 a prompt": ("knapsack", DOUBLE, None),
        "filtered": ("uniform", DOUBLE + " --prompts 128", lambda: first_mixed(64)),
    },
    "budgets": {
        "more early": ("knapsack", "", lambda: budget_from(768, 256)),
        "more late": ("knapsack", "", lambda: budget_from(256, 768)),
        "a price": ("knapsack", "", at_price),  # the mean price that the main runs of other seeds paid
    },
}  # fmt: skip
SHORTER = ("estimates", "ablations")
SEEDS = {"lr": (100, 101), "main": range(8), "long": range(8)}
SEEDS |= {part: range(4) for part in ("estimates", "ablations", "budgets")}

# ------------------------------------------------------------------------------------------ running


def load(part=None):
    """The rows of results/evidence.jsonl, of one part or of all."""
    rows = map(json.loads, RESULTS.read_text().splitlines()) if RESULTS.exists() else ()
    return [row for row in rows if part in (None, row["part"])]


def scores(allocator, rows) -> dict[float, float]:
    """{learning rate: held-out success, mean over the evaluations from step 60 on and over the seeds}"""
    found = collections.defaultdict(list)
    for row in rows:
        if row["part"] == "lr" and row["name"] == allocator:
            found[row["lr"]] += [s for step, _, s, _ in row["evaluations"] if step >= 60]
    return {lr: float(np.mean(x)) for lr, x in found.items()}


def best_rate(allocator, rows) -> float:
    of = scores(allocator, rows)
    return max(of, key=of.get)


def mean_price(work, seed) -> float:
    """What the last rollout of a step was worth, on average, in the main knapsack runs of other seeds."""
    prices = []
    for other in {0, 1, 2, 3} - {seed}:
        tracker = knapsack.SuccessTracker()
        for g in evaluate.each_row(work / f"main-knapsack-seed{other}" / "groups.jsonl"):
            prices.append(knapsack.shadow_price(tracker.posterior(g["ids"]), g["counts"]))
            tracker.update(g["ids"], g["successes"], g["counts"])
    return float(np.mean(prices))


def exchange(part, name, seed, work) -> None:
    """Make train.py the variant that is asked for."""
    what = VARIANTS[part][name][2] if part in VARIANTS else None
    if what is warm:
        warm(work / f"main-uniform-seed{seed + 4}" / "groups.jsonl")
    elif what is at_price:
        at_price(mean_price(work, seed))
    elif what:
        what()


def one(args) -> None:
    """A run, in a process of its own."""
    part, name, seed, flags = json.loads(args.job)
    exchange(part, name, seed, args.work)
    train.main(flags)


def summary(folder) -> dict:
    """What is worth keeping of a run folder."""
    rows, evaluations, spent = list(evaluate.each_row(folder / "metrics.jsonl")), [], 0
    for row in rows:
        spent += row["budget"] if row["step"] else 0
        if row["eval_success"] is not None:
            evaluations.append([row["step"], spent, row["eval_success"], round(row["eval_success_se"], 4)])
    rows = rows[1:]
    means = {}  # of ten steps each
    for name in (
        "effective_rollouts",
        "effective_prompts",
        "all_right",
        "all_wrong",
        "reward_mean",
        "budget",
    ):
        values = [row[name] for row in rows]
        means[name] = [round(float(np.mean(values[k : k + 10])), 4) for k in range(0, len(values), 10)]
    # Groups by size: how many, how many mixed, the estimates' sum, how many had a p_hat neither 0 nor 1.
    sizes, tracker = collections.defaultdict(lambda: np.zeros(4)), knapsack.SuccessTracker()
    for g in evaluate.each_row(folder / "groups.jsonl"):
        p_hat = tracker.windowed_rate(g["ids"])  # the paper's estimate; NaN in the first epoch
        for n, right, p, rate in zip(g["counts"], g["successes"], g["estimate"], p_hat, strict=True):
            sizes[int(np.ceil(np.log2(n)))] += 1, 0 < right < n, p, 0 < rate < 1
        tracker.update(g["ids"], g["successes"], g["counts"])
    phases = ("allocate", "sample", "verify", "update", "eval")
    return {
        "evaluations": evaluations,  # [step, rollouts spent, held-out success, its standard error]
        "means": means,
        "solved": [row["distinct_solved"] for row in rows[9::10]],
        "largest": max(row["n_largest"] for row in rows),
        "groups_up_to_2_to_the": {k: x.round(2).tolist() for k, x in sorted(sizes.items())},
        "seconds": {p: round(sum(row.get(f"time_{p}") or 0 for row in rows), 2) for p in phases},
    }


def jobs(part, rows) -> list[tuple]:
    """(part, name, lr, seed, train.py's flags) of each run; `rows` are those that decided about the rates."""
    found = []
    for seed in SEEDS[part]:  # seed by seed, so that what was cut short is still balanced
        for name, (whose, flags, _) in VARIANTS["main" if part == "lr" else part].items():
            rates = RATES if part == "lr" else [best_rate(whose, rows)]
            common = f"--steps {SHORT if part in SHORTER else STEPS} --eval-every 20"
            for lr in rates:
                words = f"--allocator {whose} --lr {lr} --seed {seed} {common} {flags}".split()
                found.append((part, name, lr, seed, words))
    return found


def run(args) -> None:
    from tqdm import tqdm

    for part in args.parts or SEEDS:
        done = {(r["part"], r["name"], r["lr"], r["seed"]) for r in load()}
        left = [job for job in jobs(part, load()) if job[:4] not in done]
        with ThreadPoolExecutor(args.workers) as pool:
            for row in tqdm(pool.map(partial(start, args), left), part, len(left), unit="run", disable=None):
                train.append(RESULTS, row)


def start(args, job) -> dict:
    part, name, lr, seed, words = job
    slug = name.replace(", ", "-").replace(" ", "_") + (f"-lr{lr:g}" if part == "lr" else "")
    folder = args.work / f"{part}-{slug}-seed{seed}"
    if not (folder / "final").exists():
        # A variant's own memory is not in a checkpoint: a run that was cut short starts again.
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        job = json.dumps([part, name, seed, [*words, "--out", str(folder)]])
        command = [sys.executable, __file__, "one", "--work", str(args.work), "--job", job]
        with folder.with_name(folder.name + ".log").open("w") as log:
            env = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, check=True, stdout=log, stderr=log, env=env)
    return {"part": part, "name": name, "lr": lr, "seed": seed, "flags": " ".join(words)} | summary(folder)


# ------------------------------------------------------------------- tables and figures of the chapters


def curves(part, name, last=10**9) -> tuple[np.ndarray, np.ndarray]:
    """(rollouts spent (E,), held-out success (seeds, E)) of a part's variant; seeds in order."""
    rows = sorted((r for r in load(part) if r["name"] == name), key=lambda r: r["seed"])
    points = [[(spent, s) for _, spent, s, _ in r["evaluations"] if spent <= last] for r in rows]
    return np.mean([[x for x, _ in p] for p in points], 0), np.array([[s for _, s in p] for p in points])


def with_error(values, form=".3f") -> str:
    """Mean and standard error over seeds; form "+.3f" for a difference."""
    se = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{np.mean(values):{form}} ± {se:{form.lstrip('+')}}"


# Student's t at 97.5% for n - 1 degrees of freedom: standard errors of n seeds are themselves uncertain.
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}


def half_width(differences) -> float:
    """Of the 95% interval over seeds."""
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
    k = above[0]
    if k == 0:
        return float(spent[0])
    part = (target - success[k - 1]) / (success[k] - success[k - 1])
    return float(spent[k - 1] + part * (spent[k] - spent[k - 1]))


def rollouts_ratio(name, draws=4000) -> tuple[float, float, float]:
    """Rollouts to reach uniform's final success, over uniform's rollouts: of the mean curves, and the 95%
    interval over seeds drawn again (uniform's own curve may reach its final mean early, so its ratio is
    not 1 by definition)."""
    spent, theirs = curves("main", name)
    _, base = curves("main", "uniform")

    def ratio(which):
        return when_reached(spent, theirs[which].mean(0), base[which, -1].mean()) / spent[-1]

    drawn = np.random.default_rng(0).integers(0, len(base), (draws, len(base)))
    low, high = np.quantile([ratio(w) for w in drawn], (0.025, 0.975), method="nearest")
    return ratio(np.arange(len(base))), low, high


def mean_of(part, name, key) -> float:
    return float(np.mean([np.mean(r["means"][key]) for r in load(part) if r["name"] == name]))


def table(head, lines) -> str:
    cells = [head.split("|"), ["---"] * (head.count("|") + 1), *lines]
    return "\n".join("| " + " | ".join(str(c).strip() for c in line) + " |" for line in cells)


def lr_table() -> str:
    """`scores`; a star marks the rate that was taken."""
    lines = []
    for name in ALLOCATORS:
        of, best = scores(name, load()), best_rate(name, load())
        lines.append([name, *(f"{of[lr]:.3f}" + "*" * (lr == best) for lr in RATES)])
    return table("allocator | " + " | ".join(f"{lr:g}" for lr in RATES), lines)


def main_table() -> str:
    head = "allocator | seeds | final | minus uniform | | all the way | | rollouts to uniform's end"
    lines, (_, base) = [], curves("main", "uniform")
    for name in ALLOCATORS:
        _, s = curves("main", name)
        cells = [name, len(s), with_error(s[:, -1])]
        if name == "uniform":
            cells += ["", "", "", ""]
        else:
            last, area = s[:, -1] - base[:, -1], (s - base)[:, 1:].mean(1)
            cells += [with_error(last, "+.3f"), verdict(last), with_error(area, "+.3f"), verdict(area)]
        ratio, low, high = rollouts_ratio(name)
        said = [f"{x:.2f}" if x < np.inf else "never" for x in (ratio, low, high)]
        lines.append([*cells, "{} ({} to {})".format(*said)])
    return table(head, lines)


def rollouts_table() -> str:
    """Where the rollouts went, means over steps and seeds."""
    head = "allocator | effective rollouts | effective prompts | ever solved | minus uniform | | largest"
    lines, base = [], None
    for name in ALLOCATORS:
        rows = sorted((r for r in load("main") if r["name"] == name), key=lambda r: r["seed"])
        solved, largest = np.array([r["solved"][-1] for r in rows]), max(r["largest"] for r in rows)
        base = solved if base is None else base  # uniform comes first
        of = [with_error(solved - base, "+.0f"), verdict(solved - base)] if name != "uniform" else ["", ""]
        ms = np.mean([1000 * r["seconds"]["allocate"] / STEPS for r in rows])
        shares = [f"{mean_of('main', name, k):.3f}" for k in ("effective_rollouts", "effective_prompts")]
        lines.append([name, *shares, with_error(solved, ".0f"), *of, largest, f"{ms:.1f}"])
    return table(head + " | allocation, ms", lines)


def groups_table(name) -> str:
    """Groups by size: how many, how many mixed, what was expected of them."""
    total = collections.defaultdict(lambda: np.zeros(4))
    for row in load("main"):
        if row["name"] == name:
            for k, x in row["groups_up_to_2_to_the"].items():
                total[int(k)] += x
    lines = [
        [f"{2 ** (k - 1) + 1} to {2**k}" if k > 1 else "2", int(n), *(f"{x / n:.2f}" for x in rest)]
        for k, (n, *rest) in sorted(total.items())
    ]
    return table("rollouts | groups | mixed | mean posterior | 0 < p̂ < 1", lines)


# What an ablation is compared with, where that is not `main`'s knapsack.
AGAINST = {"no fallback": ("main", "paper"), "filtered": ("main", "uniform")}
AGAINST |= {n: ("ablations", f"{n}, uniform") for n in ("sequence mean", "4 a prompt", "16 a prompt")}


def ablations(part) -> list[tuple]:
    """(name, what it is compared with, final (seeds,), differences (seeds,)) of a part that is through"""
    found = []
    for name in VARIANTS[part]:
        if not name.endswith("uniform"):
            where, other = AGAINST.get(name, ("main", "knapsack"))
            spent, s = curves(part, name)
            base = curves(where, other, last=spent[-1])[1][: len(s)]  # main has more seeds
            found.append((name, other, s[:, -1], (s - base)[:, -1]))
    return found


def ablation_table(part) -> str:
    lines = []
    for name, other, final, difference in ablations(part):
        effective = f"{mean_of(part, name, 'effective_rollouts'):.2f}"
        of = with_error(difference, "+.3f")
        lines.append([name, effective, with_error(final), other, of, verdict(difference)])
    return table("changed | effective rollouts | held-out success | against | difference | ", lines)


def long_table() -> str:
    """Differences from uniform and from the knapsack, seed by seed: at the end, and the mean over all
    evaluations after the start."""
    lines, bases = [], [curves("main", name)[1] for name in ("uniform", "knapsack")]
    for part, name in (("main", "uniform"), ("main", "knapsack"), *(("long", n) for n in VARIANTS["long"])):
        _, s = curves(part, name)
        cells = [name, f"{mean_of(part, name, 'effective_rollouts'):.2f}", with_error(s[:, -1])]
        for how in (lambda x: x[:, -1], lambda x: x[:, 1:].mean(1)):
            for base in bases:
                d = how(s - base)
                cells.append(f"{with_error(d, '+.3f')} {verdict(d)}" if d.any() else "")
        lines.append(cells)
    head = "seeds 0 to 7 | effective rollouts | final | minus uniform | minus knapsack"
    return table(head + " | all the way: minus uniform | minus knapsack", lines)


def budget_table() -> str:
    """The price is a guess and need not spend all: the constant budget is read where as much was spent."""
    lines, (at, base) = [], curves("main", "knapsack")
    for name in ("constant", *VARIANTS["budgets"]):
        spent, s = curves("budgets", name) if name != "constant" else (at, base[: len(SEEDS["budgets"])])
        same = np.array([np.interp(spent[-1], at, b) for b in base[: len(s)]])
        difference = s[:, -1] - same
        of = [with_error(difference, "+.3f"), verdict(difference)] if name != "constant" else ["", ""]
        lines.append([name, f"{spent[-1]:,.0f}", with_error(s[:, -1]), *of])
    return table("budget | rollouts | final | minus constant | ", lines)


def band(axis, part, name, seeds=None, **look) -> None:
    """Mean and standard error over the seeds, or the first so many."""
    spent, s = curves(part, name)
    s = s[:seeds]
    mean, se = s.mean(0), s.std(0, ddof=1) / np.sqrt(len(s)) if len(s) > 1 else np.zeros(len(spent))
    axis.plot(spent / 1000, mean, marker="o", ms=3, **look)
    axis.fill_between(spent / 1000, mean - se, mean + se, color=look["color"], alpha=0.2, lw=0)


def draw_main(path) -> None:
    with evaluate.picture(path, 2, 2) as (_, ((a, b), (c, d))):
        finals = []
        for name in ALLOCATORS:
            look = evaluate.look(name)
            band(a, "main", name, label=name, **look)
            rows = [r for r in load("main") if r["name"] == name]
            for axis, key in ((b, "effective_rollouts"), (c, "effective_prompts")):
                values = np.mean([r["means"][key] for r in rows], 0)
                axis.plot((np.arange(len(values)) + 0.5) * 5.12, values, **look)
            solved = np.mean([r["solved"] for r in rows], 0)
            d.plot(np.arange(1, len(solved) + 1) * 5.12, solved, **look)
            finals.append(f"{name} {curves('main', name)[1][:, -1].mean():.2f}")
        a.set(title=", ".join(finals), ylabel="held-out success")
        shares = [f"{mean_of('main', n, 'effective_rollouts'):.0%}" for n in ALLOCATORS]
        b.set(title=f"{' / '.join(shares)} of rollouts teach", ylabel="rollouts in mixed groups", ylim=(0, 1))
        shares = [f"{mean_of('main', n, 'effective_prompts'):.0%}" for n in ALLOCATORS]
        c.set(title=f"{' / '.join(shares)} of groups teach", ylabel="mixed groups", ylim=(0, 1))
        solved = [
            f"{np.mean([r['solved'][-1] for r in load('main') if r['name'] == n]):.0f}" for n in ALLOCATORS
        ]
        d.set(title=f"{' / '.join(solved)} prompts ever solved", ylabel="training prompts, of 1024")
        for axis in (a, b, c, d):
            axis.set(xlabel="thousand rollouts")
        a.legend(loc="lower right")


def draw_long(path) -> None:
    looks = {"told p": ("#2e7d32", "--"), "drifting": ("#b03060", "-.")}
    looks = {name: dict(color=color, linestyle=style) for name, (color, style) in looks.items()}
    _, base = curves("main", "uniform")
    with evaluate.picture(path, 1, 2) as (_, (a, b)):
        for name in ("uniform", "knapsack"):
            band(a, "main", name, label=name, **evaluate.look(name))
        rows = [("main", "knapsack"), *(("long", name) for name in VARIANTS["long"])]
        for k, (part, name) in enumerate(reversed(rows)):
            d = (curves(part, name)[1] - base)[:, -1]
            look = looks.get(name, evaluate.look("knapsack"))
            b.errorbar(d.mean(), k, xerr=half_width(d), fmt="o", color=look["color"])
        for name, look in looks.items():
            band(a, "long", name, label=name, **look)
        b.axvline(0, color="#7a7a7a", ls=":")
        b.set_yticks(range(len(rows)), [name for _, name in reversed(rows)])
        wins = [name for part, name in rows if verdict((curves(part, name)[1] - base)[:, -1]) == "win"]
        b.set(title=f"95% interval above zero: {', '.join(wins) or 'none'}")
        b.set_xlabel("final held-out success minus uniform's")
        a.set(title="Good estimates lift the knapsack", xlabel="thousand rollouts", ylabel="held-out success")
        a.legend(loc="lower right")


def draw_ablations(path) -> None:
    found = [x for part in SHORTER for x in ablations(part)][::-1]
    with evaluate.picture(path, 1, 1) as (fig, axis):
        fig.set_size_inches(6.4, 0.32 * len(found) + 1.2)
        for k, (_, other, _, difference) in enumerate(found):
            look = evaluate.look(other if other in evaluate.LOOK else "knapsack")
            axis.errorbar(difference.mean(), k, xerr=half_width(difference), fmt="o", color=look["color"])
        axis.axvline(0, color="#7a7a7a", ls=":")
        axis.set_yticks(range(len(found)), [f"{name}  (- {other})" for name, other, *_ in found])
        axis.set(xlabel="difference in held-out success, 95% interval")
        axis.locator_params(axis="x", nbins=6)
        names = [name for name, _, _, x in found if verdict(x) != "tie"]
        axis.set_title(f"{len(names)} of {len(found)} differences are beyond chance", loc="right")


def draw_budgets(path) -> None:
    looks = {"more early": ("#d9741a", "--"), "more late": ("#7a7a7a", "-."), "a price": ("#2e7d32", ":")}
    with evaluate.picture(path, 1, 2) as (_, (a, b)):
        band(a, "main", "knapsack", len(SEEDS["budgets"]), label="constant", color="#0057a8")
        b.axhline(EACH_STEP, color="#0057a8")
        for name, (color, style) in looks.items():
            look = dict(color=color, linestyle=style)
            band(a, "budgets", name, label=name, **look)
            spent = np.mean([r["means"]["budget"] for r in load("budgets") if r["name"] == name], 0)
            b.plot((np.arange(len(spent)) + 0.5) * 10, spent, **look)
        ends = [curves("budgets", name)[1][:, -1].mean() for name in looks]
        ends.append(curves("main", "knapsack")[1][: len(SEEDS["budgets"]), -1].mean())
        a.set(title=f"All end within {max(ends) - min(ends):.2f} of one another", ylabel="held-out success")
        a.set(xlabel="thousand rollouts")
        b.set(title="A fixed price buys most in the middle", xlabel="step", ylabel="rollouts a step")
        b.set_ylim(0, None)
        a.legend(loc="lower right")


TABLES = {
    "main": (lr_table, main_table, rollouts_table, *(partial(groups_table, a) for a in ALLOCATORS[1:])),
    "long": (long_table,),
    "estimates": (partial(ablation_table, "estimates"),),
    "ablations": (partial(ablation_table, "ablations"),),
    "budgets": (budget_table,),
}
FIGURES = {
    "main": ("evidence", draw_main),
    "long": ("estimates_decide", draw_long),
    "ablations": ("ablations", draw_ablations),
    "budgets": ("budgets", draw_budgets),
}


def report(args) -> None:
    for part, tables in TABLES.items():
        missing = len(VARIANTS[part]) * len(SEEDS[part]) - len(load(part))
        if missing:
            print(f"{part}: {missing} runs to go, left out\n")
            continue
        print(part, *(text() for text in tables), "", sep="\n\n")
        if part in FIGURES:
            name, draw = FIGURES[part]
            draw(HERE / "figures" / f"{name}.png")


# ------------------------------------------------------------------------------------ entry point


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["run", "report", "one"], help="one: what `run` starts for each run")
    parser.add_argument("--parts", nargs="+", choices=SEEDS, help="of `run` [all]")
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"), help="run folders [%(default)s]")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time [%(default)s]")
    parser.add_argument("--job", help="of `one`")
    args = parser.parse_args()
    {"run": run, "one": one, "report": report}[args.what](args)


if __name__ == "__main__":
    main()
