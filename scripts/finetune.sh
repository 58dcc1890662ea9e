#!/usr/bin/env bash
# From the demo's model to three things that fine-tuning is for, each with its figure: a new word from eight pictures,
# edges that say where, and holes to fill.
#   make demo && scripts/finetune.sh           half an hour on two cores
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
    known=768 scenes=28000 count=128 steps=20 short=""
fi

run() {
    echo
    echo "+ $*"
    "$@"
}
# Other prompts and noise than those by which the settings were chosen, which were of seed 0.
measured="--seed 1000 --steps $steps --guidance 1.5 --count $count"
annealed="optimizer.schedule=cosine optimizer.warmup_steps=50 preview_steps=100000"

# Eight pictures of zorps, and $known prompts of what the model is not to forget: any that it was trained for.
pictures() {
    "${LDM%ldm}python" - "$OUT" "$known" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np

from data_pipeline.sources.shapes import draw, parse, prompts

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
out, count = Path(sys.argv[1]), int(sys.argv[2])
(out / "zorps").mkdir(parents=True, exist_ok=True)
for i, text in enumerate(captions):
    draw(parse(text), 32, np.random.default_rng(i)).save(out / "zorps" / f"{i}.png")
    (out / "zorps" / f"{i}.txt").write_text(text)
(out / "known.txt").write_text("\n".join(prompts("all", count, seed=7)))
PYTHON
}

began=$(date +%s)
mkdir -p "$OUT"
# Settings unquoted on purpose: each word is one of its own. What is given later wins.
if [[ $PARTS == *word* ]]; then
    if [ ! -f "$OUT/known.txt" ]; then
        run pictures
    fi
    # The word starts as a square; the model's own pictures of other prompts teach what it says of them itself.
    taught="--word zorp task.initial=square task.vectors=1 --holdout 0 $annealed batch_size=16"
    kept="--class-pictures $known task.preview_guidance=1.5 task.prior_weight=4"
    run "$LDM" finetune lora "$BASE" "$OUT/zorps" --out "$OUT/lora" $taught --class-prompts "$OUT/known.txt" $kept \
        samples=6400 optimizer.lr=1e-3 "task.adapter.targets=[attention,feedforward]" $short
    run "$LDM" finetune dreambooth "$BASE" "$OUT/zorps" --out "$OUT/dreambooth" $taught $kept \
        --class-folder "$(echo "$OUT"/lora/class-*)" samples=9600 optimizer.lr=2e-4 \
        "optimizer.groups=[{match: vectors, lr_scale: 100, weight_decay: 0}]" $short
    # Alone, a word can only be what the model draws already: one between square and triangle.
    run "$LDM" finetune textual-inversion "$BASE" "$OUT/zorps" --out "$OUT/word" $taught "task.initial=square triangle" \
        samples=9600 optimizer.lr=3e-2 optimizer.warmup_steps=0 $short
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
