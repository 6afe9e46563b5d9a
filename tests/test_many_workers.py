"""tutorial/scale_out/many_workers.py against the one allocator that sees every prompt, and brute force."""

import json
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tutorial" / "scale_out"))
from bench_scale import FOLDER, balance_table, price_table
from many_workers import agree, deal

import knapsack


def posterior(m, kinds="all different", seed=0):
    """(alpha, beta), each (m,), hard prompts first."""
    rng = np.random.default_rng(seed)
    p = np.sort(rng.beta(0.5, 0.8, m))
    if kinds == "all different":
        return 0.3 + 12 * p, 0.5 + 12 * (1 - p)
    s = rng.binomial(8, p) if kinds == "nine kinds" else np.full(m, 3)  # after one epoch; all the same
    return 0.3 + s, 0.5 + 8 - s


class Workers:
    """W workers with prompts of their own, the first with the hardest; counts its rounds."""

    def __init__(self, p, w):
        parts = np.array_split(np.arange(len(p[0])), w)
        self.p, self.parts, self.rounds = p, [(p[0][i], p[1][i]) for i in parts], 0

    def demands(self, price):
        self.rounds += 1
        return np.array([knapsack.allocate_at_price(x, price).sum() for x in self.parts])

    def loss(self, budgets):
        """Of the value that one allocator over all prompts reaches, the part lost."""
        counts = [knapsack.allocate(x, int(b)) for x, b in zip(self.parts, budgets, strict=True)]
        best = knapsack.expected_value(knapsack.allocate(self.p, int(sum(budgets))), *self.p).sum()
        return 1 - knapsack.expected_value(np.concatenate(counts), *self.p).sum() / best


@pytest.mark.parametrize("kinds", ["all different", "nine kinds", "the same"])
@pytest.mark.parametrize("w", [1, 7, 16])
def test_agreed_budgets_lose_nothing(w, kinds):
    """Catches: a budget not spent to the last rollout, demand that jumps (few kinds of prompts) shared out
    to the wrong workers, a worker that gets less than n_min for each prompt or more than n_max."""
    workers = Workers(posterior(992, kinds), w)
    budget = 8 * 992 + 77
    price, budgets = agree(workers.demands, budget, 0.01)
    assert budgets.sum() == budget and len(budgets) == w
    assert abs(workers.loss(budgets)) <= 1e-5
    assert workers.rounds <= 20
    at_price = workers.demands(price)  # the dear side: all of it is bought
    assert (at_price <= budgets).all()
    if w > 1 and kinds != "the same":  # or agreeing would be pointless
        assert workers.loss(knapsack.uniform(w, budget)) > 0.01


@pytest.mark.parametrize("first_guess", [1e-9, 1e-3, 10.0])
@pytest.mark.parametrize("each", [2.1, 8, 60, 127])
def test_any_first_guess(first_guess, each):
    """Catches: a search that leaves its bracket or creeps; a next step that does not profit from this one."""
    workers = Workers(posterior(1000), 4)
    price, budgets = agree(workers.demands, int(each * 1000), first_guess)
    assert budgets.sum() == int(each * 1000)
    assert workers.rounds <= 25
    workers.rounds = 0
    agree(workers.demands, int(each * 1000), 0.9 * price)
    assert workers.rounds <= (7 if each == 8 else 15)


@pytest.mark.parametrize("each", [1, 200])
def test_budget_no_price_spends(each):
    """Catches: an endless search."""
    with pytest.raises(ValueError, match="n_min and n_max"):
        agree(Workers(posterior(64), 4).demands, each * 64, 0.01)


def test_deal_is_near_the_best():
    """Catches: unequal numbers, a worker left out, loads further apart than one long rollout."""
    rng = np.random.default_rng(0)
    for _ in range(30):
        tokens = rng.integers(1, 100, 8)
        worker = deal(tokens, 2)
        load = np.bincount(worker, tokens)
        splits = [np.array(s) for s in product([0, 1], repeat=8) if sum(s) == 4]
        best = min(np.bincount(s, tokens).max() for s in splits)
        assert np.bincount(worker).tolist() == [4, 4]
        assert best <= load.max() <= best + tokens.max() / 2


def test_deal_equal_tokens_is_round_robin_and_one_worker_gets_all():
    """Catches: rows out of order where trl_knapsack must equal plain TRL; a group heaped on one worker."""
    assert deal(np.ones(12), 3).tolist() == [0, 1, 2] * 4
    assert deal(np.random.default_rng(0).random(5), 1).tolist() == [0] * 5
    with pytest.raises(ValueError, match="equal numbers"):
        deal(np.ones(5), 2)


@pytest.mark.parametrize("name, table", [("scale", price_table), ("balance", balance_table)])
def test_the_page_quotes_what_was_measured(name, table):
    """The tables of tutorial/scale_out/README.md are those of tests/bench/bench_scale.py --out."""
    lines = list(table(json.loads((FOLDER / f"{name}.json").read_text())))
    assert len(lines) > 5
    assert "\n".join(lines) in (FOLDER / "README.md").read_text()


def test_dealt_rollouts_are_even():
    """The aim is 2% of even; the page says 0.5% in the worst batch."""
    rows = [r for r in json.loads((FOLDER / "balance.json").read_text()) if r["split"] == "deal"]
    assert len(rows) == 6 and max(r["expected_worst"] for r in rows) < 0.005
