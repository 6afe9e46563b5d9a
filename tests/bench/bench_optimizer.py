"""The default run and SmolLM2 with AdamW and with torchao's AdamW in 8 bits: is it the same curve?

    pip install torchao==0.18.0 gguf accelerate
    python tutorial/get_smollm2.py smollm2 && python tutorial/make_additions.py additions.jsonl
    python tests/bench/bench_optimizer.py [--smollm2 smollm2 additions.jsonl]  # an hour and more on one core
    python tests/bench/bench_optimizer.py --show                                # the table of what is there

Three seeds each. Every row goes into tutorial/results/optimizer.json as soon as it is there, and is not run
again. A difference is taken seed by seed, 8 bits minus 32, with a 95% interval (Student's t, two degrees of
freedom): `end` after the last step, `way` averaged over all evaluations after step 0. Besides: the seconds of
an optimizer step (the median of 20, after what compiles) and the bytes of its state, on random gradients.

The rows that are there were made with the former estimates, SuccessTracker(prior_strength=0.25, drift=0), on
two cores shared with other work: their seconds are an upper bound.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tutorial")]
from classic_control.report import paired  # noqa: E402

OUT = ROOT / "tutorial" / "results" / "optimizer.json"
OPTIMIZERS, SEEDS = ("adamw", "adamw8bit"), (0, 1, 2)
FLAGS = {
    "tiny": "--engine hf",
    "SmolLM2": "--engine hf --prompts 8 --budget 64 --steps 8 --max-new-tokens 5 --lr 1e-5 --minibatches 1 "
    "--held-out 64 --eval-every 4 --eval-samples 2 --eval-temperature 1 --save-every 100",
}


def load() -> dict:
    return json.loads(OUT.read_text()) if OUT.exists() else {"runs": [], "steps": []}


def save(kind: str, row: dict) -> None:
    """The old file or the new one, whenever this is cut short."""
    result, part = load(), OUT.with_name(OUT.name + ".part")
    result[kind].append(row)
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(OUT)


def a_run(bed: str, optimizer: str, seed: int, more: list[str]) -> dict:
    flags = [*FLAGS[bed].split(), "--optimizer", optimizer, "--seed", str(seed)]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [sys.executable, str(ROOT / "train.py"), *more, *flags, "--out", str(out)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = [[r["step"], r["eval_success"]] for r in rows if r["eval_success"] is not None]
    updates = [r["time_update"] for r in rows[1:]]
    return {
        "bed": bed, "optimizer": optimizer, "seed": seed, "flags": " ".join(flags), "evaluations": found,
        "seconds": sum(r["seconds"] for r in rows), "first_update_seconds": updates[0],
        "update_seconds": statistics.median(updates[1:]),
    }  # fmt: skip


def a_step(bed: str, optimizer: str, path: str) -> dict:
    """What one optimizer step of that model takes, and what its state weighs."""
    import torch

    import rollout
    import train

    model, _ = rollout.load_model(rollout.resolve_model(path))
    made = train.make_optimizer(optimizer, model, 1e-6)
    seconds = []
    for step in range(23):
        torch.manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        start = time.perf_counter()
        made.step()
        seconds.append(time.perf_counter() - start)
    row = {"bed": bed, "optimizer": optimizer, "parameters": sum(p.numel() for p in model.parameters())}
    row |= {"first_seconds": seconds[0], "seconds": statistics.median(seconds[3:])}
    return row | {"state_bytes": state_bytes(made), "threads": torch.get_num_threads()}


def state_bytes(optimizer) -> int:
    """Of all plain tensors in the state, those inside a tensor subclass too."""
    import torch

    found = [x for of in optimizer.state.values() for x in of.values()]
    parts = [[y for y in vars(x).values() if torch.is_tensor(y)] or [x] for x in found]
    return sum(x.nbytes for of in parts for x in of)


def curves(bed: str, optimizer: str) -> np.ndarray:
    """(seeds, evaluations): held-out success."""
    rows = [r for r in load()["runs"] if (r["bed"], r["optimizer"]) == (bed, optimizer)]
    return np.array([[s for _, s in r["evaluations"]] for r in sorted(rows, key=lambda r: r["seed"])])


def interval(differences) -> tuple[float, float]:
    """(mean, half a 95% interval by Student's t) of three differences."""
    assert len(differences) == 3
    mean, _, half, _ = paired(differences)
    return mean, half


def compare(bed: str) -> dict[str, tuple[float, float]]:
    one, other = (curves(bed, name) for name in OPTIMIZERS)
    of = {"end": lambda x: x[:, -1], "way": lambda x: x[:, 1:].mean(1)}
    return {name: interval(f(other) - f(one)) for name, f in of.items()}


def show() -> None:
    print("| model | optimizer | before | end | way | a step, s | state, MB |\n|---|---|---|---|---|---|---|")
    for bed in FLAGS:
        for name in OPTIMIZERS:
            x = curves(bed, name)
            if not len(x):
                continue
            step = next((r for r in load()["steps"] if (r["bed"], r["optimizer"]) == (bed, name)), None)
            cost = f"{step['seconds']:.3f} | {step['state_bytes'] / 1e6:.1f}" if step else " | "
            means = " | ".join(f"{v:.3f}" for v in (x[:, 0].mean(), x[:, -1].mean(), x[:, 1:].mean()))
            print(f"| {bed} | {name} | {means} | {cost} |")
        if all(len(curves(bed, name)) == len(SEEDS) for name in OPTIMIZERS):
            said = [f"{name} {mean:+.3f} ± {half:.3f}" for name, (mean, half) in compare(bed).items()]
            print(f"{bed}, 8 bits minus 32: {', '.join(said)}")


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--smollm2", nargs=2, metavar=("FOLDER", "TASKS"))
    parser.add_argument("--show", action="store_true")
    args = parser.parse_args()
    beds = {"tiny": ("tiny", [])}
    if args.smollm2:
        folder, tasks = args.smollm2
        beds["SmolLM2"] = (folder, ["--model", folder, "--tasks", tasks])
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for bed, (path, more) in beds.items() if not args.show else ():
        for seed in SEEDS:
            for name in OPTIMIZERS:
                key = {"bed": bed, "optimizer": name}
                if not any((key | {"seed": seed}).items() <= r.items() for r in load()["runs"]):
                    save("runs", a_run(bed, name, seed, more))
                if not any(key.items() <= r.items() for r in load()["steps"]):
                    save("steps", a_step(bed, name, path))
    show()


if __name__ == "__main__":
    main()
