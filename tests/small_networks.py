"""The smallest network of each family, for tests of what all must be able to do."""

from collections.abc import Callable
from functools import partial

from torch import nn

from models.backbones.demonet import DemoNet
from models.backbones.edgeface import EdgeFace
from models.backbones.ir import IRNet
from models.backbones.iresnet import IResNet
from models.backbones.mobilefacenet import MobileFaceNet
from models.backbones.mobilefacenet_original import OriginalMobileFaceNet
from models.backbones.timm_networks import TimmNetwork
from models.backbones.vit import VisionTransformer

#: Family to a function of (embedding_size, image_size).
SMALL: dict[str, Callable[..., nn.Module]] = {
    "iresnet": partial(IResNet, 18),
    "ir": partial(IRNet, 18),
    "ir_se": partial(IRNet, 18, excitation=True),
    "evolve_ir_se": partial(IRNet, 18, layout="evolve", excitation=True),
    "mbf": partial(MobileFaceNet, units=(1, 1, 1, 1), scale=1),
    "mbf_large": partial(MobileFaceNet, units=(2, 1, 1, 1), scale=2),
    "mobilefacenet": OriginalMobileFaceNet,
    "mobilefacenet_y1": partial(
        OriginalMobileFaceNet, input_scale=127.5 / 128, last_bias=True, eps=1e-3, last_eps=2e-5
    ),
    "vit": partial(VisionTransformer, 64, 2, mask_ratio=0.25, drop_path=0.3),
    "edgeface": partial(EdgeFace, (16, 24, 36, 48), (1, 2, 2, 2), 4, None, drop_path=0.3),
    "edgeface_gamma": partial(EdgeFace, (16, 24, 36, 48), (1, 2, 2, 2), 4, 0.5),
    "timm_convolutions": partial(TimmNetwork, "convnext_atto"),
    "timm_transformer": partial(TimmNetwork, "vit_tiny_patch16_224"),
    "demo": DemoNet,
}
