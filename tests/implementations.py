"""What the operators are computed by, and which tests each one runs: the only list of them.

* native: the variant that kernels loads. It runs every test.
* embedding_bag, grid_sample, triton: the implementations of torch-universal. Its package is that of
  the native variants, so they run what depends on the operator itself. grid_sample's coordinates
  are exact enough on small maps alone. On a CPU Triton's kernels run in its interpreter, some
  seconds a test, and hence the smallest cases alone.
"""

import fnmatch
import importlib.util
import os
from pathlib import Path

import kernels
import pytest
import torch

# Patterns of tests' names, and values of their parameters: all, unless some are listed.
_CASES = """channels_1 channels_30 channels_32 channels_1025 encoder one_of_each thin_maps
twelve_points wide_334 corner_334 edges_334 far_outside d_fine levels_without_points
listed_but_equal many_unequal nearest nearest_edges nearest_far nearest_d_fine"""
_SMALL_CASES = """channels_1 channels_30 channels_32 channels_1025 encoder one_of_each thin_maps
twelve_points far_outside d_fine levels_without_points listed_but_equal many_unequal"""
_SMALL_FUSED_CASES = "odd_channels thin_maps d_fine levels_without_points"
_FUSED_CASES = "odd_channels wide thin_maps d_fine levels_without_points nearest_d_fine"
UNIVERSAL = {
    "embedding_bag": {
        "test_operator::test_matches_reference": {"case": _CASES.split()},
        "test_operator::test_any_mixture_of_dtypes": {"channels": ["30"]},
        "test_operator::test_float64_goes_with_float64_alone": {},
        "test_operator::test_gradcheck": {},
        "test_operator::test_gradcheck_of_the_original_extension": {"channels": ["30", "1025"]},
        "test_operator::test_backward_function_equals_autograd": {},
        "test_operator::test_one_input_at_a_time_may_require_grad": {},
        "test_fused::test_matches_reference": {"case": _FUSED_CASES.split()},
        "test_fused::test_gradcheck": {"points_per_level": ["(3, 1)"]},
        "test_fused::test_one_input_at_a_time_may_require_grad": {},
        "test_fused::test_any_layout": {},
        "test_fused::test_nothing_to_do": {},
        "test_fused::test_points_nowhere_contribute_nothing": {},
        "test_fused::test_softmax_of_large_logits": {},
        "test_contract::test_int32_level_metadata": {},
        "test_contract::test_any_layout": {},
        "test_contract::test_nothing_to_do": {},
        "test_contract::test_points_nowhere_contribute_nothing": {},
        "test_contract::test_pixels_that_are_not_sampled_do_not_matter": {},
        "test_contract::test_a_pixel_influences_*": {},
        "test_contract::test_gradients_*": {},
        "test_contract::test_levels_that_overlap": {"dtype": ["torch.float32"]},
        "test_contract::test_levels_in_any_order": {},
        "test_contract::test_levels_may_change_in_place": {},
        "test_bad_input::test_wrong_call": {},
        "test_determinism::test_gradients_repeat_bit_for_bit": {"dtype": ["torch.float16"]},
        "test_compile::test_fullgraph_training_step": {"mode": ["default"]},
        "test_compile::test_opcheck*": {"dtype": ["torch.float32"]},
    },
    "grid_sample": {
        "test_operator::test_matches_reference": {"case": _SMALL_CASES.split()},
        "test_operator::test_as_exact_as_eager_on_large_maps": {},
        "test_operator::test_any_mixture_of_dtypes": {"channels": ["30"]},
        # Its sums are in no fixed order on a GPU.
        "test_operator::test_gradcheck": {"device": ["cpu"]},
        "test_operator::test_backward_function_equals_autograd": {},
        "test_operator::test_one_input_at_a_time_may_require_grad": {},
        "test_fused::test_matches_reference": {
            "case": _SMALL_FUSED_CASES.split(),
            # bfloat16 puts many points at pixel centres, and a rounding them on the wrong side.
            "dtype": ["torch.float64", "torch.float32", "torch.float16"],
        },
        "test_fused::test_gradcheck": {"points_per_level": ["(3, 1)"], "device": ["cpu"]},
        "test_fused::test_one_input_at_a_time_may_require_grad": {},
        "test_fused::test_any_layout": {},
        "test_fused::test_points_nowhere_contribute_nothing": {},
        "test_fused::test_softmax_of_large_logits": {},
        "test_contract::test_int32_level_metadata": {},
        "test_contract::test_any_layout": {},
        "test_contract::test_points_nowhere_contribute_nothing": {},
        "test_contract::test_pixels_that_are_not_sampled_do_not_matter": {},
        "test_contract::test_a_pixel_influences_*": {},
        "test_contract::test_levels_in_any_order": {},
        "test_contract::test_levels_may_change_in_place": {},
        "test_determinism::test_gradients_repeat_bit_for_bit": {"dtype": ["torch.float16"]},
        "test_transforms::test_autograd": {},
        "test_transforms::test_activation_checkpointing": {},
        "test_compile::test_fullgraph_training_step": {"mode": ["default"]},
    },
    "triton": {
        "test_operator::test_matches_reference": {
            "case": ["few", "few_nearest", "one_of_each", "levels_without_points"],
            # The interpreter cuts bfloat16 off instead of rounding it; float64 is PyTorch's.
            "dtype": ["torch.float32", "torch.float16"],
        },
        "test_fused::test_matches_reference": {
            "case": ["few", "levels_without_points"],
            "dtype": ["torch.float32"],
        },
        "test_contract::test_points_nowhere_contribute_nothing": {
            "bad": ["nan", "inf", "1e+30"],
            "dtype": ["torch.float32"],
        },
        "test_fused::test_points_nowhere_contribute_nothing": {
            "bad": ["nan"],
            "coordinates": ["4"],
        },
    },
}
INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    # Before Triton's kernels are defined. Nothing else here reads it without a GPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _rules(implementation: str) -> dict:
    """A GPU runs Triton's kernels compiled, and so as many tests as the other implementation."""
    compiled = implementation == "triton" and not INTERPRETED
    return UNIVERSAL["embedding_bag" if compiled else implementation]


def of_test(module: str, function: str) -> "list[str]":
    """The implementations that take part in a test."""
    name = f"{module}::{function}"
    return ["native"] + [
        i for i in UNIVERSAL if any(fnmatch.fnmatch(name, pattern) for pattern in _rules(i))
    ]


def takes_part(implementation: str, module: str, function: str, parameters: dict) -> bool:
    """With these values of the test's parameters."""
    if implementation == "native":
        return True
    if implementation == "triton" and parameters.get("device") == "cpu" and not INTERPRETED:
        return False  # the interpreter is for a machine without a GPU
    for pattern, rules in _rules(implementation).items():
        if fnmatch.fnmatch(f"{module}::{function}", pattern):
            return all(
                str(getattr(parameters[name], "name", parameters[name])) in values
                for name, values in rules.items()
                if name in parameters
            )
    return False


def load(implementation: str, native):
    """The kernel, of the variant beside the native one."""
    if implementation == "native":
        return native
    folder = Path(native.__file__).parent.parent / "torch-universal"
    if not folder.is_dir():
        pytest.skip("no torch-universal: python tools/build.py --backend universal")
    if implementation == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is missing")
    return kernels.get_local_kernel(folder)
