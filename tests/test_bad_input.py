"""Bad input: one line that says what is wrong, a non-zero exit, and every file as it was before."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import rollout
import train

ROOT = Path(__file__).parent.parent
TINY = ROOT / "tutorial" / "tiny_model"
CONFIG = dataclasses.asdict(train.settings({}))


def jsonl(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def config(**changes):
    return json.dumps({k: v for k, v in (CONFIG | changes).items() if v is not ...})


GOOD = {"prompt": "1+1=", "answer": "2"}

# What the run of a test's folder "old" had before it was interrupted, as a checkpoint says it.
OLD = {"old/config.json": config(), "old/metrics.jsonl": jsonl({"step": 0})}
STEP = {"old/groups.jsonl": jsonl({"step": 1})}


def checkpoint(**state):
    text = json.dumps({"step": 0, "best": [0, 0], "tasks": None} | state)
    sums = f"{hashlib.sha256(text.encode()).hexdigest()}  state.json\n"
    folder = "old/checkpoint/step-000000"
    return {f"{folder}/state.json": text, f"{folder}/SHA256SUMS": sums}


# name: (the command's flags, the files there, what the last line must say)
CASES = {
    "budget below n_min": ("--prompts 64 --budget 127", {}, "raise --budget, or lower --n-min"),
    "budget above n_max": ("--prompts 4 --budget 513", {}, "lower --budget, or raise --n-max"),
    "no budget": ("--budget 0", {}, "--budget 0: must lie between 1 and"),
    "a negative budget": ("--budget -8", {}, "--budget -8: must lie between 1 and"),
    "n_min above n_max": ("--n-min 9 --n-max 8", {}, "--n-min 9 is above --n-max 8"),
    "n_min of zero": ("--n-min 0", {}, "--n-min 0: must lie between 1 and"),
    "n_max of one": ("--n-min 1 --n-max 1 --budget 64", {}, "--n-max 1: must lie between 2 and"),
    "no steps": ("--steps 0", {}, "--steps 0: must lie between 1 and"),
    "negative steps": ("--steps -3", {}, "--steps -3: must lie between 1 and"),
    "half a step": ("--steps 1.5", {}, "invalid int value: '1.5'"),
    "no prompts": ("--prompts 0", {}, "--prompts 0: must lie between 1 and"),
    "no learning rate": ("--lr 0", {}, "--lr 0.0: must lie between"),
    "a learning rate that is not a number": ("--lr nan", {}, "--lr nan: must lie between"),
    "an infinite learning rate": ("--lr inf", {}, "--lr inf: must lie between"),
    "a learning rate beyond all reason": ("--lr 1e38", {}, "--lr 1e+38: must lie between 1e-12 and 1"),
    "a learning rate in words": ("--lr small", {}, "invalid float value: 'small'"),
    "temperature of zero": ("--temperature 0", {}, "--temperature 0.0: must lie between 0.01 and"),
    "temperature below what vLLM samples at": ("--temperature 0.001", {}, "must lie between 0.01 and"),
    "evaluation at a negative temperature": ("--eval-temperature -1", {}, "must lie between 0.01 and"),
    "a negative warm-up": ("--warmup-steps -1", {}, "--warmup-steps -1: must lie between 0 and"),
    "no minibatches": ("--minibatches 0", {}, "--minibatches 0: must lie between 1 and"),
    "a lower clip of one": ("--clip-low 1", {}, "must lie between 0.001 and 0.999"),
    "a lower clip of zero": ("--clip-low 0", {}, "--clip-low 0.0: must lie between"),
    "a negative upper clip": ("--clip-high -0.2", {}, "--clip-high -0.2: must lie between"),
    "no memory": ("--tokens-per-microbatch 0", {}, "--tokens-per-microbatch 0: must lie between 1 and"),
    "empty responses": ("--max-new-tokens 0", {}, "--max-new-tokens 0: must lie between 1 and"),
    "empty prompts": ("--max-prompt-tokens 0", {}, "--max-prompt-tokens 0: must lie between 1 and"),
    "evaluation every zero steps": ("--eval-every 0", {}, "--eval-every 0: must lie between 1 and"),
    "evaluation without samples": ("--eval-samples 0", {}, "--eval-samples 0: must lie between 1 and"),
    "a save every zero steps": ("--save-every 0", {}, "--save-every 0: must lie between 1 and"),
    "the whole GPU for vLLM": ("--gpu-memory 1", {}, "must lie between 0.01 and 0.99"),
    "a negative seed": ("--seed -1", {}, "--seed -1: must lie between 0 and"),
    "a negative number held out": ("--held-out -1", {}, "--held-out -1: must lie between 0 and"),
    "everything held out": ("--held-out 1280", {}, "are too few for 64 prompts and 1280 held out"),
    "fewer tasks than a batch": ("--limit 63", {}, "--limit 63 is below --prompts 64"),
    "more prompts than tasks": ("--prompts 2000 --budget 8000", {}, "bring more tasks"),
    "an allocator nobody wrote": ("--allocator magic", {}, "--allocator magic: choose from knapsack, paper"),
    "an engine nobody wrote": ("--engine magic", {}, "--engine magic: choose from auto, vllm, hf"),
    "an optimizer nobody wrote": ("--optimizer sgd", {}, "--optimizer sgd: choose from adamw, adamw8bit"),
    "a flag nobody wrote": ("--learning-rate 1", {}, "unrecognized arguments"),
    "an unknown model": ("--model gpt", {}, "--model gpt: not tiny, a folder, or a hub id"),
    "a folder without a model": ("--model /", {}, "not a folder with a config.json"),
    "a file for a model": ("--model m.bin", {"m.bin": "x"}, "not a folder with a config.json"),
    "unknown tasks": ("--tasks sums", {}, "neither a file nor one of arithmetic, gsm8k"),
    "missing tasks": ("--tasks no/such.jsonl", {}, "no/such.jsonl"),
    "a folder of tasks": ("--tasks t", {"t/tasks.jsonl": jsonl(GOOD)}, "t: cannot be read"),
    "tasks without a row": ("--tasks t.jsonl", {"t.jsonl": ""}, "t.jsonl: no tasks in it"),
    "tasks that are no JSON": ("--tasks t.jsonl", {"t.jsonl": jsonl(GOOD) + "oops\n"}, "line 2: not JSON"),
    "tasks that are no text": ("--tasks t.jsonl", {"t.jsonl": b"\xff\xfe\xff"}, "t.jsonl: cannot be read"),
    "parquet that is none": ("--tasks t.parquet", {"t.parquet": "x"}, "t.parquet: cannot be read"),
    "a task without an answer": (
        "--tasks t.jsonl", {"t.jsonl": jsonl(GOOD) + "\n" + '{"prompt": "2="}\n'}, "line 3: needs the keys",
    ),
    "a number for a prompt": ("--tasks t.jsonl", {"t.jsonl": jsonl(GOOD | {"prompt": 7})}, "must be text"),
    "a list for an answer": ("--tasks t.jsonl", {"t.jsonl": jsonl(GOOD | {"answer": [2]})}, "or a number"),
    "a list for a task": ("--tasks t.jsonl", {"t.jsonl": "[1, 2]\n"}, "row 1: needs the keys"),
    "an id that is no text": ("--tasks t.jsonl", {"t.jsonl": jsonl(GOOD | {"id": 1.5})}, "the id"),
    "an id twice": ("--tasks t.jsonl", {"t.jsonl": jsonl(GOOD | {"id": "a"}) * 2}, "'a' is also in line 1"),
    "a brace too many": ("--tasks t.jsonl", {"t.jsonl": jsonl(GOOD | {"answer": "}"})}, "brace"),
    "one task": ("--tasks t.jsonl", {"t.jsonl": jsonl(GOOD)}, "1 tasks are too few"),
    "a run folder that holds a run": ("--out old", OLD, "choose another, or --resume it"),
    "a run folder that holds something else": ("--out d", {"d/thesis.tex": "x"}, "is not an empty folder"),
    "a file for a run folder": ("--out f", {"f": "x"}, "is not an empty folder"),
    "a run folder under a file": ("--out f/run", {"f": "x"}, "f/run"),
    "a run folder where nobody may write": ("--out /proc/run", {}, "/proc/run"),
    "a resumed run that is not there": ("--resume no/such/run", {}, "no config.json there"),
    "resumed with other settings": (
        "--resume old --lr 1 --steps 100 --seed 2", OLD, "has --lr 0.0003 (not 1.0), --seed 0 (not 2): drop",
    ),
    "resumed into another folder": ("--resume old --out new", OLD, "drop --out"),
    "resumed from settings cut short": ("--resume old", {"old/config.json": '{"steps": 1'}, ": Expecting"),
    "resumed from a list of settings": ("--resume old", {"old/config.json": "[1]"}, "no table of settings"),
    "resumed with a setting too many": (
        "--resume old", {"old/config.json": config(gamma=1)}, "unrecognized arguments: --gamma=1",
    ),
    "resumed with words for a number": (
        "--resume old", {"old/config.json": config(steps="ten")}, "--steps: invalid int value: 'ten'",
    ),
    "resumed with a setting out of range": (
        "--resume old", {"old/config.json": config(allocator="magic")}, "--allocator magic: choose from",
    ),
    "resumed somebody's run that would run code": (
        "--resume old", {"old/config.json": config(trust_remote_code=True)}, "add --trust-remote-code",
    ),
    "resumed after its settings were edited": (
        "--resume old", OLD | checkpoint(config=CONFIG | {"lr": 0.5}), "json has changed: --lr: put it",
    ),
    "resumed with an abbreviated setting": ("--resume old", {"old/config.json": '{"ste": 9}'}, "--ste=9"),
    "resumed with fewer steps": ("--resume old --steps 50", OLD, "has --steps 100 (not 50): drop that"),
    "resumed without a whole checkpoint": ("--resume old", OLD, "has rows, but no whole checkpoint"),
    "resumed with damaged checkpoints only": (
        "--resume old",
        OLD | checkpoint() | {"old/checkpoint/step-000000/notes.txt": "the good one"},
        "no whole checkpoint: it is left as it is",
    ),
    "resumed a model instead of its run": (
        "--resume old/final", {"old/final/config.json": '{"model_type": "llama"}'}, "no run; --resume",
    ),
    "resumed after its tasks were edited": (
        "--resume old", OLD | checkpoint(tasks="another fingerprint"), "--tasks arithmetic has changed",
    ),
    "resumed after its reward was edited": (
        "--resume old",
        OLD
        | {"old/config.json": config(reward="mine.py:f"), "mine.py": ""}
        | checkpoint(tasks="another fingerprint"),
        "mine.py:f has changed since",
    ),
    "comparing a run that is not there": ("--compare no/such/run", {}, "no config.json, metrics.jsonl"),
    "comparing with a flag for training": ("--compare old --lr 1", OLD, "--compare draws what exists"),
    "comparing a run without a step": ("--compare old", OLD, "of at least one step there"),
    "comparing damaged metrics": ("--compare old", OLD | STEP | {"old/metrics.jsonl": "{\n"}, "is damaged"),
    "comparing into a folder that is not there": (
        "--compare old --out no/such.png", OLD | STEP, "name a picture",
    ),
}  # fmt: skip


def contents(folder):
    found = (p for p in folder.rglob("*") if p.name != "lock")
    return {p.relative_to(folder): p.is_file() and p.read_bytes() for p in found}


def put(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_changed(case, main, tmp_path, monkeypatch):
    flags, files, says = CASES[case]
    put(tmp_path, files)
    before = contents(tmp_path)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as heard:
        error, said = main(*flags.split())
    assert isinstance(error, str) and "\n" not in error and says in error and not heard
    assert contents(tmp_path) == before
    assert "sampling with" not in said  # nothing was loaded


def test_the_command_says_it_and_fails(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--budget", "0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("train.py: error: --budget 0: must") and done.stderr.count("\n") == 1


# ------------------------------------------------------------- what only loading the model can tell


def edit_json(name, **changes):
    def edit(model):
        values = json.loads((model / name).read_text()) | changes
        (model / name).write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))

    return edit


def edit_weights(change):
    def edit(model):
        weights = load_file(model / "model.safetensors")
        save_file(change(weights), model / "model.safetensors", metadata={"format": "pt"})

    return edit


def cut_short(model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def as_pickle(model):
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()


def without_tokenizer(model):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()


def tokens_of_another_model(model):
    """One more word in the tokenizer than the weights have rows."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["="] = 16
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))


MODELS = {  # name: (what is done to a copy of the embedded model, more flags, what the line must say)
    "weights cut short": (cut_short, "", "cannot be loaded (SafetensorError"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "", "cannot be loaded (OSError"),
    "weights that can run code": (as_pickle, "", "cannot be loaded (OSError"),
    "no tokenizer": (without_tokenizer, "", "the tokenizer reads"),
    "a damaged tokenizer": (lambda m: (m / "tokenizer.json").write_text("[]"), "", "loaded (TypeError"),
    "another model's tokenizer": (tokens_of_another_model, "", "its weights know 16 tokens"),
    "a config that is no JSON": (lambda m: (m / "config.json").write_text("{"), "", "loaded (OSError"),
    "a model's own code": (
        edit_json("config.json", model_type="x", auto_map={"AutoConfig": "mine.Config"}), "",
        "code of its own, which --trust-remote-code runs",
    ),
    "a model nobody knows": (edit_json("config.json", model_type="x"), "", "cannot be loaded (ValueError"),
    "weights of another shape": (edit_json("config.json", intermediate_size=64), "", "config.json's shape"),
    "weights with a layer missing": (
        edit_weights(lambda w: {k: v for k, v in w.items() if "layers.1." not in k}), "",
        "are missing from its weights",
    ),
    "weights that are not numbers": (
        edit_weights(lambda w: w | {"model.norm.weight": w["model.norm.weight"] * float("nan")}), "",
        "its weights hold NaN or infinity, first in model.norm.weight",
    ),
    "prompts above the context": (lambda m: None, "--max-new-tokens 250", "the model's context of 256"),
    "no chat template": (lambda m: None, "--chat", "drop the flag"),
}  # fmt: skip


@pytest.mark.parametrize("case", MODELS)
def test_models_that_cannot_be_used(case, main, tmp_path):
    """Catches: random layers in place of missing ones, prompts that became nothing, a traceback."""
    edit, flags, says = MODELS[case]
    shutil.copytree(TINY, tmp_path / "model")
    edit(tmp_path / "model")
    small = ["--tasks", "arithmetic", "--max-new-tokens", "8", "--engine", "hf", "--out", tmp_path / "run"]
    error, _ = main("--model", tmp_path / "model", *small, *flags.split())
    assert says in error and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_a_model_without_a_pad_token_is_as_good(main, tmp_path):
    """Nothing here needs one: prompts are padded with a mask, responses are kept flat."""
    shutil.copytree(TINY, tmp_path / "model")
    for name in ("config.json", "generation_config.json"):
        edit_json(name, pad_token_id=...)(tmp_path / "model")
    edit_json("tokenizer_config.json", pad_token=...)(tmp_path / "model")
    small = ["--tasks", "arithmetic", "--steps", 1, "--prompts", 4, "--budget", 8, "--held-out", 4]
    small += ["--max-new-tokens", 40, "--max-prompt-tokens", 64, "--eval-samples", 1, "--engine", "hf"]
    losses = []
    for model in (tmp_path / "model", TINY):
        out = tmp_path / model.name
        code, said = main("--model", model, *small, "--out", out / "run")
        assert code == 0, said
        losses.append(json.loads((out / "run" / "metrics.jsonl").read_text().splitlines()[1])["loss"])
    assert losses[0] == losses[1]


def test_a_hub_model_out_of_reach(main, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    error, _ = main("--model", "nobody/nothing", "--tasks", "arithmetic", "--out", tmp_path / "run")
    assert "--model nobody/nothing: cannot be loaded" in error and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_vllm_that_is_not_there(main, tmp_path, monkeypatch):
    monkeypatch.setattr("rollout.vllm_build", lambda: None)
    error, _ = main("--engine", "vllm", "--out", tmp_path / "run")
    assert "`pip install vllm" in error and not (tmp_path / "run").exists()


@pytest.mark.parametrize("lacks", ["torchao", "compiler"])
def test_an_optimizer_that_cannot_run(main, tmp_path, monkeypatch, lacks):
    """Not installed, or without the compiler that its first step calls: said before anything is loaded."""
    monkeypatch.setattr("train.find_spec", lambda name: None if lacks == "torchao" else name)
    monkeypatch.setattr("shutil.which", lambda name: None)
    error, said = main("--optimizer", "adamw8bit", "--out", tmp_path / "run")
    says = {"torchao": "`pip install torchao==0.18.0` first", "compiler": "install g++"}[lacks]
    assert says in error and "\n" not in error and "sampling" not in said
    assert not (tmp_path / "run").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk]).returncode
    ):
        pytest.skip("mounting a file system takes more rights than these")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize(
    "flags, weights",
    [
        ({}, 12),  # four checkpoints of weights and two moments
        ({"optimizer": "adamw8bit"}, 6.4),
        ({"steps": 10}, 7),  # two, and final/
        ({"steps": 60, "save_every": 100}, 12),  # each new best is saved besides
    ],
)
def test_the_disk_that_a_run_needs(flags, weights, tmp_path, monkeypatch):
    """Catches: a checkpoint more at a time than was asked for, moments of another size."""
    model, _ = rollout.load_model(rollout.resolve_model("tiny"))
    needed, c = weights * sum(p.nbytes for p in model.parameters()), train.settings(flags)
    for free, enough in ((1.001 * needed, True), (0.999 * needed, False)):
        monkeypatch.setattr(train.shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        with contextlib.nullcontext() if enough else pytest.raises(ValueError, match="make room there first"):
            train.check_model(c, tmp_path, model, [[1, 2, 3]])


def test_a_disk_that_is_full_or_too_small(main, small_disk):
    """Catches: a run that fails at its first checkpoint, hours later."""
    error, _ = main("--out", small_disk / "run", "--engine", "hf")
    assert "make room there first" in error and not (small_disk / "run").exists()
    with pytest.raises(OSError):
        (small_disk / "filler").write_bytes(bytes(2**21))
    error, _ = main("--out", small_disk / "run", "--engine", "hf")
    assert "No space left on device" in error and not (small_disk / "run").exists()
