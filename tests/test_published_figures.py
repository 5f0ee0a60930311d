"""Parameters and operations that others publish of the same networks, counted the way each of them counts."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from models import create_network
from utils.training.flops import forward_flops


@dataclass
class Count:
    """Of one network at 112x112. `multiply_adds`: of convolutions and matrix products. `norms`, `slopes`, `pooled`:
    the numbers that go through batch norms, PReLUs and average pools. `parameters` are all; `slope_parameters` those of
    PReLUs; `folded` what is left when norms are folded into convolutions.
    """

    multiply_adds: int = 0
    norms: int = 0
    slopes: int = 0
    pooled: int = 0
    parameters: int = 0
    slope_parameters: int = 0
    folded: int = 0


def count(name: str, embedding_size: int) -> Count:
    """All of it, on the meta device."""
    counted = Count()
    with torch.device("meta"):
        network = create_network(name, embedding_size, 112)

    def hook(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            counted.norms += output.numel()
        elif isinstance(module, nn.PReLU):
            counted.slopes += output.numel()
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            counted.pooled += inputs[0].numel()

    handles = [module.register_forward_hook(hook) for module in network.modules()]
    counted.multiply_adds = forward_flops(network, 112) // 2
    for handle in handles:
        handle.remove()
    counted.parameters = sum(value.numel() for value in network.parameters())
    counted.slope_parameters = sum(m.weight.numel() for m in network.modules() if isinstance(m, nn.PReLU))
    counted.folded = folded_parameters(network)
    return counted


def folded_parameters(network: nn.Module) -> int:
    """As Open Model Zoo has them: a norm behind a convolution or a linear layer is its bias, one before a convolution
    keeps scale and shift, and the norm before the last linear layer is part of that.
    """
    total = 0
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear | nn.PReLU):
            total += module.weight.numel()
        elif isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) and name != "bn2":
            before_a_convolution = name.startswith("layer") and name.endswith(".bn1")
            total += module.num_features * (2 if before_a_convolution else 1)
    return total


THOP = "THOP"
FACEX = "JDAI-CV/FaceX-Zoo, training_mode/README.md at 16b793a7, section 3.1"
CAVAFACE = "cavalleria/cavaface, docs/MODEL_ZOO.md at 822651f0"
OMZ = "openvinotoolkit/open_model_zoo, models/public/face-recognition-*-arcface at 1fbbbf08"
REPVGG = "vinhtq115/arcface_repvgg, README.md at 89961a78"
TIMM_FACE = "gau-nernst/timm-face, README.md at 85c61d8b, AdaFace"
DATN = "nhatky160103/DATN, docs/arcface-research.md at 5f02c9d0"

#: Network, length of its embeddings, who publishes, millions of parameters and of operations, convention.
#: - plain: all parameters; multiply-adds.
#: - THOP: no PReLU at all; a multiply-add is one operation, a norm two, a pool one for each number.
#: - single: all parameters; a multiply-add is one operation, a norm two, a slope one for each number.
#: - double: the same, a multiply-add being two.
#: - folded: operations as in double; parameters after norms were folded into convolutions.
#: Decimals are those published. Parameters agree to the last of them, operations within the share in the last column
#: (0: to the last decimal as well): what is left is how each counts poolings, sums of branches and normalisation.
FIGURES = [
    ("ir18", 512, TIMM_FACE, "24.020352", None, "plain", 0),
    ("ir101", 512, TIMM_FACE, "65.150912", None, "plain", 0),
    ("evolve_ir50", 512, FACEX, "43.57", "6310", THOP, 0.001),
    ("evolve_ir_se152", 512, FACEX, "71.14", "12330", THOP, 0.001),
    ("mobilefacenet", 512, FACEX, "1.19", "227.57", THOP, 0),
    ("mobilefacenet", 512, CAVAFACE, "1.20", "450", "double", 0.005),
    ("evolve_ir_se101", 512, CAVAFACE, "65.5", "24180", "double", 0.001),
    ("evolve_ir101", 512, CAVAFACE, None, "24180", "double", 0.001),  # its parameters there are IR-SE-100's
    ("mbf", 512, REPVGG, "2.059520", "437.55", "plain", 0.001),
    ("mbf", 512, "deepinsight/insightface, model_zoo/README.md", None, "450", "single", 0.005),
    ("mobilefacenet_y1", 128, OMZ, "0.993", "449", "folded", 0.005),
    ("r34", 512, OMZ, "34.129", "8934", "folded", 0.001),
    ("r50", 512, OMZ, "43.576", "12637", "folded", 0.001),
    ("r100", 512, OMZ, "65.131", "24209", "folded", 0.001),
    ("r18", 512, DATN, "24.025600", "2630", "single", 0.004),
    ("r34", 512, DATN, "34.139328", "4480", "single", 0.001),
    ("r50", 512, DATN, "43.590848", "6330", "single", 0.001),
    ("r100", 512, DATN, "65.156160", "12130", "single", 0.001),
]


def by_convention(counted: Count, convention: str) -> tuple[int, int]:
    """(parameters, operations)."""
    if convention == "plain":
        return counted.parameters, counted.multiply_adds
    if convention == THOP:
        return (
            counted.parameters - counted.slope_parameters,
            counted.multiply_adds + 2 * counted.norms + counted.pooled,
        )
    factor = 1 if convention == "single" else 2
    operations = factor * counted.multiply_adds + 2 * counted.norms + counted.slopes
    return counted.folded if convention == "folded" else counted.parameters, operations


def last_decimal(text: str) -> float:
    """Half a unit of it."""
    return 0.5 * 10.0 ** -len(text.partition(".")[2])


@pytest.mark.parametrize(
    ("name", "embedding_size", "source", "parameters", "operations", "convention", "share"),
    FIGURES,
    ids=[f"{row[0]}, {row[2].partition(',')[0]}" for row in FIGURES],
)
def test_figures_of_others(
    name: str,
    embedding_size: int,
    source: str,
    parameters: str | None,
    operations: str | None,
    convention: str,
    share: float,
) -> None:
    """A wrong depth, width, stride, or a layer too many would show in what somebody else counted."""
    found_parameters, found_operations = by_convention(count(name, embedding_size), convention)
    if parameters is not None:
        assert abs(found_parameters / 1e6 - float(parameters)) <= 1.0001 * last_decimal(parameters), source
    if operations is not None:
        tolerance = share * float(operations) or last_decimal(operations)
        assert abs(found_operations / 1e6 - float(operations)) <= tolerance, source


@pytest.mark.parametrize(("name", "size"), [("vit_t", 76_653_813), ("vit_s", 304_196_926), ("vit_b", 455_533_594)])
def test_sizes_of_published_onnx_files(name: str, size: int) -> None:
    """Bytes of LVFace's ONNX files (bytedance-research/LVFace; the table of Mowshon/lvface-weights): four for each
    parameter, and at most 0.15 % for the graph around them.
    """
    with torch.device("meta"):
        network = create_network(name, 512, 112)
    weights = 4 * sum(value.numel() for value in network.parameters())
    assert weights < size < 1.0015 * weights
