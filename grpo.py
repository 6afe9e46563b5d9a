"""GRPO for ragged groups: rewards -> advantages -> clipped loss -> a few optimizer steps.

A group is the rollouts of one prompt, of any size: `group[r]` says which one rollout r belongs to,
and that is all the raggedness there is. Tokens are kept flat, (N,), so there is no padding to mask.

    advantages = group_advantages(rewards, group)             # (R,), zero for silent groups
    stats = update(model, optimizer, rollouts, advantages)    # the model is better now

>>> import numpy as np
>>> group_advantages(np.array([1.0, 0.0, 1.0, 1.0]), np.array([7, 7, 9, 9])).round(3)
array([ 0.707, -0.707,  0.   ,  0.   ])

What the paper calls it: GRPO, with its training settings. Which line of whose formula each piece is:

    group_advantages   GRPO's (r - mean)/std a group (DeepSeekMath, Sec. 4.1). "centred" drops the std:
                       Dr. GRPO (Liu et al. 2025, Sec. 3)
    ratio, clip        PPO's, with two ends: clip-higher (DAPO, Sec. 3.1); dual clip (Ye et al. 2020)
    normalizer         1 / sum of |o|, outside all sums: token-mean (DAPO, Sec. 3.3), the paper's. "sequence":
                       1/R sum_r 1/|o_r| (GRPO); a constant length: Dr. GRPO
    silent groups      DAPO (Sec. 3.2) samples on until every group is mixed; the paper's knapsack buys
                       fewer silent ones; here those that still happen are counted and not computed
    no KL              as DAPO (Sec. 2.3) and the paper. kl_coef > 0 is GRPO's k3 term (Sec. 4.1, eq. 4)
    importance weight  pi_trainer / pi_sampler, truncated at 2: the paper's settings name it, its code
                       computes it after the loss and never applies it; here it is applied

Why token-mean is what makes unequal groups pay. Two prompts, half of whose rollouts are right, answers of
10 tokens, 40 rollouts for the one and 8 for the other. Let theta move all tokens of a right answer up by 1/2
and those of a wrong one down by 1/2; how hard does each prompt pull on its theta?

>>> group, right = np.repeat([0, 1], [40, 8]), np.arange(48) % 2
>>> pull = np.bincount(group, 10 * group_advantages(right, group) * (right - 1 / 2))  # summed over tokens
>>> (pull / (10 * 48)).round(2)  # token-mean: in proportion to the rollouts
array([0.41, 0.08])
>>> (pull / (10 * np.array([40, 8])) / 2).round(2)  # a mean over each prompt first: equal
array([0.25, 0.23])

With a mean over each prompt, 32 more rollouts only lower the noise of one prompt's gradient; with the token
mean they make it count five times as much. (0.23 and not 0.25: the unbiased std of a small group.)

How much memory a 1.5B model takes: tests/bench/bench_gpu.py has the arithmetic.
"""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

# On Hopper torch >= 2.11 takes cuDNN's attention first. With a mask its gradient can be NaN (pytorch#196678;
# Qwen2.5 is among those it meets), and it plans anew for each length. Off, for the whole process.
torch.backends.cuda.enable_cudnn_sdp(False)

# ------------------------------------------------------------------------------------ advantages


def group_advantages(
    rewards, group, eps: float = 1e-6, clip: float = 5.0, kind: str = "scaled"
) -> np.ndarray:
    """What each rollout did better than its own group, clipped to +-clip. In a group of n:

        kind="scaled"          A_r = (reward_r - mean) / (std + eps)    GRPO; the paper's, and the default
        kind="centred"         A_r = reward_r - mean                    Dr. GRPO
        kind="leave-one-out"   A_r = reward_r - mean of the others      RLOO;  = (reward_r - mean) n/(n-1)

    rewards (R,) floats, binary or not; group (R,) integers, any labels in any order.
    std is the unbiased one (n - 1), as in the paper's code. Returns (R,) float64; a group of one and
    a silent group (all rewards equal) give exactly 0. ValueError on shapes that differ or rewards
    that are not finite.
    """
    rewards = np.asarray(rewards, dtype=np.float64)
    group = np.asarray(group)
    if rewards.ndim != 1 or rewards.shape != group.shape:
        raise ValueError(f"rewards {rewards.shape} and group {group.shape} must both be (R,)")
    if not np.isfinite(rewards).all():
        raise ValueError("rewards must be finite: look at the verifier, not at the advantages")
    _, g, n = np.unique(group, return_inverse=True, return_counts=True)  # (R,) labels, (M,) sizes
    mean = np.bincount(g, rewards) / n  # (M,)
    centred = rewards - mean[g]
    if kind == "scaled":
        variance = np.bincount(g, centred**2) / np.maximum(n - 1, 1)
        advantages = centred / (np.sqrt(variance)[g] + eps)
    elif kind == "centred":
        advantages = centred
    elif kind == "leave-one-out":
        advantages = centred * (n / np.maximum(n - 1, 1))[g]
    else:
        raise ValueError(f"kind {kind!r} must be scaled, centred or leave-one-out")
    # Three rewards of 0.1 have a mean that is not quite 0.1: silence is decided on the rewards.
    first = np.zeros(len(n))
    first[g] = rewards
    mixed = np.bincount(g, rewards != first[g]) > 0
    return np.where(mixed[g], np.clip(advantages, -clip, clip), 0.0)


# --------------------------------------------------------------------------------- log-probabilities


def token_logprobs(
    model,
    rollouts: Sequence,
    temperature: float = 1.0,
    share_prompts: bool = True,
    bfloat16: bool | None = None,
) -> torch.Tensor:
    """log pi(token | prompt, tokens before it) of every response token.

    rollouts: R records with `group`, `prompt_ids`, `response_ids` (as sampled, never retokenised).
    Returns (N,) in float32 or better, N = total response tokens, rollout after rollout; gradients flow.
    temperature is the sampler's: the policy that took these actions was softmax(logits / temperature).
    share_prompts: how the same numbers are computed, see `_shared_pass` and `_plain_pass`.
    bfloat16: matrix products in bfloat16 over float32 weights; None means on a GPU only.

    For models whose logits are head(hidden), as Qwen's and Llama's are; not for those that cap or
    scale them afterwards (Gemma 2, Cohere, Granite).
    """
    device = next(model.parameters()).device
    if bfloat16 is None:
        bfloat16 = device.type == "cuda"
    run = _shared_pass if share_prompts else _plain_pass
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        hidden, targets = run(model.get_decoder(), rollouts, device)  # (N, H), (N,)
        return _logprobs_of(model.get_output_embeddings(), hidden, targets, temperature)  # (N,)


def _padded(sequences: Sequence, device, left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (1: a token), both (rows, longest)."""
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.long)
    for i, sequence in enumerate(sequences):
        where = slice(width - len(sequence), width) if left else slice(0, len(sequence))
        ids[i, where] = torch.tensor(sequence)
        mask[i, where] = 1
    return ids.to(device), mask.to(device)


def _plain_pass(decoder, rollouts, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states that predict the response tokens, (N, H), and those tokens, (N,): one pass over
    prompt + response. Right padding needs no mask, the causal order hides it from every real token;
    and without a mask the attention kernel may be the fastest one."""
    ids, mask = _padded([(*r.prompt_ids, *r.response_ids) for r in rollouts], device)  # (R, L)
    hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state  # (R, L, H)
    starts = torch.tensor([len(r.prompt_ids) for r in rollouts], device=device)
    real = (torch.arange(ids.shape[1], device=device) >= starts[:, None]) & mask.bool()  # (R, L)
    return hidden[:, :-1][real[:, 1:]], ids[real]


def _shared_pass(decoder, rollouts, device) -> tuple[torch.Tensor, torch.Tensor]:
    """The same, with **each prompt computed once a group**. A group of 40 rollouts repeats its prompt
    40 times. So the distinct prompts run first, (G, P), their keys and values stay in the graph and
    are expanded over the rows, and only the responses run on top, in slices of like length, (r, T).
    Gradients flow back through the expansion and add up. It costs G*P + R*T tokens instead of R*(P+T).
    """
    labels = list(dict.fromkeys(r.group for r in rollouts))  # distinct groups, in order of appearance
    row_of = {label: i for i, label in enumerate(labels)}
    prompt_of = {r.group: r.prompt_ids for r in rollouts}
    if any(tuple(r.prompt_ids) != tuple(prompt_of[r.group]) for r in rollouts):
        raise ValueError("rollouts of one group must share one prompt")

    # Prompts padded on the left, so that all of them end in the same column; positions start at 0.
    prompt_ids, prompt_mask = _padded([prompt_of[label] for label in labels], device, left=True)
    out = decoder(
        input_ids=prompt_ids,
        attention_mask=prompt_mask,
        position_ids=(prompt_mask.cumsum(1) - 1).clamp(min=0),
        use_cache=True,
    )
    last, cache = out.last_hidden_state[:, -1:], out.past_key_values  # (G, 1, H)

    lengths = [len(r.response_ids) for r in rollouts]
    slices = list(_slices(lengths))
    pieces = []
    for part in slices:
        ids, mask = _padded([rollouts[i].response_ids for i in part], device)  # (r, T)
        rows = torch.tensor([row_of[rollouts[i].group] for i in part], device=device)  # (r,)
        # The prompt's last column predicts the first response token.
        # index_select, not x[rows]: on a CPU the backward pass of the latter adds up in no fixed order.
        hidden = last.index_select(0, rows)  # (r, 1, H)
        T = ids.shape[1]
        if T > 1:
            expanded = copy.copy(cache)
            expanded.layers = [copy.copy(layer) for layer in cache.layers]
            for layer in expanded.layers:
                layer.keys = layer.keys.index_select(0, rows)
                layer.values = layer.values.index_select(0, rows)
            # Right padding needs no mask: the causal order hides it from every real token.
            own = torch.ones(len(part), T - 1, dtype=torch.long, device=device)
            later = decoder(
                input_ids=ids[:, :-1],
                attention_mask=torch.cat([prompt_mask[rows], own], dim=1),
                position_ids=prompt_mask.sum(1, keepdim=True)[rows] + torch.arange(T - 1, device=device),
                past_key_values=expanded,
            )
            hidden = torch.cat([hidden, later.last_hidden_state], dim=1)  # (r, T, H)
        pieces.append(hidden[mask.bool()])
    # Tokens now stand slice after slice; `place` says where each of them belongs.
    starts = np.cumsum(lengths) - lengths
    place = np.concatenate([np.arange(starts[i], starts[i] + lengths[i]) for part in slices for i in part])
    back = torch.from_numpy(np.argsort(place)).to(device)
    targets = torch.tensor([t for r in rollouts for t in r.response_ids], device=device)
    return torch.cat(pieces).index_select(0, back), targets


def _slices(lengths: Sequence[int], waste: float = 0.05, least: int = 256) -> Iterator[list[int]]:
    """Indices, longest first, cut where padding would exceed `waste` of a slice (if the slice is worth
    a pass of its own: `least` tokens)."""
    part: list[int] = []
    real = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        padded = (len(part) + 1) * lengths[part[0]] if part else lengths[i]
        if padded > least and real + lengths[i] < (1 - waste) * padded:
            yield part
            part, real = [], 0
        part.append(i)
        real += lengths[i]
    if part:
        yield part


def _logprobs_of(head, hidden, targets, temperature, chunk_elements: int | None = None) -> torch.Tensor:
    """log softmax(head(hidden) / temperature)[targets], (N, H), (N,) -> (N,); in chunks where N x V is
    large. A chunk is 2^25 logits; 2^28 on a GPU (1 GiB in float32), where small ones would leave it idle."""
    if chunk_elements is None:
        chunk_elements = 2**28 if hidden.is_cuda else 2**25
    n = max(1, chunk_elements // head.weight.shape[0])
    if len(hidden) > n:
        if head.bias is not None:
            raise ValueError("a head with a bias is not supported: see _ChunkedLogprobs")
        return _ChunkedLogprobs.apply(hidden, head.weight, targets, temperature, n)
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # (N, V)
    if temperature != 1:
        logits = logits / temperature
    return logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(1)


class _ChunkedLogprobs(torch.autograd.Function):
    """N x V floats never live at once: logits are computed n rows at a time, again in the backward pass,
    where the head's gradient is summed in place (torch's checkpoint would keep three arrays of its size).
    Peak on a CPU, N = 4096, V = 151,936: 1.4 GB, 0.9 of them that gradient; whole logits: 7.5 GB
    (tests/bench/bench_grpo.py)."""

    @staticmethod
    def _log_softmax(h, weight, temperature) -> torch.Tensor:
        logits = h @ weight.T
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # (n, V)
        return logits.sub_(logits.logsumexp(1, keepdim=True))

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, n):
        kind = hidden.device.type
        ctx.products = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        ctx.save_for_backward(hidden, weight, targets)
        ctx.temperature, ctx.n = temperature, n
        w, h = weight.to(ctx.products), hidden.to(ctx.products)
        log_p = _ChunkedLogprobs._log_softmax
        pairs = zip(h.split(n), targets.split(n), strict=True)
        return torch.cat([log_p(h, w, temperature).gather(1, t[:, None])[:, 0] for h, t in pairs])

    @staticmethod
    def backward(ctx, grad):  # (N,)
        hidden, weight, targets = ctx.saved_tensors
        w, grad_hidden, grad_weight = weight.to(ctx.products), [], torch.zeros_like(weight)
        for h, t, g in zip(hidden.split(ctx.n), targets.split(ctx.n), grad.split(ctx.n), strict=True):
            h, g = h.to(ctx.products), g[:, None] / ctx.temperature
            # d log p_target / d logits = (one-hot of the target - p) / temperature
            d = _ChunkedLogprobs._log_softmax(h, w, ctx.temperature).exp_().mul_(-g)  # (n, V)
            d.scatter_add_(1, t[:, None], g.to(d.dtype))
            d = d.to(ctx.products)
            grad_hidden.append((d @ w).to(hidden.dtype))
            if ctx.products == weight.dtype:
                grad_weight.addmm_(d.T, h)
            else:
                grad_weight += d.T @ h
        return torch.cat(grad_hidden), grad_weight, None, None, None


# --------------------------------------------------------------------------------------------- loss


def clipped_loss(
    logp: torch.Tensor,
    old_logp: torch.Tensor,
    advantages: torch.Tensor,
    n_tokens: float,
    sampler_logp: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    dual_clip: float = 10.0,
    max_importance: float = 2.0,
    reference_logp: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    token_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The PPO-clip policy loss, summed over these tokens and divided by a *global* token count.

    logp, old_logp, advantages, sampler_logp, reference_logp, token_weight: (N,), one a token; only
    logp carries a gradient.
    n_tokens: the tokens of the whole (mini)batch, also of those rows that are not here because their
    advantage is zero; so how a batch is cut into microbatches changes nothing.

        ratio  = pi_now / pi_old                                      (PPO)
        loss_t = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))     (clip-higher: DAPO)
        loss_t = min(loss_t, -A dual_clip)  where A < 0               (dual clip)
        loss_t = w_t loss_t,   w = min(pi_old / pi_sampler, max_importance)     (truncated importance)
        loss_t = loss_t + kl_coef (r - 1 - log r),   r = pi_reference / pi_now  (k3: GRPO; off by default)
        loss   = sum_t token_weight_t loss_t / n_tokens               (1 unless given: see `update`)

    w corrects for the engine that sampled (vLLM's kernels, bfloat16) being not quite the trainer's
    policy; it is a weight, so it is detached. Returns the scalar loss and sums over tokens of
    diagnostics: clipped_low, clipped_high, nats (-log pi_now), kl (to the sampler, k3 again) and, with
    a reference, kl_reference.
    """
    A = advantages
    log_ratio = logp - old_logp
    ratio = log_ratio.exp()
    surrogate = torch.maximum(-A * ratio, -A * ratio.clamp(1 - clip_low, 1 + clip_high))
    surrogate = torch.where(A < 0, torch.minimum(surrogate, -A * dual_clip), surrogate)
    if sampler_logp is None:
        sampler_logp = old_logp
    loss = (old_logp - sampler_logp).exp().clamp(max=max_importance).detach() * surrogate  # (N,)
    if reference_logp is not None:
        to_reference = _k3(reference_logp - logp)
        loss = loss + kl_coef * to_reference
    if token_weight is not None:
        loss = loss * token_weight
    loss = loss.sum() / n_tokens

    with torch.no_grad():
        sums = {
            # A clip acts only where it lowers what the step could still gain.
            "clipped_low": ((A < 0) & (ratio < 1 - clip_low)).sum().item(),
            "clipped_high": ((A > 0) & (ratio > 1 + clip_high)).sum().item(),
            "nats": -logp.sum().item(),
            "kl": _k3(logp - sampler_logp).sum().item(),
        }
        if reference_logp is not None:
            sums["kl_reference"] = to_reference.sum().item()
    return loss, sums


def _k3(log_r: torch.Tensor) -> torch.Tensor:
    """r - 1 - log r: with r = p/q and samples of q, an unbiased estimate of KL(q, p), never negative."""
    return log_r.exp() - 1 - log_r


# ------------------------------------------------------------------------------------------- update


def update(
    model,
    optimizer: torch.optim.Optimizer,
    rollouts: Sequence,
    advantages: np.ndarray,
    minibatches: int = 1,
    temperature: float = 1.0,
    max_grad_norm: float = 1.0,
    tokens_per_microbatch: int = 16384,
    seed: int = 0,
    normalizer: str | int = "token",
    reference=None,
    checkpointing: bool = False,
    bfloat16: bool | None = None,
    **loss_settings,
) -> dict[str, float | None]:
    """`minibatches` optimizer steps on one batch of rollouts; old log-probs stay fixed meanwhile.

    rollouts: R records with group, prompt_ids, response_ids, logprobs; advantages: (R,).
    Only rollouts that carry gradient are computed: with A = 0 a token's loss is 0 whatever the model
    says, so silent groups never run through the model. They still count in the token mean.
    Groups are dealt whole to minibatches of about equal tokens (a group on a border is cut).

    normalizer: what the summed loss is divided by, with T_r the tokens of rollout r:
        "token"       sum_r T_r: every token of the batch weighs the same         DAPO; the paper's
        "sequence"    R, after dividing rollout r's tokens by T_r                 GRPO as first published
        an integer L  R L, the same for every batch, say L = the length limit     Dr. GRPO
    reference: a second model to stay close to, with kl_coef > 0; a KL is nobody's zero advantage, so
        with it all rollouts are computed.
    checkpointing: keep only what enters each layer and compute the rest twice: less memory, a third
        more time. It takes the plain pass. bfloat16: see `token_logprobs`; the weights that
        the optimizer moves are float32 either way.
    loss_settings go to `clipped_loss`.

    Returns loss, grad_norm, kl (to the sampler), entropy_live (mean -log pi of the computed tokens),
    clip_low, clip_high (shares of computed tokens), kl_reference where there is one, skipped_tokens
    (share not computed), steps_skipped: a step whose loss or gradient is not finite is not taken.
    FloatingPointError on the third such in a row, also across calls: `optimizer` carries the count.
    All but the last two are None when no step was taken, as when every group was silent.
    """
    advantages = np.asarray(advantages, dtype=np.float64)
    if advantages.shape != (len(rollouts),):
        raise ValueError(f"advantages {advantages.shape} must be ({len(rollouts)},), one a rollout")
    if (reference is None) != (loss_settings.get("kl_coef", 0.0) == 0.0):
        raise ValueError("a reference model and kl_coef > 0 go together: give both or neither")
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters()):
        # 1 + 1e-6 is 1 in bfloat16: small steps would be lost.
        raise ValueError("load the model in float32: only the matrix products run in bfloat16")
    start = time.perf_counter()
    lengths = np.array([len(r.response_ids) for r in rollouts])
    live = np.flatnonzero(advantages) if reference is None else np.arange(len(rollouts))
    total, computed = int(lengths.sum()), int(lengths[live].sum())
    stats = dict.fromkeys(("loss", "grad_norm", "kl", "entropy_live", "clip_low", "clip_high"))
    stats |= {"skipped_tokens": 1 - computed / max(1, total), "steps_skipped": 0}
    if len(live) == 0:
        return stats

    # Shuffle the groups, lay their rollouts end to end, cut where each share of the tokens is reached.
    groups = np.array([rollouts[i].group for i in live])
    labels, g = np.unique(groups, return_inverse=True)
    order = live[np.argsort(np.random.default_rng(seed).permutation(len(labels))[g], kind="stable")]
    minibatches = min(minibatches, len(live))
    share = (np.cumsum(lengths[order]) - lengths[order] / 2) / computed  # middle of each, in (0, 1)
    batches = [order[(share * minibatches).astype(int) == k] for k in range(minibatches)]
    batches = [b for b in batches if len(b)]

    device = next(model.parameters()).device
    share_prompts = not checkpointing and sharing_wins(rollouts, live)

    def cut(batch) -> Iterator[list[int]]:
        return microbatches(rollouts, batch, tokens_per_microbatch, share_prompts)

    def logprobs(of, rows) -> torch.Tensor:  # (N,)
        return token_logprobs(of, [rollouts[i] for i in rows], temperature, share_prompts, bfloat16)

    def per_token(values, rows) -> torch.Tensor:  # one value a rollout -> (N,)
        return torch.tensor(np.repeat(values[rows], lengths[rows]), dtype=torch.float32, device=device)

    def sampled(rows) -> torch.Tensor:
        flat = np.concatenate([rollouts[i].logprobs for i in rows])
        return torch.tensor(flat, dtype=torch.float32, device=device)

    n_tokens, weight = total, None  # global: silent rows and other microbatches count
    if normalizer == "sequence":
        weight = total / len(rollouts) / np.maximum(lengths, 1)  # (R,): mean length / own length
    elif normalizer != "token":
        n_tokens = len(rollouts) * int(normalizer)

    # pi_old is the policy before the first step: for the first minibatch that is the policy itself.
    old: dict[tuple, torch.Tensor] = {}
    with torch.no_grad():
        for batch in batches[1:]:
            for rows in cut(batch):
                old[tuple(rows)] = logprobs(model, rows)

    sums: dict[str, float] = defaultdict(float)  # over the tokens of the steps that were taken
    norms, stepped = [], 0
    first = optimizer.param_groups[0]  # what stands here is saved with the optimizer
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        before = sums.copy()
        norm = 0.0
        for rows in cut(batch):
            with _layers_recomputed(model, checkpointing):
                logp = logprobs(model, rows)  # (N,)
            kl = {}
            if reference is not None:
                with torch.no_grad():
                    kl["reference_logp"] = logprobs(reference, rows)
            loss, diagnostics = clipped_loss(
                logp,
                old.get(tuple(rows), logp.detach()),
                per_token(advantages, rows),
                n_tokens=n_tokens / len(batches),
                sampler_logp=sampled(rows),
                token_weight=None if weight is None else per_token(weight, rows),
                **kl,
                **loss_settings,
            )
            if not math.isfinite(loss.item()):
                norm = math.nan
                break
            loss.backward()
            sums["loss"] += loss.item() / len(batches)
            for name, value in diagnostics.items():
                sums[name] += value
        norm += torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
        if math.isfinite(norm):
            optimizer.step()
            norms.append(norm)
            stepped += int(lengths[batch].sum())
            first["skipped_in_a_row"] = 0
            continue
        sums = before
        stats["steps_skipped"] += 1
        first["skipped_in_a_row"] = first.get("skipped_in_a_row", 0) + 1
        if first["skipped_in_a_row"] == 3:
            optimizer.zero_grad(set_to_none=True)
            raise FloatingPointError(
                "the loss or its gradient was not finite three steps in a row: lower the learning rate, "
                "and check the model's weights for NaN"
            )
    optimizer.zero_grad(set_to_none=True)
    if not norms:
        return stats
    if device.type == "cuda":
        torch.cuda.synchronize()  # the last step is still on its way
    stats |= {
        "loss": sums["loss"] * len(batches) / len(norms),
        "grad_norm": float(np.mean(norms)),
        "kl": sums["kl"] / stepped,
        "entropy_live": sums["nats"] / stepped,
        "clip_low": sums["clipped_low"] / stepped,
        "clip_high": sums["clipped_high"] / stepped,
        "time_tokens_per_second": computed / (time.perf_counter() - start),
    }
    if reference is not None:
        stats["kl_reference"] = sums["kl_reference"] / stepped
    return stats


@contextmanager
def _layers_recomputed(model, on: bool):
    """transformers' activation checkpointing, switched on for one forward pass. It asks for training
    mode; only the layers themselves get it, so that no dropout inside them wakes up."""
    if not on:
        yield
        return
    was = {module: module.training for module in model.modules()}
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        for module in was:
            module.training = getattr(module, "gradient_checkpointing", False)
        yield
    finally:
        model.gradient_checkpointing_disable()
        for module, training in was.items():
            module.training = training


def sharing_wins(rollouts: Sequence, rows: np.ndarray) -> bool:
    """Whether `_shared_pass` saves more tokens than its two passes and its attention mask cost."""
    prompt_of = {rollouts[i].group: len(rollouts[i].prompt_ids) for i in rows}
    repeated = sum(len(rollouts[i].prompt_ids) for i in rows)
    plain = repeated + sum(len(rollouts[i].response_ids) for i in rows)
    return repeated - sum(prompt_of.values()) > 0.1 * plain


def microbatches(
    rollouts: Sequence, rows: np.ndarray, tokens: int, share_prompts: bool = True
) -> Iterator[list[int]]:
    """Cut `rows` (indices into rollouts) into lists of about `tokens` tokens, little of it padding.

    Plain: rows of like length; at most rows x the longest. Shared: groups stay together, those with
    prompts of like length side by side; distinct prompts x the longest of them + response tokens (the
    pass slices these itself).
    """
    P = {int(i): len(rollouts[i].prompt_ids) for i in rows}
    T = {int(i): len(rollouts[i].response_ids) for i in rows}
    if not share_prompts:
        for part in _slices([P[i] + T[i] for i in P]):
            part = [int(rows[k]) for k in part]
            size = max(1, tokens // (P[part[0]] + T[part[0]]))
            yield from (part[k : k + size] for k in range(0, len(part), size))
        return
    batch: list[int] = []
    groups: set[int] = set()
    responses = 0
    for i in sorted(P, key=lambda i: (P[i], rollouts[i].group, T[i], i)):
        if batch and len(groups | {rollouts[i].group}) * P[i] + responses + T[i] > tokens:
            yield batch
            batch, groups, responses = [], set(), 0
        batch.append(i)
        groups.add(rollouts[i].group)
        responses += T[i]
    if batch:
        yield batch
