"""What is computed for one block of classes, by kernels of our own: for margin losses on cards that have the memory on
chip, where it takes half the time of what a compiler makes of `BlockMaths`."""

from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from models.heads.block_steps import BlockMaths, multiply
from models.heads.row_optimizers import RowSGD
from models.losses import MarginLoss
from utils.compiling import Compiled

#: Bytes of shared memory that a block of threads needs at most.
ON_CHIP = 212 * 1024
#: Tiles that a launch has at most in its second direction, in which classes lie.
_MOST_TILES = 2**16 - 1
#: Bytes of a matrix that the copy engine is told of at most: Triton 3.8 counts them in an int, to tell small ones.
_MOST_BYTES = 2**31 - 1


class Tile(NamedTuple):
    """What a block of threads computes at a time: `rows` x `columns`, summed over `depth` at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    def for_rows(self, number: int) -> "Tile":
        """The same, or with fewer rows where that is enough for `number` of them."""
        rows = self.rows
        while rows > 64 and rows // 2 >= number:
            rows //= 2
        return self._replace(rows=rows)


class Tiles(NamedTuple):
    """Of the three kernels: faces x classes, faces x classes, classes x dimensions."""

    forward: Tile = Tile(256, 128, 64, 8, 3)
    backward: Tile = Tile(256, 128, 64, 8, 3)
    update: Tile = Tile(64, 128, 64, 4, 3)


class ProductsGradient(NamedTuple):
    """The gradient of a block's centres before it is computed: that of the products, `d_products` [B, n], times `unit`
    [B, D], less `along` [n] times the centres."""

    d_products: Tensor
    unit: Tensor
    along: Tensor

    def tensor(self) -> Tensor:
        """As `BlockMaths.backward` gives it: [n, D]."""
        return multiply(self.d_products.T, self.unit)


class FusedMaths(BlockMaths):
    """BlockMaths by the kernels. Its `raw` gradients are ProductsGradients."""

    tiles: ClassVar[Tiles] = Tiles()

    @classmethod
    def of(cls, maths: BlockMaths) -> "FusedMaths":
        """The same by the kernels."""
        return cls(maths.loss, maths.sub_centers, maths.matmul, maths.optimizer)

    @classmethod
    def most_classes(cls, embedding_size: int, faces: int) -> tuple[int, int]:
        """Of a block, forward and backward, for `faces` faces."""
        centres = _MOST_BYTES // (4 * embedding_size)
        products = _MOST_BYTES // (2 * faces) // 16 * 16  # backward they are in memory, rows of a multiple of 16
        return centres, min(centres, products, _MOST_TILES * min(cls.tiles.backward.columns, cls.tiles.update.rows))

    def attempt(self, faces: int, weight: Tensor) -> None:
        """Run all of it once, for `faces` faces and a few centres as those of `weight`; raises what a compiler does."""
        n, size = 2 * max(self.tiles.backward.columns, self.tiles.update.rows) - 1, weight.shape[1]
        unit = self.rounded(weight.new_ones(faces, size))
        centres, states = weight.new_ones(n, size), [weight.new_zeros(n, size) for _ in self.optimizer.states]
        place, zeros = torch.zeros(faces, dtype=torch.int64, device=weight.device), weight.new_zeros(faces)
        given = unit, centres, place, place[0], weight.new_ones(1, 1), None
        total, best = self.forward(*given, zeros, zeros)
        gradient, _, _ = self.backward(*given, total, best, zeros, weight.new_zeros(faces, size), None)
        if isinstance(self.optimizer, RowSGD):  # others have no kernel to try
            self.update(gradient, centres, states, [zeros[0] for _ in self.optimizer.factors(0.1, 1)])
        if weight.is_cuda:
            torch.cuda.synchronize(weight.device)

    def forward(
        self,
        unit: Tensor,
        centres: Tensor,
        place: Tensor,
        start: Tensor,
        scale: Tensor,
        bar: Tensor | None,
        total: Tensor,
        best: Tensor,
    ) -> tuple[Tensor, Tensor]:
        from models.heads.kernels import log_sum_exp

        (faces, size), n, tile = unit.shape, len(centres), self.tiles.forward.for_rows(len(unit))
        rows, columns = -(-faces // tile.rows), -(-n // tile.columns)
        parts = min(columns, max(1, _processors(unit.device) // rows))
        filtered = self.loss.filter_above > 0
        sums, bests, *others = unit.new_empty((3 if filtered else 2, parts, faces), dtype=torch.float32)
        tops = others[0] if filtered else bests
        log_sum_exp[rows, parts](
            _tiled(unit, tile.rows, tile.depth), _tiled(centres, tile.columns, tile.depth), place, start, scale, sums,
            bests, tops, n, faces, -(-columns // parts), self.loss.filter_above, D=size, **self._options(scale, tile),
        )  # fmt: skip
        # Without a class: -inf. What is not a number stays that, so that a run sees its loss explode.
        logs = torch.where(sums == 0, -torch.inf, tops * scale.flatten() + sums.log()).logsumexp(0)
        return torch.logaddexp(total, logs), torch.maximum(best, bests.amax(0))

    def backward(
        self,
        unit: Tensor,
        centres: Tensor,
        place: Tensor,
        start: Tensor,
        scale: Tensor,
        bar: Tensor | None,
        log_others: Tensor,
        d_own: Tensor,
        d_others: Tensor,
        d_unit: Tensor,
        d_scale: Tensor | None,
    ) -> tuple[ProductsGradient, Tensor, Tensor | None]:
        from models.heads.kernels import gradients_of_products

        (faces, size), n, tile = unit.shape, len(centres), self.tiles.backward.for_rows(len(unit))
        rows, columns = -(-faces // tile.rows), -(-n // tile.columns)
        d_products = unit.new_empty(faces, -(-n // 16) * 16)[:, :n]  # rows begin where the copy engine can
        factors, along = unit.new_empty(n, size), unit.new_empty(rows, n, dtype=torch.float32)
        by_tile = along if d_scale is None else unit.new_empty(columns, faces, dtype=torch.float32)
        gradients_of_products[rows, columns](
            _tiled(unit, tile.rows, tile.depth), _tiled(centres, tile.columns, tile.depth), place, start, scale,
            log_others, d_own, d_others, _tiled(d_products, tile.rows, tile.columns),
            _tiled(factors, tile.columns, tile.depth), along, by_tile, n, faces, self.loss.filter_above,
            LEARNS=d_scale is not None, D=size, **self._options(scale, tile),
        )  # fmt: skip
        if d_scale is not None:
            d_scale = d_scale + by_tile.sum(0)
        return ProductsGradient(d_products, unit, along), d_unit + multiply(d_products, factors), d_scale

    def gradient(self, raw: ProductsGradient, centres: Tensor) -> Tensor:
        return raw.tensor().addcmul_(centres, raw.along.sum(0)[:, None], value=-1)

    def update(self, raw: ProductsGradient, centres: Tensor, states: list[Tensor], factors: list[Tensor]) -> None:
        if not isinstance(self.optimizer, RowSGD):
            self._plain_update(raw.tensor(), centres, states, factors)
            return
        from models.heads.kernels import sgd_step

        (d_products, unit, along), (n, size), tile = raw, centres.shape, self.tiles.update
        sgd_step[-(-size // tile.columns), -(-n // tile.rows)](
            _tiled(d_products, tile.depth, tile.rows), _tiled(unit, tile.depth, tile.columns), along,
            _tiled(centres, tile.rows, tile.columns), _tiled(states[0], tile.rows, tile.columns), factors[0], n,
            len(unit), len(along), self.optimizer.weight_decay, self.optimizer.momentum, D=size, K=tile.depth,
            CLASSES=tile.rows, WIDTH=tile.columns, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        # As torch's own operations do: whoever asks has to see that they were written to.
        torch.autograd.graph.increment_version((centres, states[0]))

    @cached_property
    def _plain_update(self) -> Compiled:
        """BlockMaths's, for optimizers without a kernel."""
        plain = BlockMaths(self.loss, self.sub_centers, self.matmul, self.optimizer)
        return Compiled(plain.update, in_place=True)

    def _options(self, scale: Tensor, tile: Tile) -> dict[str, Any]:
        return {
            "SCALE_STRIDE": int(scale.numel() > 1),
            "FILTER": self.loss.filter_above > 0,
            "FACES": tile.rows,
            "CLASSES": tile.columns,
            "K": tile.depth,
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }


def can_fuse(maths: BlockMaths, embedding_size: int, device: torch.device) -> bool:
    """Whether the kernels compute what `maths` does, and are made for `device`."""
    known = maths.loss.unit_centres and type(maths.loss).modulate is MarginLoss.modulate
    if not known or maths.sub_centers > 1 or maths.matmul not in (torch.bfloat16, torch.float16):
        return False
    if device.type != "cuda" or embedding_size % 16:
        return False
    properties = torch.cuda.get_device_properties(device)
    return properties.major >= 9 and getattr(properties, "shared_memory_per_block_optin", 0) >= ON_CHIP


def _tiled(matrix: Tensor, rows: int, columns: int) -> Any:
    """`matrix` as the copy engine takes it, in tiles."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), [rows, columns])


def _processors(device: torch.device) -> int:
    """How many blocks of threads run at a time."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
