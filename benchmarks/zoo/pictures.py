"""Models of torchvision and timm: the smallest variant of each family, on small pictures."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.zoo.example import Example
from benchmarks.zoo.torchvision_ops import declare_operators

TORCHVISION = """
    alexnet vgg11 vgg11_bn resnet18 resnet50 resnext50_32x4d wide_resnet50_2 densenet121 squeezenet1_1 googlenet
    inception_v3 mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet0_5 shufflenet_v2_x0_5 shufflenet_v2_x1_0
    efficientnet_b0 efficientnet_v2_s regnet_x_400mf regnet_y_400mf convnext_tiny vit_b_16 vit_b_32 swin_t swin_v2_t
    maxvit_t
""".split()  # noqa: SIM905
DENSE = """
    lraspp_mobilenet_v3_large deeplabv3_mobilenet_v3_large fcn_resnet50 retinanet_resnet50_fpn fcos_resnet50_fpn
    ssdlite320_mobilenet_v3_large r3d_18
""".split()  # noqa: SIM905
"""Segmentation, detection (without the selection of boxes), video."""
TIMM = """
    efficientvim_m1 cpubone_nano cs3darknet_focus_s cspresnet50 convnext_atto_rms convnextv2_atto poolformerv2_s12
    davit_tiny halonet_h1 vit_srelpos_small_patch16_224 vit_tiny_patch16_224 volo_d1_224 rdnet_tiny mobilevit_xxs
    mobilevitv2_050 swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 mobileone_s1 maxvit_pico_rw_256 skresnet18
    repvit_m1 edgenext_xx_small convmixer_768_32 efficientvit_b0 efficientvit_m0 csatv2 pit_ti_224 gcvit_xxtiny
    tiny_vit_5m_224 levit_128s swiftformer_xs lcnetv2_small lcnet_050 hgnetv2_b0 legacy_seresnet18 resnetv2_18
    resnetv2_50x1_bit fastvit_s12 xcit_nano_12_p8_224 twins_svt_small twins_pcpvt_small crossvit_tiny_240 coat_tiny
    coat_lite_tiny coatnet_nano_rw_224 convit_tiny eva02_tiny_patch14_224 cait_xxs24_224 mixer_s32_224 resmlp_12_224
    gmlp_s16_224 hiera_tiny_224 pvt_v2_b0 res2net50_14w_8s dpn48b tresnet_m fasternet_t0 tnt_s_legacy_patch16_224
    visformer_tiny nextvit_small mvitv2_tiny focalnet_tiny_srf hrnet_w18_small selecsls42 vovnet39a ese_vovnet19b_dw
    ghostnet_050 ghostnetv2_100 resnest14d botnet26t_256 lambda_resnet26t bat_resnext26ts eca_halonext26ts
    gcresnext26ts nf_resnet26 dm_nfnet_f0 eca_nfnet_l0 sequencer2d_s beit_base_patch16_224 deit_tiny_patch16_224
    inception_next_atto inception_resnet_v2 mambaout_femto starnet_s1 repghostnet_050 hardcorenas_a
    mobilenetv4_conv_small tf_efficientnet_lite0 mixnet_s rexnetr_200 nfnet_l0 efficientformer_l1 efficientformerv2_s0
    nest_tiny xception41 dla34 regnety_002 seresnext26d_32x4d vitamin_small_224 samvit_base_patch16_224 shvit_s1
    mobilenet_edgetpu_v2_xs caformer_s18 convformer_s18
""".split()  # noqa: SIM905
ONLY_LARGE = {"halonet_h1", "botnet26t_256", "lambda_resnet26t", "eca_halonext26ts"}
"""Models that run on small pictures but mean another thing there."""


def torchvision_model(name: str) -> Example:
    declare_operators()
    import torchvision

    settings = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = getattr(torchvision.models, name)(weights=None, **settings)
    size = 224 if name.startswith(("vit", "swin", "maxvit")) else 128
    return Example(model, (torch.randn(2 if size == 128 else 1, 3, size, size),))


class BackboneAndHead(nn.Module):
    """A detector up to its predictions for each place."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = detector.backbone, detector.head

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.head(list(self.backbone(x).values()))


def dense_model(name: str) -> Example:
    declare_operators()
    import torchvision

    if name == "r3d_18":
        return Example(torchvision.models.video.r3d_18(weights=None), (torch.randn(1, 3, 8, 64, 64),))
    if name.startswith(("retinanet", "fcos", "ssd")):
        model = getattr(torchvision.models.detection, name)(weights=None, weights_backbone=None)
        return Example(BackboneAndHead(model), (torch.randn(1, 3, 128, 128),))
    model = getattr(torchvision.models.segmentation, name)(weights=None, weights_backbone=None)
    return Example(model, (torch.randn(2, 3, 96, 96),))


def timm_model(name: str) -> Example:
    declare_operators()
    import timm

    model = timm.create_model(name, pretrained=False)
    config = model.default_cfg
    channels, height, width = config["input_size"]
    if not config.get("fixed_input_size") and name not in ONLY_LARGE:
        try:
            example = Example(model.eval(), (torch.randn(2, channels, 128, 128),))
            example.outputs()
            return example
        except Exception:  # whatever the model raises at a size that it was not made for
            model = timm.create_model(name, pretrained=False)
    return Example(model, (torch.randn(1, channels, height, width),))
