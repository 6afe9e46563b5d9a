"""The README says what is there: its commands parse, its files exist, its numbers are recorded ones."""

import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np

import evaluate
import train

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tutorial"))
import bench_gpu_train  # noqa: E402
import bench_optimizer  # noqa: E402
import neighbours  # noqa: E402
import test_memory  # noqa: E402
import where_it_pays  # noqa: E402
from classic_control.report import holm, paired  # noqa: E402
from where_it_pays import verdict, with_error  # noqa: E402

README = (ROOT / "README.md").read_text()
ONE_GPU = " ".join((ROOT / "tutorial" / "one_gpu.md").read_text().split())
RESULTS = ROOT / "tutorial" / "results"


def test_training_commands_parse():
    """Catches: a flag that was renamed after the README was written."""
    commands = re.findall(
        r"train\.py((?: --?[^\n#`]+)?)", "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
    )
    assert len(commands) >= 3
    for flags in commands:
        words = shlex.split(flags)
        if "--help" not in words:
            given, _ = train.parse_args(words)
            train.check(train.settings(given | {"optimizer": "adamw"}))  # torchao need not be there


def test_evaluating_commands_parse():
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.S))
    commands = re.findall(r"(?<!test_)evaluate\.py((?: --?[^\n#`]+)?)", blocks)
    assert commands
    for flags in commands:
        evaluate.check(evaluate.parse_args(shlex.split(flags)))


def test_files_that_are_named_exist():
    for text, folder in ((README, ROOT), (ONE_GPU, ROOT / "tutorial")):
        for link in re.findall(r"\]\(([^)#:]+)[^):]*\)", text):
            assert (folder / link).exists(), link
        for name in re.findall(r"(?<![\w./])(?:tutorial|tests)/[\w./-]*\w", text):
            assert (ROOT / name).exists() or "N_name" in name, name


def test_headroom():
    """The bar for the first command: most of the gap to the same network taught rightly, in time."""
    h = json.loads((RESULTS / "headroom.json").read_text())
    assert h["ceiling"][0] - h["shipped"][0] >= 0.3 and len(h["runs"]) >= 3
    for run in h["runs"]:
        assert run["gap_closed"] >= 0.5 and run["seconds"] <= 180
    assert "under three minutes on two CPU cores" in README


def test_the_map():
    """The table of results, from the rows that tutorial/where_it_pays.py wrote."""
    assert where_it_pays.map_table() in README
    fallen = where_it_pays.runs("uniform", bed="sums", budget=1024)[0]
    before, after = (success for _, success, *_ in fallen["curve"][-2:])
    assert fallen["seed"] == 0 and f"fell from {before:.3f} to {after:.3f} in its last twenty steps" in README


def test_where_it_pays():
    """The paragraph about few rollouts, from the rows that tutorial/where_it_pays.py wrote."""
    cell, readme = dict(bed="long", budget=203), " ".join(README.split())

    def end(**at):
        return np.mean([r["pass1"] for r in where_it_pays.runs("uniform", **cell | at)])

    ours = np.mean([r["pass1"] for r in where_it_pays.runs("knapsack", **cell)])
    d = {m: where_it_pays.differences("knapsack", m, **cell) for m in ("pass1", "way", "pass4", "pass16")}
    assert {len(x) for x in d.values()} == {16} and d["pass1"].min() > 0
    assert max(holm([paired(x)[-1] for x in d.values()])) < 0.05
    assert f"foretold as a smaller win: {with_error(d['pass1'][8:], '+.3f')}." in readme
    fewer = where_it_pays.differences("knapsack", "solved", **cell)
    assert verdict(fewer) == "loss" and f"{with_error(-fewer, '.0f')} of 1,024." in readme
    said = f"uniform {end():.3f}, the knapsack {ours:.3f}, {with_error(d['pass1'], '+.3f')}"
    assert said in readme, said
    assert f"with {where_it_pays.silent_share():.0%} of uniform's groups silent" in readme
    assert f"{where_it_pays.when_reached('knapsack', **cell):.2f}" == "0.45"
    # Uniform at what two other seeds chose.
    shape_of, rate_of = (where_it_pays.best("uniform", shapes=x, **cell) for x in (True, False))
    assert shape_of == {"prompts": 32, "lr": 2e-4} and rate_of == {"prompts": 64, "lr": 1e-4}
    rate, shape = (where_it_pays.differences("knapsack", base_at=x, **cell) for x in (rate_of, shape_of))
    assert (len(rate), len(shape)) == (8, 16) and verdict(rate) == verdict(shape) == "win"
    said = f"the lowest, at {end(**rate_of):.3f}, too ({with_error(rate, '+.3f')}, eight seeds)"
    assert said in readme, said
    said = f"its best shape, ends at {end(**shape_of):.3f} ({with_error(shape, '+.3f')}, a win once corrected"
    assert said in readme, said
    measures = (where_it_pays.differences("knapsack", m, base_at=shape_of, **cell) for m in d)
    assert max(holm([paired(x)[-1] for x in measures])[:3]) < 0.05
    assert f"{where_it_pays.when_reached('knapsack', base_at=shape_of, **cell):.2f}" == "0.50"
    apart = {rule for rule in where_it_pays.RULES if rule.startswith("saving") or rule.endswith("SGD")}
    others = {*where_it_pays.RULES, "hora", "dapo"} - apart - {"uniform", "knapsack", "cheap first look"}
    assert len(others) == 10
    for name in others:
        assert where_it_pays.differences(name, base="knapsack", **cell).mean() < 0, name
    ours, base = (where_it_pays.differences("paper", base=x, **cell) for x in ("knapsack", "uniform"))
    said = f"is level, {with_error(ours, '+.3f')}, and {with_error(base)} above uniform (sixteen seeds)"
    assert len(ours) == 16 and (verdict(ours), verdict(base)) == ("tie", "win") and said in readme, said
    assert len(where_it_pays.runs("without InfoGain", **cell)) == 8
    each = [where_it_pays.runs(name, **cell) for name in ("choice among 256", "knapsack")]
    choice, ours = (np.mean([r["effective_prompts"] for r in rows]) for rows in each)
    assert choice > 2 * ours and "doubles the share of groups that are mixed and ends no higher" in readme
    # Single rollouts.
    single = where_it_pays.runs("spo-1", **cell)
    above, level = (where_it_pays.differences("spo-1", base=base, **cell) for base in ("uniform", "knapsack"))
    assert len(above) == len(level) == 8 and (verdict(above), verdict(level)) == ("win", "tie")
    said = f"ends at {np.mean([r['pass1'] for r in single]):.3f}, {with_error(above, '+.3f')} above uniform"
    assert said in readme, said
    assert f"the knapsack, {with_error(level, '+.3f')}." in readme
    for base in ("spo-1", "knapsack"):
        both = where_it_pays.differences("knapsack+spo", base=base, **cell)
        assert len(both) == 8 and verdict(both) == "tie"
    ours = where_it_pays.runs("knapsack", **cell)
    took = [np.median([r["update"] for r in rows]) for rows in (single, ours)]
    assert took[0] > 3 * took[1]  # "several times as long"
    # All rules of chapter 10, each at its own rate.
    rules = [rule for rule in [*neighbours.RULES, "knapsack+spo"] if rule != "uniform"]
    table = where_it_pays.corrected_table(rules, tuned=True, **cell)
    lines = [line.split("|")[1:-1] for line in table.splitlines()[2:]]
    corrected = {line[0].strip(): [float(x) for x in line[4::3]] for line in lines}
    assert len(corrected) == 18 and {len(of) for of in corrected.values()} == {4}
    sure = [rule for rule, of in corrected.items() if min(of) < 0.05]
    signs = {"coba": -1, "copo": -1, "dapo": -1, "dcpo": -1, "knapsack+spo": 1, "spo-1": 1}
    assert sorted(sure) == sorted(signs)
    assert 0.045 < min(corrected["spo-1"]) and min(corrected["knapsack"]) < 0.06  # by a hair
    base = where_it_pays.best("uniform", **cell)
    for rule, sign in signs.items():
        own = cell | where_it_pays.best(rule, **cell)
        assert sign * where_it_pays.differences(rule, base_at=base, **own).mean() > 0
    paper, dapo = (where_it_pays.differences(rule, base="knapsack", **cell) for rule in ("paper", "dapo"))
    assert len(paper) == 16 and (verdict(paper), verdict(dapo)) == ("tie", "loss")
    d = where_it_pays.differences("choice among 256", base="knapsack", **cell)
    assert len(d) == 3 and f"ends no higher, {with_error(d, '+.3f')} on three seeds" in readme
    p = [paired(where_it_pays.differences(rule, base="knapsack", **cell))[-1] for rule in others]
    assert [rule for rule, x in zip(others, holm(p), strict=True) if x < 0.05] == ["dapo"]


def test_the_map_is_read_rightly():
    """A quarter more rollouts on the long sums; what would be no tie without the correction."""
    readme = " ".join(README.split())
    four, three = dict(bed="long", budget=256), {"budget": 203}
    ours, more = (
        where_it_pays.differences(x, base=x, base_at=three, **four) for x in ("knapsack", "uniform")
    )
    assert len(ours) == len(more) == 8 and verdict(ours) == "tie"
    assert f"bring uniform {with_error(more)} up, and the knapsack nothing" in readme
    said = {(bed, n, m): verdict(d) for m in ("pass1", "way") for bed in where_it_pays.BEDS
            for n, d in where_it_pays.map_cells(bed, measure=m).items()}  # fmt: skip
    said = {cell: word for cell, word in said.items() if word != "tie"}
    both = {("sums", 512, m): "win" for m in ("pass1", "way")}
    corrected = {("long", 203, m): "win" for m in ("pass1", "way")}
    assert said == both | corrected | {("additions", 102, "way"): "loss"} and "would be three more" in readme
    d = where_it_pays.differences("knapsack", bed="sums", budget=512)
    assert len(d) == 20 and verdict(d[8:]) == "tie"  # "so that is no proof"


def test_a_longer_run():
    """The win on the short sums after 200 steps; beyond chance among all comparisons of the map, too."""
    readme, cell = " ".join(README.split()), dict(bed="sums", budget=512, steps=200)
    ends = {x: [r["pass1"] for r in where_it_pays.runs(x, **cell)] for x in ("uniform", "paper", "knapsack")}
    means = {rule: f"{np.mean(x):.3f}" for rule, x in ends.items()}
    assert [len(x) for x in ends.values()] == [8, 7, 8]
    d, often = (where_it_pays.differences("knapsack", m, **cell) for m in ("pass1", "pass16"))
    assert min(d) > 0 and 24 * paired(d)[-1] < 0.05
    said = f"uniform {means['uniform']}, the knapsack {means['knapsack']}, {with_error(d, '+.3f')}"
    assert said in readme and f"at pass@16 {with_error(often, '+.3f')}" in readme
    share = where_it_pays.when_reached("knapsack", **cell)
    assert f"reaches uniform's end with {share:.2f} of the rollouts, where uniform is 0.03 below it" in readme
    then, end = np.mean([where_it_pays.at(r, (share, 1)) for r in where_it_pays.runs("uniform", **cell)], 0)
    assert f"{end - then:.2f}" == "0.03"
    for other, seeds in (({"prompts": 128}, 8), ({"lr": 3e-4}, 4)):  # uniform's best two on another seed
        end = np.mean([r["pass1"] for r in where_it_pays.runs("uniform", **cell | other)])
        lead = where_it_pays.differences("knapsack", base_at=other, **cell)
        share = where_it_pays.when_reached("knapsack", base_at=other, **cell)
        assert len(lead) == seeds and f"it ends at {end:.3f}" in readme
        said = f"{with_error(lead)} below the knapsack's 64 of eight (eight seeds, uncorrected), which is "
        assert seeds == 4 or f"{said}there after {share:.2f} of the rollouts" in readme
    for other, word in (({"prompts": 128}, "is "), (dict(budget=128, prompts=16, steps=400), "too: +")):
        d = where_it_pays.differences("knapsack", **cell | other)
        assert (len(d), verdict(d)) == (8, "tie") and word + with_error(d) in readme
    above, below = (where_it_pays.differences("paper", base=base, **cell) for base in ("uniform", "knapsack"))
    assert (verdict(above), verdict(below)) == ("tie", "loss")
    said = (
        f"own rule does not do this: it ends at {means['paper']} on seven seeds, {with_error(above)} above "
    )
    assert f"{said}uniform on these, and {with_error(-below)} below the knapsack" in readme
    hard = where_it_pays.differences("knapsack", bed="long", budget=512, steps=200)
    assert len(hard) == 4 and verdict(hard) == "tie"
    # Uniform's rates and shapes, on the seed that chooses: none comes near.
    tuned = [where_it_pays.tuning(x, "sums", 512, 200) for x in ("uniform", "knapsack")]
    best, worst = (f(np.mean(x) for x in of.values()) for f, of in zip((max, min), tuned, strict=True))
    assert len(tuned[0]) == 5 and best < worst


def test_saving():
    """What is left out, and at what price, on the three beds."""
    left = {}
    for bed, budget in (("sums", 512), ("additions", 256), ("long", 512)):
        ours = where_it_pays.runs("saving", bed=bed, budget=budget)
        left[bed] = (
            1 - np.mean([r["spent"] for r in ours]) / budget / where_it_pays.BEDS[bed]["usual"]["steps"]
        )
        assert len(ours) == 3
    assert 0.2 < left["sums"] < 0.25 and left["long"] > 0.5  # "a quarter", "more than half"
    assert verdict(where_it_pays.differences("saving", bed="sums", budget=512)) == "tie"
    lost = where_it_pays.differences("saving", bed="long", budget=512)
    readme = " ".join(README.split())
    assert f"additions {left['additions']:.0%} less" in readme and f"ends {with_error(-lost)} lower" in readme
    ends = (
        [r["pass1"] for r in where_it_pays.runs(x, bed="additions", budget=256)]
        for x in ("saving", "uniform")
    )
    ours, base = map(np.array, ends)  # of a CPU and a GPU: no pairs
    assert abs(ours.mean() - base.mean()) < ours.std(ddof=1) / len(ours) ** 0.5


def test_the_pretrained_model():
    """What SmolLM2 gains and loses with eight rollouts a prompt; its silent groups are mostly solved ones."""
    cell = dict(bed="additions", budget=256)
    solved, always = (where_it_pays.differences("knapsack", k, **cell) for k in ("solved", "always16"))
    assert verdict(solved) == "win" and verdict(always) == "loss"
    both = np.concatenate(list(where_it_pays.map_cells("additions").values()))
    assert verdict(both) == "loss"
    assert f"are a loss, uncorrected: {with_error(-both)} at the end" in " ".join(README.split())
    said = f"{solved.mean():.0f} more of 256 training problems are ever solved, and the share of fresh ones"
    said += f" that are right 16 times of 16 is {-always.mean():.2f} lower"
    assert said in " ".join(README.split())
    for row in where_it_pays.load(bed="additions", device="cuda"):
        assert row["gpu"] == "NVIDIA H200" and row["all_right"] > row["all_wrong"]


def test_what_a_card_showed():
    """The paragraph about one H100, and that sharing prompts does not pay there as on a CPU."""
    step, update = (json.loads((RESULTS / f"bench_gpu{name}.json").read_text()) for name in ("_train", ""))
    assert "H100 80GB" in step["device"] and "H100 80GB" in update["device"]
    found = bench_gpu_train.summary(step["laps"], step["rows"])
    assert found == step["summary"] and f"with vLLM {step['vllm']} and torch {step['torch'][:6]}" in ONE_GPU
    seconds, speed, peak = (found[name] for name in ("seconds", "tokens_per_second", "peak_gib"))
    said = f"(median of two) takes {found['seconds_a_step']:.0f} s: "
    said += f"{seconds['sample']:.0f} for sampling 512 responses "
    said += f"({round(speed['sample'], -2):,} tokens/s), {seconds['update']:.0f} for the update "
    said += f"({round(speed['update'], -2):,} tokens/s), "
    said += f"{seconds['canary and sleep'] + seconds['wake and sync']:.1f} for vLLM to fall asleep"
    assert said in ONE_GPU, said
    assert f"{1000 * seconds['allocate']:.0f} ms for the allocation" in ONE_GPU
    needs = test_memory.needs(test_memory.large(), test_memory.qwen("1.5B"), "vllm", card=85e9)
    seen = [f"{peak[name] * 2**30 / 1e9:.1f}" for name in ("update", "sample")]
    sums = [f"{sum(needs[name].values()) / 1e9:.1f}" for name in ("update", "sampling")]
    said = "{} GB are in use in the update and {} while sampling, where the arithmetic says {} and {}"
    assert said.format(*seen, *sums) in ONE_GPU
    short = (
        f"a step takes {found['seconds_a_step']:.0f} s: {seconds['sample']:.0f} for sampling 512 responses, "
    )
    short += f"{seconds['update']:.0f} for the update. At most {seen[0]} GB are in use, where the arithmetic "
    assert f"{short}says {sums[0]}." in " ".join(README.split())
    whole, silent = update["update"][:2]
    assert silent["silent"] == 0.6 and whole["rollouts"] == silent["rollouts"] == 256
    assert f"takes {whole['seconds']:.1f} s, and {silent['seconds']:.1f} if 60% of them" in ONE_GPU
    # Sharing prompts of 128 in groups of 8 saves 7 of 8 prompts, and takes longer all the same.
    (shared,) = (row for row in update["update"] if row["shared"])
    slower, saved = shared["seconds"] / whole["seconds"], 7 / 8 * 128 / (128 + 1024)
    assert f"{slower:.1f}" == "1.4" and f"{saved:.1f}" == "0.1"  # grpo.sharing_wins says so
    assert f"{1 - (1 - saved) / slower:.2f}" == "0.37"
    # What a pass costs whatever is in it, in tokens: 7 rows of 1152 fit into 8192, 3 into half of that.
    (half,) = (row for row in update["update"] if row["tokens_per_microbatch"] == 4096)
    a_pass = (half["seconds"] - whole["seconds"]) / (-(-256 // 3) - -(-256 // 7))
    a_token = (whole["seconds"] - -(-256 // 7) * a_pass) / (256 * (128 + 1024))
    assert round(a_pass / a_token, -2) == 2700  # grpo.microbatches says so


def test_replay():
    """The two shares of rollouts in mixed groups, replayed on real success rates."""
    rules = json.loads((RESULTS / "allocation_replay.json").read_text())["rules"]
    shares = [f"{rules[name]['effective_rollouts'][0]:.2f}"[1:] for name in ("uniform", "knapsack")]
    assert "rises from {} to {}".format(*shares) in " ".join(README.split())


def test_the_optimizer_in_8_bits():
    """Both curves' differences and what a step costs, from what tests/bench/bench_optimizer.py wrote."""
    curves = [bench_optimizer.curves("SmolLM2", name)[:, 1:].mean(1) for name in bench_optimizer.OPTIMIZERS]
    assert np.allclose(curves[0] - curves[1], 1 / 256, atol=1e-9)  # each seed loses one answer
    for bed in bench_optimizer.FLAGS:
        of = bench_optimizer.compare(bed)
        end, way = (f"{of[k][0]:+.3f} ± {of[k][1]:.3f}" for k in ("end", "way"))
        assert f"{end} at the end and {way} on the way" in ONE_GPU, (bed, end, way)
        steps = {r["optimizer"]: r for r in bench_optimizer.load()["steps"] if r["bed"] == bed}
        seconds = [f"{steps[name]['seconds']:.2g}" for name in bench_optimizer.OPTIMIZERS]
        held = [f"{steps[name]['state_bytes'] / 1e6:.0f}" for name in bench_optimizer.OPTIMIZERS]
        said = "{1} MB of state instead of {0}, {3} s a step instead of {2}".format(*held, *seconds)
        assert said in ONE_GPU, (bed, said)


def test_kills():
    """The sentence about interrupted runs, from what tests/bench/stress_resume.py wrote."""
    record = json.loads((RESULTS / "stress_resume.json").read_text())
    assert f"after {record['kills']} kills at random moments" in README and record["different"] == []
