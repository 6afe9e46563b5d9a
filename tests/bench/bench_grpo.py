"""How fast grpo.update is: against TRL's GRPOTrainer doing the same update, and by itself.

TRL wants a virtual environment of its own; everything runs in that one (grpo.py needs no more than it):

    python3 -m venv .venv-trl          # without a GPU: first torch 2.13.0 from pytorch.org's CPU wheels
    .venv-trl/bin/pip install torch==2.13.0 'transformers>=5.16.1,<5.20' trl==1.16.0 accelerate datasets
    OMP_NUM_THREADS=2 .venv-trl/bin/python tests/bench/bench_grpo.py [--smollm2 FOLDER] [--out FILE.json]

Where TRL is not installed its columns stay empty. FOLDER is what tutorial/get_smollm2.py writes. One run on
two cores, the embedded model and SmolLM2's first batch, is kept in tutorial/results/bench_grpo.json.

What is timed: one optimizer step on one batch of rollouts (log-probs, loss, backward, clipping, AdamW), in
float32, from the same weights, token ids and advantages; no KL; a learning rate of 0, so that every
repetition starts from the same weights. On TRL's side it is `trainer.train()` from its own on_step_begin
to its on_step_end, with rollouts handed in where it would have generated them; gradient checkpointing and
bfloat16, its defaults for GPUs, are off; its microbatches have the size that was fastest here. Both
gradient norms are printed: they agree, or the comparison is worthless. What TRL computes does not depend
on the advantages, so its seconds at a silent share of 0 stand for the other shares too (on the embedded
model one TRL step checks the norm there as well).

Tokens/s: the batch's response tokens over seconds, for both sides; what was skipped counts as done. The
two sides alternate; medians. Share of the peak: 6 x weights x tokens floating-point operations, over the
prompts (once a group) and responses that carry gradient, head at response tokens only, neither
padding nor attention counted; a second; over what torch.mm reaches on the same threads.

Last: the peak memory of the log-prob path at a vocabulary of 151,936, each way in a process of its own.
"""

import argparse
import copy
import importlib.util
import json
import logging
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import grpo
from rollout import Rollout

ROOT = Path(__file__).resolve().parents[2]
LR = 0.0

# ------------------------------------------------------------------------------------- the batches


def tiny_rollouts(model, tokenizer, prompts: int, n: int, seed: int = 0):
    """What a training step of the embedded model sees: its own rollouts of its own tasks."""
    from reward import load_tasks
    from rollout import HFSampler

    ids = [tokenizer(t.prompt)["input_ids"] for t in load_tasks("arithmetic")[:prompts]]
    return HFSampler(model, tokenizer, 40).sample(ids, np.full(prompts, n), seed)


def made_rollouts(model, prompts: int, n: int, P: int, length, seed: int = 0):
    """Random tokens after prompts of P; length(rng) draws a response's length."""
    rng = np.random.default_rng(seed)
    V, rollouts = model.config.vocab_size, []
    for group in range(prompts):
        prompt = tuple(rng.integers(V, size=P).tolist())
        for _ in range(n):
            ids = tuple(rng.integers(V, size=length(rng)).tolist())
            rollouts.append(Rollout(group, prompt, ids, (0.0,) * len(ids), ""))
    # The sampler's log-probs are the trainer's: importance weights of 1, as TRL has them without vLLM.
    known = {}
    with torch.no_grad():
        for rows in grpo.microbatches(rollouts, np.arange(len(rollouts)), 1024):
            flat = iter(grpo.token_logprobs(model, [rollouts[i] for i in rows]).tolist())
            known |= {i: tuple(next(flat) for _ in rollouts[i].response_ids) for i in rows}
    return [Rollout(r.group, r.prompt_ids, r.response_ids, known[i], "") for i, r in enumerate(rollouts)]


def outcomes(rollouts, silent: float, seed: int = 0) -> np.ndarray:
    """Advantages (R,) of binary rewards; the first share of the groups is silent, the others are mixed."""
    group = np.array([r.group for r in rollouts])
    rewards = np.random.default_rng(seed).integers(0, 2, size=len(group)).astype(float)
    for g in np.unique(group):
        mine = np.flatnonzero(group == g)
        rewards[mine[0]], rewards[mine[-1]] = 1, 0  # mixed
        if g < silent * len(np.unique(group)):
            rewards[mine] = 0
    return grpo.group_advantages(rewards, group)


# --------------------------------------------------------------------------------------- two sides


class Ours:
    def __init__(self, model, tokens_per_microbatch):
        self.model, self.tokens = copy.deepcopy(model), tokens_per_microbatch
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0)

    def step(self, rollouts, advantages) -> tuple[float, float]:
        """(seconds, gradient norm)"""
        start = time.perf_counter()
        stats = grpo.update(
            self.model, self.optimizer, rollouts, advantages, tokens_per_microbatch=self.tokens
        )
        return time.perf_counter() - start, stats["grad_norm"]


class Trl:
    """GRPOTrainer on rollouts that are given: only its generation and scoring are replaced."""

    def __init__(self, model, tokenizer, rows_per_microbatch):
        self.model, self.tokenizer, self.rows = copy.deepcopy(model), tokenizer, rows_per_microbatch
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.0)

    def step(self, rollouts, advantages) -> tuple[float, float]:
        """(seconds, gradient norm) of one optimizer step."""
        from datasets import Dataset
        from transformers import TrainerCallback
        from trl import GRPOConfig, GRPOTrainer

        R, clock = len(rollouts), {}
        n = R // len({r.group for r in rollouts})
        batch = self.tensors(rollouts, advantages)

        class Given(GRPOTrainer):
            def _generate_and_score_completions(self, inputs):
                return dict(batch)

        class Clock(TrainerCallback):
            def on_step_begin(self, *_, **__):
                clock["start"] = time.perf_counter()

            def on_step_end(self, *_, **__):
                clock["end"] = time.perf_counter()

            def on_log(self, _args, _state, _control, logs=None, **__):
                clock.setdefault("norm", logs.get("grad_norm"))

        with tempfile.TemporaryDirectory() as out:
            args = GRPOConfig(
                output_dir=out, per_device_train_batch_size=self.rows,
                gradient_accumulation_steps=R // self.rows, num_generations=n, max_steps=1,
                max_completion_length=batch["completion_ids"].shape[1],
                loss_type="dapo", beta=0.0, epsilon=0.2, epsilon_high=0.28, max_grad_norm=1.0,
                learning_rate=LR, lr_scheduler_type="constant", bf16=False, gradient_checkpointing=False,
                use_cpu=not torch.cuda.is_available(), report_to="none", save_strategy="no",
                logging_steps=1, disable_tqdm=True, dataloader_pin_memory=False,
            )  # fmt: skip
            trainer = Given(
                self.model, lambda completions, **_: [0.0] * len(completions), args,
                Dataset.from_dict({"prompt": ["a"] * (R // n)}), processing_class=self.tokenizer,
                callbacks=[Clock()], optimizers=(self.optimizer, None),
            )  # fmt: skip
            trainer.train()
        return clock["end"] - clock["start"], clock["norm"]

    def tensors(self, rollouts, advantages) -> dict:
        """Prompts padded on the left, responses on the right, as TRL does it."""
        R = len(rollouts)
        P, T = max(len(r.prompt_ids) for r in rollouts), max(len(r.response_ids) for r in rollouts)
        prompt, prompt_mask = torch.zeros(2, R, P, dtype=torch.long)
        ids, mask = torch.zeros(2, R, T, dtype=torch.long)
        for i, r in enumerate(rollouts):
            p, t = len(r.prompt_ids), len(r.response_ids)
            prompt[i, P - p :], prompt_mask[i, P - p :] = torch.tensor(r.prompt_ids), 1
            ids[i, :t], mask[i, :t] = torch.tensor(r.response_ids), 1
        return {
            "prompt_ids": prompt, "prompt_mask": prompt_mask, "completion_ids": ids, "completion_mask": mask,
            "advantages": torch.tensor(advantages, dtype=torch.float32), "num_items_in_batch": mask.sum(),
        }  # fmt: skip


# ------------------------------------------------------------------------------------ the figures


def matmul_peak(n: int = 2048, repeats: int = 7) -> float:
    """Floating-point operations a second of torch.mm in float32, the best of a few."""
    a, b, seconds = torch.randn(n, n), torch.randn(n, n), []
    for _ in range(repeats):
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def work(model, rollouts, advantages) -> float:
    """Floating-point operations the update cannot do without: see the top of this file."""
    live = [r for r, a in zip(rollouts, advantages, strict=True) if a != 0]
    prompts = sum({r.group: len(r.prompt_ids) for r in live}.values())
    responses = sum(len(r.response_ids) for r in live)
    head = model.get_output_embeddings().weight.numel()
    tied = model.config.tie_word_embeddings
    embeddings = head if tied else 2 * head  # the input's are looked up, not multiplied
    body = sum(p.numel() for p in model.parameters()) - embeddings
    return 6.0 * (body * (prompts + responses) + head * responses)


def compare(name, model, tokenizer, batch_of, shares, threads, args, tokens, rows) -> list[dict]:
    """One row for each silent share; batch_of(share) -> (rollouts, advantages)."""
    torch.set_num_threads(threads)
    peak, ours = matmul_peak(), Ours(model, tokens)
    trl = Trl(model, tokenizer, rows) if importlib.util.find_spec("trl") else None
    found, trl_seconds = [], []
    for share in shares:
        rollouts, advantages = batch_of(share)
        N = sum(len(r.response_ids) for r in rollouts)
        _, norm = ours.step(rollouts, advantages)  # warms up
        trl_norm, seconds = None, []
        if trl and (share == 0 or name.startswith("embedded")):
            _, trl_norm = trl.step(rollouts, advantages)  # warms up too
        for _ in range(args.repeats):
            seconds.append(ours.step(rollouts, advantages)[0])
            if trl and share == 0:
                trl_seconds.append(trl.step(rollouts, advantages)[0])
        mine = statistics.median(seconds)
        row = {
            "batch": name, "threads": threads, "silent": share, "response_tokens": N,
            "tokens_per_second": N / mine, "trl_tokens_per_second": None, "ratio": None,
            "peak_share": work(model, rollouts, advantages) / mine / peak, "peak_gflops": peak / 1e9,
            "grad_norm": norm, "trl_grad_norm": trl_norm,
        }  # fmt: skip
        if trl_seconds:
            theirs = statistics.median(trl_seconds)
            row |= {"trl_tokens_per_second": N / theirs, "ratio": theirs / mine}
        cells = [f"{row[k]:.4g}" if isinstance(row[k], float) else str(row[k]) for k in row]
        print("| " + " | ".join(cells) + " |", flush=True)
        found.append(row)
    return found


def head_memory(way: str, tokens: int = 4096, hidden: int = 1536, V: int = 151_936) -> float:
    """GB of peak memory that log-probs and their backward pass need beyond weights and their gradient."""
    head = torch.nn.Linear(hidden, V, bias=False)
    head.weight.grad = torch.ones_like(head.weight)
    h = torch.randn(tokens, hidden, requires_grad=True)
    targets = torch.randint(V, (tokens,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if way == "chunks":
        logp = grpo._head(head, h, targets, 1.0)
    else:
        logp = head(h).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    logp.sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", type=Path, metavar="FOLDER")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3, help="of each side, for the median")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--memory", choices=["chunks", "whole"], help="only this measurement")
    args = parser.parse_args()
    if args.memory:
        print(head_memory(args.memory))
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    result = {"torch": torch.__version__, "rows": []}

    def load(path):
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), AutoTokenizer.from_pretrained(
            path
        )

    def record(rows) -> None:
        result["rows"] += rows
        if args.out:
            args.out.write_text(json.dumps(result, indent=1) + "\n")

    print(
        "| batch | threads | silent | tokens | tokens/s | TRL's | ratio | of peak | GFLOP/s | norm | TRL's |"
    )
    print("|" + "---|" * 11)
    model, tokenizer = load(ROOT / "tutorial" / "tiny_model")
    rollouts = tiny_rollouts(model, tokenizer, 64, 8)
    for threads in args.threads:
        batch_of = lambda share: (rollouts, outcomes(rollouts, share))  # noqa: E731
        record(
            compare(
                "embedded, 64 x 8", model, tokenizer, batch_of, (0, 0.5, 0.6, 0.8), threads, args, 2048, 64
            )
        )
    if args.smollm2:
        model, tokenizer = load(args.smollm2)
        few, longer = (
            (lambda rng: rng.integers(3, 7)),
            (lambda rng: int(min(64, 24 * rng.lognormal(0, 0.5))) + 1),
        )
        for name, M, n, length, shares in [
            ("SmolLM2, few-shot, 16 x 8", 16, 8, few, (0, 0.6)),
            ("SmolLM2, few-shot, 8 x 16", 8, 16, few, (0, 0.6)),
            ("SmolLM2, longer answers, 16 x 8", 16, 8, longer, (0, 0.6)),
        ]:
            made = made_rollouts(model, M, n, 45, length)
            for threads in args.threads:
                batch_of = lambda share: (made, outcomes(made, share))  # noqa: B023, E731
                record(compare(name, model, tokenizer, batch_of, shares, threads, args, 2048, 16))
    for way in ("whole", "chunks"):
        run = [sys.executable, __file__, "--memory", way]
        peak = float(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
        print(f"log-probs of 4096 tokens, vocabulary 151,936, {way}: {peak:.2f} GB at the peak")
        result[f"memory_gb_{way}"] = peak
    record([])


if __name__ == "__main__":
    main()
