r"""The reward: tasks with a known answer, and a verdict of 0.0 or 1.0 on each completion.

A task is a prompt and a gold answer. A completion earns 1.0 when its last \boxed{} answer (or, without
one, the last answer its text gives) equals the gold one as mathematics, and 0.0 otherwise.

>>> from reward import Verifier, load_tasks, score
>>> load_tasks("arithmetic")[0].prompt.endswith("=")
True
>>> score(r"Half of it, so \boxed{\frac{1}{2}}.", "0.5")
1.0
>>> with Verifier(workers=2) as verifier:
...     verifier.score_many(["8 10", "8 11"], ["10", "10"])
array([1., 0.])

The paper calls this the outcome reward r in {0, 1}; a prompt's success probability p is its mean.
Verdicts on anything but plain numbers come from math-verify (sympy), in processes of their own.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import signal
import subprocess
import sys
import threading
import time
import unicodedata
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path

import numpy as np

# ---------------------------------------------------------------------------------------------- tasks


@dataclass(frozen=True)
class Task:
    """One problem: a stable id, the prompt's text as it is, the gold answer as text."""

    id: str
    prompt: str
    answer: str


# name: (hub id, configuration, split, prompt column, answer column, how the answer is taken out)
HUB = {
    "gsm8k": ("openai/gsm8k", "main", "train", "question", "answer", "after ####"),
    "math": ("DigitalLearningGmbH/MATH-lighteval", "default", "train", "problem", "solution", "boxed"),
    "math500": ("HuggingFaceH4/MATH-500", "default", "test", "problem", "answer", ""),
    "aime24": ("HuggingFaceH4/aime_2024", "default", "train", "problem", "answer", ""),
    "aime25": ("math-ai/aime25", "default", "test", "problem", "answer", ""),
    "amc23": ("math-ai/amc23", "default", "test", "question", "answer", ""),
    "minerva": ("math-ai/minervamath", "default", "test", "question", "answer", ""),
    "olympiadbench": ("Hothan/OlympiadBench", "OE_TO_maths_en_COMP", "train", "question", "final_answer", ""),
    "dapo17k": ("open-r1/DAPO-Math-17k-Processed", "all", "train", "prompt", "solution", ""),
}  # fmt: skip


def load_tasks(name_or_path: str) -> list[Task]:
    """The tasks under a name (`arithmetic` or one of HUB) or in a .jsonl / .json / .parquet file.

    A file's rows hold `prompt`, `answer` and, if you like, `id`; a row without one gets the file's stem
    and its row number, so ids stay what they are when other rows are dropped. Rows with an empty answer
    and repeated prompts are dropped, and one warning says how many.

    Raises ValueError, in one line that names file and row: unknown name, missing file, malformed row,
    repeated id, broken gold answer, nothing left.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if name == "arithmetic":
        return _arithmetic()
    if name in HUB:
        rows, where = _hub_rows(name), name
    elif not path.is_file():
        known = ", ".join(["arithmetic", *HUB])
        raise ValueError(f"no tasks called {name!r}: neither a file nor one of {known}")
    elif path.suffix == ".parquet":
        rows, where = _parquet_rows(path), path.stem
    else:
        rows, where = _json_rows(path), path.stem
    return _make_tasks(rows, where, name)


def _arithmetic(n_tasks: int = 1280) -> list[Task]:
    """Distinct chain sums "3+5+2=" of 2 to 10 digits from 1 to 9, always the same ones."""
    rng = random.Random(0)
    answers: dict[str, str] = {}
    while len(answers) < n_tasks:
        digits = [rng.randint(1, 9) for _ in range(rng.randint(2, 10))]
        answers["+".join(map(str, digits)) + "="] = str(sum(digits))
    return [Task(f"arithmetic-{i:04d}", p, a) for i, (p, a) in enumerate(answers.items())]


def _json_rows(path: Path) -> Iterator[tuple[int, dict]]:
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error.msg})") from error
                if not isinstance(row, dict):
                    raise ValueError(
                        f'{path}, line {number}: expected {{"prompt": ..., "answer": ...}}'
                    )
                yield number, row
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason}): save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict]]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path}: cannot be read as parquet ({error})") from error
    yield from enumerate(rows, start=1)


def _hub_rows(name: str) -> Iterator[tuple[int, dict]]:
    from datasets import load_dataset

    hub_id, config, split, prompt_column, answer_column, how = HUB[name]
    try:
        dataset = load_dataset(hub_id, config, split=split)
    except Exception as error:  # whatever the network, the hub or the cache raised: say so and stop
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"cannot load {name} ({hub_id}) from the hub: {reason}; "
            "check the network, or pass a JSON Lines file"
        ) from error
    for number, row in enumerate(dataset, start=1):
        answer = row[answer_column]
        if isinstance(answer, list):
            answer = answer[0] if answer else ""
        if how == "after ####":
            answer = answer.rpartition("####")[2].replace(",", "")
        elif how == "boxed":
            answer = last_boxed(answer) or ""
        yield number, {"prompt": row[prompt_column], "answer": answer}


def _make_tasks(rows: Iterable[tuple[int, dict]], where: str, source: str) -> list[Task]:
    tasks: list[Task] = []
    ids: dict[str, int] = {}
    prompts: set[str] = set()
    n_empty = n_repeated = 0
    for number, row in rows:
        at = f"{source}, line {number}"
        if missing := [key for key in ("prompt", "answer") if key not in row]:
            raise ValueError(f"{at}: no {missing[0]!r}: each row needs prompt and answer")
        prompt, answer, task_id = row["prompt"], row["answer"], row.get("id", f"{where}-{number}")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{at}: prompt must be text, not {prompt!r}")
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise ValueError(f"{at}: answer must be text or a number, not {answer!r}")
        if isinstance(task_id, bool) or not isinstance(task_id, str | int):
            raise ValueError(f"{at}: id must be text or a whole number, not {task_id!r}")
        if isinstance(answer, float) and answer.is_integer():
            answer = int(answer)  # 27.0 in a table of numbers means 27
        answer, task_id = str(answer).strip(), str(task_id)
        if task_id in ids:
            raise ValueError(f"{at}: id {task_id!r} was used at line {ids[task_id]}")
        ids[task_id] = number
        if not answer:
            n_empty += 1
        elif " ".join(prompt.split()) in prompts:
            n_repeated += 1
        else:
            if why := _broken(answer):
                raise ValueError(f"{at}: broken answer {answer[:60]!r}: {why}")
            prompts.add(" ".join(prompt.split()))
            tasks.append(Task(task_id, prompt, answer))
    if not tasks:
        raise ValueError(f"{source}: no tasks in it: each row needs prompt and answer")
    if n_empty or n_repeated:
        warnings.warn(
            f"{source}: dropped {n_empty} rows with an empty answer, {n_repeated} repeated prompts",
            stacklevel=3,
        )
    return tasks


def split_held_out(
    tasks: Sequence[Task], n_held_out: int, seed: int = 0
) -> tuple[list[Task], list[Task]]:
    """(train, held_out) in file order; which side a task falls on depends only on its prompt's text.

    Prompts that differ in nothing but case, spacing and punctuation fall on the same side, so held_out
    can hold a few less than asked for. ValueError unless 0 <= n_held_out < len(tasks).
    """
    if not 0 <= n_held_out < len(tasks):
        raise ValueError(f"cannot hold out {n_held_out} of {len(tasks)} tasks: ask for fewer")
    groups: dict[str, list[Task]] = {}
    for task in tasks:
        groups.setdefault(_normalised(task.prompt), []).append(task)
    held: set[str] = set()
    for text in sorted(groups, key=lambda t: hashlib.sha256(f"{seed}:{t}".encode()).digest()):
        if len(groups[text]) <= n_held_out:
            held.add(text)
            n_held_out -= len(groups[text])
    train = [task for task in tasks if _normalised(task.prompt) not in held]
    return train, [task for task in tasks if _normalised(task.prompt) in held]


def _normalised(text: str) -> str:
    """Letters and digits only, lower case, one form for each character."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return "".join(filter(str.isalnum, text)).encode("utf-8", "backslashreplace").decode()


# ------------------------------------------------------------------------------------------- verdicts

MAX_ANSWER = 300  # characters of a boxed answer that are looked at
MAX_TAIL = 1000  # characters of a text without a box that are searched for an answer


def _broken(answer: str) -> str:
    """Why this gold answer could never be matched, or an empty string."""
    if len(answer) > MAX_ANSWER:
        return f"longer than {MAX_ANSWER} characters"
    if last_boxed(f"\\boxed{{{answer}}}") != answer:
        return "unbalanced braces"
    return ""


def last_boxed(text: str) -> str | None:
    r"""The content of the last complete \boxed{...}, braces balanced; None without one."""
    start = len(text)
    while (start := text.rfind("\\boxed", 0, start)) >= 0:
        opening = re.compile(r"\\boxed\s*\{").match(text, start)
        if opening is None:
            continue
        depth = 1
        for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening.end()):
            depth += {"{": 1, "}": -1}.get(brace.group(), 0)
            if depth == 0:
                return text[opening.end() : brace.start()]
    return None


BARE = re.compile(r"\s*-?[0-9]+(\.[0-9]+)?(\s+-?[0-9]+(\.[0-9]+)?)*\s*")
PLAIN = re.compile(r"[-+]?([0-9]{1,30}|[0-9]{1,3}(,[0-9]{3}){1,9})(\.[0-9]{1,30})?")


def _given(completion: str) -> tuple[str, bool]:
    """(the answer's text, True if it is the answer alone): the last box, else the text's tail."""
    boxed = last_boxed(completion)
    if boxed is not None:
        return boxed.strip()[:MAX_ANSWER], True
    tail = completion[-MAX_TAIL:]
    if BARE.fullmatch(tail):
        return tail.split()[-1], True
    return tail.strip(), False


def _quick(given: str, answer: str) -> float | None:
    """The verdict where text or plain numbers decide; None where it takes math-verify."""
    if given == answer:
        return 1.0
    if PLAIN.fullmatch(given) and PLAIN.fullmatch(answer):
        a, b = Decimal(given.replace(",", "")), Decimal(answer.replace(",", ""))
        return float(round(a, 6) == round(b, 6))
    return None


def score(completion: str, answer: str) -> float:
    """1.0 if the completion's answer equals the gold answer, else 0.0; see _judge for conventions."""
    return float(_shared().score_many([completion], [answer])[0])


def _judge(given: str, alone: bool, answer: str) -> bool:
    from math_verify import parse, verify

    gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=None, raise_on_error=True)
    text = f"\\boxed{{{given}}}" if alone else given
    found = parse(text, parsing_timeout=None, raise_on_error=True)
    return verify(gold, found, timeout_seconds=None, raise_on_error=True)


# ----------------------------------------------------------------------------------------------- pool


class Verifier:
    """Scores many completions at once; processes are started when one first needs math-verify."""

    def __init__(self, workers: int = 2, timeout: int = 5):
        if workers < 1 or timeout < 1 or timeout != int(timeout):
            raise ValueError(f"need workers >= 1 and whole seconds: got {workers} and {timeout}")
        self.workers, self.timeout = workers, int(timeout)
        self.timeouts = self.failures = 0
        self._idle: list[_Worker] = []
        self._cache: dict[tuple, float] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        while self._idle:
            self._idle.pop().kill()

    def score_many(self, completions: Sequence[str], answers: Sequence[str]) -> np.ndarray:
        """Rewards (R,), in order."""
        if len(completions) != len(answers):
            raise ValueError(f"{len(completions)} completions but {len(answers)} answers")
        rewards = np.zeros(len(completions))  # (R,)
        jobs: dict[tuple, list[int]] = {}
        for i, (completion, answer) in enumerate(zip(completions, answers, strict=True)):
            given, alone = _given(completion)
            answer = answer.strip()
            verdict = _quick(given, answer) if alone else None
            if verdict is None:
                jobs.setdefault((given, alone, answer), []).append(i)
            else:
                rewards[i] = verdict
        with self._lock:
            self._run([job for job in jobs if job not in self._cache])
            for job, places in jobs.items():
                rewards[places] = self._cache[job]
        return rewards

    def _run(self, jobs: list[tuple]) -> None:
        todo = deque(jobs)
        busy: dict[Connection, tuple[_Worker, tuple, float]] = {}
        try:
            while todo or busy:
                while todo and len(busy) < self.workers:
                    worker = self._idle.pop() if self._idle else _Worker(self.timeout)
                    job = todo.popleft()
                    worker.pipe.send(job)
                    busy[worker.pipe] = (worker, job, time.monotonic() + self.timeout + 0.5)
                soonest = min(deadline for _, _, deadline in busy.values())
                ready = set(wait(list(busy), max(0.0, soonest - time.monotonic())))
                for pipe, (worker, job, deadline) in list(busy.items()):
                    if pipe in ready:
                        try:
                            verdict = pipe.recv()
                        except EOFError:
                            verdict = "died"
                    elif time.monotonic() > deadline:
                        verdict = "stuck"
                    else:
                        continue
                    del busy[pipe]
                    if verdict in ("died", "stuck"):
                        worker.kill()
                    else:
                        self._idle.append(worker)
                    self.timeouts += verdict in ("timeout", "stuck")
                    self.failures += verdict in ("failure", "died")
                    self._cache[job] = float(verdict is True)
        finally:
            for worker, _, _ in busy.values():
                worker.kill()


class _Worker:
    def __init__(self, timeout: int):
        self.pipe, theirs = Pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(theirs.fileno()), str(timeout)],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
        )
        theirs.close()
        try:
            self.pipe.recv()
        except EOFError:
            raise RuntimeError(
                "a verifier process could not start: see its message above"
            ) from None

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


_shared_verifier: Verifier | None = None


def _shared() -> Verifier:
    global _shared_verifier
    if _shared_verifier is None:
        _shared_verifier = Verifier(workers=1)
    return _shared_verifier


class _TimeUp(BaseException):
    """Not an Exception: sympy must not catch it."""


def _serve(pipe: Connection, timeout: int) -> None:
    import logging
    import resource

    import math_verify  # noqa: F401  (a second, paid before the first job arrives)

    def time_up(*_):
        raise _TimeUp

    logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, time_up)
    resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
    pipe.send("ready")
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            signal.alarm(timeout)
            try:
                verdict = _judge(*job)
            finally:
                signal.alarm(0)
        except _TimeUp:
            verdict = "timeout"
        except Exception:
            verdict = "failure"
        pipe.send(verdict)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
