"""Whether the threads of a CPU help: where cores are shared or throttled they mostly wait for each other."""

import time
from typing import NamedTuple

import torch

ROUNDS, PRODUCTS, SECONDS = 5, 20, 0.5
"""Rounds of products with each number of threads, by turns: some tens of milliseconds in all on a free machine; after
SECONDS no further round begins."""


class Timing(NamedTuple):
    """What the products took: seconds that passed, and seconds of all cores together."""

    wall: float
    cpu: float


def advice() -> str | None:
    """What to do if torch's threads, as many as are set now, are slower than one and busy with waiting; else None.

    Products of the size that writing rollouts consists of are timed with all threads and with one, by turns.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return None
    left, right = torch.ones(16, 512), torch.ones(512, 2048)
    timings: dict[int, list[Timing]] = {threads: [], 1: []}
    began = time.perf_counter()
    try:
        while len(timings[1]) < ROUNDS and time.perf_counter() - began < SECONDS:
            for count, taken in timings.items():
                torch.set_num_threads(count)
                torch.mm(left, right)  # wakes the threads
                wall, cpu = time.perf_counter(), time.process_time()
                for _ in range(PRODUCTS):
                    torch.mm(left, right)
                taken.append(Timing(time.perf_counter() - wall, time.process_time() - cpu))
    finally:
        torch.set_num_threads(threads)
    middle = len(timings[1]) // 2
    return judge(sorted(timings[threads])[middle], sorted(timings[1])[middle], threads)


def judge(all_: Timing, one: Timing, threads: int) -> str | None:
    """The advice, if `threads` took longer than one thread, and more of the cores' time too."""
    if all_.wall <= one.wall or all_.cpu <= 1.5 * one.cpu:
        return None
    return (
        f"{threads} threads take {all_.wall / one.wall:.1f} times as long as one for the same small products, and "
        f"{all_.cpu / max(one.cpu, 1e-9):.1f} times as much of the cores: they wait for each other, as on a shared or "
        "throttled machine; --run.threads 1 is faster here"
    )
