"""One batch under the microscope: how well does its gradient point where held-out success rises?

    python tutorial/microscope.py run      # about 15 minutes a line of BEDS on one core; goes on where it was
    python tutorial/microscope.py table

The true gradient, that of mean success on problems of the bed's kind, comes from 2,048 that are not trained
on, 8 answers each. (Few problems with more answers would not do: most of the noise is which problems they
are.) Each training problem is answered 64 times: 24 of the answers tell the rules its p, so that no estimate
is to blame, and batches are drawn from the other 40. A batch's gradient has a part along the true one, and
noise. A row of results/microscope.jsonl holds:

    cosine     of a batch's gradient with the true one: the mean part along it, of 2,000 batches, over the
               root mean square length, of 32; and its standard error
    direction  the cosine of the mean of the 32, noise taken out: where the rule pulls if batches are large
    signal     the squared length of that mean over that of the noise of one batch
    length     of a batch's gradient; `details` prints it as a multiple of uniform's
    live       the share of rollouts in mixed groups
    truth      the cosine of the true gradient's two halves: how well it is known itself
    tail       the share of its problems' squared lengths that the heaviest 1% of them hold

The part along the true gradient needs no gradient. Each answer's share of it is the slope of its log-prob as
the weights move that way, by finite differences; a batch's is a sum of those, weighted by the advantages.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import where_it_pays  # noqa: E402

import evaluate  # noqa: E402
import grpo  # noqa: E402
import knapsack  # noqa: E402
import reward  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402

RESULTS = HERE / "results" / "microscope.jsonl"
ANSWERS, TOLD, BATCHES, MANY = 64, 24, 32, 2000
FRESH, EACH = 2048, 8  # problems and answers of the true gradient
# Bed, rollouts a step, and how many steps of uniform the model has had.
BEDS = [("sums", 512, 0), ("sums", 512, 20), ("sums", 512, 100), ("long", 203, 0), ("long", 203, 100)]


# ---- Who gets rollouts: functions (p of all N problems, budget, rng) -> (problems, counts) ---------------
def uniform(each):
    def rule(p, budget, rng):
        m = int(budget / each + 1e-9)
        return rng.permutation(len(p))[:m], knapsack.uniform(m, budget)

    return rule


# The knapsack among 64 problems drawn at random, as train.py has it.
def inside(value=None):
    def rule(p, budget, rng):
        i = rng.permutation(len(p))[:64]
        return i, knapsack.allocate(p[i], budget, 2, ANSWERS - TOLD, value)  # as many as there are

    return rule


# Among k problems, where a problem may get none. The first two rollouts are bought together: each of them
# is worth what the third is, so the greedy stays exact but for one left over, and but for those equal at the
# margin, of which each gets one rollout or none: those stay unspent.
def choose(k, weight):
    def rule(p, budget, rng):
        i = rng.permutation(len(p))[:k]
        p, q, n = p[i], 1 - p[i], np.arange(2, ANSWERS - TOLD)[:, None]
        gains = weight(p) * np.vstack([np.tile(p * q, (2, 1)), p**n * q + q**n * p])  # (levels, k)
        counts = np.bincount(np.argsort(-gains.ravel(), kind="stable")[:budget] % len(p), minlength=len(p))
        counts[counts == 1] = 0
        return i[counts > 0], counts[counts > 0]

    return rule


# The m problems of largest p q, the same number each.
def uncertain(m):
    def rule(p, budget, rng):
        i = np.argsort(-(p * (1 - p) + 1e-6 * rng.random(len(p))))[:m]  # of equal ones a random one
        return i, knapsack.uniform(m, budget)

    return rule


RULES = {
    "uniform, 16 each": uniform(16),
    "uniform": uniform(8),
    "uniform, 4 each": uniform(4),
    "uniform, 2 each": uniform(2),
    "knapsack": inside(),
    "knapsack without InfoGain": inside(knapsack.prob_nonzero_gradient),
    "choice among 256": choose(256, knapsack.info_gain),
    "choice among all": choose(10**6, knapsack.info_gain),
    "choice among all without InfoGain": choose(10**6, np.ones_like),
    "the 64 most uncertain": uncertain(64),
}
# With 203 rollouts, 64 prompts get 3.2 each: that is uniform there.
FEW = {
    "uniform, 16 each": None,
    "uniform, 4 each": None,
    "uniform": uniform(203 / 64),
    "uniform, 8 each": uniform(8),
}


# What is learned from a batch: advantages (R,), by the two parts of a loss that allocation touches. With the
# token mean a prompt weighs as much as it has rollouts; with a mean over each prompt they all weigh the same.
def advantages(rewards, group, kind, mean_of):
    A = grpo.group_advantages(rewards, group, kind=kind)
    n = np.bincount(group)[group]  # (R,)
    return A if mean_of == "tokens" else A * len(A) / len(np.unique(group)) / n


LOSSES = [(kind, of) for of in ("tokens", "each prompt") for kind in ("scaled", "centred")]


# ---- Gradients -------------------------------------------------------------------------------------------
def gradient(model, rollouts, A) -> np.ndarray:
    """(parameters,) of the mean over tokens of A log p. Silent rollouts cost nothing."""
    import torch

    model.zero_grad(set_to_none=True)
    live, tokens = np.flatnonzero(A), sum(len(r.response_ids) for r in rollouts)
    for rows in grpo.microbatches(rollouts, live, 16384) if len(live) else ():
        logp = grpo.token_logprobs(model, [rollouts[i] for i in rows])
        weight = np.concatenate([np.full(len(rollouts[i].response_ids), A[i]) for i in rows])
        ((torch.tensor(weight, dtype=torch.float32) * logp).sum() / tokens).backward()
    flat = [(p.new_zeros(p.shape) if p.grad is None else p.grad).flatten() for p in model.parameters()]
    return torch.cat(flat).numpy()


# n answers to each task: rollouts and rewards, a list and an array (tasks, n).
def answered(sampler, judge, prompts, tasks, n, seed):
    rollouts, right = [], []
    for k in range(0, len(tasks), 64):
        few = tasks[k : k + 64]
        rewards, got = evaluate.evaluate(sampler, few, prompts, judge, n, seed + k)
        rollouts += [got[i * n : (i + 1) * n] for i in range(len(few))]
        right.append(rewards)
    return rollouts, np.concatenate(right)


# The gradient of mean success, each answer against the mean of the other ones: each problem's part of it.
def true_gradient(model, rollouts, right):
    for of, rewards in zip(rollouts, right, strict=True):
        A = grpo.group_advantages(rewards, np.zeros(len(of), int), clip=1e9, kind="leave-one-out")
        yield gradient(model, of, A) * sum(len(r.response_ids) for r in of) / right.size


# The share that the heaviest 1% of these squared lengths hold: 0.01 if all are alike.
def tail(squared) -> float:
    return sum(sorted(squared)[-(len(squared) // 100) :]) / sum(squared)


def slopes(model, rollouts, truth: np.ndarray, step=1e-4) -> np.ndarray:
    """(R,) how fast the log-prob of each whole response rises as the weights move along truth / |truth|."""
    import torch

    way = torch.from_numpy(truth / np.linalg.norm(truth))
    parts = way.split([p.numel() for p in model.parameters()])
    found = np.zeros(len(rollouts))
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(model.parameters(), parts, strict=True):
                p += sign * step * d.view_as(p)
            for rows in grpo.microbatches(rollouts, np.arange(len(rollouts)), 2**16):
                some = [rollouts[i] for i in rows]
                logp = grpo.token_logprobs(model, some).double().numpy()
                ends = np.cumsum([len(r.response_ids) for r in some])[:-1]
                found[rows] += sign * np.array([x.sum() for x in np.split(logp, ends)])
            for p, d in zip(model.parameters(), parts, strict=True):
                p -= sign * step * d.view_as(p)
    return found / (2 * step)


# Of the parts along the true direction (many batches), and of BATCHES gradients: their parts, squared lengths
# and sum.
def numbers(many, along, squared, total) -> dict:
    many, along, squared, n = np.array(many), np.array(along), np.array(squared), len(along)
    length = squared.mean() ** 0.5
    signal = (total @ total - squared.sum()) / (n * (n - 1))  # |mean|^2 without its noise
    cosine, error = many.mean() / length, many.std(ddof=1) / len(many) ** 0.5 / length
    # The length's own relative error is half that of its square.
    error = np.hypot(error, cosine * squared.std(ddof=1) / n**0.5 / squared.mean() / 2)
    # Noise can hide a mean altogether: then it has no direction that could be told.
    seen = signal > 0.05 * squared.mean()
    found = {"cosine": cosine, "se": error, "direction": many.mean() / signal**0.5 if seen else None}
    found |= {"signal": signal / (squared.mean() - signal), "length": length}
    return {k: x if x is None else float(x) for k, x in found.items()}


def look(bed: str, budget: int, steps: int, work: Path) -> list[dict]:
    """All rows of one model: each rule with GRPO's loss, and two of them with the other losses."""
    from tqdm import tqdm

    where_it_pays.share_keys()
    limits = where_it_pays.BEDS[bed]["tokens"]
    tasks = where_it_pays.tasks_of(bed, work)
    path = "tiny"
    if steps:
        folder = work / f"{bed}-{budget}-{steps}"
        path = str(folder / "final")
        if not Path(path).exists():
            words = f"--tasks {tasks} --allocator uniform --budget {budget} --steps {steps} --lr 2e-4 "
            words += f"--out {folder} --eval-every {steps} --held-out 256 "
            words += "--max-new-tokens {} --max-prompt-tokens {}".format(*limits)
            begun = (folder / "config.json").is_file()  # and cut short
            train.main(["--resume", str(folder)] if begun else words.split())
    training, held_out = reward.split_held_out(reward.load_tasks(tasks), 256)
    known = {t.prompt for t in training + held_out}
    fresh = where_it_pays.problems(bed, FRESH, seed=2, known=known)
    model, tokenizer = rollout.load_model(rollout.resolve_model(path))
    prompts = rollout.encode_tasks(tokenizer, training + fresh)
    sampler = rollout.HFSampler(model, tokenizer, limits[0])
    with evaluate.judge_of("", "") as judge:
        rollouts, rewards = answered(sampler, judge, prompts, fresh, EACH, 70_000)
        pool, right = answered(sampler, judge, prompts, training, ANSWERS, 9_000)
    halves, squared = [0, 0], []
    for k, part in enumerate(true_gradient(model, rollouts, rewards)):
        halves[2 * k // FRESH] = halves[2 * k // FRESH] + part
        squared.append(float(part @ part))
    truth, heavy = halves[0] + halves[1], tail(squared)
    alike = float(halves[0] @ halves[1] / np.prod([np.linalg.norm(h) for h in halves]))
    drawn_from = [r for of in pool for r in of[TOLD:]]
    slope = slopes(model, drawn_from, truth).reshape(len(pool), ANSWERS - TOLD)
    tokens = np.array([len(r.response_ids) for r in drawn_from]).reshape(slope.shape)
    p = (right[:, :TOLD].sum(1) + 0.25) / (TOLD + 0.5)  # (N,)
    rules = RULES if budget == 512 else {k: r for k, r in (RULES | FEW).items() if r}
    looks = [(name, "scaled", "tokens") for name in rules]
    looks += [(name, *loss) for name in ("uniform", "knapsack") for loss in LOSSES[1:]]
    found = []
    for name, kind, of in tqdm(looks, f"{bed}, {budget}, step {steps}"):
        many, along, squared, live, total = [], [], [], [], 0
        for batch in range(MANY):
            rng = np.random.default_rng([batch, 5])  # the same problems, as far as that goes
            chosen, counts = rules[name](p, budget, rng)
            which = [rng.permutation(ANSWERS - TOLD)[:n] for n in counts]
            problem, group = np.repeat(chosen, counts), np.repeat(range(len(counts)), counts)  # (R,)
            answer = np.concatenate(which)
            A = advantages(right[problem, TOLD + answer], group, kind, of)
            many.append(A @ slope[problem, answer] / tokens[problem, answer].sum())
            live.append((A != 0).mean())
            if batch < BATCHES:
                drawn = [pool[i][TOLD + j] for i, j in zip(problem, answer, strict=True)]
                drawn = [dataclasses.replace(r, group=int(g)) for r, g in zip(drawn, group, strict=True)]
                grad = gradient(model, drawn, A)
                along.append(grad @ truth / np.linalg.norm(truth))
                squared.append(grad @ grad)
                total = total + grad
        if not np.allclose(many[:BATCHES], along, atol=0.05 * np.std(along)):
            raise ArithmeticError(
                f"{name}: the slopes do not add up to the gradient's part along the true one"
            )
        row = {"bed": bed, "budget": budget, "steps": steps, "rule": name, "kind": kind, "mean_of": of}
        row |= numbers(many, along, squared, total)
        row |= {"live": float(np.mean(live)), "p": float(right.mean()), "truth": alike, "tail": heavy}
        found.append(
            {k: round(x, 4) if isinstance(x, float) and k != "length" else x for k, x in row.items()}
        )
    return found


def load(**wanted) -> list[dict]:
    rows = evaluate.each_row(RESULTS) if RESULTS.exists() else ()
    return [row for row in rows if wanted.items() <= row.items()]


# ---- What comes out --------------------------------------------------------------------------------------
def table(beds=BEDS) -> str:
    """Markdown: a row a rule, a column a model: cosine ± standard error."""
    beds = [b for b in beds if load(bed=b[0], budget=b[1], steps=b[2])]
    plain = {"kind": "scaled", "mean_of": "tokens"}
    of = [{r["rule"]: r for r in load(bed=b, budget=n, steps=s, **plain)} for b, n, s in beds]
    heads = [
        f"{b}, step {s} (p {next(iter(rows.values()))['p']:.2f})"
        for (b, _, s), rows in zip(beds, of, strict=True)
    ]
    lines = ["| who gets rollouts | " + " | ".join(heads) + " |", "|" + " --- |" * (len(beds) + 1)]
    for name in dict.fromkeys(name for rows in of for name in rows):
        found = [rows.get(name) for rows in of]
        cells = [f"{r['cosine']:.2f} ± {r['se']:.2f}" if r else "" for r in found]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def details(bed: str, budget: int, steps: int) -> str:
    """Markdown: of one model, where each rule's gradient points and how long it is."""
    rows = load(bed=bed, budget=budget, steps=steps, kind="scaled", mean_of="tokens")
    (base,) = (r["length"] for r in rows if r["rule"] == "uniform")
    head = f"{bed}, {budget} a step, step {steps}"
    lines = [f"| {head} | live | cosine | direction | signal / noise | length |", "|" + " --- |" * 6]
    for r in rows:
        cells = [
            f"{r['live']:.2f}",
            f"{r['cosine']:.2f} ± {r['se']:.2f}",
            "" if r["direction"] is None else f"{r['direction']:.2f}",
        ]
        # Where no direction is seen, the signal is as uncertain.
        cells += ["" if r["direction"] is None else f"{r['signal']:.2f}", f"{r['length'] / base:.2f}"]
        lines.append(f"| {r['rule']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def losses_table(beds=BEDS) -> str:
    """Markdown: the 2 x 2 of what is averaged and whether it is scaled."""
    beds = [b for b in beds if load(bed=b[0], budget=b[1], steps=b[2])]
    heads = [f"{b}, {n}, step {s}" for b, n, s in beds]
    lines = ["| who | advantages | mean over | " + " | ".join(heads) + " |", "|" + " --- |" * (len(beds) + 3)]
    for name in ("uniform", "knapsack"):
        for kind, of in LOSSES:
            found = [load(bed=b, budget=n, steps=s, rule=name, kind=kind, mean_of=of)[0] for b, n, s in beds]
            cells = [f"{r['cosine']:.2f} ± {r['se']:.2f}" for r in found]
            lines.append(f"| {name} | {kind} | {of} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("what", choices=["run", "table"])
    parser.add_argument(
        "--beds", nargs="+", type=int, default=range(len(BEDS)), help="which lines of BEDS [all]"
    )
    parser.add_argument(
        "--work", type=Path, default=Path("runs/microscope"), help="for run folders [%(default)s]"
    )
    args = parser.parse_args()
    if args.what == "run":
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
        for bed in (BEDS[i] for i in args.beds):
            if not load(bed=bed[0], budget=bed[1], steps=bed[2]):
                rows = look(*bed, args.work)
                with RESULTS.open("a") as file:  # all rows of a model, or none
                    file.write("".join(json.dumps(row) + "\n" for row in rows))
    print(table(), losses_table(), sep="\n\n")


if __name__ == "__main__":
    main()
