"""docs/accuracy.md says what was measured, and some of it is measured anew."""

import pytest
import torch
from cases import TOLERANCES

from benchmarks import accuracy

# On one processor and the next, sums have another order.
SLACK = 1.25
COMPARED = {accuracy.KERNEL: 4, accuracy.FUSED: 5}  # the output and the gradients
MEASURED = [
    *(("seed_b2_q300", dtype) for dtype in accuracy.DTYPES),
    ("ddetr_decoder_b4", "bfloat16"),
]


def recorded(implementation, workload, dtype):
    """The largest error by tensor, on any device."""
    found = [
        record["error"]
        for record in accuracy.records()
        if (record["impl"], record["workload"], record["dtype"])
        == (implementation, workload, dtype)
    ]
    assert found, f"no record of {implementation}: {workload} in {dtype}"
    return {name: max(error[name] for error in found) for name in found[0]}


@pytest.mark.parametrize("implementation", accuracy.OURS)
@pytest.mark.parametrize("workload, dtype", MEASURED)
def test_errors_are_no_larger_than_recorded(device, workload, dtype, implementation):
    errors = accuracy.measure(workload, dtype, device, implementation)["error"]
    limits = recorded(implementation, workload, dtype)
    assert set(errors) == set(limits) and len(errors) == COMPARED[implementation]
    for name, limit in limits.items():
        assert errors[name] <= SLACK * limit, f"{name}: {errors[name]:.2e}, recorded {limit:.2e}"


def test_the_records_are_sound():
    """Rounding is all that is left, in every record of both operators."""
    ours = [record for record in accuracy.records() if record["impl"] in accuracy.OURS]
    assert {record["impl"] for record in ours} == set(accuracy.OURS)
    for record in ours:
        for name, error in record["error"].items():
            limit = TOLERANCES[getattr(torch, record["dtype"])]
            assert 0 < error <= limit, (record["impl"], record["workload"], name)


def test_the_page_is_of_the_records():
    assert accuracy.PAGE.read_text() == accuracy.page(), "python -m benchmarks.accuracy write"


def test_peers_are_as_recorded():
    """Each was measured, with gradients; the one that everybody gets is off in bfloat16."""
    found = [record for record in accuracy.records() if record["impl"] in accuracy.peers.PEERS]
    assert {record["impl"] for record in found} == set(accuracy.peers.PEERS)
    for name in accuracy.peers.PEERS:
        assert any(len(r["error"]) == 4 for r in found if r["impl"] == name), name
    case = ("kernels_community", "ddetr_encoder_b1", "bfloat16")
    (record,) = (r for r in found if (r["impl"], r["workload"], r["dtype"]) == case)
    assert record["error"]["output"] > 0.1


def broken(name, monkeypatch, **changes):
    """``name``, found here, is now this kernel with some of its functions replaced."""
    operator = accuracy.IMPLEMENTATIONS[accuracy.KERNEL]

    def load(workload):
        return operator.load(workload)._replace(**changes)

    changed = accuracy.IMPLEMENTATIONS | {name: type(operator)({}, load)}
    monkeypatch.setattr(accuracy, "IMPLEMENTATIONS", changed)


def out_of_order(*arguments):
    raise NotImplementedError("not implemented for 'Half'\nand more")


def test_a_peer_may_fail(monkeypatch):
    broken("mmcv", monkeypatch, backward=out_of_order)
    result = accuracy.measure("seed_b1_q100", "float16", "cpu", "mmcv")
    assert list(result["error"]) == ["output"] and result["queries"] == 100
    assert result["failed"] == "backward: NotImplementedError: not implemented for 'Half'"
    broken("mmcv", monkeypatch, forward=out_of_order)
    assert accuracy.measure("seed_b1_q100", "float16", "cpu", "mmcv")["error"] == {}


def test_this_kernel_may_not_fail(monkeypatch):
    broken(accuracy.KERNEL, monkeypatch, backward=out_of_order)
    with pytest.raises(NotImplementedError):
        accuracy.measure("seed_b1_q100", "float16", "cpu", accuracy.KERNEL)


def test_what_is_not_here_is_said(monkeypatch, capsys):
    def find():
        raise ImportError("no such module")

    absent = accuracy.IMPLEMENTATIONS[accuracy.KERNEL].__class__({}, None, find)
    with_it = accuracy.IMPLEMENTATIONS | {"mmcv": absent}
    monkeypatch.setattr(accuracy, "IMPLEMENTATIONS", with_it)
    assert accuracy.present(["mmcv", accuracy.KERNEL]) == [accuracy.KERNEL]
    assert "mmcv is not here: no such module" in capsys.readouterr().out


def test_peers_stand_side_by_side():
    def record(name, dtype, errors):
        return {
            "impl": name,
            "workload": "tiny",
            "dtype": dtype,
            "error": dict(zip(accuracy.PEER_TENSORS, errors)),
            "date": "2026-01-01",
            "torch": "2",
            "gpu": "A GPU",
            "cpu": "A CPU",
        }

    ours = record(accuracy.KERNEL, "float16", (2e-4, 2e-4, 2e-4, 2e-4))
    hub = record("kernels_community", "float16", (3e-1, 5e-3, 1e-2, float("nan")))
    dcn = record("dcnv4_flash", "float16", (4e-4,)) | {"failed": "backward: RuntimeError: no"}
    only = record("mmcv", "float32", (1e-7, 1e-7, 1e-3, 1e-7))
    elsewhere = record(accuracy.KERNEL, "float32", (9e-9, 9e-9, 9e-9, 9e-9)) | {"gpu": None}
    text = "\n".join(accuracy._lines([ours, hub, dcn, only, elsewhere]))
    peers = text[text.index("## Peers") :]
    columns = "deformable_detr | grid_sample | kernels_community | dcnv4_flash | mmcv"
    assert peers.count(f"| workload | dtype | {columns} |") == 4
    rows = [line for line in peers.splitlines() if line.startswith("| tiny")]
    assert rows[0] == "| tiny | float32 | - | - | - | - | 1.0e-07 |"
    assert rows[1] == "| tiny | float16 | 2.0e-04 | - | **3.0e-01** | 4.0e-04 | - |"
    assert rows[3] == "| tiny | float16 | 2.0e-04 | - | 5.0e-03 | failed | - |"
    assert rows[5] == "| tiny | float16 | 2.0e-04 | - | 1.0e-02 | failed | - |"
    assert rows[7] == "| tiny | float16 | 2.0e-04 | - | **nan** | failed | - |"
    assert "* dcnv4_flash, float16, backward: RuntimeError: no" in peers


@pytest.mark.parametrize("implementation", accuracy.OURS)
def test_a_wrong_answer_shows(monkeypatch, implementation):
    """One that rounds its locations or reference points to half precision is far off its record."""
    operator = accuracy.IMPLEMENTATIONS[implementation]

    def load(workload):
        right = operator.load(workload)

        def forward(value, shapes, starts, locations, *rest):
            return right.forward(value, shapes, starts, locations.half().to(value), *rest)

        return right._replace(forward=forward)

    broken = accuracy.IMPLEMENTATIONS | {
        implementation: type(operator)(operator.tags, load, operator.find)
    }
    monkeypatch.setattr(accuracy, "IMPLEMENTATIONS", broken)
    error = accuracy.measure("seed_b1_q100", "float32", "cpu", implementation)["error"]["output"]
    assert error > 100 * torch.finfo(torch.float32).eps
