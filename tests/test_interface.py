"""What users may rely on within a version of the interface, name by name: see docs/release.md."""

import inspect

import pytest

# One that changes or goes away needs a new version in build.toml, one that is added a line here.
INTERFACE = """
fused_ms_deform_attn(value, spatial_shapes, level_start_index, reference_points, sampling_offsets,
    attention_logits, *, points_per_level=None, method='bilinear', offset_scale=0.5)
integrations.decompositions()
integrations.replace_extensions()
integrations.replace_function(module, name)
integrations.use_in_transformers(model, *, fuse=True)
layers.MultiScaleDeformableAttention()
layers.MultiScaleDeformableAttention.forward(self, value, value_spatial_shapes,
    value_spatial_shapes_list, level_start_index, sampling_locations, attention_weights,
    im2col_step)
layers.MultiScaleDeformableAttentionList()
layers.MultiScaleDeformableAttentionList.forward(self, value, value_spatial_shapes,
    sampling_locations, attention_weights)
layers.MultiScaleDeformableAttentionV2()
layers.MultiScaleDeformableAttentionV2.forward(self, value, value_spatial_shapes,
    sampling_locations, attention_weights, num_points_list, method='default')
modules.MSDeformAttn(d_model=256, n_levels=4, n_heads=8, n_points=4, *, points_per_level=None,
    method='bilinear', offset_scale=0.5)
modules.MSDeformAttn.forward(self, query, reference_points, input_flatten, input_spatial_shapes,
    input_level_start_index=None, input_padding_mask=None)
modules.MSDeformAttn.reset_parameters(self)
ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, attention_weights, *,
    points_per_level=None, method='bilinear')
ms_deform_attn_backward(value, spatial_shapes, level_start_index, sampling_loc, attn_weight,
    grad_output, im2col_step=64)
ms_deform_attn_forward(value, spatial_shapes, level_start_index, sampling_loc, attn_weight,
    im2col_step=64)
ms_deform_attn_list(value, spatial_shapes, sampling_locations, attention_weights, *,
    points_per_level=None, method='bilinear', channels_first=False)
reference.fused_ms_deform_attn(value, spatial_shapes, level_start_index, reference_points,
    sampling_offsets, attention_logits, *, points_per_level=None, method='bilinear',
    offset_scale=0.5)
reference.ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations,
    attention_weights, *, points_per_level=None, method='bilinear')
"""


def signature(function):
    """Arguments and defaults. Annotations are for readers, and print otherwise in each Python."""
    found = inspect.signature(function)
    parameters = [p.replace(annotation=p.empty) for p in found.parameters.values()]
    return str(found.replace(parameters=parameters, return_annotation=found.empty))


def public(module, prefix=""):
    for name in sorted(module.__all__):
        found = getattr(module, name)
        if inspect.ismodule(found):
            yield from public(found, f"{prefix}{name}.")
        elif not inspect.isclass(found):
            yield f"{prefix}{name}{signature(found)}"
        else:
            own = vars(found)
            yield f"{prefix}{name}{signature(found) if '__init__' in own else '()'}"
            for method in sorted(own.keys() - {"extra_repr"}):
                if inspect.isfunction(own[method]) and not method.startswith("_"):
                    yield f"{prefix}{name}.{method}{signature(own[method])}"


@pytest.mark.kernels_ci
def test_every_public_signature(kernel):
    assert list(public(kernel)) == INTERFACE.replace("\n    ", " ").strip().splitlines()


def test_public_names_are_documented(kernel):
    for line in public(kernel):
        path = line.partition("(")[0].split(".")
        found = kernel
        for name in path:
            found = getattr(found, name)
        # The layers' forward is transformers', whose names the class's docstring explains.
        assert found.__doc__ or path[-1] == "forward", f"{'.'.join(path)} has no docstring"
