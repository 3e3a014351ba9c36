#!/usr/bin/env bash
# One run on a borrowed GPU: the tests for a GPU, speed next to transformers + PEFT, pre-training, a prefix on E2E.
#   OUT=results CORPUS=corpus/ DATA=data/ VOCAB=folder [GPT2="..." BART="..." STEPS=1500] bash weights/gpu_day.sh
# VOCAB holds vocab.json and merges.txt; DATA holds e2e/. Each part writes to OUT as it ends.
set -u
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
STEPS=${STEPS:-1500} BENCH_MODELS=${BENCH_MODELS:-gpt2-medium bart-large} MINUTES=${MINUTES:-4} WORK=${WORK:-/tmp/gpu_day}
GPT2=${GPT2:---layers 6 --width 384 --heads 6 --batch-size 192 --seconds 100 --workers 4 --eval-every 400 --save-every 10000}
BART=${BART:---layers 4 --width 320 --heads 5 --batch-size 192 --seconds 60 --workers 12 --eval-every 400 --save-every 10000}
mkdir -p "$OUT" "$WORK/gpt2" && cp "$VOCAB"/vocab.json "$VOCAB"/merges.txt "$WORK/gpt2"
say() { echo "== $(date +%T) $*" | tee -a "$OUT/log.txt"; }
pack() { tar -C "$WORK" --exclude=state.pt -cf - "$@" | split -b 15M - "$OUT/$1.tar."; }  # parts under 16 MiB

say "$(python3 -c 'import torch; print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())')"
say tests
timeout 150 python3 -m pytest -q tests/test_cuda.py >"$OUT/test_cuda.txt" 2>&1; tail -3 "$OUT/test_cuda.txt" >>"$OUT/log.txt"
say speed
python3 -m minprefix bench report --minutes $MINUTES --models $BENCH_MODELS --data "$DATA/e2e" --peer --json "$OUT/bench.json" \
    >"$OUT/bench.md" 2>"$OUT/bench-errors.txt"
say pre-train gpt2
python3 weights/pretrain.py gpt2 --corpus "$CORPUS" --out "$WORK/gpt2" --state "$WORK/state-gpt2" $GPT2 2>&1 | tr '\r' '\n' | grep -v "step/s\|s/step" | tail -60 >>"$OUT/log.txt"
pack gpt2
say prefix on E2E with the new gpt2, by the settings of gpt2-mini
(
    python3 train.py --model "$WORK/gpt2" --data "$DATA/e2e" --prefix-length 100 --hidden 0 --lr 0.03 --batch-size 16 \
        --steps $STEPS --eval-inputs 630 --out "$WORK/e2e" &&
    python3 sample.py --prefix "$WORK/e2e/prefix.safetensors" \
        --input "name[The Golden Lantern], eatType[pub], food[Thai], area[riverside], near[The Mill]"
) 2>&1 | tr '\r' '\n' | grep -v "step/s\|s/step" | tail -80 >"$OUT/e2e.txt" &
say pre-train bart
python3 weights/pretrain.py bart --corpus "$CORPUS" --out "$WORK/bart" --bpe "$WORK/gpt2" --state "$WORK/state-bart" $BART 2>&1 | tr '\r' '\n' | grep -v "step/s\|s/step" | tail -60 >>"$OUT/log.txt"
pack bart
wait
say done
