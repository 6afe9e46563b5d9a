"""Knapsack RL on one machine: GRPO whose rollouts go where they are expected to teach most.

    python train.py                                          # the embedded model, three minutes
    python train.py --allocator uniform                      # the same compute, spread evenly
    python train.py --model Qwen2.5-Math-1.5B                # one GPU
    python train.py --model FOLDER --tasks FILE.jsonl        # your model, your {"prompt", "answer"}
    python train.py --reward FILE.py:FUNCTION                # your own reward, (tasks, texts) -> [0, 1]
    python train.py --resume runs/tiny-knapsack-seed0        # go on after an interruption
    python train.py --compare RUN_A RUN_B                    # two runs on one picture

Read it from the top: the allocators, the settings, the loop; then what the loop calls, in the order of
the calls. Four simplifications: there is no KL penalty and so no reference model, no critic, no replay
of old rollouts, and one machine.

A run folder holds config.json; metrics.jsonl, one row a step, with the untouched model in row 0;
groups.jsonl, each step's prompts, estimates, counts and successes; samples.jsonl, what the model wrote at
each evaluation; dashboard.png; checkpoint/step-NNNNNN/, the last two and the best; and final/.
transformers and vLLM load a checkpoint or final/ as it is.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import sys
import sysconfig
import time
import traceback
import warnings
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np

# torch takes seconds to import, and a wrong flag must answer at once. So torch, and grpo which needs it,
# are imported by the functions that use them, after everything else has been checked.
import evaluate
import knapsack
import reward
import rollout
from evaluate import need

# ---- Who decides how many rollouts each prompt gets ---------------------------------------------------
# name -> function(tracker, ids, config) -> counts: M whole numbers from config.n_min to config.n_max,
# which add up to config.budget, unless the rule is to spend another sum (what was spent is logged).
# To try a rule of your own, write such a function and add it here: --allocator NAME then takes it.
ALLOCATORS = {
    "knapsack": lambda tracker, ids, c: knapsack.allocate(tracker.posterior(ids), c.budget, c.n_min, c.n_max),
    "paper": lambda tracker, ids, c: knapsack.allocate_paper(
        tracker.windowed_rate(ids), c.budget, c.n_min, c.n_max
    ),
    "uniform": lambda tracker, ids, c: knapsack.uniform(len(ids), c.budget),
    "saving": lambda tracker, ids, c: knapsack.allocate_saving(tracker.posterior(ids), c.budget, c.n_min),
}


# ---- Settings -----------------------------------------------------------------------------------------
# A field with two defaults, that of the embedded model and that of any other model, and its bounds.
def setting(tiny, large, help: str, low=1, high=10**9):
    return field(default=tiny, metadata={"tiny": tiny, "large": large, "help": help, "range": (low, high)})


@dataclass(frozen=True)
class Config:
    # What is trained, and on what.
    model: str = setting("tiny", "tiny", "tiny, a folder, or a hub id; a bare Qwen name means Qwen/...")
    tasks: str = setting("arithmetic", "math", "arithmetic, a file of rows, or a hub name")
    limit: int = setting(0, 2048, "train on so many of the tasks, always the same ones (0: on all)", 0)
    reward: str = setting("", "", "your own reward, FILE.py:FUNCTION (see reward.py)")
    instruction: str = setting("", None, "text after each prompt; large models: \\boxed{}, on hub tasks")
    chat: bool = setting(False, False, "wrap prompts in the model's chat template")
    chat_template_kwargs: str = setting("{}", "{}", 'JSON for that template, as {"enable_thinking": false}')
    trust_remote_code: bool = setting(False, False, "run code that comes with the model")
    # Who gets how many rollouts. The paper: 256 prompts, 8 a prompt on average, 2 to 128.
    allocator: str = setting("knapsack", "knapsack", f"who decides the counts: {', '.join(ALLOCATORS)}")
    steps: int = setting(100, 200, "training steps", high=999_999)
    prompts: int = setting(64, 64, "prompts a step (M)")
    budget: int = setting(512, 512, "rollouts a step, all prompts together (B)")
    n_min: int = setting(2, 2, "fewest rollouts of a prompt")
    n_max: int = setting(128, 128, "most rollouts of a prompt", 2)  # a group of one is never mixed
    # Sampling. vLLM takes no temperature below 0.01.
    engine: str = setting("auto", "auto", "who samples: auto, vllm or hf")
    gpu_memory: float = setting(0.4, 0.4, "vLLM's share of the GPU's memory while it samples", 0.01, 0.99)
    temperature: float = setting(1.0, 1.0, "of the sampling during training", 0.01)
    max_new_tokens: int = setting(40, 1024, "length limit of a response")
    max_prompt_tokens: int = setting(64, 2048, "tasks with a longer prompt are left out")
    # The update. The large model's rate, clip and number of minibatches are the paper's.
    optimizer: str = setting("adamw", "adamw", "adamw, or adamw8bit: a quarter of its memory, with torchao")
    lr: float = setting(3e-4, 1e-6, "AdamW's learning rate", 1e-12, 1)
    warmup_steps: int = setting(10, 5, "steps over which the learning rate rises to --lr", 0)
    minibatches: int = setting(2, 8, "optimizer steps a batch of rollouts")
    clip_low: float = setting(0.2, 0.2, "PPO clip below 1", 0.001, 0.999)
    clip_high: float = setting(0.28, 0.28, "PPO clip above 1 (clip-higher)", 0.001)
    tokens_per_microbatch: int = setting(16384, 8192, "padded tokens in one forward pass (memory)")
    checkpointing: bool = setting(False, False, "recompute activations: less memory, slower")
    # Evaluation and saving.
    held_out: int = setting(0, 0, "tasks kept for evaluation (0: a fifth of them, at most 256)", 0)
    eval_every: int = setting(20, 20, "steps between evaluations")
    eval_samples: int = setting(4, 4, "answers a held-out problem")
    eval_temperature: float = setting(1.0, 0.6, "of the sampling during evaluation", 0.01)
    save_every: int = setting(25, 20, "steps between checkpoints; a new best is saved besides")
    seed: int = setting(0, 0, "seed of everything random", 0)


# ---- The loop -----------------------------------------------------------------------------------------
@dataclass
class Run:
    """What a run consists of."""

    config: Config
    out: Path  # its folder
    train_tasks: list[reward.Task]
    held_out: list[reward.Task]
    prompts: dict[str, list[int]]  # the token ids that each task is asked with, by its id
    judge: object  # (tasks, texts) -> rewards in [0, 1]: a reward.Verifier, or the user's function
    model: object
    tokenizer: object
    sampler: object  # a rollout.HFSampler or a rollout.VLLMSampler
    optimizer: object
    tracker: knapsack.SuccessTracker
    state: dict  # step (the last one that was done), best (held-out success, step), tasks (a hash)
    recent: list[dict]  # the newest metrics rows
    locked: object  # the folder is, as long as this file is open
    bar: object = None  # the progress bar, and what prints above it

    def close(self) -> None:
        """Ends the processes and the bar."""
        self.sampler.close()
        self.bar and self.bar.close()
        getattr(self.judge, "close", lambda: None)()
        self.locked.close()


def train(run: Run) -> None:
    """Trains, from the step after the last one that was done to config.steps."""
    from tqdm import tqdm

    import grpo

    c, clock, stop = run.config, Clock(), asked_to_stop()
    done = run.state["step"]  # 0 for a new run
    run.bar = tqdm(total=c.steps, initial=done, unit="step", dynamic_ncols=True, disable=None)
    if done == 0:  # row 0 is the untouched model
        row = {"step": 0, "budget": c.budget, "distinct_solved": 0} | held_out_success(run, 0)
        clock.lap("eval")
        run.state["best"] = (row["eval_success"], 0)
        log(run.out, "metrics", dict.fromkeys(ROW) | row | clock.row())
        run.bar.write(f"before training: held-out success {row['eval_success']:.3f}")

    for step in range(done + 1, c.steps + 1):
        # 1. Which prompts, and how many rollouts does each of them get?
        tasks = batch_of(run.train_tasks, step, c)  # M of them
        ids = [t.id for t in tasks]
        p = run.tracker.estimate(ids)  # (M,) expected success, for the record
        counts = np.asarray(ALLOCATORS[c.allocator](run.tracker, ids, c))  # (M,), sum = budget
        clock.lap("allocate")

        # 2. Sample them, and judge what came.
        token_ids = [run.prompts[i] for i in ids]
        rollouts = run.sampler.sample(token_ids, counts, step_seed(c.seed, step))  # R = sum(counts)
        clock.lap("sample")
        group = np.array([r.group for r in rollouts])  # (R,) in 0 .. M-1
        rewards = reward.grade(run.judge, [tasks[g] for g in group], [r.text for r in rollouts])  # (R,)
        row = step_metrics(rewards, group, rollouts)  # what the log and the pictures are made of
        clock.lap("verify")

        # 3. Learn. A group whose rewards are all equal has zero advantages and costs nothing here.
        advantages = grpo.group_advantages(rewards, group)  # (R,)
        run.sampler.sleep()  # on one GPU the update needs the engine's memory
        row["logprob_gap"] = canary(run.model, rollouts, c)
        clock.lap("sync")
        # The learning rate rises on a line, and stays.
        row["lr"] = c.lr * min(1.0, step / max(1, c.warmup_steps))
        run.optimizer.param_groups[0]["lr"] = row["lr"]
        # In all minibatches pi_old is the model as it is now; the clip keeps the new one near it.
        row |= grpo.update(
            run.model, run.optimizer, rollouts, advantages, c.minibatches, c.temperature,
            tokens_per_microbatch=c.tokens_per_microbatch, seed=step_seed(c.seed, step),
            checkpointing=c.checkpointing, clip_low=c.clip_low, clip_high=c.clip_high,
        )  # fmt: skip
        clock.lap("update")
        run.sampler.sync(run.model)  # from here on it samples from the new weights
        clock.lap("sync")

        # 4. Remember who solved what. A graded reward counts as a success above 0.5.
        successes = np.bincount(group, rewards > 0.5, minlength=len(ids)).astype(int)  # (M,)
        run.tracker.update(ids, successes, counts)
        solved = run.tracker.solved([t.id for t in run.train_tasks])  # (tasks,): ever
        row |= {"step": step, "budget": len(rollouts), "distinct_solved": int(solved.sum())}

        # 5. Report; then keep what an interruption would lose.
        row["no_verdict"] = len(getattr(run.judge, "no_verdict", ()))
        if step % c.eval_every == 0 or step == c.steps:
            row |= held_out_success(run, step)
            clock.lap("eval")
        row = dict.fromkeys(ROW) | row | clock.row()
        tokens = row["response_tokens"] * row["budget"]
        row["time_sampled_tokens_per_second"] = tokens / row["time_sample"]
        log(run.out, "metrics", row)
        who = {"ids": ids, "estimate": p.round(4).tolist(), "counts": counts.tolist()}
        log(run.out, "groups", {"step": step, **who, "successes": successes.tolist()})
        run.bar.write(describe(row, c.steps))
        run.bar.update()
        save_or_stop(run, row, stop, clock)
    finish(run)


# ---- 1. Which prompts ---------------------------------------------------------------------------------
# The M tasks of step 1, 2, ...: shuffled epochs, one after the other, the same for every allocator.
def batch_of(train_tasks: list, step: int, c: Config) -> list:
    per_epoch = len(train_tasks) // c.prompts  # steps
    epoch, k = divmod(step - 1, per_epoch)
    order = np.random.default_rng([c.seed, epoch]).permutation(len(train_tasks))
    return [train_tasks[i] for i in order[k * c.prompts : (k + 1) * c.prompts]]


# Everything random in a step follows from (seed, step), so a resumed run needs no generator.
def step_seed(seed: int, step: int) -> int:
    return seed * 1_000_003 + step


# ---- 2. What came of it -------------------------------------------------------------------------------
# What a step's rewards (R,) say. effective_rollouts and effective_prompts always stand together:
# moving rollouts into groups that end up mixed is not the same as having more mixed groups.
def step_metrics(rewards, group, rollouts) -> dict:
    by_group = [rewards[group == g] for g in np.unique(group)]  # M arrays
    n = np.array([len(r) for r in by_group])  # (M,)
    mean = np.array([r.mean() for r in by_group])  # (M,)
    mixed = np.array([r.max() > r.min() for r in by_group])  # (M,): these carry gradient
    return {
        "reward_mean": float(mean.mean()),  # over prompts: comparable between allocators
        "reward_rollouts": float(rewards.mean()),  # over rollouts: lower where hard prompts get more
        "effective_rollouts": float(n[mixed].sum() / n.sum()),
        "effective_prompts": float(mixed.mean()),
        "all_right": float((~mixed & (mean > 0.5)).mean()),
        "all_wrong": float((~mixed & (mean <= 0.5)).mean()),
        "n_largest": int(n.max()),
        "response_tokens": float(np.mean([len(r.response_ids) for r in rollouts])),
        "truncated": float(np.mean([not r.finished for r in rollouts])),
        # -log p of what was sampled: an unbiased estimate of the policy's entropy a token, in nats.
        "entropy": float(0 - np.mean(np.concatenate([r.logprobs for r in rollouts]))),
    }


# ---- 3. Around the update -----------------------------------------------------------------------------
class RunStopped(Exception):
    """The run cannot go on; the sentence says why and what to do."""


BLOWN_UP = "training has blown up: start again with a lower --lr, or from an earlier checkpoint"

# How far the sampler's log-probs may be from the trainer's, in nats, by where the model is. On a CPU both
# compute in float32, and the gap stays below 2e-5. On a GPU both compute in bfloat16: an engine in bfloat16
# beside a float32 trainer gave at most 0.05 (tests/bench/bench_rollout.py).
CANARY_BOUND = {"cpu": 1e-3, "cuda": 0.3}


# Mean |log-prob of the trainer - log-prob of the sampler| over four rollouts. It is rounding, unless
# the sampler's weights are stale: then it jumps to whole nats, and the run must stop.
def canary(model, rollouts, c: Config) -> float:
    import torch

    import grpo

    few = rollouts[:: max(1, len(rollouts) // 4)][:4]  # from all over the batch
    sampled = np.concatenate([r.logprobs for r in few])  # (tokens,)
    if not all(np.isfinite(r.logprobs).all() for r in rollouts):
        raise RunStopped(f"the model's log-probs are not finite; {BLOWN_UP}")
    with torch.no_grad():
        ours = grpo.token_logprobs(model, few, c.temperature).cpu().numpy()  # (tokens,)
    gap = float(np.abs(ours - sampled).mean())
    bound = CANARY_BOUND[model.device.type] / min(1, c.temperature)  # which magnifies rounding
    if not gap < bound:
        far = f"{gap:.3g} nats from the trainer's on average (bound {bound})"
        raise RunStopped(
            f"the sampler's log-probs are {far}: it samples from other weights. The last checkpoint is sound."
        )
    return gap


# ---- 5. What is logged --------------------------------------------------------------------------------
# Every row of metrics.jsonl has these, in this order, and null where there is nothing to say.
ROW = ("step", "reward_mean", "reward_rollouts", "effective_rollouts", "effective_prompts", "all_right",
       "all_wrong", "distinct_solved", "budget", "n_largest", "eval_success", "eval_success_se",
       "seconds")  # fmt: skip


def log(out: Path, name: str, row: dict) -> None:
    """Every row of a run goes through here; `name` is metrics, groups or samples. To send rows to
    TensorBoard or W&B too, add it here (tutorial/9_use_it_elsewhere.md has the lines)."""
    # NaN and infinity are no JSON: others could not read the file.
    if bad := [k for k, v in row.items() if isinstance(v, float) and not np.isfinite(v)]:
        raise RunStopped(f"{', '.join(bad)} at step {row['step']}: not finite; {BLOWN_UP}")
    with (out / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


# Mean success over the held-out problems, and its standard error. The seed is always the same: with
# the same random numbers, two evaluations differ by the model alone.
def held_out_success(run: Run, step: int) -> dict[str, float]:
    c, k = run.config, run.config.eval_samples
    run.sampler.temperature = c.eval_temperature
    right, rollouts = evaluate.evaluate(
        run.sampler, run.held_out, run.prompts, run.judge, k, step_seed(c.seed, 0)
    )  # right: (problems, k) of 0 and 1
    run.sampler.temperature = c.temperature
    # One problem is shown, with a right and a wrong answer if any problem has both.
    i = int((right.min(1) < right.max(1)).argmax())
    task, answers = run.held_out[i], [r.text for r in rollouts[i * k : (i + 1) * k]]
    sample = {"step": step, "id": task.id, "prompt": task.prompt, "answer": task.answer}
    sample["right"] = next((a for a, r in zip(answers, right[i], strict=True) if r), None)
    sample["wrong"] = next((a for a, r in zip(answers, right[i], strict=True) if not r), None)
    log(run.out, "samples", sample)
    ends = [f"{name}: {repr(sample[name])[-50:]}" for name in ("right", "wrong")]
    run.bar.write(f"held out: {task.prompt!r:.50}  {'  '.join(ends)}")
    return {"eval_success": float(right.mean()), "eval_success_se": evaluate.standard_error(right.mean(1))}


# One tidy line a step.
def describe(row: dict, steps: int) -> str:
    text = (
        f"step {row['step']:>{len(str(steps))}}/{steps}  reward {row['reward_mean']:.3f}  "
        f"effective rollouts {row['effective_rollouts']:.2f} prompts {row['effective_prompts']:.2f}  "
        f"largest {row['n_largest']:3d}  cut {row['truncated']:.2f}  entropy {row['entropy']:.2f}  "
        f"{row['time_sampled_tokens_per_second']:.0f} tok/s"
    )
    return text if row["eval_success"] is None else text + f"  held-out {row['eval_success']:.3f}"


class Clock(defaultdict):
    """Where the seconds of a step go: {"time_NAME": seconds}."""

    def __init__(self):
        import torch

        super().__init__(float)  # a stage that is new has taken 0.0 seconds
        self.gpu, self.last = torch.cuda.is_available() and torch.cuda, time.perf_counter()

    def lap(self, name: str) -> None:
        """Everything since the last lap was `name`."""
        if self.gpu:
            self.gpu.synchronize()  # until it is through with that
            # What all processes have in use. torch keeps what it has freed: this is the peak.
            free, total = self.gpu.mem_get_info()
            self["mem_peak_gib"] = max(self["mem_peak_gib"], (total - free) / 2**30)
        now = time.perf_counter()
        self[f"time_{name}"] += now - self.last
        self.last = now

    def row(self) -> dict:
        """The laps so far. What comes after, a save or a picture, counts towards the next row."""
        seconds = sum(v for k, v in self.items() if k.startswith("time_"))
        row = {"seconds": seconds, **self}
        self.clear()
        return {k: round(v, 4) for k, v in row.items()}


PATIENCE = 20  # steps without a gradient


# Why a run with these newest metrics rows should end, or None.
def hopeless(rows) -> str | None:
    if len(rows) >= 3 and all(r["steps_skipped"] and r["loss"] is None for r in rows[-3:]):
        return f"the loss or its gradient was not finite three steps in a row; {BLOWN_UP}"
    if len(rows) < PATIENCE or any(r["effective_rollouts"] for r in rows):
        return None  # there was a gradient
    right = np.mean([r["all_right"] for r in rows])
    advice = f"bring {'harder' if right > 0.5 else 'easier'} tasks, or raise --budget"
    shares = f"{right:.0%} all right and the rest all wrong"
    return f"for {PATIENCE} steps every group was silent, {shares}: nothing to learn from; {advice}"


STOPS = (signal.SIGINT, signal.SIGTERM)  # Ctrl-C, and a polite kill


# The first of them lets the step be finished and saved. A second one stops at once.
def asked_to_stop() -> list:
    asked: list[int] = []  # the signals that came
    ours = os.getpid()

    def ask(number, frame) -> None:
        if os.getpid() != ours:  # a process that a reward has forked ends as any other
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        if asked:  # whoever asks twice is in a hurry
            signal.signal(number, signal.SIG_DFL)
            raise KeyboardInterrupt
        asked.append(number)
        # Not print: the signal may have come in the middle of one.
        os.write(2, b"\nstopping after this step (again: at once)\n")

    for number in STOPS:
        signal.signal(number, ask)
    return asked


# Saves and draws when it is time; ends the run if it is hopeless, or if somebody asked for that.
def save_or_stop(run: Run, row: dict, stop: list, clock: Clock) -> None:
    c, step, success = run.config, row["step"], row["eval_success"]
    run.state["step"], run.recent = step, [*run.recent, row][-PATIENCE:]
    trouble = hopeless(run.recent)
    ending = step < c.steps and (bool(stop) or trouble)
    best = success is not None and success > run.state["best"][0]  # of equal ones the first
    if best:
        run.state["best"] = (success, step)
    if step % c.save_every == 0 or step == c.steps or best or ending:
        save_checkpoint(run)
        clock.lap("save")
        ending = ending or (step < c.steps and bool(stop))  # a signal may have come meanwhile
    if success is not None or ending:
        evaluate.draw_runs([run.out], run.out / "dashboard.png")
        clock.lap("draw")
    if ending and trouble:
        raise RunStopped(f"{trouble}; the weights are in {run.out}/checkpoint")
    if ending:
        run.bar.close()
        print(f"stopped after step {step}; go on with: python train.py --resume {shlex.quote(str(run.out))}")
        sys.exit(130)


# final/, and what came of it in a sentence.
def finish(run: Run) -> None:
    run.bar.close()
    with written_aside(run.out / "final") as part:
        run.model.save_pretrained(part)
        run.tokenizer.save_pretrained(part)
    last = run.recent[-1]
    print(f"held-out success {last['eval_success']:.3f} ± {last['eval_success_se']:.3f} after {last['step']} "
          f"steps; model in {run.out}/final, picture in {run.out}/dashboard.png")  # fmt: skip


# ---- Checkpoints --------------------------------------------------------------------------------------
# SHA256SUMS of everything in a folder, as the sha256sum command writes and checks it. (But for what
# file browsers and notebooks leave in any folder: .DS_Store, .ipynb_checkpoints.)
def checksums(folder: Path) -> str:
    lines = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.is_file() and str(name) != "SHA256SUMS" and not hidden:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            lines.append(f"{digest}  {name}\n")
    return "".join(lines)


# A folder to write into. It is renamed to `folder` once all of it is on the disk, so that a kill at
# any moment leaves either nothing under that name or all of it. OSError if a write fails.
@contextlib.contextmanager
def written_aside(folder: Path):
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        yield part
        (part / "SHA256SUMS").write_text(checksums(part))
        os.sync()  # before the name says that it is whole; the rows of the .jsonl files go with it
        part.rename(folder)
    except Exception as error:
        shutil.rmtree(part, ignore_errors=True)
        if "(os error" in str(error):  # safetensors and tokenizers raise kinds of their own
            raise OSError(str(error)) from error
        raise


# The name of a whole checkpoint. (A copy that somebody made has another.)
STEP = "step-" + 6 * "[0-9]"

# In a folder of its own: vLLM takes every *.safetensors beside a model's for weights.
MOMENTS = "optimizer/moments.safetensors"


# checkpoint/step-NNNNNN: the model, the optimizer, and the rest as JSON. No pickle: loading one
# cannot run code. No generator and no position in the data: both follow from (seed, step).
def save_checkpoint(run: Run) -> None:
    import torch
    from safetensors.torch import save_file

    step, best = run.state["step"], run.state["best"][1]
    if not all(bool(torch.isfinite(p).all()) for p in run.model.parameters()):
        raise RunStopped(f"the weights are not finite after step {step}: not saved; {BLOWN_UP}")
    folder = run.out / "checkpoint"
    with written_aside(folder / f"step-{step:06d}") as part:
        run.model.save_pretrained(part)
        run.tokenizer.save_pretrained(part)
        # AdamW's moments are tensors by parameter and name; safetensors takes a flat table. In 8 bits
        # a moment is three tensors: "7.exp_avg.codes", "7.exp_avg.scale" and "7.exp_avg.qmap".
        moments, groups = run.optimizer.state_dict().values()
        flat = {f"{i}.{name}": x.contiguous() for i, of in moments.items() for name, x in of.items()}
        for name in [name for name, x in flat.items() if hasattr(x, "codes")]:
            parts = vars(flat.pop(name)).items()
            flat |= {f"{name}.{of}": x for of, x in parts if torch.is_tensor(x)}
        (part / MOMENTS).parent.mkdir()
        save_file(flat, part / MOMENTS)
        state = run.state | {"tracker": run.tracker.state_dict(), "optimizer": groups}
        state["config"] = asdict(run.config)
        (part / "state.json").write_text(json.dumps(state, default=float))  # AdamW8bit's rate is a tensor
    # Only now do older ones go: all but the last two and the best.
    steps = sorted(folder.glob(STEP))
    broken = {path for path in folder.iterdir() if path.suffix in (".part", ".damaged")}
    for old in {*steps[:-2], *broken} - {folder / f"step-{best:06d}"}:
        shutil.rmtree(old)


# The newest whole checkpoint and its state; (None, {}) if nothing has happened yet. One that is damaged or
# was not written to its end is named, and put aside until the next one is saved.
def newest_checkpoint(out: Path) -> tuple[Path | None, dict]:
    found, broken, rows = None, [], out / "metrics.jsonl"
    folder = out / "checkpoint"
    for path in sorted([*folder.glob(STEP), *folder.glob(STEP + ".part")], reverse=True):
        sums = path / "SHA256SUMS"
        if not path.suffix and sums.is_file() and sums.read_bytes() == checksums(path).encode():
            found = path
            break
        broken.append(path)
    begun = rows.is_file() and rows.stat().st_size
    need(found or not begun, f"{out} has rows, but no whole checkpoint: it is left as it is; start a new run")
    for path in broken:
        print(f"{path.name} is damaged or half-written: going on from the checkpoint before")
        shutil.rmtree(path.with_suffix(".damaged"), ignore_errors=True)
        path.rename(path.with_suffix(".damaged"))
    return found, json.loads((found / "state.json").read_text()) if found else {}


# What save_checkpoint made flat, back in the optimizer.
def load_optimizer(optimizer, checkpoint: Path, groups: list) -> None:
    import torch
    from safetensors.torch import load_file

    moments: dict[int, dict] = defaultdict(dict)
    flat = load_file(checkpoint / MOMENTS)
    for name in [name for name in flat if name.endswith(".codes")]:
        from torchao.optim.subclass_8bit import OptimState8bit

        name = name.removesuffix(".codes")
        parts = [flat.pop(f"{name}.{of}") for of in OptimState8bit.tensor_attrs]
        flat[name] = OptimState8bit(*parts, signed=bool(parts[2].min() < 0), dtype=torch.float32)
    for name, tensor in flat.items():
        i, _, of = name.partition(".")  # "7.exp_avg": of parameter 7
        moments[int(i)][of] = tensor
    optimizer.load_state_dict({"state": dict(moments), "param_groups": groups})


# The run's rows without the steps after `last`, which will be done again (0: all of them, the untouched
# model's too). Returns the newest metrics rows that are left.
def cut_back(out: Path, last: int) -> list[dict]:
    for name, first in (("samples", None), ("groups", 1), ("metrics", 0)):
        path = out / f"{name}.jsonl"
        path.touch()  # a run that is new has none yet
        rows = [r for r in evaluate.each_row(path) if r["step"] <= last and last > 0]
        expected = range(first or 0, last + 1) if last else []
        whole = first is None or [r["step"] for r in rows] == list(expected)
        need(whole, f"{path} lacks steps before the checkpoint: put it back, or start a new run")
        with path.open("r+b") as file:  # the rows that stay are not written again
            file.truncate(sum(len(file.readline()) for _ in rows))
    return rows[1:][-PATIENCE:]  # metrics, without the untouched model's


# ---- Before the loop: what can be wrong is said in one line, before it costs anything ------------------
def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


# Settings that are more than a word or a number. A path that exists is stored as an absolute one.
READ = {"model": evaluate.path_or_name, "tasks": evaluate.path_or_name}
READ |= {"reward": evaluate.reward_name, "chat_template_kwargs": evaluate.json_object}


# The command line -> (what was given, all arguments). Bad words are a ValueError.
def parse_args(argv=None) -> tuple[dict, argparse.Namespace]:
    defaults = "Defaults stand in brackets: those of --model tiny | those of any other --model."
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=defaults, formatter_class=raw, allow_abbrev=False
    )
    parser.error = lambda message: need(False, message)  # one line, as all errors here
    add = parser.add_argument
    for f in dataclasses.fields(Config):
        tiny, large, text = f.metadata["tiny"], f.metadata["large"], f.metadata["help"]
        # What is not on the command line is not in `args`: that tells it from a default.
        if isinstance(tiny, bool):
            add(flag(f.name), action="store_true", default=argparse.SUPPRESS, help=text)
            continue
        if tiny != "":  # which says nothing
            text += f" [{tiny}]" if tiny == large else f" [{tiny} | {large}]"
        add(flag(f.name), type=READ.get(f.name, type(tiny)), default=argparse.SUPPRESS, help=text)
    path = evaluate.file_path
    add("--out", type=path, help="run folder [runs/MODEL-ALLOCATOR-seedSEED]")
    goes_on = "go on with that run: more --steps, less memory, moved --tasks"
    add("--resume", type=path, metavar="DIR", help=goes_on)
    add("--compare", type=path, nargs="+", metavar="RUN", help="draw runs on one picture, --out PNG")
    args = parser.parse_args(argv)
    return {f.name: getattr(args, f.name) for f in dataclasses.fields(Config) if f.name in args}, args


# All settings of a new run: the defaults are those of the model that was asked for.
def settings(given: dict) -> Config:
    column = "tiny" if given.get("model", "tiny") == "tiny" else "large"
    values = {f.name: f.metadata[column] for f in dataclasses.fields(Config)} | given
    if values["instruction"] is None:
        values["instruction"] = evaluate.default_instruction(values["tasks"])
    return Config(**values)


# ValueError for settings that cannot work.
def check(c: Config) -> None:
    for f in dataclasses.fields(c):
        value, (low, high) = getattr(c, f.name), f.metadata["range"]
        inside = type(value) not in (int, float) or low <= value <= high  # NaN is not
        need(inside, f"{flag(f.name)} {value}: must lie between {low} and {high}")
    known = {"allocator": [*ALLOCATORS], "engine": ["auto", "vllm", "hf"]}
    for name, words in (known | {"optimizer": ["adamw", "adamw8bit"]}).items():
        value = getattr(c, name)
        need(value in words, f"{flag(name)} {value}: choose from {', '.join(words)}")
    if c.optimizer == "adamw8bit":
        need(find_spec("torchao"), "--optimizer adamw8bit: `pip install torchao==0.18.0` first")
        # Its step is compiled, for a GPU too.
        header = Path(sysconfig.get_path("include"), "Python.h").is_file()
        ready = header and shutil.which(os.environ.get("CXX", "g++"))
        need(ready, "--optimizer adamw8bit: install g++ and Python's headers (python3-dev) first")
    need(c.n_min <= c.n_max, f"--n-min {c.n_min} is above --n-max {c.n_max}")
    need(not 0 < c.limit < c.prompts, f"--limit {c.limit} is below --prompts {c.prompts}")
    low, high = c.prompts * c.n_min, c.prompts * c.n_max
    advice = "raise --budget, or lower --n-min" if c.budget < low else "lower --budget, or raise --n-max"
    limits = f"between {c.prompts} prompts x n_min {c.n_min} = {low} and x n_max {c.n_max} = {high}"
    need(low <= c.budget <= high, f"--budget {c.budget} is not {limits}: {advice} or change --prompts")


# (training, held out), after all that can be checked without a model.
def prepare(c: Config) -> tuple[list, list]:
    check(c)
    tasks = reward.load_tasks(c.tasks, answers=not c.reward)  # an own reward may need none
    n_held_out = c.held_out or min(256, len(tasks) // 5)  # more would cost time at each evaluation
    few = f"{len(tasks)} tasks are too few for {c.prompts} prompts and {n_held_out} held out: lower those"
    need(0 < n_held_out <= len(tasks) - c.prompts, f"--tasks {c.tasks}: {few}, or bring more tasks")
    # One split and one choice for every seed, so that seeds differ by their training alone.
    train_tasks, held_out = reward.split_held_out(tasks, n_held_out, seed=0)
    chosen = np.random.default_rng(0).permutation(len(train_tasks))[: c.limit or None]
    limited = f" (--limit {c.limit})" if len(chosen) < len(train_tasks) else ""
    print(f"{len(tasks):,} tasks: {len(chosen):,} to train on{limited}, {len(held_out)} held out")
    return [train_tasks[i] for i in sorted(chosen)], held_out  # sorted: the file's order


# The settings of a run. One that is newer than the run takes the embedded model's default, which
# leaves things as they were before there was such a setting.
def read_config(out: Path) -> Config:
    path = out / "config.json"
    need(path.is_file(), f"{out}: no config.json there, so no run")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        need(isinstance(stored, dict), "it holds no table of settings")
        need("model_type" not in stored, "a model and no run; --resume the run's own folder")
        flags = [flag(k) if v is True else f"{flag(k)}={v}" for k, v in stored.items() if v is not False]
        return Config(**parse_args(flags)[0])  # names and types as on a command line
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_config(out: Path, c: Config) -> None:
    text = json.dumps(asdict(c), indent=2) + "\n"
    evaluate.replace_file(out / "config.json", lambda part: part.write_text(text))


# A folder for a new run: the one asked for, if it is empty, or the next free name under runs/.
def new_folder(c: Config, wanted: Path | None) -> Path:
    name = f"{Path(c.model).name}-{c.allocator}-seed{c.seed}"
    names = [name, *(f"{name}-{k}" for k in range(2, 10_000))]
    for out in [wanted] if wanted else [Path("runs") / n for n in names]:
        try:
            out.mkdir(parents=True)  # of two processes at the same moment, one makes it
            return out
        except FileExistsError:
            if wanted:
                empty = out.is_dir() and {path.name for path in out.iterdir()} <= {"lock"}
                need(empty, f"--out {out} is not an empty folder: choose another, or --resume it")
                return out
    raise ValueError(f"runs/{name} and all its numbers are taken: choose a folder with --out")


# One process a run folder, as long as the returned file is open. The file is never replaced. (lockf: the
# processes that a reward has forked do not hold it when this one is killed.)
def lock(out: Path):
    file = (out / "lock").open("a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{out}: another train.py is at work on this run: wait, or stop it") from error
    return file


# What a checkpoint says of a run besides its model, when nothing has happened yet. The tasks are hashed,
# and one's own reward: its name, its file (not what it imports), and the tasks' other columns, which it
# sees. A run goes on with those that it began with, or not at all.
def first_state(c: Config, train_tasks, held_out) -> dict:
    tasks, own = train_tasks + held_out, ""
    if c.reward:
        code = evaluate.reward_file(c.reward).read_text(errors="replace")
        own = evaluate.short_hash(c.reward.rpartition(":")[2], code, *(repr(t.extra) for t in tasks))
    tasks = hashlib.sha256((repr(tasks) + own).encode()).hexdigest()
    return {"tasks": tasks, "step": 0, "best": (-1.0, 0)}  # step: the last one done; best: success, step


# A new run, in a folder of its own.
def open_new(c: Config, wanted: Path | None) -> Run:
    rollout.resolve_model(c.model)  # an unknown name is said before anything is made
    tasks, ours = prepare(c), not (wanted and wanted.exists())
    out = new_folder(c, wanted)
    locked = lock(out)
    try:
        save_config(out, c)
        return set_up(c, out, locked, *tasks, None, first_state(c, *tasks))
    except BaseException:  # a run that never began leaves nothing behind
        for path in out.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if ours:  # the folder itself may be the user's
            out.rmdir()
        raise


# What may change when a run goes on, besides more steps. The first three change nothing but the rounding;
# the others may lie elsewhere now, and what they hold is compared.
MAY_CHANGE = ("tokens_per_microbatch", "checkpointing", "gpu_memory", "tasks", "reward")


# The run to resume, from its newest whole checkpoint; None if it is finished.
def open_old(given: dict, args) -> Run | None:
    out, c = args.resume, read_config(args.resume)
    need(args.out in (None, out), "--resume goes on in its own folder: drop --out")
    trusted = given.get("trust_remote_code") or not c.trust_remote_code
    need(trusted, f"--resume {out} would run the model's code: add --trust-remote-code if you do")
    longer = given.get("steps", 0) > c.steps
    changed = {k: v for k, v in given.items() if k in MAY_CHANGE or (k == "steps" and longer)}
    now = dataclasses.replace(c, **changed)
    other = [f"{flag(k)} {getattr(c, k)} (not {v})" for k, v in given.items() if v != getattr(now, k)]
    need(not other, f"--resume {out}: the run has {', '.join(other)}: drop that, or start a new run")
    if (out / "final").is_dir() and not longer:
        print(f"{out} is finished: nothing to resume; --steps above {c.steps} goes on with it")
        return None
    tasks = prepare(now)
    locked, state = lock(out), first_state(now, *tasks)
    checkpoint, saved = newest_checkpoint(out)
    same = saved.get("tasks") in (None, state["tasks"])
    either = f"--tasks {now.tasks}" + (f" or --reward {now.reward}" if now.reward else "")
    need(same, f"{either} has changed since {checkpoint}: put it back")
    # Edited by hand, it would not be the same run any more. (Older runs hold relative paths.)
    was = {k: READ.get(k, lambda text: text)(v) for k, v in saved.pop("config", {}).items()}
    edited = [flag(k) for k, v in was.items() if v != getattr(c, k, v) and k not in {"steps", *MAY_CHANGE}]
    need(not edited, f"{out}/config.json has changed: {', '.join(edited)}: put it back")
    run = set_up(now, out, locked, *tasks, checkpoint, state | saved)
    if longer:
        shutil.rmtree(out / "final", ignore_errors=True)  # first: config.json then says why
    if changed:
        save_config(out, now)
    return run


# Loads what takes seconds, and finds everything that can be wrong with it: a ValueError each.
def set_up(c: Config, out: Path, locked, train_tasks, held_out, checkpoint: Path | None, state: dict) -> Run:
    # Ragged batches leave holes of all sizes in a GPU's memory. torch reads this at its first use.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch

    import grpo

    judge = evaluate.judge_of(c.reward, c.instruction)
    engine, why = rollout.choose_engine(c.engine)
    print(f"sampling with {engine} ({why}); writing to {out}", flush=True)
    # A checkpoint holds the whole model: the one that the run began with is not needed any more.
    path = str(checkpoint or rollout.resolve_model(c.model))
    if rollout.device() == "cuda" and c.model != "tiny":
        # By arithmetic, and before the weights are loaded: does it fit, and which flags would help?
        from tutorial.gpu_memory import report

        report(c, engine, path, *torch.cuda.mem_get_info())
    model, tokenizer = rollout.load_model(path, c.trust_remote_code)
    words = (c.instruction, c.chat, json.loads(c.chat_template_kwargs))
    prompts = rollout.encode_tasks(tokenizer, train_tasks + held_out, *words)
    train_tasks, held_out = usable(c, train_tasks, held_out, prompts)
    longest = check_model(c, out, model, [prompts[t.id] for t in train_tasks + held_out])
    grpo.check_logprobs(model, c.temperature)
    print(f"first prompt: {tokenizer.decode(prompts[train_tasks[0].id])!r}")
    if hint := rollout.prompt_hint(tokenizer, model.config, c.chat):
        print(hint)

    limits = (c.max_new_tokens, c.temperature)
    if engine == "vllm":  # before the model moves to the GPU: the engine measures how much is free
        more = {"gpu_memory": c.gpu_memory, "trust_remote_code": c.trust_remote_code}
        with rollout.loading(path):
            sampler = rollout.VLLMSampler(path, tokenizer, *limits, longest, **more)
    else:
        sampler = rollout.HFSampler(model, tokenizer, *limits)
    model.to(rollout.device())
    sampler.sync(model)
    optimizer = make_optimizer(c.optimizer, model, c.lr)
    tracker = knapsack.SuccessTracker()  # discount, prior_strength and drift are chosen here
    if checkpoint:
        load_optimizer(optimizer, checkpoint, state.pop("optimizer"))
        tracker.load_state_dict(state.pop("tracker"))
        print(f"resuming after step {state['step']}")
    recent = cut_back(out, state["step"])
    run = Run(c, out, train_tasks, held_out, prompts, judge, model, tokenizer, sampler, optimizer,
              tracker, state, recent, locked)  # fmt: skip
    if not checkpoint:
        save_checkpoint(run)  # what can stop a save stops it here, and not after hours
    return run


# AdamW without decay; adamw8bit keeps its two moments in 2 bytes a weight instead of 8.
def make_optimizer(name: str, model, lr: float):
    import torch

    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0)
    from torchao.optim import AdamW8bit

    def as_tensor(optimizer, *_) -> None:  # its compiled step takes no number for a rate
        group = optimizer.param_groups[0]
        group["lr"] = torch.as_tensor(group["lr"], dtype=torch.float32)

    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")  # is for torchao's own developers
    optimizer = AdamW8bit(model.parameters(), lr=lr, weight_decay=0.0)
    optimizer.register_step_pre_hook(as_tensor)
    return optimizer


# The tasks without those whose prompt is too long, and in whole batches, so that after the first epoch
# every prompt has been seen. Says what a run on them will be like.
def usable(c: Config, train_tasks, held_out, prompts) -> tuple[list, list]:
    fits = {i for i, ids in prompts.items() if len(ids) <= c.max_prompt_tokens}
    train_tasks, held_out = ([t for t in of if t.id in fits] for of in (train_tasks, held_out))
    if len(fits) < len(prompts):
        long = f"{len(prompts) - len(fits)} tasks have prompts of more than {c.max_prompt_tokens} tokens"
        print(f"{long} and are left out; --max-prompt-tokens takes them in")
    per_epoch, left_over = divmod(len(train_tasks), c.prompts)
    few = f"{len(train_tasks)} tasks to train on and {len(held_out)} held out have prompts that fit"
    need(per_epoch and held_out, f"{few}, too few: raise --max-prompt-tokens")
    if left_over:
        print(f"{left_over} training tasks do not fill a batch of {c.prompts} and are left out")
    visits, used = c.steps / per_epoch, per_epoch * c.prompts
    # Before a prompt's second visit, nothing tells it from the others.
    acts = f"the allocator acts from step {per_epoch + 1} on" if visits > 1 else "the allocator never acts"
    print(f"{used:,} problems, each met about {visits:.1f} times: {acts}")
    if visits < 2:
        print("warning: fewer than two visits a problem: lower --limit, or raise --steps")
    return train_tasks[:used], held_out


# What a model must have for these prompts and settings. Returns the longest prompt's tokens.
def check_model(c: Config, out: Path, model, prompts: list) -> int:
    longest, highest = max(map(len, prompts)), max(map(max, prompts))
    known, context = model.get_input_embeddings().num_embeddings, rollout.context_length(model.config)
    need(highest < known, f"--model {c.model}: its tokenizer says {highest}, its weights know {known} tokens")
    both = f"a prompt of {longest} tokens and --max-new-tokens {c.max_new_tokens}"
    fits = longest + c.max_new_tokens <= context
    need(fits, f"{both} exceed the model's context of {context}: lower them")
    layers = any(hasattr(m, "_can_checkpoint_with_cache") for m in model.modules())
    need(layers or not c.checkpointing, f"--model {c.model} cannot do --checkpointing: drop it")
    # A checkpoint holds weights and two moments. At most four stand at once: the best, the last two, and a
    # new one, which is whole before an old one goes. final/, weights alone, stands beside three at most.
    most = min(4, -(-c.steps // c.save_every) + -(-c.steps // c.eval_every))
    moments = 2 if c.optimizer == "adamw" else 0.6  # 8 bits and their scales, of a weight's 32
    size = ((1 + moments) * most + (most < 4)) * sum(p.nbytes for p in model.parameters())
    free = shutil.disk_usage(out).free + sum(f.stat().st_size for f in out.rglob("*"))
    need(free >= size, f"--out {out}: the run needs {size / 1e9:.2g} GB of disk: make room there first")
    return longest


# ---- The entry point ----------------------------------------------------------------------------------
def main(argv=None) -> None:
    warnings.simplefilter("ignore", FutureWarning)  # what libraries tell their own developers
    warnings.formatwarning = lambda message, *_, **__: f"train.py: {message}\n"
    try:
        given, args = parse_args(argv)
        if args.compare:
            alone = not (given or args.resume)
            need(alone, "--compare draws what exists: give only --out with it")
            evaluate.draw_runs(args.compare, args.out or Path("compare.png"))
            print(f"drew {args.out or 'compare.png'}")
            return
        run = open_old(given, args) if args.resume else open_new(settings(given), args.out)
    except (ValueError, OSError) as error:
        sys.exit(f"train.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted while loading")
    except RuntimeError as error:
        sys.exit(out_of_memory(error, "start again"))
    if run is None:
        return
    go_on = f"python train.py --resume {shlex.quote(str(run.out))}"
    kept = {number: signal.getsignal(number) for number in STOPS}
    try:
        with contextlib.closing(run):
            try:
                train(run)
            except BaseException as error:
                # What the update held goes first: an engine that sleeps wakes up to be closed.
                traceback.clear_frames(error.__traceback__)
                raise
    except KeyboardInterrupt:
        sys.exit(f"interrupted; go on with: {go_on}")
    except OSError as error:
        why = f"a write failed ({error}); the last checkpoint is whole"
        sys.exit(f"train.py: stopped: {why}: make room, or mend what failed, then {go_on}")
    except (RunStopped, reward.BadReward) as error:
        sys.exit(f"train.py: stopped: {error}")
    except RuntimeError as error:
        sys.exit(out_of_memory(error, go_on))
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


# The line for a full GPU; torch and vLLM have errors of their own for it. Any other error is raised again,
# a reward's too, which may have a card or a container of its own.
def out_of_memory(error: RuntimeError, then: str) -> str:
    if "out of memory" not in str(error) or str(error).startswith("reward "):
        raise error
    less = "a lower --tokens-per-microbatch or --gpu-memory, or --checkpointing"
    return (
        f"train.py: stopped: out of GPU memory: {then} with {less}; a new run may have --optimizer adamw8bit"
    )


if __name__ == "__main__":
    main()
