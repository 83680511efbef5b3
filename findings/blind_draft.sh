#!/usr/bin/env bash
# Library: transformers 5.23.0
# Guess:   speculative decoding of a LLaVA with a pruned LLaVA as `assistant_model`: the draft is given the picture too,
#          so that a draft that is an exact copy of the target has every word accepted.
# Happens: the draft never sees the picture. The target encodes it ahead, `pixel_values` are gone from what the draft is
#          given, and the encoded picture does not reach it: its first forward pass holds the embedding of the image
#          token itself. Its vision tower is not run once. The words are right (the target checks them), no warning is
#          given, and hardly a draft is accepted: nearly every word costs a pass of the target, and those of the draft
#          besides. The same pair on text alone has every draft accepted.
# Do:      count the target's forward passes, not the words; a draft of an LVLM helps no more here than one that reads
#          text alone.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
py=${FINDINGS_VENV:+$(cd "$FINDINGS_VENV" && pwd)/bin/python}
if [ -z "$py" ]; then
  python3 -m venv "$tmp/venv"; py=$tmp/venv/bin/python
  "$py" -m pip install -q torch==2.13.0 transformers==5.23.0
fi
export HF_HUB_OFFLINE=1 HF_HOME=$tmp TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
cd "$tmp"
"$py" - <<'PY'
import copy
import torch
import transformers
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

print("transformers", transformers.__version__)
torch.manual_seed(0)
size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4)
vision = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=32, **size)
text = LlamaConfig(vocab_size=64, pad_token_id=0, eos_token_id=None, **size)
target = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=63)).eval()
for p in target.parameters():
    if p.dim() > 1:
        torch.nn.init.normal_(p, std=0.3)
target.generation_config.eos_token_id, target.generation_config.pad_token_id = None, 0
copied, pruned = copy.deepcopy(target), copy.deepcopy(target)
layers = pruned.model.language_model.layers
pruned.model.language_model.layers, pruned.config.text_config.num_hidden_layers = layers[:3], 3

words = torch.tensor([[2, 5, 6, 7, 8, 9]])
shown = torch.cat([torch.tensor([[2]]), torch.full((1, 4), 63), torch.tensor([[5, 6, 7]])], 1)
picture = dict(pixel_values=torch.randn(1, 3, 16, 16))
new = dict(max_new_tokens=24, do_sample=False)


def assisted(draft, ids, **kwargs):
    "Words of the target with a draft of 5 words a round: right?, and how often each part was run."
    draft.generation_config.update(
        num_assistant_tokens=5, num_assistant_tokens_schedule="constant", assistant_confidence_threshold=0.0
    )
    runs = dict(target=0, draft=0, draft_sees=0)
    first = []

    def count(name):
        def hook(module, args, kwargs):
            runs[name] += 1
            if name == "draft" and not first:
                first.append(kwargs["inputs_embeds"])

        return hook

    parts = dict(
        target=target.model.language_model, draft=draft.model.language_model, draft_sees=draft.model.vision_tower
    )
    hooks = [part.register_forward_pre_hook(count(name), with_kwargs=True) for name, part in parts.items()]
    out = target.generate(input_ids=ids, assistant_model=draft, **new, **kwargs)
    for hook in hooks:
        hook.remove()
    plain = torch.equal(first[0], draft.get_input_embeddings()(ids))
    return dict(right=torch.equal(out, target.generate(input_ids=ids, **new, **kwargs)), **runs, words_only=plain)


seen = {
    "copy, text": assisted(copied, words),
    "copy, picture": assisted(copied, shown, **picture),
    "3 of 4 layers, picture": assisted(pruned, shown, **picture),
}
for name, row in seen.items():
    print(f"{name:24}", row)
assert all(row["right"] and row["words_only"] and row["draft_sees"] == 0 for row in seen.values()), "the draft now sees"
assert seen["copy, text"]["target"] == 4 and seen["copy, picture"]["target"] > 18, "drafts of a copy are now accepted"
PY
