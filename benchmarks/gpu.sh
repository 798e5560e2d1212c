#!/usr/bin/env bash
# Everything that needs a GPU, in one go: the tests marked `gpu`, then the benchmarks. Results go to $OUT.
#   WHEELS=folder   install what the machine lacks from there, without a network
set -euo pipefail
cd "$(dirname "$0")/.."
export OUT="${OUT:-benchmarks/results}" PYTHONPATH=. PYTHONUNBUFFERED=1
mkdir -p "$OUT"
if [ -n "${WHEELS:-}" ]; then
    python3 -m pip install --quiet --no-index --find-links "$WHEELS" \
        ortools ruamel.yaml pydantic rich pytest matplotlib pandas psutil hypothesis jsonschema scipy filelock optuna
fi
python3 -m pytest -q -m gpu tests 2>&1 | tee "$OUT/gpu_tests.log"
python3 benchmarks/make_tables.py --device cuda --out "$OUT/tables"
python3 benchmarks/bench_profile_accuracy.py --device cuda --dtype bf16 --out "$OUT/profile_accuracy_gpu.json"
for dtype in bf16 fp32; do
    python3 benchmarks/bench_bld.py efficiency --device cuda --shape 8b --dtype $dtype --layers 2 --batch-size 8 \
        --sequence-tokens 2048 --output "$OUT/bld_efficiency_gpu_$dtype.json"
done
python3 benchmarks/bench_scores.py shape --device cuda --shape 8b --layers 32 --sequences 32 --sequence-tokens 2048 \
    --output "$OUT/scores_shape_gpu.json"
