"""Each concept module imports no other, so that it can be copied alone, and does what its docstring shows."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest


@pytest.mark.parametrize("name", ["knapsack", "rollout", "reward", "grpo"])
def test_module_alone(name):
    """Catches: an import of a sibling, inside a function too; an example that no longer says what happens."""
    module, found = importlib.import_module(name), set()
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    assert found and not found & {"knapsack", "rollout", "reward", "grpo", "train", "evaluate"}
    result = doctest.testmod(module)
    assert result.attempted and not result.failed
