"""``python -m benchmarks``: this kernel against eager ones and its peers, on this machine."""

import argparse
import sys
from importlib import import_module
from pathlib import Path

import torch

from . import render
from .implementations import BASELINE, IMPLEMENTATIONS, OURS
from .peers import PEERS
from .records import Results, add_names
from .suite import DTYPES, PASSES, Plan, run
from .timing import Effort
from .workloads import WORKLOADS, select

# Each is a module with a main; without one of these names, the suite itself runs.
COMMANDS = ("models", "seed", "compare", "report", "readme")
_EPILOG = f"Other commands, each with a --help of its own: {', '.join(COMMANDS)}."
DEFAULT_WORKLOADS = "seed_b1_q100 seed_b2_q300 ddetr_encoder_b1".split()
DEFAULT_WORKLOADS += ["rtdetr_decoder_b16"]
QUICK_WORKLOADS = ["seed_*", "rtdetr_decoder_b16"]
DEFAULT_IMPLEMENTATIONS = [BASELINE, "grid_sample", *OURS]


def main(arguments: list[str] | None = None) -> int:
    """Runs the suite, or the command named first.

    Returns:
        The exit status, of the suite 1 if this project's kernel was wrong or failed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        name = arguments[0]
        if name in ("report", "readme"):
            return render.main(arguments[1:], name)
        return import_module(f".{name}", __package__).main(arguments[1:])
    plan, results = _parse(arguments)
    return results.collect(run(plan, results), render.build_table, lambda r: r["impl"] in OURS)


def _parse(arguments: list[str] | None) -> tuple[Plan, Results]:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__, epilog=_EPILOG)
    cuda = torch.cuda.is_available()
    add_names(parser, "--workloads", WORKLOADS, " ".join(DEFAULT_WORKLOADS))
    add_names(parser, "--impls", IMPLEMENTATIONS, " ".join(DEFAULT_IMPLEMENTATIONS))
    add_names(parser, "--dtypes", DTYPES, "float32; on a GPU float16 and bfloat16, too")
    add_names(parser, "--passes", PASSES, "forward and backward; on a GPU latency, too")
    add = parser.add_argument
    add("--peers", action="store_true", help=f"and what is there of {', '.join(PEERS)}")
    add("--device", default="cuda" if cuda else "cpu", help="default: %(default)s")
    add("--reps", type=int, help="calls per row; default: what fits in --budget")
    add("--budget", type=float, metavar="MS", help="time of a row's calls; default: 1000")
    add("--sets", type=int, default=3, help="of inputs that calls take in turn; default: 3")
    add("--out", type=Path, help="append the JSON lines to this file")
    add("--resume", action="store_true", help="skip what --out has measured")
    add("--quick", action="store_true", help="a first look: small, fewer calls")
    options = parser.parse_args(arguments)
    for name in ("reps", "budget", "sets"):
        number = getattr(options, name)
        if number is not None and number < 1:
            parser.error(f"--{name} is {number}, expected at least 1")

    device = torch.device(options.device)
    if device.type == "cuda":
        # Named with its index: what is measured is always the current device.
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    on_gpu, quick = device.type == "cuda", options.quick
    workloads = options.workloads or (QUICK_WORKLOADS if quick else DEFAULT_WORKLOADS)
    implementations = [*(options.impls or DEFAULT_IMPLEMENTATIONS)]
    implementations += PEERS if options.peers else ()
    default_dtypes = ["float32", "float16", "bfloat16"] if on_gpu else ["float32"]
    default_passes = ["all"] if on_gpu else ["forward", "backward"]
    effort = Effort(
        reps=options.reps,
        budget_ms=options.budget or (200 if options.quick else 1000),
        min_reps=10 if on_gpu else 3,
        max_reps=100 if on_gpu else 50,
    )
    try:
        plan = Plan(
            select(workloads, list(WORKLOADS)),
            select(implementations, list(IMPLEMENTATIONS)),
            select(options.dtypes or default_dtypes, list(DTYPES)),
            select(options.passes or default_passes, PASSES),
            device,
            effort,
            options.sets,
        )
        results = Results.open(options.out, "", device, options.resume)
    except ValueError as error:
        parser.error(str(error))
    return plan, results


if __name__ == "__main__":
    sys.exit(main())
