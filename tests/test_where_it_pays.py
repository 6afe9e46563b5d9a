"""The scripts that compare estimates and say where allocation pays: oracles, and recorded rows."""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tutorial"))
import compare_estimates as estimates  # noqa: E402
import neighbours  # noqa: E402
import where_it_pays  # noqa: E402
from classic_control import report  # noqa: E402

import evaluate  # noqa: E402
import grpo  # noqa: E402
import knapsack  # noqa: E402
import reward  # noqa: E402
import rollout  # noqa: E402
import train  # noqa: E402

RESULTS = ROOT / "tutorial" / "results"
TINY = estimates.of_run(RESULTS / "tiny-knapsack-seed0" / "groups.jsonl")


# ---- estimates -----------------------------------------------------------------------------------------
def test_log_score_is_the_integral():
    """Against the integral over p on a fine grid. Catches: successes and failures exchanged, a rising
    factorial one factor too long, a binomial coefficient that makes large groups look unlikely."""
    alpha, beta = np.array([0.7, 2.0, 5.5]), np.array([1.3, 2.0, 0.9])
    s, t = np.array([0, 3, 8]), np.array([4, 8, 8])
    p = (np.arange(400_000) + 0.5)[:, None] / 400_000
    density = p ** (alpha - 1) * (1 - p) ** (beta - 1)
    expected = np.log((density * p**s * (1 - p) ** (t - s)).sum(0) / density.sum(0))
    np.testing.assert_allclose(estimates.log_score(alpha, beta, s, t), expected, atol=2e-3)


def test_the_truth_scores_best():
    """A score that another distribution than the true one could win would mean nothing."""
    rng, p = np.random.default_rng(0), np.full(20_000, 0.3)
    s = rng.binomial(8, p)
    found = {
        q: estimates.log_score(1e6 * q * p / p, 1e6 * (1 - q) * p / p, s, 8 + 0 * s).mean()
        for q in (0.2, 0.3, 0.4)
    }
    assert max(found, key=found.get) == 0.3


def test_fitted_follows_a_model_that_learns():
    """Everybody's log-odds rise by .1 a step. Catches: a gain of the wrong sign or one that dies."""
    rng, start = np.random.default_rng(0), np.random.default_rng(1).normal(-2, 1.5, 200)
    trackers = {"still": knapsack.SuccessTracker(drift=0), "fitted": estimates.Fitted(0.75, 1, 0)}
    error = {name: [] for name in trackers}
    for step in range(40):
        ids = np.arange(200)[step % 4 :: 4]
        p = 1 / (1 + np.exp(-start[ids] - 0.1 * step))
        s = rng.binomial(8, p)
        for name, tracker in trackers.items():
            error[name].append(np.mean(tracker.estimate(ids) - p))
            tracker.update(ids, s, np.full(50, 8))
    late = {name: abs(np.mean(x[8:])) for name, x in error.items()}
    assert late["fitted"] < late["still"] / 4


def test_changed_posteriors():
    """Catches: a variant that is the default under another name."""
    base, ids = knapsack.SuccessTracker(), ["a", "b", "new"]
    known = {i: np.array([1, x, x**2]) for i, x in {"a": 0.65, "b": 1.5, "new": 1.25}.items()}
    estimates.ByLength.features = known
    kinds = [estimates.Window(), estimates.Aging(), estimates.DiscountFirst(), estimates.ByLength()]
    for step in range(6):
        for tracker in (base, *kinds):
            tracker.update(ids[:2] if step % 2 else ids[:1], [7, 1][: 1 + step % 2], [8, 8][: 1 + step % 2])
    for tracker in kinds:
        alpha, beta = tracker.posterior(ids)
        assert (alpha > 0).all() and (beta > 0).all()
        assert not np.allclose(alpha, base.posterior(ids)[0])
    # At once discounted, a record weighs its discount.
    one = estimates.DiscountFirst(0.5, 1, 0)
    one.update(["a"], [8], [8])
    alpha0, beta0 = one.prior()
    np.testing.assert_allclose(one.posterior(["a"]), ([alpha0 + 4], [beta0]))


def test_recorded_estimates():
    """Catches: a table that is not of the recorded runs, a default that is not the script's, a variant that
    forgets the shift."""
    found = json.loads((RESULTS / "estimates.json").read_text())["tiny-knapsack-seed0"]
    base = estimates.replay(knapsack.SuccessTracker(), TINY)
    assert found["rollouts"] == base[:, 1].sum()
    for name in (estimates.DEFAULT, "the paper's window", "drift fitted online", "aging", "discount first"):
        row = estimates.compare(estimates.replay(estimates.ESTIMATORS[name](), TINY), base)
        assert found[name] == pytest.approx(row, abs=2e-4), name


# ---- where it pays -------------------------------------------------------------------------------------
@pytest.mark.parametrize("bed", where_it_pays.BEDS)
def test_final_problems_are_fresh(bed, tmp_path):
    """Catches: problems of the last examination among those that were trained on; other lengths."""
    known = {t.prompt: t.answer for t in reward.load_tasks(where_it_pays.tasks_of(bed, tmp_path))}
    if bed == "sums":  # the same recipe as train.py's own tasks
        assert {t.prompt for t in where_it_pays.problems("sums", 1280, seed=0)} == known.keys()
    trained, held_out, n, often = where_it_pays.BEDS[bed]["problems"]
    fresh = where_it_pays.problems(bed, n, seed=1, known=known)
    assert len(known) == trained > held_out and often <= n
    assert len({t.prompt for t in fresh} - known.keys()) == n
    lengths = set()
    for prompt, answer in [*known.items(), *((t.prompt, t.answer) for t in fresh)]:
        digits = [int(x) for x in prompt.splitlines()[-1].strip("= ").split("+")]
        assert sum(digits) == int(answer)
        lengths.add(len(digits))
    assert lengths == set(range(2, 1 + where_it_pays.BEDS[bed].get("digits", 2)))


def test_a_first_look_sees_every_problem_once(monkeypatch):
    """Catches: problems that are skipped or met twice where the first epoch ends."""
    monkeypatch.setattr(train, "batch_of", train.batch_of)
    where_it_pays.widen(4, epochs=1)
    c, tasks = train.Config(), list(range(1024))
    first = [train.batch_of(tasks, step, c) for step in range(1, 5)]
    second = [train.batch_of(tasks, step, c) for step in range(5, 21)]
    for epoch in (first, second):
        assert sorted(i for batch in epoch for i in batch) == tasks
    assert {len(b) for b in first} == {256} and {len(b) for b in second} == {64}


# A tracker that has seen each of m prompts twice.
def tracker_of(rng, m):
    tracker = knapsack.SuccessTracker()
    s = rng.binomial(4, rng.random(m))
    for _ in range(2):
        tracker.update(list(range(m)), s, np.full(m, 4))
    return tracker


@pytest.mark.parametrize("seed", range(6))
def test_a_choice_is_the_exact_knapsack(seed, monkeypatch):
    """Against the DP with costs 0, 2, 3, ... Catches: a first rollout bought without its second; what is
    left over given to nobody."""
    monkeypatch.setattr(train, "batch_of", train.batch_of)
    rng, c = np.random.default_rng(seed), train.Config(budget=23 + seed, n_max=9)
    tracker, ids, n = tracker_of(rng, 10), [*range(10), *range(100, 106)], np.array([0, *range(2, 10)])
    counts = where_it_pays.choose()(tracker, ids, c)
    assert counts.sum() == c.budget and 1 not in counts and counts.max() <= c.n_max
    values = knapsack.expected_value(n, *(x[:, None] for x in tracker.posterior(ids)))  # (M, 9)
    best = knapsack.solve_dp(values, c.budget, n)
    total = [values[np.arange(16), k].sum() for k in (np.searchsorted(n, counts), best)]
    next_best = np.diff(knapsack.expected_value(np.arange(10)[:, None], *tracker.posterior(ids)), axis=0)
    assert total[1] - next_best[2].max() <= total[0] <= total[1] + 1e-6


def test_a_choice_among_equals(monkeypatch):
    """Catches: unseen prompts that get one rollout each, which is worth nothing."""
    monkeypatch.setattr(train, "batch_of", train.batch_of)
    new, allocate = knapsack.SuccessTracker(), where_it_pays.choose()
    counts = allocate(new, list(range(256)), train.Config(budget=203))
    assert counts.sum() == 203 and set(counts) == {0, 2, 3}
    # Where two have all that they may have, the one that is left over goes to a third.
    new.update(range(3), [200, 200, 0], [400, 400, 400])
    counts = allocate(new, list(range(3)), train.Config(budget=17, n_max=8))
    assert counts.tolist() == [8, 8, 1]
    tasks = list(range(1024))
    batches = [train.batch_of(tasks, step, train.Config()) for step in range(1, 9)]
    for epoch in (batches[:4], batches[4:]):
        assert sorted(i for batch in epoch for i in batch) == tasks


def test_a_warm_start(tmp_path):
    """Catches: more than the first epoch handed over, or nothing."""
    job = dict(zip(where_it_pays.KEY, ("long", "warm start", 2, 8, 2e-4, 0, 100, "cpu"), strict=True))
    with pytest.raises(ValueError, match="run uniform on seed 3"):
        where_it_pays.warm(job, tmp_path)
    batches = (["a", "b"], ["c", "d"], ["b", "a"])  # the third one begins the second epoch
    steps = [{"ids": ids, "successes": [3, 0], "counts": [4, 4]} for ids in batches]
    path = tmp_path / (where_it_pays.slug_of(job | {"rule": "uniform", "seed": 3}) + ".groups.jsonl")
    path.write_text("".join(json.dumps(g) + "\n" for g in steps))
    tracker, twin = knapsack.SuccessTracker(), knapsack.SuccessTracker()
    c = train.Config(budget=40)
    rule = where_it_pays.warm(job, tmp_path)
    counts = [rule(tracker, ["a", "d"], c) for _ in range(2)]  # it is handed over once
    for g in steps[:2]:
        twin.update(g["ids"], g["successes"], g["counts"])
    assert np.array_equal(counts, 2 * [knapsack.allocate(twin.posterior(["a", "d"]), 40)])


def test_every_prompt_weighs_the_same(monkeypatch):
    """Catches: a mean over each prompt that changes groups of one size, or the size of the whole."""
    monkeypatch.setattr(grpo, "group_advantages", grpo.group_advantages)
    plain = grpo.group_advantages
    where_it_pays.prompt_mean()
    even, ragged = np.repeat([0, 3], 4), np.array([0, 0, 3, 3, 3, 3, 3, 3])
    rewards = np.array([0, 1, 0, 1, 1, 0, 1, 0.0])
    assert np.allclose(grpo.group_advantages(rewards, even), plain(rewards, even))
    ratio = grpo.group_advantages(rewards, ragged) / plain(rewards, ragged)
    assert np.allclose(ratio, [2, 2, *[2 / 3] * 6])


@pytest.mark.slow
@pytest.mark.parametrize("rule", where_it_pays.RULES)
def test_rules_run(rule, monkeypatch, tmp_path):
    """Catches: a rule that no longer fits train.py; one that gives away more than the budget."""
    from transformers.integrations import sdpa_attention

    for name in ("set_up", "batch_of", "make_optimizer"):
        monkeypatch.setattr(train, name, getattr(train, name))
    monkeypatch.setattr(knapsack, "SuccessTracker", knapsack.SuccessTracker)
    monkeypatch.setattr(grpo, "group_advantages", grpo.group_advantages)
    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    monkeypatch.setattr(train, "ALLOCATORS", dict(train.ALLOCATORS))
    monkeypatch.setattr(rollout.HFSampler, "tokens_in_flight", rollout.HFSampler.tokens_in_flight)
    monkeypatch.setattr(where_it_pays, "final", lambda *_: {})
    no_evaluation = {"eval_success": 0.0, "eval_success_se": 0.0}  # which takes most of the time
    monkeypatch.setattr(train, "held_out_success", lambda *_: no_evaluation)
    job = dict(zip(where_it_pays.KEY, ("sums", rule, 16, 130, 1e-4, 0, 2, "cpu"), strict=True))
    other = tmp_path / (where_it_pays.slug_of(job | {"rule": "uniform", "seed": 3}) + ".groups.jsonl")
    other.write_text(json.dumps({"ids": ["x"], "successes": [1], "counts": [4]}) + "\n")
    row = where_it_pays.one(tmp_path, job)
    assert row["stopped"] is None and row["spent"] <= 260
    assert rule.startswith("saving") or row["spent"] == 260
    groups = list(evaluate.each_row(tmp_path / f"{where_it_pays.slug_of(job)}.groups.jsonl"))
    assert all(1 not in g["counts"] for g in groups)
    made = train.make_optimizer("adamw", torch.nn.Linear(2, 2), 1e-4)
    assert type(made).__name__ == ("SGD" if rule.endswith("SGD") else "AdamW")
    wide = {"choice among 256": 64, "cheap first look": 64}
    assert {len(g["ids"]) for g in groups} == {wide.get(rule, 16)}


@pytest.mark.parametrize("end, kept", [(train.BLOWN_UP, True), ("No space left on device", False)])
def test_ends_of_runs(end, kept, monkeypatch, tmp_path):
    """Catches: a full disk that becomes a row, and is never made up for."""

    def main(words):
        raise SystemExit(f"train.py: stopped: {end}")

    def groups_of(folder):
        folder.mkdir()
        (folder / "groups.jsonl").touch()
        return {}

    for owner, name in ((train, "set_up"), (rollout.HFSampler, "tokens_in_flight")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(train, "ALLOCATORS", dict(train.ALLOCATORS))
    monkeypatch.setattr(train, "main", main)
    monkeypatch.setattr(where_it_pays, "share_keys", lambda: None)
    monkeypatch.setattr(where_it_pays, "summary", groups_of)
    job = dict(zip(where_it_pays.KEY, ("sums", "uniform", 16, 130, 1e-4, 100, 2, "cpu"), strict=True))
    if kept:
        assert end in where_it_pays.one(tmp_path, job)["stopped"]
    else:
        with pytest.raises(SystemExit, match=end):
            where_it_pays.one(tmp_path, job)


def test_names_of_runs():
    """Catches: a rule whose name makes no file name, as ada-1/p; two runs with the same one."""
    rules = {*where_it_pays.RULES, *neighbours.RULES}  # some are in both
    jobs = [
        dict(zip(where_it_pays.KEY, ("long", r, 64, 203, 1e-4, 0, 100, "cpu"), strict=True)) for r in rules
    ]
    slugs = {where_it_pays.slug_of(job) for job in jobs}
    assert len(slugs) == len(jobs) and all(Path(slug).name == slug for slug in slugs)


def test_rows_are_runs():
    """Catches: a run recorded twice; a row of a rule that the script does not know."""
    rows = where_it_pays.load()
    keys = [tuple(row[name] for name in where_it_pays.KEY) for row in rows]
    assert len(keys) == len(set(keys)) > 0
    for row in rows:
        assert where_it_pays.rule_name(row["rule"]) and row["bed"] in where_it_pays.BEDS
        full = row["budget"] * row["steps"]
        if row["rule"].startswith("saving"):
            assert row["spent"] < full
        elif not row.get("stopped"):
            assert abs(row["spent"] - full) <= row["budget"] / 2
        assert row["curve"][-1][0] >= row["steps"]
        if row["seed"] < where_it_pays.TUNING:
            assert row["pass1"] <= row["pass4"]


def made_up(rule, seed, level, lr=2e-4, prompts=64):
    """A run that has the half of its end at half time."""
    curve = [[0, 0.1, 0.01, 0], [50, level / 2, 0.01, 10_150], [100, level, 0.01, 20_300]]
    row = dict(zip(where_it_pays.KEY, ("long", rule, prompts, 203, lr, seed, 100, "cpu"), strict=True))
    row |= {"spent": 20_300, "effective_rollouts": 0.4, "effective_prompts": 0.3}
    return row | {"curve": curve, "pass1": level, "pass4": level, "pass16": level}


@pytest.fixture
def recorded(monkeypatch, tmp_path):
    monkeypatch.setattr(where_it_pays, "RESULTS", tmp_path / "rows.jsonl")

    def record(rows):
        where_it_pays.RESULTS.write_text("".join(json.dumps(row) + "\n" for row in rows))

    return record


def test_devices_are_not_mixed(recorded):
    """Catches: a GPU's runs among a CPU's, or paired with them."""
    rows = [made_up("uniform", s, 0.5) for s in range(3)]
    rows += [made_up("uniform", s, 0.6) | {"device": "cuda"} for s in range(4)]
    rows += [made_up("knapsack", s, 0.7) | {"device": "cuda"} for s in range(4)]
    del rows[0]["device"]  # as in older rows
    recorded(rows)
    few = dict(bed="long", budget=203)
    assert [r["pass1"] for r in where_it_pays.runs("uniform", **few)] == [0.5] * 3
    with pytest.raises(ValueError, match="name one, device="):
        where_it_pays.differences("knapsack", **few)
    assert np.allclose(where_it_pays.differences("knapsack", device="cuda", **few), [0.1] * 4)


def test_tables(recorded):
    """Rows made up. Catches: seeds paired wrongly; runs of another rate, or that chose it, among those that
    are compared; a table without its correction."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 0.05, 8)
    rows = [made_up("uniform", s, 0.8 + noise[s]) for s in range(8)]
    rows += [made_up("spo", s, 0.84 + noise[s] + rng.normal(0, 0.01)) for s in reversed(range(8))]
    rows += [made_up("mapo", s, 0.8 + noise[s] + rng.normal(0, 0.01)) for s in range(4)]
    other = [made_up("spo", 100, 0.1), made_up("spo", 0, 0.1, lr=1e-4), made_up("spo", 0, 0.1, prompts=32)]
    other.append(made_up("spo", 7, 0.6, prompts=16))
    recorded(rows + other)
    cell = dict(bed="long", budget=203)
    d = where_it_pays.differences("spo", **cell)
    assert d.shape == (8,) and abs(d.mean() - 0.04) < 0.02 and d.std() < 0.02
    text = where_it_pays.corrected_table(("spo", "mapo"), **cell)
    assert text.count("\n") == 3 and "| spo | 8 | +0.0" in text
    ps = []
    for rule in ("spo", "mapo"):
        for measure in ("pass1", "way", "pass4", "pass16"):
            of = where_it_pays.differences(rule, measure, **cell)
            ps.append(report.student_p(of.mean() / (of.std(ddof=1) / len(of) ** 0.5), len(of) - 1))
    assert f"| {ps[0]:.4f} | {report.holm(ps)[0]:.4f} |" in text
    assert "| uniform | 8 | 20,300 | 0.40 | 0.30 |" in where_it_pays.table(("uniform", "spo"), **cell)
    assert where_it_pays.score(rows[0], "late") == pytest.approx(rows[0]["pass1"] * 0.8)
    other = where_it_pays.differences("uniform", base="spo", base_at={"prompts": 32}, **cell)
    assert other == pytest.approx([rows[0]["pass1"] - 0.1])  # seed 0 alone has such a run
    reached = where_it_pays.when_reached("spo", **cell)
    assert 0.9 < reached < 1 and np.isinf(where_it_pays.when_reached("uniform", "spo", **cell))
    # Over common seeds: of the base there is seed 7 alone, so only uniform's own seed 7 counts.
    shares = np.linspace(0, 1, 501)
    alone, all_of_them = (
        (np.mean([where_it_pays.at(r, shares) for r in of], 0) >= 0.6).argmax() / 500
        for of in (rows[7:8], rows[:8])
    )
    reached = where_it_pays.when_reached("uniform", "spo", {"prompts": 16}, **cell)
    assert reached == alone != all_of_them


def test_best_rate(recorded):
    """Catches: the rate of the best single run; runs of the comparison that decide; a rate at which one run
    in two collapses; another number of prompts."""
    ends = {1: (0.5, 0.9), 2: (0.8, 0.8), 3: (1.0, 0.4)}
    rows = [made_up("spo", 100 + s, x, lr) for lr, both in ends.items() for s, x in enumerate(both)]
    recorded([*rows, made_up("spo", 0, 1.0, 1), made_up("spo", 100, 1.0, 1, prompts=32)])
    assert where_it_pays.best("spo", "long", 203) == {"prompts": 64, "lr": 2}
    for asked in ({"shapes": True}, {"prompts": 32}):
        assert where_it_pays.best("spo", "long", 203, **asked) == {"prompts": 32, "lr": 1}
    assert "| spo | 32 | 0.800* |" in where_it_pays.rates_table(["spo"], "long", 203)
    with pytest.raises(ValueError, match="hora on long"):
        where_it_pays.best("hora", "long", 203)


def test_every_rule_at_its_own_best_rate(recorded):
    """Catches: a table at one rate for all, from which a rule that wants another one is missing."""
    rng, rows = np.random.default_rng(0), []
    for rule, good, bad, level in (("uniform", 1e-4, 2e-4, 0.5), ("hora", 3e-4, 2e-4, 0.7)):
        rows += [made_up(rule, 100 + s, x, lr) for lr, x in ((good, 0.6), (bad, 0.5)) for s in (0, 1)]
        rows += [made_up(rule, s, level + rng.normal(0, 0.01), good) for s in range(8)]
        rows += [made_up(rule, s, 0.1 + rng.normal(0, 0.01), bad) for s in range(8)]
    recorded(rows)
    text = where_it_pays.corrected_table(["hora"], tuned=True, bed="long", budget=203)
    assert "| hora | 8 | +0.2" in text or "| hora | 8 | +0.19" in text


def test_shared_keys_change_no_bit(monkeypatch):
    """Catches: another answer where keys are not copied; a name that transformers has given up."""
    from transformers.integrations import sdpa_attention

    model, tokenizer = rollout.load_model(rollout.resolve_model("tiny"))
    prompts = rollout.encode_prompts(tokenizer, ["3+5=", "9+9+1+2="])

    def run():
        drawn = rollout.HFSampler(model, tokenizer, 12).sample(prompts, [3, 2], seed=0)
        model.zero_grad(set_to_none=True)
        grpo.token_logprobs(model, drawn).sum().backward()
        return drawn, [p.grad.clone() for p in model.parameters()]

    monkeypatch.setattr(sdpa_attention, "use_gqa_in_sdpa", sdpa_attention.use_gqa_in_sdpa)
    plain, grads = run()
    where_it_pays.share_keys()
    shared, others = run()
    assert shared == plain and all(map(torch.equal, grads, others))


def test_older_rows_lack_the_rollouts_so_far():
    """Catches: a curve read against steps where it should be against rollouts."""
    new = made_up("uniform", 0, 0.8)
    old = new | {"curve": [c[:3] for c in new["curve"]]}
    assert where_it_pays.at(new, [0.25, 1]) == pytest.approx(where_it_pays.at(old, [0.25, 1]))
    assert where_it_pays.at(new, [0.25, 1]) == pytest.approx([0.25, 0.8])
    # Half of the rollouts for the same curve: at a quarter of the steps it is where uniform is.
    half = [[*c[:3], c[3] // 2] for c in new["curve"]]
    for rule, want in (("saving at 0.1", [0.25, 0.8]), ("dapo", [0.4, 0.8])):
        row = new | {"rule": rule, "curve": half}
        assert where_it_pays.at(row, [0.25, 1]) == pytest.approx(want, abs=0.01)


@pytest.mark.parametrize("name", ["hora+sop", "no rule", "knapsack+spo-1"])
def test_unknown_rules(name):
    """Catches: a misspelt rule that is found out when its turn comes, hours later."""
    with pytest.raises(argparse.ArgumentTypeError, match="no rule"):
        where_it_pays.rule_name(name)


# ---- Statistics ----------------------------------------------------------------------------------------
def test_student_p():
    """Numerical integration, and a printed table. Catches: odd and even degrees of freedom exchanged."""
    for df in range(1, 12):
        for t in (0.0, 0.5, 2.0, 5.0):
            norm = math.gamma((df + 1) / 2) / math.sqrt(df * math.pi) / math.gamma(df / 2)
            x = (np.arange(200_000) + 0.5) * t / 200_000
            inside = 2 * norm * ((1 + x**2 / df) ** (-(df + 1) / 2)).sum() * t / 200_000
            assert report.student_p(t, df) == pytest.approx(1 - inside, abs=1e-6)
    assert [round(report.t95(df), 2) for df in (1, 2, 7)] == [12.71, 4.30, 2.36]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm(p):
    """Step down by hand. Catches: Bonferroni, or corrected values out of order."""
    corrected, order, highest = report.holm(p), np.argsort(p, kind="stable"), 0
    for place, i in enumerate(order):
        highest = max(highest, min(1, p[i] * (len(p) - place)))
        assert corrected[i] == pytest.approx(highest)


@pytest.mark.slow
def test_runs(monkeypatch, tmp_path):
    """In processes of their own. Catches: one that does not start; rules that leak into one another; a row
    that is made again; a rule that draws less and stays behind; a failure that takes others with it."""
    monkeypatch.setattr(where_it_pays, "RESULTS", tmp_path / "rows.jsonl")
    rules = ("saving", "ar3po", "uniform")
    tried = ("warm start", *rules)  # the first lacks the run that it starts from
    jobs = [dict(zip(where_it_pays.KEY, ("sums", r, 16, 256, 1e-4, 0, 2, "cpu"), strict=True)) for r in tried]
    for left in (4, 1):
        with pytest.raises(SystemExit, match=f"^1 of {left} runs failed"):
            where_it_pays.run(jobs, tmp_path / "work", 1)
    rows = where_it_pays.load()
    assert [row["rule"] for row in rows] == list(rules)
    for row, job in zip(rows, jobs[1:], strict=True):
        assert row.items() >= job.items() and row["stopped"] is None
        assert 0 < row["pass1"] < row["pass4"] < row["pass16"] < 1
        assert row["curve"][0][0] == 0 and row["curve"][-1][3] == row["spent"]
    saving, ar3po, uniform = rows
    assert uniform["spent"] == saving["spent"] == 512  # an epoch lasts longer: no prompt is known yet
    assert abs(ar3po["spent"] - 512) <= 128 and ar3po["curve"][-1][0] > 2


def test_facts_that_were_taught_wrong(tmp_path):
    """By hand. Catches: a fifth that begins a step too early; rollouts and right ones exchanged; the tens of
    a total; a sum counted twice that needs a fact twice."""
    tasks = [("a", "3+1+6=", "10"), ("b", "7+8+5=", "20"), ("c", "9+5+6+4+6=", "30")]  # 4+6: in a and c
    rows = [{"id": i, "prompt": prompt, "answer": answer} for i, prompt, answer in tasks]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps = [{"ids": ["a", "b", "c"], "successes": [k, 1, 2], "counts": [8, 4, 4]} for k in range(6)]
    (tmp_path / "groups.jsonl").write_text("".join(json.dumps(g) + "\n" for g in steps))
    found = where_it_pays.facts("long", tmp_path / "groups.jsonl", tmp_path)
    assert list(found) == ["0+3", "4+4", "0+4", "8+1", "4+6"]
    assert found["4+6"] == [[24, 5], [12, 4], [12, 5], [12, 6], [12, 7]]
    assert found["0+3"] == found["4+4"] == [[0, 0]] * 5
