"""That networks compute what the originals compute: plain walks over their state dicts, peers, and real weights."""

import json
import math
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.images import decode_rgb
from models import create_network
from models.backbones.edgeface import LowRank
from models.backbones.ir import IRNet, Layout
from models.backbones.mobilefacenet_original import OriginalMobileFaceNet
from models.backbones.stochastic_depth import DropPath, rising
from models.backbones.vit import VisionTransformer

State = dict[str, Tensor]


def randomise(network: nn.Module) -> State:
    """Random norms, slopes and scales, and matrices large enough to matter, so that no part of the state dict and no
    function could be left out unseen; returns the state dict."""
    torch.manual_seed(0)
    with torch.no_grad():
        for value in network.parameters():
            if value.numel() == max(value.shape):
                value.uniform_(0.2, 0.8)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                module.running_mean.uniform_(-0.5, 0.5)
                module.running_var.uniform_(0.5, 2)
            elif isinstance(module, nn.Linear):
                module.weight.normal_(0, 3 / math.sqrt(module.in_features))
    network.eval()
    return network.state_dict()


def faces(size: int | tuple[int, int] = 32, number: int = 2) -> Tensor:
    shape = (size, size) if isinstance(size, int) else size
    return torch.rand(number, 3, *shape, generator=torch.Generator().manual_seed(1)) * 2 - 1


def batch_norm(state: State, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    return F.batch_norm(x, mean, var, state.get(f"{name}.weight"), state.get(f"{name}.bias"), eps=eps)


# --- IR ---------------------------------------------------------------------------------------------------------------


def excite(state: State, name: str, x: Tensor) -> Tensor:
    means = x.mean((2, 3), keepdim=True)
    hidden = F.relu(F.conv2d(means, state[f"{name}.fc1.weight"]))
    return x * torch.sigmoid(F.conv2d(hidden, state[f"{name}.fc2.weight"]))


@pytest.mark.parametrize("excitation", [False, True])
@pytest.mark.parametrize("layout", ["tface", "evolve"])
def test_ir_computes_what_its_originals_compute(layout: Layout, excitation: bool) -> None:
    """Where norms, strides, slopes and shortcuts are: a shortcut of the same width is every second pixel."""
    network = IRNet(18, 16, 32, layout=layout, excitation=excitation)
    state = randomise(network)
    x = F.conv2d(faces(), state["input_layer.0.weight"], padding=1)
    x = F.prelu(batch_norm(state, "input_layer.1", x), state["input_layer.2.weight"])
    for unit in range(8):
        body, stride = f"body.{unit}.res_layer", 2 if unit % 2 == 0 else 1
        y = F.conv2d(batch_norm(state, f"{body}.0", x), state[f"{body}.1.weight"], padding=1)
        if layout == "tface":
            y = F.prelu(batch_norm(state, f"{body}.2", y), state[f"{body}.3.weight"])
            y = F.conv2d(y, state[f"{body}.4.weight"], stride=stride, padding=1)
            y = batch_norm(state, f"{body}.5", y)
        else:
            y = F.conv2d(F.prelu(y, state[f"{body}.2.weight"]), state[f"{body}.3.weight"], stride=stride, padding=1)
            y = batch_norm(state, f"{body}.4", y)
        if excitation:
            y = excite(state, f"{body}.se_block" if layout == "tface" else f"{body}.5", y)
        x = x[:, :, ::stride, ::stride]
        if unit in (2, 4, 6):
            x = F.conv2d(x, state[f"body.{unit}.shortcut_layer.0.weight"])
            x = batch_norm(state, f"body.{unit}.shortcut_layer.1", x)
        x = x + y
    x = F.linear(
        batch_norm(state, "output_layer.0", x).flatten(1), state["output_layer.3.weight"], state["output_layer.3.bias"]
    )
    expected = batch_norm(state, "output_layer.4", x)
    with torch.no_grad():
        torch.testing.assert_close(network(faces()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("layout", "published"), [("tface", 0.4), ("evolve", 0.5)])
def test_ir_drops_out_as_published(layout: Layout, published: float) -> None:
    """The part of what the last linear layer sees that is 0 in training, scaled up; nothing in testing."""
    network = IRNet(18, 8, 32, layout=layout)
    seen: list[Tensor] = []
    network.output_layer[3].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    torch.manual_seed(0)
    network(faces(number=4))
    network.eval()(faces(number=4))
    assert (seen[0] == 0).float().mean().item() == pytest.approx(published, abs=0.03)
    assert (seen[1] == 0).float().mean().item() < 0.01


# --- MobileFaceNet ----------------------------------------------------------------------------------------------------


def test_the_original_mobilefacenet_walks_its_paper() -> None:
    """Strides, groups, which units add their input, no slope after projections, from the table of the paper."""
    network = OriginalMobileFaceNet(16, 32)
    state = randomise(network)

    def conv(name: str, x: Tensor, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
        x = F.conv2d(x, state[f"{name}.conv.weight"], stride=stride, padding=padding, groups=groups)
        x = batch_norm(state, f"{name}.bn", x)
        slope = state.get(f"{name}.prelu.weight")
        return x if slope is None else F.prelu(x, slope)

    x = conv("dw_conv1", conv("conv1", faces(), 2, 1), 1, 1, 64)
    first, after_wider = {0: 2, 5: 2, 12: 2}, {0, 5, 12}
    for block in range(15):
        name, y = f"blocks.{block}.conv", x
        y = F.prelu(batch_norm(state, f"{name}.1", F.conv2d(y, state[f"{name}.0.weight"])), state[f"{name}.2.weight"])
        y = F.conv2d(y, state[f"{name}.3.weight"], stride=first.get(block, 1), padding=1, groups=y.shape[1])
        y = F.prelu(batch_norm(state, f"{name}.4", y), state[f"{name}.5.weight"])
        y = batch_norm(state, f"{name}.7", F.conv2d(y, state[f"{name}.6.weight"]))
        x = y if block in after_wider else x + y
    expected = conv("linear1", conv("linear7", conv("conv2", x), groups=512)).flatten(1)
    with torch.no_grad():
        torch.testing.assert_close(network(faces()), expected, rtol=1e-4, atol=1e-4)


def real_faces(face_data: Path, number: int) -> np.ndarray:
    """uint8 [number, 112, 112, 3], RGB: the first images of LFW."""
    files = sorted((face_data / "lfw" / "images").glob("*/*.jpg"))[:number]
    return np.stack([decode_rgb(file.read_bytes(), file) for file in files])


def y1_state(face_data: Path) -> State:
    """mxnet's weights under this project's names, by the order of layers in mxnet's graph."""
    folder = face_data / "models"
    weights = torch.load(folder / "mobilefacenet_y1_mxnetkeys_state_dict.pth", weights_only=True)
    graph = json.loads((folder / "mobilefacenet_y1_mxnet-symbol.json").read_text())["nodes"]
    layers = iter([node["name"] for node in graph if node["op"] in ("Convolution", "BatchNorm", "LeakyReLU")])
    state: State = {}
    for name, module in create_network("mobilefacenet_y1", 128, 112).named_modules():
        if name == "linear1.conv":
            state[f"{name}.weight"] = weights["fc1_weight"][:, :, None, None]
            state[f"{name}.bias"] = weights["pre_fc1_bias"]
        elif isinstance(module, nn.Conv2d):
            state[f"{name}.weight"] = weights[f"{next(layers)}_weight"]
        elif isinstance(module, nn.PReLU):
            state[f"{name}.weight"] = weights[f"{next(layers)}_gamma"]
        elif isinstance(module, nn.BatchNorm2d):
            layer = next(layers)
            state[f"{name}.weight"] = torch.ones_like(module.weight) if layer == "fc1" else weights[f"{layer}_gamma"]
            state[f"{name}.bias"] = weights[f"{layer}_beta"]
            state[f"{name}.running_mean"] = weights[f"{layer}_moving_mean"]
            state[f"{name}.running_var"] = weights[f"{layer}_moving_var"]
            state[f"{name}.num_batches_tracked"] = torch.tensor(0)
    return state


def test_y1_is_the_graph_of_insightface(face_data: Path) -> None:
    """With mxnet's weights: the embeddings of the ONNX file, which normalises inside, on real faces."""
    network = create_network("mobilefacenet_y1", 128, 112).eval()
    network.load_state_dict(y1_state(face_data))
    pixels = real_faces(face_data, 8).transpose(0, 3, 1, 2).astype(np.float32)
    session = onnxruntime.InferenceSession(
        str(face_data / "models" / "mobilefacenet_y1_128d.onnx"), providers=["CPUExecutionProvider"]
    )
    expected = torch.from_numpy(session.run(None, {"data": pixels})[0])
    with torch.no_grad():
        found = network(torch.from_numpy(pixels) / 127.5 - 1)
    assert F.cosine_similarity(found, expected).min() > 0.999999
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_xiaoccer_looks_at_the_middle_columns(face_data: Path) -> None:
    """With its real weights: square faces give what columns 8 to 103 of them give, and people are told apart."""
    file = face_data / "models" / "mobilefacenet_xiaoccer_068.ckpt"
    network = create_network("mobilefacenet_xiaoccer", 128, 112).eval()
    network.load_state_dict(torch.load(file, weights_only=True, map_location="cpu")["net_state_dict"])
    photos = sorted((face_data / "lfw" / "images").glob("*/*_0002.jpg"))[:12]
    pairs = [(photo.with_name(photo.name.replace("_0002", "_0001")), photo) for photo in photos]
    pixels = np.stack([decode_rgb(path.read_bytes(), path) for pair in pairs for path in pair])
    inputs = torch.from_numpy(pixels.transpose(0, 3, 1, 2).astype(np.float32)) / 127.5 - 1
    with torch.no_grad():
        embeddings = network(inputs)
        torch.testing.assert_close(network(inputs[..., 8:104]), embeddings)
    cosines = F.normalize(embeddings) @ F.normalize(embeddings).T
    own = cosines.diagonal(1)[::2]
    people = torch.arange(len(pixels)) // 2
    others = cosines[people[:, None] != people]
    assert own.mean() > 0.5
    assert others.mean().abs() < 0.1


# --- transformers -----------------------------------------------------------------------------------------------------


def test_vit_computes_what_insightface_computes() -> None:
    """A walk in float64 with attention written out: pre-norm, eight heads, no bias of queries, ReLU6, all tokens."""
    network = VisionTransformer(32, 2, 16, (40, 29))
    state = {key: value.double() for key, value in randomise(network).items()}
    x = F.conv2d(faces((40, 29)).double(), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=9)
    assert x.shape[2:] == (4, 3)
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (32,), state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state.get(f"{name}.bias"))

    for i in range(2):
        block = f"blocks.{i}"
        queries, keys, values = linear(f"{block}.attn.qkv", norm(f"{block}.norm1", x)).chunk(3, dim=2)
        heads = []
        for head in range(8):
            of = slice(4 * head, 4 * head + 4)
            weights = (queries[..., of] @ keys[..., of].transpose(1, 2) / math.sqrt(4)).softmax(2)
            heads.append(weights @ values[..., of])
        x = x + linear(f"{block}.attn.proj", torch.cat(heads, 2))
        hidden = linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", x)).clamp(0, 6)
        x = x + linear(f"{block}.mlp.fc2", hidden)
    x = linear("feature.0", norm("norm", x).flatten(1))
    expected = batch_norm(state, "feature.3", linear("feature.2", batch_norm(state, "feature.1", x, 2e-5)), 2e-5)
    with torch.no_grad():
        torch.testing.assert_close(network(faces((40, 29))).double(), expected, rtol=1e-4, atol=1e-4)


def test_masked_patches_are_the_token_at_their_places() -> None:
    """Without blocks every token that the head sees is the patch of its place or the learnt one: of as many patches as
    asked for, others in each face and each step, and of none in testing."""
    torch.manual_seed(0)
    network = VisionTransformer(16, 0, 8, 54, mask_ratio=0.3)
    network.feature = nn.Identity()  # type: ignore[assignment]
    nn.init.uniform_(network.mask_token, -1, 1)
    with torch.no_grad():
        plain = network.eval()(faces(54, 6)).view(6, 36, 16)
        network.train()
        masked = [network(faces(54, 6)).view(6, 36, 16) for _ in range(2)]
    left_out = [(step == network.mask_token).all(2) for step in masked]
    for step, out in zip(masked, left_out, strict=True):
        torch.testing.assert_close(step[~out], plain[~out])
        assert out.sum(1).tolist() == [36 - int(36 * 0.7)] * 6
    assert not (plain == network.mask_token).all(2).any()
    assert not torch.equal(*left_out)
    assert len({tuple(row.tolist()) for row in left_out[0]}) == 6


def test_the_token_rests_where_nothing_is_masked() -> None:
    """It is in the state dict of the checkpoints, but must not be waited for by ranks."""
    assert not VisionTransformer(16, 1, 8, 27, mask_ratio=0.0).mask_token.requires_grad
    assert VisionTransformer(16, 1, 8, 27, mask_ratio=0.3).mask_token.requires_grad


def test_dropped_branches() -> None:
    """Of whole images, as often as asked for, the rest scaled so that the mean stays; not in testing."""
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x = torch.ones(4000, 2, 3)
    found = drop(x)
    assert found.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (found == found[:, :1, :1]).all()
    assert (found[:, 0, 0] == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(drop.eval()(x), x)
    assert rising(0.3, 4) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert rising(0.3, 1) == [0.0]
    with pytest.raises(ValueError, match="from 0 to below 1, got 1"):
        DropPath(1.0)


# --- EdgeFace ---------------------------------------------------------------------------------------------------------


def low_rank(module: nn.Module, gamma: float) -> None:
    """Replace the linear layers in timm's network by products of two, as EdgeFace does."""
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            rank = int(min(child.in_features, child.out_features) * gamma)
            setattr(module, name, LowRank(child.in_features, child.out_features, rank))
        else:
            low_rank(child, gamma)


@pytest.mark.parametrize(
    ("name", "peer", "gamma"),
    [("edgeface_xxs", "edgenext_xx_small", None), ("edgeface_xs_gamma_06", "edgenext_x_small", 0.6)],
)
def test_edgeface_computes_what_timm_computes(name: str, peer: str, gamma: float | None) -> None:
    """EdgeNeXt of timm, which its authors build on, with the same weights."""
    network = create_network(name, 32, (96, 112))
    state = randomise(network)
    reference = timm.create_model(peer, num_classes=32).eval()
    if gamma:
        low_rank(reference, gamma)
    reference.load_state_dict({key.removeprefix("model."): value for key, value in state.items()})
    with torch.no_grad():
        torch.testing.assert_close(network(faces((96, 112))), reference(faces((96, 112))), rtol=1e-5, atol=1e-5)


# --- first weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key", "deviation"),
    [
        ("r18", "layer4.1.conv2.weight", 0.1),
        ("ir18", "body.7.res_layer.4.weight", math.sqrt(2 / (512 * 9))),
        ("ir18", "output_layer.3.weight", math.sqrt(2 / 512)),
        ("evolve_ir50", "body.23.res_layer.3.weight", math.sqrt(2 / (2 * 512 * 9))),
        ("evolve_ir50", "output_layer.3.weight", math.sqrt(2 / (512 * 4 + 512))),
        ("mbf", "features.layers.2.weight", math.sqrt(2 / 512)),
        ("mobilefacenet", "blocks.14.conv.3.weight", math.sqrt(2 / (9 * 256))),
        ("vit_t", "blocks.11.mlp.fc1.weight", 0.02),
        ("vit_t", "feature.0.weight", 0.02),
        # Of a normal that is cut off at two deviations, 0.88 of the deviation is left.
        ("edgeface_xxs", "model.stages.3.blocks.1.mlp.fc1.weight", 0.02 * 0.8796),
        ("edgeface_xs_gamma_06", "model.stages.3.blocks.1.mlp.fc1.linear1.weight", 1 / math.sqrt(3 * 192)),
    ],
)
def test_first_weights_are_the_published_ones(name: str, key: str, deviation: float) -> None:
    """The spread that each original draws its weights with, with no mean."""
    torch.manual_seed(0)
    weight = create_network(name, 512, 32).state_dict()[key]
    assert weight.std().item() == pytest.approx(deviation, rel=0.05)
    assert abs(weight.mean().item()) < 0.1 * deviation
