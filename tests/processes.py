"""Python in processes of their own, for what this one has done already or must not do."""

import tempfile
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parent

# The first lines of each script: what it prints goes to a file, and it finds the tests' helpers.
PREAMBLE = """
import os, sys
sys.stdout = sys.stderr = open({output!r}, "w")
os.environ.update({environment!r})
sys.path.insert(0, {tests!r})
"""


def python(script: str, **environment: str) -> str:
    """What the script prints; asserts that it ends without an error.

    Its process is the fork of one that has imported torch and kernels, which takes two seconds,
    and nothing of this repository. Variables that torch reads while it is imported have no effect.
    """
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "kernels"])
    with tempfile.NamedTemporaryFile("r") as output:
        preamble = PREAMBLE.format(output=output.name, environment=environment, tests=str(TESTS))
        process = context.Process(target=exec, args=(preamble + script, {"__name__": "script"}))
        process.start()
        process.join(300)
        process.kill()  # if it has not ended
        process.join()
        printed = output.read()
    assert process.exitcode == 0, f"exit status {process.exitcode}: {printed}"
    return printed
