"""Knapsack RL on one machine: GRPO whose rollouts go where they are expected to teach most.

    python train.py                                          # the embedded model, three minutes
    python train.py --allocator uniform                      # the same compute, spread evenly
    python train.py --model Qwen2.5-Math-1.5B                # one GPU
    python train.py --model FOLDER --tasks FILE.jsonl        # your model, your {"prompt", "answer"}
    python train.py --resume runs/tiny-knapsack-seed0        # go on after an interruption
    python train.py --compare RUN_A RUN_B                    # two runs on one picture

One step of the loop: draw prompts, estimate each one's success probability from earlier visits,
solve a knapsack for how many rollouts each gets, sample them, verify them, turn rewards into group
advantages, update the model, hand the new weights to the sampler, remember the outcomes.

A run folder holds config.json, metrics.jsonl (one row a step; step 0 is the untouched model, only
evaluated), groups.jsonl (each step's prompts, estimates, counts, successes), dashboard.png,
checkpoint/step-NNNNNN/ and final/, a folder that transformers and vLLM load as it is.

What this is minus: no KL, no reference model, no critic, no replay, one machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import signal
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

# torch and transformers take seconds to import: a wrong flag must answer at once, so they, and the
# modules that need them, are imported in `train` below, after everything has been checked.
import evaluate
import knapsack
import reward

# ------------------------------------------------------------------------------------- settings


def setting(tiny, large, help: str, **extra):
    """A field with its two defaults: the embedded model's, and any other model's."""
    return field(default=tiny, metadata={"tiny": tiny, "large": large, "help": help, **extra})


@dataclass(frozen=True)
class Config:
    model: str = setting("tiny", "tiny", "tiny, a folder, or a hub id; a bare Qwen name means Qwen/...")
    tasks: str = setting("arithmetic", "dapo17k", "arithmetic, a .jsonl or .parquet file, or a hub name")
    instruction: str = setting("", None, "text after each prompt [none; hub tasks: \\boxed{} please]")
    chat: bool = setting(False, False, "wrap prompts in the model's chat template")
    allocator: str = setting(
        "knapsack", "knapsack", "who decides the counts", choices=["knapsack", "paper", "uniform"]
    )
    engine: str = setting("auto", "auto", "who samples", choices=["auto", "vllm", "hf"])
    steps: int = setting(100, 200, "training steps")
    prompts: int = setting(64, 64, "prompts a step (M)")
    budget: int = setting(512, 512, "rollouts a step, all prompts together (B)")
    n_min: int = setting(2, 2, "fewest rollouts of a prompt")
    n_max: int = setting(128, 128, "most rollouts of a prompt")
    max_new_tokens: int = setting(40, 1024, "length limit of a response")
    max_prompt_tokens: int = setting(64, 2048, "longer prompts are refused")
    temperature: float = setting(1.0, 1.0, "of the sampling during training")
    lr: float = setting(1e-4, 1e-6, "AdamW's learning rate")
    warmup_steps: int = setting(10, 5, "steps over which the learning rate rises to --lr")
    minibatches: int = setting(2, 8, "optimizer steps a batch of rollouts")
    clip_low: float = setting(0.2, 0.2, "PPO clip below 1")
    clip_high: float = setting(0.28, 0.28, "PPO clip above 1 (clip-higher)")
    tokens_per_microbatch: int = setting(16384, 8192, "padded tokens in one forward pass (memory)")
    checkpointing: bool = setting(False, False, "recompute activations in the update: less memory, slower")
    held_out: int = setting(0, 0, "tasks kept for evaluation (0: a fifth of them, at most 256)")
    eval_every: int = setting(20, 20, "steps between evaluations")
    eval_samples: int = setting(4, 4, "answers a held-out problem")
    eval_temperature: float = setting(1.0, 0.6, "of the sampling during evaluation")
    save_every: int = setting(25, 20, "steps between checkpoints")
    gpu_memory: float = setting(0.4, 0.4, "vLLM's share of the GPU's memory while it samples")
    seed: int = setting(0, 0, "seed of everything random")
    trust_remote_code: bool = setting(False, False, "run code that comes with the model")


def parse_args(argv=None) -> tuple[Config, argparse.Namespace]:
    """The command line -> settings, with the defaults of the model that was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Defaults stand in brackets: those of --model tiny | those of any other --model.",
    )
    for f in dataclasses.fields(Config):
        tiny, large = f.metadata["tiny"], f.metadata["large"]
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
        if isinstance(tiny, bool):
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        both = f"{tiny} | {large}" if tiny != large else f"{tiny}"
        parser.add_argument(
            flag,
            type=type(tiny),
            default=argparse.SUPPRESS,
            choices=f.metadata.get("choices"),
            metavar=None if "choices" in f.metadata else flag[2:].replace("-", "_").upper(),
            help=text if large is None else f"{text} [{both}]",
        )
    parser.add_argument("--out", type=Path, help="run folder [runs/MODEL-ALLOCATOR-seedSEED]")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR")
    parser.add_argument(
        "--compare", type=Path, nargs="+", metavar="RUN", help="draw runs on one picture, --out PNG"
    )
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if f.name in args}
    column = "tiny" if given.get("model", "tiny") == "tiny" else "large"
    values = {f.name: f.metadata[column] for f in dataclasses.fields(Config)} | given
    if values["instruction"] is None:
        values["instruction"] = evaluate.default_instruction(values["tasks"])
    if args.resume and (given or args.out or args.compare):
        raise ValueError("--resume takes the run's own settings: give no other flag with it")
    if args.compare and given:
        raise ValueError("--compare draws runs that exist: give no training flag with it")
    return Config(**values), args


def check(c: Config) -> None:
    """ValueError, in one line that says what to do, for settings that cannot work."""
    positive = ("steps", "prompts", "budget", "max_new_tokens", "max_prompt_tokens", "temperature",
                "lr", "minibatches", "clip_low", "clip_high", "tokens_per_microbatch", "eval_every",
                "eval_samples", "eval_temperature", "save_every", "gpu_memory", "n_min")  # fmt: skip
    for name in positive:
        value = getattr(c, name)
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
    for name in ("seed", "held_out", "warmup_steps"):
        if getattr(c, name) < 0:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(c, name)}: must not be negative")
    if c.clip_low >= 1 or c.gpu_memory >= 1:
        raise ValueError("--clip-low and --gpu-memory must lie below 1")
    if c.n_min > c.n_max:
        raise ValueError(f"--n-min {c.n_min} is above --n-max {c.n_max}")
    low, high = c.prompts * c.n_min, c.prompts * c.n_max
    if c.budget < low:
        raise ValueError(
            f"--budget {c.budget} < {c.prompts} prompts x n_min {c.n_min} = {low}: "
            "raise --budget, or lower --n-min or --prompts"
        )
    if c.budget > high:
        raise ValueError(
            f"--budget {c.budget} > {c.prompts} prompts x n_max {c.n_max} = {high}: "
            "lower --budget, or raise --n-max or --prompts"
        )


# ---------------------------------------------------------------------------------------- the loop


def batch_of(train_tasks: list, step: int, c: Config) -> list:
    """The prompts of step 1, 2, ...: walks through shuffled epochs, the same for every allocator."""
    per_epoch = len(train_tasks) // c.prompts
    epoch, k = divmod(step - 1, per_epoch)
    order = np.random.default_rng([c.seed, epoch]).permutation(len(train_tasks))
    return [train_tasks[i] for i in order[k * c.prompts : (k + 1) * c.prompts]]


def allocate(c: Config, tracker: knapsack.SuccessTracker, ids: list[str]) -> np.ndarray:
    """Rollouts for each of the M prompts, (M,), from what earlier visits told; sum = budget."""
    if c.allocator == "uniform":
        return knapsack.uniform(len(ids), c.budget)
    if c.allocator == "paper":
        return knapsack.allocate_paper(tracker.windowed_rate(ids), c.budget, c.n_min, c.n_max)
    return knapsack.allocate(tracker.posterior(ids), c.budget, c.n_min, c.n_max)


def set_up(c: Config, out: Path, tasks: list) -> tuple:
    """(model, tokenizer, prompts, sampler): what takes seconds to load, and everything that can be
    wrong with it as a ValueError. The weights are the last checkpoint's, where there is one."""
    # Ragged batches leave holes of all sizes in a GPU's memory. Read when torch first asks for some.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import rollout

    path = evaluate.resolve_model(c.model)
    engine, why = rollout.choose_engine(c.engine)
    print(f"sampling with {engine} ({why}); writing to {out}", flush=True)
    model, tokenizer = evaluate.load_model(latest_checkpoint(out) or path, c.trust_remote_code)
    prompts = evaluate.encode_tasks(tokenizer, tasks, c.instruction, c.chat)  # {task id: token ids}
    too_long = [i for i, ids in prompts.items() if len(ids) > c.max_prompt_tokens]
    if too_long:
        raise ValueError(
            f"{len(too_long)} prompts are longer than {c.max_prompt_tokens} tokens (the first: "
            f"{too_long[0]}): raise --max-prompt-tokens or drop them"
        )
    longest = max(map(len, prompts.values()))
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        if getattr(model.config, name, None) not in (None, 1.0):
            raise ValueError(f"--model {c.model}: its {name} is not supported by grpo.token_logprobs")
    context = getattr(model.config, "max_position_embeddings", None)
    if context and longest + c.max_new_tokens > context:
        raise ValueError(
            f"a prompt of {longest} tokens and --max-new-tokens {c.max_new_tokens} exceed the "
            f"model's context of {context}: lower --max-new-tokens or shorten the prompts"
        )
    if engine == "vllm":
        sampler = rollout.VLLMSampler(
            path, tokenizer, c.max_new_tokens, c.temperature, longest, c.gpu_memory,
            trust_remote_code=c.trust_remote_code,
        )  # fmt: skip
        model.to(evaluate.device())  # only now: the engine measures how much memory is free
        sampler.sync(model)  # the trainer's weights, which a checkpoint may have changed
    else:
        model.to(evaluate.device())
        sampler = rollout.HFSampler(model, tokenizer, c.max_new_tokens, c.temperature)
    return model, tokenizer, prompts, sampler


def train(c: Config, out: Path, train_tasks: list, held_out: list, model, tokenizer, prompts, sampler):
    """The whole run, from the last checkpoint in `out` if there is one."""
    import torch
    from tqdm import tqdm

    import grpo

    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, weight_decay=0.0)
    tracker, first = knapsack.SuccessTracker(), 1
    checkpoint = latest_checkpoint(out)
    if checkpoint:
        state = json.loads((checkpoint / "state.json").read_text())
        optimizer.load_state_dict(torch.load(checkpoint / "optimizer.pt", weights_only=True))
        tracker.load_state_dict(state["tracker"])
        first = state["step"] + 1
        print(f"resuming after step {state['step']}")
    log = Log(out, last_step=first - 1 if checkpoint else -1)

    stop, clock, verifier = StopRequest(), Clock(), reward.Verifier()
    step = first - 1

    def held_out_success() -> tuple[float, float]:
        """Mean success over the held-out problems, and its standard error. Always the same seed:
        the same random numbers each time make two evaluations differ by the model alone."""
        sampler.temperature = c.eval_temperature
        right, _ = evaluate.evaluate(
            sampler, held_out, prompts, verifier, c.eval_samples, step_seed(c.seed, 0)
        )
        sampler.temperature = c.temperature
        return float(right.mean()), evaluate.bootstrap_se(right.mean(1))

    bar = tqdm(total=c.steps, initial=step, unit="step", dynamic_ncols=True, disable=None)
    try:
        if not checkpoint:  # the untouched model
            success, se = held_out_success()
            clock.lap("eval")
            row = dict.fromkeys(ROW) | {"step": 0, "budget": c.budget, "distinct_solved": 0}
            log.write(row | {"eval_success": success, "eval_success_se": se} | clock.row())
            clock.steps.clear()  # an evaluation says nothing about how long a step takes
            bar.write(f"before training: held-out success {success:.3f} ± {se:.3f}")

        for step in range(first, c.steps + 1):
            # 1. Draw M prompts, estimate each one's success, and let the knapsack decide.
            tasks = batch_of(train_tasks, step, c)
            ids = [t.id for t in tasks]
            estimate = tracker.estimate(ids)  # (M,)
            counts = allocate(c, tracker, ids)  # (M,), sum = budget
            clock.lap("allocate")
            # 2. Sample, verify.
            rollouts = sampler.sample([prompts[i] for i in ids], counts, step_seed(c.seed, step))
            group = np.array([r.group for r in rollouts])  # (R,)
            clock.lap("sample")
            rewards = verifier.score_many(
                [r.text for r in rollouts], [tasks[g].answer for g in group]
            )  # (R,) in {0, 1}
            clock.lap("verify")
            # 3. Advantages within each group, and the update.
            advantages = grpo.group_advantages(rewards, group)  # (R,)
            gap = canary(model, rollouts, c, grpo.token_logprobs)
            sampler.sleep()
            for parameters in optimizer.param_groups:
                parameters["lr"] = c.lr * min(1.0, step / max(1, c.warmup_steps))
            stats = grpo.update(
                model, optimizer, rollouts, advantages, c.minibatches, c.temperature,
                tokens_per_microbatch=c.tokens_per_microbatch, seed=step_seed(c.seed, step),
                checkpointing=c.checkpointing, clip_low=c.clip_low, clip_high=c.clip_high,
            )  # fmt: skip
            clock.lap("update")
            # 4. New weights to the sampler, outcomes to the tracker.
            sampler.sync(model)
            clock.lap("sync")
            successes = np.bincount(group, rewards, minlength=len(ids)).astype(int)  # (M,)
            tracker.update(ids, successes, counts)
            solved = int(tracker.solved([t.id for t in train_tasks]).sum())
            # 5. One row, one line, a picture now and then.
            row = dict.fromkeys(ROW) | {
                "step": step,
                **step_metrics(rewards, rollouts, counts, successes),
            }
            row |= {"distinct_solved": solved, "budget": c.budget, "logprob_gap": gap}
            row |= {"lr": parameters["lr"], **stats}
            if step % c.eval_every == 0 or step == c.steps:
                row["eval_success"], row["eval_success_se"] = held_out_success()
                clock.lap("eval")
            row |= clock.row()
            row["time_sampled_tokens_per_second"] = row["response_tokens"] * c.budget / row["time_sample"]
            if torch.cuda.is_available():
                row["mem_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            log.write(row)
            log.write_groups(step, ids, estimate, counts, successes)
            bar.write(describe(row, c.steps, clock))
            bar.update()
            # 6. Keep what an interruption would lose.
            stopping = stop.asked  # read once: a later signal waits for the next step's save
            if step % c.save_every == 0 or step == c.steps or stopping:
                state = {"step": step, "tracker": tracker.state_dict()}
                save_checkpoint(out, step, model, tokenizer, optimizer, state)
                clock.lap("save")
            if row.get("eval_success") is not None:
                draw_dashboard(out)
                clock.lap("draw")
            if stopping and step < c.steps:
                bar.close()
                draw_dashboard(out)
                print(f"stopped after step {step}; go on with: python train.py --resume {out}")
                sys.exit(130)
    finally:
        bar.close()
        log.close()
        verifier.close()
        sampler.close()
    model.save_pretrained(out / "final.part")
    tokenizer.save_pretrained(out / "final.part")
    (out / "final.part").rename(out / "final")
    draw_dashboard(out)
    rows = [r for r in read_rows(out / "metrics.jsonl") if r.get("eval_success") is not None]
    print(
        f"held-out success {rows[0]['eval_success']:.3f} -> {rows[-1]['eval_success']:.3f} "
        f"(± {rows[-1]['eval_success_se']:.3f}) in {c.steps} steps of {c.budget} rollouts; "
        f"model in {out}/final, picture in {out}/dashboard.png"
    )


# Every row has these, in this order; null where there is nothing to say.
ROW = ("step", "reward_mean", "reward_rollouts", "effective_rollouts", "effective_prompts", "all_right",
       "all_wrong", "distinct_solved", "budget", "n_largest", "eval_success", "eval_success_se",
       "seconds")  # fmt: skip


def step_seed(seed: int, step: int) -> int:
    """Everything random in a step follows from (seed, step), so a resumed run needs no generator."""
    return seed * 1_000_003 + step


class RunStopped(Exception):
    """The run cannot go on; the sentence says why and what to do."""


def canary(model, rollouts, c: Config, token_logprobs) -> float:
    """Mean |log-prob of the trainer - log-prob of the sampler| over a few rollouts: rounding, unless
    the sampler's weights are stale (then it jumps to whole nats) and the run must stop."""
    import torch

    few = rollouts[:: max(1, len(rollouts) // 4)][:4]
    with torch.no_grad():
        ours = token_logprobs(model, few, c.temperature).cpu().numpy()
    gap = float(np.abs(ours - np.concatenate([r.logprobs for r in few])).mean())
    bound = CANARY_BOUND[model.device.type]
    if not gap < bound:
        raise RunStopped(
            f"the sampler's log-probs are {gap:.3g} nats from the trainer's on average (bound "
            f"{bound}): it samples from other weights. The last checkpoint is sound."
        )
    return gap


# Nats, by where the model is. On a CPU both sides compute in float32 and the gap stays below 2e-5. On a GPU
# they compute in bfloat16; such an engine under a float32 trainer gave at most XX (tests/bench_rollout.py).
CANARY_BOUND = {"cpu": 1e-3, "cuda": 0.3}


def step_metrics(rewards, rollouts, counts, successes) -> dict:
    """What a step's outcomes say. The two ratios always together: allocation moves rollouts to groups
    that end up mixed (effective_rollouts), which is not the same as more mixed groups."""
    mixed = (successes > 0) & (successes < counts)  # (M,)
    return {
        "reward_mean": float((successes / counts).mean()),  # over prompts: comparable between allocators
        "reward_rollouts": float(rewards.mean()),  # over rollouts: lower where hard prompts get more
        "effective_rollouts": float(counts[mixed].sum() / counts.sum()),
        "effective_prompts": float(mixed.mean()),
        "all_right": float((successes == counts).mean()),
        "all_wrong": float((successes == 0).mean()),
        "n_largest": int(counts.max()),
        "n_smallest": int(counts.min()),
        "response_tokens": float(np.mean([len(r.response_ids) for r in rollouts])),
        "truncated": float(np.mean([not r.finished for r in rollouts])),
        # -log p of what was sampled: an unbiased estimate of the policy's entropy a token, in nats.
        "entropy": float(-np.mean(np.concatenate([r.logprobs for r in rollouts]))),
    }


def describe(row: dict, steps: int, clock: Clock) -> str:
    """One tidy line a step."""
    left = (steps - row["step"]) * clock.typical_step()
    text = (
        f"step {row['step']:>{len(str(steps))}}/{steps}  reward {row['reward_mean']:.3f}  "
        f"effective rollouts {row['effective_rollouts']:.2f} prompts {row['effective_prompts']:.2f}  "
        f"largest {row['n_largest']:3d}  {row['time_sampled_tokens_per_second']:6.0f} tok/s  "
        f"left {int(left // 60)}:{int(left % 60):02d}"
    )
    if row.get("eval_success") is not None:
        text += f"  held-out {row['eval_success']:.3f}"
    return text


class Clock:
    """Where the seconds of a step go."""

    def __init__(self):
        self.last = time.perf_counter()
        self.laps: dict[str, float] = {}
        self.steps: list[float] = []

    def lap(self, name: str) -> None:
        """Everything since the last lap was `name`."""
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self.last
        self.last = now

    def row(self) -> dict:
        """The laps since the last row (a save or a picture after it counts towards the next)."""
        laps, self.laps = self.laps, {}
        self.steps.append(sum(laps.values()))
        return {"seconds": round(self.steps[-1], 4)} | {f"time_{k}": round(v, 4) for k, v in laps.items()}

    def typical_step(self) -> float:
        return float(np.mean(self.steps[-20:]))


class StopRequest:
    """Ctrl-C or a polite kill: finish the step, save, say so. A second one stops at once."""

    def __init__(self):
        self.asked = False
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, self._ask)

    def _ask(self, number, frame) -> None:
        if self.asked:
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        self.asked = True
        print("\nstopping after this step (again: at once)", file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------ run folders


def read_rows(path: Path) -> list[dict]:
    """The whole lines of a JSON Lines file; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is torn


class Log:
    """metrics.jsonl and groups.jsonl, cut back to `last_step` first, then one line a step."""

    def __init__(self, out: Path, last_step: int):
        self.files = {}
        for name in ("metrics", "groups"):
            path = out / f"{name}.jsonl"
            rows = [row for row in read_rows(path) if row["step"] <= last_step]
            part = path.with_suffix(".part")
            part.write_text("".join(json.dumps(row) + "\n" for row in rows))
            part.replace(path)
            self.files[name] = path.open("a", encoding="utf-8")

    def _line(self, name: str, row: dict) -> None:
        self.files[name].write(json.dumps(row, allow_nan=False) + "\n")
        self.files[name].flush()

    def write(self, row: dict) -> None:
        self._line("metrics", row)

    def write_groups(self, step, ids, estimate, counts, successes) -> None:
        row = {"step": step, "ids": ids, "estimate": [round(float(p), 4) for p in estimate]}
        self._line("groups", row | {"counts": counts.tolist(), "successes": successes.tolist()})

    def close(self) -> None:
        for file in self.files.values():
            file.close()


def save_checkpoint(out: Path, step: int, model, tokenizer, optimizer, state: dict) -> None:
    """checkpoint/step-NNNNNN, written aside and renamed when complete; the last two are kept."""
    import torch

    final = out / "checkpoint" / f"step-{step:06d}"
    part = final.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    torch.save(optimizer.state_dict(), part / "optimizer.pt")
    (part / "state.json").write_text(json.dumps(state))
    for file in part.iterdir():  # on the disk before the name says so
        with file.open("rb") as f:
            os.fsync(f.fileno())
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    for old in sorted((out / "checkpoint").glob("step-??????"))[:-2]:
        shutil.rmtree(old)


def latest_checkpoint(out: Path) -> Path | None:
    return max((out / "checkpoint").glob("step-??????"), default=None)


# --------------------------------------------------------------------------------------- pictures

# One look for each allocator everywhere: colour, line and grey value all differ.
LOOK = {
    "knapsack": dict(color="#0057a8", linestyle="-"),
    "paper": dict(color="#d9741a", linestyle="--"),
    "uniform": dict(color="#7a7a7a", linestyle=":"),
}


def column(rows: list[dict], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of one metric, where it is there."""
    pairs = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
    return np.array([s for s, _ in pairs]), np.array([v for _, v in pairs], dtype=float)


def smooth(values: np.ndarray, width: int = 9) -> np.ndarray:
    """Running mean, shorter at the ends."""
    ones = np.ones(min(width, max(1, len(values))))
    return np.convolve(values, ones, "same") / np.convolve(np.ones_like(values), ones, "same")


def figure(rows: int, columns: int):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({
        "font.size": 10, "axes.titlesize": 11, "axes.titleweight": "bold", "axes.spines.top": False,
        "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False,
    })  # fmt: skip
    return plt.subplots(rows, columns, figsize=(4.8 * columns, 3.6 * rows), layout="constrained")


def save_figure(fig, path: Path) -> None:
    import matplotlib.pyplot as plt

    part = path.with_name(path.name + ".part")
    fig.savefig(part, dpi=100, format="png")
    part.replace(path)
    plt.close(fig)


def draw_dashboard(out: Path) -> None:
    """dashboard.png from the run's own files; a title says what its panel found."""
    config = json.loads((out / "config.json").read_text())
    rows, groups = read_rows(out / "metrics.jsonl"), read_rows(out / "groups.jsonl")
    if not groups:
        return
    fig, ((a, b, c), (d, e, f)) = figure(2, 3)
    fig.suptitle(
        f"{Path(config['model']).name} on {Path(config['tasks']).name}: {config['allocator']}, "
        f"{config['prompts']} prompts x {config['budget'] / config['prompts']:g} rollouts a step"
    )

    steps, reward_mean = column(rows, "reward_mean")
    evaluated, success = column(rows, "eval_success")
    _, se = column(rows, "eval_success_se")
    a.plot(steps, reward_mean, color="#bbbbbb", lw=1)
    a.plot(steps, smooth(reward_mean), color="#555555", label="training reward (mean over prompts)")
    a.errorbar(evaluated, success, se, color="#0057a8", marker="o", ms=4, label="held-out success")
    a.set(title=f"Held-out success {success[0]:.2f} → {success[-1]:.2f}", xlabel="step", ylim=(0, 1))
    a.legend(loc="lower right")

    _, by_rollout = column(rows, "effective_rollouts")
    _, by_prompt = column(rows, "effective_prompts")
    _, solved = column([r for r in rows if r["step"] > 0], "distinct_solved")
    b.plot(steps, smooth(by_rollout), color="#0057a8", label="rollouts in mixed groups")
    b.plot(steps, smooth(by_prompt), color="#d9741a", ls="--", label="prompts with a mixed group")
    b.set(xlabel="step", ylabel="share", ylim=(0, 1))
    b.set_title(f"{by_rollout.mean():.0%} of rollouts, {by_prompt.mean():.0%} of groups teach")
    right = b.twinx()
    right.plot(steps, solved, color="#7a7a7a", ls=":", label="prompts ever solved")
    right.set(ylim=(0, None), ylabel="prompts ever solved")
    right.grid(False)
    lines = b.get_lines() + right.get_lines()
    b.legend(lines, [line.get_label() for line in lines], loc="lower right", fontsize=8, frameon=True)

    shares = [smooth(column(rows, k)[1]) for k in ("all_right", "effective_prompts", "all_wrong")]
    c.stackplot(steps, shares, colors=["#cfe3cf", "#0057a8", "#4d4d4d"],
                labels=["all right", "mixed", "all wrong"])  # fmt: skip
    c.set(
        title="Only mixed groups carry gradient",
        xlabel="step",
        ylabel="share of groups",
        ylim=(0, 1),
    )
    c.legend(loc="lower right", frameon=True)

    latest, second = (
        {},
        {},
    )  # of each prompt: (estimate, count) newest; estimate after its first visit
    seen: set[str] = set()
    for g in groups:
        for i, p, n in zip(g["ids"], g["estimate"], g["counts"], strict=True):
            if i in seen:
                second.setdefault(i, p)
            seen.add(i)
            latest[i] = (p, n)
    p, n = np.array(list(latest.values())).T
    d.scatter(p, n, s=10, alpha=0.5, color=LOOK[config["allocator"]]["color"])
    d.axhline(config["budget"] / config["prompts"], color="#7a7a7a", ls=":", label="uniform")
    d.set(title=f"Rollouts given, {n.min():.0f} to {n.max():.0f} a prompt", xlim=(0, 1),
          xlabel="estimated success (newest visit)", ylabel="rollouts")  # fmt: skip
    d.set_yscale("log", base=2)
    d.yaxis.set_major_formatter("{x:g}")
    d.legend()

    bins = np.linspace(0, 1, 21)
    if second:
        e.hist(list(second.values()), bins, color="#c9c9c9", label="after the first visit")
        e.hist(
            [latest[i][0] for i in second],
            bins,
            histtype="step",
            lw=2,
            color="#0057a8",
            label="now",
        )
        e.legend()
        before, now = np.mean(list(second.values())), np.mean([latest[i][0] for i in second])
        e.set_title(f"Estimated success {before:.2f} → {now:.2f}")
    else:
        e.set_title("First epoch: nothing estimated yet")
    e.set(xlabel="estimated success", ylabel="prompts")

    names = sorted({k for r in rows for k in r if k.startswith("time_") and "per_second" not in k})
    seconds = {k[5:]: sum(r.get(k) or 0 for r in rows) for k in names}
    seconds = dict(sorted(seconds.items(), key=lambda item: item[1]))
    f.barh(list(seconds), list(seconds.values()), color="#0057a8")
    biggest = list(seconds)[-1]
    f.set(title=f"{sum(seconds.values()):.0f} seconds, most of them: {biggest}", xlabel="seconds")
    save_figure(fig, out / "dashboard.png")


def draw_comparison(runs: list[Path], path: Path) -> None:
    """Several runs on one picture, against rollouts spent: equal compute stands above equal compute."""
    fig, axes = figure(2, 2)
    panels = [("eval_success", "Held-out success"), ("effective_rollouts", "Rollouts in mixed groups"),
              ("effective_prompts", "Prompts with a mixed group"),
              ("distinct_solved", "Prompts ever solved")]  # fmt: skip
    # The look is the allocator's, the marker the run's.
    for run, marker in zip(runs, itertools.cycle("os^Dv"), strict=False):
        config, rows = (
            json.loads((run / "config.json").read_text()),
            read_rows(run / "metrics.jsonl"),
        )
        for axis, (name, title) in zip(axes.flat, panels, strict=True):
            steps, values = column(rows, name)
            if name.startswith("effective"):
                values = smooth(values)
            look = LOOK[config["allocator"]] | {"marker": marker, "markersize": 4}
            label = f"{config['allocator']} ({run.name})"
            spent = steps * config["budget"]
            if name == "eval_success":
                axis.errorbar(spent, values, column(rows, "eval_success_se")[1], label=label, **look)
            else:
                axis.plot(spent, values, markevery=max(1, len(spent) // 8), **look)
            axis.set(title=title, xlabel="rollouts spent")
    for axis in axes.flat:  # once all runs are drawn, or the first one would fix the top
        axis.set_ylim(bottom=0)
    axes[0, 0].legend(loc="lower right")
    save_figure(fig, path)


# ------------------------------------------------------------------------------------ entry point


def prepare(c: Config) -> tuple[list, list]:
    """Everything that can be wrong without a model: settings, names, files -> (training, held out)."""
    check(c)
    evaluate.resolve_model(c.model)
    tasks = reward.load_tasks(c.tasks)
    n_held_out = c.held_out or min(256, len(tasks) // 5)
    if n_held_out == 0 or n_held_out + c.prompts > len(tasks):
        raise ValueError(
            f"--tasks {c.tasks}: {len(tasks)} tasks are too few for {c.prompts} prompts a step and "
            f"{n_held_out} held out: lower --prompts or --held-out, or bring more tasks"
        )
    train_tasks, held_out = reward.split_held_out(tasks, n_held_out, seed=0)  # one split for every seed
    # Whole batches only, so that after the first epoch every prompt has been seen.
    left_over = len(train_tasks) % c.prompts
    if left_over:
        print(f"{left_over} training tasks do not fill a batch of {c.prompts} and are left out")
    return train_tasks[: len(train_tasks) - left_over], held_out


def run_folder(c: Config, wanted: Path | None) -> Path:
    """A folder without a run in it: the one asked for, or a free name under runs/."""
    if wanted is not None:
        if (wanted / "config.json").exists():
            raise ValueError(f"--out {wanted} already holds a run: choose another, or --resume {wanted}")
        if wanted.exists() and (not wanted.is_dir() or any(wanted.iterdir())):
            raise ValueError(f"--out {wanted} is there already and is not an empty folder: choose another")
        return wanted
    name = f"{Path(c.model).name}-{c.allocator}-seed{c.seed}"
    names = [name, *(f"{name}-{k}" for k in range(2, 10_000))]
    return next(p for n in names if not (p := Path("runs") / n).exists())


def main(argv=None) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # what libraries tell their own developers
    warnings.formatwarning = lambda message, *_, **__: f"train.py: {message}\n"
    out, fresh = None, False
    try:
        c, args = parse_args(argv)
        if args.compare:
            for run in args.compare:
                if not (run / "metrics.jsonl").is_file():
                    raise ValueError(f"--compare {run}: no metrics.jsonl there")
            draw_comparison(args.compare, args.out or Path("compare.png"))
            print(f"drew {args.out or 'compare.png'}")
            return
        if args.resume:
            out = args.resume
            if not (out / "config.json").is_file():
                raise ValueError(f"--resume {out}: no config.json there, so no run to go on with")
            try:
                c = Config(**json.loads((out / "config.json").read_text()))
            except TypeError as error:
                raise ValueError(f"{out}/config.json is not of this version: {error}") from error
            if (out / "final").is_dir():
                print(f"{out} is finished: nothing to resume")
                return
        train_tasks, held_out = prepare(c)
        if not args.resume:
            out = run_folder(c, args.out)
            out.mkdir(parents=True, exist_ok=True)
            fresh = True
            (out / "config.json").write_text(json.dumps(dataclasses.asdict(c), indent=2) + "\n")
        parts = set_up(c, out, train_tasks + held_out)
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if fresh:  # nothing has run: leave no folder that looks as if
            (out / "config.json").unlink(missing_ok=True)
            out.rmdir()  # it was empty when we came
        if isinstance(error, KeyboardInterrupt):
            sys.exit("interrupted before the first step")
        sys.exit(f"train.py: error: {error}")
    try:
        train(c, out, train_tasks, held_out, *parts)
    except KeyboardInterrupt:
        sys.exit(f"interrupted; go on with: python train.py --resume {out}")
    except (RunStopped, FloatingPointError) as error:
        sys.exit(f"train.py: stopped: {error}")


if __name__ == "__main__":
    main()
