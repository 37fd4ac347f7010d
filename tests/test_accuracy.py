"""docs/accuracy.md says what was measured, and some of it is measured anew."""

import json

import pytest
import torch

from benchmarks import accuracy

# On one processor and the next, sums have another order.
SLACK = 1.25
MEASURED = [
    *(("seed_b2_q300", dtype) for dtype in accuracy.DTYPES),
    ("ddetr_decoder_b4", "bfloat16"),
]


def recorded(workload, dtype):
    """The largest error by tensor, of this kernel on any device."""
    found = [
        record["error"]
        for record in accuracy.records()
        if (record["impl"], record["workload"], record["dtype"])
        == (accuracy.KERNEL, workload, dtype)
    ]
    assert found, f"no record of {workload} in {dtype}"
    return {name: max(error[name] for error in found) for name in accuracy.TENSORS}


@pytest.mark.parametrize("workload, dtype", MEASURED)
def test_errors_are_no_larger_than_recorded(device, workload, dtype):
    errors = accuracy.measure(workload, dtype, device, accuracy.KERNEL)["error"]
    for name, limit in recorded(workload, dtype).items():
        assert errors[name] <= SLACK * limit, f"{name}: {errors[name]:.2e}, recorded {limit:.2e}"


def test_the_records_are_sound():
    """Rounding is all that is left, in every record of this kernel."""
    limits = {"float32": 2e-6, "float16": 5e-4, "bfloat16": 4e-3, "float64": 1e-12}
    for record in accuracy.records():
        if record["impl"] == accuracy.KERNEL:
            for name, error in record["error"].items():
                assert 0 < error <= limits[record["dtype"]], (record["workload"], name)


def test_the_page_is_of_the_records():
    assert accuracy.PAGE.read_text() == accuracy.page(), "python -m benchmarks.accuracy write"


def test_peers_are_as_recorded():
    peers = json.loads(accuracy.PEERS.read_text())
    assert all(len(errors) == len(peers["names"]) for _, _, errors in peers["errors"])
    assert ["ddetr_encoder_b1", "bfloat16"] in [row[:2] for row in peers["errors"]]


def test_a_wrong_answer_shows(monkeypatch):
    """A kernel that rounds its locations to half precision is far above its record."""
    operator = accuracy.IMPLEMENTATIONS[accuracy.KERNEL]

    def load(workload):
        right = operator.load(workload)

        def forward(value, shapes, starts, locations, weights):
            return right.forward(value, shapes, starts, locations.half().to(value), weights)

        return right._replace(forward=forward)

    broken = accuracy.IMPLEMENTATIONS | {
        accuracy.KERNEL: type(operator)(operator.tags, load, operator.find)
    }
    monkeypatch.setattr(accuracy, "IMPLEMENTATIONS", broken)
    error = accuracy.measure("seed_b1_q100", "float32", "cpu", accuracy.KERNEL)["error"]["output"]
    assert error > 100 * torch.finfo(torch.float32).eps
