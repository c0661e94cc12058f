#!/usr/bin/env bash
# Triton's interpreter stops at a builtin that a kernel calls by another name, which the compiler takes.
#
# Guess before the run: `root = tl.sqrt_rn` at the top of a module, and root(x) in a kernel, is tl.sqrt_rn(x) in both,
# as a builtin is no variable that could change. Seen, triton 3.7.1 and 3.8.0: compiled to PTX both kernels have
# sqrt.rn.f32; under TRITON_INTERPRET=1 tl.sqrt_rn(4) is 2, and root(4) raises "Did you forget to add @triton.jit ?".
# (The interpreter puts its own functions into the module `tl`, where a name that was bound before does not see them. So
# the words of kernels that run in both are functions with @triton.jit, or are called by their full name.)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat >"$folder/kernel.py" <<'PY'
import os

import torch
import triton
import triton.language as tl

root = tl.sqrt_rn


@triton.jit
def full_name(x):
    tl.store(x, tl.sqrt_rn(tl.load(x)))


@triton.jit
def other_name(x):
    tl.store(x, root(tl.load(x)))


def compiled(kernel):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, {"x": "*fp32"})
    return "sqrt.rn.f32" in triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]


def interpreted(kernel):
    x = torch.tensor([4.0])
    try:
        kernel[(1,)](x)
    except Exception as error:
        return next(text for text in ("Did you forget to add @triton.jit", str(error)) if text in str(error))
    return x.item()


run = interpreted if os.environ.get("TRITON_INTERPRET") == "1" else compiled
print(triton.__version__, run.__name__, [run(kernel) for kernel in (full_name, other_name)])
PY
python3 -m venv "$folder/venv"
for version in 3.7.1 3.8.0; do
  "$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6 "triton==$version"
  for interpret in 0 1; do
    TRITON_INTERPRET=$interpret "$folder/venv/bin/python" -W ignore "$folder/kernel.py" | tee -a "$folder/seen"
  done
done
diff "$folder/seen" - <<'SEEN'
3.7.1 compiled [True, True]
3.7.1 interpreted [2.0, 'Did you forget to add @triton.jit']
3.8.0 compiled [True, True]
3.8.0 interpreted [2.0, 'Did you forget to add @triton.jit']
SEEN
