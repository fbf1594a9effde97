"""The embedded model, and the demo that hides needles in the user's own Python source."""

from pathlib import Path

MODEL_DIRECTORY = Path(__file__).parent / "model"
"""A 7.7M-parameter Llama trained to find needles; see its README.md for what it is and is not."""
