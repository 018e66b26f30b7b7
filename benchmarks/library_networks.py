"""Networks of torchvision, timm and transformers: their own classes, small where they allow it.

`torchvision_networks`, `timm_networks` and `transformers_networks` map a name to a function that
returns a network with random weights and its example. Nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Networks", "timm_networks", "torchvision_networks", "transformers_networks"]

Networks = dict[str, Callable[[], tuple[nn.Module, Any]]]

BATCH = 4
CLASSES = 10


def _images(size: int = 64, *before: int) -> Tensor:
    return torch.randn(BATCH, 3, *before, size, size)


def torchvision_networks() -> Networks:
    """Families of classification, segmentation and video."""
    import torchvision.models as tv
    from torchvision.models import (
        convnext,
        efficientnet,
        maxvit,
        regnet,
        resnet,
        segmentation,
        swin_transformer,
        vision_transformer,
    )
    from torchvision.models._utils import IntermediateLayerGetter
    from torchvision.models.segmentation.deeplabv3 import DeepLabHead
    from torchvision.models.segmentation.fcn import FCNHead
    from torchvision.models.segmentation.lraspp import LRASPP
    from torchvision.models.video import mvit
    from torchvision.models.video import resnet as video_resnet
    from torchvision.models.video import swin_transformer as video_swin
    from torchvision.models.video.s3d import S3D

    def small_resnet(block: Any = resnet.Bottleneck, **options: Any) -> nn.Module:
        return tv.ResNet(block, [1, 1, 1, 1], num_classes=CLASSES, **options)

    def body(last: str = "layer4") -> IntermediateLayerGetter:
        net = small_resnet(replace_stride_with_dilation=[False, True, True])
        return IntermediateLayerGetter(net, return_layers={last: "out"})

    def lraspp() -> nn.Module:
        features = tv.mobilenet_v3_small(reduced_tail=True).features
        layers = {"3": "low", "11": "high"}
        return LRASPP(IntermediateLayerGetter(features, layers), 24, 48, 5)

    def efficient(fused: bool) -> nn.Module:
        inverted, other = efficientnet.MBConvConfig, efficientnet.FusedMBConvConfig
        setting = [
            (other(1, 3, 1, 16, 16, 1) if fused else inverted(1, 3, 1, 16, 16, 1, 1.0, 1.0)),
            (other(4, 3, 2, 16, 24, 2) if fused else inverted(6, 3, 2, 16, 24, 2, 1.0, 1.0)),
            inverted(6, 5, 2, 24, 40, 2, 1.0, 1.0),
        ]
        return tv.EfficientNet(setting, 0.2, 0.2, CLASSES, last_channel=96)

    def convnext_of(*widths: int) -> nn.Module:
        setting = [
            convnext.CNBlockConfig(width, following, 1)
            for width, following in zip(widths, (*widths[1:], None), strict=True)
        ]
        return tv.ConvNeXt(setting, 0.1, num_classes=CLASSES)

    def swin(block: Any, merging: Any) -> nn.Module:
        return tv.SwinTransformer(
            [4, 4], 24, [2, 2], [2, 4], [4, 4], num_classes=CLASSES, block=block,
            downsample_layer=merging,
        )  # fmt: skip

    def maxvit_small() -> nn.Module:
        return maxvit.MaxVit(
            (64, 64), 16, 4, [16, 32], [1, 1], head_dim=8, stochastic_depth_prob=0.1,
            num_classes=CLASSES,
        )  # fmt: skip

    def regnet_small(ratio: float | None) -> nn.Module:
        setting = regnet.BlockParams.from_init_params(4, 16, 27.0, 2.5, 8, se_ratio=ratio)
        return tv.RegNet(setting, num_classes=CLASSES)

    def video(kind: str) -> nn.Module:
        convolution, stem = {
            "r3d": (video_resnet.Conv3DSimple, video_resnet.BasicStem),
            "mc3": (video_resnet.Conv3DNoTemporal, video_resnet.BasicStem),
            "r2plus1d": (video_resnet.Conv2Plus1D, video_resnet.R2Plus1dStem),
        }[kind]
        block = video_resnet.BasicBlock
        return video_resnet.VideoResNet(block, [convolution] * 4, [1] * 4, stem, CLASSES)

    def mvit_small() -> nn.Module:
        config = mvit.MSBlockConfig
        setting = [
            config(1, 16, 32, [3, 3, 3], [3, 3, 3], [1, 2, 2], [1, 1, 1]),
            config(2, 32, 32, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 2, 2]),
        ]
        return mvit.MViT((32, 32), 4, setting, True, True, True, True, num_classes=CLASSES)

    def swin_of_videos() -> nn.Module:
        return video_swin.SwinTransformer3d(
            [2, 4, 4], 24, [2, 2], [2, 4], [2, 4, 4], num_classes=CLASSES
        )

    classes = {"num_classes": CLASSES}
    image = {
        "AlexNet": lambda: tv.alexnet(**classes),
        "VGG": lambda: tv.VGG(tv.vgg.make_layers([16, "M", 32, "M", 512], False), CLASSES),
        "VGG-BN": lambda: tv.VGG(tv.vgg.make_layers([16, "M", 32, "M", 512], True), CLASSES),
        "ResNet (basic)": lambda: small_resnet(resnet.BasicBlock),
        "ResNet (bottleneck)": small_resnet,
        "ResNeXt": lambda: small_resnet(groups=8, width_per_group=8),
        "Wide ResNet": lambda: small_resnet(width_per_group=96),
        "DenseNet": lambda: tv.DenseNet(8, (2, 3, 2), 16, num_classes=CLASSES),
        "GoogLeNet": lambda: tv.googlenet(init_weights=False, aux_logits=False, **classes),
        "MobileNetV2": lambda: tv.mobilenet_v2(width_mult=0.25, **classes),
        "MobileNetV3": lambda: tv.mobilenet_v3_small(**classes),
        "MNASNet": lambda: tv.MNASNet(0.25, **classes),
        "ShuffleNetV2": lambda: tv.shufflenet_v2_x0_5(**classes),
        "SqueezeNet": lambda: tv.squeezenet1_1(**classes),
        "EfficientNet": lambda: efficient(False),
        "EfficientNetV2": lambda: efficient(True),
        "RegNetX": lambda: regnet_small(None),
        "RegNetY": lambda: regnet_small(0.25),
        "ConvNeXt": lambda: convnext_of(16, 32, 48),
        "ViT": lambda: vision_transformer.VisionTransformer(64, 16, 2, 4, 32, 64, **classes),
        "Swin": lambda: swin(swin_transformer.SwinTransformerBlock, swin_transformer.PatchMerging),
        "SwinV2": lambda: swin(
            swin_transformer.SwinTransformerBlockV2, swin_transformer.PatchMergingV2
        ),
        "MaxViT": maxvit_small,
    }
    networks: Networks = {
        name: lambda make=make: (make(), _images()) for name, make in image.items()
    }
    networks["Inception v3"] = lambda: (
        tv.inception_v3(init_weights=False, aux_logits=False, **classes),
        _images(80),
    )
    networks |= {
        "FCN": lambda: (segmentation.FCN(body(), FCNHead(2048, 5)), _images()),
        "FCN with auxiliary output": lambda: (
            segmentation.FCN(
                IntermediateLayerGetter(
                    small_resnet(), return_layers={"layer3": "aux", "layer4": "out"}
                ),
                FCNHead(2048, 5),
                FCNHead(1024, 5),
            ),
            _images(),
        ),
        "DeepLabV3": lambda: (segmentation.DeepLabV3(body(), DeepLabHead(2048, 5)), _images()),
        "LR-ASPP": lambda: (lraspp(), _images()),
    }
    networks |= {
        name: lambda name=name: (video(name), _images(32, 4)) for name in ("r3d", "mc3", "r2plus1d")
    }
    networks["S3D"] = lambda: (S3D(CLASSES), _images(224, 16))
    networks["MViT"] = lambda: (mvit_small(), _images(32, 4))
    networks["Swin3D"] = lambda: (swin_of_videos(), _images(32, 4))
    return networks


# ruff: noqa: E501
# A family's module in timm, and its smallest network; what makes it smaller still.
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "beit": ("beit_base_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 4}),
    "byoanet": ("halonet26t", {}),
    "byobnet": ("test_byobnet", {}),
    "cait": ("cait_xxs24_224", {"embed_dim": 32, "depth": 2, "num_heads": 4}),
    "coat": ("coat_tiny", {"serial_depths": [1, 1, 1, 1], "parallel_depth": 1}),
    "convit": ("convit_tiny", {"embed_dim": 8, "depth": 3, "local_up_to_layer": 2}),
    "convmixer": ("convmixer_768_32", {}),
    "convnext": ("test_convnext", {}),
    "crossvit": ("crossvit_9_240", {}),
    "cspnet": ("cspresnet50", {}),
    "davit": ("davit_tiny", {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64), "num_heads": (2, 2, 4, 4)}),
    "deit": ("deit_tiny_distilled_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 4}),
    "densenet": ("densenet121", {"growth_rate": 8, "block_config": (2, 2, 2)}),
    "dla": ("dla46_c", {}),
    "dpn": ("dpn48b", {}),
    "edgenext": ("edgenext_xx_small", {}),
    "efficientformer": ("efficientformer_l1", {}),
    "efficientformer_v2": ("efficientformerv2_s0", {}),
    "efficientnet": ("test_efficientnet", {}),
    "efficientvit_mit": ("efficientvit_b0", {}),
    "efficientvit_msra": ("efficientvit_m0", {}),
    "eva": ("eva02_tiny_patch14_224", {"embed_dim": 32, "depth": 2, "num_heads": 4}),
    "fasternet": ("fasternet_t0", {}),
    "fastvit": ("fastvit_t8", {}),
    "focalnet": ("focalnet_tiny_srf", {}),
    "gcvit": ("gcvit_xxtiny", {}),
    "ghostnet": ("ghostnet_050", {}),
    "hardcorenas": ("hardcorenas_a", {}),
    "hgnet": ("hgnetv2_b0", {}),
    "hiera": ("hiera_tiny_224", {"embed_dim": 16, "num_heads": 1, "stages": (1, 1, 1, 1)}),
    "hrnet": ("hrnet_w18_small", {}),
    "inception_next": ("inception_next_atto", {}),
    "levit": ("levit_128s", {}),
    "mambaout": ("test_mambaout", {}),
    "maxxvit": ("test_maxvit", {}),
    "metaformer": ("poolformer_s12", {}),
    "mlp_mixer": ("mixer_s32_224", {}),
    "mobilenetv3": ("mobilenetv3_small_050", {}),
    "mobilevit": ("mobilevit_xxs", {}),
    "mvitv2": ("mvitv2_tiny", {}),
    "nest": ("nest_tiny", {}),
    "nextvit": ("nextvit_small", {}),
    "nfnet": ("test_nfnet", {}),
    "pit": ("pit_ti_224", {}),
    "pvt_v2": ("pvt_v2_b0", {}),
    "rdnet": ("rdnet_tiny", {}),
    "regnet": ("regnety_002", {}),
    "repghost": ("repghostnet_050", {}),
    "repvit": ("repvit_m0_9", {}),
    "res2net": ("res2net50_14w_8s", {"layers": [1, 1, 1, 1]}),
    "resnest": ("resnest14d", {}),
    "resnet": ("test_resnet", {}),
    "resnetv2": ("resnetv2_18", {}),
    "rexnet": ("rexnet_100", {}),
    "selecsls": ("selecsls42", {}),
    "senet": ("legacy_seresnet18", {}),
    "sequencer": ("sequencer2d_s", {"layers": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 32), "hidden_sizes": (8, 16, 16, 16)}),
    "shvit": ("shvit_s1", {}),
    "sknet": ("skresnet18", {}),
    "starnet": ("starnet_s050", {}),
    "swiftformer": ("swiftformer_xs", {}),
    "swin_transformer": ("swin_tiny_patch4_window7_224", {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", {"embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}),
    "tiny_vit": ("tiny_vit_5m_224", {"depths": (1, 1, 1, 1)}),
    "tresnet": ("tresnet_m", {"layers": [1, 1, 1, 1]}),
    "twins": ("twins_svt_small", {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 48, 64)}),
    "vgg": ("vgg11_bn", {}),
    "visformer": ("visformer_tiny", {}),
    "vision_transformer": ("test_vit", {}),
    "vision_transformer_relpos": ("test_vit_relpos", {}),
    "vitamin": ("vitamin_small_224", {}),
    "volo": ("volo_d1_224", {}),
    "vovnet": ("ese_vovnet19b_slim", {}),
    "xception": ("legacy_xception", {}),
    "xcit": ("xcit_nano_12_p16_224", {"embed_dim": 32, "depth": 2, "num_heads": 4}),
}  # fmt: skip


def timm_networks() -> Networks:
    """One network of each family."""

    def make(name: str, options: dict[str, Any]) -> tuple[nn.Module, Tensor]:
        import timm

        for size in (96, None):  # None: that of the family
            given = {} if size is None else {"img_size": size}
            for arguments in ({**given, **options}, options):
                try:
                    net = timm.create_model(name, num_classes=CLASSES, **arguments).eval()
                    images = _images(size or net.default_cfg["input_size"][-1])
                    with torch.no_grad():
                        net(images)
                except (AssertionError, RuntimeError, TypeError):
                    continue
                return net, images
        raise ValueError(f"timm makes no {name} with {options}")

    return {
        f"{family} ({name})": lambda name=name, options=options: make(name, options)
        for family, (name, options) in TIMM.items()
    }


def transformers_networks() -> Networks:
    """Architectures with small configurations."""
    import transformers as hf

    words, length = 50, 8
    small = {
        "vocab_size": words, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "max_position_embeddings": 32,
    }  # fmt: skip
    images = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
        "intermediate_size": 64, "patch_size": 8,
    }  # fmt: skip
    grouped = {**small, "num_key_value_heads": 2, "use_cache": False}

    def text(mask: bool = False) -> dict[str, Tensor]:
        inputs = {"input_ids": torch.randint(3, words, (BATCH, length))}
        if mask:
            inputs["attention_mask"] = torch.ones(BATCH, length, dtype=torch.long)
        return inputs

    def pixels(size: int = 32) -> dict[str, Tensor]:
        return {"pixel_values": torch.randn(BATCH, 3, size, size)}

    wav2vec2 = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 64, "conv_dim": (16, 16), "conv_kernel": (8, 4),
        "conv_stride": (4, 2), "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2,
        "apply_spec_augment": False, "mask_time_prob": 0.0,
    }  # fmt: skip
    made: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
        "BERT": lambda: (hf.BertModel(hf.BertConfig(**small)), text(True)),
        "BERT for sequences": lambda: (
            hf.BertForSequenceClassification(hf.BertConfig(**small, num_labels=3)), text(True),
        ),
        "DistilBERT": lambda: (
            hf.DistilBertModel(hf.DistilBertConfig(
                vocab_size=words, dim=32, n_layers=2, n_heads=4, hidden_dim=64,
                max_position_embeddings=32,
            )), text(),
        ),
        "RoBERTa": lambda: (hf.RobertaModel(hf.RobertaConfig(**small, pad_token_id=1)), text(True)),
        "ELECTRA": lambda: (
            hf.ElectraModel(hf.ElectraConfig(**small, embedding_size=16)), text(),
        ),
        "ALBERT": lambda: (
            hf.AlbertModel(hf.AlbertConfig(**small, embedding_size=16)), text(),
        ),
        "GPT-2": lambda: (
            hf.GPT2Model(hf.GPT2Config(
                vocab_size=words, n_embd=32, n_layer=2, n_head=4, n_positions=32, use_cache=False,
            )), text(),
        ),
        "GPT-2 with its cache": lambda: (
            hf.GPT2LMHeadModel(hf.GPT2Config(
                vocab_size=words, n_embd=32, n_layer=2, n_head=4, n_positions=32,
            )), text(),
        ),
        "GPT-NeoX": lambda: (hf.GPTNeoXModel(hf.GPTNeoXConfig(**small, use_cache=False)), text()),
        "Llama, grouped heads": lambda: (hf.LlamaModel(hf.LlamaConfig(**grouped)), text()),
        "Mistral": lambda: (hf.MistralModel(hf.MistralConfig(**grouped, head_dim=8)), text()),
        "Qwen2": lambda: (hf.Qwen2Model(hf.Qwen2Config(**grouped)), text()),
        "Qwen3": lambda: (hf.Qwen3Model(hf.Qwen3Config(**grouped, head_dim=8)), text()),
        "Gemma": lambda: (hf.GemmaModel(hf.GemmaConfig(**grouped, head_dim=8)), text()),
        "T5 encoder": lambda: (
            hf.T5EncoderModel(hf.T5Config(
                vocab_size=words, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
            )), text(),
        ),
        "ViT": lambda: (hf.ViTModel(hf.ViTConfig(**images)), pixels()),
        "DeiT": lambda: (hf.DeiTModel(hf.DeiTConfig(**images)), pixels()),
        "DINOv2": lambda: (
            hf.Dinov2Model(hf.Dinov2Config(
                hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32,
                patch_size=8,
            )), pixels(),
        ),
        "BEiT": lambda: (hf.BeitModel(hf.BeitConfig(**images)), pixels()),
        "Swin": lambda: (
            hf.SwinModel(hf.SwinConfig(
                image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4],
                window_size=4,
            )), pixels(),
        ),
        "ResNet": lambda: (
            hf.ResNetModel(hf.ResNetConfig(
                embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic",
            )), pixels(),
        ),
        "ConvNeXt": lambda: (
            hf.ConvNextModel(hf.ConvNextConfig(
                hidden_sizes=[16, 32], depths=[1, 1], num_stages=2,
            )), pixels(),
        ),
        "wav2vec2": lambda: (
            hf.Wav2Vec2Model(hf.Wav2Vec2Config(**wav2vec2)),
            {"input_values": torch.randn(BATCH, 200)},
        ),
        "Whisper encoder": lambda: (
            hf.models.whisper.modeling_whisper.WhisperEncoder(hf.WhisperConfig(
                d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64,
                max_source_positions=20, num_mel_bins=8, vocab_size=words, pad_token_id=0,
            )), {"input_features": torch.randn(BATCH, 8, 40)},
        ),
        "CLIP vision": lambda: (hf.CLIPVisionModel(hf.CLIPVisionConfig(**images)), pixels()),
    }  # fmt: skip
    return dict(made)
