"""Measures implementations x workloads x dtypes x passes, a record at a time.

A record has the fields of the kernels-benchmarks project's JSON lines, so that the two can be read
side by side. ``wl`` adds ``dtype`` and ``pass``; ``corr`` holds relative errors against float64;
``lat_ms`` is kept for a wrong answer too, but ``ok`` is false. On a GPU ``floor_ms`` and
``ceiling_ms`` are what probe.py measures with the same inputs in the same run: the ceiling is that
of this kernel's access pattern.

The calls that are timed take several sets of inputs in turn (``lat_ms`` says how many: ``sets``).
Each set's result is checked before, and ``corr`` has the largest errors of all.
"""

import argparse
import gc
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial, reduce
from itertools import product
from typing import NamedTuple

import torch
from tqdm import tqdm

from tools.build import BuildError

from . import environment, probe
from .benchmark import WORKLOADS, Inputs, Workload, make_grad_output, make_inputs
from .checks import Expected, Verdict
from .implementations import IMPLEMENTATIONS
from .operators import Forward, Operator, Tensors, plain_reference
from .records import Results, failed, recorder
from .timing import Effort, in_turn, summarize, time_calls, time_device, timed_call

# Of values, and of locations and weights: under autocast only value is half.
DTYPES = {
    **{n: (getattr(torch, n),) * 2 for n in ("float32", "float16", "bfloat16", "float64")},
    "float16_autocast": (torch.float16, torch.float32),
    "bfloat16_autocast": (torch.bfloat16, torch.float32),
}
PASSES = ("forward", "backward")
# A CPU's call that reads more inputs than this leaves nothing of them in its caches for the next:
# there, one set does.
CPU_CACHE_BYTES = 2**25
KEPT_SHARE = 1 / 3  # of a GPU's memory, that the graphs of all sets may take


class Limits:
    """What no kernel can beat on a GPU, measured on it: see probe.py."""

    def __init__(self, device: torch.device, effort: Effort):
        self.effort = effort
        self.bytes_per_ms = probe.copy_rate(device)  # read and written

    def of(self, workload: Workload, sets: list[Inputs]) -> dict[str, dict[str, float | None]]:
        """The floor and the ceiling of each pass; of these sets, taken in turn."""
        try:
            gather_ms = probe.gather_ms(sets, workload, self.effort)
            ceilings = {"forward": gather_ms, "backward": 2 * gather_ms}
        # The kernel's own figures are worth having without it.
        except (BuildError, OSError, RuntimeError) as error:
            tqdm.write(f"no ceiling: {error}")
            ceilings = dict.fromkeys(PASSES)
        floors = {name: probe.traffic_bytes(sets[0], name) / self.bytes_per_ms for name in PASSES}
        return {x: {"floor_ms": floors[x], "ceiling_ms": ceilings[x]} for x in PASSES}


class Calls(NamedTuple):
    """One pass of one implementation."""

    timed: Callable[[], object]
    checked: Callable[[], object]  # the same work, made once, first
    judge: Callable[[object], Verdict]  # of what ``checked`` returned


class InputSet:
    """One set of inputs in its dtype, and what should come out."""

    def __init__(self, workload: Workload, inputs: Inputs, grad_output: torch.Tensor, dtype: str):
        value_dtype, other_dtype = DTYPES[dtype]
        value, shapes, starts, *others = inputs
        others = [tensor.to(other_dtype) for tensor in others]
        self.workload = workload
        self.inputs = Inputs(value.to(value_dtype), shapes, starts, *others)
        self.grad_output = grad_output.to(value_dtype)
        self.expected = self._other = self._expect(plain_reference(workload), self.inputs)

    def _expect(self, reference: Forward, arguments: Tensors) -> Expected:
        return Expected(self.workload, reference, arguments, self.grad_output)

    def expected_of(self, operator: Operator) -> Expected:
        """That of the plain operator is kept, and one other."""
        if operator.reference is None:
            return self.expected
        if self._other.reference is not operator.reference:
            self._other = self._expect(operator.reference, operator.arrange(self.inputs))
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


def draw_sets(workload: Workload, device: torch.device, count: int) -> list[tuple]:
    """``count`` sets of inputs in float32, each with the gradient of its output."""

    def draw(index: int) -> tuple[Inputs, torch.Tensor]:
        # Inputs of the first set are drawn with seed 0, its gradient with 1.
        options = (workload, torch.float32, device)
        return make_inputs(*options, 2 * index), make_grad_output(*options, 2 * index + 1)

    with ThreadPoolExecutor() as threads:  # the generators are what takes long, a thread each
        return list(threads.map(draw, range(count)))


class Case:
    """One workload in one dtype: its inputs and what should come out.

    Args:
        draws: of the workload; on a CPU not all of them may be taken.
    """

    def __init__(
        self, workload: Workload, dtype: str, draws: list[tuple], limits: Limits | None = None
    ):
        self.device = draws[0][1].device
        self.sets = [InputSet(workload, *draws[0], dtype)]
        self.inputs_bytes = sum(tensor.nbytes for tensor in self.sets[0].inputs)
        if self.device.type != "cpu" or self.inputs_bytes <= CPU_CACHE_BYTES:
            self.sets += [InputSet(workload, *draw, dtype) for draw in draws[1:]]
        sets = [each.inputs for each in self.sets]
        self.bounds = limits.of(workload, sets) if limits else dict.fromkeys(PASSES, {})


def run(options: argparse.Namespace, effort: Effort, results: Results) -> Iterator[dict]:
    """Yields a record for every combination that ``results`` does not have yet.

    What fails is recorded and survived.

    Args:
        options: the names of workloads, impls, dtypes and passes; the device; and how many sets of
            inputs there are, at most.
    """
    env = environment.describe(options.device)
    limits = None
    if options.device.type == "cuda":
        limits = Limits(options.device, effort)
        env["copy_gb_per_s"] = limits.bytes_per_ms / 1e6
    record = recorder(env)
    present = []
    for name in options.impls:
        try:
            IMPLEMENTATIONS[name].find()
            present.append(name)
        except Exception as error:  # whatever importing a foreign package may raise
            tqdm.write(f"{name} is not here: {error}")
    rows = [*product(present, options.passes)]
    total = len(options.workloads) * len(options.dtypes) * len(rows)
    with tqdm(total=total, unit="row", dynamic_ncols=True) as progress:
        for workload in options.workloads:
            # Inputs are drawn once, and an implementation is loaded once for each dtype (it may
            # compile), but late: what fails there is to be recorded, too.
            sizes = WORKLOADS[workload]
            draw = cache(partial(draw_sets, sizes, options.device, options.sets))
            for dtype in options.dtypes:
                prepare = cache(lambda s=sizes, d=dtype, draw=draw: Case(s, d, draw(), limits))
                loads = {n: cache(partial(IMPLEMENTATIONS[n].load, sizes)) for n in present}
                for name, pass_name in rows:
                    progress.set_description(f"{workload} {dtype} {pass_name}: {name}")
                    case = {"name": workload, **sizes._asdict(), "dtype": dtype, "pass": pass_name}
                    if not results.has(name, case, env):
                        found = _measure_or_explain(prepare, loads[name], pass_name, effort)
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
        results = failed(error)
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
        timer = time_device if on_gpu else time_calls
        times = timer(in_turn(timed), case.device, effort)
    return {
        "lat_ms": {**summarize(times, warmup=len(timed) + on_gpu), "sets": len(timed)},
        "compile_ms": first_ms,  # as there: the first call, whatever it has to get ready
        "peak_bytes": peak_bytes,  # of inputs, a kept graph, temporaries and results
        **reduce(Verdict.worse, verdicts).as_results(),
        **case.bounds[pass_name],
    }


def _peak(call: Callable[[], object], device: torch.device) -> int:
    """The GPU memory in bytes that one call takes beyond what is there before it."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    timed_call(call, device)
    return torch.cuda.max_memory_allocated(device) - before
