#!/usr/bin/env bash
# Library: torch 2.13.0, transformers 5.23.0
# Guess:   `layer.compile()` for each of 12 layers compiles 12 layers, also where their widths differ (compiling layer
#          by layer is advised where compiling the whole takes long); with equal widths one graph serves all.
# Happens: what was compiled is kept by code, not by module, and all layers share one `forward`: the limit of 8
#          recompilations is one for all. Of 12 widths 8 are compiled and 4 layers run uncompiled, with right numbers
#          and a warning in the log. With a cache it is 8 of 12 with equal widths too, as each layer's own number is
#          fixed in its graph.
# Do:      set `torch._dynamo.config.recompile_limit` to the number of layers or more, or compile the whole model.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
pins=(torch==2.13.0 transformers==5.23.0)
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
from contextlib import nullcontext
import torch
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig, LlamaForCausalLM

assert torch._dynamo.config.recompile_limit == 8, "the default limit is another one now"
heard = []  # what the log says of the limit
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: heard.append(record.getMessage())
log = logging.getLogger("torch._dynamo.convert_frame")
log.addHandler(handler)
log.propagate = False
ids = torch.arange(3, 12)[None]
EQUAL, UNEQUAL = [48] * 12, list(range(48, 36, -1))


def cut(weight, width, axis):
    return torch.nn.Parameter(weight.detach().narrow(axis, 0, width).clone())


@torch.no_grad()
def compiled(widths, cache, whole=False, limit=None):
    "Graphs that are compiled (by a backend that only counts), what the log says of the limit, difference of logits."
    heard.clear()
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=12, num_attention_heads=4)
    ).eval()
    for layer, width in zip(model.model.layers, widths):
        mlp = layer.mlp
        mlp.up_proj.weight, mlp.gate_proj.weight = (
            cut(mlp.up_proj.weight, width, 0),
            cut(mlp.gate_proj.weight, width, 0),
        )
        mlp.down_proj.weight = cut(mlp.down_proj.weight, width, 1)
    want = model(ids, use_cache=cache).logits
    counter = CompileCounter()
    for part in [model] if whole else model.model.layers:
        part.compile(backend=counter)
    with torch._dynamo.config.patch(recompile_limit=limit) if limit else nullcontext():
        gap = (model(ids, use_cache=cache).logits - want).abs().max().item()
    said = [text.splitlines()[0] for text in heard if "recompile_limit" in text]
    return dict(graphs=counter.frame_count, said=said, difference=round(gap, 6))


seen = {
    "equal, no cache": compiled(EQUAL, False),
    "unequal, no cache": compiled(UNEQUAL, False),
    "equal, cache": compiled(EQUAL, True),
    "unequal, cache": compiled(UNEQUAL, True),
    "unequal, cache, limit 12": compiled(UNEQUAL, True, limit=12),
    "unequal, no cache, whole model": compiled(UNEQUAL, False, whole=True),
}
for name, row in seen.items():
    print(f"{name:31}", row)
counts = {name: (row["graphs"], row["said"]) for name, row in seen.items()}
assert counts["equal, no cache"] == (1, [])
limited = (8, ["torch._dynamo hit config.recompile_limit (8)"])
for name in ("unequal, no cache", "equal, cache", "unequal, cache"):
    assert counts[name] == limited, "other counts now, or the log says something else"
assert counts["unequal, cache, limit 12"] == (12, []) and counts["unequal, no cache, whole model"] == (1, [])
assert all(row["difference"] < 1e-4 for row in seen.values())
PY
