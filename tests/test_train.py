"""train.py through its real command line, on the embedded model: files, rows, resume, errors."""

import filecmp
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STEPS = 6
# Two batches an epoch, so that six steps visit every prompt three times.
FLAGS = ["--steps", str(STEPS), "--prompts", "16", "--budget", "96", "--held-out", "20", "--eval-every", "3"]
FLAGS += ["--eval-samples", "2", "--save-every", "2", "--engine", "hf"]


def command(*flags):
    return [sys.executable, str(ROOT / "train.py"), *map(str, flags)]


def train(*flags, cwd=ROOT):
    return subprocess.run(command(*flags), cwd=cwd, capture_output=True, text=True, timeout=300)


def rows(path):
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def repeatable(row):
    """A metrics row without what differs between two identical runs."""
    return {k: v for k, v in row.items() if not k.startswith(("time_", "mem_")) and k != "seconds"}


@pytest.fixture(scope="module")
def tasks_file(tmp_path_factory):
    rng = random.Random(1)
    path = tmp_path_factory.mktemp("tasks") / "sums.jsonl"
    sums = {}
    while len(sums) < 52:
        digits = [rng.randint(1, 9) for _ in range(rng.randint(2, 8))]
        sums["+".join(map(str, digits)) + "="] = str(sum(digits))
    lines = [json.dumps({"prompt": p, "answer": a}) for p, a in sums.items()]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tasks_file):
    """One finished run an allocator, side by side: {allocator: folder}."""
    folder = tmp_path_factory.mktemp("runs")
    for allocator in ("knapsack", "paper", "uniform"):
        done = train(*FLAGS, "--tasks", tasks_file, "--allocator", allocator, "--out", folder / allocator)
        assert done.returncode == 0, done.stderr
        assert "held-out success" in done.stdout
    return {path.name: path for path in folder.iterdir()}


# ------------------------------------------------------------------------------- what a run leaves


def test_metrics(runs):
    """Catches: missing keys, NaN in JSON, evaluations at other steps, shares that do not add up."""
    for run in runs.values():
        metrics = rows(run / "metrics.jsonl")
        assert [m["step"] for m in metrics] == list(range(STEPS + 1))
        for m in metrics:
            for key in ("reward_mean", "effective_rollouts", "effective_prompts", "distinct_solved",
                        "budget", "n_largest", "seconds", "eval_success"):  # fmt: skip
                assert key in m
            for value in m.values():
                assert value is None or (isinstance(value, (int, float)) and math.isfinite(value))
        assert [m["step"] for m in metrics if m["eval_success"] is not None] == [0, 3, 6]
        for m in metrics[1:]:
            assert m["all_right"] + m["all_wrong"] + m["effective_prompts"] == pytest.approx(1)
            assert m["logprob_gap"] < 1e-3
            assert 0 <= m["effective_rollouts"] <= 1 and m["budget"] == 96


def test_groups_agree_with_metrics(runs):
    """Catches: outcomes credited to the wrong prompt, a budget not spent exactly."""
    for run in runs.values():
        solved = set()
        for g, m in zip(rows(run / "groups.jsonl"), rows(run / "metrics.jsonl")[1:], strict=True):
            assert sum(g["counts"]) == 96 and min(g["counts"]) >= 2
            assert len(set(g["ids"])) == 16
            pairs = list(zip(g["counts"], g["successes"], strict=True))
            assert all(0 <= s <= n for n, s in pairs)
            mixed = sum(n for n, s in pairs if 0 < s < n)
            assert m["effective_rollouts"] == pytest.approx(mixed / 96)
            assert m["n_largest"] == max(g["counts"])
            solved |= {i for i, s in zip(g["ids"], g["successes"], strict=True) if s}
            assert m["distinct_solved"] == len(solved)


def test_knapsack_makes_ragged_groups_and_uniform_does_not(runs):
    knapsack, uniform = (rows(runs[a] / "groups.jsonl") for a in ("knapsack", "uniform"))
    assert all(set(g["counts"]) == {6} for g in uniform)
    assert set(knapsack[0]["counts"]) == {6}  # nothing known yet: every prompt is the same
    assert len(set(knapsack[-1]["counts"])) > 3


def test_allocators_see_the_same_prompts_in_the_same_order(runs):
    """Catches: data order drawn from a generator that sampling also moves."""
    orders = [[g["ids"] for g in rows(run / "groups.jsonl")] for run in runs.values()]
    assert orders[0] == orders[1] == orders[2]
    first_epoch = orders[0][0] + orders[0][1]
    assert len(set(first_epoch)) == 32  # an epoch repeats nothing
    evaluated = [rows(run / "metrics.jsonl")[0]["eval_success"] for run in runs.values()]
    assert len(set(evaluated)) == 1


def test_files(runs):
    run = runs["knapsack"]
    config = json.loads((run / "config.json").read_text())
    assert config["allocator"] == "knapsack" and config["budget"] == 96 and config["lr"] > 0
    assert (run / "dashboard.png").read_bytes().startswith(b"\x89PNG")
    names = sorted(path.name for path in (run / "checkpoint").iterdir())
    assert names == ["step-000004", "step-000006"]  # the last two
    assert not list(run.rglob("*.part"))


def test_final_is_the_last_checkpoint_and_loads(runs):
    """Catches: `final` written before the last step, or with the first weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(runs["knapsack"] / "final")
    tokenizer = AutoTokenizer.from_pretrained(runs["knapsack"] / "final")
    first = AutoModelForCausalLM.from_pretrained(ROOT / "tutorial" / "tiny_model")
    assert (model.lm_head.weight != first.lm_head.weight).any()
    weights = [runs["knapsack"] / name / "model.safetensors" for name in ("final", "checkpoint/step-000006")]
    assert filecmp.cmp(*weights, shallow=False)
    assert tokenizer("3+5=")["input_ids"] == [6, 13, 8, 14]


def test_compare_draws_one_picture(runs, tmp_path):
    done = train("--compare", *runs.values(), "--out", tmp_path / "both.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------------------- resuming


def assert_same_run(one, other):
    """The same rows and, to the bit, the same weights."""
    for name in ("metrics.jsonl", "groups.jsonl"):
        a, b = ([repeatable(r) for r in rows(run / name)] for run in (one, other))
        assert a == b
    assert filecmp.cmp(one / "final/model.safetensors", other / "final/model.safetensors", shallow=False)


def test_resume_before_the_first_checkpoint(runs, tmp_path):
    """A run that died while loading has a config.json and nothing else; also: same seed, same run."""
    shutil.copy(runs["knapsack"] / "config.json", tmp_path)
    done = train("--resume", tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same_run(runs["knapsack"], tmp_path)


SLOW_TERM = pytest.param(signal.SIGTERM, marks=pytest.mark.slow)  # the same handler as Ctrl-C


@pytest.mark.parametrize("sent", [signal.SIGINT, SLOW_TERM, signal.SIGKILL])
def test_interrupted_runs_resume_to_the_same_result(runs, tmp_path, tasks_file, sent):
    """Catches: optimizer, tracker or solved set not restored, a random stream that went on, doubled
    rows. Ctrl-C and a polite kill end with a checkpoint and a sentence; a hard kill loses two steps."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        command(*FLAGS, "--tasks", tasks_file, "--out", out),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.time() + 120
    while time.time() < deadline and process.poll() is None:
        if (out / "checkpoint" / "step-000002").exists():
            break
        time.sleep(0.02)
    process.send_signal(sent)
    stdout, stderr = process.communicate(timeout=120)
    if sent == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130, stderr
        assert "go on with: python train.py --resume" in stdout and "Traceback" not in stderr
        stopped = int(stdout.split("stopped after step ")[1].split(";")[0])
        assert (out / "checkpoint" / f"step-{stopped:06d}" / "state.json").exists()
    assert not (out / "final").exists()
    done = train("--resume", out)
    assert done.returncode == 0, done.stderr
    assert "resuming after step" in done.stdout
    assert_same_run(runs["knapsack"], out)


def test_a_finished_run_is_left_alone(runs):
    before = (runs["paper"] / "metrics.jsonl").read_bytes()
    done = train("--resume", runs["paper"])
    assert done.returncode == 0 and "nothing to resume" in done.stdout
    assert (runs["paper"] / "metrics.jsonl").read_bytes() == before


# --------------------------------------------------------------------------------------- errors


def write(path, text):
    path.write_text(text)
    return path


BAD = {
    "budget below n_min": (["--prompts", "64", "--budget", "127"], "raise --budget, or lower --n-min"),
    "budget above n_max": (["--prompts", "4", "--budget", "513"], "lower --budget, or raise --n-max"),
    "n_min above n_max": (["--n-min", "9", "--n-max", "8"], "--n-min 9 is above --n-max 8"),
    "n_min of zero": (["--n-min", "0"], "--n-min 0: must be above 0"),
    "no steps": (["--steps", "0"], "--steps 0: must be above 0"),
    "a learning rate that is not a number": (["--lr", "nan"], "--lr nan: must be above 0"),
    "temperature of zero": (["--temperature", "0"], "--temperature 0.0: must be above 0"),
    "a negative seed": (["--seed", "-1"], "--seed -1: must not be negative"),
    "clip of one": (["--clip-low", "1"], "must lie below 1"),
    "an allocator nobody wrote": (["--allocator", "magic"], "invalid choice: 'magic'"),
    "a flag nobody wrote": (["--learning-rate", "1"], "unrecognized arguments"),
    "an unknown model": (["--model", "gpt"], "--model gpt: neither tiny, nor a folder, nor a hub id"),
    "a folder without a model": (["--model", "/"], "not a folder with a config.json"),
    "unknown tasks": (["--tasks", "sums"], "neither a file nor one of arithmetic, gsm8k"),
    "a missing file": (["--tasks", "no/such.jsonl"], "no/such.jsonl"),
    "a resumed run that is not there": (["--resume", "no/such/run"], "no config.json there"),
    "resume with another flag": (["--resume", "x", "--lr", "1"], "give no other flag"),
    "compare without a run": (["--compare", "no/such/run"], "no metrics.jsonl there"),
    "more prompts than tasks": (["--prompts", "2000", "--budget", "8000"], "bring more tasks"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_flags_get_one_line(case, tmp_path):
    flags, says = BAD[case]
    done = train(*flags, cwd=tmp_path)
    assert done.returncode not in (0, None)
    last = done.stderr.strip().splitlines()[-1]
    assert says in last, done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())  # nothing was written


FILES = {
    "no JSON": ('{"prompt": "1+1=", "answer": "2"}\noops\n', "line 2"),
    "no answer": ('{"prompt": "1+1=", "answer": "2"}\n\n{"prompt": "1+2="}\n', "line 3"),
    "a number for a prompt": ('{"prompt": 7, "answer": "2"}\n', "line 1"),
    "an id twice": ('{"id": "a", "prompt": "1+1=", "answer": "2"}\n' * 2, "'a'"),
    "nothing": ("", "tasks.jsonl"),
}


@pytest.mark.parametrize("case", FILES)
def test_bad_task_files_name_the_line(case, tmp_path):
    text, says = FILES[case]
    path = write(tmp_path / "tasks.jsonl", text)
    done = train("--tasks", path, cwd=tmp_path)
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1 and says in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "runs").exists()


def test_a_folder_with_a_run_is_not_overwritten(runs):
    before = (runs["uniform"] / "config.json").read_bytes()
    done = train("--out", runs["uniform"])
    assert done.returncode == 1 and "already holds a run" in done.stderr
    assert (runs["uniform"] / "config.json").read_bytes() == before


def test_a_prompt_longer_than_the_limit(tmp_path):
    lines = [json.dumps({"prompt": "1+" * 40 + f"{i}=", "answer": str(40 + i)}) for i in range(100)]
    path = write(tmp_path / "long.jsonl", "\n".join(lines) + "\n")
    done = train("--tasks", path, "--out", tmp_path / "run")
    assert done.returncode == 1 and "raise --max-prompt-tokens" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_a_folder_with_other_things_is_not_used(tmp_path):
    """Catches: starting from a checkpoint somebody left there, or failing at the very end."""
    (tmp_path / "checkpoint").mkdir()
    done = train("--out", tmp_path)
    assert done.returncode == 1 and "is not an empty folder" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_damaged_weights_are_one_line_and_leave_no_folder(tmp_path):
    shutil.copytree(ROOT / "tutorial" / "tiny_model", tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    done = train("--model", tmp_path / "model", "--tasks", "arithmetic", "--out", tmp_path / "run")
    assert done.returncode == 1 and "cannot be loaded" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()


def test_checks_come_before_torch():
    """A wrong flag answers at once: nothing that takes seconds to import is imported by then."""
    code = "import sys, train; c, _ = train.parse_args([]); train.prepare(c); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_help_teaches():
    done = train("--help")
    assert done.returncode == 0 and "--resume" in done.stdout and "Qwen2.5-Math-1.5B" in done.stdout


def test_large_models_take_the_large_column():
    sys.path.insert(0, str(ROOT))
    import train as module

    tiny, _ = module.parse_args([])
    large, _ = module.parse_args(["--model", "Qwen2.5-Math-1.5B", "--lr", "2e-6"])
    assert (tiny.tasks, large.tasks) == ("arithmetic", "dapo17k")
    assert large.lr == 2e-6 and large.max_new_tokens == 1024 and large.minibatches == 8
    assert "boxed" in large.instruction and tiny.instruction == ""
    assert os.path.basename(module.run_folder(large, None)) == "Qwen2.5-Math-1.5B-knapsack-seed0"
