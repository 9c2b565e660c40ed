"""What is masked, and what must stay readable."""

from __future__ import annotations

import pytest

from jobs.secret_values import MASK, masked


@pytest.mark.parametrize("name", ["HF_TOKEN", "wandb_api_key", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY", "model.secret"])
def test_a_secret_is_known_by_its_name(name: str) -> None:
    assert masked(name, "x1") == MASK
    assert masked(name, "") == ""


@pytest.mark.parametrize("name", ["lr", "data.tokenizer", "tokens_per_second", "NCCL_DEBUG", "KEYBOARD"])
def test_other_values_stay(name: str) -> None:
    assert masked(name, "x1") == "x1"


def test_in_a_text_the_value_alone_is_masked() -> None:
    text = "module load cuda\nexport HF_TOKEN=hf_abc API_KEY='a b' LR=3\nDB_PASSWORD: hunter2\ndata.tokenizer=t.json\n"
    shown = f"module load cuda\nexport HF_TOKEN={MASK} API_KEY={MASK} LR=3\nDB_PASSWORD: {MASK}\n"
    assert masked("setup", text) == shown + "data.tokenizer=t.json\n"
