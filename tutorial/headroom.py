"""How much can the embedded model learn, and how much of it does the default run learn?

    python tutorial/make_tiny_model.py --clean --out /tmp/ceiling     # the same network, right answers
    python tutorial/headroom.py --ceiling /tmp/ceiling                # three default runs
    python tutorial/headroom.py                                       # the same, the recorded ceiling kept

Held-out success (256 problems no run trains on, 16 samples each, temperature 1) of the shipped model,
of the ceiling, and after `python train.py --seed S`; the share of the gap each run closed, and its
seconds from command to finish. Writes tutorial/results/headroom.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import evaluate  # noqa: E402
import reward  # noqa: E402
import rollout  # noqa: E402


def held_out_success(folder: str) -> tuple[float, float]:
    """(mean, standard error over problems)."""
    tasks = reward.load_tasks("arithmetic")
    _, held_out = reward.split_held_out(tasks, 256, seed=0)  # as train.py splits
    model, tokenizer = rollout.load_model(folder)
    sampler = rollout.HFSampler(model, tokenizer, max_new_tokens=40)
    prompts = rollout.encode_tasks(tokenizer, held_out)
    with reward.Verifier() as verifier:
        right, _ = evaluate.evaluate(sampler, held_out, prompts, verifier, samples=16, seed=12345)
    return float(right.mean()), evaluate.standard_error(right.mean(1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ceiling", help="what make_tiny_model.py --clean wrote; else the recorded one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=HERE / "results" / "headroom.json")
    args = parser.parse_args()

    if args.ceiling:
        ceiling, ceiling_se = held_out_success(args.ceiling)
    else:  # pretraining has no part in what train.py does
        recorded = HERE / "results" / "headroom.json"
        ceiling, ceiling_se = json.loads(recorded.read_text())["ceiling"]
    start, start_se = held_out_success(rollout.resolve_model("tiny"))
    print(f"shipped {start:.3f} ± {start_se:.3f}, ceiling {ceiling:.3f} ± {ceiling_se:.3f}")
    runs = []
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, str(HERE.parent / "train.py"), "--seed", str(seed)]
            command += ["--out", folder + "/run"]
            begin = time.time()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            seconds = time.time() - begin
            success, se = held_out_success(folder + "/run/final")
        closed = (success - start) / (ceiling - start)
        print(f"seed {seed}: {success:.3f} ± {se:.3f}, {closed:.0%} of the gap, {seconds:.0f} s", flush=True)
        runs.append({"seed": seed, "success": success, "se": se, "gap_closed": closed, "seconds": seconds})
    result = {
        "what": "held-out success, 256 problems x 16 samples, temperature 1",
        "cores": len(os.sched_getaffinity(0)),
        "shipped": [start, start_se],
        "ceiling": [ceiling, ceiling_se],
        "runs": runs,
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
