"""Measures implementations x workloads x dtypes x passes, a record at a time.

A record has the fields of the kernels-benchmarks project's JSON lines, so that the two can be read
side by side. ``wl`` adds ``dtype`` and ``pass``; ``corr`` holds relative errors against float64;
``lat_ms`` is kept for a wrong answer too, but ``ok`` is false. On a GPU ``floor_ms`` and
``ceiling_ms`` are what probe.py measures with the same inputs in the same run: the ceiling is that
of this kernel's access pattern. Elsewhere, and for latency, they are null.

The calls that are timed take several sets of inputs in turn (``lat_ms`` says how many: ``sets``),
drawn from the same distribution with other seeds. Each set's result is checked before, and
``corr`` has the largest errors of all.
"""

import gc
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial, reduce
from itertools import product
from typing import NamedTuple

import torch
from tqdm import tqdm

from tools.build import BuildError

from . import environment, probe
from .benchmark import Inputs, Workload
from .checks import Expected, Verdict
from .implementations import IMPLEMENTATIONS
from .operators import Operator, plain_reference
from .records import Results, failed, recorder
from .timing import Effort, in_turn, summarize, time_device, time_latency, timed_call, warm_up
from .workloads import WORKLOADS, Draw, draw_sets

# Of values, and of locations and weights: under autocast only value is half.
DTYPES = {
    **{n: (getattr(torch, n),) * 2 for n in ("float32", "float16", "bfloat16", "float64")},
    "float16_autocast": (torch.float16, torch.float32),
    "bfloat16_autocast": (torch.bfloat16, torch.float32),
}
PASSES = ("forward", "backward", "latency")  # latency: of a forward, launch and wait included
NO_LIMITS = {"floor_ms": None, "ceiling_ms": None}
# A CPU's call that reads more inputs than this leaves nothing of them in its caches for the next:
# there, one set does.
CPU_CACHE_BYTES = 2**25
KEPT_SHARE = 1 / 3  # of a GPU's memory, that the graphs of all sets may take


@dataclass(frozen=True)
class Plan:
    """What to measure, by name, on which device and how long."""

    workloads: list[str]
    implementations: list[str]
    dtypes: list[str]
    passes: list[str]
    device: torch.device
    effort: Effort
    sets: int = 1  # of inputs, at most


class Limits:
    """What no kernel can beat on a GPU, measured on it: see probe.py."""

    def __init__(self, device: torch.device, effort: Effort):
        self.effort = effort
        self.bytes_per_ms = probe.copy_rate(device)  # read and written

    def floor_ms(self, inputs: Inputs, pass_name: str) -> float:
        return probe.traffic_bytes(inputs, pass_name) / self.bytes_per_ms

    def gather_ms(self, sets: list[Inputs], workload: Workload) -> float | None:
        try:
            return probe.gather_ms(sets, workload, self.effort)
        # The kernel's own figures are worth having without it.
        except (BuildError, OSError, RuntimeError) as error:
            tqdm.write(f"no ceiling: {error}")
            return None


class Calls(NamedTuple):
    """One pass of one implementation."""

    timed: Callable[[], object]
    checked: Callable[[], object]  # the same work, made once, first
    judge: Callable[[object], Verdict]  # of what ``checked`` returned


class InputSet:
    """One set of inputs in its dtype, and what should come out."""

    def __init__(self, workload: Workload, draw: Draw):
        self.workload = workload
        self.inputs, self.grad_output = draw
        self.expected = Expected(workload, plain_reference(workload), *draw)
        self._other = self.expected

    def expected_of(self, operator: Operator) -> Expected:
        """That of the plain operator is kept, and one other."""
        if operator.reference is None:
            return self.expected
        if self._other.reference is not operator.reference:
            arguments = operator.arrange(self.inputs)
            self._other = Expected(self.workload, operator.reference, arguments, self.grad_output)
        return self._other

    def prepare(self, pass_name: str, operator: Operator) -> Calls:
        expected = self.expected_of(operator)
        arguments = operator.arrange(self.inputs)
        if pass_name == "backward":
            backward = operator.prepare_backward(arguments)
            judge = partial(expected.check_gradients, operator)
            checked = partial(backward, expected.checked_grad_output)
            return Calls(partial(backward, expected.grad_output), checked, judge)
        forward = partial(operator.forward, *arguments)
        return Calls(forward, forward, expected.check_output)


class Case:
    """One workload in one dtype: its inputs and what should come out.

    Args:
        draws: of the workload, on the device; on a CPU not all of them may be taken.
    """

    def __init__(self, workload: str, dtype: str, draws: list[Draw], limits: Limits | None = None):
        self.workload = WORKLOADS[workload]
        self.device = draws[0].grad_output.device
        self.limits = limits
        self.sets = [InputSet(self.workload, draws[0].cast(*DTYPES[dtype]))]
        self.inputs_bytes = sum(tensor.nbytes for tensor in self.sets[0].inputs)
        if self.device.type != "cpu" or self.inputs_bytes <= CPU_CACHE_BYTES:
            self.sets += [InputSet(self.workload, d.cast(*DTYPES[dtype])) for d in draws[1:]]

    def bounds(self, pass_name: str) -> dict[str, float | None]:
        """The floor and the ceiling of a pass; None where they are not known."""
        if self.limits is None or pass_name == "latency":
            return NO_LIMITS
        floor_ms = self.limits.floor_ms(self.sets[0].inputs, pass_name)
        gathers = 2 if pass_name == "backward" else 1
        return {"floor_ms": floor_ms, "ceiling_ms": self._gather_ms and gathers * self._gather_ms}

    @cached_property
    def _gather_ms(self) -> float | None:
        return self.limits.gather_ms([each.inputs for each in self.sets], self.workload)


def run(plan: Plan, results: Results) -> Iterator[dict]:
    """Yields a record for every combination that ``results`` does not have yet.

    What fails is recorded and survived. An implementation that is not there has one record, whose
    workload, dtype and pass are "all".
    """
    env = environment.describe(plan.device)
    limits = None
    if plan.device.type == "cuda":
        limits = Limits(plan.device, plan.effort)
        env["copy_gb_per_s"] = limits.bytes_per_ms / 1e6
    record = recorder(env)
    present = []
    for name in plan.implementations:
        try:
            IMPLEMENTATIONS[name].find()
            present.append(name)
        except Exception as error:  # whatever importing a foreign package may raise
            every = dict.fromkeys(("name", "dtype", "pass"), "all")
            if not results.has(name, every, env):
                absent = {**failed(error, "Unavailable"), **NO_LIMITS}
                yield record(name, IMPLEMENTATIONS[name].tags, every, absent)
    total = len(plan.workloads) * len(plan.dtypes) * len(present) * len(plan.passes)
    with tqdm(total=total, unit="row", dynamic_ncols=True) as progress:
        for workload in plan.workloads:
            # Inputs are drawn once, and an implementation is loaded once for each dtype (it may
            # compile), but late: what fails there is to be recorded, too.
            draw = cache(partial(draw_sets, workload, plan.device, plan.sets))
            sizes = WORKLOADS[workload]
            for dtype in plan.dtypes:
                prepare = cache(lambda w=workload, d=dtype, draw=draw: Case(w, d, draw(), limits))
                loads = {n: cache(partial(IMPLEMENTATIONS[n].load, sizes)) for n in present}
                for name, pass_name in product(present, plan.passes):
                    progress.set_description(f"{workload} {dtype} {pass_name}: {name}")
                    case = {"name": workload, **sizes._asdict(), "dtype": dtype, "pass": pass_name}
                    if not results.has(name, case, env):
                        found = _measure_or_explain(prepare, loads[name], pass_name, plan.effort)
                        yield record(name, IMPLEMENTATIONS[name].tags, case, found)
                    progress.update()
                del prepare
                free_memory()


def _measure_or_explain(
    prepare: Callable[[], Case], load: Callable[[], Operator], pass_name: str, effort: Effort
) -> dict:
    """The record's results: figures, or the error that kept them from being measured."""
    try:
        return _measure(prepare(), load(), pass_name, effort)
    except Exception as error:
        # The traceback's frames would keep the failed call's tensors, out of memory or not.
        traceback.clear_frames(error.__traceback__)
        results = {**failed(error), **NO_LIMITS}
    free_memory()
    return results


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()  # does nothing where CUDA was not used


def _measure(case: Case, operator: Operator, pass_name: str, effort: Effort) -> dict:
    on_gpu = case.device.type == "cuda"
    timed, verdicts = [], []
    with torch.set_grad_enabled(pass_name == "backward"):
        for inputs in case.sets:
            inputs.expected_of(operator)  # which may take memory of its own
            before = torch.cuda.memory_allocated(case.device) if on_gpu else 0
            calls = inputs.prepare(pass_name, operator)
            kept = torch.cuda.memory_allocated(case.device) - before if on_gpu else 0
            result, milliseconds = timed_call(calls.checked, case.device)
            verdicts.append(calls.judge(result))
            del result
            timed.append(calls.timed)
            if len(timed) == 1:
                first_ms, peak_bytes = milliseconds, None
                if on_gpu:
                    peak_bytes = case.inputs_bytes + kept + _peak(calls.timed, case.device)
            if on_gpu and (len(timed) + 1) * kept > KEPT_SHARE * torch.cuda.mem_get_info()[1]:
                break  # the next graph might not fit
        call, warmup = in_turn(timed), len(timed) + (1 if on_gpu else 0)
        if on_gpu and pass_name == "latency":
            warmup += warm_up(call, case.device)
        timer = time_device if on_gpu and pass_name != "latency" else time_latency
        times = timer(call, case.device, effort)
    verdict = reduce(Verdict.worse, verdicts)
    return {
        "lat_ms": {**summarize(times, warmup), "sets": len(timed)},
        "compile_ms": first_ms,  # as there: the first call, whatever it has to get ready
        "peak_bytes": peak_bytes,  # of inputs, a kept graph, temporaries and results
        **{"ok": verdict.ok, "absmax": verdict.absmax, "corr": verdict.as_record(), "err": None},
        **case.bounds(pass_name),
    }


def _peak(call: Callable[[], object], device: torch.device) -> int:
    """The GPU memory in bytes that one call takes beyond what is there before it."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    timed_call(call, device)
    return torch.cuda.max_memory_allocated(device) - before
