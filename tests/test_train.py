"""train.py through its real command line, on the embedded model: files and rows."""

import contextlib
import filecmp
import io
import json
import math
import os
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
STEPS = 6
# Two batches an epoch, so that six steps visit every prompt three times.
FLAGS = ["--steps", str(STEPS), "--prompts", "16", "--budget", "96", "--held-out", "20", "--eval-every", "3"]
FLAGS += ["--eval-samples", "2", "--save-every", "2", "--engine", "hf", "--n-max", "12"]


def train(*flags):
    command = [sys.executable, str(ROOT / "train.py"), *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def train_here(*flags, cwd=ROOT):
    """The same in this process, which has imported torch already."""
    import train

    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            train.main([str(f) for f in flags])
        except SystemExit as stop:
            code = stop.code
    said = f"{code}\n" if isinstance(code, str) else ""  # which Python would print
    return SimpleNamespace(returncode=code and 1, stdout=out.getvalue(), stderr=err.getvalue() + said)


def rows(path):
    text = path.read_text()
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


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
        start = train if allocator == "knapsack" else train_here
        done = start(*FLAGS, "--tasks", tasks_file, "--allocator", allocator, "--out", folder / allocator)
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
            assert m["logprob_gap"] < 2e-5
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


def test_counts_follow_from_what_came_before(runs):
    """Each run once more from its rows. Catches: a rule under another one's name, bounds that do not arrive,
    an estimate made after the update, a tracker that is told something else."""
    import knapsack
    import train as module

    rules = {
        "knapsack": lambda t, ids: knapsack.allocate(t.posterior(ids), 96, 2, 12).tolist(),
        "paper": lambda t, ids: knapsack.allocate_paper(t.windowed_rate(ids), 96, 2, 12).tolist(),
        "uniform": lambda t, ids: [6] * 16,
    }
    for name, rule in rules.items():
        tracker = knapsack.SuccessTracker()
        for g in rows(runs[name] / "groups.jsonl"):
            ids = g["ids"]
            assert g["counts"] == rule(tracker, ids)
            assert g["estimate"] == pytest.approx(tracker.estimate(ids), abs=6e-5)
            tracker.update(ids, g["successes"], g["counts"])
        assert (len(set(g["counts"])) > 1) == (name != "uniform")
    saving = module.ALLOCATORS["saving"](tracker, ids, module.read_config(runs["uniform"]))
    assert saving.tolist() == knapsack.allocate_saving(tracker.posterior(ids), 96, 2).tolist()


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
    assert names[-2:] == ["step-000004", "step-000006"]
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
    done = train_here("--compare", *runs.values(), "--out", tmp_path / "both.png")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_checks_come_before_torch():
    """A wrong flag answers at once: nothing that takes seconds to import is imported by then."""
    code = "import sys, train; train.prepare(train.settings({})); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_help_teaches():
    """Every setting stands there, with what it means."""
    from dataclasses import fields

    import train as module

    done = train_here("--help")
    said = " ".join(done.stdout.split())
    assert done.returncode == 0 and "--resume" in said and "Qwen2.5-Math-1.5B" in said
    for f in fields(module.Config):
        assert f" {module.flag(f.name)} " in said and " ".join(f.metadata["help"].split()) in said


def test_large_models_take_the_large_column():
    sys.path.insert(0, str(ROOT))
    import train as module

    tiny = module.settings({})
    large = module.settings(module.parse_args(["--model", "Qwen2.5-Math-1.5B", "--lr", "2e-6"])[0])
    assert (tiny.tasks, large.tasks) == ("arithmetic", "math")
    assert large.lr == 2e-6 and large.max_new_tokens == 1024 and large.minibatches == 8
    assert "boxed" in large.instruction and tiny.instruction == ""


def test_a_folder_that_somebody_takes_first(tmp_path, monkeypatch):
    """Catches: two processes at the same moment that take the same free name."""
    import train as module

    make, rival = Path.mkdir, []

    def late(self, *a, **k):
        if not rival:
            rival.append(self)
            make(self, parents=True)
        return make(self, *a, **k)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "mkdir", late)
    assert module.new_folder(module.settings({}), None).name == "tiny-knapsack-seed0-2"


def test_a_run_that_goes_on_is_the_longer_run(runs, tasks_file, tmp_path):
    """--resume with more steps, from another working folder, by a version with a setting that the run does
    not have: Catches paths that hold in one folder only, a config.json of yesterday that is refused."""
    run = tmp_path / "run"
    shorter = [*FLAGS, "--steps", "4", "--tasks", os.path.relpath(tasks_file, ROOT), "--out", run]
    assert train_here(*shorter).returncode == 0
    config = json.loads((run / "config.json").read_text())
    del config["reward"], config["limit"]
    (run / "config.json").write_text(json.dumps(config))
    done = train_here("--resume", run, "--steps", STEPS, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    longer, ours = (rows(r / "groups.jsonl") for r in (runs["knapsack"], run))
    assert longer == ours
    weights = [r / "final" / "model.safetensors" for r in (runs["knapsack"], run)]
    assert filecmp.cmp(*weights, shallow=False)


def test_the_large_models_run_is_allocated():
    """The defaults of --model NAME, on made-up outcomes: from the second visit on the counts follow them.
    Catches: defaults under which no problem is met twice."""
    import knapsack
    import train as module

    c = module.settings({"model": "Qwen2.5-Math-1.5B"})
    tasks, tracker, rng = list(range(c.limit)), knapsack.SuccessTracker(), np.random.default_rng(0)
    p = rng.beta(0.5, 0.8, len(tasks))
    flat, visits = [], np.zeros(len(tasks))
    for step in range(1, c.steps + 1):
        ids = module.batch_of(tasks, step, c)
        counts = module.ALLOCATORS[c.allocator](tracker, ids, c)
        visits[ids] += 1
        if visits[ids].min() > 1:
            flat.append(len(set(counts)) == 1)
        tracker.update(ids, rng.binomial(counts, p[ids]), counts)
    assert visits.min() >= 6 and len(flat) > 150 and np.mean(flat) < 0.1


def test_a_failed_start_leaves_the_users_folder(tmp_path):
    """Catches: a folder that the user made deleted with what was put into it."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for out in ("mine", "link", "new"):
        done = train_here("--max-prompt-tokens", "3", "--engine", "hf", "--out", tmp_path / out)
        assert "too few: raise --max-prompt-tokens" in done.stderr and done.stderr.count("\n") == 1
        assert not list((tmp_path / "mine").iterdir()) and not (tmp_path / "new").exists()


def test_what_is_left_out(capsys):
    """Catches: one long row that refuses the whole file, or that stays in; a batch that is not full."""
    import reward
    import train as module

    c = module.settings({"prompts": 2, "max_prompt_tokens": 3})
    tasks = [reward.Task(i, i, "") for i in "abcdefgh"]
    tokens = {i: [1] * (9 if i in "bg" else 3) for i in "abcdefgh"}
    kept = module.usable(c, tasks[:6], tasks[6:], tokens)
    assert ["".join(t.id for t in of) for of in kept] == ["acde", "h"]
    said = capsys.readouterr().out
    assert "2 tasks have prompts of more than 3" in said and "1 training tasks do not fill" in said
    assert "4 problems, each met about 50.0 times: the allocator acts from step 3 on" in said


def test_what_a_step_says():
    """By hand: three groups, of 2, 4 and 6. Catches: a mean over rollouts where one over prompts is meant."""
    import train as module
    from rollout import Rollout

    group, rewards = np.repeat([0, 1, 2], [2, 4, 6]), np.array([1, 1, 0, 0, 0, 1, *[0] * 6], float)
    rollouts = [
        Rollout(int(g), (1,), (1,) * n, (-0.5,) * n, "", n < 3)
        for g, n in zip(group, [1, 2, 3] * 4, strict=True)
    ]
    third = pytest.approx(1 / 3)
    assert module.step_metrics(rewards, group, rollouts) == {
        "reward_mean": pytest.approx(1.25 / 3), "reward_rollouts": 1 / 4, "effective_rollouts": third,
        "effective_prompts": third, "all_right": third, "all_wrong": third, "n_largest": 6,
        "response_tokens": 2, "truncated": third, "entropy": 0.5,
    }  # fmt: skip


def test_evaluations_have_their_own_temperature_and_one_seed(tmp_path):
    """And show a problem with a right and a wrong answer. Catches: a seed that two steps share."""
    import reward
    import train as module
    from rollout import Rollout

    asked = []

    class Sampler:
        temperature = 1.0

        def sample(self, prompts, counts, seed):
            asked.append((self.temperature, seed, counts))
            return [Rollout(g, (1,), (1,), (0.0,), text) for g in (0, 1) for text in ("2", "23"[g], "2")]

    c = module.settings({"eval_temperature": 0.6, "eval_samples": 3, "seed": 5})
    run = SimpleNamespace(config=c, out=tmp_path, sampler=Sampler(), prompts={"a": [1], "b": [1]})
    run.held_out = [reward.Task("a", "1+1=", "2"), reward.Task("b", "0+2=", "2")]
    run.judge = lambda tasks, texts: [float(text == "2") for text in texts]
    run.bar = SimpleNamespace(write=print)
    for step in (0, 20):
        assert module.held_out_success(run, step)["eval_success"] == pytest.approx(5 / 6)
    assert asked == [(0.6, module.step_seed(5, 0), [3, 3])] * 2 and run.sampler.temperature == 1.0
    shown = rows(tmp_path / "samples.jsonl")[0]
    assert (shown["id"], shown["right"], shown["wrong"]) == ("b", "2", "3")
    assert len({module.step_seed(seed, step) for seed in range(3) for step in range(100)}) == 300


def test_the_same_tasks_for_every_seed(tmp_path):
    """In another order. Catches: --limit or the split drawn anew for each seed; more than 256 held out."""
    import train as module

    configs = [module.settings({"seed": seed, "limit": 64}) for seed in (0, 7)]
    a, b = map(module.prepare, configs)
    assert a == b and len(a[0]) == 64  # a batch, so that each step is an epoch
    orders = [[t.id for t in module.batch_of(a[0], step, c)] for c in configs for step in (1, 2)]
    assert len(set(map(tuple, orders))) == 4 and len(set(map(frozenset, orders))) == 1
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}=", "answer": f"{i}"}) + "\n" for i in range(1500)))
    assert len(module.prepare(module.settings({"tasks": str(path)}))[1]) == 256
    path.write_text("".join(path.read_text().splitlines(True)[:100]))
    assert len(module.prepare(module.settings({"tasks": str(path), "prompts": 4}))[1]) == 20


def test_the_instruction_is_asked_and_judged(main, monkeypatch):
    asked, box = [], r"in a \boxed{}"
    monkeypatch.setattr("rollout.encode_tasks", lambda _, tasks, *how: asked.append(how) or 1 / 0)
    monkeypatch.setattr("evaluate.judge_of", lambda *how: asked.append(how))
    with pytest.raises(ZeroDivisionError):
        main("--instruction", box, "--engine", "hf")
    assert asked == [("", box), (box, False, {})]


def test_what_the_update_is_told(main, tmp_path, monkeypatch):
    """The learning rate rises over --warmup-steps; what else the flags say of the update arrives there. The
    right answers are pushed up; the engine sleeps through it, and has the new weights after it."""
    import grpo
    import rollout

    told, order, real = [], [], grpo.update
    _, tokenizer = rollout.load_model(rollout.resolve_model("tiny"))

    def spy(model, optimizer, rollouts, advantages, minibatches, temperature, **more):
        order.append("update")
        told.append((optimizer.param_groups[0]["lr"], minibatches, temperature, more))
        for r, a in zip(rollouts, advantages, strict=True):
            digits = re.findall(r"\d+", tokenizer.decode(r.prompt_ids))
            right = re.findall(r"\d+", r.text)[-1:] == [str(sum(map(int, digits)))]
            assert a == 0 or (a > 0) == right
        assert np.any(advantages)
        return real(model, optimizer, rollouts, advantages, minibatches, temperature, **more)

    monkeypatch.setattr(grpo, "update", spy)
    for name in ("sleep", "sync"):
        monkeypatch.setattr(rollout.HFSampler, name, lambda *_, name=name: order.append(name))
    flags = "--prompts 4 --budget 16 --held-out 4 --eval-samples 1 --engine hf --steps 3 --lr 1e-3"
    more = "--warmup-steps 2 --minibatches 3 --temperature 0.9 --clip-low 0.1 --clip-high 0.4 "
    more += "--tokens-per-microbatch 300 --checkpointing"
    assert main(*flags.split(), *more.split(), "--out", tmp_path / "run")[0] == 0
    rest = dict(tokens_per_microbatch=300, checkpointing=True, clip_low=0.1, clip_high=0.4)
    assert told == [(lr, 3, 0.9, rest | {"seed": i}) for i, lr in enumerate((5e-4, 1e-3, 1e-3), 1)]
    assert order == ["sync", *["sleep", "update", "sync"] * 3]  # the first: what the run begins with
