#!/usr/bin/env bash
# Library: peft 0.21.2
# Guess:   `layer_replication` (a stack of layers written as ranges, each place with a LoRA of its own) can be merged:
#          each place gets its own weight, or merging is refused.
# Happens: ranges that leave layers out are an exact cut, also after saving, loading and merging. Where a layer is
#          repeated the places share one weight tensor, and `merge_and_unload` adds the LoRA of every place to it: each
#          place then has the sum of all, the logits change, and no warning is given. New beside an adapter on a tied
#          head that is merged twice: ranges that leave layers out merge exactly, while a repeated layer gets every
#          place's LoRA.
# Do:      before merging give each place a copy of its weight; compare logits before and after merging.
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

heard = []  # what the loggers and Python's warnings say
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: heard.append(record.getMessage())
for name in (None, "transformers"):
    logging.getLogger(name).addHandler(handler)
transformers.logging.disable_default_handler()
transformers.logging.set_verbosity_warning()
warnings.simplefilter("always")
warnings.showwarning = lambda message, *args, **kwargs: heard.append(str(message))
torch.manual_seed(0)
base = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.2,
    )
).eval()
ids = torch.arange(3, 12)[None]


@torch.no_grad()
def merged(ranges, own=False):
    "Largest change of logits by merging, and by saving and loading."
    torch.manual_seed(1)
    config = LoraConfig(r=2, target_modules=["down_proj"], layer_replication=ranges, init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    layers = model.base_model.model.model.layers
    before = model(ids).logits
    model.save_pretrained("adapter")
    again = PeftModel.from_pretrained(copy.deepcopy(base), "adapter").eval()(ids).logits
    places = len({layer.mlp.down_proj.base_layer.weight.data_ptr() for layer in layers})
    if own:
        for layer in layers:
            weight = layer.mlp.down_proj.base_layer.weight
            layer.mlp.down_proj.base_layer.weight = torch.nn.Parameter(weight.detach().clone())
    after = model.merge_and_unload()(ids).logits
    return dict(
        layers=len(layers),
        weights=places,
        loading=(again - before).abs().max().item(),
        merging=round((after - before).abs().max().item(), 4),
        largest_logit=round(before.abs().max().item(), 2),
    )


seen = {
    "cut (layer 2 left out)": merged([[0, 2], [3, 4]]),
    "grown (layer 1 twice)": merged([[0, 2], [1, 4]]),
    "grown, weights of their own": merged([[0, 2], [1, 4]], own=True),
}
for name, row in seen.items():
    print(f"{name:28}", row)
about = [text for text in heard if any(word in text.lower() for word in ("replic", "merg", "layer", "shar", "tied"))]
print("warnings:", sorted(set(heard)) or "none")
assert not about, "it now warns"
assert all(row["loading"] == 0 for row in seen.values())
assert seen["cut (layer 2 left out)"]["merging"] < 1e-4 > seen["grown, weights of their own"]["merging"]
assert seen["grown (layer 1 twice)"]["merging"] > 0.1, "merging repeated layers is now right"
PY
