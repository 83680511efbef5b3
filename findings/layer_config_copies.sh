#!/usr/bin/env bash
# Library: transformers 5.23.0 (torch 2.13.0)
# Guess:   layers built from `config.per_layer_config[i]` (LLaMA layers of different widths) follow
#          `set_attn_implementation`.
# Happens: `per_layer_config[i]` is a new copy of the config. `set_attn_implementation` changes the model's config and
#          no copy. From sdpa to eager the layers stay sdpa: no attention maps come, behind one misleading warning that
#          says to set eager, which was set. From eager to sdpa the model makes no mask, as sdpa needs none, and the
#          layers, still eager, attend to later tokens: other logits, silently.
# Do:      build the layer from the copy, then give its attention the model's config back (`layer.self_attn.config =
#          config`); test that a later token changes nothing before it.
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
import warnings
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

heard = []  # what the loggers and Python's warnings say
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: heard.append(record.getMessage())
for name in (None, "transformers"):
    logging.getLogger(name).addHandler(handler)
transformers.logging.disable_default_handler()
transformers.logging.set_verbosity_warning()
warnings.simplefilter("always")
warnings.showwarning = lambda message, *args, **kwargs: heard.append(str(message))
ids = torch.arange(3, 15)[None]
other = ids.clone()
other[0, -1] = 60  # only the last token differs


def build(kind, widths=(48, 40, 48), shared=False):
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation=kind)
    config = model.config
    config.per_layer_config = {i: {"intermediate_size": width} for i, width in enumerate(widths)}
    for i in range(3):
        model.model.layers[i] = LlamaDecoderLayer(config.per_layer_config[i], i)
        if shared:
            model.model.layers[i].self_attn.config = config
    torch.manual_seed(0)
    for p in model.parameters():
        if p.dim() > 1:
            torch.nn.init.normal_(p, std=0.3)
    return model.eval()


@torch.no_grad()
def change(model, kind):
    before = model(ids).logits
    model.set_attn_implementation(kind)
    out = model(ids, output_attentions=kind == "eager")
    gap = (out.logits - before).abs().max().item()
    later = (model(other).logits - out.logits)[0, :-1].abs().max().item()
    layers = {layer.self_attn.config._attn_implementation for layer in model.model.layers}
    maps = None if out.attentions is None else len(out.attentions)
    return dict(
        model=model.config._attn_implementation, layers=layers, maps=maps, gap=round(gap, 4), later=round(later, 4)
    )


seen = {}
for name, shared in (("copies", False), ("config given back", True)):
    for first, then in (("sdpa", "eager"), ("eager", "sdpa")):
        model = build(first, shared=shared)
        heard.clear()
        seen[name, then] = dict(change(model, then), said=[text for text in heard if "attention" in text.lower()])
        print(name, "|", first, "->", then, "|", seen[name, then])
print("widths:", [layer.mlp.up_proj.out_features for layer in model.model.layers])

a, b = seen["copies", "eager"], seen["copies", "sdpa"]
assert len(a["said"]) == 1 and "Please set your attention to `eager`" in a["said"][0], "it now warns otherwise"
assert not b["said"], "from eager to sdpa it now warns"
assert a["model"] == "eager" and a["layers"] == {"sdpa"} and a["maps"] == 0 and a["gap"] == 0, "copies now follow"
assert b["model"] == "sdpa" and b["layers"] == {"eager"} and b["gap"] > 1 and b["later"] > 1, "the mask is now right"
for kind in ("eager", "sdpa"):
    row = seen["config given back", kind]
    assert row["layers"] == {kind} and row["gap"] < 1e-3 and row["later"] == 0, "giving the config back no longer helps"
assert seen["config given back", "eager"]["maps"] == 3
PY
