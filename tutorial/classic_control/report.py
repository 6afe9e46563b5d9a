"""What the recorded runs say: tables, paired differences, figures. Needs neither gymnasium nor PyTorch.

    python report.py            # prints the tables, draws reacher.png and pong.png

Differences are taken seed by seed. A verdict is win, loss or tie after Holm's correction for all comparisons
of both families of tasks.
"""

import json
from math import atan, cos, pi, sin, sqrt
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
RATES = (1e-3, 2e-3, 4e-3)
TUNING_SEEDS = (100, 101)  # to choose a rate for each rule, and for nothing else
EVALUATIONS = 12
COMPARED = ("random starts", "uniform", "knapsack", "more early")
PAIRS = [("random starts", "uniform"), ("knapsack", "uniform"), ("more early", "uniform")]
PAIRS += [("knapsack", "random starts"), ("more early", "random starts")]
# Of a run. Steps and seconds: to reach the mean final success of uniform's runs.
MEASURES = {"final": "final success", "steps": "steps to reach", "seconds": "CPU seconds to reach"}


# ---- 1. Rows ----
def load(file: Path) -> list[dict]:
    """The rows of a file, but for a torn last one."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def marks(row: dict) -> np.ndarray:
    """(EVALUATIONS,) equal steps at which runs are compared."""
    return np.arange(1, EVALUATIONS + 1) / EVALUATIONS * row["total"]


def success(row: dict) -> np.ndarray:
    """(EVALUATIONS,) held-out success at the marks, between evaluations on a straight line."""
    steps, right, *_ = zip(*row["curve"], strict=True)
    return np.interp(marks(row), steps, right)


def best_rate(rows: list[dict], rule: str) -> float:
    """The rate with the highest success, averaged over all marks of the tuning seeds' runs."""
    tried = {}
    for row in rows:
        if row["rule"] == rule and row["seed"] in TUNING_SEEDS:
            tried.setdefault(row["lr"], []).append(success(row).mean())
    return max(sorted(tried), key=lambda lr: np.mean(tried[lr]))


def final_runs(rows: list[dict], rule: str) -> list[dict]:
    """The runs of the comparison, by seed."""
    found = (r for r in rows if r["rule"] == rule and r["seed"] not in TUNING_SEEDS)
    return sorted(found, key=lambda r: r["seed"])


# ---- 2. Measures ----
def final(row: dict) -> float:
    """Mean of the last three marks: a single evaluation is noisy."""
    return float(success(row)[-3:].mean())


def when_reached(row: dict, target: float) -> tuple[float, float, bool]:
    """(steps, CPU seconds, whether at all). A run that never gets there counts as its whole length,
    which flatters it."""
    steps, right, cpu, _ = (np.array(x, float) for x in zip(*row["curve"], strict=True))
    there, at = np.flatnonzero(right >= target), np.inf
    if len(there):
        k = there[0]
        share = (target - right[k - 1]) / (right[k] - right[k - 1]) if k else 0.0
        at = steps[k - 1] + share * (steps[k] - steps[k - 1]) if k else 0.0
    reached = at <= row["total"]  # the last evaluation lies a little beyond it
    at = float(at if reached else row["total"])
    return at, float(np.interp(at, steps, cpu)), reached


def measures(rows: list[dict]) -> dict:
    """{rule: {measure: (seeds,)}}"""
    target = np.mean([final(r) for r in final_runs(rows, "uniform")])
    table = {}
    for rule in COMPARED:
        runs = final_runs(rows, rule)
        steps, seconds, reached = zip(*(when_reached(r, target) for r in runs), strict=True)
        table[rule] = {
            "final": np.array([final(r) for r in runs]),
            "steps": np.array(steps),
            "seconds": np.array(seconds),
            "reached": np.array(reached),
            "whole": np.array([r["curve"][-1][2] for r in runs]),  # CPU seconds of a run
        }
    return table


# ---- 3. Paired differences ----
def student_p(t: float, df: int) -> float:
    """Two-sided p of Student's t, for whole degrees of freedom (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = atan(abs(t) / sqrt(df))
    c2, term, total = cos(angle) ** 2, 1.0, 0.0
    odd = df % 2
    for k in range(1, (df - odd) // 2 + 1):
        total += term
        term *= c2 * (2 * k - (1 - odd)) / (2 * k + odd)
    if odd:
        return 1 - 2 / pi * (angle + sin(angle) * cos(angle) * total)
    return 1 - sin(angle) * total


def t95(df: int) -> float:
    """The t whose two-sided p is 0.05, by bisection."""
    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_p(middle, df) > 0.05 else (low, middle)
    return low


def paired(differences) -> tuple[float, float, float, float]:
    """(mean, standard error, half of the 95% t interval, p) of differences (seeds,), two at least."""
    d = np.asarray(differences, float)
    if len(d) < 2:
        raise ValueError(f"{len(d)} pairs of runs: two seeds are needed, of both rules")
    mean, error, df = d.mean(), d.std(ddof=1) / sqrt(len(d)), len(d) - 1
    p = student_p(mean / error, df) if error else float(mean == 0)
    return float(mean), float(error), float(t95(df) * error), p


def holm(p) -> np.ndarray:
    """Holm's adjusted p-values: the k-th smallest of n times n - k + 1, never below a smaller one's."""
    p = np.asarray(p, float)
    order = np.argsort(p, kind="stable")
    adjusted = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted[np.argsort(order, kind="stable")]


def comparisons(tables: dict) -> list[dict]:
    """Every pair, measure and task. Steps and seconds: in percent of the base's mean, + is saved."""
    found = []
    for task, table in tables.items():
        for rule, base in PAIRS:
            for name in MEASURES:
                a, b = table[rule][name], table[base][name]
                d = a - b if name == "final" else 100 * (b - a) / b.mean()
                mean, error, half, p = paired(d)
                found.append(
                    {"task": task, "rule": rule, "base": base, "measure": name, "mean": mean}
                    | {"error": error, "half": half, "p": p}
                )
    for row, p in zip(found, holm([r["p"] for r in found]), strict=True):
        row["holm"] = float(p)
        row["verdict"] = "tie" if p >= 0.05 else "win" if row["mean"] > 0 else "loss"
    return found


# ---- 4. What a reader sees ----
COLUMNS = "rule           rate  final success   steps to   reached  CPU s to  CPU s all  mixed"


def describe(task: str, rows: list[dict], table: dict) -> str:
    goal = table["uniform"]["final"].mean()
    head = f"{task}: {len(rows)} runs of {rows[0]['total']:,} steps, {rows[0]['variants']} variants, "
    lines = [head + f"uniform's final success {goal:.3f}", COLUMNS]
    for rule in COMPARED:
        t, runs = table[rule], final_runs(rows, rule)
        updates = [r["updates"] for r in runs]
        mixed = [sum(u["episodes_in_mixed_groups"]) / sum(u["episodes"]) for u in updates]
        error = t["final"].std(ddof=1) / sqrt(len(runs))
        lines.append(
            f"{rule:13} {best_rate(rows, rule):5g}  {t['final'].mean():.3f} ± {error:.3f}"
            f"  {t['steps'].mean():9,.0f}  {t['reached'].sum()} of {len(runs)}"
            f"  {t['seconds'].mean():8.1f}  {t['whole'].mean():8.1f}  {np.mean(mixed):5.2f}"
        )
    return "\n".join(lines)


def spending(rows: list[dict]) -> str:
    """Mean steps of an update in each third of the runs, by the steps already spent."""
    lines = []
    for rule in COMPARED:
        sizes = [[], [], []]
        for row in final_runs(rows, rule):
            steps = np.array(row["updates"]["steps"])
            before = np.append(0, steps[:-1])
            for third, size in zip(3 * before // row["total"], steps - before, strict=True):
                sizes[third].append(size)
        means = ", ".join(f"{np.mean(s):,.0f}" for s in sizes)
        lines.append(f"steps an update, by thirds of a run, {rule:13}: {means}")
    return "\n".join(lines)


def versus(found: list[dict]) -> str:
    """A line a pair: the difference of each measure, its 95% t interval, the verdict."""
    head = "final success               steps saved       CPU seconds saved"
    lines = [f"{'(95% t intervals over seeds)':38}{head}"]
    for k in range(0, len(found), len(MEASURES)):
        cells = []
        for c in found[k : k + len(MEASURES)]:
            low, high = c["mean"] - c["half"], c["mean"] + c["half"]
            if c["measure"] == "final":
                cells.append(f"{c['mean']:+.3f} ({low:+.3f} to {high:+.3f}) {c['verdict']:4}")
            else:
                cells.append(f"{c['mean']:+4.0f}% ({low:+4.0f} to {high:+4.0f}) {c['verdict']:4}")
        lines.append(f"{c['task']:7} {c['rule']:13} - {c['base']:13} " + "  ".join(cells).rstrip())
    least = min(found, key=lambda c: c["p"])
    what = f"{least['task']}, {least['rule']} - {least['base']}, {MEASURES[least['measure']]}"
    lines.append(f"{len(found)} comparisons, each a tie unless p < 0.05 with Holm's correction")
    lines.append(f"smallest p {least['p']:.3f}, corrected {least['holm']:.2f} ({what})")
    return "\n".join(lines)


STYLE = {  # colour, dashes, marker: any one of them tells the rules apart
    "random starts": ("#999999", (0, (1, 1.5)), "v"),
    "uniform": ("#000000", "-", "o"),
    "knapsack": ("#d55e00", "--", "s"),
    "more early": ("#0072b2", "-.", "^"),
}


def draw(task: str, rows: list[dict], table: dict, found: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), width_ratios=[1.25, 1])
    for rule in COMPARED:
        colour, dashes, marker = STYLE[rule]
        runs = final_runs(rows, rule)
        curves = np.array([success(r) for r in runs])  # (seeds, EVALUATIONS)
        mean, error = curves.mean(0), curves.std(0, ddof=1) / sqrt(len(runs))
        x = marks(runs[0]) / 1000
        left.plot(x, mean, color=colour, linestyle=dashes, marker=marker, markersize=4, label=rule)
        left.fill_between(x, mean - error, mean + error, color=colour, alpha=0.13, linewidth=0)
    goal = table["uniform"]["final"].mean()
    left.axhline(goal, color="black", linewidth=0.7, linestyle=":", label="uniform's final success")
    left.set(xlabel="environment steps (thousands)", ylabel="success on held-out variants", ylim=(0, 1))
    left.legend(loc="upper left", fontsize=9, framealpha=1, edgecolor="white")

    shown = [c for c in found if c["task"] == task and c["base"] == "uniform" and c["measure"] != "final"]
    for k, c in enumerate(reversed(shown)):
        colour, _, marker = STYLE[c["rule"]]
        right.errorbar(c["mean"], k, xerr=c["half"], color=colour, marker=marker, capsize=3)
    right.set_yticks(range(len(shown)), [f"{c['rule']}\n{c['measure']}" for c in reversed(shown)], fontsize=8)
    right.axvline(0, color="black", linewidth=0.8)
    top = len(shown) - 0.45
    right.text(0, top, "claimed:", fontsize=8, va="bottom", ha="right")
    for claimed, what, side in ((30, "30% steps", "left"), (25, "25% time", "right")):
        right.axvline(claimed, color="black", linewidth=0.7, linestyle=":")
        right.text(claimed, top, what, fontsize=8, va="bottom", ha=side)
    low, high = right.get_xlim()
    right.set(xlabel="saved against uniform (%), 95% t interval over seeds", ylim=(-0.6, top))
    right.set_xlim(min(low, -50), max(high, 50))
    figure.suptitle(title(task, found))
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def title(task: str, found: list[dict]) -> str:
    """The finding: what the knapsack saves of the steps, and whether that is more than chance."""
    said = []
    for rule in ("knapsack", "more early"):
        (c,) = (
            c for c in found
            if (c["task"], c["rule"], c["base"], c["measure"]) == (task, rule, "uniform", "steps")
        )  # fmt: skip
        less = "fewer" if c["mean"] >= 0 else "more"
        said.append(f"{rule} {abs(c['mean']):.0f}% {less} ({c['verdict']})")
    return f"{task.capitalize()}, steps to reach uniform's final success: " + ", ".join(said)


def read(results=HERE / "results") -> dict:
    """{task: rows} of the tasks that have been compared."""
    return {file.stem: load(file) for file in sorted(results.glob("*.jsonl"), reverse=True)}


def main(results=HERE / "results", figures=HERE) -> None:
    rows = read(results)
    tables = {task: measures(r) for task, r in rows.items()}
    found = comparisons(tables)
    for task, r in rows.items():
        print(describe(task, r, tables[task]))
        print(spending(r))
        draw(task, r, tables[task], found, figures / f"{task}.png")
    print(versus(found))


if __name__ == "__main__":
    main()
