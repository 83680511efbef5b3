#!/usr/bin/env bash
# Library: torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0
# Guess:   a decoder step with a cache needs two graphs, one for the prompt (cache of length 0) and one for the words
#          after it; a dimension declared with `min=0` may be traced at 0.
# Happens: an example with 0 or 1 positions is refused ("specialized it to be a constant") whatever minimum is declared.
#          Traced with 2 tokens and a cache of 3, one graph is right for every length, 0 and 1 included, in PyTorch and
#          in ONNX Runtime; even with `Dim.DYNAMIC`, whose ranges then say "from 2 on", which nothing enforces.
# Do:      trace with lengths of 2 or more, keep one graph, and test it at cache 0 and one token.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
pins=(torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0)
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

logging.disable(logging.WARNING)
import onnxruntime
import torch
from torch import nn

torch.manual_seed(0)


class Step(nn.Module):
    "Attention of new tokens over a cache and themselves; returns the longer cache."

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x, k, v):
        new, past = x.shape[1], k.shape[2]
        q, k_new, v_new = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        k, v = torch.cat([k, k_new], 2), torch.cat([v, v_new], 2)
        later = torch.arange(past + new)[None] > torch.arange(new)[:, None] + past
        mask = torch.zeros(new, past + new).masked_fill(later, float("-inf"))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).flatten(2)), k, v


def example(new, past):
    return torch.randn(1, new, 16), torch.randn(1, 2, past, 8), torch.randn(1, 2, past, 8)


step = Step().eval()
Dim = torch.export.Dim
new, past = Dim("new", min=1, max=64), Dim("past", min=0, max=64)
shapes = {"declared": ({1: new}, {2: past}, {2: past}), "dynamic": tuple({d: Dim.DYNAMIC} for d in (1, 2, 2))}
refused = {}
for lengths in ((2, 0), (2, 1), (1, 3)):
    for name, shape in shapes.items():
        try:
            torch.export.export(step, example(*lengths), dynamic_shapes=shape)
            refused[lengths, name] = ""
        except Exception as e:
            refused[lengths, name] = type(e).__name__ + (": specialized" if "specialized" in str(e) else "")
        print("traced with", lengths, name, "|", refused[lengths, name] or "exported")

gaps, ranges = {}, {}
for name, shape in shapes.items():
    program = torch.export.export(step, example(2, 3), dynamic_shapes=shape)
    ranges[name] = sorted({int(r.lower) for r in program.range_constraints.values()})
    torch.onnx.export(
        step,
        example(2, 3),
        f"{name}.onnx",
        input_names=["x", "k", "v"],
        dynamic_shapes=shape,
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(f"{name}.onnx", providers=["CPUExecutionProvider"])
    for lengths in ((2, 3), (5, 0), (1, 0), (1, 1), (1, 20)):
        args = example(*lengths)
        with torch.no_grad():
            want, again = step(*args)[0], program.module()(*args)[0]
        got = torch.tensor(session.run(None, dict(zip("xkv", (t.numpy() for t in args))))[0])
        gaps[name, lengths] = max((again - want).abs().max().item(), (got - want).abs().max().item())
    print(
        "traced with (2, 3)",
        name,
        "| ranges start at",
        ranges[name],
        "|",
        {lengths: f"{gap:.0e}" for (n, lengths), gap in gaps.items() if n == name},
    )

assert all(text.endswith(": specialized") for text in refused.values()), "lengths of 0 or 1 can now be traced"
assert ranges == {"declared": [0, 1], "dynamic": [2]}, "the ranges are now others"
assert max(gaps.values()) < 1e-5, "a length of 0 or 1 now gives other numbers"
PY
