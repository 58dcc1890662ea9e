"""What each method of fine-tuning is told unless the user says otherwise: one table, and where its numbers are from."""

from ldm.names import known

LYCORIS = "chosen here: as lora, at half its rank, as a product of two has more (Hyeon-Woo et al. 2022)"
RECIPES = {
    "full": (("method=full",), 1e-5, 4, 2000, 0.1, "diffusers' guide to train_text_to_image: 1e-5; steps chosen here"),
    "lora": (
        ("method=adapter", "adapter={kind: lora, rank: 16, alpha: 16}"), 1e-4, 2, 1500, 0.0,
        "diffusers' train_dreambooth_lora: 1e-4; rank, alpha and steps chosen here",
    ),
    "dora": (
        ("method=adapter", "adapter={kind: dora, rank: 16, alpha: 16}"), 1e-4, 2, 1500, 0.0,
        "chosen here: as lora, of which it is a form (Liu et al. 2024)",
    ),
    "loha": (("method=adapter", "adapter={kind: loha, rank: 8, alpha: 8}"), 1e-4, 2, 1500, 0.0, LYCORIS),
    "lokr": (("method=adapter", "adapter={kind: lokr, rank: 8, alpha: 8}"), 1e-4, 2, 1500, 0.0, LYCORIS),
    "dreambooth": (("method=full",), 5e-6, 2, 1000, 0.0, "Ruiz et al. 2023: 5e-6, about 1,000 steps"),
    "textual-inversion": (
        ("method=textual_inversion", "vectors=4"), 5e-3, 4, 3000, 0.0,
        "Gal et al. 2023: 5e-3; steps and vectors as in diffusers' guide to textual_inversion",
    ),
    "controlnet": (
        ("method=controlnet",), 1e-5, 4, 20_000, 0.5, "Zhang et al. 2023, sec. 3.3: 1e-5, half of all prompts dropped",
    ),
    "t2i-adapter": (("method=t2i_adapter",), 1e-5, 8, 20_000, 0.0, "Mou et al. 2023: 1e-5, batch 8"),
    "inpainting": (
        ("method=inpainting",), 1e-5, 8, 20_000, 0.1,
        "the model card of Stable Diffusion's: a tenth of captions dropped; the rate of full",
    ),
    "instruct": (
        ("method=instruct",), 5e-5, 8, 15_000, 0.05,
        "Brooks et al. 2023, sec. 3.2.1: 5 % each; rate and steps as diffusers' train_instruct_pix2pix",
    ),
}  # fmt: skip
"""Method -> settings of the task, rate, batch size, steps, share of captions dropped, and where these are from."""


UNRELATED = (
    "a photo of a dog in a park",
    "a city street at night",
    "a bowl of fruit on a wooden table",
    "a portrait of an old man",
    "a lake in the mountains",
    "a red car in front of a house",
    "a cat asleep on a sofa",
    "a watercolour of flowers in a vase",
)
"""Prompts that no subject is in: what a model draws of them, before and after, tells what it has forgotten."""


WORD_RATE = 2e-3
"""At which the vectors of a word learn beside something else: less than alone, as they need not do it all."""


def settings_of(method: str, *, word: bool = False, has_class: bool = False) -> list[str]:
    """The method's recipe as words for the config of a run, all but its length. Raises ValueError for no method.

    word: whether one is taught. has_class: whether pictures of the subject's class are trained on as well.
    """
    task, lr, batch_size, _, dropout, _ = RECIPES[known("method", method, RECIPES)]
    own = [f"task.dropout={dropout}", f"batch_size={batch_size}", f"optimizer.lr={lr}"]
    with_more = task[0] in ("method=full", "method=adapter")
    if word and with_more:
        own.append(f"optimizer.groups=[{{match: vectors, lr_scale: {WORD_RATE / lr:g}, weight_decay: 0}}]")
    if has_class and with_more:
        own.append("task.prior=prediction")
    return [
        "task.kind=finetuning", *(f"task.{setting}" for setting in task), *own,
        "optimizer.schedule=constant", "ema=0.99", "best=true",
    ]  # fmt: skip


def steps_of(method: str) -> int:
    """Its steps."""
    return RECIPES[method][3]
