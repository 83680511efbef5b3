#!/usr/bin/env bash
# Library: torch 2.13.0 (torch.nn.utils.prune), transformers 5.23.0
# Guess:   a structural mask on the embeddings of a tied model (a hidden channel off, before it is cut) holds for the
#          head too, and `prune.remove`, which makes masks permanent, changes no output.
# Happens: under the mask the head still uses all of the weight: only the embeddings are masked. `prune.remove` writes
#          the masked numbers into the shared weight, so that the head is cut only then and the logits change. A score
#          that was taken under the mask is not that of the model that is saved.
# Do:      mask by hooks on the channel itself, or zero the weight; compare logits before and after `remove`.
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
import torch
from torch.nn.utils import prune
from transformers import LlamaConfig, LlamaForCausalLM

ids = torch.arange(3, 12)[None]


@torch.no_grad()
def masked(tie):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=tie,
    )
    model = LlamaForCausalLM(config).eval()
    embeddings, head = model.get_input_embeddings(), model.lm_head

    def off():
        return [int((m.weight == 0).all(0).sum()) for m in (embeddings, head)]

    before = model(ids).logits
    prune.ln_structured(embeddings, "weight", amount=8, n=2, dim=1)
    under, channels = model(ids).logits, off()
    prune.remove(embeddings, "weight")
    after = model(ids).logits
    change = [round((a - b).abs().max().item(), 4) for a, b in ((under, before), (after, under))]
    return dict(
        off_under_mask=channels,
        off_after_remove=off(),
        mask_changes=change[0],
        remove_changes=change[1],
        tied=head.weight is embeddings.weight,
    )


seen = {tie: masked(tie) for tie in (False, True)}
for tie, row in seen.items():
    print("tied" if tie else "own head", "| channels off in embeddings, head:", row)
assert seen[False]["remove_changes"] == 0 and seen[False]["off_after_remove"] == [8, 0]
row = seen[True]
assert row["tied"] and row["off_under_mask"] == [8, 0] and row["off_after_remove"] == [8, 8], (
    "the mask now holds for both"
)
assert row["remove_changes"] > 0.01, "remove now changes nothing"
PY
