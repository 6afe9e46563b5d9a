"""evaluate.py: the estimator against all choices, the command line on the embedded model."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

import evaluate
import rollout
import train
from reward import Verifier, score
from rollout import Rollout

ROOT = Path(__file__).parent.parent


def test_pass_at_k_against_all_choices():
    """Catches: the biased 1 - (1 - c/n)^k, and an off-by-one where fewer than k are wrong."""
    for n in (1, 2, 5, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                drawn = [min(which) < c for which in combinations(range(n), k)]  # c right ones first
                assert evaluate.pass_at_k(n, c, k) == pytest.approx(np.mean(drawn), abs=1e-14)
    assert evaluate.pass_at_k(10_000, 10, 100) == pytest.approx(1 - 0.99**10, rel=0.01)


def test_standard_error_is_that_of_resampled_problems():
    values = np.random.default_rng(0).random(400)
    means = values[np.random.default_rng(1).integers(400, size=(4000, 400))].mean(1)
    assert evaluate.standard_error(values) == pytest.approx(means.std(), rel=0.05)
    assert evaluate.standard_error(values[:1]) == 0


def test_pictures_leave_matplotlib_as_it_was(tmp_path):
    """Catches: a notebook whose own plots change, or are not shown any more, once a run has been drawn."""
    import matplotlib.pyplot as plt

    plt.get_backend()  # it chooses one now
    before = dict(plt.rcParams)
    with evaluate.picture(tmp_path / "a.png", 1, 2) as (_, (a, b)):
        a.plot([1, 2])
        assert not b.spines["top"].get_visible()
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert dict(plt.rcParams) == before and plt.get_fignums() == []


@pytest.mark.parametrize(
    "name, want",
    [("Qwen2.5-Math-1.5B", "Qwen/Qwen2.5-Math-1.5B"), ("owner/model", "owner/model")],
)
def test_model_names(name, want):
    assert rollout.resolve_model(name) == want


@pytest.mark.parametrize("name", ["no-such-model", "/no/such/folder", str(ROOT / "tests")])
def test_unknown_models_are_refused(name):
    with pytest.raises(ValueError, match="--model"):
        rollout.resolve_model(name)


def test_held_out_problems_are_those_train_holds_out():
    """Whatever the seed. Catches: a model scored on problems that it trained on."""
    held_out = train.prepare(train.settings({"seed": 7}))[1]
    assert len(held_out) == 256
    assert evaluate.prepare(evaluate.parse_args(["--held-out", "256"]))[0] == held_out


def test_measures_against_counting():
    """Catches: a measure that mixes up samples and problems, and shares that do not add up."""
    rng = np.random.default_rng(0)
    right = (rng.random((50, 6)) < rng.random((50, 1))).astype(float)
    right[0], right[1] = 0, 1
    tokens, finished = rng.integers(1, 9, (50, 6)), rng.random((50, 6)) < 0.7
    got = {name: x.mean() for name, x in evaluate.measures(right, tokens, finished).items()}
    assert list(got)[:5] == ["avg@6", "pass@1", "pass@2", "pass@4", "pass@6"]
    for k in (1, 2, 4, 6):
        subsets = [np.any([row[list(s)] for s in combinations(range(6), k)], 1).mean() for row in right]
        assert got[f"pass@{k}"] == pytest.approx(np.mean(subsets))
    assert got["avg@6"] == pytest.approx(right.mean())
    always = sum(row.all() for row in right) / 50
    never = sum(not row.any() for row in right) / 50
    assert (got["always_solved"], got["never_solved"]) == pytest.approx((always, never))
    assert got["sometimes_solved"] == pytest.approx(1 - always - never)
    assert got["tokens"] == pytest.approx(tokens.mean())
    assert got["truncated"] == pytest.approx(np.mean(~finished))


def test_difference_is_paired():
    """Catches: an interval of two independent samples, far too wide where problems differ a lot."""
    rng = np.random.default_rng(0)
    hard = rng.random(300)
    better = hard + 0.02 + 0.01 * rng.standard_normal(300)
    d = evaluate.difference({"avg@4": better}, {"avg@4": hard})["avg@4"]
    half = 1.96 * (better - hard).std(ddof=1) / np.sqrt(300)
    assert d["mean"] == pytest.approx((better - hard).mean())
    assert (d["low"], d["high"]) == pytest.approx((d["mean"] - half, d["mean"] + half))


# ---------------------------------------------------------------------------------- command line

QUICK = ["--samples", "4", "--temperature", "1", "--max-new-tokens", "40"]


def run(out, *flags):
    """evaluate.main in this process -> what it wrote to --out."""
    evaluate.main([*QUICK, *flags, "--out", str(out)])
    return json.loads(out.read_text())


def fail(capsys, *flags) -> str:
    """The one line that evaluate.main ends with."""
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([*QUICK, *flags])
    assert str(stopped.value.code).startswith("evaluate.py: error: ")
    assert "\n" not in str(stopped.value.code)
    return str(stopped.value.code)


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A folder with the embedded model, its output layer perturbed: a worse model, same tokenizer."""
    import torch

    folder = tmp_path_factory.mktemp("noisy")
    model, tokenizer = rollout.load_model(rollout.resolve_model("tiny"))
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding += 0.05 * torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_command_line(tmp_path):
    """The real one, with what it prints and writes."""
    out = tmp_path / "scores.json"
    command = [sys.executable, "evaluate.py", *QUICK, "--held-out", "256", "--limit", "40"]
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, check=True, capture_output=True, text=True, timeout=300
    )
    record = json.loads(out.read_text())
    (result,) = record["results"]
    scores = {name: x["mean"] for name, x in result["scores"].items()}
    assert 0.1 < scores["avg@4"] < 0.6  # the untrained embedded model
    assert scores["avg@4"] == pytest.approx(scores["pass@1"])
    assert scores["pass@1"] < scores["pass@2"] < scores["pass@4"]
    assert scores["pass@4"] == pytest.approx(1 - scores["never_solved"])
    assert all(0 < result["scores"][name]["se"] < 0.2 for name in ("avg@4", "pass@4", "never_solved"))
    assert re.search(rf"avg@4 +{scores['avg@4']:.3f} ± ", done.stdout)
    assert "first prompt: '" in done.stdout and "40/40" in done.stderr
    assert "answers have at most 40 tokens" in done.stdout
    assert record["settings"] == {
        "samples": 4, "temperature": 1.0, "max_new_tokens": 40, "seed": 0, "engine": "hf", "chat": False,
        "chat_template_kwargs": "{}", "instruction": "", "held_out": 256, "limit": 40, "lenient": False,
        "reward": None, "tasks": "arithmetic",
    }  # fmt: skip
    assert record["command"].startswith("python evaluate.py --samples 4 ")
    assert {"torch", "transformers", "math-verify"} <= record["versions"].keys()

    lines = (tmp_path / "scores.completions.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines[1:]]
    assert len({row["id"] for row in rows}) == len(rows) == 40
    right = [c["right"] for row in rows for c in row["completions"]]
    assert np.mean(right) == pytest.approx(scores["avg@4"]) and len(right) == 160
    for c in rows[0]["completions"]:
        assert score(c["text"], rows[0]["answer"]) == c["right"]


def test_continues_where_it_stopped(tmp_path, monkeypatch):
    """Torn in the second of three batches: the rest must come out as if nothing had happened."""
    out, record = tmp_path / "a.json", tmp_path / "a.completions.jsonl"
    whole = run(out, "--limit", "70")
    lines = record.read_bytes().splitlines(keepends=True)
    assert len(lines) == 71
    record.write_bytes(b"".join(lines[:45]) + lines[45][:30])
    out.unlink()
    sampled = []
    real = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda *a: sampled.append(len(a[1])) or real(*a))
    assert run(out, "--limit", "70") == whole
    assert record.read_bytes() == b"".join(lines)
    assert sampled == [32, 6]
    # More problems go on from those. All there: no model is loaded.
    assert run(out, "--limit", "75")["results"][0]["problems"] == 75 and sampled == [32, 6, 11]
    monkeypatch.setattr(evaluate, "open_sampler", None)
    assert run(out, "--limit", "70")["results"] == whole["results"]
    assert run(out, "--limit", "30")["results"][0]["problems"] == 30


def test_several_models(tmp_path, noisy, capsys):
    """Each has its scores, a later one its paired difference from the first; one call or two."""
    rows = [{"prompt": f"{i % 9 + 1}+{i // 9 + 1}=", "answer": str(i % 9 + i // 9 + 2)} for i in range(40)]
    sums = tmp_path / "sums.jsonl"
    sums.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--tasks", str(sums)]
    first, second = run(tmp_path / "both.json", "--model", "tiny", str(noisy), *flags)["results"]
    d = second["minus_first"]["avg@4"]
    assert f"{d['mean']:+.3f} [{d['low']:+.3f}, {d['high']:+.3f}]" in capsys.readouterr().out
    assert (first["model"], second["model"]) == ("tiny", str(noisy)) and "minus_first" not in first
    for name, d in second["minus_first"].items():
        assert d["mean"] == pytest.approx(second["scores"][name]["mean"] - first["scores"][name]["mean"])
        assert d["low"] <= d["mean"] <= d["high"]
    assert second["minus_first"]["avg@4"]["high"] < 0  # noise does not help
    assert first["weights"] != second["weights"]
    (alone,) = run(tmp_path / "alone.json", "--model", str(noisy), *flags)["results"]
    assert alone["scores"] == second["scores"]


def test_a_reward_of_ones_own_scores_here_too(tmp_path, monkeypatch):
    """Catches: a graded reward counted as it is, or cut to whole numbers."""
    (tmp_path / "mine.py").write_text(
        "def half(tasks, texts):\n    assert texts  # never an empty batch\n"
        "    return [.6 if t < '5' else .5 for t in texts]\n"
    )
    flags = ["--limit", "20", "--reward", f"{tmp_path / 'mine.py'}:half"]
    (result,) = run(tmp_path / "a.json", *flags)["results"]
    rows = [json.loads(line) for line in (tmp_path / "a.completions.jsonl").read_text().splitlines()[1:]]
    answers = [c for row in rows for c in row["completions"]]
    assert all(c["right"] == (c["text"] < "5") for c in answers)
    assert 0 < result["scores"]["avg@4"]["mean"] == np.mean([c["right"] for c in answers]) < 1
    # When it, or a module beside it, has changed, what is there is judged again; otherwise it is believed.
    monkeypatch.setattr(evaluate, "open_sampler", None)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # two edits within a second
    (tmp_path / "helper_of_mine.py").write_text("right = 0.6\n")
    edited = "from helper_of_mine import right\ndef half(tasks, texts):\n    return [right] * len(texts)\n"
    (tmp_path / "mine.py").write_text(edited)
    for right, lines in ((0.6, 41), (0.6, 41), (0.0, 61)):
        (tmp_path / "helper_of_mine.py").write_text(f"right = {right}\n")
        monkeypatch.delitem(sys.modules, "helper_of_mine", raising=False)
        (result,) = run(tmp_path / "a.json", *flags)["results"]
        assert result["scores"]["avg@4"]["mean"] == round(right)
        assert len((tmp_path / "a.completions.jsonl").read_text().splitlines()) == lines
    # And by the verifier, as if it had been asked to.
    (result,) = run(tmp_path / "a.json", "--limit", "20")["results"]
    monkeypatch.undo()
    assert [result] == run(tmp_path / "b.json", "--limit", "20")["results"]


def test_who_judges_where_a_box_is_asked_for():
    assert evaluate.parse_args(["--tasks", "math500"]).instruction == evaluate.BOXED
    judge = evaluate.judge_of(None, evaluate.default_instruction("math500"))
    assert judge.score_many(["It is 5.", r"\boxed{5}"], ["5", "5"]).tolist() == [0, 1]
    judge = evaluate.judge_of(None, "")
    assert judge.score_many(["5", r"\boxed{5}"], ["5", "5"]).tolist() == [1, 1]


class Sayer:
    """A sampler that gives each problem these four texts, the last of them cut by the length limit."""

    def __init__(self, *texts):
        self.texts = texts

    def sample(self, prompts, counts, seed):
        assert seed == 7
        return [
            Rollout(i, tuple(p), (1,), (0.0,), t, t is not self.texts[-1])
            for i, p in enumerate(prompts)
            for t in self.texts
        ]

    def close(self): ...


def test_where_a_box_is_asked_for_only_a_box_counts(tmp_path, monkeypatch):
    """Catches: a benchmark scored leniently without being asked to; verdicts of before that are believed;
    flags that do not arrive."""
    answer, asked, opened = evaluate.reward.load_tasks("arithmetic")[0].answer, [], []
    flags = ("--instruction", evaluate.BOXED, "--chat", "--limit", "1", "--seed", "7")
    flags += ("--chat-template-kwargs", '{"enable_thinking": false}')

    def encode(_, tasks, *how):
        asked.append(how)
        return {t.id: [6] for t in tasks}

    monkeypatch.setattr(
        evaluate, "open_sampler", lambda *a: opened.append(a[1]) or Sayer(answer, answer, answer, "")
    )
    monkeypatch.setattr(rollout, "encode_tasks", encode)
    for more, want in ([], 0.0), (["--lenient"], 0.75), ([], 0.0):
        (r,) = run(tmp_path / "a.json", *flags, *more)["results"]
        assert r["scores"]["avg@4"]["mean"] == want and r["scores"]["truncated"]["mean"] == 0.25
    assert asked == [(evaluate.BOXED, True, {"enable_thinking": False})] * 3
    (settings,) = opened  # asked once
    assert settings["temperature"] == 1 and settings["max_new_tokens"] == 40


def test_changed_weights_are_sampled_anew(tmp_path, noisy):
    """Catches: completions of the old weights, or of other end tokens, counted for the new model under the
    same name."""
    folder, flags = tmp_path / "model", ["--model", str(tmp_path / "model"), "--limit", "20"]
    shutil.copytree(rollout.resolve_model("tiny"), folder)
    (before,) = run(tmp_path / "a.json", *flags)["results"]
    shutil.copy(noisy / "model.safetensors", folder)
    (after,) = run(tmp_path / "a.json", *flags)["results"]
    assert after["scores"] != before["scores"] and after["weights"] != before["weights"]
    (alone,) = run(tmp_path / "b.json", "--model", str(noisy), "--limit", "20")["results"]
    assert after["scores"] == alone["scores"]
    ends = rollout.load_config(str(folder))[1]("1")["input_ids"] + [1]  # an answer with a 1 ends there
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (sooner,) = run(tmp_path / "a.json", *flags)["results"]
    assert sooner["scores"]["tokens"]["mean"] < after["scores"]["tokens"]["mean"]


def test_no_verdict_is_reported(tmp_path, monkeypatch, capsys):
    """Catches: a time-out that looks like a wrong answer."""
    stub = Sayer(r"\boxed{9^{9^{9^9}}}", "49", "50", "")
    monkeypatch.setattr(evaluate, "open_sampler", lambda *_: stub)
    monkeypatch.setattr(evaluate, "judge_of", lambda *_: Verifier(1, timeout=1))
    (result,) = run(tmp_path / "a.json", "--limit", "1", "--seed", "7")["results"]
    assert result["no_verdict"] == 1 and result["scores"]["avg@4"]["mean"] == 0.25
    assert re.search(r"^no verdict +1$", capsys.readouterr().out, re.M)
    row = json.loads((tmp_path / "a.completions.jsonl").read_text().splitlines()[1])
    assert [c["right"] for c in row["completions"]] == [None, False, True, False]
    # And still so when it is read back.
    assert run(tmp_path / "a.json", "--limit", "1", "--seed", "7")["results"] == [result]


FAULTS = {
    "samples": (["--samples", "0"], "--samples 0: must be 1 or more"),
    "temperature": (["--temperature", "nan"], "--temperature nan: must be 0.01 or more"),
    "limit": (["--limit", "-1"], "--limit -1: must be 1 or more"),
    "held out": (["--held-out", "1280"], "hold out fewer"),
    "model": (["--model", "tiny", "no-such-model"], "no-such-model"),
    "tasks": (["--tasks", "absent.jsonl"], "absent.jsonl"),
    "reward": (["--reward", "absent.py:f"], "absent.py"),
    "chat": (["--chat"], "no chat template"),
    "context": (["--max-new-tokens", "250"], "has room for 236: lower --max-new-tokens"),
    "out": (["--out", "/no/such/folder/a.json"], "folder that exists"),
    "out's name": (["--out", "scores.txt"], ".json file"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_is_one_line_and_costs_nothing(fault, capsys, monkeypatch):
    monkeypatch.setattr(rollout, "load_model", None)  # no weights are loaded
    flags, message = FAULTS[fault]
    assert message in fail(capsys, *flags)


def test_records_that_do_not_fit(tmp_path, capsys):
    """Catches: completions of other settings, or somebody else's file, taken for this run's."""
    out, record = tmp_path / "a.json", tmp_path / "a.completions.jsonl"
    run(out, "--limit", "2")
    message = fail(capsys, "--limit", "2", "--seed", "1", "--out", str(out))
    assert "was made with --seed 0, not 1: ask as then, or choose another --out" in message
    lines = record.read_text().splitlines(keepends=True)
    record.write_text(lines[0] + "{}\n" + lines[1])
    assert "a.completions.jsonl, line 2: not a line of" in fail(capsys, "--out", str(out))
    for mine in ('[{"my": "data"}]', '{"my": 1}\n{"other": 2}', "1\n", '{"settings": 3}\n'):  # stays whole
        record.write_text(mine)
        assert "line 1: not a line of" in fail(capsys, "--out", str(out)) and record.read_text() == mine
    record.unlink()
    assert "without its completions" in fail(capsys, "--out", str(out))


def test_damaged_weights_are_one_line(tmp_path, capsys):
    shutil.copytree(rollout.resolve_model("tiny"), tmp_path / "model")
    flags, weights = ["--model", str(tmp_path / "model")], tmp_path / "model" / "model.safetensors"
    for content, words in ((b"damaged", "cannot be loaded"), (b"", "model.safetensors is empty")):
        weights.write_bytes(content)
        assert words in fail(capsys, *flags)
    weights.unlink()
    assert "no weights there" in fail(capsys, *flags)
    tokenizer = weights.with_name("tokenizer.json")
    known = json.loads(tokenizer.read_text())
    known["model"]["vocab"]["="] = 16  # of another model: the weights have 16 rows
    tokenizer.write_text(json.dumps(known))
    assert "its tokenizer says 16, its weights know 16 tokens" in fail(capsys, *flags)


def test_a_wrong_flag_answers_before_torch_is_imported():
    code = (
        "import sys, evaluate\ntry: evaluate.main(['--samples', '0'])\nfinally: print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "False\n")
    assert done.stderr == "evaluate.py: error: --samples 0: must be 1 or more\n"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_agrees_with_transformers(tmp_path, noisy):
    """Two engines one after the other in one process, prompts longer together than vLLM takes at a time."""
    rng = np.random.default_rng(0)
    digits = rng.integers(1, 10, (64, 90))
    rows = [{"prompt": "+".join(map(str, d)) + "=", "answer": str(d.sum())} for d in digits]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", "tiny", str(noisy), "--tasks", str(tmp_path / "long.jsonl")]
    ours = run(tmp_path / "hf.json", *flags, "--engine", "hf")["results"]
    theirs = run(tmp_path / "vllm.json", *flags, "--engine", "vllm")["results"]
    for a, b in zip(ours, theirs, strict=True):
        for name in ("avg@4", "tokens"):
            x, y = a["scores"][name], b["scores"][name]
            assert abs(x["mean"] - y["mean"]) <= 4 * np.hypot(x["se"], y["se"]), (a["model"], name)
