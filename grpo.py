"""GRPO for ragged groups: rewards -> advantages -> clipped loss -> optimizer steps.

A group is the rollouts of one prompt, however many: `group[r]` names the prompt of
rollout r. Tokens are kept flat, (N,), so there is no padding to mask.

    advantages = group_advantages(rewards, group)  # (R,), 0 in silent groups
    stats = update(model, optimizer, rollouts, advantages)

>>> group_advantages([1.0, 0.0, 1.0, 1.0], group=[7, 7, 9, 9]).round(3)
array([ 0.707, -0.707,  0.   ,  0.   ])

Each piece, and whose formula it is:

    group_advantages   (r - mean) / std: GRPO (DeepSeekMath, Sec. 4.1)
    ratio, clip        PPO's with two ends: clip-higher (DAPO, Sec. 3.1)
    dual clip          a bound where A < 0 (Ye et al. 2020)
    / n_tokens         1 / sum of |o|: token mean (DAPO, Sec. 3.3)
    silent groups      DAPO (Sec. 3.2) samples until all groups are mixed; the
                       knapsack buys fewer silent ones; `update` skips them
    importance weight  pi_trainer / pi_sampler, truncated at 2: in the paper's
                       settings, but not applied in its code; here it is
    no KL              as in DAPO (Sec. 2.3) and the paper

A token's loss is proportional to its A, so other losses are other advantages. Of M
prompts and R rollouts, T (R,) the lengths and n (R,) the size of each one's group
(chapter 5 of the tutorial runs them all, and a KL to a reference):

    GRPO's sequence mean     advantages * T.mean() / T
    a mean over each prompt  advantages * R / M / n
    Dr. GRPO, L a constant   kind="centred", advantages * T.mean() / L
    RLOO                     kind="leave-one-out"
"""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

# cuDNN's attention, torch's first choice on Hopper, plans anew for each length, and its
# gradient with a mask can be NaN (pytorch#196678).
torch.backends.cuda.enable_cudnn_sdp(False)


# ---- advantages ----
def group_advantages(rewards, group, eps=1e-6, clip=5.0, kind="scaled") -> np.ndarray:
    """How much better each rollout did than its own group, clipped to +-clip.

    rewards (R,), group (R,) labels in any order. Returns (R,) float64, exactly 0
    where all rewards of a group are equal."""
    rewards, group = np.asarray(rewards, dtype=np.float64), np.asarray(group)
    if rewards.ndim != 1 or rewards.shape != group.shape or not np.isfinite(rewards).all():
        raise ValueError("rewards and group must be (R,) each, and rewards finite")
    _, g, n = np.unique(group, return_inverse=True, return_counts=True)  # (R,), (M,)
    A = rewards - (np.bincount(g, rewards) / n)[g]  # (R,)
    others = np.maximum(n - 1, 1)  # (M,)
    if kind == "scaled":
        # GRPO: (r - mean) / std, with n - 1 as in the paper's code
        A = A / (np.sqrt(np.bincount(g, A**2) / others)[g] + eps)
    elif kind == "leave-one-out":
        # RLOO: r - mean of the others = (r - mean) n / (n - 1)
        A = A * (n / others)[g]
    elif kind != "centred":  # Dr. GRPO: r - mean
        raise ValueError(f"kind {kind!r} must be scaled, centred or leave-one-out")
    # The mean of three 0.1 is not quite 0.1, so silence is decided on the rewards.
    some = np.zeros(len(n))
    some[g] = rewards  # (M,) one reward of each group
    mixed = np.bincount(g, rewards != some[g]) > 0  # (M,)
    return np.where(mixed[g], A.clip(-clip, clip), 0.0)


# ---- log-probabilities ----
def token_logprobs(
    model, rollouts: Sequence, temperature=1.0, share_prompts=True, bfloat16=None
) -> torch.Tensor:
    """log pi(token | prompt, tokens before it) of every response token: (N,).

    rollouts: R records with `prompt_ids` and `response_ids`.
    temperature: the sampler's, whose policy is softmax(logits / temperature).
    share_prompts: run each prompt once, if the model's cache allows it.
    bfloat16: of the products, not of the weights. None: on a GPU only."""
    if model not in _CHECKED:
        check_logprobs(model, temperature)
    device = next(model.parameters()).device
    if bfloat16 is None:
        bfloat16 = device.type == "cuda"
    targets = torch.tensor([t for r in rollouts for t in r.response_ids], device=device)
    # In training mode transformers' own checkpointing drops the cache.
    drops = model.training and getattr(model, "is_gradient_checkpointing", False)
    cached = _CHECKED[model] and not drops
    run = _shared_pass if share_prompts and cached else _plain_pass
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        hidden = run(model.get_decoder(), rollouts, device)  # (N, H)
        return _head(model.get_output_embeddings(), hidden, targets, temperature)


def _padded(rows, device, side="right"):
    """Token ids and mask (1: a token), both (rows, longest)."""
    pad = partial(pad_sequence, batch_first=True, padding_side=side)
    ids = [torch.tensor(row) for row in rows]
    return pad(ids).to(device), pad([torch.ones_like(x) for x in ids]).to(device)


def _plain_pass(decoder, rollouts, device):
    """Hidden states that predict the response tokens, (N, H): a row a rollout."""
    ids, _ = _padded([(*r.prompt_ids, *r.response_ids) for r in rollouts], device)
    kinds = [[0] * len(r.prompt_ids) + [1] * len(r.response_ids) for r in rollouts]
    is_response, _ = _padded(kinds, device)  # (R, L)
    # The causal order hides padding on the right; without a mask the fastest
    # attention kernel may be taken.
    hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state  # (R, L, H)
    return hidden[:, :-1][is_response[:, 1:].bool()]  # column t predicts token t + 1


def _shared_pass(decoder, rollouts, device):
    """The same with each prompt computed once: G P + R T tokens, not R (P + T).
    Gradients flow back through the repeated keys and values."""
    prompt = [tuple(r.prompt_ids) for r in rollouts]
    row_of = {ids: i for i, ids in enumerate(dict.fromkeys(prompt))}

    # 1. The prompts, padded on the left, so that all end in the same column.
    ids, prompt_mask = _padded(list(row_of), device, side="left")  # (G, P)
    place = (prompt_mask.cumsum(1) - 1).clamp(min=0)  # padding does not count
    run = partial(decoder, use_cache=True)
    out = run(input_ids=ids, attention_mask=prompt_mask, position_ids=place)
    last, cache = out.last_hidden_state[:, -1:], out.past_key_values  # (G, 1, H)

    # 2. The responses, in slices of r rollouts of like length.
    found = {}  # rollout -> (T, H)
    T = [len(r.response_ids) for r in rollouts]
    for part in _slices(T):
        ids, mask = _padded([rollouts[i].response_ids for i in part], device)  # (r, T)
        rows = torch.tensor([row_of[prompt[i]] for i in part], device=device)  # (r,)
        # The prompt's last column predicts the first response token. (index_select:
        # on a CPU the gradient of last[rows] adds up in no fixed order.)
        hidden = last.index_select(0, rows)  # (r, 1, H)
        if ids.shape[1] > 1:
            repeated = copy.copy(cache)
            repeated.layers = [copy.copy(layer) for layer in cache.layers]
            for layer in repeated.layers:  # (G, heads, P, D) -> (r, heads, P, D)
                layer.keys = layer.keys.index_select(0, rows)
                layer.values = layer.values.index_select(0, rows)
            past = prompt_mask[rows]  # (r, P)
            both = torch.cat([past, torch.ones_like(ids[:, 1:])], dim=1)  # (r, P + T - 1)
            place = both.cumsum(1)[:, past.shape[1] :] - 1  # (r, T - 1)
            where = dict(attention_mask=both, position_ids=place)
            out = run(input_ids=ids[:, :-1], past_key_values=repeated, **where)
            hidden = torch.cat([hidden, out.last_hidden_state], dim=1)  # (r, T, H)
        found |= zip(part, hidden[mask.bool()].split([T[i] for i in part]), strict=True)
    return torch.cat([found[i] for i in range(len(rollouts))])


def _slices(lengths: Sequence[int], waste=0.05, least=256) -> Iterator[list[int]]:
    """Indices, longest first, cut where padding would exceed the share `waste`; but
    fewer than `least` tokens are not worth a pass of their own."""
    part, real = [], 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        real += lengths[i]
        padded = (len(part) + 1) * lengths[part[0] if part else i]
        if part and padded > least and real < (1 - waste) * padded:
            yield part
            part, real = [], lengths[i]
        part.append(i)
    yield part


def _head(head, hidden, targets, temperature, chunk=None):
    """log softmax(head(hidden) / temperature) at the targets: (N, H), (N,) -> (N,)."""
    # 2^28 logits are 1 GiB in float32; smaller chunks would leave a GPU idle.
    chunk = chunk or (2**28 if hidden.is_cuda else 2**25)
    n = max(1, chunk // head.weight.shape[0])
    dtype = head(hidden[:1]).dtype  # of the products: autocast's, where it is on
    inputs = [x if x is None else x.to(dtype) for x in (hidden, head.weight, head.bias)]
    return _Head.apply(*inputs, targets, temperature, n)


class _Head(torch.autograd.Function):
    """N x V logits never live at once: n rows at a time are computed, and again in the
    backward pass. At N = 4096 and V = 151,936 this peaks on a CPU at 1.4 GB, not at 7.5."""

    @staticmethod
    def log_softmax(h, weight, bias, temperature):
        logits = torch.nn.functional.linear(h, weight, bias)
        # Softmax in float32 or better, whatever the products are.
        dtype = torch.promote_types(logits.dtype, torch.float32)
        logits = logits.to(dtype).div_(temperature)
        return logits.sub_(logits.logsumexp(1, keepdim=True))  # (n, V)

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, temperature, n):
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.settings, found = (temperature, n), []
        for h, t in zip(hidden.split(n), targets.split(n), strict=True):
            log_p = _Head.log_softmax(h, weight, bias, temperature)
            found.append(log_p.gather(1, t[:, None])[:, 0])
        return torch.cat(found)

    @staticmethod
    def backward(ctx, grad):  # (N,)
        hidden, weight, bias, targets = ctx.saved_tensors
        temperature, n = ctx.settings
        to_hidden, to_weight = [], torch.zeros_like(weight, dtype=grad.dtype)
        to_bias = None if bias is None else torch.zeros_like(bias, dtype=grad.dtype)
        for h, t, g in zip(*(x.split(n) for x in (hidden, targets, grad)), strict=True):
            # d log p_target / d logits = (one-hot of the target - p) / temperature
            d = _Head.log_softmax(h, weight, bias, temperature).exp_()  # (n, V)
            d.mul_(-g[:, None]).scatter_add_(1, t[:, None], g[:, None]).div_(temperature)
            if bias is not None:
                to_bias += d.sum(0)
            d = d.to(weight.dtype)
            to_hidden.append(d @ weight)
            if weight.dtype == grad.dtype:
                to_weight.addmm_(d.T, h)  # needs no second array of its size
            else:
                to_weight += d.T @ h  # float32 sums of bfloat16 products
        return torch.cat(to_hidden), to_weight, to_bias, None, None, None


_CHECKED = WeakKeyDictionary()  # model -> whether prompts can be shared


def check_logprobs(model, temperature: float = 1.0) -> float:
    """The largest gap, in nats, between both passes and what the model itself says.

    Where a model caps or scales its logits after the head (Gemma 2, Granite), they
    would be silently wrong: ValueError above 1e-3 in float32 (rounding stays below
    1e-4), 0.04 in float16, 0.3 in bfloat16; more at a temperature below 1."""
    if not temperature > 0:
        raise ValueError(f"temperature {temperature}: must be above 0")
    unfit = f"{type(model).__name__} is not supported:"
    decoder, own = model.get_decoder(), model.get_output_embeddings
    if getattr(decoder, "get_output_embeddings", own)() is not None:
        raise ValueError(f"{unfit} its get_decoder() is not its decoder")
    V = model.get_input_embeddings().num_embeddings
    row = [(7 * i + 3) % V for i in range(16)]  # of it three rollouts:
    cuts = [(8, 16), (4, 16), (4, 7)]  # the prompt's end, the response's end
    cut = [SimpleNamespace(prompt_ids=row[:p], response_ids=row[p:e]) for p, e in cuts]
    weight, gaps, good = next(model.parameters()), [], False
    temperature = min(temperature, 1.0)  # a high one leaves only rounding
    awake = [m for m in model.modules() if m.training]
    model.eval()  # no dropout here
    try:
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            out = model(input_ids=torch.tensor([row], device=weight.device), use_cache=True)
            logp = (out.logits[0].float() / temperature).log_softmax(1)  # (L, V)
            logp = logp[range(15), row[1:]]
            truth = torch.cat([logp[p - 1 : e - 1] for p, e in cuts])  # (N,)
            # Only keys and values can be repeated, not the state of a recurrence.
            layers = getattr(out.get("past_key_values"), "layers", [None])
            plain = [hasattr(x, "keys") and not hasattr(x, "conv_states") for x in layers]
            _CHECKED[model] = all(plain)
            for share in (False, True):
                got = token_logprobs(model, cut, temperature, share, bfloat16=False)
                gaps.append((got - truth).abs().max().item())
        gap = float(np.max(gaps))  # which keeps a NaN, as max() may not
        # Dividing by a low temperature magnifies rounding, too.
        good = gap <= max(1e-3, 40 * torch.finfo(weight.dtype).eps) / temperature
    finally:  # an interruption counts as no check
        for module in awake:
            module.training = True
        if not good:
            _CHECKED.pop(model, None)
    if not good:
        why = "as where logits are capped or scaled after the head: take another model"
        raise ValueError(f"{unfit} its log-probs are {gap:.2g} nats off, {why}")
    return gap


# ---- loss ----
def clipped_loss(
    logp, old_logp, advantages, n_tokens: float, sampler_logp=None,
    clip_low=0.2, clip_high=0.28, dual_clip=10.0, max_importance=2.0,
) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
    """The PPO-clip policy loss of these tokens, and sums over them for the log.

    The tensors are (N,). n_tokens counts the whole minibatch, skipped rollouts too,
    so that a cut into microbatches changes nothing."""
    A = advantages
    ratio = (logp - old_logp).exp()  # pi_now / pi_old
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    loss = torch.maximum(-A * ratio, -A * clipped)
    # Dual clip: min(loss, -A dual_clip) where A < 0.
    loss = torch.where(A < 0, torch.minimum(loss, -A * dual_clip), loss)
    if sampler_logp is None:
        sampler_logp = old_logp
    # The sampler's kernels and precision make it another policy than the trainer's:
    # min(pi_old / pi_sampler, max_importance), a weight without a gradient.
    weight = (old_logp - sampler_logp).exp().clamp(max=max_importance).detach()
    loss = (weight * loss).sum() / n_tokens
    log_r = (logp - sampler_logp).detach()
    sums = {
        # A clip acts only where it lowers what the step could still gain.
        "clip_low": (A < 0) & (ratio < 1 - clip_low),
        "clip_high": (A > 0) & (ratio > 1 + clip_high),
        "entropy_live": -logp,
        # k3 = r - 1 - log r estimates KL(sampler, now), r = pi_now / pi_sampler.
        "kl": log_r.exp() - 1 - log_r,
    }
    return loss, {name: x.sum().item() for name, x in sums.items()}


# ---- update ----
def update(
    model, optimizer, rollouts: Sequence, advantages: np.ndarray, minibatches=1,
    temperature=1.0, max_grad_norm=1.0, tokens_per_microbatch=16384, seed=0,
    checkpointing=False, bfloat16=None, **loss_settings,
) -> dict[str, float | None]:  # fmt: skip
    """`minibatches` optimizer steps on one batch; pi_old stays fixed meanwhile.

    model: in eval mode. Dropout would make another policy of it at each pass.
    rollouts: R records with group, prompt_ids, response_ids, logprobs.
    advantages (R,): where A = 0 the loss is 0 whatever the model says. Such rollouts
    are not computed, but their tokens count in the token mean.
    checkpointing: less memory, a third more time. loss_settings: `clipped_loss`'s.

    A step whose loss or gradient is not finite is not taken. Returns steps_skipped,
    skipped_tokens (share not computed) and, None if no step was taken, loss, grad_norm
    and token means: kl (to the sampler), entropy_live (-log pi), clip_low, clip_high."""
    advantages = np.asarray(advantages, dtype=np.float64)
    if advantages.shape != (len(rollouts),):
        raise ValueError("pass one advantage a rollout")
    weight = next(model.parameters())
    if weight.dtype.itemsize < 4:  # 1 + 1e-6 is 1 in bfloat16: steps would be lost
        raise ValueError("load the model in float32; its products run in bfloat16")
    T = np.array([len(r.response_ids) for r in rollouts])  # (R,)
    if any(not 0 < len(r.response_ids) == len(r.logprobs) for r in rollouts):
        raise ValueError("a rollout needs a token, and a log-prob for each of its tokens")
    if minibatches < 1:
        raise ValueError(f"{minibatches} minibatches: must be 1 or more")
    live = np.flatnonzero(advantages)
    if model not in _CHECKED:
        check_logprobs(model, temperature)
    share = _CHECKED[model] and not checkpointing and sharing_wins(rollouts, live, weight.is_cuda)

    def logprobs(rows):  # (N,)
        some = [rollouts[i] for i in rows]
        return token_logprobs(model, some, temperature, share, bfloat16)

    def flat(values):  # (N,)
        return torch.tensor(np.concatenate(values), dtype=torch.float32).to(weight.device)

    # 1. Shuffle the groups, lay their rollouts end to end, cut where each minibatch
    # has its share of the tokens. A step is a list of microbatches.
    labels, g = np.unique([rollouts[i].group for i in live], return_inverse=True)
    place = np.random.default_rng(seed).permutation(len(labels))[g]
    order = live[np.argsort(place, kind="stable")]
    middle = (np.cumsum(T[order]) - T[order] / 2) / T[order].sum()  # in (0, 1)
    which = (middle * min(minibatches, len(live))).astype(int)
    dealt = [order[which == k] for k in np.unique(which)]
    limits = tokens_per_microbatch, share, weight.is_cuda
    steps = [list(microbatches(rollouts, x, *limits)) for x in dealt]

    # 2. pi_old is the policy before the first step, where it needs no pass (None).
    with torch.no_grad():
        old = [[logprobs(rows) if k else None for rows in x] for k, x in enumerate(steps)]

    # 3. The steps. Gradients of a step's microbatches add up.
    taken, norms = [], []
    for step, old_logps in zip(steps, old, strict=True):
        model.zero_grad(set_to_none=True)  # of weights that the optimizer leaves out, too
        log = []
        for rows, old_logp in zip(step, old_logps, strict=True):
            with _layers_recomputed(model, checkpointing):
                logp = logprobs(rows)
            if old_logp is None:
                old_logp = logp.detach()
            A = flat([np.full(T[i], advantages[i]) for i in rows])
            sampler = flat([rollouts[i].logprobs for i in rows])
            n = int(T.sum()) / len(steps)  # skipped rollouts and other microbatches count
            loss, sums = clipped_loss(logp, old_logp, A, n, sampler, **loss_settings)
            log.append(sums | {"loss": loss.item(), "tokens": len(logp)})
            loss.backward()  # last: a GPU is at it while the next microbatch is prepared
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
        if math.isfinite(norm + sum(row["loss"] for row in log)):
            optimizer.step()
            taken += log
            norms.append(norm)
    model.zero_grad(set_to_none=True)

    # 4. Means over the tokens of the steps that were taken.
    names = "loss", "grad_norm", "kl", "entropy_live", "clip_low", "clip_high"
    stats = dict.fromkeys(names) | {"steps_skipped": len(steps) - len(norms)}
    stats["skipped_tokens"] = 1 - int(T[live].sum()) / max(1, int(T.sum()))
    if norms:
        total = {name: sum(row[name] for row in taken) for name in taken[0]}
        tokens, loss = total.pop("tokens"), total.pop("loss")
        stats |= {name: value / tokens for name, value in total.items()}
        stats |= {"loss": loss / len(norms), "grad_norm": float(np.mean(norms))}
    return stats


@contextmanager
def _layers_recomputed(model, on: bool):
    """Activation checkpointing for one forward pass. transformers' own switch needs
    training mode, which wakes dropout; here each layer's `forward` is wrapped."""
    mark = "_can_checkpoint_with_cache"  # of its GradientCheckpointingLayer
    layers = [m for m in model.modules() if on and hasattr(m, mark)]
    if on and not layers:
        raise ValueError(f"{type(model).__name__} does not support checkpointing")
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def sharing_wins(rollouts, rows, gpu=False) -> bool:
    """Whether sharing prompts saves more tokens than a second pass and a mask cost."""
    # A GPU's fast attention takes no mask: tests/bench/bench_gpu.py has it 1.4 times
    # slower where 10% are saved, so it would take 37%.
    some = [rollouts[i] for i in rows]
    P = sum(len(r.prompt_ids) for r in some)
    once = sum({r.group: len(r.prompt_ids) for r in some}.values())
    enough = 0.4 if gpu else 0.1
    return P - once > enough * (P + sum(len(r.response_ids) for r in some))


def microbatches(rollouts, rows, tokens: int, share_prompts=True, gpu=False) -> Iterator[list[int]]:
    """Cut rows (indices) into lists of about `tokens` tokens, little of it padding."""
    P = {int(i): len(rollouts[i].prompt_ids) for i in rows}
    T = {int(i): len(rollouts[i].response_ids) for i in rows}
    if not share_prompts:  # rows x the longest
        # Of a 1.5B model a pass costs an H100 as much as 2,700 tokens do: rather
        # padding than a further pass.
        least = tokens if gpu else 256
        for part in _slices([P[i] + T[i] for i in P], least=least):
            part = [int(rows[k]) for k in part]
            size = max(1, tokens // (P[part[0]] + T[part[0]]))
            yield from (part[k : k + size] for k in range(0, len(part), size))
        return
    # Prompts of like length side by side, groups together: distinct prompts x the
    # longest + responses, whose padding `_shared_pass` keeps small. Of a repeated
    # prompt only keys and values are kept: in a Qwen2.5, under a twelfth of a token.
    batch, groups, responses = [], set(), 0
    for i in sorted(P, key=lambda i: (P[i], rollouts[i].group, T[i], i)):
        groups.add(rollouts[i].group)
        responses += T[i]
        repeated = (len(batch) + 1) * P[i] / 12
        if batch and len(groups) * P[i] + responses + repeated > tokens:
            yield batch
            batch, groups, responses = [], {rollouts[i].group}, T[i]
        batch.append(i)
    yield batch
