"""Evaluate a model on tasks: avg@k and pass@k over k sampled answers a problem, with error bars.

    python evaluate.py --model tiny --tasks arithmetic --held-out 256 --temperature 1
    python evaluate.py --model RUN/final --tasks arithmetic --held-out 256 --temperature 1

--held-out 256 takes the problems that a training run of the same tasks held out (and did not train on).

avg@k is the mean success of k samples (the paper's metric, k = 16, temperature 0.6); pass@k is the
chance that at least one of k samples is right. Standard errors are over problems: a bootstrap of the
problems, because two samples of one problem are not two problems.
"""

from __future__ import annotations

import argparse
import json
import sys
from logging import getLogger
from pathlib import Path

import numpy as np

from reward import HUB, Task, Verifier, load_tasks, split_held_out

TINY = Path(__file__).resolve().parent / "tutorial" / "tiny_model"
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."


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


def load_model(path: str, trust_remote_code: bool = False):
    """(model, tokenizer), in float32 and still on the CPU. ValueError in one line if it fails."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    getLogger("huggingface_hub").setLevel("ERROR")  # without a network it logs each retry
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise ValueError(f"--model {path}: cannot be loaded ({reason})") from error
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


def bootstrap_se(per_problem: np.ndarray, draws: int = 1000, seed: int = 0) -> float:
    """Standard error of a mean over problems, (M,) -> float, by resampling the problems."""
    rng = np.random.default_rng(seed)
    picks = rng.integers(len(per_problem), size=(draws, len(per_problem)))
    return float(per_problem[picks].mean(1).std(ddof=1))


def evaluate(sampler, tasks: list[Task], prompts: dict, verifier: Verifier, samples: int, seed: int):
    """Sample every task `samples` times -> (right (M, samples) of 0/1, rollouts of all of them)."""
    rollouts = sampler.sample([prompts[t.id] for t in tasks], [samples] * len(tasks), seed)
    answers = [tasks[r.group].answer for r in rollouts]
    right = verifier.score_many([r.text for r in rollouts], answers)
    return right.reshape(len(tasks), samples), rollouts


# --------------------------------------------------------------------------------- command line


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="tiny, a folder, or a hub id (tiny)")
    parser.add_argument("--tasks", default="arithmetic", help="arithmetic, a file, or a hub name")
    parser.add_argument("--samples", type=int, default=16, help="answers a problem (16)")
    parser.add_argument("--held-out", type=int, help="only the N problems that train.py holds out")
    parser.add_argument("--limit", type=int, help="only the first LIMIT problems")
    parser.add_argument("--temperature", type=float, default=0.6, help="of the sampling (0.6)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="length limit (1024)")
    parser.add_argument("--instruction", help="appended to each prompt; hub tasks ask for \\boxed{}")
    parser.add_argument("--chat", action="store_true", help="use the model's chat template")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write the scores as JSON to this file")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the model's own code")
    args = parser.parse_args()
    try:
        if args.samples < 1 or args.max_new_tokens < 1 or args.temperature <= 0:
            raise ValueError("--samples, --max-new-tokens and --temperature must be above 0")
        if args.out and not args.out.resolve().parent.is_dir():
            raise ValueError(f"--out {args.out}: its folder does not exist")
        if args.limit is not None and args.limit < 1:
            raise ValueError("--limit must be above 0")
        path, tasks = resolve_model(args.model), load_tasks(args.tasks)
        if args.held_out:
            tasks = split_held_out(tasks, args.held_out, seed=0)[1]
        tasks = tasks[: args.limit]
        scores = run(args, path, tasks)
    except ValueError as error:
        sys.exit(f"evaluate.py: error: {error}")
    print(json.dumps(scores, indent=2))
    if args.out:
        args.out.write_text(json.dumps(scores, indent=2) + "\n")


def run(args, path: str, tasks: list[Task]) -> dict:
    from tqdm import tqdm

    from rollout import HFSampler

    model, tokenizer = load_model(path, args.trust_remote_code)
    instruction = args.instruction
    if instruction is None:
        instruction = default_instruction(args.tasks)
    prompts = encode_tasks(tokenizer, tasks, instruction, args.chat)
    print("first prompt:", repr(tokenizer.decode(prompts[tasks[0].id])), file=sys.stderr)
    sampler = HFSampler(model.to(device()), tokenizer, args.max_new_tokens, args.temperature)
    right, lengths, truncated = [], [], 0
    with Verifier() as verifier:
        for start in tqdm(range(0, len(tasks), 32), unit="batch of 32"):
            some, rollouts = evaluate(
                sampler, tasks[start : start + 32], prompts, verifier, args.samples, args.seed
            )
            right.append(some)
            lengths += [len(r.response_ids) for r in rollouts]
            truncated += sum(not r.finished for r in rollouts)
    right = np.concatenate(right)  # (M, samples)
    mean = right.mean(1)
    scores = {
        "model": args.model,
        "tasks": args.tasks,
        "problems": len(tasks),
        "samples": args.samples,
        "temperature": args.temperature,
        "seed": args.seed,
        f"avg@{args.samples}": float(mean.mean()),
        f"avg@{args.samples}_se": bootstrap_se(mean),
        "always_solved": float((mean == 1).mean()),
        "never_solved": float((mean == 0).mean()),
        "mean_tokens": float(np.mean(lengths)),
        "truncated": truncated / len(lengths),
    }
    k = 1
    while k <= args.samples:
        per_problem = pass_at_k(args.samples, right.sum(1).astype(int), k)
        scores[f"pass@{k}"] = float(per_problem.mean())
        scores[f"pass@{k}_se"] = bootstrap_se(per_problem)
        k *= 2
    return scores


if __name__ == "__main__":
    main()
