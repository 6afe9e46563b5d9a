"""GRPO for ragged groups: rewards -> advantages -> clipped loss -> a few optimizer steps.

A group is the rollouts of one prompt, of any size: `group[r]` says which one rollout r belongs to,
and that is all the raggedness there is. Tokens are kept flat, (N,), so there is no padding to mask.

    advantages = group_advantages(rewards, group)             # (R,), zero for silent groups
    stats = update(model, optimizer, rollouts, advantages)    # the model is better now

>>> import numpy as np
>>> group_advantages(np.array([1.0, 0.0, 1.0, 1.0]), np.array([7, 7, 9, 9])).round(3)
array([ 0.707, -0.707,  0.   ,  0.   ])

What the paper calls it: GRPO, with its training settings: token-mean loss and clip-higher (both DAPO's),
dual clip, truncated importance weights, no KL, no entropy bonus.

Why the token mean: every token of the batch weighs the same, so a prompt weighs in proportion to
its rollouts, and a prompt that was given 40 of them pulls on the model 5 times as hard as one that
was given 8. With a mean over each prompt first, both would pull equally, and the extra 32 rollouts
would only lower the noise of one prompt's gradient.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------ advantages


def group_advantages(rewards, group, eps: float = 1e-6, clip: float = 5.0) -> np.ndarray:
    """A_r = (reward_r - mean) / (std + eps) within each group, then clipped to +-clip.

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
    variance = np.bincount(g, centred**2) / np.maximum(n - 1, 1)
    advantages = centred / (np.sqrt(variance)[g] + eps)
    # Three rewards of 0.1 have a mean that is not quite 0.1: silence is decided on the rewards.
    first = np.zeros(len(n))
    first[g] = rewards
    mixed = np.bincount(g, rewards != first[g]) > 0
    return np.where(mixed[g], np.clip(advantages, -clip, clip), 0.0)


# --------------------------------------------------------------------------------- log-probabilities


def token_logprobs(model, rollouts: Sequence, temperature: float = 1.0) -> torch.Tensor:
    """log pi(token | prompt, tokens before it) of every response token.

    rollouts: R records with `group`, `prompt_ids`, `response_ids` (as sampled, never retokenised).
    Returns (N,) in float32 or better, N = total response tokens, rollout after rollout; gradients flow.
    temperature is the sampler's: the policy that took these actions was softmax(logits / temperature).

    **Each prompt is computed once a group.** A group of 40 rollouts repeats its prompt 40 times. So
    the distinct prompts run first, (G, P), their keys and values stay in the graph and are expanded
    over the rows, and only the responses, (R, T), run on top. Gradients flow back through the
    expansion and add up. It costs G*P + R*T tokens instead of R*(P+T).

    For models whose logits are head(hidden), as Qwen's and Llama's are; not for those that cap or
    scale them afterwards (Gemma 2, Cohere, Granite).
    """
    device = next(model.parameters()).device
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    labels = list(dict.fromkeys(r.group for r in rollouts))  # distinct groups, in order of appearance
    row_of = {label: i for i, label in enumerate(labels)}
    rows = torch.tensor([row_of[r.group] for r in rollouts], device=device)  # (R,) row of its prompt
    prompt_of = {r.group: r.prompt_ids for r in rollouts}
    prompts = [prompt_of[label] for label in labels]
    if any(tuple(r.prompt_ids) != tuple(prompt_of[r.group]) for r in rollouts):
        raise ValueError("rollouts of one group must share one prompt")

    # Prompts padded on the left, so that all of them end in the same column; positions start at 0.
    P = max(map(len, prompts))
    prompt_ids = torch.zeros(len(prompts), P, dtype=torch.long)
    prompt_mask = torch.zeros(len(prompts), P, dtype=torch.long)
    for i, ids in enumerate(prompts):
        prompt_ids[i, P - len(ids) :] = torch.tensor(ids)
        prompt_mask[i, P - len(ids) :] = 1
    prompt_ids, prompt_mask = prompt_ids.to(device), prompt_mask.to(device)
    lengths = torch.tensor([len(r.response_ids) for r in rollouts], device=device)  # (R,)
    T = int(lengths.max())
    response_ids = torch.zeros(len(rollouts), T, dtype=torch.long)
    for i, r in enumerate(rollouts):
        response_ids[i, : len(r.response_ids)] = torch.tensor(r.response_ids)
    response_ids = response_ids.to(device)

    # float32 weights; on a GPU the matrix products run in bfloat16.
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        out = decoder(
            input_ids=prompt_ids,
            attention_mask=prompt_mask,
            position_ids=(prompt_mask.cumsum(1) - 1).clamp(min=0),
            use_cache=True,
        )
        # The prompt's last column predicts the first response token.
        # index_select, not x[rows]: the backward pass of the latter adds up in no fixed order.
        hidden = out.last_hidden_state[:, -1:].index_select(0, rows)  # (R, 1, H)
        if T > 1:
            for layer in out.past_key_values.layers:
                layer.keys = layer.keys.index_select(0, rows)
                layer.values = layer.values.index_select(0, rows)
            after = prompt_mask.sum(1, keepdim=True)[rows] + torch.arange(T - 1, device=device)
            # Right padding needs no mask: the causal order hides it from every real token.
            ones = torch.ones(len(rows), T - 1, dtype=torch.long, device=device)
            out = decoder(
                input_ids=response_ids[:, :-1],
                attention_mask=torch.cat([prompt_mask[rows], ones], dim=1),
                position_ids=after,
                past_key_values=out.past_key_values,
            )
            hidden = torch.cat([hidden, out.last_hidden_state], dim=1)  # (R, T, H)
        real = torch.arange(T, device=device) < lengths[:, None]  # (R, T)
        return _logprobs_of(head, hidden[real], response_ids[real], temperature)  # (N,)


def _logprobs_of(head, hidden, targets, temperature, chunk_elements=2**25) -> torch.Tensor:
    """log softmax(head(hidden) / temperature)[targets], (N, H), (N,) -> (N,). In chunks that are
    recomputed in the backward pass: N x V floats never live at once (N = 16k, V = 152k: 10 GB)."""

    def piece(h, t):
        logits = head(h)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature  # (n, V)
        return logits.gather(1, t[:, None])[:, 0] - logits.logsumexp(1)

    n = max(1, chunk_elements // head.weight.shape[0])
    if len(hidden) <= n:
        return piece(hidden, targets)
    pieces = zip(hidden.split(n), targets.split(n), strict=True)
    return torch.cat([checkpoint(piece, h, t, use_reentrant=False) for h, t in pieces])


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
) -> tuple[torch.Tensor, dict[str, float]]:
    """The PPO-clip policy loss, summed over these tokens and divided by a *global* token count.

    logp, old_logp, advantages, sampler_logp: (N,), one a token; only logp carries a gradient.
    n_tokens: the tokens of the whole (mini)batch, also of those rows that are not here because their
    advantage is zero; so how a batch is cut into microbatches changes nothing.

        ratio  = pi_now / pi_old                                      (PPO)
        loss_t = max(-A ratio, -A clip(ratio, 1 - clip_low, 1 + clip_high))     (clip-higher: DAPO)
        loss_t = min(loss_t, -A dual_clip)  where A < 0               (dual clip)
        loss   = sum_t w_t loss_t / n_tokens,   w = min(pi_old / pi_sampler, max_importance)

    w corrects for the engine that sampled (vLLM's kernels, bfloat16) being not quite the trainer's
    policy; it is a weight, so it is detached. Returns the scalar loss and sums over tokens of
    diagnostics: clipped_low, clipped_high, kl (to the sampler: the k3 estimate r - 1 - log r).
    """
    A = advantages
    log_ratio = logp - old_logp
    ratio = log_ratio.exp()
    surrogate = torch.maximum(-A * ratio, -A * ratio.clamp(1 - clip_low, 1 + clip_high))
    surrogate = torch.where(A < 0, torch.minimum(surrogate, -A * dual_clip), surrogate)
    if sampler_logp is None:
        sampler_logp = old_logp
    weight = (old_logp - sampler_logp).exp().clamp(max=max_importance).detach()
    loss = (weight * surrogate).sum() / n_tokens

    with torch.no_grad():
        to_sampler = logp - sampler_logp
        sums = {
            # A clip acts only where it lowers what the step could still gain.
            "clipped_low": ((A < 0) & (ratio < 1 - clip_low)).sum().item(),
            "clipped_high": ((A > 0) & (ratio > 1 + clip_high)).sum().item(),
            "kl": (to_sampler.exp() - 1 - to_sampler).sum().item(),
        }
    return loss, sums


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
    **loss_settings,
) -> dict[str, float | None]:
    """`minibatches` optimizer steps on one batch of rollouts; old log-probs stay fixed meanwhile.

    rollouts: R records with group, prompt_ids, response_ids, logprobs; advantages: (R,).
    Only rollouts that carry gradient are computed: with A = 0 a token's loss is 0 whatever the model
    says, so silent groups never run through the model. They still count in the token mean.
    Groups are dealt whole to minibatches of about equal tokens (a group on a border is cut).
    loss_settings go to `clipped_loss`.

    Returns loss, grad_norm, kl, clip_low, clip_high (shares of computed tokens), skipped_tokens
    (share not computed), steps_skipped (not finite). All but the shares are None when every group was
    silent: nothing to learn, no step taken. FloatingPointError when every minibatch is not finite.
    """
    advantages = np.asarray(advantages, dtype=np.float64)
    if advantages.shape != (len(rollouts),):
        raise ValueError(f"advantages {advantages.shape} must be ({len(rollouts)},), one a rollout")
    start = time.perf_counter()
    lengths = np.array([len(r.response_ids) for r in rollouts])
    live = np.flatnonzero(advantages)
    total, computed = int(lengths.sum()), int(lengths[live].sum())
    stats = dict.fromkeys(("loss", "grad_norm", "kl", "clip_low", "clip_high"))
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

    def per_token(values, rows) -> torch.Tensor:  # one value a rollout -> (N,)
        return torch.tensor(np.repeat(values[rows], lengths[rows]), dtype=torch.float32, device=device)

    def sampled(rows) -> torch.Tensor:
        flat = np.concatenate([rollouts[i].logprobs for i in rows])
        return torch.tensor(flat, dtype=torch.float32, device=device)

    # pi_old is the policy before the first step: for the first minibatch that is the policy itself.
    old: dict[tuple, torch.Tensor] = {}
    with torch.no_grad():
        for batch in batches[1:]:
            for rows in microbatches(rollouts, batch, tokens_per_microbatch):
                old[tuple(rows)] = token_logprobs(model, [rollouts[i] for i in rows], temperature)

    sums = dict.fromkeys(("loss", "clipped_low", "clipped_high", "kl"), 0.0)
    norms = []
    for batch in batches:
        optimizer.zero_grad(set_to_none=True)
        finite = True
        for rows in microbatches(rollouts, batch, tokens_per_microbatch):
            logp = token_logprobs(model, [rollouts[i] for i in rows], temperature)  # (N,)
            loss, diagnostics = clipped_loss(
                logp,
                old.get(tuple(rows), logp.detach()),
                per_token(advantages, rows),
                n_tokens=total / len(batches),  # global: silent rows and other microbatches count
                sampler_logp=sampled(rows),
                **loss_settings,
            )
            finite = finite and bool(torch.isfinite(loss))
            if not finite:
                break
            loss.backward()
            sums["loss"] += loss.item() / len(batches)
            for name, value in diagnostics.items():
                sums[name] += value
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        if finite and bool(torch.isfinite(norm)):
            optimizer.step()
            norms.append(norm.item())
        else:
            stats["steps_skipped"] += 1
    optimizer.zero_grad(set_to_none=True)
    if not norms:
        raise FloatingPointError(
            "the loss or its gradient was not finite in every minibatch: lower the learning rate, "
            "and check the model's weights for NaN"
        )
    return stats | {
        "loss": sums["loss"],
        "grad_norm": float(np.mean(norms)),
        "kl": sums["kl"] / computed,
        "clip_low": sums["clipped_low"] / computed,
        "clip_high": sums["clipped_high"] / computed,
        "time_tokens_per_second": computed / (time.perf_counter() - start),
    }


def microbatches(rollouts: Sequence, rows: np.ndarray, tokens: int) -> Iterator[list[int]]:
    """Cut `rows` (indices into rollouts) into lists of at most `tokens` padded tokens, groups together.

    Prompts of like length share a microbatch, and so do responses; the cost of one is what
    `token_logprobs` computes: distinct prompts x longest prompt + rows x longest response.
    """
    longest: dict[int, int] = {}
    for i in rows:
        group, length = rollouts[i].group, len(rollouts[i].response_ids)
        longest[group] = max(longest.get(group, 0), length)

    def shape(i):
        r = rollouts[i]
        return longest[r.group], len(r.prompt_ids), r.group, len(r.response_ids), i

    batch: list[int] = []
    groups: set[int] = set()
    P = T = 0
    for i in sorted((int(i) for i in rows), key=shape):
        r = rollouts[i]
        new_P, new_T = max(P, len(r.prompt_ids)), max(T, len(r.response_ids))
        cost = len(groups | {r.group}) * new_P + (len(batch) + 1) * new_T
        if batch and cost > tokens:
            yield batch
            batch, groups, new_P, new_T = [], set(), len(r.prompt_ids), len(r.response_ids)
        batch.append(i)
        groups.add(r.group)
        P, T = new_P, new_T
    if batch:
        yield batch
