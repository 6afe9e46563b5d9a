"""Nothing is lost: kills, damaged checkpoints, failed writes; then the same end as if nothing had been."""

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import stress_resume
from stress_resume import ROOT, STEPS, differences, disturb, files_in, n_rows, rows, start

import knapsack
import reward
import train


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A run that nobody disturbed, through the real command line."""
    out = tmp_path_factory.mktemp("calm") / "run"
    _, stderr = (process := start(out)).communicate()
    assert process.returncode == 0, stderr
    return out


@pytest.fixture
def broken_off(calm, tmp_path):
    """A copy of the run as a kill just after its last checkpoint leaves it."""
    shutil.copytree(calm, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    return tmp_path / "run"


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def checkpoints(out):
    return sorted((out / "checkpoint").glob("step-??????"))


# ------------------------------------------------------------------------------------------ kills


def test_resume_before_the_first_checkpoint(calm, main, tmp_path):
    """A run that died while loading has a config.json and nothing else; also: same seed, same files."""
    shutil.copy(calm / "config.json", tmp_path)
    code, _ = main("--resume", tmp_path)
    assert code == 0 and differences(calm, tmp_path) == []


@pytest.mark.parametrize("sent", [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_a_killed_run_resumes_to_the_same_end(calm, tmp_path, sent):
    """Catches: optimizer, tracker or best not restored, a random stream that went on, doubled rows.
    Ctrl-C ends with a checkpoint and a sentence; a hard kill loses what came after the last one."""
    out = tmp_path / "run"
    process = start(out)
    stress_resume.wait_for("some rows later", process, out, random.Random(1), 0)
    process.send_signal(sent)
    stdout, stderr = process.communicate(timeout=300)
    if sent == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130, stderr
        assert "go on with: python train.py --resume" in stdout and "Traceback" not in stderr
        stopped = int(stdout.split("stopped after step ")[1].split(";")[0])
        assert checkpoints(out)[-1].name == f"step-{stopped:06d}"
    assert not (out / "final").exists() and n_rows(out) <= STEPS
    assert disturb(out, random.Random(0), 0, 0) == []
    assert differences(calm, out) == []


@pytest.mark.slow
def test_ten_kills_at_random_moments(calm, tmp_path):
    """During saves and evaluations among them; tests/bench/stress_resume.py does a hundred."""
    rng, killed = random.Random(0), []
    for out in (tmp_path / f"run{k}" for k in range(30)):  # a run may end before its next kill
        killed += disturb(out, rng, 10 - len(killed), launch_seconds=8)
        assert differences(calm, out) == []
        if len(killed) == 10:
            return
    raise AssertionError(f"only {killed}")


def test_a_finished_run_is_left_alone(calm, main):
    before = tree(calm)
    code, said = main("--resume", calm, "--steps", STEPS, "--out", calm)  # its own flags are no contradiction
    assert code == 0 and "nothing to resume" in said
    assert tree(calm) == before


def test_a_kill_before_final(calm, broken_off, main):
    assert main("--resume", broken_off)[0] == 0 and differences(calm, broken_off) == []


def test_a_run_goes_on_with_its_own_reward(tmp_path):
    """Catches: other code, or other columns for it to read, that pass for what the run began with."""
    code = tmp_path / "mine.py"
    c = train.settings({"reward": f"{code}:f"})

    def fingerprint(**extra):
        return train.first_state(c, [reward.Task("a", "1+1=", "2", extra)], [])["tasks"]

    code.write_text("def f(tasks, texts): ...\n")
    first = fingerprint(unit="m")
    assert first == fingerprint(unit="m") != fingerprint(unit="s")
    one, other = object(), object()  # their addresses differ, as those of pictures do
    assert fingerprint(of=one) == fingerprint(of=other)
    moved = dataclasses.replace(c, reward=f"{code}:g")
    assert first != train.first_state(moved, [reward.Task("a", "1+1=", "2", {"unit": "m"})], [])["tasks"]
    code.write_text("def f(tasks, texts): return [1] * len(texts)\n")
    assert first != fingerprint(unit="m")


def test_a_run_in_use_is_left_alone(broken_off, main):
    """By another process; its children do not hold it when it is killed."""
    code = "import os, sys, time, pathlib, train; file = train.lock(pathlib.Path(sys.argv[1]))\n"
    code += "child = os.fork()\nif child: print(child, flush=True)\ntime.sleep(60)"
    command = [sys.executable, "-c", code, broken_off]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as holder:
        child = int(holder.stdout.readline())
        before = tree(broken_off)
        error, _ = main("--resume", broken_off)
        assert "another train.py is at work on this run" in error
        assert tree(broken_off) == before
        holder.kill()
        holder.wait()
        train.lock(broken_off).close()
        os.kill(child, signal.SIGKILL)  # it was there all the time


def test_files_that_lie_elsewhere_now(main, tmp_path, monkeypatch):
    """The first model is gone, tasks and reward were moved. Catches: a run that is lost with them; others
    taken for the moved ones; paths that hold in one folder only; final/ gone before the rest stands."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "tutorial" / "tiny_model", "model")
    lines = [json.dumps({"prompt": f"{a}+{b}=", "answer": f"{a + b}"}) for a in range(9) for b in range(9)]
    (tmp_path / "t.jsonl").write_text("\n".join(lines))
    (tmp_path / "mine.py").write_text(
        code := "def f(tasks, texts):\n    return [len(t) % 2 for t in texts]\n"
    )
    flags = (
        "--model model --tasks t.jsonl --reward mine.py:f --prompts 4 --budget 8 --held-out 8 --engine hf "
    )
    flags += "--eval-samples 1 --max-new-tokens 8 --max-prompt-tokens 16 --steps 1 --out run"
    assert main(*flags.split())[0] == 0
    run, there = tmp_path / "run", tmp_path / "there"
    there.mkdir()
    shutil.rmtree("model")
    for name in ("mine.py", "t.jsonl"):
        shutil.move(name, there)
    monkeypatch.chdir("/")
    more = ["--resume", run, "--steps", 2, "--tasks", there / "t.jsonl"]
    assert "no function 'f'" in main(*more)[0] and (run / "final").is_dir()
    more += ["--reward", f"{there}/mine.py:f"]
    for name, changed, whole in (("t.jsonl", lines[::-1], lines), ("mine.py", ["# other", code], [code])):
        (there / name).write_text("\n".join(changed))
        assert f"--tasks {there}/t.jsonl or --reward {there}/mine.py:f has changed since" in main(*more)[0]
        (there / name).write_text("\n".join(whole))
    assert main(*more)[0] == 0 and train.read_config(run).reward == f"{there}/mine.py:f"


def test_what_others_leave_beside_the_files(broken_off):
    """Catches: a run lost to a file browser; a copy of a checkpoint taken for the newest one."""
    last, before = checkpoints(broken_off)[-1], checkpoints(broken_off)[-2]
    for folder in (last, last / "optimizer"):
        (folder / ".DS_Store").write_text("")
    (last / ".ipynb_checkpoints").mkdir()
    (last / ".ipynb_checkpoints" / "state.json").write_text("{}")
    for name in ("step-best", "step-1-good", "step-000009 (copy)"):
        shutil.copytree(before, last.with_name(name))
    assert train.newest_checkpoint(broken_off)[0] == last


def test_signals_are_ours_only_while_we_train(main, tmp_path, monkeypatch):
    """Catches: a process that a reward has forked and cannot end; Ctrl-C swallowed after the run."""
    ended, loop = [], train.save_or_stop

    def fork(run, row, stop, clock):
        here, there = os.pipe()
        if (child := os.fork()) == 0:
            os.write(there, b"x")
            time.sleep(60)  # the signal ends it sooner
            os._exit(0)
        os.read(here, 1)  # it is there
        os.kill(child, signal.SIGTERM)
        ended.append((os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stop))
        loop(run, row, stop, clock)

    monkeypatch.setattr(train, "save_or_stop", fork)
    handlers = [signal.getsignal(number) for number in train.STOPS]
    small = ["--steps", 1, "--prompts", 4, "--budget", 8, "--held-out", 4, "--eval-samples", 1]
    assert main(*small, "--engine", "hf", "--out", tmp_path / "run")[0] == 0
    assert ended == [(-signal.SIGTERM, [])]
    assert [signal.getsignal(number) for number in train.STOPS] == handlers
    train.lock(tmp_path / "run").close()


# ---------------------------------------------------------------------------------------- damage


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a bit of the weights": lambda c: flip(c / "model.safetensors"),
    "a bit of the moments": lambda c: flip(c / train.MOMENTS),
    "a bit of the state": lambda c: flip(c / "state.json"),
    "a bit of the tokenizer": lambda c: flip(c / "tokenizer.json"),
    "a bit of the sums": lambda c: flip(c / "SHA256SUMS"),
    "weights cut short": lambda c: (c / "model.safetensors").write_bytes(b""),
    "no moments": lambda c: (c / train.MOMENTS).unlink(),
    "no sums": lambda c: (c / "SHA256SUMS").unlink(),
    "sums cut at a line": lambda c: (c / "SHA256SUMS").write_text(
        "".join((c / "SHA256SUMS").read_text().splitlines(True)[:-1])
    ),
    "sums of a file elsewhere": lambda c: (
        (c / "SHA256SUMS").open("a").write(f"{'0' * 64}  ../../config.json\n")
    ),
    "a code-carrying stranger": lambda c: (c / "optimizer.pt").write_bytes(b"\x80\x04."),
    "half-written": lambda c: c.rename(c.with_suffix(".part")),
    "half-written at the end": lambda c: (c / "SHA256SUMS").unlink() or c.rename(c.with_suffix(".part")),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_recognised_and_the_one_before_is_used(broken_off, case, capsys):
    last, before = checkpoints(broken_off)[-1], checkpoints(broken_off)[-2]
    DAMAGE[case](last)
    found, state = train.newest_checkpoint(broken_off)
    assert found == before and state["step"] == int(before.name[5:])
    said = capsys.readouterr().out
    assert last.name in said and "going on from the checkpoint before" in said
    assert not last.exists()  # so that the step can be saved again
    assert train.newest_checkpoint(broken_off)[0] == before and capsys.readouterr().out == ""


def test_a_whole_checkpoint_is_whole_for_sha256sum_too(calm):
    last = checkpoints(calm)[-1]
    done = subprocess.run(["sha256sum", "-c", "SHA256SUMS"], cwd=last, capture_output=True)
    assert done.returncode == 0 and done.stdout.count(b": OK") == len(files_in(last)) - 1


def test_resume_from_damage_ends_the_same(calm, broken_off, main):
    """The newest checkpoint damaged, a row torn, one row too many: still the same run, to the bit."""
    flip(checkpoints(broken_off)[-1] / train.MOMENTS)
    for name in ("metrics", "groups"):
        with (broken_off / f"{name}.jsonl").open("a") as file:
            file.write('{"step": 99, "reward_')
    code, said = main("--resume", broken_off)
    assert code == 0 and "is damaged" in said and "resuming after step 6" in said
    assert differences(calm, broken_off) == []


def test_a_run_goes_on_with_less_memory(calm, broken_off, main):
    """Catches: a run that ran out of memory and is lost; another setting that changes with those that may;
    what somebody else put beside the checkpoints deleted."""
    last, final = checkpoints(broken_off)[-2:]
    shutil.rmtree(final)
    shutil.copytree(last, kept := last.with_suffix(".keep"))
    (notes := last.with_name("notes.txt")).write_text("the good one")
    less = ["--tokens-per-microbatch", 256, "--checkpointing"]
    error, _ = main("--resume", broken_off, *less, "--n-max", 9)
    assert "the run has --n-max" in error
    assert main("--resume", broken_off, *less)[0] == 0
    c = train.read_config(broken_off)
    assert c == dataclasses.replace(train.read_config(calm), tokens_per_microbatch=256, checkpointing=True)
    assert kept.is_dir() and notes.is_file()
    first = int(last.name[-6:])  # the row after it: rounding has not yet changed anything
    ours, theirs = (rows(out / "metrics.jsonl")[first + 1] for out in (broken_off, calm))
    assert ours["reward_mean"] == theirs["reward_mean"]
    assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)


def test_missing_rows_are_not_made_up(broken_off, main):
    lines = (broken_off / "metrics.jsonl").read_text().splitlines(True)
    (broken_off / "metrics.jsonl").write_text("".join(lines[:4] + lines[5:]))
    error, _ = main("--resume", broken_off)
    assert "metrics.jsonl lacks steps before the checkpoint" in error


def test_checkpoints_hold_no_pickle(calm):
    """Catches: a file that runs code when it is loaded."""
    for path in (calm / "checkpoint").rglob("*"):
        assert path.is_dir() or path.suffix in (".json", ".safetensors") or path.name == "SHA256SUMS"
    for name in ("train.py", "evaluate.py", "rollout.py", "grpo.py", "knapsack.py", "reward.py"):
        # model.eval() is something else.
        assert not re.findall(
            r"(?<![.\w])(eval|exec)\(|torch\.load\(|import pickle", (ROOT / name).read_text()
        )


# ------------------------------------------------------------------------------------ failed writes


def test_a_failed_write_leaves_the_old_checkpoint(calm, broken_off, main):
    """Files may not grow above a megabyte for a while, as on a full disk: the weights have two."""
    for path in checkpoints(broken_off)[-1:]:
        shutil.rmtree(path)
    before = {path: train.checksums(path) for path in checkpoints(broken_off)}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, hard))
    try:
        error, _ = main("--resume", broken_off)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "a write failed" in error and "File too large" in error and "\n" not in error
    assert f"make room, or mend what failed, then python train.py --resume {broken_off}" in error
    assert {path: train.checksums(path) for path in checkpoints(broken_off)} == before
    assert not list(broken_off.rglob("*.part")) and not (broken_off / "final").exists()
    code, _ = main("--resume", broken_off)
    assert code == 0 and differences(calm, broken_off) == []


def test_the_last_two_and_the_best_are_kept(tmp_path):
    """Catches: the best deleted, or older ones before the new one is there. The best is step 2."""
    import torch

    class Part:
        def save_pretrained(self, folder):
            assert [path.name for path in checkpoints(tmp_path)] == held  # nothing has gone yet
            (folder / "weights").write_text("w")

        def parameters(self):
            return [torch.zeros(1)]

    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
    run = SimpleNamespace(out=tmp_path, model=Part(), tokenizer=Part(), optimizer=optimizer)
    run.tracker, run.config, kept = knapsack.SuccessTracker(), train.Config(), []
    for step in range(1, 6):
        held = [path.name for path in checkpoints(tmp_path)]
        run.state = {"step": step, "best": (0.5, min(step, 2))}
        train.save_checkpoint(run)
        kept.append([int(path.name[5:]) for path in checkpoints(tmp_path)])
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5]]


@pytest.mark.parametrize("success, best", [((0.1, 0.3, 0.2, 0.3), 1), ((0.4, 0.3, 0.4, 0.2), 0)])
def test_a_new_best_is_saved_besides(success, best, main, tmp_path, monkeypatch):
    """Of equal ones the first; the untouched model may be it."""
    at = lambda run, step: {"eval_success": success[step], "eval_success_se": 0.0}  # noqa: E731
    monkeypatch.setattr(train, "held_out_success", at)
    flags = "--prompts 4 --budget 8 --held-out 8 --steps 3 --eval-every 1 --save-every 9 --engine hf"
    assert main(*flags.split(), "--out", tmp_path)[0] == 0
    assert [int(path.name[5:]) for path in checkpoints(tmp_path)] == [best, 3]
    state = json.loads((checkpoints(tmp_path)[-1] / "state.json").read_text())
    assert state["best"] == [success[best], best]
