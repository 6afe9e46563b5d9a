"""How good is a model, and what does a run look like? avg@k and pass@k with error bars; the pictures.

    python evaluate.py --model tiny RUN/final --held-out 256 --temperature 1
    python evaluate.py --model RUN/final --tasks math500 --out scores.json

avg@k is the mean success of k samples (the paper's metric, k = 16 at temperature 0.6); pass@k is the
chance that at least one of k samples is right. Standard errors are over problems, because two samples of
one problem are not two problems. Several models are compared problem by problem with the first: most of
what makes a score vary, hard and easy problems, cancels.

--held-out N takes the problems that a training run on the same tasks held out. N stands in the run's
first line: a larger one takes problems that it trained on, and so may another --reward than the run's.
(gsm8k, math and dapo17k are training splits.) --out scores.json writes the scores there, and each
completion to scores.completions.jsonl as it comes: the same command goes on from what is there, and ends
as if nothing had happened. With another --reward, or after an edit of it, the completions that are there
are judged again.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import re
import shlex
import sys
import warnings
from pathlib import Path

import numpy as np

import reward
import rollout
from reward import HUB, Task

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


# ---- Scores -------------------------------------------------------------------------------------------
def evaluate(sampler, tasks: list[Task], prompts: dict, judge, samples: int, seed: int):
    """Asks every task `samples` times -> (right, rollouts). right: (M, samples) of 0 and 1; a graded
    reward is right above 0.5. prompts: token ids by task id. judge: see reward.grade."""
    rollouts = sampler.sample([prompts[t.id] for t in tasks], [samples] * len(tasks), seed)
    asked = [tasks[r.group] for r in rollouts]  # M x samples, task after task
    rewards = reward.grade(judge, asked, [r.text for r in rollouts])  # (M x samples,)
    return (rewards > 0.5).astype(float).reshape(len(tasks), samples), rollouts


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that one of k samples is right, from c right ones of n (Chen et al. 2021)."""
    return 1 - math.comb(n - c, k) / math.comb(n, k)


def measures(right: np.ndarray, tokens: np.ndarray, finished: np.ndarray) -> dict[str, np.ndarray]:
    """Each sample's outcome, (M, samples) each -> what is reported, a number a problem: {name: (M,)}."""
    samples = right.shape[1]
    correct = right.sum(1).astype(int)  # (M,)
    ks = sorted({1 << j for j in range(samples.bit_length())} | {samples})  # 1, 2, 4 ... samples
    return {
        f"avg@{samples}": correct / samples,
        **{f"pass@{k}": np.array([pass_at_k(samples, int(c), k) for c in correct]) for k in ks},
        # Three shares that add up to 1. Only the middle one is a mixed group.
        "always_solved": correct == samples,
        "sometimes_solved": (correct > 0) & (correct < samples),
        "never_solved": correct == 0,
        "tokens": tokens.mean(1),
        "truncated": 1 - finished.mean(1),  # cut by the length limit
    }


def standard_error(per_problem: np.ndarray) -> float:
    """Of a mean over problems (M,). If all came out the same it is 0, and says nothing."""
    m = len(per_problem)
    return float(np.std(per_problem, ddof=min(1, m - 1)) / m**0.5)


# ours - first, paired by problem: the mean, and its 95% interval.
def difference(ours: dict[str, np.ndarray], first: dict[str, np.ndarray]) -> dict[str, dict]:
    result = {}
    for name in ours:
        d = ours[name].astype(float) - first[name]  # (M,): hard and easy problems cancel
        mean, half = float(d.mean()), 1.96 * standard_error(d)
        result[name] = {"mean": mean, "low": mean - half, "high": mean + half}
    return result


# ---- Small things that both command lines, this one and train.py's, need -------------------------------
# A user's error is one line that says what to do; main prints it.
def need(ok, sentence: str) -> None:
    if not ok:
        raise ValueError(sentence)


# Benchmarks of word problems are asked for a box; files and sums stay as they are.
def default_instruction(tasks: str) -> str:
    return BOXED if tasks in HUB else ""


# A path that exists becomes absolute, so that it holds in any working folder. Other names stay.
def path_or_name(text: str) -> str:
    path = Path(os.path.expanduser(text))  # Path's own raises where there is no such home
    name = text in ("", "tiny", "arithmetic", *HUB)
    return os.path.abspath(path) if path.exists() and not name else text


# FILE.py:FUNCTION, its file absolute.
def reward_name(text: str) -> str:
    file, colon, name = text.rpartition(":")
    return f"{path_or_name(file)}:{name}" if colon else text


def file_path(text: str) -> Path:
    return Path(os.path.expanduser(text))


# The text of a JSON object, such as {"enable_thinking": false}. argparse says it if it is none.
def json_object(text: str) -> str:
    return json.dumps(dict(json.loads(text)))


# The user's reward FILE.py:FUNCTION, or a verifier. Where a box is asked for, only a box counts.
def judge_of(spec: str | None, instruction: str):
    if spec:
        return reward.load_reward(spec)
    return reward.Verifier(min(8, os.cpu_count() or 1), boxed="\\boxed" in instruction)


# The file of the user's reward. ValueError if it is not there.
def reward_file(spec: str) -> Path:
    path = file_path(spec.rpartition(":")[0])
    return path if path.is_file() else reward.load_reward(spec)  # which says so


# ---- The command line ---------------------------------------------------------------------------------
def parse_args(argv=None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    add, tasks = parser.add_argument, f"arithmetic, a file of rows, {', '.join(HUB)} [arithmetic]"
    models = "tiny, a folder, or a hub id; several are compared [tiny]"
    add("--model", nargs="+", type=path_or_name, default=["tiny"], help=models)
    add("--tasks", type=path_or_name, default="arithmetic", help=tasks)
    add("--samples", type=int, default=16, help="answers a problem [16]")
    add("--held-out", type=int, metavar="N", help="only the N problems that a run held out")
    add("--limit", type=int, metavar="N", help="only the first N problems")
    add("--temperature", type=float, default=0.6, help="of the sampling [0.6]")
    add("--max-new-tokens", type=int, metavar="N", help="[1024, or what the context leaves]")
    add("--instruction", help="text after each prompt [none; hub tasks: \\boxed{} please]")
    add("--lenient", action="store_true", help="an answer without the box asked for counts too")
    add("--reward", type=reward_name, help="your own, FILE.py:FUNCTION (see reward.py)")
    add("--chat", action="store_true", help="wrap prompts in the model's chat template")
    add("--chat-template-kwargs", type=json_object, default="{}", metavar="JSON", help="for it")
    add("--engine", choices=["auto", "vllm", "hf"], default="auto", help="who samples [auto]")
    add("--seed", type=int, default=0, help="of the sampling [0]")
    add("--out", type=file_path, metavar="FILE.json", help="scores; the completions, beside it")
    add("--trust-remote-code", action="store_true", help="run the model's own code")
    args = parser.parse_args(argv)
    if args.instruction is None:
        args.instruction = default_instruction(args.tasks)
    return args


# ValueError for settings that cannot work.
def check(args) -> None:
    for name in ("samples", "temperature", "max_new_tokens", "held_out", "limit"):
        value, low = getattr(args, name), 0.01 if name == "temperature" else 1  # vLLM's lowest
        good = value is None or (np.isfinite(value) and value >= low)
        need(good, f"--{name.replace('_', '-')} {value}: must be {low} or more")
    if out := args.out:
        there = out.suffix == ".json" and out.absolute().parent.is_dir()
        need(there, f"--out {out}: must be a .json file in a folder that exists")
        orphan = out.exists() and not completions_file(out).exists()
        need(not orphan, f"--out {out} is there without its completions: choose another")


# (tasks, models, settings). What can be wrong before weights are loaded is a ValueError here.
def prepare(args) -> tuple[list[Task], list[dict], dict]:
    check(args)
    tasks = reward.load_tasks(args.tasks, answers=not args.reward)
    if args.held_out:  # the same split as train.py's
        tasks = reward.split_held_out(tasks, args.held_out, seed=0)[1]
    tasks = tasks[: args.limit]
    engine, why = rollout.choose_engine(args.engine)  # imports torch, which takes seconds
    print(f"sampling with {engine} ({why})")
    # One length limit for all models, or their scores could not be compared.
    models, limit = [], args.max_new_tokens or 1024
    judge = judge_hash(args.reward, "" if args.lenient else args.instruction)
    words = (args.instruction, args.chat, json.loads(args.chat_template_kwargs))
    for name in dict.fromkeys(args.model):  # a name that is given twice counts once
        path = rollout.resolve_model(name)
        config, tokenizer = rollout.load_config(path, args.trust_remote_code)
        prompts = rollout.encode_tasks(tokenizer, tasks, *words)  # {task id: token ids}
        longest, highest = max(map(len, prompts.values())), max(map(max, prompts.values()))
        known = getattr(config.get_text_config(decoder=True), "vocab_size", 2**31)
        apart = f"its tokenizer says {highest}, its weights know {known} tokens"
        need(highest < known, f"--model {name}: {apart}")
        room = max(0, rollout.context_length(config) - longest)
        full = f"after a prompt of {longest} tokens its context has room for {room}"
        enough = room >= (args.max_new_tokens or 1)
        need(enough, f"--model {name}: {full}: lower --max-new-tokens or shorten the prompts")
        limit, weights = min(limit, room), model_hash(path, config)
        # A row is what is recorded of a question. Its completions come later.
        rows = [{"model": name, "weights": weights, "id": t.id, "answer": t.answer} for t in tasks]
        for row, task in zip(rows, tasks, strict=True):
            row["prompt"] = tokenizer.decode(prompts[task.id])
            row["judged_by"] = short_hash(judge, repr(task.extra)) if args.reward else judge
        print(f"{name}, first prompt: {rows[0]['prompt']!r}")
        if hint := rollout.prompt_hint(tokenizer, config, args.chat):
            print(hint)
        models.append({"path": path, "prompts": prompts, "longest": longest, "rows": rows})
    print(f"answers have at most {limit} tokens")
    names = ("samples", "temperature", "seed", "chat", "chat_template_kwargs", "instruction")
    settings = {name: getattr(args, name) for name in names}
    return tasks, models, settings | {"max_new_tokens": limit, "engine": engine}


def short_hash(*texts: str) -> str:
    text = re.sub(r" at 0x[0-9A-Fa-f]+", "", "\n".join(texts))  # of an object in a repr
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


# Of what a verdict depends on besides prompt, answer and text: the verifier, or the user's reward and the
# modules beside it. (And it sees the tasks' other columns.)
def judge_hash(spec: str | None, instruction: str) -> str:
    modules = [Path(reward.__file__)]
    if spec:
        modules = sorted(reward_file(spec).parent.glob("*.py"))
    kind = spec or f"{importlib.metadata.version('math-verify')} {'boxed' in instruction}"
    return short_hash(kind, *(path.read_text(errors="replace") for path in modules if path.is_file()))


# Which model it is: a hash of its files, or the hub's id and commit. (Files call it "weights".)
def model_hash(path: str, config) -> str:
    if not Path(path).is_dir():
        return f"{path}@{getattr(config, '_commit_hash', None)}"
    # Names lie: RUN/final is written anew by the next run there. And config.json or other end tokens make
    # another model of the same weights.
    digest, files = hashlib.sha256(), sorted(Path(path).glob("*.safetensors"))
    need(files, f"--model {path}: no weights there (*.safetensors)")
    for file in [*files, *sorted(Path(path).glob("*.json"))]:
        need(file.stat().st_size, f"--model {path}: {file.name} is empty")
        digest.update(np.memmap(file, mode="r"))  # gigabytes are never in memory at once
    return digest.hexdigest()[:16]


# ---- Asking, and the record of what came --------------------------------------------------------------
BATCH = 32  # problems that are sampled together


def completions_file(out: Path) -> Path:
    return out.with_suffix(".completions.jsonl")


# A question is the same if weights, prompt and answer are. Where one has changed it is asked anew.
def key(row: dict) -> tuple:
    return row["weights"], row["prompt"], row["answer"]


# {key: row} of what is recorded; a torn last line is cut off the file. ValueError if the file was made
# with other settings, or holds anything else: then it stays as it is.
def read_record(path: Path, settings: dict) -> dict[tuple, dict]:
    if not path.is_file():
        return {}
    text = path.read_bytes()
    begins = b'{"settings": {'
    rows = list(each_row(path)) if begins.startswith(text[: len(begins)]) else [{}]
    for number, row in enumerate(rows, start=1):
        ours = {"weights", "prompt", "answer", "completions"} if number > 1 else {"settings"}
        good = isinstance(row, dict) and ours <= set(row)
        need(good, f"{path}, line {number}: not a line of evaluate.py's: choose another --out")
    for name, now in settings.items():
        was = rows[0]["settings"].get(name) if rows else now
        flag = f"--{name.replace('_', '-')}"
        old = f"{path} was made with {flag} {was!r}, not {now!r}"
        need(was == now, f"{old}: ask as then, or choose another --out")
    os.truncate(path, text.rfind(b"\n") + 1)  # new lines must not be glued to a torn one
    return {key(row): row for row in rows[1:]}


# Completions that something else judged are judged again. Such a row goes to the file once more.
def judge_again(model: dict, tasks, judge, done: dict, file) -> None:
    known = [(row, task) for row, task in zip(model["rows"], tasks, strict=True) if key(row) in done]
    stale = [(r, t) for r, t in known if done[key(r)].get("judged_by") != r["judged_by"]]
    if not stale:  # a reward need not take empty lists
        return
    answers = [(c, task) for row, task in stale for c in done[key(row)]["completions"]]
    rewards = reward.grade(judge, [t for _, t in answers], [c["text"] for c, _ in answers])
    none = getattr(judge, "no_verdict", ())  # out of time: neither right nor wrong
    for i, (c, _) in enumerate(answers):
        c["right"] = None if i in none else bool(rewards[i] > 0.5)
    for row, _ in stale:
        done[key(row)] = row | {"completions": done[key(row)]["completions"]}
        print(json.dumps(done[key(row)]), file=file, flush=True)


def open_sampler(model: dict, settings: dict, trust: bool):
    path, limits = model["path"], (settings["max_new_tokens"], settings["temperature"])
    if settings["engine"] == "hf":
        weights, tokenizer = rollout.load_model(path, trust)
        return rollout.HFSampler(weights.to(rollout.device()), tokenizer, *limits)
    _, tokenizer = rollout.load_config(path, trust)
    # There is no trainer beside it, so the engine may have most of the GPU.
    more = {"gpu_memory": 0.85, "sleeps": False}
    more |= {"max_prompt_tokens": model["longest"], "trust_remote_code": trust}
    with rollout.loading(path):
        return rollout.VLLMSampler(path, tokenizer, *limits, **more)


# Asks a model what it has not been asked yet. A row goes to the file as it comes, and to `done`.
def ask(model: dict, tasks, settings: dict, trust: bool, judge, done: dict, file, bar) -> None:
    sampler, n = None, settings["samples"]
    for start in range(0, len(tasks), BATCH):
        batch, rows = tasks[start : start + BATCH], model["rows"][start : start + BATCH]
        if all(key(row) in done for row in rows):
            bar.update(len(batch))
            continue
        sampler = sampler or open_sampler(model, settings, trust)
        # The whole batch is asked, even if some of it is there: in other company sums are rounded
        # otherwise, and once in a while that draws another token.
        right, rollouts = evaluate(sampler, batch, model["prompts"], judge, n, settings["seed"])
        completions = [
            {"right": bool(v), "tokens": len(r.response_ids), "finished": r.finished, "text": r.text}
            for v, r in zip(right.flat, rollouts, strict=True)
        ]
        for place in getattr(judge, "no_verdict", ()):  # out of time: neither right nor wrong
            completions[place]["right"] = None
        for i, row in enumerate(rows):
            if key(row) not in done:  # what was there stays as it was
                done[key(row)] = row | {"completions": completions[i * n : (i + 1) * n]}
                print(json.dumps(done[key(row)]), file=file, flush=True)
        bar.update(len(batch))
    if sampler is not None:  # before the next model's: there is room for one
        sampler.close()


# ---- What comes out -----------------------------------------------------------------------------------
# The scores of each model, and of each later one its difference from the first.
def results(models: list[dict], done: dict) -> list[dict]:
    found, first = [], None  # first: the first model's numbers, {measure: (M,)}
    for model in models:
        answers = [done[key(row)]["completions"] for row in model["rows"]]
        # None becomes NaN: there was no verdict.
        got = [[(c["right"], c["tokens"], c["finished"]) for c in of_problem] for of_problem in answers]
        right, tokens, finished = np.moveaxis(np.array(got, dtype=float), -1, 0)  # (M, samples) each
        numbers = measures(np.nan_to_num(right), tokens, finished)  # no verdict is not right
        scores = {k: {"mean": float(x.mean()), "se": standard_error(x)} for k, x in numbers.items()}
        row = model["rows"][0]
        result = {"model": row["model"], "weights": row["weights"], "first_prompt": row["prompt"]}
        result |= {"problems": len(got), "no_verdict": int(np.isnan(right).sum()), "scores": scores}
        if first:
            result["minus_first"] = difference(numbers, first)
        first = first or numbers
        found.append(result)
    return found


# A row a measure; a column a model (± standard error), then a column a difference [95% interval].
def table(found: list[dict]) -> str:
    first, *others = found
    # Column by column; the lines are put together last.
    columns = [[f"{first['problems']} problems", *first["scores"], "no verdict"]]
    for r in found:
        cells = [f"{x['mean']:.3f} ± {x['se']:.3f}" for x in r["scores"].values()]
        columns.append([r["model"], *cells, f"{r['no_verdict']}"])
    for r in others:
        d = r["minus_first"].values()
        cells = [f"{x['mean']:+.3f} [{x['low']:+.3f}, {x['high']:+.3f}]" for x in d]
        columns.append([f"{r['model']} - {first['model']}", *cells, ""])
    widths = [max(map(len, column)) for column in columns]  # the first to the left, others right
    rows = zip(*columns, strict=True)
    return "\n".join("  ".join([n.ljust(widths[0]), *map(str.rjust, c, widths[1:])]) for n, *c in rows)


def main(argv=None) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # what libraries tell their own developers
    warnings.formatwarning = lambda message, *_, **__: f"evaluate.py: {message}\n"
    args = parse_args(argv)
    record = completions_file(args.out) if args.out else Path(os.devnull)
    try:
        tasks, models, settings = prepare(args)
        done = read_record(record, settings)
        judge = judge_of(args.reward, "" if args.lenient else args.instruction)
        from tqdm import tqdm  # only now: a wrong flag has been answered

        total = len(models) * len(tasks)
        with record.open("a", encoding="utf-8") as file, tqdm(total=total, unit="problem") as bar:
            if file.tell() == 0:  # the first line says how the others were made
                print(json.dumps({"settings": settings}), file=file, flush=True)
            for model in models:
                judge_again(model, tasks, judge, done, file)
                ask(model, tasks, settings, args.trust_remote_code, judge, done, file, bar)
    except KeyboardInterrupt:
        sys.exit("\ninterrupted" + ("; the same command goes on from here" if args.out else ""))
    except (ValueError, OSError) as error:
        sys.exit(f"evaluate.py: error: {error}")
    found = results(models, done)
    print("\n" + table(found))
    if args.out:
        command = shlex.join(["python", "evaluate.py", *(sys.argv[1:] if argv is None else argv)])
        settings |= {k: getattr(args, k) for k in ("tasks", "held_out", "limit", "lenient", "reward")}
        # What else would be needed to make the same numbers again.
        versions = {p: importlib.metadata.version(p) for p in ("torch", "transformers", "math-verify")}
        if settings["engine"] == "vllm":
            import vllm

            versions["vllm"] = vllm.__version__
        whole = {"command": command, "settings": settings, "versions": versions, "results": found}
        replace_file(args.out, lambda part: part.write_text(json.dumps(whole, indent=2) + "\n"))


# ---- Pictures -----------------------------------------------------------------------------------------
# One look for each allocator everywhere: colour, line and grey value all differ.
BLUE, ORANGE, GREY = "#0057a8", "#d9741a", "#7a7a7a"
LOOK = {
    "knapsack": dict(color=BLUE, linestyle="-"),
    "paper": dict(color=ORANGE, linestyle="--"),
    "uniform": dict(color=GREY, linestyle=":"),
}


# Of an allocator of your own, too.
def look(allocator: str) -> dict:
    return LOOK.get(allocator, dict(color="#2f8f5b", linestyle="-."))


# The rows of a JSON Lines file, one by one; a last line that a crash cut short is left out.
def each_row(path: Path):
    with path.open(encoding="utf-8") as file:
        try:
            yield from (json.loads(line) for line in file if line.endswith("\n"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error


# write(a temporary path), then rename: an interruption leaves the old file or the new one.
def replace_file(path: Path, write) -> None:
    part = path.with_name(path.name + ".part")
    write(part)
    part.replace(path)


# Running mean, shorter at the ends.
def smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    ones = np.ones(min(width, max(1, len(values))))
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


# Axes to draw on. The file is there, whole, when the block has ended; its suffix is its format.
@contextlib.contextmanager
def picture(path: Path, rows: int, columns: int):
    from matplotlib import rc_context
    from matplotlib.figure import Figure  # which needs no screen

    # Less ink: no box, a faint grid.
    bare = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
    with rc_context(bare | {"axes.titlesize": 11, "axes.titleweight": "bold"}):
        # "constrained" makes room for titles, labels and a legend outside.
        fig = Figure(figsize=(4.8 * columns, 3.6 * rows), layout="constrained")
        yield fig, fig.subplots(rows, columns)
        form = path.suffix.lstrip(".") or "png"
        replace_file(path, lambda part: fig.savefig(part, dpi=100, format=form))


# Metric: what its panel is called. The sixth panel shows who got how many rollouts.
PANELS = {
    "eval_success": "Held-out success",
    "effective_rollouts": "Rollouts in mixed groups",
    "effective_prompts": "Groups that are mixed",
    "all_wrong": "Groups that are all wrong",
    "distinct_solved": "Training prompts ever solved",
}


def draw_runs(runs: list[Path], path: Path) -> None:
    """One run's dashboard, or several beside each other: against rollouts spent, so that equal compute
    stands above equal compute."""
    for run in runs:
        files = [run / name for name in ("config.json", "metrics.jsonl", "groups.jsonl")]
        there = all(f.is_file() for f in files) and any(each_row(files[2]))
        need(there, f"{run}: no config.json, metrics.jsonl and groups.jsonl of at least one step there")
    need(path.parent.is_dir() and not path.is_dir(), f"--out {path}: name a picture in a folder that exists")
    with picture(path, 2, 3) as (fig, axes):  # fig: for the legend
        *panels, last = axes.flat  # five metrics, and the allocation
        # The look is the allocator's, the marker the run's.
        for run, marker in zip(runs, itertools.cycle("os^Dv"), strict=False):
            c, rows = json.loads((run / "config.json").read_text()), list(each_row(run / "metrics.jsonl"))
            which = run.name if [r.name for r in runs].count(run.name) == 1 else run
            style = look(c["allocator"]) | {"marker": marker, "ms": 4, "label": f"{c['allocator']} ({which})"}
            spent = np.cumsum([r["budget"] if r["step"] else 0 for r in rows])  # (rows,)
            for axis, (name, title) in zip(panels, PANELS.items(), strict=True):
                here = [i for i, r in enumerate(rows) if r[name] is not None]
                x, y = spent[here], np.array([rows[i][name] for i in here])
                if name == "eval_success":  # few points, each with its standard error
                    axis.errorbar(x, y, [rows[i]["eval_success_se"] for i in here], **style)
                else:
                    y = y if name == "distinct_solved" else smooth(y)  # shares jump from step to step
                    axis.plot(x, y, markevery=max(1, len(x) // 8), **style)
                # One run's titles say what its panels found.
                change = f" {round(y[0], 2):g} → {round(y[-1], 2):g}" if len(runs) == 1 else ""
                axis.set(title=title + change, xlabel="rollouts spent")
            # Each prompt's newest visit, if it was in the last thousand steps.
            newest = {}
            lines = (run / "groups.jsonl").read_text(encoding="utf-8").split("\n")[:-1]  # not a torn one
            for g in map(json.loads, lines[-1000:]):
                newest |= zip(g["ids"], zip(g["estimate"], g["counts"], strict=True), strict=True)
            p, n = np.array(list(newest.values())).T
            last.plot(p, n, **style | {"linestyle": "", "alpha": 0.4})
        last.set(title="Rollouts of each prompt", ylabel="rollouts", xlim=(0, 1))
        last.set(xlabel="estimated success (newest visit)")
        last.set_yscale("log", base=2)  # n_max is 64 times n_min
        last.yaxis.set_major_formatter("{x:g}")
        for axis in panels:  # once all runs are drawn, or the first one would fix the top
            axis.set_ylim(bottom=0)
        # Outside the panels, where it covers no curve.
        fig.legend(*axes[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=2)


if __name__ == "__main__":
    main()
