#!/usr/bin/env bash
# torch.compile(dynamic=True) compiles a function anew for every shape of an nn.Parameter that it is given.
#
# Guess before the run: with dynamic=True a step p.mul_(…).sub_(…) is compiled once for all matrices, since
# their sizes are symbols then. Seen, torch 2.13.0: so it is for tensors (1 graph for 6 shapes); for
# parameters of the same shapes there are 6 graphs, one each, with dynamic=True as without it. An optimizer
# written a tensor at a time meets the limit of 8 recompilations at the ninth shape: with fullgraph=True an
# error, without it the rest runs uncompiled. p.detach() in place of p is enough.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install -qq --disable-pip-version-check torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PY'
import torch

graphs = 0


def count(graph, inputs):
    global graphs
    graphs += 1
    return graph.forward


def step(p, g):
    p.mul_(0.99).sub_(g.sign(), alpha=0.1)


found = {}
shapes = [(4, 8), (8, 4), (16, 8), (8, 16), (32, 4), (4, 32)]
for kind in ("tensor", "parameter", "detached parameter"):
    torch._dynamo.reset()
    graphs = 0
    compiled = torch.compile(step, dynamic=True, fullgraph=True, backend=count)
    with torch.no_grad():
        for shape in shapes:
            p = torch.ones(shape)
            if kind != "tensor":
                p = torch.nn.Parameter(p)
            if kind == "detached parameter":
                p = p.detach()
            compiled(p, torch.ones(shape))
    found[kind] = graphs
print(torch.__version__.partition("+")[0], f"{len(shapes)} shapes:", found)
assert found == {"tensor": 1, "parameter": 6, "detached parameter": 1}, found
PY
