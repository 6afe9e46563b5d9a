"""The update and the transformers sampler at Qwen2.5-Math-1.5B's exact shape, random weights, on one GPU.

    python tests/bench_gpu.py [OUT.json]        # about ten minutes on an H100; needs torch and transformers

256 rollouts of 1024 tokens after prompts of 128, in groups of 8, none of them silent: seconds of one
optimizer step, response tokens/s, model FLOP utilisation, peak memory; with and without activation
checkpointing, prompts shared or not, for several microbatch sizes. Then rollouts by HFSampler, and one
update on them. OUT.json [bench_gpu.json] is written after every measurement, so that an interruption costs
one. What does not fit is recorded as such and passed over.

Utilisation: 6 x weights x tokens floating-point operations of the pass (3 x 2: forward, and backward twice
that; the head at response tokens only) plus causal attention's 6 x layers x width x context a token,
without the recomputation of checkpointing, over the update's whole time, over what a bfloat16 torch.mm
of 8192 reaches on this device.

What the memory should be on 80 GB, as arithmetic, not yet as a measurement, for 1.54e9 parameters, 28 layers:
    weights, gradients, AdamW's two moments, all float32: 1.54e9 x 16 bytes                  24.6 GB
    activations: 97 kB a token and layer (what autograd saves under bfloat16 autocast,
        counted on a CPU) x 28 layers x 8192 tokens a microbatch                             22.3 GB
    the head: a chunk of 2^28 logits, about 3 float32 copies; its gradient once more,
        a bfloat16 copy of its weights and of a chunk's gradient                              5.1 GB
so about 52 GB; 16384 tokens a microbatch would need 74. Checkpointing keeps 6 kB a token and layer instead
of 97, and one layer in full. Without chunks the logits of 8192 tokens alone would be 5 GB a copy.

Without CUDA everything runs once at a toy shape, in bfloat16 too, to show that it would run.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import grpo
from rollout import HFSampler, Rollout

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
if CUDA:
    SHAPE = dict(vocab_size=151_936, hidden_size=1536, intermediate_size=8960, num_hidden_layers=28,
                 num_attention_heads=12, num_key_value_heads=2)  # fmt: skip
    GROUPS, EACH, P, T, MM, REPEATS = 32, 8, 128, 1024, 8192, 3
    MICROBATCHES = (4096, 8192, 16384)
else:
    SHAPE = dict(vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    GROUPS, EACH, P, T, MM, REPEATS = 3, 2, 8, 16, 256, 1
    MICROBATCHES = (64, 10**6)


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def timed(run, repeats: int = REPEATS) -> float:
    """Median seconds, after one run that warms up."""
    seconds = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        run()
        synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def matmul_peak() -> float:
    a, b = (torch.randn(MM, MM, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * MM**3 / timed(lambda: a @ b, 20)


def model_flops(model, shared: bool) -> float:
    """Floating-point operations of one update over all rollouts, as the top of this file counts them."""
    c, rollouts = model.config, GROUPS * EACH
    head = c.vocab_size * c.hidden_size
    body = sum(p.numel() for p in model.parameters()) - head  # tied: the embedding is the head
    prompts = (GROUPS if shared else rollouts) * P
    flops = 6.0 * (body * (prompts + rollouts * T) + head * rollouts * T)
    attended = prompts * P / 2 + rollouts * T * (P + T / 2)  # pairs of tokens, causal
    return flops + 12.0 * c.num_hidden_layers * c.hidden_size * attended


class NoTokenizer:
    """HFSampler asks two things of a tokenizer; random weights have nothing to decode or to end."""

    eos_token_id = SHAPE["vocab_size"]  # never drawn: every rollout runs to the length limit

    def batch_decode(self, rows, **_) -> list[str]:
        return [""] * len(rows)


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "bench_gpu.json")
    name = torch.cuda.get_device_name() if CUDA else "CPU: a toy shape, no figure of it means anything"
    result = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__}
    result |= {"shape": SHAPE, "groups": GROUPS, "each": EACH, "prompt": P, "response": T, "update": []}

    def save(**more) -> None:
        result.update(more)
        out.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(more or result["update"][-1]), flush=True)

    print(name)
    torch.manual_seed(0)
    peak = matmul_peak()
    save(matmul_peak_tflops=peak / 1e12)

    config = Qwen2Config(**SHAPE, tie_word_embeddings=True, max_position_embeddings=4096)
    with DEVICE:
        model = Qwen2ForCausalLM(config).float().eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    save(parameters=sum(p.numel() for p in model.parameters()))

    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(SHAPE["vocab_size"], size=P).tolist()) for _ in range(GROUPS)]
    made = [
        Rollout(g, prompts[g], tuple(rng.integers(SHAPE["vocab_size"], size=T).tolist()),
                (-float(np.log(SHAPE["vocab_size"])),) * T, "")
        for g in range(GROUPS) for _ in range(EACH)
    ]  # fmt: skip
    group = np.array([r.group for r in made])
    advantages = grpo.group_advantages(np.arange(len(made)) % EACH == 0, group)

    def measure(rollouts, shared: bool, checkpointing: bool, tokens: int, minibatches: int = 1) -> None:
        row = {"shared": shared, "checkpointing": checkpointing, "tokens_per_microbatch": tokens}
        row |= {"minibatches": minibatches, "rollouts": "made" if rollouts is made else "sampled"}
        choose, grpo.sharing_wins = grpo.sharing_wins, lambda *_: shared
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            seconds = timed(
                lambda: grpo.update(
                    model, optimizer, rollouts, advantages, minibatches, bfloat16=True,
                    tokens_per_microbatch=tokens, checkpointing=checkpointing,
                )
            )  # fmt: skip
        except torch.OutOfMemoryError:
            seconds = None
        finally:
            grpo.sharing_wins = choose
        optimizer.zero_grad(set_to_none=True)  # what a failed run left
        if seconds is None:
            row["out_of_memory"] = True
        else:
            row |= {"seconds": seconds, "tokens_per_second": GROUPS * EACH * T / seconds}
            row["utilisation"] = model_flops(model, shared) / seconds / peak
        if CUDA:
            row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        result["update"].append(row)
        save()

    for tokens in MICROBATCHES:
        for checkpointing, shared in ((False, False), (False, True), (True, False)):
            measure(made, shared, checkpointing, tokens)
    # With several minibatches the log-probs of the old policy are a forward pass more.
    measure(made, False, False, MICROBATCHES[0], minibatches=8)

    sampler = HFSampler(model, NoTokenizer(), T)
    sampled = []
    seconds = timed(lambda: sampled.append(sampler.sample(prompts, np.full(GROUPS, EACH), 0)), 1)
    save(sample={"seconds": seconds, "tokens_per_second": GROUPS * EACH * T / seconds})
    # The canary: both sides of one model, bfloat16 products, different kernels and paddings.
    with torch.no_grad():
        trainer = grpo.token_logprobs(model, sampled[-1][:4], bfloat16=CUDA)
    sampler_logp = torch.tensor([x for r in sampled[-1][:4] for x in r.logprobs], device=DEVICE)
    save(logprob_gap=float((trainer - sampler_logp).abs().mean()))
    measure(sampled[-1], False, False, MICROBATCHES[0])


if __name__ == "__main__":
    main()
