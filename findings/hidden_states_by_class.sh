#!/usr/bin/env bash
# Library: transformers 5.23.0 (torch 2.13.0)
# Guess:   `output_hidden_states=True` gives one state more than there are layers, state i being the input of layer i,
#          also when a layer was replaced by one that passes its input on, or by a new one of another width.
# Happens: states are caught by hooks put on modules of the layer's class, once, at the first call that asks for states.
#          A layer of another class is never caught; a new layer of the right class is not caught if it came after that
#          call. The list is one shorter, and every state behind it stands one place too early. Attention maps likewise.
#          There is no warning.
# Do:      after replacing a layer compare `len(hidden_states)` with the layers + 1, or use hooks of one's own.
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
ids = torch.arange(3, 12)[None]
BASE = dict(vocab_size=64, hidden_size=32, num_hidden_layers=4, num_attention_heads=4)


class Pass(nn.Module):
    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states


@torch.no_grad()
def states(kind, called):
    "For each state: the layers whose input it is (by hooks of our own); and the number of attention maps."
    torch.manual_seed(0)
    model = LlamaForCausalLM._from_config(LlamaConfig(intermediate_size=48, **BASE), attn_implementation="eager").eval()
    if called:
        model(ids, output_hidden_states=True)
    if kind == "pass":
        model.model.layers[1] = Pass()
    if kind == "narrow":
        config = copy.deepcopy(model.config)
        config.intermediate_size = 40
        model.model.layers[1] = LlamaDecoderLayer(config, 1).eval()
    inputs = []
    hooks = [
        layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0])) for layer in model.model.layers
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    out = model(ids, output_hidden_states=True, output_attentions=True)
    return [[i for i in range(4) if torch.equal(state, inputs[i])] for state in out.hidden_states], len(out.attentions)


seen = {}
for kind in ("whole", "pass", "narrow"):
    for called in (False, True):
        seen[kind, called] = states(kind, called)
        print(
            f"{kind:7} asked before: {called!s:6}",
            "states are the inputs of layers",
            seen[kind, called][0],
            "| maps:",
            seen[kind, called][1],
        )

about = [text for text in heard if any(word in text.lower() for word in ("hidden", "state", "layer", "hook"))]
print("warnings:", heard or "none")
assert not about, "it now warns"
right = ([[0], [1], [2], [3], []], 4)
assert seen["whole", False] == seen["whole", True] == seen["narrow", False] == right
assert seen["pass", False] == seen["pass", True] == ([[0], [1, 2], [3], []], 3), (
    "a layer of another class is now counted"
)
assert seen["narrow", True] == ([[0], [1], [3], []], 3), "a layer that came after the first call is now caught"
PY
