"""A small trained language model that travels with the library.

The model is a LLaMA of under a million weights that writes children's stories about a made-up
world. It is small enough to prune in seconds on a CPU, yet trained, so that the perplexities
measured on it mean something. ``stories`` writes the text, ``train`` makes the checkpoint.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["model_path"]


def model_path() -> Path:
    """Return the folder that holds the embedded checkpoint and its tokenizer."""
    return Path(__file__).parent / "model"
