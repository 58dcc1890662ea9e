"""From prompts to pictures: one request, one pipeline, one loop that belongs to the caller."""

from ldm.pipeline.control import Companions
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Given, Request, Steering, pairs

__all__ = ["Companions", "Given", "Pipeline", "Request", "Steering", "pairs"]
