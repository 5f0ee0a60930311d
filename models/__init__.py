"""Networks, losses, heads, and what turns faces into embeddings."""

from models.backbones import NETWORKS, create_network

__all__ = ["NETWORKS", "create_network"]
