"""--optimizer adamw8bit: torchao's AdamW in 8 bits, its checkpoints, its resumption. Skipped without
torchao, which .ci/run installs for this file."""

import copy
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stress_resume import FLAGS, differences

import train

ROOT = Path(__file__).parent.parent
torchao = pytest.importorskip("torchao", reason="pip install torchao==0.18.0 for --optimizer adamw8bit")


@pytest.fixture
def eager():
    """Without the compiler, which takes a minute."""
    with torch.compiler.set_stance("force_eager"):
        yield


def stepped(name: str, model, steps: int, start: int = 0):
    """(a copy of the model after some steps on gradients that follow from their number, its optimizer)."""
    model = copy.deepcopy(model)
    optimizer = train.make_optimizer(name, model, 1e-3)
    go_on(optimizer, model, steps, start)
    return model, optimizer


def go_on(optimizer, model, steps, start=0):
    for step in range(start, start + steps):
        torch.manual_seed(step)
        optimizer.param_groups[0]["lr"] = 1e-3 * (step + 1)  # a number, as train.py sets it
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 10 ** torch.rand(1)
        optimizer.step()


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


def test_it_is_adamw(loaded, eager):
    """Catches: weight decay left on, a learning rate that does not arrive. Eight bits round moments by 1%."""
    moved = []
    for name in ("adamw", "adamw8bit"):
        model, _ = stepped(name, loaded[0], 5)
        moved.append(flat(model.parameters()) - flat(loaded[0].parameters()))
        still = copy.deepcopy(loaded[0])
        for p in still.parameters():
            p.grad = torch.zeros_like(p)
        train.make_optimizer(name, still, 1.0).step()
        assert torch.equal(flat(still.parameters()), flat(loaded[0].parameters()))
    assert 1e-6 < (moved[0] - moved[1]).norm() / moved[0].norm() < 0.05


def test_checkpoints_hold_all_of_it(loaded, eager, tmp_path):
    """Catches: a scale or a table that is lost on the way, a sign that is guessed wrong."""

    class Tokenizer:
        def save_pretrained(self, folder): ...

    model, optimizer = stepped("adamw8bit", loaded[0], 3)
    run = train.Run(*[None] * 14)
    run.out, run.model, run.tokenizer, run.optimizer = tmp_path, model, Tokenizer(), optimizer
    run.config, run.tracker = train.Config(optimizer="adamw8bit"), train.knapsack.SuccessTracker()
    run.state = {"step": 3, "best": (0.0, 0)}
    train.save_checkpoint(run)
    path, state = train.newest_checkpoint(tmp_path)
    other = copy.deepcopy(model)
    again = train.make_optimizer("adamw8bit", other, 1e-3)
    train.load_optimizer(again, path, state["optimizer"])
    kinds = {type(x).__name__ for of in again.state.values() for x in of.values()}
    assert kinds == {"Tensor", "OptimState8bit"}  # small parameters have plain moments
    go_on(optimizer, model, 2, 3)
    go_on(again, other, 2, 3)
    assert torch.equal(flat(model.parameters()), flat(other.parameters()))
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        mine, theirs = optimizer.state[mine], again.state[theirs]
        for name, x in mine.items():
            parts = [n for n, y in vars(x).items() if torch.is_tensor(y)]
            same = [(getattr(x, n), getattr(theirs[name], n)) for n in parts] or [(x, theirs[name])]
            assert all(torch.equal(a, b) for a, b in same), name


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A run that nobody disturbed, through the real command line and the compiler."""
    out = tmp_path_factory.mktemp("calm") / "run"
    command = [sys.executable, str(ROOT / "train.py"), "--optimizer", "adamw8bit", *map(str, FLAGS)]
    done = subprocess.run([*command, "--out", out], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return out


def test_a_run_resumes_to_the_same_bits(calm, main, tmp_path):
    """The calm run broken off after step 6, in another process. Catches: moments that were not restored."""
    shutil.copytree(calm, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    for path in (tmp_path / "run" / "checkpoint").iterdir():
        if path.name > "step-000006":
            shutil.rmtree(path)
    code, said = main("--resume", tmp_path / "run")
    assert code == 0 and "resuming after step 6" in said
    assert differences(calm, tmp_path / "run") == []


def test_two_runs_are_equal_to_the_bit(calm, main, tmp_path):
    shutil.copy(calm / "config.json", tmp_path)
    code, _ = main("--resume", tmp_path)
    assert code == 0 and differences(calm, tmp_path) == []


def test_a_resumption_without_torchao_is_one_line(calm, main, tmp_path, monkeypatch):
    shutil.copytree(calm, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "final")
    monkeypatch.setattr("train.find_spec", lambda name: None)
    error, said = main("--resume", tmp_path / "run")
    assert "`pip install torchao==0.18.0` first" in error and "\n" not in error and "sampling" not in said


def test_one_version():
    """Catches: a pin that was raised in one place only."""
    files = ["README.md", "requirements.txt", "train.py", ".ci/run", "tests/bench/bench_optimizer.py"]
    pins = {pin for name in files for pin in re.findall(r"torchao==([\d.]+)", (ROOT / name).read_text())}
    assert pins == {torchao.__version__}
    assert all("torchao==" in (ROOT / name).read_text() for name in files)
