#!/usr/bin/env bash
# Library: transformers 5.23.0, torch 2.13.0 (CPU, sdpa attention)
# Guess:   when query heads are cut and the attention keeps its old `num_key_value_groups`, every call fails, or every
#          call is wrong.
# Happens: without padding all is right: sdpa groups the heads itself and never reads the attribute, so a forward pass,
#          a mask of ones and generation pass every test. The first batch with padding raises, as eager attention does
#          always.
# Do:      set `num_key_value_groups` when heads are cut, and test cut attention with a padded batch, not with one
#          prompt.
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
import copy
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=4,
)
stale = LlamaForCausalLM(config).eval()
rows = torch.cat([torch.arange(4) + 8 * group for group in range(4)])  # one query head of each pair stays: 4 heads on 4
for layer in stale.model.layers:
    attn = layer.self_attn
    attn.q_proj.weight.data = attn.q_proj.weight.data[rows].clone()
    attn.o_proj.weight.data = attn.o_proj.weight.data[:, rows].clone()
right = copy.deepcopy(stale)
for layer in right.model.layers:
    layer.self_attn.num_key_value_groups = 1

ids = torch.randint(3, 64, (1, 7))
ones = torch.ones_like(ids)
padded = ones.clone()
padded[0, :2] = 0
seen = {}
for kind in ("sdpa", "eager"):
    stale.set_attn_implementation(kind)
    right.set_attn_implementation(kind)
    for name, mask in (("no mask", None), ("mask of ones", ones), ("padding", padded)):
        try:
            gap = (stale(ids, attention_mask=mask).logits - right(ids, attention_mask=mask).logits).abs().max().item()
            seen[kind, name] = f"difference {gap:g}"
        except RuntimeError as e:
            seen[kind, name] = f"raises: {e}"
        print(kind, "|", name, "|", seen[kind, name])
stale.set_attn_implementation("sdpa")
right.set_attn_implementation("sdpa")
new = dict(max_new_tokens=6, do_sample=False)
same = torch.equal(stale.generate(ids, **new), right.generate(ids, **new))
print("sdpa | generation the same:", same)

raised = {key for key, text in seen.items() if text.startswith("raises")}
assert raised == {("sdpa", "padding"), ("eager", "no mask"), ("eager", "mask of ones"), ("eager", "padding")}
wrong = "The size of tensor a (4) must match the size of tensor b (8)"
assert all(wrong in seen[key] for key in raised), "it now raises otherwise"
assert seen["sdpa", "no mask"] == seen["sdpa", "mask of ones"] == "difference 0" and same
PY
