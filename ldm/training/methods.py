"""How a model can be fine-tuned: the methods, and what each is told."""

from dataclasses import dataclass, field
from typing import Any

import torch

from ldm.adapters.lora import AdapterConfig
from ldm.names import known
from ldm.training.denoising import LatentTaskConfig
from ldm.training.quantize import FORMS

METHODS = ("full", "adapter", "textual_inversion", "controlnet", "t2i_adapter", "inpainting", "instruct")
CONTROLS = ("controlnet", "t2i_adapter")
PARTIAL = ("adapter", "textual_inversion", *CONTROLS)
"""Methods whose checkpoints hold what was added to the base, and not the base."""
PREDICTION, PICTURE = "prediction", "picture"
PRIORS = (PREDICTION, PICTURE)
HELD = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class FinetuningTaskConfig(LatentTaskConfig):
    """What is tuned, how, and on what it stands."""

    kind: str = "finetuning"
    model: str = "???"  # the base: a model or a run folder of any format
    method: str = "???"  # full | adapter | textual_inversion | controlnet | t2i_adapter | inpainting | instruct
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    quantize: str = ""  # adapter: its base's linear layers in nf4 (QLoRA) or int8; needs bitsandbytes; "" as they are
    held: str = "float32"  # what the frozen base's weights are kept in; or bf16, fp16 where precision is that
    train_text: bool = False  # full: the text encoder learns too
    word: str = ""  # textual_inversion; with full and adapter if wanted: the word that is taught
    vectors: int = 1  # tokens that the word stands for
    initial: str = "*"  # words whose tokens it starts from: again and again where they are fewer, means where more
    prior: str = "picture"  # what the samples that data.prior marks teach: picture, as any | prediction, the base's own
    prior_weight: float = 1.0  # how much such a sample counts (Ruiz et al. 2023, eq. 2: lambda)
    diffusion: dict[str, Any] = field(default_factory=dict)  # what of the base's noise is another in this training
    unrelated: tuple[str, ...] = ()  # prompts that the previews show beside `previews`, one each

    def __post_init__(self) -> None:
        super().__post_init__()
        known("task.method", self.method, METHODS)
        known("task.quantize", self.quantize, FORMS)
        known("task.held", self.held, HELD)
        if self.held != "float32" and self.method not in PARTIAL:
            raise ValueError(f"task.held is of a base that stays frozen, and task.method={self.method} trains it")
        if self.quantize and (self.method, self.adapter.kind) != ("adapter", "lora"):
            raise ValueError("task.quantize goes with task.method=adapter of the kind lora, whose base stays as it is")
        if self.train_text and self.method != "full":
            raise ValueError(f"task.train_text goes with task.method=full, not {self.method}")
        known("task.prior", self.prior, PRIORS)
        if self.prior == PREDICTION and self.method not in ("full", "adapter"):
            raise ValueError(f"task.prior=prediction goes with task.method=full or adapter, not {self.method}")
        if not 0 <= self.prior_weight < float("inf"):
            raise ValueError(f"task.prior_weight must be 0 or more, not {self.prior_weight}")
        if self.word and self.method not in ("full", "adapter", "textual_inversion"):
            raise ValueError(f"task.word goes with task.method=full, adapter or textual_inversion, not {self.method}")
        if not self.word and (self.vectors, self.initial) != (1, "*"):
            raise ValueError("task.vectors and task.initial are of the word that is taught: give task.word as well")
        if self.method == "textual_inversion" and not self.word:
            raise ValueError("task.method=textual_inversion teaches a word: give it as task.word")
        if self.vectors < 1:
            raise ValueError(f"task.vectors must be at least 1, not {self.vectors}")
        if self.unrelated and len(self.unrelated) != len(self.previews):
            raise ValueError(
                f"task.unrelated has {len(self.unrelated)} prompts and task.previews {len(self.previews)}: "
                "they stand side by side, so give as many of each"
            )
