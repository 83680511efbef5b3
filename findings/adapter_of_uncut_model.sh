#!/usr/bin/env bash
# Library: peft 0.21.2
# Guess:   an adapter trained before layers were removed does not load onto the cut model, or warns of the keys it
#          cannot place.
# Happens: it loads without a warning. peft matches by position: what was trained for layer 1 is put on the layer that
#          stands second now (formerly layer 2), and the rest is dropped. The model is silently wrong. Only
#          `load_adapter` returns the keys that were left over, in a value that `from_pretrained` throws away.
# Do:      merge adapters before cutting; store the list of kept layers beside the adapter and compare it before
#          loading; or use `load_adapter` and refuse any `unexpected_keys`.
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
import logging
import warnings
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

heard = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: heard.append(record.getMessage())
for name in (None, "transformers", "peft"):
    logging.getLogger(name).addHandler(handler)
transformers.logging.disable_default_handler()
transformers.logging.set_verbosity_warning()
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
).eval()
tuned = get_peft_model(
    copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
)
tuned.save_pretrained("adapter")


def cut(model, kept):
    model.model.layers = torch.nn.ModuleList([model.model.layers[i] for i in kept])
    model.config.num_hidden_layers = len(kept)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    return model


with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    loaded = PeftModel.from_pretrained(cut(copy.deepcopy(model), [0, 2]), "adapter").eval()
heard += [str(w.message) for w in caught]
words = ("adapter", "lora", "key", "layer", "weight", "missing")
about = [text for text in heard if any(word in text.lower() for word in words)]
print("warnings:", heard or "none")


def lora(m, i):
    return m.base_model.model.model.layers[i].mlp.down_proj.lora_A["default"].weight


ids = torch.randint(0, 64, (1, 9))
placed = [i for i in range(4) if torch.equal(lora(loaded, 1), lora(tuned, i))]
print("on the layer that was layer 2 stands the adapter of layer", placed)
merged_first = cut(copy.deepcopy(tuned).merge_and_unload(), [0, 2]).eval()
gap = (loaded(ids).logits - merged_first(ids).logits).abs().max().item()
print("largest difference from merging first and cutting then:", round(gap, 3))
left = loaded.load_adapter("adapter", "second").unexpected_keys
print("load_adapter reports", len(left), "keys left over")

assert not about, "peft now warns"
assert placed == [1] and gap > 1e-3 and len(left) == 8
PY
