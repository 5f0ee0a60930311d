"""Networks, losses, heads, and what turns faces into embeddings.

from models import load_embedder
load_embedder("runs/NAME").embed(images)
"""

from typing import TYPE_CHECKING, Any

from models.backbones import NETWORKS, create_network

if TYPE_CHECKING:
    from models.embedders import Embedder, load_embedder

__all__ = ["NETWORKS", "Embedder", "create_network", "load_embedder"]


def __getattr__(name: str) -> Any:
    """Embedders when they are first asked for: training does without what they need."""
    if name in ("Embedder", "load_embedder"):
        import models.embedders

        return getattr(models.embedders, name)
    raise AttributeError(f"module 'models' has no attribute {name!r}")
