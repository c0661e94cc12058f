#!/usr/bin/env bash
# torch.compile's cache on disk takes code that was made for other vectors than those it is now told to use.
#
# Guess before the run: the vector instructions are in the key of the cache, so that a function compiled
# under AVX-512 is compiled anew under ATEN_CPU_CAPABILITY=avx2. Seen, torch 2.13.0 on a processor with
# AVX-512: the second process finds the first one's loop, in steps of 16 entries, and builds it for vectors
# of 8. An in-place step moves half of the entries, no error, no warning. With a cache of its own, or with the
# width of the vectors among the options (cpp.simdlen, which is in the key), all of them move.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6
cat > "$folder/step.py" <<'PY'
import sys

import torch

if torch.backends.cpu.get_cpu_capability() not in ("AVX512", "AVX2"):
    sys.exit("this needs a processor with AVX-512")
torch.set_num_threads(1)
width = int(sys.argv[1])
compiled = torch.compile(lambda p, g: p.sub_(g.sign(), alpha=0.1), options={"cpp.simdlen": width or None})
p, g = torch.zeros(512, 128), torch.randn(512, 128, generator=torch.Generator().manual_seed(0))
compiled(p, g)
print(f"{(p == -0.1 * g.sign()).float().mean():.2f}")
PY
run() { # CACHE CAPABILITY WIDTH
    TORCHINDUCTOR_CACHE_DIR="$folder/$1" ATEN_CPU_CAPABILITY="$2" "$folder/venv/bin/python" "$folder/step.py" "$3"
}
found="avx512 $(run one avx512 0), then avx2 $(run one avx2 0); avx2 alone $(run two avx2 0)"
found+="; with the width given: avx512 $(run three avx512 512), then avx2 $(run three avx2 256)"
echo "share of entries that moved: $found"
[ "$found" = "avx512 1.00, then avx2 0.50; avx2 alone 1.00; with the width given: avx512 1.00, then avx2 1.00" ]
