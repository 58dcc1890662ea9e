"""`ldm data`: from pictures with captions to verified shards, and everything that is done with shards."""

from ldm.cli.data import build, change, condition, encode, look
from ldm.cli.data.common import app

__all__ = ["app", "build", "change", "condition", "encode", "look"]
