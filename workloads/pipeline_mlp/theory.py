"""What a schedule's bubble comes to on paper: equal stages, a backward of twice a forward, tensors that need no time.

Torch-free. `p` ranks, `m` microbatches, `v` stages on each rank ("chunks"); F, B = 2F are what one microbatch's
forward and backward take on a whole rank, all of its chunks together.
"""

from __future__ import annotations


def bubble_fraction(schedule: str, ranks: int, microbatches: int, chunks: int = 1) -> float:
    """The part of the ranks' time in one step in which they have nothing to compute, from 0 to 1.

    It is 1 - m (F + B) / T, since each of the ranks computes m (F + B) in a step of T seconds. T is the length of a
    chain of things each of which, in that schedule, begins when the one before it ends:

    - naive: one microbatch after the other goes all the way forward and back, so one rank at a time has work:
      T = p m (F + B), and 1 - 1/p are idle, whatever m is.
    - gpipe: the last rank begins when p - 1 forwards are done, and does m; the first rank's last backward comes p - 1
      backwards after the last rank's: T = (m + p - 1)(F + B), idle (p - 1) / (m + p - 1)
      (Huang et al. 2018, arXiv 1811.06965, section 2.3).
    - 1f1b: the last rank begins after p - 1 forwards, then always has work, m (F + B) of it, and its last backward goes
      through p - 1 others: the same T, with less memory (Narayanan et al. 2021, arXiv 2104.04473, section 2.2.1).
    - interleaved: 1f1b whose first microbatch reaches the last rank after p - 1 chunks, which are forwards of F / v:
      T = m (F + B) + (p - 1)(F + B) / v, idle (p - 1) / (v m + p - 1) (the same, section 2.2.2). With fewer
      microbatches than ranks, m cannot fill the time that the first of them takes to come around to its rank's next
      chunk. Then nothing ever waits on the way of the first microbatch, through v p chunks, p F; the m - 1 others end
      F / v behind one another; and so again backward: T = (p + (m - 1) / v)(F + B), idle 1 - m / (p + (m - 1) / v).
      At m = p both say the same. (The paper wants m to be a multiple of p, for rounds of p microbatches. It holds for
      any m if the rounds are of at least p.)
    - zero_bubble: ZB-H1 (Qi et al. 2023, arXiv 2401.10241, table 2), with the backward's halves for the input, I, and
      for the weights, W; here F = I = W. It is 1f1b that sends on the gradient after I and does W when it would else
      wait. The last rank begins after (p - 1) F. To let the others have their gradients early, without holding more
      microbatches than 1f1b does, it puts off min(m, p) - 1 of its Ws until after its last I, which so ends
      m (F + I) + (m - min(m, p)) W later; p - 1 other Is and the first rank's last W follow.
      T = (p - 1)(F + I) + m (F + I) + (m - min(m, p) + 1) W: for m >= p that is m (F + I + W) + (p - 1)(F + I - W),
      idle (p - 1) / (3 m + p - 1), and for m <= p it is 2 (m + p - 1) F + W, idle 1 - 3 m / (2 (m + p) - 1).

    These are what `simulate.run` finds, exactly, for every p up to 16, m up to 64 and v up to 4.

    Args:
        schedule: naive, gpipe, 1f1b, interleaved or zero_bubble.
        ranks: of the pipeline, not of all its replicas.
        microbatches: of one step.
        chunks: stages on each rank; more than one is for interleaved only.

    Raises:
        ValueError: no such schedule, or a number below 1, in one line.
    """
    p, m, v = ranks, microbatches, chunks
    if min(p, m, v) < 1:
        raise ValueError(f"ranks={p}, microbatches={m}, chunks={v}: each must be at least 1")
    if v > 1 and schedule != "interleaved":
        raise ValueError(f"chunks={v} with schedule={schedule}: several stages on a rank are for interleaved")
    if schedule == "naive":
        return 1 - 1 / p
    if schedule in ("gpipe", "1f1b"):
        return (p - 1) / (m + p - 1)
    if schedule == "interleaved":
        return (p - 1) / (v * m + p - 1) if m >= p else 1 - m / (p + (m - 1) / v)
    if schedule == "zero_bubble":
        return (p - 1) / (3 * m + p - 1) if m >= p else 1 - 3 * m / (2 * (m + p) - 1)
    raise ValueError(f"schedule={schedule} is unknown; use naive, gpipe, 1f1b, interleaved or zero_bubble")
