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
checkpoint/step-NNNNNN/ (the last two, and the best on the held-out problems; `sha256sum -c SHA256SUMS`
checks one) and final/; transformers and vLLM load any of them as it is.

What this is minus: no KL, no reference model, no critic, no replay, one machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import warnings
from collections import defaultdict, deque
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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
    instruction: str = setting("", None, "text after each prompt; None: \\boxed{} please for hub tasks")
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
    lr: float = setting(3e-4, 1e-6, "AdamW's learning rate")
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
    save_every: int = setting(25, 20, "steps between checkpoints; a new best is saved besides")
    gpu_memory: float = setting(0.4, 0.4, "vLLM's share of the GPU's memory while it samples")
    seed: int = setting(0, 0, "seed of everything random")
    trust_remote_code: bool = setting(False, False, "run code that comes with the model")


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def need(ok, sentence: str) -> None:
    """A user's error is one line that says what to do; main prints it."""
    if not ok:
        raise ValueError(sentence)


def parse_args(argv=None) -> tuple[Config, argparse.Namespace]:
    """The command line -> settings, with the defaults of the model that was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Defaults stand in brackets: those of --model tiny | those of any other --model.",
    )
    for f in dataclasses.fields(Config):
        tiny, large, text = (f.metadata[k] for k in ("tiny", "large", "help"))
        kind = dict(action="store_true")
        if not isinstance(tiny, bool):
            text += f" [{tiny} | {large}]" if tiny != large else f" [{tiny}]"
            kind = dict(type=type(tiny), choices=f.metadata.get("choices"))
        parser.add_argument(flag(f.name), default=argparse.SUPPRESS, help=text, **kind)
    parser.add_argument("--out", type=Path, help="run folder [runs/MODEL-ALLOCATOR-seedSEED]")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with the run in DIR")
    text = "draw runs on one picture, --out PNG"
    parser.add_argument("--compare", type=Path, nargs="+", metavar="RUN", help=text)
    args = parser.parse_args(argv)
    given = {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if f.name in args}
    column = "tiny" if given.get("model", "tiny") == "tiny" else "large"
    values = {f.name: f.metadata[column] for f in dataclasses.fields(Config)} | given
    if values["instruction"] is None:
        values["instruction"] = evaluate.default_instruction(values["tasks"])
    alone = not (args.compare and (given or args.resume))
    need(alone, "--compare draws what exists: give only --out with it")
    need(not args.resume or args.out in (None, args.resume), "--resume goes on in its own folder: drop --out")
    args.given = given
    return Config(**values), args


def read_config(run: Path) -> Config:
    """The settings of a run. ValueError if its config.json is missing, damaged or out of range."""
    path = run / "config.json"
    need(path.is_file(), f"{run}: no config.json there, so no run")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    kinds = {f.name: type(f.metadata["tiny"]) for f in dataclasses.fields(Config)}
    strange = set(stored) ^ set(kinds) if isinstance(stored, dict) else ["not a table"]
    need(not strange, f"{path} is not of this version: {', '.join(sorted(strange))}")
    for name, value in stored.items():
        fits = type(value) is kinds[name] or (type(value), kinds[name]) == (int, float)
        need(fits, f"{path}: {name} must be of type {kinds[name].__name__}, not {value!r}")
    check(c := Config(**stored))
    return c


def differences(ours: dict, theirs: dict) -> str:
    """Which settings in `theirs` differ from `ours`, as flags; empty if none does."""
    return ", ".join(f"{flag(k)} {ours[k]} (not {v})" for k, v in theirs.items() if v != ours[k])


def check(c: Config) -> None:
    """ValueError, in one line that says what to do, for settings that cannot work."""
    for f in dataclasses.fields(c):
        value, choices = getattr(c, f.name), f.metadata.get("choices")
        need(not choices or value in choices, f"{flag(f.name)} {value}: choose from {choices}")
        if f.name in ("seed", "held_out", "warmup_steps"):
            need(value >= 0, f"{flag(f.name)} {value}: must not be negative")
        elif type(value) in (int, float):
            need(0 < value < float("inf"), f"{flag(f.name)} {value}: must be above 0, and finite")
    need(max(c.clip_low, c.gpu_memory) < 1, "--clip-low and --gpu-memory must lie below 1")
    coldest = min(c.temperature, c.eval_temperature)
    need(coldest >= 0.01, f"a temperature of {coldest}: must be at least 0.01, vLLM's own limit")
    need(c.n_max > 1, "--n-max 1: a group of one is never mixed, so nothing would be learned")
    need(c.n_min <= c.n_max, f"--n-min {c.n_min} is above --n-max {c.n_max}")
    low, high = c.prompts * c.n_min, c.prompts * c.n_max
    advice = "raise --budget, or lower --n-min" if c.budget < low else "lower --budget, or raise --n-max"
    limits = f"between {c.prompts} prompts x n_min {c.n_min} = {low} and x n_max {c.n_max} = {high}"
    need(low <= c.budget <= high, f"--budget {c.budget} is not {limits}: {advice} or change --prompts")


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


def set_up(c: Config, out: Path, tasks: list, checkpoint: Path | None) -> tuple:
    """(model, tokenizer, prompts, sampler): what takes seconds to load, and everything that can be
    wrong with it as a ValueError. The weights are the checkpoint's, where there is one."""
    # Ragged batches leave holes of all sizes in a GPU's memory. Read when torch first asks for some.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import rollout

    path = evaluate.resolve_model(c.model)
    engine, why = rollout.choose_engine(c.engine)
    print(f"sampling with {engine} ({why}); writing to {out}", flush=True)
    model, tokenizer = evaluate.load_model(checkpoint or path, c.trust_remote_code)
    prompts = evaluate.encode_tasks(tokenizer, tasks, c.instruction, c.chat)  # {task id: token ids}
    longest, highest = max(map(len, prompts.values())), max(map(max, prompts.values()))
    for i, ids in prompts.items():
        limit = f"longer than {c.max_prompt_tokens} tokens: raise --max-prompt-tokens or drop it"
        need(len(ids) <= c.max_prompt_tokens, f"the prompt of {i} is {limit}")
    known = model.get_input_embeddings().num_embeddings
    need(highest < known, f"--model {c.model}: its tokenizer says {highest}, its weights know {known} tokens")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        plain = getattr(model.config, name, None) in (None, 1.0)
        need(plain, f"--model {c.model}: its {name} is not supported by grpo.token_logprobs")
    context = getattr(model.config, "max_position_embeddings", None) or float("inf")
    both = f"a prompt of {longest} tokens and --max-new-tokens {c.max_new_tokens}"
    need(longest + c.max_new_tokens <= context, f"{both} exceed the model's context of {context}: lower them")
    # Two checkpoints (weights and two moments) and final/: the new one is whole before an old one goes.
    size = (2 * 3 + 1) * sum(p.nbytes for p in model.parameters())
    room = shutil.disk_usage(out).free + sum(f.stat().st_size for f in out.rglob("*"))
    need(room >= size, f"--out {out}: the run needs {size / 1e9:.2g} GB of disk: make room there first")
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


def train(c, out, train_tasks, held_out, model, tokenizer, prompts, sampler, checkpoint, state, rows):
    """The whole run; from `checkpoint`, if there is one, with its `state` and the metrics rows before it."""
    import torch
    from safetensors.torch import load_file
    from tqdm import tqdm

    import grpo

    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, weight_decay=0.0)
    tracker, best = knapsack.SuccessTracker(), (-1.0, 0)  # (held-out success, step)
    if checkpoint:
        moments: dict[int, dict] = {}
        for name, tensor in load_file(checkpoint / "optimizer.safetensors").items():
            moments.setdefault(int(name.split(".")[0]), {})[name.split(".")[1]] = tensor
        optimizer.load_state_dict({"state": moments, "param_groups": state["optimizer"]})
        tracker.load_state_dict(state["tracker"])
        best = tuple(state["best"])
        print(f"resuming after step {state['step']}")
    first = state.get("step", 0) + 1
    epoch = len(train_tasks) // c.prompts  # in steps
    recent, warned = deque((r for r in rows if r["step"] > 0), maxlen=PATIENCE), set()
    stop, clock, verifier = StopRequest(), Clock(), reward.Verifier()

    def held_out_success() -> dict[str, float]:
        """Mean success over the held-out problems, and its standard error. Always the same seed:
        the same random numbers each time make two evaluations differ by the model alone."""
        sampler.temperature, seed = c.eval_temperature, step_seed(c.seed, 0)
        right, _ = evaluate.evaluate(sampler, held_out, prompts, verifier, c.eval_samples, seed)
        sampler.temperature = c.temperature
        clock.lap("eval")
        return {
            "eval_success": float(right.mean()),
            "eval_success_se": evaluate.bootstrap_se(right.mean(1)),
        }

    bar = tqdm(total=c.steps, initial=first - 1, unit="step", dynamic_ncols=True, disable=None)
    try:
        if not checkpoint:  # the untouched model
            row = dict.fromkeys(ROW) | {"step": 0, "budget": c.budget, "distinct_solved": 0}
            row |= held_out_success() | clock.row()
            append(out / "metrics.jsonl", row)
            clock.steps.clear()  # an evaluation says nothing about how long a step takes
            bar.write(f"before training: held-out success {row['eval_success']:.3f}")

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
            successes = np.bincount(group, rewards, minlength=len(ids)).astype(int)  # (M,)
            outcome = step_metrics(rewards, rollouts, counts, successes)
            outcome["no_verdict"] = len(verifier.no_verdict)  # out of time or failed: counted as wrong
            clock.lap("verify")
            if not np.isfinite(outcome["entropy"]):
                raise RunStopped(f"the model's log-probs are not finite at step {step}; {BLOWN_UP}")
            # 3. Advantages within each group, and the update.
            advantages = grpo.group_advantages(rewards, group)  # (R,)
            gap = canary(model, rollouts, c, grpo.token_logprobs)
            sampler.sleep()
            clock.lap("sync")  # the check of the weights counts as theirs
            for parameters in optimizer.param_groups:
                parameters["lr"] = c.lr * min(1.0, step / max(1, c.warmup_steps))
            stats = grpo.update(
                model, optimizer, rollouts, advantages, c.minibatches, c.temperature,
                tokens_per_microbatch=c.tokens_per_microbatch, seed=step_seed(c.seed, step),
                checkpointing=c.checkpointing, clip_low=c.clip_low, clip_high=c.clip_high,
            )  # fmt: skip
            clock.lap("update")
            stats |= memory_in_use()
            # 4. New weights to the sampler, outcomes to the tracker.
            sampler.sync(model)
            clock.lap("sync")
            tracker.update(ids, successes, counts)
            solved = int(tracker.solved([t.id for t in train_tasks]).sum())
            # 5. One row, one line, a picture now and then.
            row = dict.fromkeys(ROW) | {"step": step, **outcome}
            row |= {"distinct_solved": solved, "budget": len(rollouts), "logprob_gap": gap}
            row |= {"lr": parameters["lr"], **stats}
            if step % c.eval_every == 0 or step == c.steps:
                row |= held_out_success()
            row |= clock.row()
            row["time_sampled_tokens_per_second"] = (
                row["response_tokens"] * row["budget"] / row["time_sample"]
            )
            append(out / "metrics.jsonl", row)
            who = {"step": step, "ids": ids, "estimate": [round(float(p), 4) for p in estimate]}
            who |= {"counts": counts.tolist(), "successes": successes.tolist()}
            append(out / "groups.jsonl", who)
            bar.write(describe(row, c.steps, clock))
            if row["no_verdict"]:
                bar.write(f"warning: {row['no_verdict']} answers got no verdict and count as wrong")
            bar.update()
            # 6. Say what goes wrong, and keep what an interruption would lose.
            recent.append(row)
            found = trouble(recent)
            for name in found.keys() - warned:
                bar.write(f"warning: for {PATIENCE} steps {found[name]}")
            warned |= found.keys()
            stopping = stop.asked or "silent" in found  # read once: a later signal waits for the next step
            if row["eval_success"] is not None and row["eval_success"] > best[0]:
                best = (row["eval_success"], step)
            if step % c.save_every == 0 or step == c.steps or step == best[1] or stopping:
                now = {"step": step, "best": best, "tracker": tracker.state_dict()}
                save_checkpoint(out, model, tokenizer, optimizer, state | now)
                clock.lap("save")
            if row["eval_success"] is not None or stopping:
                evaluate.draw_dashboard(out, epoch)
                clock.lap("draw")
            if "silent" in found and step < c.steps:
                raise RunStopped(f"{found['silent']}; the weights are in {out}/checkpoint")
            if stopping and step < c.steps:
                bar.close()
                print(f"stopped after step {step}; go on with: python train.py --resume {out}")
                sys.exit(130)
    finally:
        bar.close()
        verifier.close()
        sampler.close()
    evaluate.draw_dashboard(out, epoch)
    with written_aside(out / "final") as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    rows = list(evaluate.each_row(out / "metrics.jsonl"))
    (_, success), (_, se) = evaluate.column(rows, "eval_success"), evaluate.column(rows, "eval_success_se")
    print(
        f"held-out success {success[0]:.3f} -> {success[-1]:.3f} (± {se[-1]:.3f}) in {c.steps} steps of "
        f"{c.budget} rollouts; model in {out}/final, picture in {out}/dashboard.png"
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


BLOWN_UP = "training has blown up: start again with a lower --lr, or from an earlier checkpoint"
PATIENCE = 20  # steps


def trouble(rows) -> dict[str, str]:
    """What has been wrong in each of the last PATIENCE metrics rows: {name: a sentence with advice}.
    "silent" ends the run (nothing has changed the weights meanwhile), the others are said once."""
    right = np.mean([r["all_right"] for r in rows])
    advice = {
        "silent": f"every group was silent, {right:.0%} all right and the rest all wrong: nothing to learn "
        f"from; bring {'harder' if right > 0.5 else 'easier'} tasks, or raise --budget",
        "truncated": "every response was cut at --max-new-tokens: raise it, unless so short an answer is "
        "wanted; or the model has no end-of-sequence token",
        "collapsed": "the entropy was below 0.001 nats a token, so nothing is explored: unless all is "
        "solved, start again with a lower --lr or a higher --temperature",
    }
    signs = {
        "silent": all(r["effective_rollouts"] == 0 for r in rows),
        "truncated": all(r["truncated"] == 1 for r in rows),
        "collapsed": all(r["entropy"] < 1e-3 for r in rows),
    }
    return {name: advice[name] for name in signs if signs[name] and len(rows) == PATIENCE}


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
# they compute in bfloat16; such an engine under a float32 trainer gave at most 0.05 (bench_rollout.py).
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
    left = (steps - row["step"]) * float(np.mean(clock.steps))
    text = (
        f"step {row['step']:>{len(str(steps))}}/{steps}  reward {row['reward_mean']:.3f}  "
        f"effective rollouts {row['effective_rollouts']:.2f} prompts {row['effective_prompts']:.2f}  "
        f"largest {row['n_largest']:3d}  {row['time_sampled_tokens_per_second']:6.0f} tok/s  "
        f"left {int(left // 60)}:{int(left % 60):02d}"
    )
    if row.get("eval_success") is not None:
        text += f"  held-out {row['eval_success']:.3f}"
    return text


def memory_in_use() -> dict:
    """Of the GPU, by whomever. Torch keeps what it has freed: after an update, the most that it took."""
    import torch

    if not torch.cuda.is_available():
        return {}
    free, total = torch.cuda.mem_get_info()
    return {"mem_peak_gib": (total - free) / 2**30}


class Clock:
    """Where the seconds of a step go. A lap ends when the GPU is through with it."""

    def __init__(self):
        import torch

        self.wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
        self.last = time.perf_counter()
        self.laps: dict[str, float] = defaultdict(float)
        self.steps: deque[float] = deque(maxlen=20)

    def lap(self, name: str) -> None:
        """Everything since the last lap was `name`."""
        self.wait()
        now = time.perf_counter()
        self.laps[name] += now - self.last
        self.last = now

    def row(self) -> dict:
        """The laps since the last row (a save or a picture after it counts towards the next)."""
        laps, self.laps = self.laps, defaultdict(float)
        self.steps.append(sum(laps.values()))
        return {"seconds": round(self.steps[-1], 4)} | {f"time_{k}": round(v, 4) for k, v in laps.items()}


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
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step (again: at once)\n")


# ------------------------------------------------------------------------------------ run folders


def append(path: Path, row: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")


def cut_back(out: Path, last_step: int) -> deque[dict]:
    """metrics.jsonl and groups.jsonl without the steps after `last_step`, which will be done again (-1: all
    of them). Returns the newest metrics rows that are left."""
    for name, first in (("groups", 1), ("metrics", 0)):
        path, steps, newest = out / f"{name}.jsonl", [], deque(maxlen=PATIENCE)
        path.touch()
        for row in evaluate.each_row(path):
            if row["step"] <= last_step:
                steps.append(row["step"])
                newest.append(row)
        whole = steps == list(range(first, last_step + 1))
        need(whole, f"{path} lacks steps before the checkpoint: put it back, or start a new run")
        with path.open("r+b") as file:
            file.truncate(sum(len(file.readline()) for _ in steps))
    return newest


def lock(out: Path):
    """One process a run folder, as long as the returned file is open: two would tear each other's files."""
    file = (out / "config.json").open()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{out}: another train.py is at work on this run: wait, or stop it") from error
    return file


def to_disk(path: Path) -> None:
    """Through the operating system's buffers: a file or a folder survives a power cut from here on."""
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


def checksums(folder: Path) -> str:
    """SHA256SUMS of everything in a folder, as the sha256sum command writes and checks it."""
    lines = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "SHA256SUMS":
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {path.relative_to(folder)}\n")
    return "".join(lines)


@contextmanager
def written_aside(folder: Path):
    """A folder to write into, which is checksummed, and renamed to `folder` once all of it is on the disk.
    OSError, and nothing is changed, if a write fails."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        (part / "SHA256SUMS").write_text(checksums(part))
        for path in (*part.rglob("*"), part):
            to_disk(path)
        part.rename(folder)
        to_disk(folder.parent)
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        if "(os error" in str(error):  # safetensors and tokenizers raise kinds of their own
            raise OSError(str(error)) from error
        raise


def save_checkpoint(out: Path, model, tokenizer, optimizer, state: dict) -> None:
    """checkpoint/step-NNNNNN: the model, the optimizer, and `state` as JSON.

    No generator's state and no position in the data: both follow from (seed, step), see step_seed and
    batch_of. No pickle: loading a checkpoint cannot run code.
    """
    import torch
    from safetensors.torch import save_file

    if not all(bool(torch.isfinite(p).all()) for p in model.parameters()):
        raise RunStopped(f"the weights are not finite after step {state['step']}: not saved; {BLOWN_UP}")
    for path in out.glob("*.jsonl"):
        to_disk(path)  # a checkpoint has all of its past behind it
    folder = out / "checkpoint"
    with written_aside(folder / f"step-{state['step']:06d}") as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        moments, groups = optimizer.state_dict().values()
        flat = {f"{i}.{name}": x.contiguous() for i, of in moments.items() for name, x in of.items()}
        save_file(flat, part / "optimizer.safetensors")
        (part / "state.json").write_text(json.dumps(state | {"optimizer": groups}))
    # Only now do older ones go: all but the last two and the best.
    steps = sorted(folder.glob("step-??????"))
    for old in {*steps[:-2], *folder.glob("*.part")} - {folder / f"step-{state['best'][1]:06d}"}:
        shutil.rmtree(old)


def newest_checkpoint(out: Path) -> tuple[Path | None, dict]:
    """The newest whole checkpoint and its state; (None, {}) if there is none. A damaged or half-written
    one is named, and put aside or removed."""
    for path in sorted((out / "checkpoint").glob("step-*"), reverse=True):
        if path.suffix == ".part":
            print(f"{path.stem} was not saved to its end: going on from the checkpoint before")
            shutil.rmtree(path)
        elif path.suffix == "":
            sums = path / "SHA256SUMS"
            if sums.is_file() and sums.read_bytes() == checksums(path).encode():
                return path, json.loads((path / "state.json").read_text())
            aside = path.with_suffix(".damaged")
            print(f"{path.name} is damaged (see {aside}): going on from the checkpoint before")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
    return None, {}


# ------------------------------------------------------------------------------------ entry point


def prepare(c: Config) -> tuple[list, list]:
    """Everything that can be wrong without a model: settings, names, files -> (training, held out)."""
    check(c)
    evaluate.resolve_model(c.model)
    tasks = reward.load_tasks(c.tasks)
    n_held_out = c.held_out or min(256, len(tasks) // 5)
    few = f"{len(tasks)} tasks are too few for {c.prompts} prompts and {n_held_out} held out: lower those"
    need(0 < n_held_out <= len(tasks) - c.prompts, f"--tasks {c.tasks}: {few}, or bring more tasks")
    train_tasks, held_out = reward.split_held_out(tasks, n_held_out, seed=0)  # one split for every seed
    # Whole batches only, so that after the first epoch every prompt has been seen.
    left_over = len(train_tasks) % c.prompts
    if left_over:
        print(f"{left_over} training tasks do not fill a batch of {c.prompts} and are left out")
    return train_tasks[: len(train_tasks) - left_over], held_out


def run_folder(c: Config, wanted: Path | None) -> Path:
    """A folder without a run in it: the one asked for, or a free name under runs/."""
    if wanted is not None:
        free = not wanted.exists() or (wanted.is_dir() and not any(wanted.iterdir()))
        need(free, f"--out {wanted} is not an empty folder: choose another, or --resume it if it is a run")
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
            evaluate.draw_comparison(args.compare, args.out or Path("compare.png"))
            print(f"drew {args.out or 'compare.png'}")
            return
        if args.resume:
            c, out = read_config(args.resume), args.resume
            different = differences(asdict(c), args.given)
            need(not different, f"--resume {out}: the run has {different}: drop that, or start a new run")
            trusted = args.given.get("trust_remote_code") or not c.trust_remote_code
            need(trusted, f"--resume {out} would run the model's code: add --trust-remote-code if you do")
            if (out / "final").is_dir():
                print(f"{out} is finished: nothing to resume")
                return
        train_tasks, held_out = prepare(c)
        if not args.resume:
            out = run_folder(c, args.out)
            out.mkdir(parents=True, exist_ok=True)
            fresh, text = True, json.dumps(asdict(c), indent=2) + "\n"
            evaluate.replace_file(out / "config.json", lambda part: part.write_text(text))
        _locked = lock(out)  # until this process ends
        checkpoint, state = newest_checkpoint(out)
        tasks = hashlib.sha256(repr(train_tasks + held_out).encode()).hexdigest()
        state = {"config": asdict(c), "tasks": tasks} | state  # of the checkpoint, where it says
        different = differences(state["config"], asdict(c))
        need(not different, f"{out}/config.json has changed: the checkpoint has {different}: put it back")
        need(state["tasks"] == tasks, f"--tasks {c.tasks} has changed since {checkpoint}: put it back")
        parts = set_up(c, out, train_tasks + held_out, checkpoint)
        rows = cut_back(out, state.get("step", -1))
    except (ValueError, OSError, KeyboardInterrupt) as error:
        if fresh:  # nothing has run: leave no folder that looks as if
            shutil.rmtree(out, ignore_errors=True)  # it was empty when we came
        if isinstance(error, KeyboardInterrupt):
            sys.exit("interrupted before the first step")
        sys.exit(f"train.py: error: {error}")
    try:
        train(c, out, train_tasks, held_out, *parts, checkpoint, state, rows)
    except KeyboardInterrupt:
        sys.exit(f"interrupted; go on with: python train.py --resume {out}")
    except OSError as error:
        go_on = f"make room, then python train.py --resume {out}"
        sys.exit(f"train.py: stopped: a write failed ({error}); the last checkpoint is whole: {go_on}")
    except (RunStopped, FloatingPointError) as error:
        sys.exit(f"train.py: stopped: {error}")
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's; torch is not imported this far out
            raise
        less = "a lower --tokens-per-microbatch, --checkpointing, or a lower --gpu-memory"
        sys.exit(f"train.py: stopped: out of GPU memory; start a new run with {less}")


if __name__ == "__main__":
    main()
