"""Makes the reference libraries importable."""

import pytest

from ldm.models.text import import_open_clip


@pytest.fixture(autouse=True, scope="session")
def importable_references() -> None:
    """diffusers, transformers and peft import torchvision, which needs our help beside a CPU build of torch."""
    import_open_clip()
