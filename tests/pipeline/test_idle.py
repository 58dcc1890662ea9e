"""What a request asks for in vain: options that do nothing at guidance 1 are named in one line."""

import logging
from dataclasses import replace

import pytest
import torch

from ldm.pipeline import Given, Steering
from tests.pipeline.small import PICTURE, request, small
from tests.pipeline.test_aesthetic import telling

IDLE = {
    "the negative prompt": {"negative": "fog"},
    "rescale": {"steering": Steering(rescale=0.7)},
    "interval": {"steering": Steering(interval=(100.0, 800.0))},
    "parallel, momentum, norm": {"steering": Steering(parallel=0.0, momentum=-0.5, norm=15.0)},
}


@pytest.mark.parametrize("names", IDLE)
def test_what_does_nothing_at_guidance_1_is_said_once(names, caplog):
    """And it does nothing: the picture is the same without it, and another one at another guidance."""
    pipeline = small()
    plain, guided = pipeline(request(guidance=1.0)), pipeline(request(guidance=3.0))
    assert not caplog.records
    drawn = pipeline(request(guidance=1.0, batch=1, **IDLE[names]))
    assert [record.getMessage() for record in caplog.records] == [f"at guidance 1 these have no effect: {names}"]
    assert caplog.records[0].levelno == logging.WARNING
    assert (drawn - plain).abs().max() < 1e-3
    caplog.clear()
    assert (pipeline(request(guidance=3.0, **IDLE[names])) - guided).abs().max() > 1e-3 and not caplog.records


def test_what_does_nothing_is_said_once_for_all_that_is_drawn(caplog):
    """Of a grid not for every cell; and again for other options."""
    pipeline = small()
    for asked in (request(guidance=1.0, negative=negative, steps=1) for negative in ("fog", "rain", "fog")):
        pipeline(asked)
    assert caplog.messages == ["at guidance 1 these have no effect: the negative prompt"]
    pipeline(request(guidance=1.0, negative="fog", steps=1, steering=Steering(rescale=0.7)))
    assert caplog.messages[1:] == ["at guidance 1 these have no effect: the negative prompt, rescale"]


def test_the_score_of_a_negative_that_is_not_heard(caplog):
    pipeline, _ = telling()
    drawn = [pipeline(request(guidance=1.0, aesthetic=(6.0, score))) for score in (2.5, 1.0)]
    assert torch.equal(*drawn)
    assert caplog.messages == ["at guidance 1 these have no effect: the negative's aesthetic score"]


@pytest.mark.parametrize(
    ("kind", "change", "other"),
    [
        ("plain", {"prompts": ("a cat :0.5",) * 3, "negative": "fog"}, {"negative": ""}),
        ("plain", {"steering": Steering(perturb="mid", rescale=0.7)}, {"steering": Steering(perturb="mid")}),
        (
            "plain",
            {"steering": Steering(perturb="mid", interval=(400.0, 600.0))},
            {"steering": Steering(perturb="mid")},
        ),
        ("plain", {"sampler": "ddim cfg++", "negative": "fog"}, {"negative": ""}),
        ("editing", {"given": Given(PICTURE), "negative": "fog"}, {"negative": ""}),
    ],
)
def test_what_does_something_at_guidance_1_is_not_said_to_do_nothing(kind, change, other, caplog):
    pipeline, asked = small(kind), request(guidance=1.0, **change)
    assert (pipeline(asked) - pipeline(replace(asked, **other))).abs().max() > 1e-3
    assert not caplog.records
