"""Kill training runs at random moments, resume them, compare the end with a run that nobody disturbed.

    python tests/bench/stress_resume.py --kills 100 --out tutorial/results/stress_resume.json

Each run is killed again and again (SIGKILL, SIGTERM or SIGINT; at any moment after its start, some rows
later, during a save, or during an evaluation), resumed each time, and at last left to finish. It must then
hold, to the bit, what the undisturbed run holds: the rows of its three .jsonl files (but for times), the
files of final/, of the last checkpoint and of the best. The result is written after every run.
"""

import argparse
import filecmp
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS, EVAL_EVERY = 8, 4
# An evaluation of 400 samples lasts longer than a training step of 64: there is time to kill it.
FLAGS = ["--steps", STEPS, "--prompts", 16, "--budget", 64, "--held-out", 20, "--eval-every", EVAL_EVERY]
FLAGS += ["--eval-samples", 20, "--save-every", 2, "--engine", "hf"]
SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
MOMENTS = ["any time", "some rows later", "during a save", "during an evaluation"]


def rows(path: Path) -> list[dict]:
    """Every line, which must be whole, without what differs between two identical runs."""
    text = path.read_text()
    assert text.endswith("\n"), f"{path} ends in a torn line"
    out = [json.loads(line) for line in text.splitlines()]
    return [
        {k: v for k, v in r.items() if not k.startswith(("time_", "mem_")) and k != "seconds"} for r in out
    ]


def files_in(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def differences(one: Path, other: Path) -> list[str]:
    """What two finished runs do not have in common. A run that was asked to stop saved where it stopped, so
    its next to last checkpoint may be another one; the last and the best must be there."""
    found = [f"{name}.jsonl" for name in ("metrics", "groups", "samples")
             if rows(one / f"{name}.jsonl") != rows(other / f"{name}.jsonl")]  # fmt: skip
    last = sorted((one / "checkpoint").iterdir())[-1]
    best = json.loads((last / "state.json").read_text())["best"][1]
    for folder in {"final", f"checkpoint/{last.name}", f"checkpoint/step-{best:06d}"}:
        names = [files_in(run / folder) for run in (one, other)]
        same = names[0] == names[1] and len(names[0]) > 4
        same = same and all(
            filecmp.cmp(one / folder / n, other / folder / n, shallow=False) for n in names[0]
        )
        found += [] if same else [folder]
    return found


def n_rows(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def start(out: Path, tasks="arithmetic") -> subprocess.Popen:
    """A fresh run, or the next attempt at one that was killed."""
    flags = ["--resume", out] if (out / "config.json").exists() else [*FLAGS, "--tasks", tasks, "--out", out]
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, flags)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job ignores it
    )  # fmt: skip


def wait_for(moment: str, process, out: Path, rng: random.Random, launch_seconds: float) -> None:
    """Return at that moment of the run, or when the process has ended."""
    here = n_rows(out)
    if moment == "any time":
        until, pause = lambda: True, rng.uniform(0, 1.3 * launch_seconds)
    elif moment == "some rows later":
        # A resumed run first cuts rows back.
        wanted = rng.randint(1, 5)
        until, pause = lambda: n_rows(out) >= min(here, max(here - 1, 0)) + wanted, rng.uniform(0, 0.2)
    elif moment == "during a save":
        until, pause = lambda: any((out / "checkpoint").glob("*.part")), rng.uniform(0, 0.05)
    else:
        until, pause = lambda: n_rows(out) > here and n_rows(out) % EVAL_EVERY == 0, rng.uniform(0.1, 0.6)
    deadline = time.time() + 300
    while process.poll() is None and not until() and time.time() < deadline:
        time.sleep(0.001)
    deadline = time.time() + pause
    while process.poll() is None and time.time() < deadline:
        time.sleep(0.01)


def disturb(
    out: Path, rng: random.Random, kills: int, launch_seconds: float, tasks="arithmetic"
) -> list[dict]:
    """One run to its end, killed up to `kills` times on the way; what happened each time."""
    killed = []
    while True:
        process = start(out, tasks)
        if len(killed) < kills:
            moment, sent = rng.choice(MOMENTS), rng.choice(SIGNALS)
            wait_for(moment, process, out, rng, launch_seconds)
            process.send_signal(sent)  # does nothing to a process that has ended
        _, stderr = process.communicate(timeout=600)
        code = process.returncode
        if code == 0:
            return killed
        assert len(killed) < kills, stderr
        told = code in (130, 1) and sent != signal.SIGKILL  # it saved, or had nothing to save
        assert told or code == -sent, f"{code} after {sent.name} {moment}: {stderr}"
        # In the first half second, while Python itself is loading, Ctrl-C is Python's own.
        assert "Traceback" not in stderr or "KeyboardInterrupt" in stderr, stderr
        half = any((out / "checkpoint").glob("*.part"))
        killed.append(
            {"moment": moment, "signal": sent.name, "rows": n_rows(out), "half_saved": half, "code": code}
        )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    args = parser.parse_args()
    rng, begin = random.Random(args.seed), time.time()
    with tempfile.TemporaryDirectory() as folder:
        calm = Path(folder) / "calm"
        process = start(calm)
        while process.poll() is None and n_rows(calm) == 0:
            time.sleep(0.01)
        launch_seconds = time.time() - begin
        _, stderr = process.communicate()
        assert process.returncode == 0, stderr
        killed, different, runs = [], [], 0
        while len(killed) < args.kills:
            run = Path(folder) / f"run{runs}"
            runs += 1
            killed += disturb(run, rng, min(8, args.kills - len(killed)), launch_seconds)
            different += [f"{run.name}: {what}" for what in differences(calm, run)]
            result = {
                "command": f"python tests/bench/stress_resume.py --kills {args.kills} --seed {args.seed}",
                "kills": len(killed),
                "runs": runs,
                "different": different,
                "by_signal": Counter(k["signal"] for k in killed),
                "by_moment": Counter(k["moment"] for k in killed),
                "left_a_half_saved_checkpoint": sum(k["half_saved"] for k in killed),
                "before_the_first_row": sum(k["rows"] == 0 for k in killed),
                "seconds": round(time.time() - begin),
            }
            args.out.write_text(json.dumps(result, indent=2) + "\n")
            print(json.dumps({k: result[k] for k in ("kills", "runs", "different", "seconds")}), flush=True)
    sys.exit(bool(different))


if __name__ == "__main__":
    main()
