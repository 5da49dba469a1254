#!/bin/sh
# The kernels' tests and times on a machine with a CUDA device and no more than torch, triton and pytest.
# The project's pytest settings name plug-ins such a machine lacks, so they are left out.
#
#     OUT=results sh benchmarks/gpu.sh smoke|full
set -u
cd "$(dirname "$0")/.."
export PYTHONPATH="kernels${PYTHONPATH:+:$PYTHONPATH}"
out="${OUT:-.}"
python -m pytest -c /dev/null --noconftest --rootdir . -p no:cacheprovider -rA --durations 5 \
	tests/kernels/test_*_gpu.py >"$out/pytest.txt" 2>&1
status=$?
grep -E '^(rank |FAILED|ERROR)|passed|failed' "$out/pytest.txt"
timeout 150 python -m benchmarks.spectral_tiles --out "$out/tiles.json" 2>&1 | tee "$out/tiles.txt"
case "${1:-smoke}" in
smoke) timeout 150 python -m benchmarks.spectral_tiles --sweep --cases SDXL:16 --out "$out/sweep16.json" ;;
full)
	# once side by side to fill the compiler's cache, then one after the other, undisturbed
	for case in SDXL:16 SDXL:64 SDXL:128; do
		timeout 200 python -m benchmarks.spectral_tiles --sweep --cases "$case" >/dev/null 2>&1 &
	done
	wait
	for case in SDXL:16 SDXL:64 SDXL:128; do
		timeout 100 python -m benchmarks.spectral_tiles --sweep --cases "$case" --out "$out/sweep-$case.json"
	done
	;;
esac 2>&1 | tee "$out/sweep.txt"
exit $status
