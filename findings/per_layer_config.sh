#!/usr/bin/env bash
# Library: transformers 5.23.0
# Guess:   `per_layer_config={1: {"skip": ["mlp"]}}` builds layer 1 of a LLaMA without its MLP, and an unknown name
#          raises; `{1: {"intermediate_size": 40}}` builds layer 1 with a narrower MLP.
# Happens: `skip` ("entire sub-layers skipped", says the source) is accepted with any name, saved and read back, and
#          changes nothing: the layer is whole. A checkpoint without these weights loads with a new random MLP, and only
#          the load report says so. A width per layer can be written down, but building the model raises; with the flag
#          that the message offers, every layer gets the global width.
# Do:      take `per_layer_config` as a record, not as something that builds the model: build cut layers by code of
#          one's own, never rely on `skip`, and count the parameters (or compare logits) after loading.
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
import json
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

BASE = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)


def build(per_layer=None, allow=False):
    extra = {} if per_layer is None else {"per_layer_config": per_layer}
    if allow:
        extra["allow_global_per_layer_attribute_access"] = True
    return LlamaForCausalLM(LlamaConfig(**BASE, **extra))


def size(model):
    return sum(p.numel() for p in model.parameters())


whole = size(build())
skipped = {name: size(build({1: {"skip": [name]}})) for name in ("mlp", "self_attn", "no_such_part")}
print("parameters:", whole, "with skip:", skipped)

torch.manual_seed(0)
model = build({1: {"skip": ["mlp"]}})
model.save_pretrained("cut")
print("saved config:", json.load(open("cut/config.json"))["per_layer_config"])
weights = load_file("cut/model.safetensors")
save_file({k: v for k, v in weights.items() if "layers.1.mlp" not in k}, "cut/model.safetensors", {"format": "pt"})
again, info = LlamaForCausalLM.from_pretrained("cut", output_loading_info=True)
print("read back:", again.config.per_layer_config[1].skip, "missing:", sorted(info["missing_keys"]))
random_mlp = again.model.layers[1].mlp.down_proj.weight.abs().sum().item()

try:
    build({1: {"intermediate_size": 40}})
    refused = ""
except RuntimeError as e:
    refused = str(e)
print("width per layer:", refused[:90] or "built")
widths = [layer.mlp.up_proj.out_features for layer in build({1: {"intermediate_size": 40}}, allow=True).model.layers]
print("with allow_global_per_layer_attribute_access:", widths)

assert set(skipped.values()) == {whole}, "skip now changes the model"
assert len(info["missing_keys"]) == 3 and random_mlp > 0, "the checkpoint without an MLP now loads otherwise"
assert "per-layer attribute" in refused, "widths per layer can now be built"
assert widths == [48, 48, 48], "the flag now gives other widths"
PY
