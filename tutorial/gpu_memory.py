"""What a GPU must hold while it samples, learns and steps: arithmetic, before anything is loaded.

    python tutorial/gpu_memory.py --model Qwen2.5-Math-1.5B                 # on a card of 80 GB
    python tutorial/gpu_memory.py --model FOLDER --card 24 --optimizer adamw8bit

--card is in GB; all other flags are train.py's. It counts on vLLM, unless you say --engine hf. It prints
three sums and, where the largest does not fit, the flags nearest to yours that do. On a GPU train.py prints
the same of the card it finds. It needs the model's config.json and no GPU. tests/test_memory.py counts the
parts on a CPU, and compares the sums with what an H100 showed.
"""

import argparse
import dataclasses
import sys
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rollout


def parameter_sizes(config, trust_remote_code: bool = False) -> list[int]:
    """The numbers in each parameter of such a model, from its config: no weights are loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return [p.numel() for p in model.parameters()]  # tied ones count once


def memory_needs(c, engine: str, text, sizes: list, card: float) -> dict[str, dict]:
    """{phase: {what: bytes}} on a GPU of `card` bytes.

    c: a train.Config. text, sizes: a model's config (its text part) and the numbers in each parameter."""

    def of(name: str, otherwise=1) -> int:  # not every config has every name
        return getattr(text, name, None) or otherwise

    n, V, H, layers = sum(sizes), of("vocab_size"), of("hidden_size"), of("num_hidden_layers")
    heads, inner = of("num_attention_heads"), of("intermediate_size", 4 * H)
    keys = of("num_key_value_heads", heads) * of("head_dim", H // heads)  # numbers a token and layer
    cached = 4 * layers * keys  # bytes a token: keys and values in bfloat16
    longest, copies = c.max_prompt_tokens + c.max_new_tokens, {"bfloat16 copies": 2 * n}
    # In 8 bits, 256 numbers share a float32 scale, and each moment has a table of 1 KiB; the moments of
    # small parameters stay in float32.
    eight = sum(2 * (s + s // 64 + 1024) if s >= 4096 and s % 256 == 0 else 8 * s for s in sizes)
    always = {"weights": 4 * n, "moments": 8 * n if c.optimizer == "adamw" else eight}
    learning = always | {"gradients": 4 * n}
    if engine == "vllm":  # its weights, 16 of the longest rows, and what it works with
        least = 2 * n + 16 * longest * cached + 2e9
        sampling = {"the engine's share": max(c.gpu_memory * card, least)}
    else:  # a batch of rows, and five float32 arrays of its logits
        # Never more rows than a step has, or an evaluation (of 256 problems at most, unless told).
        rows = max(c.budget, (c.held_out or 256) * c.eval_samples)
        batch = min(rollout.HFSampler.tokens_in_flight, rows * longest)
        sampling = copies | {
            "keys and values": cached * batch,
            "logits": 20 * V * min(batch // c.max_new_tokens, rows),
        }
    # Autograd keeps, a token: the inputs and outputs of two norms in float32, and in bfloat16 what enters
    # each product and leaves attention and the MLP. With --checkpointing it keeps each layer's input, and all
    # of the one layer that is being recomputed.
    layer = 30 * H + 4 * keys + 8 * inner
    kept = layers * (4 * H if c.checkpointing else layer) + layer
    logits = min(2**28, V * max(c.tokens_per_microbatch, c.max_new_tokens))  # 2**28: grpo's chunk
    passes = copies | {"activations": max(c.tokens_per_microbatch, longest) * kept}
    passes |= {"logits": 8 * logits + 4 * V * H}  # two float32 arrays, and the head's gradient once more
    # A sleeping engine and CUDA's own share: on one H100 a little less.
    beside = {"beside them": 3e9} if engine == "vllm" else {}
    # AdamW takes its step on all parameters at once, with an array of their size; in 8 bits one by one.
    step = {"the step's array": 4 * n if c.optimizer == "adamw" else 0}
    return {
        "sampling": always | sampling,
        "update": learning | passes | beside,
        "step": learning | step | beside,
    }


def settings_that_fit(c, engine: str, text, sizes: list, card: float, free: float):
    """These settings, or those nearest to them that leave 1 GB of the `free` bytes over; None if none do."""
    optimizers, recomputed = {c.optimizer: 0, "adamw8bit": 0}, {c.checkpointing: 0, True: 0}
    for optimizer, checkpointing, k, share in product(optimizers, recomputed, (1, 2, 4, 8), (1, 0.75, 0.5)):
        changes = {"optimizer": optimizer, "checkpointing": checkpointing}
        changes |= {"tokens_per_microbatch": -(-c.tokens_per_microbatch // k)}
        changes["gpu_memory"] = c.gpu_memory if share == 1 else round(c.gpu_memory * share, 2)
        tried = dataclasses.replace(c, **changes)
        needs = memory_needs(tried, engine, text, sizes, card)
        if max(sum(parts.values()) for parts in needs.values()) <= free - 1e9:
            return tried
    return None


def other_flags(c, fit) -> str:
    """The flags that make `fit` out of `c`."""
    changed = {k: v for k, v in dataclasses.asdict(fit).items() if v != getattr(c, k)}
    flags = [("--" + k.replace("_", "-"), v) for k, v in changed.items()]
    return " ".join(name if v is True else f"{name} {v}" for name, v in flags)


def report(c, engine: str, path: str, free: float, card: float) -> None:
    """Prints what the model at `path` needs. It is arithmetic, so it warns and stops nothing."""
    config, _ = rollout.load_config(path, c.trust_remote_code)
    model = config.get_text_config(decoder=True), parameter_sizes(config, c.trust_remote_code)
    print(f"memory by arithmetic, in GB; the GPU has {free / 1e9:.1f} free of {card / 1e9:.1f}:")
    for phase, parts in memory_needs(c, engine, *model, card).items():
        listed = " + ".join(f"{what} {size / 1e9:.1f}" for what, size in parts.items())
        print(f"  {phase:8} {sum(parts.values()) / 1e9:5.1f} = {listed}")
    fit = settings_that_fit(c, engine, *model, card, free)
    if fit is None:
        print("warning: this model does not fit this GPU, whatever the flags: take a smaller one")
    elif fit != c:
        print(f"warning: this may not fit; what would: {other_flags(c, fit)}")


def main() -> None:
    import train  # which has the flags

    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--card", type=float, default=80, help="GB of the GPU [%(default)s]")
    args, flags = parser.parse_known_args()
    try:
        c = train.settings(train.parse_args(flags)[0])
        # To ask what 8 bits would need, torchao need not be there.
        train.check(dataclasses.replace(c, optimizer="adamw") if c.optimizer == "adamw8bit" else c)
        path = rollout.resolve_model(c.model)
        report(c, "hf" if c.engine == "hf" else "vllm", path, args.card * 1e9, args.card * 1e9)
    except ValueError as error:
        sys.exit(f"gpu_memory.py: error: {error}")


if __name__ == "__main__":
    main()
