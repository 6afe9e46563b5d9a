"""One training run twice, on the GPU and on its machine's CPU: how far apart do they end?

    python tests/bench/bench_gpu_learn.py GPU_RUN CPU_RUN [OUT.json]

Both are run folders of train.py with the same settings and seed. A GPU multiplies in bfloat16 and a CPU in
float32, so some rollout soon ends otherwise, and from there on the two are different runs of one method:
their held-out success should agree within its error, not to the digit. Two runs of a CPU are equal.
"""

import json
import sys
from pathlib import Path
from statistics import median

from bench_gpu import header, write

import evaluate


def first_difference(a: list[dict], b: list[dict]) -> int | None:
    """The first step at which a prompt got another count, or was solved another number of times."""
    return next((x["step"] for x, y in zip(a, b, strict=False) if x != y), None)


def main() -> None:
    runs = [Path(name) for name in sys.argv[1:3]]
    out = Path(sys.argv[3] if len(sys.argv) > 3 else "bench_gpu_learn.json")
    configs = [json.loads((run / "config.json").read_text()) for run in runs]
    other = [name for name in configs[0] if configs[0][name] != configs[1][name]]
    if other:
        sys.exit(f"the runs differ in {', '.join(other)}: nothing compared")
    gpu, cpu = rows = [list(evaluate.each_row(run / "metrics.jsonl")) for run in runs]
    groups = [list(evaluate.each_row(run / "groups.jsonl")) for run in runs]

    held_out = []
    for a, b in zip(gpu, cpu, strict=False):
        if a["eval_success"] is None or b["eval_success"] is None:
            continue
        row = {"step": a["step"], "gpu": a["eval_success"], "cpu": b["eval_success"]}
        row["difference"] = row["gpu"] - row["cpu"]
        # As if independent. The same problems are asked, so it is rather less.
        row["standard_error"] = (a["eval_success_se"] ** 2 + b["eval_success_se"] ** 2) ** 0.5
        held_out.append(row)
    seconds = [median(row["seconds"] for row in of[1:]) for of in rows]
    # The first update comes from the same weights: what differs there is arithmetic.
    first = {name: [of[1][name] for of in rows] for name in ("grad_norm", "entropy", "logprob_gap")}
    result = header() | {"runs": [run.name for run in runs], "held_out": held_out}
    result |= {"apart_from_step": first_difference(*groups), "first_step": first}
    result |= {"seconds_a_step": dict(zip(("gpu", "cpu"), seconds, strict=True))}
    write(out, result)
    last = held_out[-1]
    print(
        f"held-out success after {last['step']} steps: GPU {last['gpu']:.3f}, CPU {last['cpu']:.3f}, "
        f"difference {last['difference']:+.3f} (standard error {last['standard_error']:.3f}); "
        f"first step with other rollouts: {result['apart_from_step'] or 'none'}"
    )


if __name__ == "__main__":
    main()
