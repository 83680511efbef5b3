#!/usr/bin/env bash
# Library: transformers 5.23.0 (Gemma 3 and Qwen 2, whose layers attend to a window or to all)
# Guess:   layers that are cut out by hand leave the others what they were: a layer holds its kind of attention (window
#          or all) itself, so the live model equals one whose `layer_types` were cut along; a list of the wrong length
#          raises.
# Happens: the model picks mask and rotary positions of a layer by its place in `config.layer_types`, whatever the layer
#          holds. With the list left as it was, a live cut model computes silently with the kinds of other layers; on
#          prompts that fit into the window only the rotary positions of Gemma 3 differ. Only saving raises; the list
#          cut to the right length from its end saves, loads and stays wrong.
# Do:      set `config.layer_types = [layer_types[i] for i in kept]` before the first forward pass; test with a prompt
#          longer than the window.
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
import logging
import warnings

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3ForCausalLM, Gemma3TextConfig, Qwen2Config, Qwen2ForCausalLM

heard = []  # what the loggers and Python's warnings say
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: heard.append(record.getMessage())
for name in (None, "transformers"):
    logging.getLogger(name).addHandler(handler)
transformers.logging.disable_default_handler()
transformers.logging.set_verbosity_warning()
warnings.simplefilter("always")
warnings.showwarning = lambda message, *args, **kwargs: heard.append(str(message))
KINDS, KEPT, WINDOW = ["sliding_attention", "sliding_attention", "full_attention"] * 2, [0, 2, 3, 5], 4
BASE = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    sliding_window=WINDOW,
    layer_types=KINDS,
    pad_token_id=0,
)
ids = torch.arange(3, 23)[None]


def gap(a, b):
    return round((a - b).abs().max().item(), 4)


def saved(model, name):
    try:
        model.save_pretrained(name)
    except Exception as e:
        return "raises" if "must be equal to the number of" in str(e) else str(e)
    return AutoModelForCausalLM.from_pretrained(name).eval()


@torch.no_grad()
def cut(config, model_class):
    torch.manual_seed(0)
    model = model_class(config).eval()
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.3)
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in KEPT])
    model.config.num_hidden_layers = len(KEPT)
    for i, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = i
    right, shortened = copy.deepcopy(model), copy.deepcopy(model)
    right.config.layer_types = [KINDS[i] for i in KEPT]
    shortened.config.layer_types = KINDS[: len(KEPT)]
    want, short = right(ids).logits, right(ids[:, : WINDOW - 1]).logits
    loaded = saved(right, "right"), saved(shortened, "shortened")
    return dict(
        largest_logit=round(want.abs().max().item(), 2),
        list_left=gap(model(ids).logits, want),
        list_left_short_prompt=gap(model(ids[:, : WINDOW - 1]).logits, short),
        saving_list_left=saved(model, "left"),
        list_shortened_and_loaded=gap(loaded[1](ids).logits, want),
        list_cut_along_and_loaded=gap(loaded[0](ids).logits, want),
    )


seen = {
    "Gemma 3": cut(Gemma3TextConfig(**BASE), Gemma3ForCausalLM),
    "Qwen 2": cut(Qwen2Config(**BASE, use_sliding_window=True), Qwen2ForCausalLM),
}
for name, row in seen.items():
    print(name, "|", row)
about = [text for text in heard if any(word in text.lower() for word in ("layer", "sliding", "window", "mask"))]
print("warnings:", heard or "none")
assert not about, "it now warns"
for row in seen.values():
    assert row["list_left"] > 1 and row["list_shortened_and_loaded"] > 1, "layers now keep their kinds"
    assert row["saving_list_left"] == "raises" and row["list_cut_along_and_loaded"] == 0
assert seen["Gemma 3"]["list_left_short_prompt"] > 1e-3 and seen["Qwen 2"]["list_left_short_prompt"] == 0
PY
