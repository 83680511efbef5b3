#!/usr/bin/env bash
# Library: torch 2.13.0 (a build with oneDNN, as the CPU wheels are; the operation is one that `torch.compile` uses)
# Guess:   the product by oneDNN, `torch.ops.mkldnn._linear_pointwise`, raises where a gradient is asked for, or gives
#          it.
# Happens: the output says `requires_grad=True`, `backward` runs to its end, and the gradients are None: of the weight,
#          of the bias and of all before it. A UserWarning at `backward`, which Python shows once, is all; an optimizer
#          skips None silently, so training goes on with only what stands behind the product.
# Do:      wrap it in a `torch.autograd.Function` of one's own; after the first step check that every trained weight has
#          a gradient.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
pins=(torch==2.13.0)
py=${FINDINGS_VENV:+$(cd "$FINDINGS_VENV" && pwd)/bin/python}
if [ -z "$py" ]; then
  python3 -m venv "$tmp/venv"; py=$tmp/venv/bin/python
  "$py" -m pip install -q "${pins[@]}"
fi
export TQDM_DISABLE=1 HF_HUB_OFFLINE=1 HF_HOME=$tmp TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
cd "$tmp"
"$py" - "${pins[@]}" <<'PY'
import sys
from importlib.metadata import version

for name, pin in (text.split("==") for text in sys.argv[1:]):
    print(name, version(name))
    if version(name).split("+")[0] != pin:
        print(f"note: run with {name} {version(name)} instead of the pinned {pin}")
PY
"$py" - <<'PY'
import warnings

import torch
from torch import nn
from torch.nn import functional as F

if not torch.backends.mkldnn.is_available():
    print("skipped: this build of torch has no oneDNN, so the operation is not there to be tried.")
    raise SystemExit(0)


def onednn(x, weight, bias=None):
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def step(product):
    "One step of training of two linear layers, of which the first is computed by `product`."
    torch.manual_seed(0)
    first, last, x = nn.Linear(32, 16), nn.Linear(16, 4), torch.randn(8, 32, requires_grad=True)
    before = first.weight.detach().clone()
    optimizer = torch.optim.SGD([*first.parameters(), *last.parameters()], lr=0.1)
    hidden = product(x, first.weight, first.bias)
    loss = last(hidden).square().mean()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loss.backward()
        optimizer.step()
    grads = {
        name: p.grad is not None
        for name, p in dict(input=x, weight=first.weight, bias=first.bias, after=last.weight).items()
    }
    return dict(
        loss=loss.item(),
        requires_grad=hidden.requires_grad,
        grads=grads,
        moved=not torch.equal(first.weight, before),
        warnings=[str(w.message)[:90] for w in caught],
    )


plain, fast, again = step(F.linear), step(onednn), step(onednn)
for name, row in {"F.linear": plain, "oneDNN": fast, "oneDNN, second step": again}.items():
    print(name, "|", row)

assert abs(plain["loss"] - fast["loss"]) < 1e-5 and fast["requires_grad"]
assert all(plain["grads"].values()) and plain["moved"]
assert fast["grads"] == dict(input=False, weight=False, bias=False, after=True) and not fast["moved"], (
    "there are gradients now"
)
assert len(fast["warnings"]) == 1 and "autograd kernel was not registered" in fast["warnings"][0], (
    "it now warns otherwise"
)
PY
