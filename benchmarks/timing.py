"""How long a call takes: on the GPU alone, or from Python to its result."""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

ROUND = 20  # GPU calls enqueued at once
LONGEST_SLEEP_MS = 20.0
CYCLES_PER_MS = 2_000_000  # of a GPU, about


@dataclass(frozen=True)
class Effort:
    """How often to call: ``reps`` times, or as often as fits in the budget and the limits."""

    reps: int | None = None
    budget_ms: float = 1000.0
    min_reps: int = 3
    max_reps: int = 100

    def enough(self, times_ms: list[float]) -> bool:
        if self.reps is not None:
            return len(times_ms) >= self.reps
        if len(times_ms) < self.min_reps:
            return False
        return len(times_ms) >= self.max_reps or sum(times_ms) >= self.budget_ms


def in_turn(calls: Sequence[Callable[[], object]]) -> Callable[[], object]:
    """A function that does another of the calls each time, over and over.

    Calls that are the same but for their inputs keep what a machine remembers of one call, in
    caches that nothing flushes or in its predictors, from helping the next.
    """
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


def timed_call(call: Callable[[], object], device: torch.device) -> tuple:
    """Calls, and returns the result with the milliseconds from Python to its being there."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    wait(device)
    start = time.perf_counter()
    result = call()
    wait(device)
    return result, (time.perf_counter() - start) * 1e3


def time_calls(call: Callable[[], object], device: torch.device, effort: Effort) -> list[float]:
    """The milliseconds from Python to the result of each of a number of calls."""
    times = []
    while not effort.enough(times):
        times.append(timed_call(call, device)[1])
    return times


def time_device(call: Callable[[], object], device: torch.device, effort: Effort) -> list[float]:
    """The milliseconds a GPU spends on each of a number of calls, its L2 cold.

    Nothing waits between the calls of a round, and the GPU sleeps before the first for as long as
    Python takes to enqueue them all, so that short kernels are not charged for the time it takes to
    launch them. A call that waits for the GPU itself still is.
    """
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    flush = torch.empty(max(4 * l2_bytes, 2**28), dtype=torch.int8, device=device)
    torch.cuda.synchronize(device)
    begin = time.perf_counter()
    call()
    enqueue_ms = (time.perf_counter() - begin) * 1e3
    times: list[float] = []
    while not effort.enough(times):
        left = (effort.reps or effort.max_reps) - len(times)
        # The first round is short: it tells how long the calls are.
        size = min(left, ROUND if times else effort.min_reps)
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(size)]
        torch.cuda._sleep(int(CYCLES_PER_MS * min(size * enqueue_ms, LONGEST_SLEEP_MS)))
        for start, end in events:
            flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(device)
        times.extend(start.elapsed_time(end) for start, end in events)
    return times


def summarize(times_ms: list[float], warmup: int) -> dict:
    """The ``lat_ms`` field of a record: quantiles as kernels-benchmarks has them, in ms.

    The times are kept to the nanosecond.
    """
    times_ms = [round(milliseconds, 6) for milliseconds in times_ms]
    p10, p25, p50, p75, p90 = np.quantile(times_ms, (0.1, 0.25, 0.5, 0.75, 0.9)).tolist()
    return {
        "p10": p10,
        "p50": p50,
        "p90": p90,
        "mean": float(np.mean(times_ms)),
        "iqr": p75 - p25,
        "raw_times": times_ms,
        "has_warnings": p75 - p25 > 0.1 * p50,  # as there: a spread worth a second look
        "reps": len(times_ms),
        "warmup": warmup,
    }


def format_us(milliseconds: float) -> str:
    """Three digits in microseconds: 9.87, 12.3, 1234."""
    microseconds = milliseconds * 1e3
    return f"{microseconds:.0f}" if microseconds >= 99.95 else f"{microseconds:#.3g}"


def format_ms(milliseconds: float) -> str:
    """Three digits, in the unit that suits: 12.3 us, 4.56 ms, 7.89 s."""
    for unit, factor in (("us", 1e3), ("ms", 1.0)):
        # Below 999.5, three digits do not round up to 1000.
        if milliseconds * factor < 999.5:
            return f"{milliseconds * factor:#.3g} {unit}".replace(". ", " ")
    return f"{milliseconds / 1e3:#.3g} s".replace(". ", " ")
