"""What a user plugs in: an allocator, a reward, a value function, a logger. Each example is five lines."""

import json

import numpy as np
import pytest

import evaluate
import grpo
import knapsack
import train

SMALL = ["--prompts", 4, "--budget", 16, "--held-out", 8, "--eval-samples", 2, "--steps", 2, "--engine", "hf"]


def rows(run, name):
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def test_an_allocator(main, tmp_path, monkeypatch):
    """Counts in proportion to sqrt(p (1-p)). Catches: a name that a flag, a checkpoint or a picture does not
    know."""

    def neyman(tracker, ids, config):
        p = tracker.estimate(ids)
        share = np.cumsum(np.sqrt(p * (1 - p)))
        spare = config.budget - config.n_min * len(ids)
        return config.n_min + np.diff(np.round(spare * share / share[-1]), prepend=0).astype(int)

    monkeypatch.setitem(train.ALLOCATORS, "neyman", neyman)
    code, said = main(*SMALL, "--allocator", "neyman", "--out", tmp_path / "run")
    assert code == 0, said
    assert all(sum(g["counts"]) == 16 for g in rows(tmp_path / "run", "groups"))
    code, said = main("--resume", tmp_path / "run", "--steps", 3)
    assert code == 0 and rows(tmp_path / "run", "metrics")[-1]["step"] == 3
    code, said = main("--compare", tmp_path / "run", "--out", tmp_path / "picture.pdf")
    assert code == 0 and (tmp_path / "picture.pdf").read_bytes().startswith(b"%PDF")
    assert {"color", "linestyle"} <= evaluate.look("neyman").keys()


def test_a_value_function():
    """P(mixed group) alone. Catches: InfoGain that stays in."""
    p = np.array([0.05, 0.5, 0.95])
    counts = knapsack.allocate(p, budget=25, value=knapsack.prob_nonzero_gradient)
    assert counts[0] == counts[2] > counts[1]  # as hard and as easy are worth the same
    assert knapsack.allocate(p, budget=25)[0] > knapsack.allocate(p, budget=25)[2]


def test_a_logger(main, tmp_path, monkeypatch):
    """Catches: a row that does not go through train.log."""
    seen, plain = [], train.log
    monkeypatch.setattr(
        train, "log", lambda out, name, row: seen.append((name, row)) or plain(out, name, row)
    )
    assert main(*SMALL, "--out", tmp_path / "run")[0] == 0
    for name in ("metrics", "groups", "samples"):
        assert [row for kind, row in seen if kind == name] == rows(tmp_path / "run", name)


REWARDS = """
def graded(tasks, texts):
    return [0.9 if task.extra["want"] in text else 0.5 for task, text in zip(tasks, texts)]

def nothing(tasks, texts):
    return [float("nan") for _ in texts]

def broken(tasks, texts):
    return texts[0].no_such_method()
"""


@pytest.fixture
def mine(tmp_path):
    """(a file of rewards, flags of a run whose tasks have another column)"""
    (tmp_path / "mine.py").write_text(REWARDS)
    # No answers, and another digit for each.
    sums = [{"prompt": f"{a}+{b}=", "want": str(a)} for a in range(1, 9) for b in range(1, 9)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    return f"{tmp_path / 'mine.py'}:", [*SMALL, "--tasks", tmp_path / "sums.jsonl", "--out", tmp_path / "run"]


def test_a_reward(main, mine, tmp_path, monkeypatch):
    """Graded rewards: the advantages see them as they are, the tracker counts those above 0.5."""
    seen, real = set(), grpo.group_advantages
    monkeypatch.setattr(grpo, "group_advantages", lambda r, g: seen.update(r) or real(r, g))
    file, flags = mine
    code, said = main(*flags, "--reward", file + "graded")
    assert code == 0 and seen == {0.5, 0.9}, said
    for m, g in zip(rows(tmp_path / "run", "metrics")[1:], rows(tmp_path / "run", "groups"), strict=True):
        n, s = np.array(g["counts"]), np.array(g["successes"])
        assert m["reward_mean"] == pytest.approx(np.mean(0.5 + 0.4 * s / n))
        assert m["effective_prompts"] == np.mean((s > 0) & (s < n))
        assert m["loss"] is not None or not m["effective_prompts"]


def test_what_is_no_reward_is_one_line(main, mine):
    file, flags = mine
    error, _ = main(*flags, "--reward", file + "nothing")
    assert error.startswith("train.py: stopped: ") and "gave nan to" in error and "\n" not in error


def test_an_exception_in_the_users_reward_shows_where(main, mine):
    """Catches: a bug in the user's file that looks like a wrong flag."""
    file, flags = mine
    with pytest.raises(RuntimeError, match="broken failed") as error:
        main(*flags, "--reward", file + "broken")
    assert isinstance(error.value.__cause__, AttributeError)


def test_a_reward_that_is_not_there_is_one_line(main, mine, tmp_path):
    _, flags = mine
    error, _ = main(*flags, "--reward", tmp_path / "absent.py:f")
    assert error.startswith("train.py: error: ") and "\n" not in error
    assert not (tmp_path / "run").exists()
