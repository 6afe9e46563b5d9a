"""How fast reward.py scores, and whether hostile completions can stall it. Prints a table.

    python tests/bench/bench_reward.py gsm8k.jsonl math.jsonl [--workers 2] [--timeout 2]

Each FILE holds problems as JSON Lines, {"prompt", "answer"}. From each gold answer we make completions
whose verdict takes more and more work: the gold answer in a box (equal text), another problem's answer in
a box (a number against a number, or math-verify), the gold answer at the end of a text without a box (math-
verify has to find it). The last part scores 2048 completions without and with 20 distinct hostile ones
and holds the difference against ceil(20 / workers) x (time limit + restart of a worker).
"""

import argparse
import math
import random
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from reward import Verifier, load_tasks

REASONING = "We write $n = 2k + 1$ and see that 3 + 4 = 7, so that there are 12 of them. " * 20
FORMS = {  # name -> completion, from the gold answer and another problem's
    "gold answer in a box": lambda gold, other: rf"{REASONING} So it is \boxed{{{gold}}}.",
    "other answer in a box": lambda gold, other: rf"{REASONING} So it is \boxed{{{other}}}.",
    "gold answer in a text": lambda gold, other: rf"{REASONING} The answer is ${gold}$.",
}


def hostile(i: int) -> str:
    """Twenty distinct completions that math-verify does not finish."""
    forms = [
        r"9^{{9^{{9^{n}}}}}",
        r"({n}^{{99}})!",
        r"\sum_{{k=1}}^{{10^{{{n}}}}} \frac{{1}}{{k^2}}",
        r"(x+y+z+{n})^{{400}}",
    ]
    return rf"\boxed{{{forms[i % 4].format(n=i + 9)}}}"


def timed(verifier: Verifier, completions: list[str], answers: list[str]) -> tuple[float, float]:
    """(seconds, mean reward)"""
    start = time.perf_counter()
    rewards = verifier.score_many(completions, answers)
    return time.perf_counter() - start, float(rewards.mean())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", metavar="FILE", help='JSON Lines: {"prompt", "answer"}')
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=2, help="whole seconds for one completion")
    parser.add_argument("--batch", type=int, default=2048, help="completions scored at a time")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # of dropped rows

    start = time.perf_counter()
    with Verifier(args.workers, args.timeout) as verifier:
        verifier.score_many([rf"\boxed{{x+{i}}}" for i in range(args.workers)], ["y"] * args.workers)
        restart = time.perf_counter() - start
        print(f"{args.workers} workers ready after {restart:.2f} s")

        everything: list[tuple[str, str]] = []
        for file in args.files:
            golds = [task.answer for task in load_tasks(file)]
            golds = random.Random(0).choices(golds, k=args.batch)
            print(f"\n{Path(file).name}: {args.batch} completions, {len(set(golds))} different answers")
            for name, form in FORMS.items():
                others = golds[1:] + golds[:1]
                completions = [form(gold, other) for gold, other in zip(golds, others, strict=True)]
                seconds, mean = timed(verifier, completions, golds)
                print(f"  {name:<22} {args.batch / seconds:8.0f} a second   mean reward {mean:.3f}")
                everything += zip(completions, golds, strict=True)

        batch = random.Random(1).choices(everything, k=args.batch)
        clean, _ = timed(verifier, [c for c, _ in batch], [g for _, g in batch])
        for i in range(20):
            batch[i * (args.batch // 20)] = hostile(i), "5"
        before = verifier.timeouts + verifier.failures
        seconds, _ = timed(verifier, [c for c, _ in batch], [g for _, g in batch])
        stalled = verifier.timeouts + verifier.failures - before
        limit = clean + math.ceil(20 / args.workers) * (args.timeout + restart)
        verdict = "within" if seconds <= limit else "OVER"
        print(f"\n{args.batch} of all these, mixed: {clean:.2f} s. With 20 hostile ones among them, of which")
        print(f"{stalled} got no verdict: {seconds:.2f} s; limit {limit:.2f} s: {verdict}")
    return seconds > limit


if __name__ == "__main__":
    sys.exit(main())
