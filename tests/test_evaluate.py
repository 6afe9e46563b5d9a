"""evaluate.py: the estimator against exact fractions, the command line on the embedded model."""

import json
import subprocess
import sys
from fractions import Fraction
from math import comb
from pathlib import Path

import numpy as np
import pytest

import evaluate

ROOT = Path(__file__).parent.parent


def test_pass_at_k_against_the_combinatorial_definition():
    """Catches: the biased 1 - (1 - c/n)^k, and an off-by-one where fewer than k are wrong."""
    for n in (1, 2, 7, 16):
        for c in range(n + 1):
            for k in range(1, n + 1):
                exact = 1 - Fraction(comb(n - c, k), comb(n, k))
                assert evaluate.pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-14)


def test_pass_at_k_is_vectorised_and_stable_for_large_n():
    c = np.array([0, 1, 10, 5000, 9999, 10_000])
    got = evaluate.pass_at_k(10_000, c, 100)
    exact = [float(1 - Fraction(comb(10_000 - int(x), 100), comb(10_000, 100))) for x in c]
    assert np.allclose(got, exact, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("n, c, k", [(4, 2, 5), (4, 5, 2), (4, 2, 0), (4, -1, 2)])
def test_pass_at_k_refuses_impossible_counts(n, c, k):
    with pytest.raises(ValueError, match="1 <= k <= n"):
        evaluate.pass_at_k(n, c, k)


def test_bootstrap_se_matches_the_textbook_one():
    values = np.random.default_rng(0).random(400)
    assert evaluate.bootstrap_se(values, draws=4000) == pytest.approx(values.std() / 20, rel=0.05)


@pytest.mark.parametrize(
    "name, want",
    [("Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-1.5B"), ("owner/model", "owner/model")],
)
def test_model_names(name, want):
    assert evaluate.resolve_model(name) == want


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", str(ROOT / "tests")])
def test_unknown_models_are_refused(name):
    with pytest.raises(ValueError, match="--model"):
        evaluate.resolve_model(name)


def test_held_out_problems_are_those_train_holds_out():
    import train
    from reward import load_tasks, split_held_out

    _, held_out = train.prepare(train.parse_args([])[0])
    assert split_held_out(load_tasks("arithmetic"), 256, seed=0)[1] == held_out
    assert len(held_out) == 256


def test_command_line(tmp_path):
    out = tmp_path / "scores.json"
    command = [sys.executable, "evaluate.py", "--samples", "4", "--held-out", "256", "--limit", "40"]
    command += ["--temperature", "1", "--max-new-tokens", "40", "--out", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    scores = json.loads(out.read_text())
    assert 0.1 < scores["avg@4"] < 0.6  # the untrained embedded model
    assert scores["avg@4"] == pytest.approx(scores["pass@1"])
    assert scores["pass@1"] < scores["pass@2"] < scores["pass@4"]
    assert scores["pass@4"] == pytest.approx(1 - scores["never_solved"])
    assert 0 < scores["avg@4_se"] < 0.2
