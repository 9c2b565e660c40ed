"""What is measured without training: losses, and a sample of what the model writes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from workloads.tp_fsdp_llama2.corpus import Corpus, Split
from workloads.tp_fsdp_llama2.loss import IGNORED
from workloads.training.data_parallel import data_parallel_rank, data_parallel_size, sum_over_data_parallel
from workloads.training.parameters import release_gathered
from workloads.training.prefetch import Prefetcher


@torch.no_grad()
def heldout_loss(
    model: nn.Module,
    corpus: Corpus,
    split: Split,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    batch_size: int,
    at_most: int | None,
) -> float:
    """Mean loss in nats per token over the held-out windows; the same on every rank and, but for rounding, any mesh.

    Windows are dealt to the dp coordinates in batches. Every coordinate makes the same number of passes, as FSDP2's
    gathers need all of them; a coordinate that runs out of windows repeats one, which does not count.

    Args:
        batch_size: windows of one coordinate in one pass.
        at_most: use no more windows than this, evenly spread; None for all.
    """
    dp, dp_rank = data_parallel_size(mesh), data_parallel_rank(mesh)
    starts = split.evaluated(at_most)
    passes = range(dp_rank * batch_size, len(starts) + dp_rank * batch_size, dp * batch_size)

    def read(first: int) -> np.ndarray:
        rows = starts[first : first + batch_size]
        return corpus.windows([*rows, *starts[-1:] * (batch_size - len(rows))], split.seq_len + 1)

    total = torch.zeros((), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    with Prefetcher(
        map(read, passes),
        device,
        shape=(batch_size, split.seq_len + 1),
        count=len(passes),
        source=str(corpus),
        group=mesh.get_group("tp"),
    ) as batches:
        for first, tokens in zip(passes, batches, strict=True):
            labels = tokens[:, 1:].clone()
            labels[max(0, len(starts) - first) :] = IGNORED
            total += model(tokens[:, :-1], labels)
    model.train(was_training)
    release_gathered(model)
    return sum_over_data_parallel(total, mesh).item() / (len(starts) * split.seq_len)


@torch.no_grad()
def mean_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """In nats per token, of this dp coordinate's windows; all ranks call it with as many."""
    model.eval()
    loss = model(tokens[:, :-1], tokens[:, 1:]) / tokens[:, 1:].numel()
    model.train()
    release_gathered(model)
    return loss


@torch.no_grad()
def generate(
    model: nn.Module, prompt: list[int], *, tokens: int, seq_len: int, vocab_size: int, seed: int, device: torch.device
) -> list[int]:
    """What the model writes after `prompt`: `tokens` ids, drawn from its own distribution.

    All ranks call it together with the same arguments and draw the same numbers. Each token is a pass over a window
    of seq_len positions, of which the causal mask hides those not yet written: one shape, whatever tp is.

    Args:
        vocab_size: ids from here on are never drawn: the corpus has none.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    was_training = model.training
    model.eval()
    for _ in range(tokens):
        context = ids[-seq_len:]
        window = torch.tensor([context + [0] * (seq_len - len(context))], device=device)
        logits_1V = model(window)[:, len(context) - 1]
        whole = logits_1V.full_tensor() if isinstance(logits_1V, DTensor) else logits_1V
        p = whole[0, :vocab_size].double().softmax(0).cpu()
        ids.append(int(torch.multinomial(p, 1, generator=generator)))
    model.train(was_training)
    release_gathered(model)
    return ids[len(prompt) :]
