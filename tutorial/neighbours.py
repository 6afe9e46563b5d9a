"""The neighbours: other published rules for who gets rollouts, and for what silent groups teach. (Chapter 10)

    python tutorial/where_it_pays.py --rules uniform neyman spo     # trains with them

First the rules, each with its formula and source beside it, as functions of numbers: M prompts, R rollouts,
p (M,) or the pair (alpha, beta) of a posterior, q = 1 - p; counts (M,) are whole numbers from n_min to n_max
and add up to the budget.
Then how they take their places in train.py (`plug`). Two rules can be joined, as in neyman+spo: who gets
rollouts from the one, advantages from the other.
"""

import collections
import itertools
import math
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import knapsack  # noqa: E402
import reward  # noqa: E402
import train  # noqa: E402


# ---- 1. Who gets rollouts: by what is known before --------------------------------------------------------
def mean(p):
    """(M,) p itself, or the mean of its posterior."""
    return p[0] / (p[0] + p[1]) if isinstance(p, tuple) else np.asarray(p, float)


def neyman(p, budget, n_min=2, n_max=128):
    """VIP (arXiv 2602.01601), before it Neyman (1934): the least variance of the summed gradient.

    With RLOO a prompt's gradient has a variance of p q / (n - 1), times a constant. So n - 1 is
    proportional to sqrt(p q); in whole numbers, the largest falls of p q / (n - 1) are bought."""
    if n_min < 2:
        raise ValueError(f"n_min {n_min}: one rollout has no leave-one-out baseline, so take 2")
    return knapsack.allocate(p, budget, n_min, n_max, lambda n, p: -p * (1 - p) / (n - 1))


def ada_est(p, budget, n_min=2, n_max=128, power=0.5, eps=1e-3):
    """Reinforce-Ada-Est (arXiv 2510.04996, Alg. 1): n proportional to w = 1 / sqrt(p).

    For the mean of log p a prompt's gradient weighs 1 / p. Its rollouts carry sqrt(1 / p) of that, its
    advantages the rest (`ada_advantages`). power=1: all of it in the rollouts, n proportional to 1 / p.
    The sum of -w^2 / n is largest where n is proportional to w, so whole numbers are greedy, too."""
    w = (mean(p) + eps) ** -power  # (M,)
    return knapsack.allocate(w / w.max(), budget, n_min, n_max, lambda n, w: -(w**2) / n)


def hora(p, budget, n_min=2, n_max=128):
    """HORA (arXiv 2605.07114): the most prompts with at least one right answer.

    For p ~ Beta(a, b): P(n rollouts, none right) = E[q^n] = B(a, b + n) / B(a, b), the product of
    (b + j) / (a + b + j), j < n. It falls by less and less, so the greedy is exact."""
    if isinstance(p, tuple):
        a, b = (np.asarray(x, float)[:, None] for x in p)  # (M, 1)
        j = np.arange(n_max)
        wrong = (b + j) / (a + b + j)  # (M, n_max): the next one, after j wrong ones
    else:
        wrong = np.repeat(1 - np.asarray(p, float)[:, None], n_max, axis=1)
    none = np.hstack([np.ones((len(wrong), 1)), wrong.cumprod(1)])  # (M, n_max + 1): after n rollouts
    return n_min + knapsack.solve_greedy(-none[:, n_min:], spare(len(none), budget, n_min, n_max))


def coba(p, budget, n_min=2, n_max=128, failure=None, kappa=11.0):
    """CoBA-RL (arXiv 2602.03048, Eq. 5 to 9): (1 - exp(-n p q / tau)) x density of Beta(alpha, beta) at p.

    failure: mean of 1 - p. Where it is high, alpha is: easy prompts are preferred; hard ones later. The
    constants are those of the authors' code: alpha + beta = kappa = 11, alpha from 1 to kappa - 1, tau from
    3 to 12 with the variance of p, no value below p = .05 and above .99. (There failure is that of the last
    step's outcomes, and a fifth or more of what is above n_min goes to the hardest, whatever the value.)"""
    p = np.clip(mean(p), 0.01, 0.99)
    f = 1 - p.mean() if failure is None else failure
    f = f if f > 0.5 else 1 / (1 + math.exp(-10 * (f - 0.5)))
    alpha = 1 + (kappa - 2) * f
    beta, tau = kappa - alpha, 3 + 9 * min(1, p.var() / 0.1667)
    norm = math.exp(math.lgamma(kappa) - math.lgamma(alpha) - math.lgamma(beta))

    def value(n, p):
        density = norm * p ** (alpha - 1) * (1 - p) ** (beta - 1)
        return -np.expm1(-n * p * (1 - p) / tau) * density * ((p >= 0.05) & (p < 0.99))

    return knapsack.allocate(p, budget, n_min, n_max, value)


def push(n_max, p):
    """(M, n_max + 1): E sqrt(m (n - m)), m of n right, for n = 0, 1, ... n_max.

    With the scaled advantage, (r - mean) / std, the right ones' advantages add up to sqrt(m (n - m)),
    times sqrt((n - 1) / n): so hard does a group push (chapter 5). Polya's urn gives the chances of m
    for a posterior: after m right ones of n, the next one is right with (alpha + m) / (alpha + beta + n)."""
    a, b = (np.asarray(x)[:, None] for x in p) if isinstance(p, tuple) else (np.asarray(p)[:, None], None)
    chance, worth = np.ones((len(a), 1)), np.zeros((len(a), n_max + 1))
    for n in range(n_max):
        m = np.arange(n + 1)
        right = a + 0 * m if b is None else (a + m) / (a + b + n)  # (M, n + 1)
        chance = np.pad(chance * (1 - right), ((0, 0), (0, 1))) + np.pad(chance * right, ((0, 0), (1, 0)))
        m = np.arange(n + 2)
        worth[:, n + 1] = chance @ np.sqrt(m * (n + 1 - m))
    return worth


def expected_push(p, budget, n_min=2, n_max=128):
    """The largest summed push. Its gains rise before they fall, and not to 0: by dynamic programming."""
    worth = push(n_max, p)[:, n_min:]
    left = spare(len(worth), budget, n_min, n_max)
    return n_min + knapsack.solve_dp(worth, left, spend_all=True)


def spare(m, budget, n_min, n_max):
    """What is left of the budget once each of m prompts has n_min."""
    if not m * n_min <= budget <= m * n_max:
        raise ValueError(f"budget {budget}: {m} prompts take from {m * n_min} to {m * n_max}")
    return budget - m * n_min


# ---- 2. Who gets rollouts: by how the first ones came out --------------------------------------------------
# draw(prompts, counts) draws counts[i] rollouts of prompts[i] (numbers below m) and returns their rewards, an
# array a prompt. What is drawn counts. Each rule returns the rewards of all that it drew, a list a prompt.
def in_rounds(draw, m, budget, k, most, enough):
    """k rollouts at a time of each prompt, until enough(rewards) or `most`, while the budget lasts."""
    rewards = [np.zeros(0) for _ in range(m)]
    active = list(range(m))
    while active := active[: budget // k]:
        for i, new in zip(active, draw(active, [k] * len(active)), strict=True):
            rewards[i] = np.append(rewards[i], new)
        budget -= k * len(active)
        active = [i for i in active if len(rewards[i]) + k <= most and not enough(rewards[i])]
    return rewards


def ada_seq(draw, m, budget, k=4, right=2, wrong=2, most=32):
    """Reinforce-Ada-Seq (arXiv 2510.04996, Alg. 2), balanced: until so many are right and so many wrong.

    Its mean is that of all that was drawn. (The paper then keeps n of a prompt, half of them right, and
    multiplies by 1 / p; ragged groups need no such step: what is drawn more often weighs more.)"""
    return in_rounds(draw, m, budget, k, most, lambda r: r.sum() >= right and (1 - r).sum() >= wrong)


def ar3po(draw, m, budget, k=4, stages=4):
    """AR3PO (arXiv 2509.25808): stages of k rollouts; a prompt with a right one has no further stage."""
    return in_rounds(draw, m, budget, k, k * stages, lambda r: r.any())


def hora_staged(draw, m, budget, n_max=128, probe=4):
    """HORA as published: `probe` rollouts each, then Beta(1 + right, 1 + wrong) says who gets the rest."""
    first = draw(range(m), [probe] * m)
    right = np.array([r.sum() for r in first])
    more = hora((1 + right, 1 + probe - right), budget - probe * m, 0, n_max - probe)
    rest = dict(zip(np.flatnonzero(more), draw(np.flatnonzero(more), more[more > 0]), strict=True))
    return [np.append(r, rest.get(i, [])) for i, r in enumerate(first)]


def dapo(batches, keep):
    """DAPO's dynamic sampling (arXiv 2503.14476, Sec. 3.2): the first `keep` mixed groups, [(batch, label)].

    batches: what was drawn so far, (rewards, group) each. None: too few are mixed, so draw another batch."""
    mixed = [
        (b, int(g))
        for b, (rewards, group) in enumerate(batches)
        for g in np.unique(group)
        if np.ptp(rewards[group == g]) > 0
    ]
    return mixed[:keep] if len(mixed) >= keep else None


# ---- 3. What a group teaches: advantages -------------------------------------------------------------------
# rewards (R,) of 0 and 1, group (R,) from 0 to M - 1 -> advantages (R,)
def group_mean(rewards, group):
    """(R,) the mean reward of each one's group."""
    return (np.bincount(group, rewards) / np.maximum(np.bincount(group), 1))[group]


def standardised(x):
    return (x - x.mean()) / (x.std() + 1e-8)


def spo(rewards, group, value):
    """SPO (arXiv 2509.13232): A = r - value, made to mean 0 and standard deviation 1 over the batch.

    value (M,): the tracker's posterior means before the step. Groups may have one rollout."""
    return standardised(rewards - value[group])


def mapo(rewards, group):
    """MAPO (arXiv 2509.18849, Eq. 6): (1 - L) (r - mean) / std + L (r - mean) / mean, L = 1 - 4 p q.

    p is the group's mean; for rewards of 0 and 1 std = sqrt(p q)."""
    p = group_mean(rewards, group)
    pq = p * (1 - p)
    A = 4 * pq * (rewards - p) / np.sqrt(np.maximum(pq, 1e-12))
    A += (1 - 4 * pq) * (rewards - p) / np.maximum(p, 1e-12)
    return np.where(pq > 0, A, 0.0)


def dcpo(rewards, group, right, trials, visit):
    """DCPO (arXiv 2509.02333, Eq. 5 to 7): this step's standardisation mixed with that of all visits.

    right, trials (M,): of earlier visits. visit (M,): i = 1, 2, ... From the second visit on a group that
    is silent now still has A = all / i, if it was not silent before."""

    def scaled(p):
        pq = p * (1 - p)
        return np.where(pq > 1e-12, (rewards - p) / np.sqrt(np.maximum(pq, 1e-12)), 0.0)

    now = scaled(group_mean(rewards, group))
    n, s = (np.bincount(group, x, minlength=len(trials)) for x in (None, rewards))
    all_visits = scaled(((right + s) / np.maximum(trials + n, 1))[group])
    i = np.asarray(visit)[group]
    mostly_now = (i - 1) / i * now + all_visits / i
    mostly_all = now / i + (i - 1) / i * all_visits
    return np.where(np.abs(mostly_now) < np.abs(mostly_all), mostly_now, mostly_all)


def dcpo_clip(old_p, low=0.16, high=0.2):
    """DCPO's clip range of a ratio (Eq. 4): |r - 1| p_new <= epsilon, so rare tokens may move further.

    old_p: torch tensor of the tokens' old probabilities. Returns (lowest, highest); highest <= 10."""
    lowest = 0.5 + 0.5 * (1 - 4 * low / old_p).clamp(min=0).sqrt()
    return lowest, (0.5 + 0.5 * (1 + 4 * high / old_p).sqrt()).clamp(max=10)


def copo(local, rewards, group, answers, gamma=5.0, rho=1.0):
    """COPO (arXiv 2508.04138): w local + (1 - w) global, w = sigmoid(gamma (H - rho)).

    local (R,): the group's own advantages. global: the prompts' mean rewards, standardised over the batch,
    the same for all rollouts of a prompt. H: entropy of a group's final answers, in bits. gamma and rho are
    those of the authors' code (soft-with-zero), and so is w = 0 for a wrong answer."""
    answers = np.asarray(answers)
    group = np.unique(group, return_inverse=True)[1]  # 0, 1, ... without a gap
    H = np.zeros(group.max() + 1)  # (M,)
    for g in range(len(H)):
        share = np.unique(answers[group == g], return_counts=True)[1] / (group == g).sum()
        H[g] = -(share * np.log2(share)).sum()
    w = (rewards > 0) / (1 + np.exp(-gamma * (H - rho)))[group]
    means = np.bincount(group, rewards) / np.bincount(group)  # (M,)
    return w * local + (1 - w) * standardised(means)[group]


def ada_advantages(rewards, group, power=0.5, eps=1e-3):
    """Reinforce-Ada's (Alg. 1 with power 1/2, Alg. 2 with 0): (r - mean) / mean^power."""
    p = group_mean(rewards, group)
    return (rewards - p) * (p + eps) ** -power


def ar3po_advantages(scale, rewards, group, stored):
    """AR3PO's reuse, option II: in a group that is all wrong, the last one is replaced by a stored right one.

    stored (M,): is there one? scale(rewards, group): GRPO's advantages. The stored answer is not learned
    from: it has A = 0, the wrong ones beside it what they would have beside a right one."""
    right = np.bincount(group, rewards)
    last = np.append(group[1:] != group[:-1], True)  # groups lie one after the other
    reused = last & (right == 0)[group] & np.asarray(stored)[group]
    return np.where(reused, 0.0, scale(np.where(reused, 1.0, rewards), group))


# ---- 4. ETTRL's first half: no answers needed --------------------------------------------------------------
def final_answer(text):
    """The last number of a text, or the text."""
    found = reward.NUMBER.findall(text)
    return found[-1] if found else text.strip()


def majority(tasks, texts):
    """TTRL's reward, on which ETTRL (arXiv 2508.11356) builds: 1 for the most frequent answer of the group.

    python train.py --reward tutorial/neighbours.py:majority"""
    votes = collections.defaultdict(collections.Counter)
    answers = [final_answer(text) for text in texts]
    for task, answer in zip(tasks, answers, strict=True):
        votes[task.id][answer] += 1
    best = {i: v.most_common(1)[0][0] for i, v in votes.items()}  # of equal ones the first
    return [float(answer == best[task.id]) for task, answer in zip(tasks, answers, strict=True)]


# ---- 5. Their places in train.py ---------------------------------------------------------------------------
# Rules that know before: functions (tracker, ids, config) -> counts, as in train.ALLOCATORS.
def by(rule):
    return lambda tracker, ids, c: rule(tracker.posterior(ids), c.budget, c.n_min, c.n_max)


ALLOCATIONS = {"neyman": by(neyman), "ada-est": by(ada_est), "ada-1/p": by(partial(ada_est, power=1.0))}
ALLOCATIONS |= {"hora": by(hora), "coba": by(coba), "push": by(expected_push)}


# Rules that look at outcomes: functions (draw, m, config). The first round takes at most half of the budget,
# and at most four rollouts of a prompt.
def first_round(m, c):
    return max(1, min(4, c.budget // m // 2))


DRAWS = {
    "ada-seq": lambda draw, m, c: ada_seq(draw, m, c.budget, first_round(m, c)),
    "ar3po": lambda draw, m, c: ar3po(draw, m, c.budget, first_round(m, c)),
    "hora-staged": lambda draw, m, c: hora_staged(draw, m, c.budget, c.n_max, first_round(m, c)),
}


# Advantages: functions (seen, plain, rewards, group). seen: what `watch` saw; plain: grpo.group_advantages.
def dcpo_with_memory():
    past = collections.defaultdict(lambda: np.zeros(3))  # id -> right, trials, visits

    def advantages(seen, plain, rewards, group):
        right, trials, visits = np.array([past[i] for i in seen.ids]).T
        A = dcpo(rewards, group, right, trials, visits + 1)
        for g, i in enumerate(seen.ids):
            here = group == g
            past[i] = past[i] + (rewards[here].sum(), here.sum(), here.any())
        return A

    return advantages


def copo_of(seen, plain, rewards, group):
    answers = [final_answer(r.text) for r in seen.rollouts]
    return copo(plain(rewards, group), rewards, group, answers)


ADVANTAGES = {
    "spo": lambda seen, plain, rewards, group: spo(rewards, group, seen.p),
    "mapo": lambda seen, plain, rewards, group: mapo(rewards, group),
    "copo": copo_of,
    "ada-est": lambda seen, plain, rewards, group: ada_advantages(rewards, group),
    "ada-1/p": lambda seen, plain, rewards, group: ada_advantages(rewards, group, power=0),
    "ada-seq": lambda seen, plain, rewards, group: ada_advantages(rewards, group, power=0),
    "ar3po": lambda seen, plain, rewards, group: ar3po_advantages(plain, rewards, group, seen.solved),
}
ADVANTAGES["spo-1"] = ADVANTAGES["spo"]  # groups of one
FRESH_ADVANTAGES = {"dcpo": dcpo_with_memory}
FLAGS = {"spo-1": "--prompts {budget} --n-min 1"}  # of train.py
SILENT_TEACH = ("spo", "spo-1", "copo", "dcpo", "ar3po")
OTHER = ("uniform", "paper", "knapsack", "dapo")
RULES = [*OTHER, *dict.fromkeys([*ALLOCATIONS, *DRAWS, *ADVANTAGES, *FRESH_ADVANTAGES])]


def watch():
    """From now on a run's parts and its rollouts are seen; `handed` takes the place of the next sample."""
    seen = SimpleNamespace(run=None, ids=[], p=None, solved=None, rollouts=[], handed=None)
    plain = train.set_up

    def set_up(*args):
        seen.run = plain(*args)
        seen.sample = seen.run.sampler.sample

        def sample(prompts, counts, seed):
            if seen.handed is None:
                seen.rollouts = seen.sample(prompts, counts, seed)
            else:
                time.sleep(0.001)  # the loop divides by the time that sampling took
                seen.rollouts, seen.handed = seen.handed, None
            return seen.rollouts

        seen.run.sampler.sample = sample
        return seen.run

    train.set_up = set_up
    return seen


def drawing(seen, rule):
    """An allocator that samples already: the loop's own sampling is then handed what was drawn."""
    seeds = itertools.count(500_000)  # no step's own seed

    def allocate(tracker, ids, c):
        task, drawn = {t.id: t for t in seen.run.train_tasks}, []

        def draw(prompts, counts):
            asked = [seen.run.prompts[ids[i]] for i in prompts]
            got = seen.sample(asked, counts, train.step_seed(c.seed, next(seeds)))
            got = [replace(r, group=int(prompts[r.group])) for r in got]
            rewards = reward.grade(seen.run.judge, [task[ids[r.group]] for r in got], [r.text for r in got])
            drawn.extend(got)
            group = np.array([r.group for r in got])
            return [rewards[group == i] for i in prompts]

        rule(draw, len(ids), c)
        seen.handed = sorted(drawn, key=lambda r: r.group)
        return np.bincount([r.group for r in drawn], minlength=len(ids))

    return allocate


def dapo_updates(seen):
    """grpo.update waits for as many mixed groups as a step has prompts; the model stays what it was."""
    import grpo

    plain, held = grpo.update, []

    def update(model, optimizer, rollouts, advantages, *rest, **more):
        held.append((rollouts, advantages))
        labels = [np.array([r.group for r in rollouts]) for rollouts, _ in held]
        drawn = [(A, g) for (_, A), g in zip(held, labels, strict=True)]
        kept = dapo(drawn, seen.run.config.prompts)
        if kept is None:
            none = dict.fromkeys(("loss", "grad_norm", "kl", "entropy_live", "clip_low", "clip_high"))
            return none | {"steps_skipped": 0, "skipped_tokens": 1.0}
        new = {key: label for label, key in enumerate(kept)}
        chosen = [
            (replace(r, group=new[b, r.group]), a)
            for b, (rollouts, A) in enumerate(held)
            for r, a in zip(rollouts, A, strict=True)
            if (b, r.group) in new
        ]
        held.clear()
        used, A = zip(*chosen, strict=True)
        return plain(model, optimizer, used, np.array(A), *rest, **more)

    grpo.update = update


def dcpo_losses():
    """grpo.clipped_loss with DCPO's clip range in place of its own."""
    import grpo

    plain = grpo.clipped_loss

    def clipped_loss(logp, old_logp, *rest, clip_low=None, clip_high=None, **more):
        lowest, highest = dcpo_clip(old_logp.exp())
        return plain(logp, old_logp, *rest, clip_low=1 - lowest, clip_high=highest - 1, **more)

    grpo.clipped_loss = clipped_loss


def plug(name):
    """Makes `--allocator name` that rule, or those joined by +. Returns what is seen of the run."""
    import grpo

    seen, allocate, plain = watch(), train.ALLOCATORS["uniform"], grpo.group_advantages
    for part in name.split("+"):
        if part not in RULES:
            raise ValueError(f"no rule {part!r}: choose from {', '.join(RULES)}")
        if part in train.ALLOCATORS | ALLOCATIONS:
            allocate = (train.ALLOCATORS | ALLOCATIONS)[part]
        elif part in DRAWS:
            allocate = drawing(seen, DRAWS[part])
        if part in ADVANTAGES | FRESH_ADVANTAGES:
            rule = ADVANTAGES.get(part) or FRESH_ADVANTAGES[part]()
            grpo.group_advantages = partial(rule, seen, plain)
        if part in SILENT_TEACH:
            train.PATIENCE = sys.maxsize  # a run without mixed groups goes on
        if part == "dcpo":
            dcpo_losses()
        elif part == "dapo":
            dapo_updates(seen)

    def seen_too(tracker, ids, c):
        seen.ids, seen.p, seen.solved = ids, tracker.estimate(ids), tracker.solved(ids)
        return allocate(tracker, ids, c)

    train.ALLOCATORS[name] = seen_too
    return seen
