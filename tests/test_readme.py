"""The README says what is there: its commands parse, its files exist, its numbers are recorded ones."""

import json
import re
import shlex
from pathlib import Path

import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "tutorial" / "results"


def rows(run):
    return [json.loads(line) for line in (RESULTS / run / "metrics.jsonl").read_text().splitlines()]


def test_training_commands_parse():
    """Catches: a flag that was renamed after the README was written."""
    commands = re.findall(
        r"train\.py((?: --?[^\n#`]+)?)", "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
    )
    assert len(commands) >= 3
    for flags in commands:
        words = shlex.split(flags)
        if "--help" not in words:
            config, _ = train.parse_args(words)
            train.check(config)


def test_files_that_are_named_exist():
    for name in re.findall(r"\((tutorial/[^)]+)\)|`((?:tutorial|tests)/[\w./-]+)`", README):
        assert (ROOT / (name[0] or name[1])).exists(), name


def test_headroom_numbers():
    """The sentence about the embedded model, from what tutorial/headroom.py wrote; and its bar."""
    h = json.loads((RESULTS / "headroom.json").read_text())
    assert h["ceiling"][0] - h["shipped"][0] >= 0.3
    assert len(h["runs"]) >= 3
    for run in h["runs"]:
        assert run["gap_closed"] >= 0.5 and run["seconds"] <= 180
    uniform = json.loads((RESULTS / "headroom_uniform.json").read_text())["runs"]
    ends = ", ".join(f"{run['success']:.2f}" for run in uniform)
    assert f"With `--allocator uniform` they end at {ends}: a tie" in README
    success = [run["success"] for run in h["runs"]]
    says = (
        f"right on {h['shipped'][0]:.2f} of held-out sums, where the same network pretrained on right "
        f"answers reaches {h['ceiling'][0]:.2f}; three default runs end at "
        f"{', '.join(f'{s:.2f}' for s in success)}"
    )
    assert says in " ".join(README.split()), says


def test_smollm2_numbers():
    """The table of the two recorded SmolLM2 runs, from their metrics."""
    for allocator in ("uniform", "knapsack"):
        metrics = rows(f"smollm2-{allocator}-seed0")
        assert len(metrics) > 30 and all(m["budget"] == 256 for m in metrics)
        evaluated = [m["eval_success"] for m in metrics if m["eval_success"] is not None]
        trained = metrics[1:]
        cells = [allocator, f"{evaluated[0]:.2f} → {evaluated[-1]:.2f}"]
        for key in ("effective_rollouts", "effective_prompts"):
            cells.append(f"{sum(m[key] for m in trained) / len(trained):.2f}")
        cells += [f"{trained[-1]['distinct_solved']}", f"{max(m['n_largest'] for m in trained)}"]
        assert "| " + " | ".join(cells) + " |" in README, cells


def test_engine_numbers():
    """The sentence about the run on vLLM: where it ends, and that its weights were never stale."""
    hf, vllm = rows("smollm2-knapsack-seed0"), rows("smollm2-knapsack-vllm-seed0")
    assert f"ends at {vllm[-1]['eval_success']:.2f}: the same curve within its error" in " ".join(
        README.split()
    )
    for a, b in zip(hf, vllm, strict=True):
        if a["eval_success"] is not None:
            assert abs(a["eval_success"] - b["eval_success"]) < 2 * a["eval_success_se"]
    assert "never further apart than 2e-5 on a step's average" in " ".join(README.split())
    assert max(row["logprob_gap"] for row in vllm[1:]) < 2e-5


def test_kills():
    """The sentence about interrupted runs, from what tests/stress_resume.py wrote."""
    record = json.loads((RESULTS / "stress_resume.json").read_text())
    assert f"after {record['kills']} kills at random moments" in README and record["different"] == []


def test_replay_numbers():
    """The table of rules replayed on real success rates, from what tests/bench_allocation.py wrote."""
    rules = json.loads((RESULTS / "allocation_replay.json").read_text())["all prompts"]["rules"]
    lines = [line for line in README.splitlines() if line.count("|") == 5 and "." in line]
    table = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in lines}
    for rule, cells in table.items():
        measured = rules[rule]
        shares = [f"{measured[k][0]:.3f}"[1:] for k in ("effective_rollouts", "effective_prompts")]
        assert cells == [*shares, f"{measured['solved'][0]:.0f}"], rule
        assert measured["effective_rollouts"][1] < 0.001 and measured["solved"][1] < 1
    assert len(table) == 5
