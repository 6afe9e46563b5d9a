"""What several test files start from."""

from pathlib import Path

import pytest

import train

TINY = Path(__file__).parent.parent / "tutorial" / "tiny_model"
TEXTS = ["3+5+2=", "9+9=", "1+2+3+4+5+6+7+8=", "7+7+7=", "4+4="]


@pytest.fixture(scope="module")
def loaded():
    """The embedded model and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def prompts(loaded):
    import rollout

    return rollout.encode_prompts(loaded[1], TEXTS)


@pytest.fixture
def main(capsys):
    """train.main in this process, which has imported torch once: (exit, stdout)."""

    def run(*flags):
        try:
            train.main([str(f) for f in flags])
            code = 0
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().out

    return run
