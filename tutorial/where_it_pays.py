"""Where does an allocation pay, and which one? Many small training runs, one JSON row each.

    python tutorial/where_it_pays.py --rules uniform knapsack --seeds 0 1 2 3     # goes on where it was
    ... --beds sums --budgets 192 256 384 512 1024 --seeds 0 1 2  # the map; for long 203 in place of 192
    ... --rules "told p" "prompt mean" dapo                                       # one thing changed
    ... --rules uniform hora spo --lrs 1e-4 2e-4 4e-4 --seeds 100 101             # chapter 10: rates, then
    ... --rules uniform hora spo --lrs best --seeds 0 1 2 3 4 5 6 7

The embedded model practises on one of two beds, SmolLM2-135M on the third (the README says how to get it,
as the folder smollm2):

    sums        those of train.py: 2 to 10 numbers of one digit
    long        2 to 24 of them, most of which are hopeless at the start
    additions   those of make_additions.py

A rule is one of RULES, one of neighbours.py's, or several joined by +. A run is train.py itself, 100 steps of
--budget rollouts for 64 prompts (additions: 40 and 32), until it has drawn steps times the budget. At its end
the model answers 1,024 (256) problems of the bed's kind that no run has seen, four times each, and a quarter
of them 16 times. Seeds from 100 on are for choosing rates and go without that: `--lrs best` takes for each
rule the one with the highest held-out success after 60% of the rollouts or more, over those seeds. A row of
results/where_it_pays.jsonl is not made twice. One thread does a run: --workers of them go on at a time. Where
there is a GPU it is used, and the rows say so.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import lru_cache, partial
from itertools import count, product
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
import neighbours  # noqa: E402
from classic_control.report import holm, paired  # noqa: E402
from make_additions import addition  # noqa: E402
from make_tiny_model import draw_mistakes  # noqa: E402

import evaluate  # noqa: E402
import knapsack  # noqa: E402
import reward  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402

RESULTS = HERE / "results" / "where_it_pays.jsonl"
KEY = ("bed", "rule", "prompts", "budget", "lr", "seed", "steps", "device")
TUNING = 100  # seeds from here on only choose a rate
OUTCOMES = (train.BLOWN_UP, "nothing to learn from")  # how a run may end and still be a row


# ---- The beds ------------------------------------------------------------------------------------------
# usual: what is compared, unless something else is asked for. tokens: at most, of an answer and of a prompt.
# problems: to train on, and to be held out of them; fresh ones at the end, and those to answer 16 times.
EMBEDDED = {"usual": {"prompts": 64, "lr": 2e-4, "steps": 100}, "problems": (1280, 256, 1024, 256)}
BEDS = {
    "sums": EMBEDDED | {"digits": 10, "tokens": (40, 64), "flags": "--eval-every 20"},
    "long": EMBEDDED | {"digits": 24, "tokens": (90, 80), "flags": "--eval-every 20"},
    "additions": {
        "usual": {"prompts": 32, "lr": 1e-5, "steps": 40},
        "problems": (320, 64, 256, 64),
        "tokens": (5, 64),
        "flags": "--eval-every 8 --minibatches 1 --eval-temperature 1 --model smollm2",
    },
}


# n distinct problems of a bed, none of them in `known`. Sums "3+5+2=" have lengths drawn evenly.
def problems(bed: str, n: int, seed: int, known=()) -> list[reward.Task]:
    rng, found = random.Random(seed), {}
    while len(found) < n:
        if bed == "additions":
            prompt, answer = addition(rng)
        else:
            digits = [rng.randint(1, 9) for _ in range(rng.randint(2, BEDS[bed]["digits"]))]
            prompt, answer = "+".join(map(str, digits)) + "=", str(sum(digits))
        if prompt not in known:
            found[prompt] = answer
    return [reward.Task(f"sum-{seed}-{i}", *item) for i, item in enumerate(found.items())]


# The problems of a bed to train on, as a file for --tasks; those of train.py need none.
def tasks_of(bed: str, work: Path) -> str:
    if bed == "sums":
        return "arithmetic"
    path, tasks = work / f"{bed}.jsonl", problems(bed, BEDS[bed]["problems"][0], seed=0)
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        rows = [{"id": t.id, "prompt": t.prompt, "answer": t.answer} for t in tasks]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        evaluate.replace_file(path, lambda part: part.write_text(text))
    return str(path)


# ---- The rules -----------------------------------------------------------------------------------------
# The knapsack on estimate(tracker, ids), with another value than the paper's if `value` is given.
def knapsack_on(estimate=lambda tracker, ids: tracker.posterior(ids), value=None):
    def allocate(tracker, ids, c):
        p = estimate(tracker, ids)
        if np.isnan(p).any():  # the paper's estimate of a prompt never seen
            return knapsack.uniform(len(ids), c.budget)
        return knapsack.allocate(p, c.budget, c.n_min, c.n_max, value)

    return allocate


# The tracker's defaults when this project began: no drift, so estimates of yesterday.
def remember_as_before():
    former = dict(discount=0.75, prior_strength=0.25, drift=0.0)
    knapsack.SuccessTracker = partial(knapsack.SuccessTracker, **former)
    return train.ALLOCATORS["knapsack"]


# The first epochs, or (0) all of them, with `times` as many prompts a step.
def widen(times: int, epochs: int) -> None:
    plain = train.batch_of

    def batch_of(tasks, step, c):
        wide = dataclasses.replace(c, prompts=times * c.prompts)
        steps = len(tasks) // wide.prompts
        if step <= epochs * steps or not epochs:
            return plain(tasks, step, wide)
        return plain(tasks, step - epochs * steps + epochs * (len(tasks) // c.prompts), c)

    train.batch_of = batch_of


# Unseen prompts get so few rollouts that there is room for four times as many.
def look_first():
    widen(4, epochs=1)
    return train.ALLOCATORS["knapsack"]


# Among four times as many prompts, each of which gets none, or 2 and more. The first two rollouts are worth,
# each, what the third is, so they are bought together and the greedy stays exact, but for one left over.
def choose():
    def allocate(tracker, ids, c):
        n = np.arange(c.n_max + 1)[:, None]
        worth = knapsack.expected_value(n, *tracker.posterior(ids))  # (n_max + 1, M)
        worth[1] = worth[2] / 2
        # Equal prompts in some order, or each of them would get its first rollout and none a second.
        worth = worth * (1 + 1e-9 * np.random.default_rng(0).random(len(ids)))
        counts = knapsack.solve_greedy(worth.T, c.budget)
        if (single := counts == 1).any():
            counts[single] = 0
            gains = np.vstack([np.diff(worth, axis=0), np.full(len(ids), -2)])  # nobody above n_max
            gains = np.where(counts, gains[counts, np.arange(len(ids))], -1)
            counts[gains.argmax()] += single.sum()
        return counts

    widen(4, epochs=0)
    return allocate


# Before each step 16 more answers of today's model to each prompt say how hard it is. They are not counted
# and not learned from: no method, but about what allocation could do if it knew p.
def told(seen, samples=16):
    seeds = count(500_000)  # no step of seeds 0 to 7 has such a one

    def estimate(tracker, ids):
        run, trials = seen.run, np.full(len(ids), samples)
        tasks = {t.id: t for t in run.train_tasks}
        extra = seen.sample([run.prompts[i] for i in ids], trials, next(seeds))
        asked, texts = [tasks[ids[r.group]] for r in extra], [r.text for r in extra]
        right = reward.grade(run.judge, asked, texts)  # (M x samples,)
        now = knapsack.SuccessTracker()
        now.update(ids, np.bincount([r.group for r in extra], right, minlength=len(ids)), trials)
        return now.posterior(ids)

    return knapsack_on(estimate)


# Before step 1 the tracker is handed the first epoch of another seed's uniform run.
def warm(job: dict, work: Path):
    other = job | {"rule": "uniform", "seed": (job["seed"] + 3) % 8}
    groups, known = work / f"{slug_of(other)}.groups.jsonl", []
    if not groups.exists():
        raise ValueError(f"{groups} is missing: run uniform on seed {other['seed']} first")

    def estimate(tracker, ids):
        for g in () if known else evaluate.each_row(groups):
            if g["ids"][0] in known:
                break  # the second epoch begins
            known.extend(g["ids"])
            tracker.update(g["ids"], g["successes"], g["counts"])
        return tracker.posterior(ids)

    return knapsack_on(estimate)


# Every prompt weighs the same in the loss, however many rollouts it got.
def prompt_mean():
    import grpo

    plain = grpo.group_advantages

    def advantages(rewards, group, **more):
        n = np.bincount(group)  # (M,)
        return plain(rewards, group, **more) * (n[n > 0].mean() / n[group])

    grpo.group_advantages = advantages
    return train.ALLOCATORS["knapsack"]


# Gives up a group unless it comes out mixed with a probability of `mixed` or more.
def saving_at(mixed: float):
    return lambda tracker, ids, c: knapsack.allocate_saving(tracker.posterior(ids), c.budget, c.n_min, mixed)


# AdamW divides a gradient's length away. Momentum alone does not: a longer gradient is a longer step.
def with_sgd(rule: str):
    train.make_optimizer = lambda _, model, lr: torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return train.ALLOCATORS[rule]


# name: function(seen, job, work) -> what decides the counts, as in train.ALLOCATORS. It may exchange a part
# of train.py besides. The rules of neighbours.py come on top.
RULES = {
    **{name: lambda *_, rule=rule: rule for name, rule in train.ALLOCATORS.items()},
    "yesterday's estimates": lambda *_: remember_as_before(),
    "told p": lambda seen, *_: told(seen),
    "warm start": lambda _, job, work: warm(job, work),
    "without InfoGain": lambda *_: knapsack_on(value=knapsack.prob_nonzero_gradient),
    "no fallback": lambda *_: knapsack_on(lambda tracker, ids: tracker.windowed_rate(ids)),
    "prompt mean": lambda *_: prompt_mean(),
    "choice among 256": lambda *_: choose(),
    "cheap first look": lambda *_: look_first(),
    **{f"{rule}, SGD": lambda *_, rule=rule: with_sgd(rule) for rule in ("uniform", "knapsack")},
    **{f"saving at {mixed}": lambda *_, mixed=mixed: saving_at(mixed) for mixed in (0.1, 0.5)},
}


# ---- A run ---------------------------------------------------------------------------------------------
# transformers copies keys and values for each of the heads that share them. torch's attention on a CPU
# reads them where they are: the same numbers to the bit, and sooner.
def share_keys() -> None:
    from transformers.integrations import sdpa_attention

    sdpa_attention.use_gqa_in_sdpa = lambda *_: True


def slug_of(job: dict) -> str:
    return re.sub(r"[^\w.+-]", "_", "-".join(str(job[name]) for name in KEY))


def one(work: Path, job: dict) -> dict:
    slug, rule, bed = slug_of(job), job["rule"], BEDS[job["bed"]]
    folder = work / slug
    if folder.exists():  # cut short, it starts again; unless a worker is still at it, its parent killed
        train.lock(folder).close()
        shutil.rmtree(folder)
    share_keys()
    if job["device"] == "cpu":
        # So much of the keys and values a CPU's own cache holds. The rollouts are the same.
        rollout.HFSampler.tokens_in_flight = 2**15
    if rule in RULES:
        seen = neighbours.watch()
        train.ALLOCATORS[rule] = RULES[rule](seen, job, work)
    else:
        seen = neighbours.plug(rule)
    words = f"--prompts {job['prompts']} --budget {job['budget']} --lr {job['lr']} "
    words += f"--seed {job['seed']} --steps {job['steps']} --save-every 10000 "
    words += "--max-new-tokens {} --max-prompt-tokens {} ".format(*bed["tokens"])
    words += f"--held-out {bed['problems'][1]} --engine hf {bed['flags']} "
    words += neighbours.FLAGS.get(rule, "").format(budget=job["budget"])
    words = [*words.split(), "--allocator", rule]
    words += ["--tasks", tasks_of(job["bed"], work), "--out", str(folder)]
    start, stopped = time.perf_counter(), None
    with folder.with_name(slug + ".log").open("w") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            try:
                train.main(words)
                if not rule.startswith("saving"):  # which means to draw less
                    go_on(folder, job["steps"], job["budget"])
            except SystemExit as stop:
                stopped = str(stop.code)
                if not any(end in stopped for end in OUTCOMES):
                    raise
    row = summary(folder) | {"minutes": round((time.perf_counter() - start) / 60, 2)}
    row["stopped"] = stopped
    if job["bed"] != "additions":
        row["facts"] = facts(job["bed"], folder / "groups.jsonl", work)
    if job["device"] == "cuda":
        row["gpu"] = torch.cuda.get_device_name()
    if job["seed"] < TUNING:
        row |= final(seen.run.model, seen.run.tokenizer, job["bed"], work)
    shutil.copy(folder / "groups.jsonl", folder.with_name(slug + ".groups.jsonl"))
    shutil.rmtree(folder)
    return job | row


# A rule that drew less gets more steps, until it has drawn as much.
def go_on(folder: Path, steps: int, budget: int) -> None:
    def drawn() -> list[int]:
        return [row["budget"] for row in evaluate.each_row(folder / "metrics.jsonl")][1:]

    while (left := steps * budget - sum(drawn())) >= budget / 2:
        further = len(drawn()) + max(1, round(left / np.mean(drawn()[-10:])))
        train.main(["--resume", str(folder), "--steps", str(further)])


# What is worth keeping of a run folder.
def summary(folder: Path) -> dict:
    untouched, *rows = evaluate.each_row(folder / "metrics.jsonl")
    spent = [0, *np.cumsum([r["budget"] for r in rows]).tolist()]
    # [step, held-out success, its standard error, rollouts so far]
    curve = [
        [r["step"], r["eval_success"], round(r["eval_success_se"], 4), so_far]
        for r, so_far in zip([untouched, *rows], spent, strict=True)
        if r["eval_success"] is not None
    ]
    shares = ("effective_rollouts", "effective_prompts", "all_right", "all_wrong")
    means = {name: round(float(np.mean([r[name] for r in rows])), 4) for name in shares}
    seconds = {k: round(sum(r[f"time_{k}"] for r in rows), 1) for k in ("allocate", "sample", "update")}
    return {"curve": curve, "spent": spent[-1], "solved": rows[-1]["distinct_solved"]} | means | seconds


# The facts, "a total that ends in u, plus d", that the model's teacher wrote wrong most often. For each: how
# many rollouts the sums that need it got in each fifth of the steps, and how many of them were right.
def facts(bed: str, groups: Path, work: Path, most=5) -> dict[str, list]:
    wrong, _ = draw_mistakes(np.random.default_rng(0), mean=0.25, concentration=1.0)  # (10, 10), its own
    worst = sorted(product(range(10), range(1, 10)), key=lambda fact: -wrong[fact])[:most]
    found, needs = {f"{u}+{d}": np.zeros((5, 2), int) for u, d in worst}, {}
    for task in reward.load_tasks(tasks_of(bed, work)):
        digits = [int(d) for d in task.prompt.strip("=").split("+")]
        totals = np.cumsum(digits) % 10  # 7, 5, ... of 7+8+...
        needs[task.id] = {f"{u}+{d}" for u, d in zip(totals[:-1], digits[1:], strict=True)} & found.keys()
    steps = list(evaluate.each_row(groups))
    for k, g in enumerate(steps):
        for i, right, n in zip(g["ids"], g["successes"], g["counts"], strict=True):
            for fact in needs[i]:
                found[fact][5 * k // len(steps)] += n, right
    return {fact: x.tolist() for fact, x in found.items()}


# Success of a model on problems that nobody has seen.
def final(model, tokenizer, bed: str, work: Path) -> dict:
    known = {t.prompt for t in reward.load_tasks(tasks_of(bed, work))}
    *_, fresh, often = BEDS[bed]["problems"]
    tasks = problems(bed, fresh, seed=1, known=known)
    prompts = rollout.encode_tasks(tokenizer, tasks)
    sampler = rollout.HFSampler(model, tokenizer, BEDS[bed]["tokens"][0])
    judge = evaluate.judge_of("", "")
    four, _ = evaluate.evaluate(sampler, tasks, prompts, judge, 4, seed=1)  # (fresh, 4)
    more, _ = evaluate.evaluate(sampler, tasks[:often], prompts, judge, 12, seed=2)  # (often, 12)
    sixteen = np.hstack([four[:often], more])  # (often, 16)
    judge.close()
    found = {"pass1": four.mean(), "pass4": four.max(1).mean(), "pass16": sixteen.max(1).mean()}
    found |= {"never16": (sixteen.max(1) == 0).mean(), "always16": sixteen.min(1).mean()}
    return {name: round(float(x), 4) for name, x in found.items()}


def load(**wanted) -> list[dict]:
    """The rows of results/where_it_pays.jsonl that hold these values."""
    if not RESULTS.exists():
        return []
    now = RESULTS.stat()
    rows = rows_of(RESULTS, now.st_mtime_ns, now.st_size)
    return [row for row in rows if wanted.items() <= row.items()]


# A chapter asks a thousand times; the file is read again when it has changed.
@lru_cache(1)
def rows_of(path: Path, changed: int, size: int) -> list[dict]:
    # Older rows lack the device, and are a CPU's.
    return [{"device": "cpu"} | row for row in evaluate.each_row(path)]


# A GPU multiplies in bfloat16, a CPU in float32: other runs. They are never mixed, and a CPU's go first.
def of_one_device(rows: list[dict]) -> list[dict]:
    device = "cpu" if any(r["device"] == "cpu" for r in rows) else "cuda"
    return [r for r in rows if r["device"] == device]


def runs(rule: str, **cell) -> list[dict]:
    """The compared runs of a rule, by seed: at the usual rate and shape, unless `cell` says otherwise."""
    found = [r for r in load(rule=rule, **(BEDS[cell["bed"]]["usual"] | cell)) if r["seed"] < TUNING]
    return sorted(of_one_device(found), key=lambda r: r["seed"])


# ---- What comes out ------------------------------------------------------------------------------------
# Held-out success after these shares of all the rollouts (of all steps, where a rule is to draw fewer),
# between two evaluations on a straight line.
def at(row: dict, shares) -> np.ndarray:
    by_steps = row["rule"].startswith("saving") or len(row["curve"][0]) < 4  # older rows lack the rollouts
    spent = [c[0] * row["budget"] if by_steps else c[3] for c in row["curve"]]
    return np.interp(np.asarray(shares) * row["steps"] * row["budget"], spent, [c[1] for c in row["curve"]])


def with_error(values, form=".3f") -> str:
    """Mean and standard error over seeds; form "+.3f" for a difference."""
    se = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.nan
    return f"{np.mean(values):{form}} ± {se:{form.lstrip('+')}}"


def verdict(differences) -> str:
    """A win or a loss if the 95% interval over seeds leaves out zero; anything less is a tie."""
    mean, _, half, _ = paired(differences)
    return "win" if mean > half else "loss" if mean < -half else "tie"


# pass1, pass4, ... of a row's last model; "late" and "way": held-out success, averaged over what is seen
# after 60% of the rollouts or more, and after each fifth.
def score(row: dict, measure: str) -> float:
    shares = {"late": (0.6, 0.8, 1.0), "way": (0.2, 0.4, 0.6, 0.8, 1.0)}.get(measure)
    return float(at(row, shares).mean()) if shares else row[measure]


def tuning(rule: str, bed: str, budget: int, steps: int | None = None) -> dict:
    """{(prompts, lr): late success of each seed} of the runs that choose a rate."""
    found, steps = {}, steps or BEDS[bed]["usual"]["steps"]
    rows = load(rule=rule, bed=bed, budget=budget, steps=steps)
    rows = [row for row in rows if row["seed"] >= TUNING]
    for row in of_one_device(rows):
        found.setdefault((row["prompts"], row["lr"]), []).append(score(row, "late"))
    return dict(sorted(found.items()))


# The rate (of the usual number of prompts, or of another one, or of any: `shapes`) with the highest success.
# At a rate at which one run falls below half of another's success, a run is not safe: it is none to choose.
def best(rule, bed: str, budget: int, steps=None, prompts=None, shapes: bool = False) -> dict:
    prompts, found = prompts or BEDS[bed]["usual"]["prompts"], tuning(rule, bed, budget, steps)
    found = {k: x for k, x in found.items() if shapes or k[0] == prompts}
    safe = {k: np.mean(x) for k, x in found.items() if min(x) > max(x) / 2}
    if not safe:
        raise ValueError(
            f"{rule} on {bed}, {budget} a step: run seeds {TUNING} and {TUNING + 1} at some --lrs first"
        )
    return dict(zip(("prompts", "lr"), max(safe, key=safe.get), strict=True))


# rule - base, seed by seed, on the same bed with the same budget: (seeds,). base_at: another rate or shape
# of the base's, {"prompts": 32}.
def differences(rule: str, measure="pass1", base="uniform", base_at=None, **cell) -> np.ndarray:
    both = runs(rule, **cell), runs(base, **cell | (base_at or {}))
    if len(devices := {r["device"] for rows in both for r in rows}) > 1:
        raise ValueError(f"{rule} and {base} ran on {devices}: name one, device=...")
    ours, theirs = ({r["seed"]: r for r in rows} for rows in both)
    seeds = sorted(ours.keys() & theirs.keys())
    return np.array([score(ours[s], measure) - score(theirs[s], measure) for s in seeds])


def table(rules, base="uniform", **cell) -> str:
    """Markdown: a row a rule, means and paired differences ± standard error over seeds."""
    names = {"pass1": "final", "way": "on the way", "pass4": "pass@4", "pass16": "pass@16"}
    lines = [
        "| rule | seeds | rollouts | in mixed groups | mixed groups | " + " | ".join(names.values()) + " |"
    ]
    lines.append("|" + " --- |" * (5 + len(names)))
    for rule in rules:
        rows = runs(rule, **cell)
        shares = [np.mean([r[f"effective_{k}"] for r in rows]) for k in ("rollouts", "prompts")]
        cells = [rule, f"{len(rows)}", f"{np.mean([r['spent'] for r in rows]):,.0f}"]
        cells += [f"{x:.2f}" for x in shares]
        for measure in names:
            mean = f"{np.mean([score(r, measure) for r in rows]):.3f}"
            d = differences(rule, measure, base, **cell)
            more = f" ({with_error(d, '+.3f')} {verdict(d)})" if rule != base else ""
            cells.append(mean + more)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rates_table(rules, bed: str, budget: int, steps: int | None = None) -> str:
    """Markdown: late success at each rate and number of prompts, over the seeds that choose. The star is
    the best of a row's rule."""
    found = {rule: tuning(rule, bed, budget, steps) for rule in rules}
    rates = sorted({lr for of in found.values() for _, lr in of})
    lines = ["| rule | prompts | " + " | ".join(f"{lr:g}" for lr in rates) + " |"]
    lines.append("|" + " --- |" * (2 + len(rates)))
    for rule, of in found.items():
        taken = best(rule, bed, budget, steps, shapes=True)
        for prompts in sorted({m for m, _ in of}):
            cells = []
            for lr in rates:
                star = "*" if {"prompts": prompts, "lr": lr} == taken else ""
                each = of.get((prompts, lr))
                cells.append(f"{np.mean(each):.3f}{star}" if each else "")
            lines.append(f"| {rule} | {prompts} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def corrected_table(rules, base="uniform", base_at=None, tuned=False, **cell) -> str:
    """Markdown: differences with 95% intervals (Student's t), p, and p after Holm over the whole table.

    tuned: every rule at its own best rate, and the base, too."""
    measures, found = ("pass1", "way", "pass4", "pass16"), {}
    if tuned:
        base_at = best(base, **cell)
    for rule in rules:
        own = cell | best(rule, **cell) if tuned else cell
        found |= {(rule, m): differences(rule, m, base, base_at, **own) for m in measures}
    p = [paired(d)[-1] for d in found.values()]
    p = {key: both for key, *both in zip(found, p, holm(p), strict=True)}
    lines = [f"| minus {base}, ± 95% | seeds | " + " | ".join(f"{m} | p | p, Holm" for m in measures) + " |"]
    lines.append("|" + " --- |" * (2 + 3 * len(measures)))
    for rule in rules:
        cells = [rule, f"{len(found[rule, measures[0]])}"]
        for m in measures:
            d = found[rule, m]
            cells.append(f"{d.mean():+.3f} ± {paired(d)[2]:.3f}")
            cells += [f"{x:.4f}" for x in p[rule, m]]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# Rollouts until the mean curve of a rule reaches the mean end of another, as a share of all; or infinity.
# Over the seeds that both have.
def when_reached(rule: str, base="uniform", base_at=None, **cell) -> float:
    shares = np.linspace(0, 1, 501)
    both = runs(rule, **cell), runs(base, **cell | (base_at or {}))
    seeds = set.intersection(*({r["seed"] for r in rows} for rows in both))
    ours, theirs = (np.mean([at(r, shares) for r in rows if r["seed"] in seeds], 0) for rows in both)
    above = np.flatnonzero(ours >= theirs[-1])
    return float(shares[above[0]]) if len(above) else np.inf


# Of uniform's groups, over the whole run.
def silent_share(bed="long", budget=203) -> float:
    return 1 - float(np.mean([r["effective_prompts"] for r in runs("uniform", bed=bed, budget=budget)]))


# The cells of a bed with at least `seeds` pairs: {budget: differences}.
def map_cells(bed: str, rule="knapsack", measure="pass1", seeds=3) -> dict[int, np.ndarray]:
    budgets = sorted({r["budget"] for r in load(bed=bed, **BEDS[bed]["usual"])})
    found = {n: differences(rule, measure, bed=bed, budget=n) for n in budgets}
    return {n: d for n, d in found.items() if len(d) >= seeds}


def map_table(rule="knapsack") -> str:
    """Markdown: a row a cell, rule - uniform and its 95% interval; verdicts after Holm over the map."""
    found = {
        (bed, n, m): d for m in ("pass1", "way") for bed in BEDS for n, d in map_cells(bed, rule, m).items()
    }
    p = dict(zip(found, holm([paired(d)[-1] for d in found.values()]), strict=True))
    lines = ["| bed | rollouts a prompt | seeds | uniform silent | uniform ends | final | on the way |"]
    lines.append("|" + " --- |" * 7)
    for bed, n, _ in [key for key in found if key[2] == "pass1"]:
        end = np.mean([r["pass1"] for r in runs("uniform", bed=bed, budget=n)])
        line = [bed, f"{n / BEDS[bed]['usual']['prompts']:.1f}", f"{len(found[bed, n, 'way'])}"]
        line += [f"{silent_share(bed, n):.2f}", f"{end:.3f}"]
        for m in ("pass1", "way"):
            d = found[bed, n, m]
            sure = p[bed, n, m] < 0.05
            said = "tie" if not sure else "win" if d.mean() > 0 else "loss"
            line.append(f"{d.mean():+.3f} ± {paired(d)[2]:.3f} {said}")
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    """Where the knapsack wins: few rollouts on hard problems; a longer run on easy ones. And the map:
    knapsack - uniform with its 95% interval, on all beds."""
    wins = {
        "Few rollouts, hard problems": dict(bed="long", budget=203, steps=100),
        "More steps, rare facts": dict(bed="sums", budget=512, steps=200),
    }
    with evaluate.picture(path, 1, 3) as (_, (*panels, b)):
        for axis, (title, cell) in zip(panels, wins.items(), strict=True):
            shares = np.linspace(0, 1, cell["steps"] // 20 + 1)
            for rule, other in (("uniform", {}), ("uniform", {"prompts": 128}), ("knapsack", {})):
                curves = np.array([at(r, shares) for r in runs(rule, **cell | other)])
                if len(curves) < 3:
                    continue
                mean, se = curves.mean(0), curves.std(0, ddof=1) / len(curves) ** 0.5
                x, name = shares * cell["budget"] * cell["steps"] / 1000, rule
                look = evaluate.look(rule)
                if other:
                    name, look = f"{rule}, 128 prompts", look | {"linestyle": "-.", "color": "black"}
                axis.plot(x, mean, label=f"{name} ({len(curves)} seeds)", **look)
                axis.fill_between(x, mean - se, mean + se, color=look["color"], alpha=0.15)
            axis.set(title=title, xlabel="thousand rollouts", ylabel="held-out success")
            axis.legend()
        looks = {
            "long": ("sums of up to 24 numbers", evaluate.BLUE, "s", 0.97),
            "sums": ("sums of up to 10 numbers", evaluate.ORANGE, "o", 1.03),
            "additions": ("SmolLM2's additions", "black", "D", 1.0),
        }
        for bed, (name, color, marker, aside) in looks.items():
            if not (found := map_cells(bed)):
                continue
            silent = [silent_share(bed, n) for n in found]
            silent = f"{max(silent):.0%} to {min(silent):.0%}" if len(silent) > 1 else f"{silent[0]:.0%}"
            label = f"{name}, {silent} of uniform's groups silent"
            style = dict(color=color, marker=marker, ms=7, capsize=4, linestyle="", label=label)
            each = [aside * n / BEDS[bed]["usual"]["prompts"] for n in found]  # side by side
            halves = [paired(d)[2] for d in found.values()]
            b.errorbar(each, [d.mean() for d in found.values()], halves, **style)
        b.axhline(0, color="#444444", lw=1)
        b.axvline(8, color=evaluate.GREY, lw=1, linestyle="--")
        b.annotate("--model Qwen2.5-Math-1.5B", (8, 1), (-12, -4), xycoords=("data", "axes fraction"),
                   textcoords="offset points", rotation=90, va="top", ha="right", fontsize=8)  # fmt: skip
        b.set(title="The map so far, with 95% intervals", xlabel="rollouts a prompt (mean)")
        b.set(ylabel="knapsack minus uniform at the end", xlim=(2.4, 20))
        b.set_ylim(-0.36, 0.26)  # room for the legend
        b.set_xscale("log", base=2)
        b.set_xticks([3, 4, 6, 8, 16], labels=["3", "4", "6", "8", "16"])
        b.legend(fontsize=7)


def run(jobs: list[dict], work: Path, workers: int) -> None:
    from tqdm import tqdm

    os.environ["OMP_NUM_THREADS"] = "1"  # of each run; two of them share two cores
    known = [tuple(row[name] for name in KEY) for row in load()]
    left = [job for job in jobs if tuple(job.values()) not in known]
    work.mkdir(parents=True, exist_ok=True)
    # A fresh process for each run: what is exchanged there touches no other.
    fresh = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    pool = ProcessPoolExecutor(workers, **fresh)
    futures, failed = {pool.submit(one, work, job): slug_of(job) for job in left}, []
    try:
        for done in tqdm(as_completed(futures), total=len(left), unit="run", disable=None):
            if error := done.exception():  # the others go on
                failed.append(f"{futures[done]}: {error}")
                tqdm.write(f"failed: {failed[-1]}", file=sys.stderr)
            else:
                train.log(RESULTS.parent, RESULTS.stem, done.result())
    finally:
        pool.shutdown(cancel_futures=True)
    if failed:
        sys.exit(f"{len(failed)} of {len(left)} runs failed, as said above; their logs are in {work}")


def rule_name(text: str) -> str:
    parts = text.split("+")
    joins = set(parts) <= set(neighbours.RULES) and (len(parts) == 1 or "spo-1" not in parts)
    if text not in RULES and not joins:
        raise argparse.ArgumentTypeError(f"no rule {text!r}: {', '.join([*RULES, *neighbours.RULES])}")
    return text


def rate(text: str):
    return text if text == "best" else float(text)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--beds", nargs="+", choices=BEDS, default=["long"])
    add("--rules", nargs="+", type=rule_name, default=["uniform", "knapsack"], metavar="RULE")
    add("--prompts", nargs="+", type=int, default=[None], help="prompts a step [64; additions: 32]")
    add("--budgets", nargs="+", type=int, default=[203], help="rollouts a step")
    add("--lrs", nargs="+", type=rate, default=[None], help="rates, or best [2e-4; additions: 1e-5]")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--steps", nargs="+", type=int, default=[None], help="[100; additions: 40]")
    add("--work", type=Path, default=Path("runs/where_it_pays"), help="for run folders [%(default)s]")
    add("--workers", type=int, default=2, help="runs at a time [%(default)s]")
    args = parser.parse_args()
    # Seed by seed, so that what is cut short is still balanced.
    axes = product(args.seeds, args.beds, args.budgets, args.prompts, args.lrs, args.steps, args.rules)
    jobs = []
    for seed, bed, budget, prompts, lr, steps, rule in axes:
        usual = BEDS[bed]["usual"]
        try:
            lr = best(rule, bed, budget, steps, prompts)["lr"] if lr == "best" else lr or usual["lr"]
        except ValueError as error:
            parser.error(str(error))
        prompts, steps = prompts or usual["prompts"], steps or usual["steps"]
        job = dict(zip(KEY, (bed, rule, prompts, budget, lr, seed, steps, rollout.device()), strict=True))
        if job not in jobs:
            jobs.append(job)
    run(jobs, args.work, args.workers)


if __name__ == "__main__":
    main()
