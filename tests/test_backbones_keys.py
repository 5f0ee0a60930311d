"""Parameter names and shapes of published checkpoints, no more and no less, so that they load strictly."""

import pytest
import torch

from models import create_network

Shapes = dict[str, tuple[int, ...]]


def norm(name: str, channels: int, affine: bool = True) -> Shapes:
    values = ("weight", "bias", "running_mean", "running_var") if affine else ("running_mean", "running_var")
    return {**dict.fromkeys((f"{name}.{value}" for value in values), (channels,)), f"{name}.num_batches_tracked": ()}


def layer_norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}


def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def shapes_of(name: str, embedding_size: int, image_size: int | tuple[int, int]) -> Shapes:
    with torch.device("meta"):
        network = create_network(name, embedding_size, image_size)
    return {key: tuple(value.shape) for key, value in network.state_dict().items()}


# --- IR and IR-SE -----------------------------------------------------------------------------------------------------

IR_UNITS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    101: (3, 13, 30, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}


def ir_shapes(depth: int, excitation: bool, layout: str, embedding_size: int, places: int) -> Shapes:
    """What a checkpoint of TFace, AdaFace or CVLface holds ("tface"), or one of face.evoLVe ("evolve")."""
    shapes: Shapes = {"input_layer.0.weight": (64, 3, 3, 3), **norm("input_layer.1", 64), "input_layer.2.weight": (64,)}
    bottlenecks = layout == "tface" and depth > 101
    inputs, unit = 64, 0
    for stage, count in enumerate(IR_UNITS[depth]):
        width = (256 if bottlenecks else 64) << stage
        for _ in range(count):
            body = f"body.{unit}.res_layer"
            if inputs != width:
                shapes[f"body.{unit}.shortcut_layer.0.weight"] = (width, inputs, 1, 1)
                shapes |= norm(f"body.{unit}.shortcut_layer.1", width)
            shapes |= norm(f"{body}.0", inputs)
            if bottlenecks:
                inner = width // 4
                shapes |= {f"{body}.1.weight": (inner, inputs, 1, 1), **norm(f"{body}.2", inner)}
                shapes |= {f"{body}.3.weight": (inner,), f"{body}.4.weight": (inner, inner, 3, 3)}
                shapes |= {**norm(f"{body}.5", inner), f"{body}.6.weight": (inner,)}
                shapes |= {f"{body}.7.weight": (width, inner, 1, 1), **norm(f"{body}.8", width)}
            elif layout == "tface":
                shapes |= {f"{body}.1.weight": (width, inputs, 3, 3), **norm(f"{body}.2", width)}
                shapes |= {f"{body}.3.weight": (width,), f"{body}.4.weight": (width, width, 3, 3)}
                shapes |= norm(f"{body}.5", width)
            else:
                shapes |= {f"{body}.1.weight": (width, inputs, 3, 3), f"{body}.2.weight": (width,)}
                shapes |= {f"{body}.3.weight": (width, width, 3, 3), **norm(f"{body}.4", width)}
            if excitation:
                block = f"{body}.se_block" if layout == "tface" else f"{body}.5"
                shapes[f"{block}.fc1.weight"] = (width // 16, width, 1, 1)
                shapes[f"{block}.fc2.weight"] = (width, width // 16, 1, 1)
            inputs, unit = width, unit + 1
    shapes |= {**norm("output_layer.0", inputs), **linear("output_layer.3", inputs * places, embedding_size)}
    return {**shapes, **norm("output_layer.4", embedding_size, affine=layout == "evolve")}


@pytest.mark.parametrize("depth", IR_UNITS)
def test_ir_has_the_keys_of_adaface_and_tface(depth: int) -> None:
    """`AdaFace` checkpoints (prefix `model.`), TFace's and CVLface's (prefix `net.`)."""
    assert shapes_of(f"ir{depth}", 512, 112) == ir_shapes(depth, False, "tface", 512, 49)
    assert shapes_of(f"ir{depth}", 64, (112, 96)) == ir_shapes(depth, False, "tface", 64, 42)


@pytest.mark.parametrize("depth", [50, 101, 152, 200])
def test_ir_se_has_the_keys_of_tface(depth: int) -> None:
    """The same with squeeze and excitation as `se_block`."""
    assert shapes_of(f"ir_se{depth}", 512, 112) == ir_shapes(depth, True, "tface", 512, 49)


@pytest.mark.parametrize("depth", [50, 101, 152])
@pytest.mark.parametrize("excitation", [False, True])
def test_evolve_ir_has_the_keys_of_face_evolve(depth: int, excitation: bool) -> None:
    """No norm before the PReLU, a last norm with weights, no bottlenecks."""
    name = f"evolve_ir{'_se' if excitation else ''}{depth}"
    assert shapes_of(name, 512, 112) == ir_shapes(depth, excitation, "evolve", 512, 49)


# --- MobileFaceNets ---------------------------------------------------------------------------------------------------


def mbf_shapes(units: tuple[int, int, int, int], scale: int, embedding_size: int) -> Shapes:
    """What insightface's checkpoints of `mbf` and `mbf_large` hold, from 112x112."""
    shapes: Shapes = {}

    def conv(name: str, inputs: int, outputs: int, kernel: int, groups: int = 1, prelu: bool = True) -> None:
        nonlocal shapes
        shapes |= {f"{name}.layers.0.weight": (outputs, inputs // groups, kernel, kernel)}
        shapes |= norm(f"{name}.layers.1", outputs)
        if prelu:
            shapes[f"{name}.layers.2.weight"] = (outputs,)

    def unit(name: str, inputs: int, outputs: int, width: int) -> None:
        conv(f"{name}.layers.0", inputs, width, 1)
        conv(f"{name}.layers.1", width, width, 3, groups=width)
        conv(f"{name}.layers.2", width, outputs, 1, prelu=False)

    narrow, wide = 64 * scale, 128 * scale
    conv("layers.0", 3, narrow, 3)
    if units[0] == 1:
        conv("layers.1", narrow, narrow, 3, groups=64)
    stages = [(1, narrow, narrow, 0, units[0] if units[0] > 1 else 0, 128), (3, narrow, narrow, 128, units[1], 128)]
    stages += [(5, narrow, wide, 256, units[2], 256), (7, wide, wide, 512, units[3], 256)]
    for place, inputs, outputs, width, residuals, residual_width in stages:
        if width:
            unit(f"layers.{place - 1}", inputs, outputs, width)
        for i in range(residuals):
            unit(f"layers.{place}.layers.{i}", outputs, outputs, residual_width)
    conv("conv_sep", wide, 512, 1)
    conv("features.layers.0", 512, 512, 7, groups=512, prelu=False)
    shapes["features.layers.2.weight"] = (embedding_size, 512)
    return {**shapes, **norm("features.layers.3", embedding_size)}


@pytest.mark.parametrize(("name", "units", "scale"), [("mbf", (1, 4, 6, 2), 2), ("mbf_large", (2, 8, 12, 4), 4)])
def test_mbf_has_the_keys_of_insightface(name: str, units: tuple[int, int, int, int], scale: int) -> None:
    """Scales and units of `get_mbf` and `get_mbf_large`."""
    assert shapes_of(name, 512, 112) == mbf_shapes(units, scale, 512)


def original_shapes(embedding_size: int, kernel: tuple[int, int], bias: bool) -> Shapes:
    """What Xiaoccer's checkpoint holds; the paper's table 1 in its names."""
    shapes: Shapes = {}

    def conv(name: str, outputs: int, inputs: int, kernel: tuple[int, int], prelu: bool = True) -> None:
        nonlocal shapes
        shapes |= {f"{name}.conv.weight": (outputs, inputs, *kernel), **norm(f"{name}.bn", outputs)}
        if prelu:
            shapes[f"{name}.prelu.weight"] = (outputs,)

    conv("conv1", 64, 3, (3, 3))
    conv("dw_conv1", 64, 1, (3, 3))
    table = [(2, 64, 5), (4, 128, 1), (2, 128, 6), (4, 128, 1), (2, 128, 2)]
    inputs, block = 64, 0
    for expansion, outputs, count in table:
        for _ in range(count):
            width, name = expansion * inputs, f"blocks.{block}.conv"
            shapes |= {f"{name}.0.weight": (width, inputs, 1, 1), **norm(f"{name}.1", width)}
            shapes |= {f"{name}.2.weight": (width,), f"{name}.3.weight": (width, 1, 3, 3), **norm(f"{name}.4", width)}
            shapes |= {f"{name}.5.weight": (width,), f"{name}.6.weight": (outputs, width, 1, 1)}
            shapes |= norm(f"{name}.7", outputs)
            inputs, block = outputs, block + 1
    conv("conv2", 512, 128, (1, 1))
    conv("linear7", 512, 1, kernel, prelu=False)
    conv("linear1", embedding_size, 512, (1, 1), prelu=False)
    return {**shapes, **({"linear1.conv.bias": (embedding_size,)} if bias else {})}


def test_the_original_mobilefacenet_is_that_of_its_paper() -> None:
    """Table 1 of the paper; the two ports differ at the last layers only."""
    assert shapes_of("mobilefacenet", 128, 112) == original_shapes(128, (7, 7), bias=False)
    assert shapes_of("mobilefacenet_y1", 128, 112) == original_shapes(128, (7, 7), bias=True)
    assert shapes_of("mobilefacenet_xiaoccer", 128, 112) == original_shapes(128, (7, 6), bias=False)
    assert shapes_of("mobilefacenet_xiaoccer", 128, (112, 96)) == original_shapes(128, (7, 6), bias=False)


# --- transformers -----------------------------------------------------------------------------------------------------


def vit_shapes(width: int, depth: int, embedding_size: int, tokens: int) -> Shapes:
    """What insightface's checkpoints of its transformers hold."""
    shapes: Shapes = {"pos_embed": (1, tokens, width), "mask_token": (1, 1, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 9, 9), "patch_embed.proj.bias": (width,)}
    for i in range(depth):
        block = f"blocks.{i}"
        shapes |= {**layer_norm(f"{block}.norm1", width), **layer_norm(f"{block}.norm2", width)}
        shapes |= linear(f"{block}.attn.qkv", width, 3 * width, bias=False)
        shapes |= {**linear(f"{block}.attn.proj", width, width), **linear(f"{block}.mlp.fc1", width, 4 * width)}
        shapes |= linear(f"{block}.mlp.fc2", 4 * width, width)
    shapes |= {**layer_norm("norm", width), **linear("feature.0", width * tokens, width, bias=False)}
    shapes |= {**norm("feature.1", width), **linear("feature.2", width, embedding_size, bias=False)}
    return {**shapes, **norm("feature.3", embedding_size)}


@pytest.mark.parametrize(
    ("names", "width", "depth"),
    [
        (("vit_t", "vit_t_dp005_mask0"), 256, 12),
        (("vit_s", "vit_s_dp005_mask_0"), 512, 12),
        (("vit_b", "vit_b_dp005_mask_005"), 512, 24),
        (("vit_l", "vit_l_dp005_mask_005"), 768, 24),
        (("vit_h",), 1024, 48),
    ],
)
def test_vit_has_the_keys_of_insightface(names: tuple[str, ...], width: int, depth: int) -> None:
    """The token of masked patches is in checkpoints of networks that mask none, too."""
    for name in names:
        assert shapes_of(name, 512, 112) == vit_shapes(width, depth, 512, 144)
    assert shapes_of(names[0], 128, (112, 96)) == vit_shapes(width, depth, 128, 120)


# --- EdgeFace ---------------------------------------------------------------------------------------------------------


def edgeface_shapes(
    widths: tuple[int, ...], depths: tuple[int, ...], heads: int, gamma: float | None, embedding_size: int
) -> Shapes:
    """What the checkpoints of otroshi/edgeface hold: EdgeNeXt of timm under `model.`, its linear layers of low rank."""
    shapes: Shapes = {}

    def dense(name: str, inputs: int, outputs: int) -> Shapes:
        if gamma is None:
            return linear(name, inputs, outputs)
        rank = int(min(inputs, outputs) * gamma)
        return {**linear(f"{name}.linear1", inputs, rank, bias=False), **linear(f"{name}.linear2", rank, outputs)}

    def conv(name: str, outputs: int, inputs: int, kernel: int) -> Shapes:
        return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}

    shapes |= {**conv("model.stem.0", widths[0], 3, 4), **layer_norm("model.stem.1", widths[0])}
    for stage, (width, depth, kernel, splits) in enumerate(
        zip(widths, depths, (3, 5, 7, 9), (2, 2, 3, 4), strict=True)
    ):
        if stage:
            shapes |= layer_norm(f"model.stages.{stage}.downsample.0", widths[stage - 1])
            shapes |= conv(f"model.stages.{stage}.downsample.1", width, widths[stage - 1], 2)
        for i in range(depth):
            block = f"model.stages.{stage}.blocks.{i}"
            shapes |= {f"{block}.gamma": (width,), **layer_norm(f"{block}.norm", width)}
            shapes |= {**dense(f"{block}.mlp.fc1", width, 4 * width), **dense(f"{block}.mlp.fc2", 4 * width, width)}
            if stage == 0 or i < depth - 1:
                shapes |= conv(f"{block}.conv_dw", width, 1, kernel)
                continue
            part = -(-width // splits)
            for split in range(splits - 1):
                shapes |= conv(f"{block}.convs.{split}", part, 1, 3)
            if stage == 1:
                shapes |= conv(f"{block}.pos_embd.token_projection", width, 64, 1)
            shapes |= {**layer_norm(f"{block}.norm_xca", width), f"{block}.gamma_xca": (width,)}
            shapes |= {f"{block}.xca.temperature": (heads, 1, 1), **dense(f"{block}.xca.qkv", width, 3 * width)}
            shapes |= dense(f"{block}.xca.proj", width, width)
    return {**shapes, **layer_norm("model.head.norm", widths[-1]), **dense("model.head.fc", widths[-1], embedding_size)}


@pytest.mark.parametrize(
    ("name", "widths", "depths", "heads", "gamma"),
    [
        ("edgeface_xxs", (24, 48, 88, 168), (2, 2, 6, 2), 4, None),
        ("edgeface_xs_gamma_06", (32, 64, 100, 192), (3, 3, 9, 3), 4, 0.6),
        ("edgeface_s_gamma_05", (48, 96, 160, 304), (3, 3, 9, 3), 8, 0.5),
        ("edgeface_base", (80, 160, 288, 584), (3, 3, 9, 3), 8, None),
    ],
)
def test_edgeface_has_the_keys_of_its_checkpoints(
    name: str, widths: tuple[int, ...], depths: tuple[int, ...], heads: int, gamma: float | None
) -> None:
    """Ranks, attention at the end of three stages, positions in the second alone."""
    assert shapes_of(name, 512, 112) == edgeface_shapes(widths, depths, heads, gamma, 512)
