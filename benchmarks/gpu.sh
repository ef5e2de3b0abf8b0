#!/usr/bin/env bash
# What is run on a GPU machine and recorded: the tests marked gpu, our encoders beside their
# peers, and the main job. Wants Python with torch, transformers, timm and the packages of
# pyproject.toml.
#
#     bash benchmarks/gpu.sh results-folder
set -uo pipefail
cd "$(dirname "$0")/.."
out=$1
{ date -u +%F; nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
python3 -c "import torch, triton, transformers as t; print('torch', torch.__version__, 'triton', triton.__version__, 'transformers', t.__version__)"
} | tee "$out/tests-gpu.txt"
python3 -m pytest -m gpu -q -p no:cacheprovider -o addopts= -W default -rA tests 2>&1 \
    | grep -E "^(PASSED|FAILED|ERROR|SKIPPED|E  )|passed|failed" >> "$out/tests-gpu.txt"
tail -n 12 "$out/tests-gpu.txt"
python3 -m packvit verify --family all --quick > "$out/verify-gpu.txt"; echo "verify exit code $?"
tail -n 30 "$out/verify-gpu.txt"
for model in aimv2-large siglip2-so400m; do
    python3 -m packvit bench --model "$model" --json "$out/bench-$model.json"
    python3 -m packvit bench --model "$model" --train --json "$out/bench-$model-train.json"
done
python3 -m packvit bench --workload native --out "$out/native"
python3 -m packvit bench --workload all --json "$out/bench-aimv2-large-workloads.json"
python3 -m benchmarks.decoding > "$out/decoding-gpu.json"
python3 -m benchmarks.feeding > "$out/feeding-gpu.json"
for what in small large; do
    python3 -m benchmarks.bulk "$what" --few 64 --many 1088 > "$out/bulk-$what-gpu.json"
done
python3 -m packvit info --json > "$out/info-gpu.json"
python3 -m demo.photographs | xargs python3 -m packvit embed --out /tmp/demo-features --json \
    | tee "$out/embed-gpu.json"
python3 -m demo.look /tmp/demo-features
