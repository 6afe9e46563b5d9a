"""Each concept module, copied alone into an empty folder, imports and runs its docstring's examples."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("module", ["knapsack", "rollout", "reward", "grpo"])
def test_module_alone(module, tmp_path):
    """Catches: an import of a sibling, and an example that no longer says what the code does."""
    shutil.copy(ROOT / f"{module}.py", tmp_path)
    code = f"import doctest, {module}; r = doctest.testmod({module}); print(r.attempted, r.failed)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    attempted, failed = map(int, run.stdout.split()[-2:])
    assert failed == 0, run.stdout
    assert attempted > 0
