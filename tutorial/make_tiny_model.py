"""Pretrain the embedded default model, `tutorial/tiny_model/`: 23 minutes on one core of a busy machine.

    python tutorial/make_tiny_model.py                              # the shipped model, again
    python tutorial/make_tiny_model.py --clean --out /tmp/ceiling   # its ceiling: no wrong answers

A real pretrained model has read much text, some of it wrong, and so it knows every addition a
little: some facts firmly, some hardly, some mistaken. This script makes such a model small
enough to ship. The text is chain sums with running totals,

    3+5+2=8 10<eos>

and whoever wrote them is unsure of some of the 90 facts "a total that ends in u, plus d":
fact (u, d) is written wrong with its own probability e[u, d], drawn once, and always with the
same mistake. A sum of k digits comes out right with probability prod (1 - e) over its k - 1
steps, or a little more, as one mistake may undo another. So success rates spread from 0 to 1
as a real model's do, and fall with length.
Reinforcement learning then has to find out which facts were wrong. --clean sets e to 0: the
best this network can do, which is what training is measured against.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import trange
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

HERE = Path(__file__).parent
VOCAB = ["<pad>", "<eos>", "<unk>", *"0123456789+= "]
PAD, EOS, ZERO, PLUS, EQUALS, SPACE = 0, 1, 3, 13, 14, 15  # positions in VOCAB; digit d is 3 + d
MAX_TERMS = 10


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; nothing is added around a prompt."""
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(VOCAB)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        model_max_length=256,
    )


def make_model() -> Qwen2ForCausalLM:
    """Qwen2 in miniature: grouped-query attention, tied embeddings, and heads of 32, which is
    the smallest size that vLLM's attention takes."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(VOCAB),
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=384,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=EOS,
            use_sliding_window=False,
        )
    )


def draw_mistakes(rng: np.random.Generator, mean: float, concentration: float):
    """e[u, d], the probability that fact (u, d) is written wrong, and by how much, both (10, 10)."""
    e = rng.beta(mean * concentration, (1 - mean) * concentration, size=(10, 10))
    off = rng.choice([-3, -2, -1, 1, 2, 3], size=(10, 10))
    return e, off


def write_sums(rng: np.random.Generator, n: int, e: np.ndarray, off: np.ndarray):
    """n lines of text -> tokens (n, L) and labels (n, L), -100 on prompts and padding."""
    tokens = np.full((n, 64), PAD)
    labels = np.full((n, 64), -100)
    for row, terms in enumerate(rng.integers(2, MAX_TERMS + 1, size=n)):
        digits = rng.integers(1, 10, size=terms)
        prompt = [t for d in digits for t in (ZERO + d, PLUS)]
        prompt[-1] = EQUALS
        total, answer = digits[0], []
        for d in digits[1:]:
            wrong = rng.random() < e[total % 10, d]
            total = max(0, total + d + (off[total % 10, d] if wrong else 0))
            answer += [ZERO + int(c) for c in str(total)] + [SPACE]
        answer[-1] = EOS
        tokens[row, : len(prompt) + len(answer)] = prompt + answer
        labels[row, len(prompt) : len(prompt) + len(answer)] = answer
    length = int((tokens != PAD).sum(1).max())
    return torch.from_numpy(tokens[:, :length]), torch.from_numpy(labels[:, :length])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=HERE / "tiny_model")
    parser.add_argument("--clean", action="store_true", help="no wrong answers: the ceiling")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64, help="lines of text a step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--mistakes", type=float, default=0.25, help="mean of e")
    parser.add_argument("--concentration", type=float, default=1.0, help="small: e near 0 or 1")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    e, off = draw_mistakes(rng, args.mistakes, args.concentration)
    if args.clean:
        e = np.zeros_like(e)
    model = make_model()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, mean e {e.mean():.3f}")

    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    # Warm up for a twentieth of the run, then a half cosine down to zero.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: min(1, (s + 1) / (0.05 * args.steps)) * (1 + math.cos(math.pi * s / args.steps)) / 2,
    )
    start = time.time()
    for step in (bar := trange(args.steps, unit="step", mininterval=5)):
        tokens, labels = write_sums(rng, args.batch, e, off)
        logits = model(tokens, attention_mask=(tokens != PAD).long()).logits[:, :-1]  # (n, L-1, V)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 99:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(args.out)
    make_tokenizer().save_pretrained(args.out)
    print(f"wrote {args.out} after {(time.time() - start) / 60:.1f} minutes, last loss {loss.item():.3f}")


if __name__ == "__main__":
    main()
