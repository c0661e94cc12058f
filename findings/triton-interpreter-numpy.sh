#!/usr/bin/env bash
# The interpreter of Triton before 3.7 stops at a loop whose bound was loaded, under NumPy 2.4.
#
# Guess before the run: it runs as under NumPy 2.3. Triton names no upper bound for NumPy, and its 3.6.0 is younger
# than NumPy 2.4. Seen, TRITON_INTERPRET=1: with NumPy 2.3.5 the loop runs; with NumPy 2.4.6 triton 3.4.0, 3.5.1 and
# 3.6.0 end in a TypeError, since they make a number of an array with one entry, and 3.7.1 runs.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/kernel.py" <<'PY'
import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def every_second(out, bound):
    for i in range(0, tl.load(bound), 2):
        tl.store(out + i, 1.0)


out = torch.zeros(6)
try:
    every_second[(1,)](out, torch.tensor([5]))
    found = out.tolist()
except Exception as error:
    found = error
print(f"triton {triton.__version__}, numpy {numpy.__version__}: {found}")
PY
python3 -m venv "$folder/venv"
for pair in "3.4.0 2.3.5" "3.4.0 2.4.6" "3.5.1 2.4.6" "3.6.0 2.4.6" "3.7.1 2.4.6"; do
  read -r triton numpy <<<"$pair"
  "$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check \
    torch==2.13.0 setuptools==80.9.0 "triton==$triton" "numpy==$numpy"
  TRITON_INTERPRET=1 "$folder/venv/bin/python" -W ignore "$folder/kernel.py" | tee -a "$folder/seen"
done
diff "$folder/seen" - <<'SEEN'
triton 3.4.0, numpy 2.3.5: [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
triton 3.4.0, numpy 2.4.6: TypeError('only 0-dimensional arrays can be converted to Python scalars')
triton 3.5.1, numpy 2.4.6: TypeError('only 0-dimensional arrays can be converted to Python scalars')
triton 3.6.0, numpy 2.4.6: TypeError('only 0-dimensional arrays can be converted to Python scalars')
triton 3.7.1, numpy 2.4.6: [1.0, 0.0, 1.0, 0.0, 1.0, 0.0]
SEEN
