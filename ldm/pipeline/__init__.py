"""From prompts to pictures: one request, one pipeline, one loop that belongs to the caller."""

from ldm.pipeline.companions import Companions
from ldm.pipeline.given import Given, outpaint
from ldm.pipeline.pipeline import Pipeline
from ldm.pipeline.request import Control, Request, Steering, Upscale, Variation, pairs

__all__ = [
    "Companions",
    "Control",
    "Given",
    "Pipeline",
    "Request",
    "Steering",
    "Upscale",
    "Variation",
    "outpaint",
    "pairs",
]
