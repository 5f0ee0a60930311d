"""Weights from files: those of this project's runs, and those that others trained, under their names."""

from models.weights.load import Loaded, create_with_weights, load_network, load_weights
from models.weights.reading import model_file

__all__ = ["Loaded", "create_with_weights", "load_network", "load_weights", "model_file"]
