"""Faces to embeddings, whatever the model was trained with: runs, weights of others, ONNX and TorchScript files."""

from models.embedders.interface import Embedder, FaceEmbedder
from models.embedders.load import load_embedder
from models.embedders.network import NetworkEmbedder
from models.embedders.onnx_file import OnnxEmbedder
from models.embedders.torchscript import TorchScriptEmbedder
from models.inputs import InputSpec

__all__ = [
    "Embedder",
    "FaceEmbedder",
    "InputSpec",
    "NetworkEmbedder",
    "OnnxEmbedder",
    "TorchScriptEmbedder",
    "load_embedder",
]
