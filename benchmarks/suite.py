"""Measures implementations x workloads x dtypes x passes, a record at a time.

A record has the fields of the kernels-benchmarks project's JSON lines, so that the two can be read
side by side. ``wl`` adds ``dtype`` and ``pass``; ``corr`` holds relative errors against float64;
``lat_ms`` is kept for a wrong answer too, but ``ok`` is false.
"""

import gc
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from typing import NamedTuple

import torch
from tqdm import tqdm

from . import environment
from .checks import Expected, Verdict
from .implementations import IMPLEMENTATIONS
from .operators import Operator
from .timing import Effort, summarize, time_device, time_latency, timed_call
from .workloads import WORKLOADS, make_inputs

# Of values, and of locations and weights: under autocast only value is half.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float64": (torch.float64, torch.float64),
    "float16_autocast": (torch.float16, torch.float32),
    "bfloat16_autocast": (torch.bfloat16, torch.float32),
}
PASSES = ("forward", "backward", "latency")  # latency: of a forward call, launch and wait included


@dataclass(frozen=True)
class Plan:
    """What to measure, by name, on which device and how long."""

    workloads: list[str]
    implementations: list[str]
    dtypes: list[str]
    passes: list[str]
    device: torch.device
    effort: Effort

    def __len__(self) -> int:
        names = (self.workloads, self.dtypes, self.implementations, self.passes)
        return len(list(product(*names)))


class Case:
    """One workload in one dtype: its inputs and what should come out."""

    def __init__(self, workload: str, dtype: str, device: torch.device):
        sizes = WORKLOADS[workload]
        value_dtype, other_dtype = DTYPES[dtype]
        self.device = device
        self.inputs = make_inputs(
            workload,
            value_dtype,
            device,
            locations_dtype=other_dtype,
            weights_dtype=other_dtype,
        )
        self.inputs_bytes = sum(tensor.nbytes for tensor in self.inputs)
        self.expected = Expected(sizes, self.inputs)

    def prepare(self, pass_name: str, operator: Operator) -> "Calls":
        if pass_name == "backward":
            backward = operator.prepare_backward(self.inputs)
            return Calls(
                timed=lambda: backward(self.expected.grad_output),
                checked=lambda: backward(self.expected.checked_grad_output),
                judge=lambda result: self.expected.check_gradients(
                    operator.gradients(result), operator.takes_logits
                ),
            )
        arguments = operator.arrange(self.inputs)

        def forward():
            return operator.forward(*arguments)

        return Calls(timed=forward, checked=forward, judge=self.expected.check_output)


class Calls(NamedTuple):
    """One pass of one implementation."""

    timed: Callable[[], object]
    checked: Callable[[], object]  # the same work, made once, first
    judge: Callable[[object], Verdict]  # of what ``checked`` returned


def run(plan: Plan) -> Iterator[dict]:
    """Yields a record for every combination; what fails is recorded and survived."""
    run_id = uuid.uuid4().hex
    env = environment.describe(plan.device)
    with tqdm(total=len(plan), unit="row", dynamic_ncols=True) as progress:
        for workload, dtype in product(plan.workloads, plan.dtypes):
            # Inputs are drawn once, and an implementation is loaded once (it may compile), but
            # late: what fails there is to be recorded, too.
            draw = cache(partial(Case, workload, dtype, plan.device))
            for implementation in plan.implementations:
                load = cache(partial(IMPLEMENTATIONS[implementation].load, WORKLOADS[workload]))
                for pass_name in plan.passes:
                    progress.set_description(f"{workload} {dtype} {pass_name}: {implementation}")
                    yield {
                        "ts": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                        "run": run_id,
                        "impl": implementation,
                        "tags": IMPLEMENTATIONS[implementation].tags,
                        "wl": {
                            "name": workload,
                            **WORKLOADS[workload]._asdict(),
                            "dtype": dtype,
                            "pass": pass_name,
                        },
                        "env": env,
                        **_measure_or_explain(draw, load, pass_name, plan.effort),
                    }
                    progress.update()


def _measure_or_explain(
    draw: Callable[[], Case], load: Callable[[], Operator], pass_name: str, effort: Effort
) -> dict:
    """The record's results: figures, or the error that kept them from being measured."""
    try:
        return _measure(draw(), load(), pass_name, effort)
    except Exception as error:
        # The traceback's frames would keep the failed call's tensors, out of memory or not.
        traceback.clear_frames(error.__traceback__)
        return {
            "lat_ms": None,
            "compile_ms": None,
            "peak_bytes": None,
            "ok": False,
            "absmax": None,
            "corr": {},
            "err": {"type": type(error).__name__, "msg": str(error)},
        }
    finally:
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where CUDA was not used


def _measure(case: Case, operator: Operator, pass_name: str, effort: Effort) -> dict:
    on_gpu = case.device.type == "cuda"
    with torch.set_grad_enabled(pass_name == "backward"):
        before = torch.cuda.memory_allocated(case.device) if on_gpu else 0
        calls = case.prepare(pass_name, operator)
        prepared_bytes = torch.cuda.memory_allocated(case.device) - before if on_gpu else 0
        result, first_ms = timed_call(calls.checked, case.device)
        verdict = calls.judge(result)
        del result
        if on_gpu:
            peak_bytes = case.inputs_bytes + prepared_bytes + _peak(calls.timed, case.device)
            timer = time_latency if pass_name == "latency" else time_device
        else:
            peak_bytes, timer = None, time_latency
        times = timer(calls.timed, case.device, effort)
    return {
        "lat_ms": summarize(times, warmup=2 if on_gpu else 1),
        "compile_ms": first_ms,  # as there: the first call, whatever it has to get ready
        "peak_bytes": peak_bytes,  # of inputs, a kept graph, temporaries and results
        "ok": verdict.ok,
        "absmax": verdict.absmax,
        "corr": verdict.as_record(),
        "err": None,
    }


def _peak(call: Callable[[], object], device: torch.device) -> int:
    """The GPU memory in bytes that one call takes beyond what is there before it."""
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    timed_call(call, device)
    return torch.cuda.max_memory_allocated(device) - before
