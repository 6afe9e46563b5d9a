"""The update and the transformers sampler at Qwen2.5-Math-1.5B's exact shape, random weights, on one GPU.

    python tests/bench/bench_gpu.py [OUT.json]        # minutes on an H100; needs torch and transformers

One optimizer step on groups of 8 after prompts of 128: 256 rollouts of 1024 tokens and 80 of 3072, no group
silent and 60% of them. Seconds, response tokens/s (silent ones count: they are dealt with), utilisation, peak
memory. Then at 1024 with other microbatches, prompts shared, activation checkpointing, eight minibatches;
checkpointing at 3072; and the 256 rollouts themselves by HFSampler. What matters most comes first.
OUT.json [bench_gpu.json] is written after every measurement, and the same command goes on from what is there.
What does not fit is recorded as such and passed over.

Utilisation: 6 x weights x tokens floating-point operations of the pass (3 x 2: forward, and backward twice
that; the head at response tokens only, silent rollouts not at all) plus causal attention's 6 x layers x
width x context a token, without the recomputation of checkpointing, over the update's whole time, over what a
bfloat16 torch.mm of 8192 reaches on this device.

What the memory should be on 80 GB by arithmetic, for 1.54e9 parameters, 28 layers (tutorial/gpu_memory.py;
tests/test_memory.py compares it with the H100's peaks of tutorial/results/bench_gpu.json):
    weights, gradients, AdamW's two moments, all float32: 1.54e9 x 16 bytes                  24.7 GB
    autocast's bfloat16 copies of the weights, which autograd keeps                           3.1 GB
    activations: 119 kB a token and layer x 29 layers x 8192 tokens a microbatch             28.2 GB
    the head: two float32 arrays of a chunk of 2^28 logits, its gradient once more            3.1 GB
so about 59 GB; 16384 tokens a microbatch would need 87. Checkpointing keeps 6 kB a token and layer instead
of 119, and one layer in full. HFSampler's keys and values are 3.8 GB in bfloat16 for the 131072 tokens that
it holds at once, beside 18.5 GB of weights and moments.

Without CUDA everything runs once at a toy shape, in bfloat16 too, to show that it would run.
"""

import json
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import grpo
from rollout import HFSampler, Rollout

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
EACH = 8  # rollouts a group
if CUDA:
    SHAPE = dict(vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                 num_attention_heads=12, num_key_value_heads=2)  # fmt: skip
    P, MM, REPEATS = 128, 8192, 2
    GROUPS = {1024: 32, 3072: 10}  # of that response length
    MICROBATCHES = (8192, 4096, 16384)  # the first is train.py's default
else:
    SHAPE = dict(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
                 num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    P, MM, REPEATS = 8, 256, 1
    GROUPS = {16: 5, 40: 5}
    MICROBATCHES = (200, 64, 10**6)


def header() -> dict:
    """Where and on what: the first lines of every result."""
    name = torch.cuda.get_device_name() if CUDA else "CPU: a toy shape, no figure of it means anything"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": name, **versions, "dtype": "bfloat16 over float32 weights", "shape": SHAPE}


def write(out: Path, result: dict) -> None:
    """The old file or the new one, whenever the run is cut short."""
    part = out.with_name(out.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(out)


def made_up(length: int) -> list[Rollout]:
    """Groups of 8 rollouts of that many random tokens, as likely as a uniform model would find them."""
    rng, V = np.random.default_rng(0), SHAPE["vocab_size"]
    logps = (-float(np.log(V)),) * length
    prompts = [tuple(rng.integers(V, size=P).tolist()) for _ in range(GROUPS[length])]
    return [
        Rollout(g, prompt, tuple(rng.integers(V, size=length).tolist()), logps, "")
        for g, prompt in enumerate(prompts)
        for _ in range(EACH)
    ]


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def timed(run, repeats: int = REPEATS, warm_ups: int = 1) -> float:
    """Median seconds, after what warms up."""
    seconds = []
    for _ in range(warm_ups + repeats):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warm_ups:])


def matmul_peak() -> float:
    a, b = (torch.randn(MM, MM, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    a_while = 100 if CUDA else 1  # long enough for the clocks to rise, and for the card to be warm
    timed(lambda: [a @ b for _ in range(a_while)] and None, 5)
    return 2 * MM**3 * a_while / timed(lambda: [a @ b for _ in range(a_while)] and None, 5)


def model_flops(model, rollouts: list[Rollout], shared: bool) -> float:
    """Floating-point operations of one update over these, as the top of this file counts them."""
    c, R, T = model.config, len(rollouts), len(rollouts[0].response_ids)
    head = c.vocab_size * c.hidden_size
    body = sum(p.numel() for p in model.parameters()) - head  # tied: the embedding is the head
    prompts = (len({r.group for r in rollouts}) if shared else R) * P
    flops = 6.0 * (body * (prompts + R * T) + head * R * T)
    attended = prompts * P / 2 + R * T * (P + T / 2)  # pairs of tokens, causal
    return flops + 12.0 * c.num_hidden_layers * c.hidden_size * attended


class NoTokenizer:
    """HFSampler asks two things of a tokenizer; random weights have nothing to decode or to end."""

    eos_token_id = SHAPE["vocab_size"]  # never drawn: every rollout runs to the length limit

    def batch_decode(self, rows, **_) -> list[str]:
        return [""] * len(rows)


def main() -> None:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")  # as train.py does
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "bench_gpu.json")
    old = json.loads(out.read_text()) if out.exists() else {}
    result = old if header().items() <= old.items() else header() | {"update": []}
    print(result["device"])

    def save(**more) -> None:
        result.update(more)
        write(out, result)
        print(json.dumps(more or result["update"][-1]), flush=True)

    torch.manual_seed(0)
    if "matmul_peak_tflops" not in result:
        save(matmul_peak_tflops=matmul_peak() / 1e12)

    config = Qwen2Config(**SHAPE, tie_word_embeddings=True, max_position_embeddings=4096)
    with DEVICE:
        model = Qwen2ForCausalLM(config).float().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    save(parameters=sum(p.numel() for p in model.parameters()))
    short, long = GROUPS
    batch = {length: made_up(length) for length in GROUPS}

    def measure(T, silent=0.0, tokens=MICROBATCHES[0], shared=False, checkpointing=False, minibatches=1):
        row = {"response": T, "rollouts": len(batch[T]), "silent": silent, "tokens_per_microbatch": tokens}
        row |= {"shared": shared, "checkpointing": checkpointing, "minibatches": minibatches}
        if any(row.items() <= done.items() for done in result["update"]):
            return
        # One of eight is right, but for the first groups: all wrong.
        group = np.array([r.group for r in batch[T]])
        live = group >= round(silent * GROUPS[T])
        advantages = grpo.group_advantages(live & (np.arange(len(group)) % EACH == 0), group)
        choose, grpo.sharing_wins = grpo.sharing_wins, lambda *_: shared
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        stats: dict = {}
        try:
            seconds = timed(
                lambda: stats.update(grpo.update(
                    model, optimizer, batch[T], advantages, minibatches, bfloat16=True,
                    tokens_per_microbatch=tokens, checkpointing=checkpointing,
                ))
            )  # fmt: skip
        except torch.OutOfMemoryError:
            seconds = None
        finally:
            grpo.sharing_wins = choose
        optimizer.zero_grad(set_to_none=True)  # what a failed run left
        if seconds is None:
            row["out_of_memory"] = True
        else:
            row |= {"skipped_tokens": stats["skipped_tokens"], "seconds": seconds}
            row["tokens_per_second"] = len(batch[T]) * T / seconds
            flops = model_flops(model, [r for r, x in zip(batch[T], live, strict=True) if x], shared)
            row["utilisation"] = flops / seconds / (result["matmul_peak_tflops"] * 1e12)
        row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if CUDA else None
        result["update"].append(row)
        save()

    for T in GROUPS:
        for silent in (0.0, 0.6):
            measure(T, silent)
    for tokens in MICROBATCHES[1:]:
        measure(short, tokens=tokens)
    measure(short, shared=True)
    measure(short, checkpointing=True)
    measure(long, checkpointing=True)
    # With several minibatches the log-probs of the old policy are a forward pass more.
    measure(short, minibatches=8)

    if "sample" not in result:
        prompts, counts = [r.prompt_ids for r in batch[short][::EACH]], np.full(GROUPS[short], EACH)
        HFSampler(model, NoTokenizer(), 4).sample(prompts, counts, 0)  # warms up
        sampler, sampled = HFSampler(model, NoTokenizer(), short), []
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(lambda: sampled.extend(sampler.sample(prompts, counts, 0)), 1, warm_ups=0)
        peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else None
        # The canary: both sides of one model, bfloat16 products, different kernels and paddings.
        with torch.no_grad():
            trainer = grpo.token_logprobs(model, sampled[:4], bfloat16=CUDA).cpu().numpy()
        gap = np.abs(trainer - np.concatenate([r.logprobs for r in sampled[:4]])).mean()
        speed = len(sampled) * short / seconds
        row = {"seconds": seconds, "tokens_per_second": speed, "peak_gib": peak}
        save(sample=row | {"logprob_gap": float(gap)})


if __name__ == "__main__":
    main()
