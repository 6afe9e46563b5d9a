"""What many workers must agree on: one price, and who samples what.

    price, budgets = agree(demands, budget, price)      # demands(price): (W,) what each worker would buy
    counts = knapsack.allocate(posterior_of_my_prompts, budgets[me])
    worker = deal(expected_tokens, workers=8)           # (R,) the worker that samples each rollout

At a given price of one rollout a prompt's count depends on that prompt alone (knapsack.allocate_at_price).
So workers need not see each other's prompts: they look for the price at which all of them together spend
the budget, one number out and one number back in each round. In torch.distributed a round is

    def demands(price):
        mine = torch.tensor([knapsack.allocate_at_price(posterior_of_my_prompts, price).sum()])
        all_of_them = [torch.empty_like(mine) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(all_of_them, mine)
        return torch.cat(all_of_them).numpy()

and every rank computes the same answer. tests/bench/bench_scale.py measures both functions.
"""

import math
from collections.abc import Callable

import numpy as np


def agree(
    demands: Callable[[float], np.ndarray], budget: int, price: float, tolerance: float = 1e-3
) -> tuple[float, np.ndarray]:
    """(price, budgets): a worker that spends budgets[w] on its own prompts buys, to a hair, what it would get
    if one allocator saw all prompts. The budgets add up to `budget` exactly.

    demands    price > 0 -> (W,) rollouts that each worker buys at it; falls as the price rises
    price      > 0, the first guess: that of the step before, or a knapsack.shadow_price of one worker
    tolerance  the search ends with two prices, one too low and one too high, between which the total demand
               changes by at most tolerance x budget, or whose ratio is at most 1 + tolerance. The second
               happens where prompts are so alike that demand jumps (after a first epoch of 8 rollouts there
               are nine kinds). What lies between the two prices is worth about the same wherever it is
               bought, so each worker gets the same part of what it would buy there.
    """
    if not (price > 0 and math.isfinite(price)):
        raise ValueError(f"price = {price}: start from a number > 0, such as a knapsack.shadow_price")
    low = high = last = None  # (price, (W,) demands): the newest too cheap, too dear, and of any kind
    slope = -1.0  # of log demand against log price: a good start for the secant method
    for attempt in range(60):
        new = price, np.asarray(demands(price), np.int64)
        total = new[1].sum()
        low, high = new if total >= budget else low, new if total <= budget else high
        if low and high:
            between = low[1].sum() - high[1].sum()
            if between <= tolerance * budget or high[0] <= low[0] * (1 + tolerance):
                # In whole numbers, so that the sum is exact and nobody leaves his own two demands.
                parts = np.cumsum(low[1] - high[1]) * (budget - high[1].sum()) // max(between, 1)
                return high[0], high[1] + np.diff(parts, prepend=0)
        if last and last[1].sum() != total:
            slope = math.log(total / last[1].sum()) / math.log(price / last[0])
            slope = min(max(slope, -8.0), -0.125)  # no leap where demand is flat
        last = new
        aim = budget * (1 + math.copysign(tolerance / 3, budget - total))  # the other side, for a bracket
        step = math.log(aim / total) / slope
        if not (low and high):  # no bracket yet: at least 1%, 4%, 17%, ...
            step = math.copysign(max(abs(step), 0.01 * 4 ** min(attempt, 5)), step)
        price *= math.exp(step)
        if low and high and (attempt >= 8 or not low[0] < price < high[0]):  # a jump, or astray: bisection
            price = math.sqrt(low[0] * high[0])
    raise ValueError(f"budget = {budget}: no price spends it; choose it between n_min and n_max a prompt")


def deal(tokens, workers: int) -> np.ndarray:
    """(R,) the worker 0 .. workers-1 of each rollout: as many rollouts each, and about as many tokens.

    tokens  (R,) expected tokens of each rollout; R must be a multiple of workers

    Longest processing time first, with equal numbers: of each next-longest `workers` rollouts, the longest
    goes to the worker with the fewest tokens so far. Equal tokens: round-robin. One worker: all of them.
    """
    tokens = np.asarray(tokens, float)
    if len(tokens) % workers:
        raise ValueError(f"{len(tokens)} rollouts cannot be dealt to {workers} workers in equal numbers")
    load, worker = np.zeros(workers), np.empty(len(tokens), np.int64)
    for block in np.argsort(-tokens, kind="stable").reshape(-1, workers):
        least = np.argsort(load, kind="stable")
        worker[block] = least
        load[least] += tokens[block]
    return worker
