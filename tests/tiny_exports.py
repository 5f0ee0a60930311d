"""Exports as tests make them, by the script."""

from pathlib import Path
from typing import Any

from config import Config
from utils import export as script
from utils.settings import build

FLAGS = ["--workers", "0"]


def run(run_folder: Path, output: Path, *flags: str) -> Path:
    """Run the script; the file that it wrote."""
    script.main([str(run_folder), "--output", str(output), *FLAGS, *flags])
    return output


def options(**settings: Any) -> Any:
    """ExportConfig with these settings."""
    return build(Config, {f"export.{name}": value for name, value in settings.items()}).export
