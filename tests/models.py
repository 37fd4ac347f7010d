"""Small models of transformers with random weights: every architecture that samples.

Written for transformers 5.22; imports it only when a model is built.
"""

from dataclasses import dataclass, field

import torch
from torch import nn

# What most configurations share.
DETR = {
    "d_model": 64,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "decoder_layers": 2,
    "num_queries": 20,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
}
RT_DETR = {
    **DETR,
    "encoder_hidden_dim": 64,
    "encoder_layers": 1,
    "encoder_in_channels": [16, 32, 32],
    "decoder_in_channels": [64, 64, 64],
    "num_denoising": 4,
    "num_labels": 5,
}
LW_DETR = {
    "d_model": 64,
    "decoder_ffn_dim": 64,
    "decoder_layers": 2,
    "decoder_self_attention_heads": 4,
    "decoder_cross_attention_heads": 4,
    "num_queries": 20,
    "group_detr": 2,
    "dropout": 0.0,
    "num_labels": 5,
}
MASK_FORMER = {
    "hidden_dim": 64,
    "encoder_feedforward_dim": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_attention_heads": 4,
    "dim_feedforward": 64,
    "num_queries": 10,
    "train_num_points": 64,
    "dropout": 0.0,
    "num_labels": 5,
}
RESNET = {
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
HGNET = {
    "model_type": "hgnet_v2",
    "stem_channels": [3, 8, 8],
    "embedding_size": 8,
    "hidden_sizes": [16, 16, 32, 32],
    "depths": [1, 1, 1, 1],
    "stage_in_channels": [8, 16, 16, 32],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [16, 16, 32, 32],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 5, 5],
    "stage_numb_of_layers": [2, 2, 2, 2],
}
SWIN = {
    "model_type": "swin",
    "embed_dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [2, 2, 4, 4],
    "window_size": 4,
    "image_size": 64,
    "drop_path_rate": 0.0,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 32}  # fmt: skip
STAGES = {"out_features": ["stage1", "stage2", "stage3", "stage4"]}
LAST_STAGES = {"out_features": ["stage2", "stage3", "stage4"]}
LAST_INDICES = {"out_indices": [2, 3, 4]}
GROUNDING = {
    **DETR,
    "backbone_config": {**SWIN, **LAST_INDICES},
    "text_config": {"model_type": "bert", "vocab_size": 1100, **TEXT},
    "encoder_layers": 2,
    "fusion_droppath": 0.0,
    "fusion_dropout": 0.0,
    "max_text_len": 16,
}
# 101 and 102 begin and end a text; 1012 ends a phrase.
GROUNDING_TEXT = {"input_ids": [[101, 5, 1012, 6, 7, 1012, 102]] * 2}
DOC_LAYOUT = {**RT_DETR, "global_pointer_head_size": 8, "gp_dropout_value": 0.0}
READING_ORDER = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_classes": 5,
    "coordinate_size": 6,
    "shape_size": 4,
    "relation_bias_embed_dim": 4,
    "global_pointer_head_size": 8,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


@dataclass(frozen=True)
class Model:
    """How to build a model, and what to give it beside an image.

    by: "layer", which kernels.kernelize replaces, or "function", for kernel.integrations.
    attentions: how many of its modules sample. loss: its own, or None where it has none, or none
    for float64.
    """

    name: str
    config: str
    model: str
    settings: dict
    by: str = "layer"
    attentions: int = 2
    image: tuple[int, int] = (64, 96)
    inputs: dict = field(default_factory=dict)
    loss: str | None = "detection"
    outputs: tuple[str, ...] = ("logits", "pred_boxes")


MODELS = [
    Model("deformable_detr", "DeformableDetrConfig", "DeformableDetrForObjectDetection",
          {**DETR, "backbone_config": {"model_type": "resnet", **RESNET, **LAST_STAGES},
           "encoder_layers": 2, "num_labels": 5}, attentions=4),
    Model("grounding_dino", "GroundingDinoConfig", "GroundingDinoForObjectDetection",
          GROUNDING, attentions=4, inputs=GROUNDING_TEXT),
    Model("mm_grounding_dino", "MMGroundingDinoConfig", "MMGroundingDinoForObjectDetection",
          GROUNDING, attentions=4, inputs=GROUNDING_TEXT),
    Model("rt_detr", "RTDetrConfig", "RTDetrForObjectDetection",
          {**RT_DETR, "backbone_config": {"model_type": "rt_detr_resnet", **RESNET, **LAST_INDICES},
           "encoder_in_channels": [16, 16, 32]}),
    Model("omdet_turbo", "OmDetTurboConfig", "OmDetTurboForObjectDetection",
          {"backbone_config": {**SWIN, **LAST_INDICES}, "use_timm_backbone": False,
           "apply_layernorm_after_vision_backbone": False,
           "text_config": {"model_type": "clip_text_model", **TEXT, "vocab_size": 99,
                           "max_position_embeddings": 16, "projection_dim": 32,
                           "bos_token_id": 1, "eos_token_id": 2},
           "text_projection_in_dim": 32, "text_projection_out_dim": 32,
           "task_encoder_hidden_dim": 64, "class_embed_dim": 32, "num_queries": 20,
           "encoder_hidden_dim": 64, "vision_features_channels": [64, 64, 64],
           "encoder_in_channels": [32, 64, 128], "encoder_attention_heads": 4,
           "encoder_dim_feedforward": 64, "decoder_hidden_dim": 64, "decoder_num_heads": 4,
           "decoder_num_layers": 2, "decoder_dim_feedforward": 64},
          inputs={"classes_input_ids": [[1, 5, 2], [1, 6, 2], [1, 7, 2], [1, 8, 2]],
                  "classes_attention_mask": [[1, 1, 1]] * 4, "tasks_input_ids": [[1, 9, 2]] * 2,
                  "tasks_attention_mask": [[1, 1, 1]] * 2, "classes_structure": [2, 2]},
          loss=None, outputs=("decoder_class_logits", "decoder_coord_logits")),
    Model("rf_detr", "RfDetrConfig", "RfDetrForObjectDetection",
          {**LW_DETR, "backbone_config": {"model_type": "rf_detr_dinov2", "hidden_size": 32,
           "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 112, "patch_size": 14,
           "num_windows": 2, "out_indices": [1, 2, 3, 4]}}, image=(112, 112)),
    Model("lw_detr", "LwDetrConfig", "LwDetrForObjectDetection",
          {**LW_DETR, "backbone_config": {"model_type": "lw_detr_vit", "hidden_size": 32,
           "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 64, "num_windows": 4,
           "window_block_indices": [0, 2], "out_indices": [1, 3], "pretrain_image_size": 64},
           "projector_scale_factors": [2.0, 0.5]}, image=(64, 64)),
    Model("pp_doclayout_v2", "PPDocLayoutV2Config", "PPDocLayoutV2ForObjectDetection",
          {**RT_DETR, "backbone_config": {**HGNET, **LAST_STAGES}, "class_thresholds": [0.0] * 5,
           "reading_order_config": READING_ORDER, "class_order": [0, 1, 2, 3, 4]}, loss=None,
          outputs=("logits", "pred_boxes", "order_logits")),
    Model("pp_doclayout_v3", "PPDocLayoutV3Config", "PPDocLayoutV3ForObjectDetection",
          {**DOC_LAYOUT, "backbone_config": {**HGNET, **STAGES}, "mask_feature_channels": [16, 16],
           "x4_feat_dim": 16, "num_prototypes": 8}, loss=None,
          outputs=("logits", "pred_boxes", "order_logits")),
    Model("pp_doclayout_v4", "PPDocLayoutV4Config", "PPDocLayoutV4ForObjectDetection",
          {**DOC_LAYOUT, "backbone_config": {**HGNET, **LAST_STAGES}, "hidden_size": 64}, loss=None,
          outputs=("logits", "pred_boxes", "relative_order_logits")),
    Model("rt_detr_v2", "RTDetrV2Config", "RTDetrV2ForObjectDetection",
          {**RT_DETR, "backbone_config": {"model_type": "rt_detr_resnet", **RESNET, **LAST_INDICES},
           "encoder_in_channels": [16, 16, 32]}, by="function"),
    Model("rt_detr_v2_discrete", "RTDetrV2Config", "RTDetrV2ForObjectDetection",
          {**RT_DETR, "backbone_config": {"model_type": "rt_detr_resnet", **RESNET, **LAST_INDICES},
           "encoder_in_channels": [16, 16, 32], "decoder_method": "discrete"}, by="function"),
    Model("d_fine", "DFineConfig", "DFineForObjectDetection",
          {**RT_DETR, "backbone_config": {**HGNET, **LAST_INDICES}, "decoder_n_points": [3, 6, 3]},
          by="function", loss=None),
    Model("deimv2", "Deimv2Config", "Deimv2ForObjectDetection",
          {**RT_DETR, "backbone_config": {**HGNET, **LAST_INDICES}, "decoder_n_points": [3, 6, 3]},
          by="function", loss=None),
    Model("mask2former", "Mask2FormerConfig", "Mask2FormerForUniversalSegmentation",
          {**MASK_FORMER, "backbone_config": {**SWIN, **STAGES}, "feature_size": 64,
           "mask_feature_size": 64}, by="function", loss="segmentation",
          outputs=("class_queries_logits", "masks_queries_logits")),
    Model("oneformer", "OneFormerConfig", "OneFormerForUniversalSegmentation",
          {**MASK_FORMER, "backbone_config": {**SWIN, **STAGES}, "conv_dim": 64, "mask_dim": 64,
           "text_encoder_width": 64, "text_encoder_context_length": 16,
           "text_encoder_num_layers": 1, "text_encoder_vocab_size": 99, "text_encoder_n_ctx": 4,
           "task_seq_len": 16, "is_training": True}, by="function",
          inputs={"task_inputs": [list(range(3, 19))] * 2,
                  "text_inputs": [[list(range(i, i + 16)) for i in range(6)]] * 2},
          loss=None, outputs=("class_queries_logits", "masks_queries_logits")),
]  # fmt: skip


def build(spec: Model, transformers, device):
    torch.manual_seed(0)
    config = getattr(transformers, spec.config)(**spec.settings)
    model = getattr(transformers, spec.model)(config)
    # A fresh model points exactly at pixel centres, where the gradient of the location jumps and
    # eager's rounding decides the side.
    for name, parameter in model.named_parameters():
        if "sampling_offsets" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.to(device)


def inputs_of(spec: Model, device, training: bool):
    """Keyword arguments for the model, in torch's default dtype: two images, texts, labels."""
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(2, 3, *spec.image, generator=generator)
    inputs = {"pixel_values": image.to(device)}
    inputs.update((name, torch.tensor(x, device=device)) for name, x in spec.inputs.items())
    if training and spec.loss == "detection":
        labels = {
            "class_labels": torch.tensor([1, 0], device=device),
            "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.3], [0.3, 0.6, 0.1, 0.2]]).to(device),
        }
        inputs["labels"] = [labels, labels]
    if training and spec.loss == "segmentation":
        masks = (torch.rand(2, *spec.image, generator=generator) > 0.5).to(device, image.dtype)
        inputs["mask_labels"] = [masks, masks]
        inputs["class_labels"] = [torch.tensor([1, 3], device=device)] * 2
    return inputs


def run(spec: Model, model, device, training: bool):
    """Outputs; in training the loss and every parameter's gradient, too.

    The loss is the model's own. A model that has none takes the mean of its outputs' squares.
    """
    torch.manual_seed(2)  # of denoising queries and sampled mask points
    with torch.set_grad_enabled(training):
        output = model.train(training)(**inputs_of(spec, device, training))
    # Logits of no text are minus infinity.
    results = {name: output[name].clamp(min=-1e4) for name in spec.outputs}
    if not training:
        return results
    loss = output.loss if spec.loss else sum(x.square().mean() for x in results.values())
    loss.backward()
    gradients = {
        f"gradient of {name}": parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"loss": loss.detach(), **{n: x.detach() for n, x in results.items()}, **gradients}
