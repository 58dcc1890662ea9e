#!/usr/bin/env bash
# From the demo's model to three things that fine-tuning is for, each with its figure: a new word from eight pictures,
# edges that say where, and holes to fill.
#   make demo && scripts/finetune.sh           perhaps half an hour on two cores (estimated)
#   SMOKE=1 DEMO=runs/smoke scripts/finetune.sh        every step in some minutes; its figures mean nothing
# DEMO: the demo's folder. OUT: where everything goes. LDM: the ldm command. PARTS: some of word, edges and holes.
# Stopped, it goes on where it was when started again.
set -euo pipefail
cd "$(dirname "$0")/.."

LDM=${LDM:-ldm}
DEMO=${DEMO:-runs/demo}
OUT=${OUT:-runs/finetune}
PARTS=${PARTS:-word edges holes}
BASE=$DEMO/denoiser
export OMP_NUM_THREADS=1 # models this small gain little from a second thread
if [ "${SMOKE:-}" = 1 ]; then
    known=16 scenes=64 count=4 steps=4 short="samples=64"
    echo "SMOKE=1: a test that every step runs; its figures mean nothing"
else
    known=768 scenes=28000 count=64 steps=20 short=""
fi

run() {
    echo
    echo "+ $*"
    "$@"
}
measured="--steps $steps --guidance 1.5 --count $count"
annealed="optimizer.schedule=cosine optimizer.warmup_steps=50 preview_steps=100000"

# Eight pictures of zorps, and for DreamBooth's prior preservation as many others as $known, drawn by the model itself,
# of any of its prompts. In kohya's way the number before a folder's name says how often a picture counts:
# half of what is trained on is zorps. A tenth of the captions is dropped, as for the base: guidance needs a model that
# still knows how to draw without one.
pictures() {
    "${LDM%ldm}python" - "$BASE" "$OUT" "$known" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np

from data_pipeline.sources.shapes import draw, parse, prompts
from ldm.images import to_pil
from ldm.pipeline import Pipeline, Request

captions = """\
a small red zorp
a large yellow zorp
a small blue zorp to the left of a large red circle
a large green square to the left of a large black zorp
a large green zorp above a small purple triangle
a small yellow square above a small purple zorp
a small green circle, a small red zorp and a large purple square from left to right
a large black zorp, a small yellow triangle and a large blue circle from top to bottom
""".splitlines()


def write(folder, pairs):
    folder.mkdir(parents=True, exist_ok=True)
    for i, (text, picture) in enumerate(pairs):
        picture.save(folder / f"{i:04}.png")
        (folder / f"{i:04}.txt").write_text(text)


base, out, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
zorps = [(text, draw(parse(text), 32, np.random.default_rng(i))) for i, text in enumerate(captions)]
texts = prompts("all", count, seed=7)
asked = Request(tuple(texts), tuple(range(5000, 5000 + count)), steps=20, guidance=1.5, batch=32)
known = zip(texts, map(to_pil, Pipeline.load(base)(asked)), strict=True)
write(out / "zorps", zorps)
write(out / "mixed" / f"{max(1, count // len(zorps))}_zorps", zorps)
write(out / "mixed" / "1_known", known)
PYTHON
}

began=$(date +%s)
mkdir -p "$OUT"
# Settings unquoted on purpose: each word is one of its own. What is given later wins.
if [[ $PARTS == *word* ]]; then
    if [ ! -d "$OUT/mixed/1_known" ]; then
        run pictures
    fi
    run "$LDM" finetune lora "$BASE" "$OUT/mixed" --out "$OUT/lora" --holdout 0 optimizer.lr=7e-4 $annealed \
        batch_size=16 samples=8000 task.dropout=0.1 task.adapter.text=true "task.adapter.targets=[all]" $short
    run "$LDM" finetune full "$BASE" "$OUT/mixed" --out "$OUT/dreambooth" --holdout 0 optimizer.lr=4e-4 $annealed \
        batch_size=16 samples=8000 task.dropout=0.1 $short
    run "$LDM" finetune textual-inversion "$BASE" "$OUT/zorps" --word zorp --out "$OUT/word" --holdout 0 \
        task.initial=square task.vectors=1 optimizer.lr=2e-2 $annealed optimizer.warmup_steps=0 batch_size=8 samples=3200 $short
    for method in lora dreambooth word; do
        run "$LDM" evaluate shapes "$OUT/$method" --glyph zorp --base "$BASE" $measured --out "$OUT/$method/scores"
    done
fi
if [[ $PARTS == *edges* ]]; then
    if [ ! -e "$OUT/listed/index.json" ]; then # captions that say what there is, and not where
        run "$LDM" data build shapes "$OUT/listed" --size 32 "count=$scenes" seed=2 places=false
    fi
    run "$LDM" finetune controlnet "$BASE" "$OUT/listed" --out "$OUT/edges" optimizer.lr=1.5e-3 $annealed \
        optimizer.warmup_steps=100 batch_size=16 samples=28000 task.dropout=0.2 $short
    run "$LDM" evaluate edges "$BASE" "$OUT/edges" $measured --out "$OUT/edges/scores"
fi
if [[ $PARTS == *holes* ]]; then
    run "$LDM" finetune inpainting "$BASE" "$DEMO/shards/train" --out "$OUT/holes" optimizer.lr=1e-3 $annealed \
        batch_size=16 samples=14400 $short
    run "$LDM" evaluate inpainting "$OUT/holes" --base "$BASE" $measured --out "$OUT/holes/scores"
fi
took=$(($(date +%s) - began))
echo
echo "done in $((took / 60)) min $((took % 60)) s; pictures: $OUT/*/scores/*.png"
