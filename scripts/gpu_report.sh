#!/usr/bin/env bash
# One command, wherever a GPU is: the gpu tests, the benchmark's sizes beside SAELens' classes and the dense formula of the score,
# a profile of the largest step, and one Markdown report of it all.
#
#   scripts/gpu_report.sh [REPORT.md]
#
# DEVICE=cpu goes as far as it goes without a GPU; SIZES="d_in,d_sae,batch,k ..." and DTYPES="bfloat16 float32" choose what is
# timed, REPEATS how often; TESTS=no leaves the tests out.
set -euo pipefail
report=$(realpath -m "${1:-gpu_report.md}")
cd "$(dirname "$0")/.."
device=${DEVICE:-cuda}
sizes=${SIZES:-"256,4096,4096,32 512,8192,1024,32 768,16384,2048,32 4096,65536,2048,80 4096,65536,8192,80"}
found=$(mktemp -d)
trap 'echo "What was measured is in $found" >&2' ERR
if [ "${TESTS:-yes}" = yes ]; then
    python -m pytest -q -m gpu -rs tests > "$found/tests.txt" 2>&1 || true # their last lines are in the report
fi
for dtype in ${DTYPES:-bfloat16 float32}; do
    for size in $sizes; do
        IFS=, read -r d_in d_sae batch k <<< "$size"
        python -m saelens_cosine benchmark --device "$device" --dtype "$dtype" --d-in "$d_in" --d-sae "$d_sae" --batch "$batch" --k "$k" \
            --repeats "${REPEATS:-11}" --json "$found/$dtype-$size.json" --quiet > /dev/null \
            --arms saelens_batchtopk saelens_topk cosine_batchtopk/reference cosine_batchtopk/fast per_feature_cosine_batchtopk/fast cosine_topk/fast ||
            echo "$dtype $size" >> "$found/failed.txt"
    done
done
python scripts/gpu_report.py "$found" "$device" "${sizes##* }" > "$report"
rm -rf "$found"
echo "Written to $report"
