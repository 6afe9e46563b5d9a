"""vLLM and the trainer on one GPU, at Qwen2.5-Math-1.5B's exact shape, random weights.

    python tests/bench/bench_gpu_vllm.py [OUT.json]       # minutes on an H100; needs vLLM (see the README)

Three steps as train.py takes them, 256 rollouts of 1024 tokens for 64 prompts with the ragged counts of a
real allocation: generate, canary, sleep, update, wake and sync. After each phase its seconds and the GPU's
memory; the first step also warms up, the last one takes 8 minibatches. Then the last requests again, three
times in turns: from the sampler, from a bare LLM.generate (the sampler's overhead), and from that without
their seeds (what reproducible groups cost) or their log-probs (what the importance weight costs).

The model is made here, and has no end-of-sequence token, so each response is exactly 1024 tokens long. Its
distributions are nearly uniform: the canary's gap is that of the arithmetic, not of a trained model's peaks.
One rollout of each group is right, so no group is silent and the update computes everything.
OUT.json [bench_gpu_vllm.json] is written after every measurement. Without a GPU it runs at bench_gpu.py's toy
shape on vLLM's CPU build, which does not sleep, to show that it would run.
"""

import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from bench_gpu import CUDA, DEVICE, GROUPS, SHAPE, NoTokenizer, P, header, synchronize, write
from bench_rollout import allocation, requests_of
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import grpo
import rollout
import train

PROMPTS, T = 64, next(iter(GROUPS))


def random_model(folder: str):
    """The model, on the CPU, and in `folder` as vLLM loads it, with a tokenizer that ends nothing."""
    torch.manual_seed(0)
    config = Qwen2Config(**SHAPE, tie_word_embeddings=True, max_position_embeddings=4096)
    with DEVICE:  # a GPU draws random numbers faster; it is given back before the engine measures it
        model = Qwen2ForCausalLM(config).float().eval()
    model.cpu().save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(rollout.TINY)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    return model


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "bench_gpu_vllm.json")
    if rollout.vllm_build() is None:
        sys.exit("vLLM is not installed: nothing measured")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as train.py does
    c = train.settings({"model": "Qwen2.5-Math-1.5B"})  # the large model's defaults
    result = header() | {"prompts": PROMPTS, "prompt": P, "response": T, "phases": [], "steps": []}

    def save(**more) -> None:
        result.update(more)
        write(out, result)
        print(json.dumps({name: rows[-1] if isinstance(rows, list) else rows for name, rows in more.items()}))

    def phase(name: str, run):
        """run(); its seconds, and the memory: in use on the whole GPU after it, torch's peak within it."""
        if CUDA:
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        start = time.perf_counter()
        value = run()
        synchronize()
        row = {"phase": name, "seconds": time.perf_counter() - start}
        if CUDA:
            free, total = torch.cuda.mem_get_info()
            row |= {"used_gib": (total - free) / 2**30}
            row["peak_gib"] = (torch.cuda.max_memory_allocated() - given_back()) / 2**30
        save(phases=[*result["phases"], row])
        return value

    def given_back() -> int:
        """Bytes that torch still counts, though the sleeping engine has returned them to the card."""
        if not result["phases"] or result["phases"][-1]["phase"] != "sleep":
            return 0  # the phase after "sleep" is the one that runs beside a sleeping engine
        from vllm.device_allocator.cumem import CuMemAllocator

        return CuMemAllocator.get_instance().get_current_usage()

    if out.exists():
        out.replace(out.with_suffix(".before.json"))  # of a run that was cut
    with tempfile.TemporaryDirectory() as folder:
        model = phase("make the model", lambda: random_model(folder))
        if CUDA:
            torch.cuda.empty_cache()
        engine = phase(
            "start vLLM",
            lambda: rollout.VLLMSampler(
                folder, NoTokenizer(), T, max_prompt_tokens=P, gpu_memory=c.gpu_memory
            ),
        )
    import vllm

    config = engine.llm.llm_engine.vllm_config
    # vLLM has two model runners of different speed; 0.24 takes the older one for Qwen2, 0.32 the newer.
    runner = {True: "V2", False: "V1"}.get(getattr(config, "use_v2_model_runner", None), "not told")
    save(engine={"vllm": vllm.__version__, "runner": runner, "dtype": str(config.model_config.dtype)})
    phase("trainer to the device", lambda: model.to(DEVICE))
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.lr, weight_decay=0.0)
    phase("sync, nobody asleep", lambda: engine.sync(model))

    rng, counts = np.random.default_rng(0), allocation(PROMPTS)
    prompts = [rng.integers(SHAPE["vocab_size"], size=P).tolist() for _ in range(PROMPTS)]
    save(rollouts=int(counts.sum()), smallest_group=int(counts.min()), largest_group=int(counts.max()))
    for step, minibatches in enumerate((1, 1, c.minibatches), 1):
        before = len(result["phases"])
        rollouts = phase("generate", lambda step=step: engine.sample(prompts, counts, step))
        shortest = min(len(r.response_ids) for r in rollouts)
        group = np.array([r.group for r in rollouts])
        right = np.diff(group, prepend=-1) > 0  # the first of each group
        gap = phase("canary", lambda r=rollouts: train.canary(model, r, c))
        phase("sleep", engine.sleep)
        advantages = grpo.group_advantages(right, group)
        settings = dict(minibatches=minibatches, tokens_per_microbatch=c.tokens_per_microbatch, bfloat16=True)
        stats = phase(
            "update",
            lambda r=rollouts, a=advantages, s=settings: grpo.update(model, optimizer, r, a, **s),
        )
        phase("wake and sync", lambda: engine.sync(model))
        seconds = sum(row["seconds"] for row in result["phases"][before:])
        what = {"minibatches": minibatches, "seconds": seconds, "shortest_response": shortest}
        what |= {"logprob_gap": gap, "grad_norm": stats["grad_norm"]}
        save(steps=[*result["steps"], what])

    requests = requests_of(engine, prompts, counts, 3)

    def without(name: str) -> list:
        asked = [p.clone() for p in requests[1]]
        for settings in asked:
            setattr(settings, name, None)
        return asked

    unseeded, silent = without("seed"), without("logprobs")
    ways = {
        "sampler": lambda: engine.sample(prompts, counts, 3),
        "bare": lambda: engine.llm.generate(*requests, use_tqdm=False),
        "bare, no seeds": lambda: engine.llm.generate(requests[0], unseeded, use_tqdm=False),
        "bare, no log-probs": lambda: engine.llm.generate(requests[0], silent, use_tqdm=False),
    }
    for _ in range(3):  # in turns, so that a warm card is warm for all
        for name, run in ways.items():
            phase(name, run)
    seconds = {name: [row["seconds"] for row in result["phases"] if row["phase"] == name] for name in ways}
    middle = {name: median(times) for name, times in seconds.items()}
    tokens = int(counts.sum()) * T
    speed = {name: tokens / middle[name] for name in ways}
    save(tokens_per_second=speed, overhead=middle["sampler"] / middle["bare"] - 1)
    engine.close()


if __name__ == "__main__":
    main()
