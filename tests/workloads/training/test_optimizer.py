"""The learning rate's course."""

from __future__ import annotations

import math

import pytest
import torch

from workloads.training.optimizer import adamw, warmup_cosine


def rates(steps: int, warmup_steps: int, min_ratio: float = 0.1) -> list[float]:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = adamw([parameter], lr=2.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, device=torch.device("cpu"))
    schedule = warmup_cosine(optimizer, steps=steps, warmup_steps=warmup_steps, min_ratio=min_ratio)
    taken = []
    for _ in range(steps):
        taken.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return taken


def test_up_in_a_line_and_down_in_a_half_cosine() -> None:
    taken = rates(steps=14, warmup_steps=4)
    assert taken[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert taken[4] == pytest.approx(2.0)
    assert taken[-1] == pytest.approx(0.2)
    assert taken[9] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * 5 / 9)) / 2))
    assert taken[4:] == sorted(taken[4:], reverse=True)


@pytest.mark.parametrize(("steps", "warmup_steps"), [(1, 0), (1, 1), (2, 1), (5, 5), (3, 0)])
def test_short_runs_have_a_course_too(steps: int, warmup_steps: int) -> None:
    taken = rates(steps, warmup_steps)
    assert len(taken) == steps
    assert all(0 < rate <= 2.0 for rate in taken)
    assert max(taken) == 2.0
