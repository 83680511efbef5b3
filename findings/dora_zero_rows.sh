#!/usr/bin/env bash
# Library: peft 0.21.2 (torch 2.13.0)
# Guess:   DoRA on a matrix of which some rows are zero (channels masked, not yet cut) starts as the base model, as LoRA
#          does.
# Happens: DoRA divides the magnitude of each row by the norm of that row: 0 / 0. Every logit, the loss, every gradient
#          and the merged weights are NaN from the first step on. LoRA on the same matrices starts exact.
# Do:      cut the channels before DoRA, or leave matrices with zero rows out; check for zero rows before training.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
pins=(torch==2.13.0 transformers==5.23.0 peft==0.21.2)
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
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
).eval()
cut = copy.deepcopy(model)
for layer, short in zip(model.model.layers, cut.model.layers):
    with torch.no_grad():
        layer.mlp.gate_proj.weight[40:] = 0
        layer.mlp.up_proj.weight[40:] = 0
        layer.mlp.down_proj.weight[:, 40:] = 0
    for part in (short.mlp.gate_proj, short.mlp.up_proj):
        part.weight.data = part.weight.data[:40].clone()
        part.out_features = 40
    short.mlp.down_proj.weight.data = short.mlp.down_proj.weight.data[:, :40].clone()
    short.mlp.down_proj.in_features = 40
ids = torch.randint(0, 64, (1, 9))
plain = model(ids).logits


def start(base, dora):
    "Largest difference from the base before any training, and how many gradients and merged weights are NaN."
    config = LoraConfig(r=2, use_dora=dora, target_modules=["gate_proj", "up_proj", "down_proj"])
    tuned = get_peft_model(copy.deepcopy(base), config)
    out = tuned(ids, labels=ids)
    out.loss.backward()
    grads = [p.grad.isnan().any().item() for p in tuned.parameters() if p.grad is not None]
    merged = [p.isnan().any().item() for p in tuned.merge_and_unload().parameters()]
    return (out.logits - plain).abs().max().item(), sum(grads) / len(grads), sum(merged)


seen = {
    name: start(base, dora)
    for name, base, dora in (
        ("LoRA on masked channels", model, False),
        ("DoRA on masked channels", model, True),
        ("DoRA on cut channels", cut, True),
    )
}
for name, (gap, grads, merged) in seen.items():
    print(f"{name}: difference {gap:g}, share of gradients with NaN {grads:g}, merged matrices with NaN {merged}")

gap, grads, merged = seen["DoRA on masked channels"]
assert gap != gap and grads == 1 and merged > 0, "DoRA now survives zero rows"
assert seen["LoRA on masked channels"][0] < 1e-5 and seen["DoRA on cut channels"][0] < 1e-5
PY
