#!/usr/bin/env bash
# The rounded division and root of Triton before 3.6 take subnormal numbers for zero; its sums and products do not.
#
# Guess before the run: tl.sqrt_rn and tl.div_rn are sqrt.rn.f32 and div.rn.f32 in every version, rounded as IEEE 754
# says, subnormal numbers included, since no option asks for flushing and a product is a plain mul.f32. Seen, the PTX
# for an H100 of triton 3.4.0 and 3.5.1: both have .ftz; of 3.6.0 and 3.7.1: neither has. (Our kernel of AdamW has both:
# what they lose is below 2⁻¹²⁶, and ε or the weight beside it is much larger.) No GPU is needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/kernel.py" <<'PY'
import re

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def root(out, x):
    tl.store(out, tl.sqrt_rn(tl.load(x)))


@triton.jit
def quotient(out, x):
    tl.store(out, tl.div_rn(1.0, tl.load(x)))


@triton.jit
def product(out, x):
    value = tl.load(x)
    tl.store(out, value * value)


found = {}
for kernel in (root, quotient, product):
    source = ASTSource(kernel, {"out": "*fp32", "x": "*fp32"})
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
    found[kernel.__name__] = " ".join(re.findall(r"(?:sqrt|div|mul)\.\S*f32", code))
print(triton.__version__, found)
PY
python3 -m venv "$folder/venv"
for version in 3.4.0 3.5.1 3.6.0 3.7.1; do
  "$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check setuptools==80.9.0 "triton==$version"
  TRITON_CACHE_DIR="$folder/$version" "$folder/venv/bin/python" "$folder/kernel.py" | tee -a "$folder/seen"
done
diff "$folder/seen" - <<'SEEN'
3.4.0 {'root': 'sqrt.rn.ftz.f32', 'quotient': 'div.rn.ftz.f32', 'product': 'mul.f32'}
3.5.1 {'root': 'sqrt.rn.ftz.f32', 'quotient': 'div.rn.ftz.f32', 'product': 'mul.f32'}
3.6.0 {'root': 'sqrt.rn.f32', 'quotient': 'div.rn.f32', 'product': 'mul.f32'}
3.7.1 {'root': 'sqrt.rn.f32', 'quotient': 'div.rn.f32', 'product': 'mul.f32'}
SEEN
