"""How fast rollouts come: our samplers against the engines they stand on. One run, medians.

    python tests/bench/bench_rollout.py                                                 # the embedded model
    python tests/bench/bench_rollout.py --model smollm2 --tasks additions.jsonl     # a real one

64 prompts, counts from a real allocation (2 rollouts to 30, 256 in all), 8 and 64 new tokens:
  VLLMSampler.sample against a bare LLM.generate of the same requests (same seeds, same settings);
  HFSampler against transformers' generate() on the prompts repeated n_i times;
  vLLM against HF; seconds of a weight sync; the canary's gap in float32 and bfloat16; HFSampler's memory
  with 2048 rows in groups of 128.
Seconds are processor seconds: on one thread (OMP_NUM_THREADS=1) what a quiet machine's clock would show.
The engine parts are left out, and say so, where vLLM is not installed.
"""

import argparse
import json
import resource
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import grpo
import knapsack
import reward
import rollout


def timed(*calls, repeats: int) -> list[list[float]]:
    """Processor seconds of each call, `repeats` times, in turns: others on the machine hardly matter."""
    seconds = [[] for _ in calls]
    for _ in range(repeats):
        for call, times in zip(calls, seconds, strict=True):
            start = time.process_time()
            call()
            times.append(time.process_time() - start)
    return seconds


def allocation(m: int) -> np.ndarray:
    """Counts for m prompts, most of them easy, from what two visits of 8 rollouts would have told."""
    rng = np.random.default_rng(0)
    p = rng.beta(0.5, 0.02, size=m)
    tracker = knapsack.SuccessTracker()
    for _ in range(2):
        tracker.update(range(m), rng.binomial(8, p), np.full(m, 8))
    return knapsack.allocate(tracker.posterior(range(m)), 4 * m, n_min=2)


def hf_generate(model, tokenizer, prompts, counts, max_new_tokens):
    """What one would write without this module: every row on its own, until the last one has ended."""
    rows = [p for p, n in zip(prompts, counts, strict=True) for _ in range(n)]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + r for r in rows])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows])
    out = model.generate(
        ids, attention_mask=mask, do_sample=True, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    new = out[:, width:]
    ended = (new == tokenizer.eos_token_id).int().cumsum(1)
    return int((ended.cumsum(1) <= 1).sum())  # tokens up to and including the first end


def requests_of(engine, prompts, counts, seed) -> list:
    """What VLLMSampler.sample asks of LLM.generate: its inputs and their settings."""
    asked, generate = [], engine.llm.generate
    engine.llm.generate = lambda *args, **kwargs: asked.extend(args) or generate(*args, **kwargs)
    engine.sample(prompts, counts, seed)
    engine.llm.generate = generate
    return asked


def canary_gaps(model, rollouts, size: int = 4) -> np.ndarray:
    """The canary's number for every `size` rollouts in turn: mean |trainer's - sampler's log-prob|."""
    with torch.no_grad():
        ours = [grpo.token_logprobs(model, rollouts[i : i + 64]).numpy() for i in range(0, len(rollouts), 64)]
    gaps = np.abs(np.concatenate(ours) - np.concatenate([r.logprobs for r in rollouts]))
    of = np.repeat(np.arange(len(rollouts)) // size, [len(r.response_ids) for r in rollouts])
    return np.bincount(of, gaps) / np.bincount(of)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--tasks", default="arithmetic")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="also write the figures as JSON")
    args = parser.parse_args()
    path = rollout.resolve_model(args.model)
    model, tokenizer = rollout.load_model(path)
    prompts = rollout.encode_prompts(tokenizer, [t.prompt for t in reward.load_tasks(args.tasks)[:64]])
    counts = allocation(len(prompts))
    figures = {"model": Path(args.model).name, "tasks": Path(args.tasks).name, "repeats": args.repeats,
               "threads": torch.get_num_threads(), "prompts": len(prompts), "rollouts": int(counts.sum()),
               "smallest group": int(counts.min()), "largest group": int(counts.max()),
               "mean prompt tokens": float(np.mean([len(p) for p in prompts]))}  # fmt: skip
    print("  ".join(f"{k} {v}" for k, v in figures.items()), flush=True)

    def note(name: str, value: float, unit: str = "") -> None:
        figures[name] = round(float(value), 9)
        print(f"  {name:64s} {value:10.4g} {unit}", flush=True)

    vllm = rollout.vllm_build() is not None
    if not vllm:
        print("  vLLM is not installed: its parts are left out")
    for new_tokens in (8, 64):
        print(f"{new_tokens} new tokens")
        key = f"{new_tokens} tokens: "
        hf = rollout.HFSampler(model, tokenizer, new_tokens)
        produced, plain = [], []
        ours, theirs = timed(
            lambda hf=hf, produced=produced: produced.append(
                sum(len(r.response_ids) for r in hf.sample(prompts, counts, seed=len(produced)))
            ),
            lambda plain=plain, n=new_tokens: plain.append(hf_generate(model, tokenizer, prompts, counts, n)),
            repeats=args.repeats,
        )
        speed = median(n / s for n, s in zip(produced, ours, strict=True))
        note(key + "HFSampler", speed, "tokens/s")
        generate = median(n / s for n, s in zip(plain, theirs, strict=True))
        note(key + "transformers' generate()", generate, "tokens/s")
        note(key + "HFSampler / generate()", speed / generate, "x")
        if vllm:
            vllm_part(args, path, model, tokenizer, prompts, counts, new_tokens, speed, note, key)

    print("2048 rows in groups of 128, 8 new tokens")
    hf = rollout.HFSampler(model, tokenizer, 8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    note("2048 rows", timed(lambda: hf.sample(prompts[:16], [128] * 16, seed=0), repeats=1)[0][0], "s")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    note("2048 rows: growth of the peak resident memory", grown / 2**20, "GiB")
    if args.out:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


def vllm_part(args, path, model, tokenizer, prompts, counts, new_tokens, hf_speed, note, key) -> None:
    longest = max(map(len, prompts))
    for dtype in ("float32", "bfloat16") if new_tokens == 8 else ("float32",):
        engine = rollout.VLLMSampler(path, tokenizer, new_tokens, max_prompt_tokens=longest, dtype=dtype)
        engine.sync(model)
        rollouts = engine.sample(prompts, counts, seed=0)  # the first batch is slower
        gaps = canary_gaps(model, rollouts)
        note(f"{key}canary's gap in {dtype}, mean", gaps.mean(), "nats")
        note(f"{key}canary's gap in {dtype}, largest of {len(gaps)}", gaps.max(), "nats")
        note(f"{key}sync in {dtype}", median(timed(lambda e=engine: e.sync(model), repeats=5)[0]), "s")
        if dtype == "float32":
            produced = []
            requests = requests_of(engine, prompts, counts, 0)
            # The same seed, so both generate the same tokens.
            bare, ours = timed(
                lambda e=engine, r=requests: e.llm.generate(*r, use_tqdm=False),
                lambda e=engine, p=produced: p.append(
                    sum(len(r.response_ids) for r in e.sample(prompts, counts, seed=0))
                ),
                repeats=args.repeats,
            )
            speed = median(n / s for n, s in zip(produced, ours, strict=True))
            note(key + "VLLMSampler", speed, "tokens/s")
            note(key + "VLLMSampler / HFSampler", speed / hf_speed, "x")
            overhead = median(o / b for o, b in zip(ours, bare, strict=True)) - 1
            note(key + "overhead over a bare LLM.generate", 100 * overhead, "%")
        engine.close()


if __name__ == "__main__":
    main()
