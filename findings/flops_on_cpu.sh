#!/usr/bin/env bash
# Library: torch 2.13.0
# Guess:   `FlopCounterMode` counts the same operations wherever they run and whichever kernel does them.
# Happens: on a CPU `scaled_dot_product_attention` counts as 0, forward and backward, with or without mask: the fused
#          CPU kernel has no formula. The same call counts in full on the meta device, and on the CPU under
#          `SDPBackend.MATH` (causal or not). A matrix times a vector, and products by oneDNN or in int8, count as 0
#          too, all without a warning.
# Do:      count under `sdpa_kernel(SDPBackend.MATH)` or on the meta device, before kernels are swapped or weights
#          quantized; compare with a closed form once.
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
import logging
import warnings
from contextlib import nullcontext

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

heard = []  # what the loggers and Python's warnings say
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: heard.append(record.getMessage())
for name in (None, "torch"):
    logging.getLogger(name).addHandler(handler)
warnings.simplefilter("always")
warnings.showwarning = lambda message, *args, **kwargs: heard.append(str(message))
B, H, T, D = 1, 4, 64, 16
scores = 2 * 2 * B * H * T * T * D  # two products: queries by keys, weights by values
print("closed form of attention, forward:", scores)


def count(f):
    with FlopCounterMode(display=False) as counter:
        f()
    return counter.get_total_flops()


def attention(device="cpu", causal=False, mask=None, backward=False):
    q, k, v = (torch.randn(B, H, T, D, device=device, requires_grad=True) for _ in range(3))

    def run():
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, attn_mask=mask)
        if backward:
            out.sum().backward()

    return run


seen = {}
for name, kernel in (("default", nullcontext()), ("math", sdpa_kernel(SDPBackend.MATH))):
    with kernel:
        seen[name] = dict(
            causal=count(attention(causal=True)),
            whole=count(attention()),
            masked=count(attention(mask=torch.zeros(T, T))),
            forward_and_backward=count(attention(backward=True)),
        )
    print("attention on cpu,", name, "|", seen[name])
seen["meta"] = count(attention("meta", causal=True))
print("attention on meta |", seen["meta"])

x, w = torch.randn(8, 32), torch.randn(16, 32)
whole = torch.ones(32, 32, dtype=torch.int8)
others = {
    "linear": count(lambda: F.linear(x, w)),
    "one row by linear": count(lambda: F.linear(x[:1], w)),
    "matrix @ vector": count(lambda: w @ x[0]),
    "int8": count(lambda: torch._int_mm(whole, whole)),
}
onednn = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
if onednn:
    others["linear by oneDNN"] = count(lambda: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""))
print("products |", others)

about = [text for text in heard if any(word in text.lower() for word in ("flop", "count", "formula", "attention"))]
print("warnings:", heard or "none")
assert not about, "it now warns"
assert set(seen["default"].values()) == {0}, "attention on a CPU is now counted"
assert list(seen["math"].values()) == [scores, scores, scores, 3 * scores] and seen["meta"] == scores
assert others["linear"] == 2 * 8 * 16 * 32 and others["one row by linear"] == 2 * 16 * 32
assert others["matrix @ vector"] == others["int8"] == others.get("linear by oneDNN", 0) == 0, (
    "these products are now counted"
)
PY
