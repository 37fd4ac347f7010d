"""``python -m benchmarks``: this kernel against eager ones and its peers, on this machine."""

import sys
from functools import partial

from . import compare, models, render
from .benchmark import WORKLOADS
from .implementations import BASELINE, IMPLEMENTATIONS, OURS
from .peers import PEERS
from .records import Results, add_names, add_number, add_run, command
from .suite import DTYPES, PASSES, run
from .timing import Effort

# Without one of these names, the suite itself runs.
COMMANDS = {"models": models.main, "compare": compare.main}
COMMANDS |= {name: partial(render.main, name) for name in ("report", "readme")}
DEFAULT_WORKLOADS = "seed_b1_q100 seed_b2_q300 ddetr_encoder_b1 rtdetr_decoder_b16".split()


def main(arguments: list[str] | None = None) -> int:
    """Runs the suite, or the command named first.

    Returns:
        The exit status, of the suite 1 if this project's kernel was wrong or failed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:])
    parser = command("", __doc__)
    parser.epilog = f"Other commands, each with a --help of its own: {', '.join(COMMANDS)}."
    add_names(parser, "--workloads", WORKLOADS, DEFAULT_WORKLOADS)
    add_names(parser, "--impls", IMPLEMENTATIONS, [BASELINE, "grid_sample", *OURS])
    add_names(parser, "--dtypes", DTYPES, "float32; on a GPU float16 and bfloat16, too")
    add_names(parser, "--passes", PASSES, [*PASSES])
    peers = f"and what is there of {', '.join(PEERS)}"
    parser.add_argument("--peers", action="store_true", help=peers)
    sets = "of inputs that calls take in turn; default: %(default)s"
    add_number(parser, "--sets", sets, default=3)
    add_run(parser, "calls per row; default: what fits in a second")
    options = parser.parse_args(arguments)
    if options.peers:
        options.impls = [*dict.fromkeys([*options.impls, *PEERS])]
    on_gpu = options.device.type == "cuda"
    options.dtypes = options.dtypes or ["float32", "float16", "bfloat16"][: 3 if on_gpu else 1]
    effort = Effort(options.reps, min_reps=10 if on_gpu else 3, max_reps=100 if on_gpu else 50)
    results = Results(options)
    return results.collect(run(options, effort, results), render.build_table)


if __name__ == "__main__":
    sys.exit(main())
