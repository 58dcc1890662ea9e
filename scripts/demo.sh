#!/usr/bin/env bash
# From nothing to pictures from captions: shards -> autoencoder -> CLIP -> denoiser -> pictures and a score.
#   make demo                    about a quarter of an hour on two quiet cores
#   SMOKE=1 make demo            every step in under two minutes; its pictures are not meant to look like anything
# OUT: where everything goes. LDM: the ldm command. A stopped demo goes on where it was when started again.
set -euo pipefail
cd "$(dirname "$0")/.."

LDM=${LDM:-ldm}
if [ "${SMOKE:-}" = 1 ]; then
    OUT=${OUT:-runs/smoke}
    scenes=400 heldout=64 count=8 steps=4
    short="samples=128 validation_samples=32"
    short_text="samples=256 validation_samples=32"
    short_denoiser="samples=128 validation_samples=32 task.preview_steps=2"
    echo "SMOKE=1: a test that every step runs; the pictures are not meant to look like anything"
else
    OUT=${OUT:-runs/demo}
    scenes=60000 heldout=512 count=256 steps=30
    short="" short_text="" short_denoiser=""
fi
data="data.path=$OUT/shards/train validation=$OUT/shards/validation"

run() {
    echo
    echo "+ $*"
    "$@"
}
shards() { # NAME key=value...: shards that are already there are kept
    if [ ! -e "$OUT/shards/$1/index.json" ]; then
        run "$LDM" data build shapes "$OUT/shards/$1" --size 32 "${@:2}"
    fi
}

began=$(date +%s)
shards train "count=$scenes" seed=0
shards validation "count=$heldout" seed=1
# One thread a process: models this small gain little from a second one, so the two cores get a process each.
export OMP_NUM_THREADS=1
# Words unquoted on purpose: each is a setting of its own.
run "$LDM" train configs/demo/autoencoder.yaml "out=$OUT/autoencoder" $data $short &
first=$!
run "$LDM" train configs/demo/clip.yaml "out=$OUT/clip" $data $short_text
wait $first
# torchrun, since `accelerate launch` itself does not start beside a CPU build of torch (it imports torchvision).
ACCELERATE_USE_CPU=1 run "${LDM%ldm}torchrun" --standalone --nproc_per_node 2 \
    -m ldm train configs/demo/denoiser.yaml "out=$OUT/denoiser" $data $short_denoiser \
    "task.autoencoder=$OUT/autoencoder" "task.text=$OUT/clip"
unset OMP_NUM_THREADS
run "$LDM" generate "$OUT/denoiser" --steps "$steps" --guidance 1.5 --count 4 --out "$OUT/pictures" \
    "a large red square" \
    "a small blue triangle" \
    "a large yellow circle above a small black square" \
    "a small red square to the left of a large green circle" \
    "a small purple circle to the left of a large blue triangle" \
    "a small green square, a large yellow circle and a small purple triangle from left to right"
run "$LDM" evaluate shapes "$OUT/denoiser" --steps "$steps" --guidance 1.5 --count "$count" --out "$OUT/scores"

took=$(($(date +%s) - began))
echo
echo "done in $((took / 60)) min $((took % 60)) s"
echo "pictures of prompts that were never trained on: $OUT/scores/heldout.png, $OUT/pictures"
echo "your own: $LDM generate $OUT/denoiser \"a large red square above a small black circle\""
if [ "${SMOKE:-}" = 1 ]; then
    echo "SMOKE=1: these pictures are not meant to look like anything"
fi
