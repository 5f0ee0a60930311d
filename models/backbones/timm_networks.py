"""Any network of timm (PyTorch Image Models), its classifier giving the embedding. Needs the package timm."""

import difflib
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.backbones.precision import full_precision_of
from models.backbones.sizes import ImageSize, height_and_width

# Names under which timm's networks hold their blocks, one after the other.
_STACK = re.compile(r"(blocks|layers?\d*|stages?\d*)$")


def timm_builder(name: str) -> Callable[..., nn.Module]:
    """The builder of timm's network `name`: `convnextv2_tiny`, or with the tag of its weights, `convnextv2_tiny.fcmae`.

    Raises ValueError when timm is not installed or knows no such network.
    """
    timm = _timm(name)
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=5)
        guess = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() has all"
        raise ValueError(f"model.network: timm {timm.__version__} has no network {name!r}; {guess}")
    return partial(TimmNetwork, name)


def _timm(name: str) -> Any:
    try:
        import timm
    except ImportError as error:
        raise ValueError(f"model.network: timm:{name} needs the package timm: pip install timm ({error})") from None
    return timm


class TimmNetwork(nn.Module):
    """Faces to embeddings: float [B, 3, height, width], RGB in [-1, 1], to [B, embedding_size].

    The faces are normalised anew with the mean and deviation that timm has for the network's weights. `pretrained`:
    begin with these weights, which timm downloads. `drop_path`, `dropout`: timm's `drop_path_rate`, `drop_rate`.
    Raises ValueError for a size, an option or weights that the network does not have.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        embedding_size: int = 512,
        image_size: ImageSize = 112,
        *,
        pretrained: bool = False,
        drop_path: float | None = None,
        dropout: float | None = None,
    ) -> None:
        super().__init__()
        size = height_and_width(image_size)
        options = {"drop_path_rate": drop_path, "drop_rate": dropout}
        given = {option: value for option, value in options.items() if value is not None}
        self.model = _create(name, embedding_size, size, bool(pretrained), given)
        settings = self.model.pretrained_cfg
        for buffer in ("mean", "std"):
            values = torch.tensor(settings[buffer]).view(1, 3, 1, 1)
            self.register_buffer(buffer, values, persistent=False)
        _mark_blocks(self.model)
        self._try(name, embedding_size, size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.model.forward_features(((x + 1) / 2 - self.mean) / self.std)
        several = isinstance(x, list | tuple)  # of networks with several scales
        with full_precision_of(x[0] if several else x):
            return self.model.forward_head([part.float() for part in x] if several else x.float())

    def _try(self, name: str, embedding_size: int, size: tuple[int, int]) -> None:
        """Raise ValueError unless a face of `size` gives an embedding."""
        self.eval()
        try:
            with torch.no_grad():
                shape = tuple(self(torch.zeros(1, 3, *size, device=self.mean.device)).shape)
        except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"timm:{name} cannot take faces of {size[0]}x{size[1]} pixels: {error}") from None
        finally:
            self.train()
        if shape != (1, embedding_size):
            raise ValueError(f"timm:{name} gives {list(shape)} for one face, expected [1, {embedding_size}]")


def _create(name: str, embedding_size: int, size: tuple[int, int], pretrained: bool, options: dict[str, float]) -> Any:
    timm = _timm(name)
    try:
        try:
            # Transformers need to know the size; convolutional networks do not know the argument.
            return timm.create_model(name, pretrained, num_classes=embedding_size, img_size=size, **options)
        except TypeError as error:
            if "img_size" not in str(error):
                raise
        return timm.create_model(name, pretrained, num_classes=embedding_size, **options)
    except TypeError as error:
        raise ValueError(f"timm:{name} does not know one of the options {', '.join(options)}: {error}") from None
    except (AssertionError, RuntimeError, OSError) as error:
        weights = "with its weights " if pretrained else ""
        raise ValueError(f"timm:{name} cannot be made {weights}for {size[0]}x{size[1]} pixels: {error}") from None


def _mark_blocks(model: nn.Module) -> None:
    """Mark the innermost stacked blocks as recomputable (models/recompute.py)."""
    stacks = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList) and _STACK.match(path.rpartition(".")[2])
    }
    for path, stack in stacks.items():
        if not any(other.startswith(f"{path}.") for other in stacks):
            for block in stack:
                block.recomputable = True  # type: ignore[assignment]
