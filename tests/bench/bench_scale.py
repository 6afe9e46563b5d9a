"""How allocation scales: W workers that agree on a price, against one allocator that sees every prompt; and
rollouts dealt to workers, on real response lengths.

    python tests/bench/bench_scale.py [--prompts 10000128] [--out tutorial/scale_out/scale.json]
    python tests/bench/bench_scale.py --balance [--out tutorial/scale_out/balance.json]

**Price.** Prompts with p ~ Beta(0.5, 0.8), visited three times, 8 rollouts a prompt (the first visit uniform,
then allocated; a visit counts 0.75 of the next); 8 a prompt to spend. Two ways of giving prompts to workers:
mixed, and the worst case, sorted by difficulty. The search starts from the price that the first worker would
pay alone (cold), or 10% below the answer, as after a training step (warm). In each round a coordinator sends
each worker the price, 8 bytes, and gets its demand, 8 bytes; last it sends each its budget. Columns: rounds;
within 0.1%: the round in which the total demand first came that near; messages and bytes of all rounds; loss:
of the value that one allocator reaches, the part lost (the budget is spent exactly); alone: the same if each
worker spends B / W without asking anybody. One allocator must collect 16 bytes a prompt, its posterior.

**Balance.** lengths_smollm2_gsm8k.json holds the response lengths of SmolLM2-135M-Instruct on GSM8K prompts.
A batch is 256 of its prompts (drawn with replacement), 8 rollouts a prompt. As the model gets hardly one of
them right, success is made up to have ragged groups: p ~ Beta(0.5, 0.8), eight earlier outcomes each, counts
by the knapsack. Half of a prompt's lengths say what to expect, the other half is what comes (drawn with
replacement). Figures: the most loaded worker's tokens over an even share, less 1, expected and real; means
over 200 batches, and the worst of them; workers a prompt: how many have to compute the same prompt's prefix.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tutorial" / "scale_out"))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from many_workers import agree, deal

import knapsack

FOLDER = Path(__file__).resolve().parents[2] / "tutorial" / "scale_out"
EACH, WORKERS, BLOCKS = 8, (1, 4, 16, 64, 256), 256


# ------------------------------------------------------------------------------------------- price


def make_posteriors(m, seed=0):
    """(alpha, beta), each (m,), hard prompts first."""
    rng = np.random.default_rng(seed)
    p = np.sort(rng.beta(0.5, 0.8, m))
    alpha, beta, counts = np.full(m, 0.2), np.full(m, 0.3), knapsack.uniform(m, EACH * m)
    for visit in range(3):
        if visit:
            counts = knapsack.allocate((alpha, beta), EACH * m)
        successes = rng.binomial(counts, p)
        alpha = 0.2 + 0.75 * (alpha - 0.2) + successes
        beta = 0.3 + 0.75 * (beta - 0.3) + counts - successes
    return alpha, beta


class Blocks:
    """The prompts in 256 blocks; a worker has as many blocks as its share. Demand at a price is computed once
    for each block and price: it is the same whoever asks."""

    def __init__(self, posterior):
        self.parts = list(zip(*(np.array_split(x, BLOCKS) for x in posterior), strict=True))
        self.known, self.seconds = {}, []

    def demands(self, price):
        if price not in self.known:
            start = time.perf_counter()
            self.known[price] = [int(knapsack.allocate_at_price(part, price).sum()) for part in self.parts]
            self.seconds.append((time.perf_counter() - start) / BLOCKS)
        return np.array(self.known[price])  # (BLOCKS,)

    def of_worker(self, w, workers):
        """(alpha, beta) of worker w's prompts."""
        n = BLOCKS // workers
        return tuple(np.concatenate(x) for x in zip(*self.parts[w * n : (w + 1) * n], strict=True))

    def allocate(self, budgets):
        """(M,) counts when each worker spends its budget on its own prompts."""
        workers = len(budgets)
        return np.concatenate(
            [knapsack.allocate(self.of_worker(w, workers), int(b)) for w, b in enumerate(budgets)]
        )


class Rounds:
    """The demands of W workers at a price; remembers their totals, round by round."""

    def __init__(self, blocks, workers):
        self.blocks, self.workers, self.totals = blocks, workers, []

    def __call__(self, price):
        demands = self.blocks.demands(price).reshape(self.workers, -1).sum(1)  # (W,)
        self.totals.append(int(demands.sum()))
        return demands


def total_value(blocks, counts):
    cuts = np.cumsum([len(a) for a, _ in blocks.parts])[:-1]
    return sum(
        knapsack.expected_value(n, *part).sum()
        for n, part in zip(np.split(counts, cuts), blocks.parts, strict=True)
    )


def lost(posterior, counts, best, best_value):
    """1 - value(counts) / value(best), from the prompts where they differ: no digits cancel."""
    at = np.flatnonzero(counts != best)
    a, b = posterior[0][at], posterior[1][at]
    difference = knapsack.expected_value(best[at], a, b) - knapsack.expected_value(counts[at], a, b)
    return float(difference.sum() / best_value)


def bench_price(m):
    budget, rows = EACH * m, []
    sorted_ = make_posteriors(m)
    mixed = tuple(x[np.random.default_rng(1).permutation(m)] for x in sorted_)  # the same permutation twice
    for how, posterior in (("mixed", mixed), ("sorted", sorted_)):
        blocks = Blocks(posterior)
        start = time.perf_counter()
        best = knapsack.allocate(posterior, budget)
        seconds = time.perf_counter() - start
        best_value = total_value(blocks, best)
        answer = None
        for workers in WORKERS:
            first = blocks.of_worker(0, workers)
            guess = knapsack.shadow_price(first, knapsack.allocate(first, budget // workers))
            alone = blocks.allocate(knapsack.uniform(workers, budget))
            alone = lost(posterior, alone, best, best_value)
            for start_from in ("cold", "warm"):
                rounds = Rounds(blocks, workers)
                price, budgets = agree(rounds, budget, guess if start_from == "cold" else 0.9 * answer)
                answer = answer or price
                n = len(rounds.totals)
                near = np.flatnonzero(np.abs(np.array(rounds.totals) / budget - 1) <= 1e-3)
                row = dict(
                    prompts=m, split=how, workers=workers, start=start_from, rounds=n,
                    within=int(near[0]) + 1 if len(near) else None,  # a jump of the demand: none
                    messages=workers * (2 * n + 1), bytes=8 * workers * (2 * n + 1),
                    loss=lost(posterior, blocks.allocate(budgets), best, best_value), alone=alone,
                    seconds_one_allocator=round(seconds, 2),
                    seconds_a_round=round(float(np.mean(blocks.seconds)) * BLOCKS / workers, 3),
                )  # fmt: skip
                rows.append(row)
                print(
                    f"{how:6} W={workers:3} {start_from}: {n:2} rounds (within 0.1% in {row['within']}), "
                    f"{row['messages']:5} messages, {row['bytes']:6} bytes, loss {row['loss']:.1e} "
                    f"(alone {alone:.1e}), {row['seconds_a_round']:.2f} s a round a worker",
                    flush=True,
                )
        print(f"  one allocator: {16 * m:,} bytes to collect, {seconds:.1f} s", flush=True)
    return rows


def price_table(rows):
    """README's lines: from a cold start, prompts mixed / sorted."""
    yield "| workers | rounds | messages | bytes | value lost | lost if each spends B / W alone |"
    yield "|---|---|---|---|---|---|"
    for workers in WORKERS:
        both = [r for r in rows if r["workers"] == workers and r["start"] == "cold"]
        cells = [" / ".join(f"{r[k]:,}" for r in both) for k in ("rounds", "messages", "bytes")]
        cells += [
            " / ".join(f"{max(r[k], 0):.0e}" if r[k] > 0 else "0" for r in both) for k in ("loss", "alone")
        ]
        yield f"| {workers} | " + " | ".join(cells) + " |"


# ----------------------------------------------------------------------------------------- balance


def split_by_prompts(tokens, group, workers):
    """As many prompts each, whole groups."""
    return group * workers // (group.max() + 1)


def split_by_rows(tokens, group, workers):
    """As TRL's ranks get them: as many rollouts each, in order."""
    return np.arange(len(group)) * workers // len(group)


def split_groups(tokens, group, workers):
    """Longest processing time first, whole groups."""
    load, of_group = np.zeros(workers), np.zeros(group.max() + 1, np.int64)
    work = np.bincount(group, tokens)
    for g in np.argsort(-work):
        of_group[g] = load.argmin()
        load[of_group[g]] += work[g]
    return of_group[group]


def split_deal(tokens, group, workers):
    """many_workers.deal: groups cut, as many rollouts each."""
    return deal(tokens, workers)


def split_round_robin(tokens, group, workers):
    """many_workers.deal without a notion of lengths."""
    return deal(np.ones(len(tokens)), workers)


SPLITS = (split_by_prompts, split_by_rows, split_groups, split_round_robin, split_deal)


def bench_balance(path, batches=200, m=256):
    recorded = json.loads(path.read_text())["prompts"]
    rows = []
    for workers in (2, 4, 8, 16, 32, 64):
        rng = np.random.default_rng(0)
        results = {split: [] for split in SPLITS}
        for _ in range(batches):
            ids = rng.integers(len(recorded), size=m)
            right = rng.binomial(8, rng.beta(0.5, 0.8, m))
            counts = knapsack.allocate((0.2 + right, 0.3 + 8 - right), EACH * m)
            expected, real = np.empty(m), []
            for k, (i, n) in enumerate(zip(ids, counts, strict=True)):
                lengths = rng.permutation(recorded[i]["lengths"])
                expected[k] = lengths[: len(lengths) // 2].mean()
                real.append(rng.choice(lengths[len(lengths) // 2 :], n))
            group, real = np.repeat(np.arange(m), counts), np.concatenate(real)
            for split, result in results.items():
                worker = split(expected[group], group, workers)
                over = []
                for tokens in (expected[group], real):
                    load = np.bincount(worker, tokens, workers)
                    over.append(load.max() / load.mean() - 1)
                prefills = len(set(zip(worker.tolist(), group.tolist(), strict=True))) / m
                result.append([*over, prefills])
        for split, result in results.items():
            mean, worst = np.mean(result, 0), np.max(result, 0)
            name = split.__name__.removeprefix("split_")
            row = dict(workers=workers, split=name, expected=round(float(mean[0]), 4))
            row |= dict(expected_worst=round(float(worst[0]), 4), real=round(float(mean[1]), 4))
            row |= dict(prefills=round(float(mean[2]), 2))
            rows.append(row)
            print(
                f"W={workers:2} {name:12} expected tokens {row['expected']:+7.2%} (worst batch "
                f"{row['expected_worst']:+7.2%}), real {row['real']:+7.2%}, "
                f"{row['prefills']:5.2f} workers a prompt",
                flush=True,
            )
    return rows


def balance_table(rows):
    """README's lines: the most loaded worker's tokens over an even share, expected / real."""
    yield "| workers | prompts in order | rollouts in order | whole groups | round-robin | `deal` |"
    yield "|---|---|---|---|---|---|"
    for workers in sorted({r["workers"] for r in rows}):
        cells = [f"{r['expected']:+.1%} / {r['real']:+.1%}" for r in rows if r["workers"] == workers]
        yield f"| {workers} | " + " | ".join(cells) + " |"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=10_000_128, help="a multiple of 256")
    parser.add_argument("--balance", action="store_true", help="the second part instead of the first")
    parser.add_argument("--lengths", type=Path, default=FOLDER / "lengths_smollm2_gsm8k.json")
    parser.add_argument("--out", type=Path, help="write the rows there")
    args = parser.parse_args()
    if args.prompts % BLOCKS:
        parser.error(f"--prompts {args.prompts}: choose a multiple of {BLOCKS}")
    rows = bench_balance(args.lengths) if args.balance else bench_price(args.prompts)
    print(*(balance_table if args.balance else price_table)(rows), sep="\n")
    if args.out:
        args.out.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
