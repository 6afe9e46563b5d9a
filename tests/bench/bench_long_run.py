"""Does a long run stay as it began? Memory, file handles and processes over 500 steps of the embedded model;
then the files and the picture of a run of 10^5 steps.

    python tests/bench/bench_long_run.py --out tutorial/results/long_run

Writes OUT.json and OUT.png. Ten minutes on one core; --steps 20 --rows 1000 for a quick look.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import train  # noqa: E402

FLAGS = ["--prompts", 16, "--budget", 128, "--held-out", 64, "--engine", "hf"]
RECORDED = ROOT / "tutorial" / "results" / "tiny-knapsack-seed0"


def state_of(pid: int) -> tuple[float, int, int, int]:
    """(resident MiB, open files, threads, child processes) of a process, from /proc."""
    status = dict(line.split(":\t") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    children = sum(len(p.read_text().split()) for p in Path(f"/proc/{pid}/task").glob("*/children"))
    n_files = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return int(status["VmRSS"].split()[0]) / 1024, n_files, int(status["Threads"]), children


def watch(out: Path, steps: int) -> np.ndarray:
    """A run of `steps` steps; once a step: (step, MiB, files, threads, children)."""
    command = [sys.executable, ROOT / "train.py", *FLAGS, "--steps", steps, "--out", out]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL)
    seen: list[tuple] = []
    metrics = out / "metrics.jsonl"
    while process.poll() is None:
        step = metrics.read_bytes().count(b"\n") - 1 if metrics.exists() else -1
        if step >= 1 and (not seen or step > seen[-1][0]):
            try:
                seen.append((step, *state_of(process.pid)))
            except (FileNotFoundError, ProcessLookupError, KeyError):
                break  # it ended meanwhile
        time.sleep(0.05)
    assert process.wait() == 0
    return np.array(seen, dtype=float)


def grown(seen: np.ndarray) -> dict:
    """Growth from the second fifth of the run (all caches are warm) to the last, as medians."""
    fifth = len(seen) // 5
    early, late = np.median(seen[fifth : 2 * fifth], 0), np.median(seen[-fifth:], 0)
    slope = np.polyfit(seen[fifth:, 0], seen[fifth:, 1], 1)[0]
    result = {"mib_a_100_steps": round(100 * slope, 3)}
    for k, name in enumerate(("mib", "files", "threads", "children"), start=1):
        result[name] = [round(float(early[k]), 1), round(float(late[k]), 1)]
    return result


def long_files(folder: Path, n_rows: int) -> dict:
    """CPU seconds of what touches all rows of a run of n_rows steps, which repeats a recorded one."""
    metrics, groups = (list(evaluate.each_row(RECORDED / f"{name}.jsonl")) for name in ("metrics", "groups"))
    with (folder / "metrics.jsonl").open("w") as m, (folder / "groups.jsonl").open("w") as g:
        m.write(json.dumps(metrics[0]) + "\n")
        for step in range(1, n_rows):
            m.write(json.dumps(metrics[1 + (step - 1) % (len(metrics) - 1)] | {"step": step}) + "\n")
            g.write(json.dumps(groups[(step - 1) % len(groups)] | {"step": step}) + "\n")
    (folder / "config.json").write_text((RECORDED / "config.json").read_text())
    result = {"rows": n_rows, "megabytes": round(sum(p.stat().st_size for p in folder.iterdir()) / 1e6)}
    start = time.process_time()
    for _ in range(100):
        train.log(folder, "metrics", metrics[-1] | {"step": n_rows})
    result["cpu_seconds_append"] = (time.process_time() - start) / 100
    start = time.process_time()
    train.cut_back(folder, n_rows - 1)
    result["cpu_seconds_cut_back_for_resume"] = time.process_time() - start
    start = time.process_time()
    evaluate.draw_runs([folder], folder / "dashboard.png")
    result["cpu_seconds_dashboard"] = time.process_time() - start
    return result


def draw(seen: np.ndarray, path: Path) -> None:
    with evaluate.picture(path, 1, 2) as (_, (a, b)):
        change = grown(seen)["mib_a_100_steps"]
        a.plot(seen[:, 0], seen[:, 1], color="#0057a8")
        a.set(title=f"Resident memory: {change:+.1f} MiB a 100 steps", xlabel="step", ylabel="MiB")
        a.set_ylim(0, None)
        looks = [
            ("open files", "#0057a8", "-"),
            ("threads", "#d9741a", "--"),
            ("child processes", "#7a7a7a", ":"),
        ]
        for k, (name, color, line) in enumerate(looks, start=2):
            b.plot(seen[:, 0], seen[:, k], color=color, ls=line, label=name)
        b.set(title="Handles, threads and processes", xlabel="step", ylabel="number", ylim=(0, None))
        b.legend()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.png are written")
    args = parser.parse_args()
    command = f"python tests/bench/bench_long_run.py --steps {args.steps} --rows {args.rows}"
    result: dict = {"command": command, "flags": " ".join(map(str, FLAGS))}
    with tempfile.TemporaryDirectory() as folder:
        result["files"] = long_files(Path(folder), args.rows)
        args.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
        seen = watch(Path(folder) / "run", args.steps)
    result["run"] = {"steps": args.steps} | grown(seen)
    draw(seen, args.out.with_suffix(".png"))
    args.out.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
