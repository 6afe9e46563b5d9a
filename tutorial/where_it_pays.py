"""Where does an allocation pay? Many small training runs, one JSON row each.

    python tutorial/where_it_pays.py --beds long --budgets 203 --rules uniform knapsack --seeds 0 1 2

The embedded model practises on one of two beds:

    sums   those of train.py: 2 to 10 digits
    long   2 to 24 digits, most of which are hopeless at the start

A run is train.py itself: 100 steps, 64 prompts a step, --budget rollouts. At its end the model
answers 1,024 sums of the bed's kind that no run has seen, four times each, and 256 of them 16
times. Its row goes to results/where_it_pays.jsonl. What has a row is not run again, and one
thread does a run: --workers of them go on at a time.
"""

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import evidence  # noqa: E402

import evaluate  # noqa: E402
import knapsack  # noqa: E402
import reward  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402

RESULTS = HERE / "results" / "where_it_pays.jsonl"
KEY = ("bed", "rule", "prompts", "budget", "lr", "seed", "steps")


# ---- The beds ------------------------------------------------------------------------------------------
LONGEST = {"sums": 10, "long": 24}  # digits of a sum
TOKENS = {"sums": (40, 64), "long": (90, 80)}  # at most, of an answer and of a prompt


# n distinct sums "3+5+2=" of 2 to `longest` digits, lengths drawn evenly, none of them in `known`.
def sums(n: int, longest: int, seed: int, known=()) -> list[reward.Task]:
    rng, found = random.Random(seed), {}
    while len(found) < n:
        digits = [rng.randint(1, 9) for _ in range(rng.randint(2, longest))]
        prompt = "+".join(map(str, digits)) + "="
        if prompt not in known:
            found[prompt] = str(sum(digits))
    return [reward.Task(f"sum-{seed}-{i}", *item) for i, item in enumerate(found.items())]


# The 1,280 problems of a bed, as a file for --tasks; those of train.py need none.
def tasks_of(bed: str, work: Path) -> str:
    if bed == "sums":
        return "arithmetic"
    path = work / f"{bed}.jsonl"
    rows = [{"id": t.id, "prompt": t.prompt, "answer": t.answer} for t in sums(1280, LONGEST[bed], seed=0)]
    if not path.exists():
        work.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in rows)
        evaluate.replace_file(path, lambda part: part.write_text(text))
    return str(path)


# ---- The rules -----------------------------------------------------------------------------------------
# name: (an entry of train.ALLOCATORS, settings of the tracker, problems at first sight)
RULES = {
    "uniform": ("uniform", {}, 1),
    "paper": ("paper", {}, 1),
    "knapsack": ("knapsack", {}, 1),
    "yesterday's estimates": ("knapsack", evidence.FORMER, 1),
    "saving": ("saving", {}, 1),
    "cheap first look": ("knapsack", {}, 4),
}


# The first epoch with `times` as many prompts a step, so that each gets so many rollouts less.
def look_first(times: int) -> None:
    plain = train.batch_of

    def batch_of(tasks, step, c):
        wide = dataclasses.replace(c, prompts=times * c.prompts)
        steps = len(tasks) // wide.prompts
        if step <= steps:
            return plain(tasks, step, wide)
        return plain(tasks, step - steps + len(tasks) // c.prompts, c)  # the second epoch

    train.batch_of = batch_of


# ---- A run ---------------------------------------------------------------------------------------------
def one(work: Path, job: dict) -> dict:
    slug = "-".join(str(job[name]) for name in KEY).replace(" ", "_").replace("'", "")
    folder, (allocator, memory, times) = work / slug, RULES[job["rule"]]
    shutil.rmtree(folder, ignore_errors=True)  # cut short, it starts again
    knapsack.SuccessTracker = partial(knapsack.SuccessTracker, **memory)
    look_first(times)
    words = f"--allocator {allocator} --prompts {job['prompts']} --budget {job['budget']} --lr {job['lr']} "
    words += f"--seed {job['seed']} --steps {job['steps']} --held-out 256 --save-every 10000 "
    words += "--max-new-tokens {} --max-prompt-tokens {} ".format(*TOKENS[job["bed"]])
    words = [*words.split(), "--tasks", tasks_of(job["bed"], work)]
    start = time.perf_counter()
    with folder.with_name(slug + ".log").open("w") as log:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            train.main([*words, "--out", str(folder)])
    row = summary(folder) | {"minutes": round((time.perf_counter() - start) / 60, 2)}
    row |= final(folder / "final", job, work)
    shutil.copy(folder / "groups.jsonl", folder.with_name(slug + ".groups.jsonl"))
    shutil.rmtree(folder)
    return job | row


# What is worth keeping of a run folder.
def summary(folder: Path) -> dict:
    untouched, *rows = evaluate.each_row(folder / "metrics.jsonl")
    # [step, held-out success, its standard error]
    curve = [
        [r["step"], r["eval_success"], round(r["eval_success_se"], 4)]
        for r in [untouched, *rows]
        if r["eval_success"] is not None
    ]
    shares = ("effective_rollouts", "effective_prompts", "all_right", "all_wrong")
    means = {name: round(float(np.mean([r[name] for r in rows])), 4) for name in shares}
    seconds = {k: round(sum(r[f"time_{k}"] for r in rows), 1) for k in ("allocate", "sample", "update")}
    spent = sum(r["budget"] for r in rows)
    return {"curve": curve, "spent": spent, "solved": rows[-1]["distinct_solved"]} | means | seconds


# Success of the last model on sums that nobody has seen.
def final(model: Path, job: dict, work: Path) -> dict:
    known = {t.prompt for t in reward.load_tasks(tasks_of(job["bed"], work))}
    tasks = sums(1024, LONGEST[job["bed"]], seed=1, known=known)
    weights, tokenizer = rollout.load_model(str(model))
    prompts = rollout.encode_tasks(tokenizer, tasks)
    sampler = rollout.HFSampler(weights, tokenizer, TOKENS[job["bed"]][0])
    judge = evaluate.judge_of("", "")
    four, _ = evaluate.evaluate(sampler, tasks, prompts, judge, 4, seed=1)  # (1024, 4)
    more, _ = evaluate.evaluate(sampler, tasks[:256], prompts, judge, 12, seed=2)  # (256, 12)
    sixteen = np.hstack([four[:256], more])  # (256, 16)
    judge.close()
    found = {"pass1": four.mean(), "pass4": four.max(1).mean(), "pass16": sixteen.max(1).mean()}
    found |= {"never16": (sixteen.max(1) == 0).mean(), "always16": sixteen.min(1).mean()}
    return {name: round(float(x), 4) for name, x in found.items()}


def load(**wanted) -> list[dict]:
    """The rows of results/where_it_pays.jsonl that hold these values."""
    rows = evaluate.each_row(RESULTS) if RESULTS.exists() else ()
    return [row for row in rows if wanted.items() <= row.items()]


# ---- What comes out ------------------------------------------------------------------------------------
# pass1, pass4, ... of a row's last model; "way": success averaged over all evaluations but the first.
def score(row: dict, measure: str) -> float:
    return float(np.mean([c[1] for c in row["curve"][1:]])) if measure == "way" else row[measure]


# rule - base, seed by seed, on the same bed with the same budget: (seeds,).
def differences(rule: str, measure="pass1", base="uniform", **cell) -> np.ndarray:
    ours, theirs = ({r["seed"]: r for r in load(rule=name, **cell)} for name in (rule, base))
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
        rows = load(rule=rule, **cell)
        shares = [np.mean([r[f"effective_{k}"] for r in rows]) for k in ("rollouts", "prompts")]
        cells = [
            rule,
            f"{len(rows)}",
            f"{np.mean([r['spent'] for r in rows]):,.0f}",
            *(f"{x:.2f}" for x in shares),
        ]
        for measure in names:
            mean = f"{np.mean([score(r, measure) for r in rows]):.3f}"
            d = differences(rule, measure, base, **cell)
            more = f" ({evidence.with_error(d, '+.3f')} {evidence.verdict(d)})" if rule != base else ""
            cells.append(mean + more)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# Of uniform's groups on the long sums with few rollouts, over the whole run.
def silent_share() -> float:
    return 1 - float(np.mean([r["effective_prompts"] for r in load(bed="long", budget=203, rule="uniform")]))


def draw(path: Path) -> None:
    """Left: the long sums with few rollouts. Right: knapsack - uniform, and its 95% interval, on two beds."""
    with evaluate.picture(path, 1, 2) as (_, (a, b)):
        for rule in ("uniform", "knapsack"):
            curves = np.array([[c[1] for c in r["curve"]] for r in load(bed="long", budget=203, rule=rule)])
            mean, se = curves.mean(0), curves.std(0, ddof=1) / len(curves) ** 0.5
            steps = np.array([c[0] for c in load(bed="long", budget=203, rule=rule)[0]["curve"]])
            a.plot(steps * 0.203, mean, label=f"{rule} ({len(curves)} seeds)", **evaluate.look(rule))
            a.fill_between(
                steps * 0.203, mean - se, mean + se, color=evaluate.look(rule)["color"], alpha=0.15
            )
        a.set(title="Few rollouts, hopeless problems: it pays", xlabel="thousand rollouts")
        a.set(ylabel="held-out success")
        a.legend()
        # The other bed's cell is chapter 7's: 8 a prompt, and the same estimates.
        easy = evidence.ends("long", "drifting") - evidence.ends("main", "uniform")
        hard = differences("knapsack", bed="long", budget=203)
        found = {
            f"long sums, {silent_share():.0%} silent": (203 / 64, hard, "s"),
            f"short sums, {1 - evidence.tens('main', 'uniform', 'effective_prompts').mean():.0%} silent": (
                8,
                easy,
                "o",
            ),
        }
        for (label, (each, d, marker)), color in zip(
            found.items(), (evaluate.BLUE, evaluate.ORANGE), strict=True
        ):
            label = f"{label} ({len(d)} seeds)"
            style = dict(color=color, marker=marker, ms=8, capsize=5, linestyle="", label=label)
            b.errorbar(each, d.mean(), evidence.half_width(d), **style)
        b.axhline(0, color="#444444", lw=1)
        b.set(title="Two cells of a map, with 95% intervals", xlabel="rollouts a prompt (mean)")
        b.set(ylabel="knapsack minus uniform at the end")
        b.set_xscale("log", base=2)
        b.xaxis.set_major_formatter("{x:g}")
        b.set_xlim(2, 16)
        b.legend()


def run(jobs: list[dict], work: Path, workers: int) -> None:
    from tqdm import tqdm

    os.environ["OMP_NUM_THREADS"] = "1"  # of each run; two of them share two cores
    done = [tuple(row[name] for name in KEY) for row in load()]
    left = [job for job in jobs if tuple(job.values()) not in done]
    work.mkdir(parents=True, exist_ok=True)
    # A fresh process for each run: what is exchanged there touches no other.
    fresh = {"mp_context": multiprocessing.get_context("spawn"), "max_tasks_per_child": 1}
    with ProcessPoolExecutor(workers, **fresh) as pool:
        for row in tqdm(pool.map(partial(one, work), left), total=len(left), unit="run", disable=None):
            train.log(RESULTS.parent, RESULTS.stem, row)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--beds", nargs="+", choices=LONGEST, default=["long"])
    add("--rules", nargs="+", choices=RULES, default=["uniform", "knapsack"])
    add("--prompts", nargs="+", type=int, default=[64], help="prompts a step")
    add("--budgets", nargs="+", type=int, default=[203], help="rollouts a step")
    add("--lrs", nargs="+", type=float, default=[2e-4], help="learning rates")
    add("--seeds", nargs="+", type=int, default=[0])
    add("--steps", nargs="+", type=int, default=[100])
    add("--work", type=Path, default=Path("runs/where_it_pays"), help="for run folders [%(default)s]")
    add("--workers", type=int, default=2, help="runs at a time [%(default)s]")
    args = parser.parse_args()
    # Seed by seed, so that what is cut short is still balanced.
    axes = product(args.seeds, args.beds, args.budgets, args.prompts, args.lrs, args.steps, args.rules)
    jobs = [
        dict(zip(KEY, (bed, rule, prompts, budget, lr, seed, steps), strict=True))
        for seed, bed, budget, prompts, lr, steps, rule in axes
    ]
    run(jobs, args.work, args.workers)


if __name__ == "__main__":
    main()
