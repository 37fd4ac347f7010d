"""``python -m benchmarks``: this kernel against eager ones and its peers, on this machine."""

import sys
from importlib import import_module

import torch

from . import render
from .implementations import BASELINE, IMPLEMENTATIONS, OURS
from .peers import PEERS
from .records import Results, add_names, add_run, command
from .suite import DTYPES, PASSES, Plan, run
from .timing import Effort
from .workloads import WORKLOADS, select

# Each is a module with a main; without one of these names, the suite itself runs.
COMMANDS = ("models", "seed", "compare", "report", "readme")
DEFAULT_WORKLOADS = "seed_b1_q100 seed_b2_q300 ddetr_encoder_b1 rtdetr_decoder_b16".split()
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


def _parse(arguments: list[str]) -> tuple[Plan, Results]:
    parser = command("", __doc__)
    parser.epilog = f"Other commands, each with a --help of its own: {', '.join(COMMANDS)}."
    add_names(parser, "--workloads", WORKLOADS, " ".join(DEFAULT_WORKLOADS))
    add_names(parser, "--impls", IMPLEMENTATIONS, " ".join(DEFAULT_IMPLEMENTATIONS))
    add_names(parser, "--dtypes", DTYPES, "float32; on a GPU float16 and bfloat16, too")
    add_names(parser, "--passes", PASSES, "forward and backward; on a GPU latency, too")
    add_run(parser, "calls per row; default: what fits in a second")
    peers = f"and what is there of {', '.join(PEERS)}"
    parser.add_argument("--peers", action="store_true", help=peers)
    sets = "of inputs that calls take in turn; default: %(default)s"
    parser.add_argument("--sets", type=int, default=3, help=sets)
    options = parser.parse_args(arguments)
    for name in ("reps", "sets"):
        number = getattr(options, name)
        if number is not None and number < 1:
            parser.error(f"--{name} is {number}, expected at least 1")

    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        # Named with its index: what is measured is always the current device.
        device = torch.device("cuda", device.index or 0)
        torch.cuda.set_device(device)
    implementations = [*(options.impls or DEFAULT_IMPLEMENTATIONS)]
    implementations += PEERS if options.peers else ()
    default_dtypes = ["float32", "float16", "bfloat16"] if on_gpu else ["float32"]
    default_passes = ["all"] if on_gpu else ["forward", "backward"]
    effort = Effort(options.reps, min_reps=10 if on_gpu else 3, max_reps=100 if on_gpu else 50)
    try:
        plan = Plan(
            select(options.workloads or DEFAULT_WORKLOADS, list(WORKLOADS)),
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
