"""The plain head: all class centres on one device, all logits in memory, gradients by autograd."""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.heads.interface import Head, HeadOutput, mean_loss, silence_broken
from models.heads.row_optimizers import RowOptimizer
from models.losses import MarginLoss


class DenseHead(Head):
    """The reference that the other heads are tested against."""

    def __init__(
        self,
        loss: MarginLoss,
        classes: int,
        embedding_size: int,
        optimizer: RowOptimizer,
        sub_centers: int = 1,
        seed: int = 0,
        centres: Tensor | None = None,
    ) -> None:
        super().__init__(loss, classes, range(classes), embedding_size, optimizer, sub_centers, seed, centres)

    def forward(self, embeddings: Tensor, labels: Tensor, step: int) -> HeadOutput:
        # Cosines decide at the third digit once multiplied by s = 64: float32 throughout.
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings, labels, finite = silence_broken(embeddings.to(self.weight.dtype), labels, self.classes)
            norm = torch.linalg.vector_norm(embeddings, dim=1)
            counted, column = labels >= 0, labels.clamp_min(0)[:, None]
            centres = F.normalize(self.weight) if self.loss.unit_centres else self.weight
            products = F.normalize(embeddings) @ centres.T
            if self.sub_centers > 1:
                products = products.unflatten(1, (-1, self.sub_centers)).max(2).values
            own = products.gather(1, column)[:, 0]
            targets = self.loss.targets(own, norm, counted, step)
            others, _ = self.loss.others(products, targets.bar)
            logits = (targets.scale.reshape(-1, 1) * others).scatter(1, column, -torch.inf)
            best = products.detach().scatter(1, column, -torch.inf).amax(1)
            return mean_loss(targets, logits.logsumexp(1), own, best, counted, finite)

    @torch.no_grad()
    def update(self, step: int) -> None:
        gradient, self.weight.grad = self.weight.grad, None
        if gradient is not None:
            self.optimizer.step(self.weight, self.optimizer_states(), gradient, self.optimizer_factors(step))
