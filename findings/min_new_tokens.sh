#!/usr/bin/env bash
# Library: transformers 5.23.0 (torch 2.13.0)
# Guess:   `min_new_tokens=n` only keeps `generate` from stopping: with `do_sample=False` each token is still the likeliest.
# Happens: it (and `min_length`) sets the score of the end token to minus infinity, so from the first place where the end token is
#          the likeliest another one is written, and all after it differs: comparing greedy text or tokens with another engine,
#          or a pruned model with the unpruned one, at equal length compares something else. `eos_token_id=-1` switches stopping
#          off and leaves the scores alone.
# Do:      `generate(..., max_new_tokens=n, eos_token_id=-1)` where words are compared; `min_new_tokens` only for timing.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
py=${FINDINGS_VENV:+$FINDINGS_VENV/bin/python}
if [ -z "$py" ]; then
  python3 -m venv "$tmp/venv"; py=$tmp/venv/bin/python
  "$py" -m pip install -q torch==2.13.0 transformers==5.23.0
fi
export HF_HUB_OFFLINE=1 HF_HOME=$tmp TRANSFORMERS_VERBOSITY=error PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
cd "$tmp"
"$py" - <<'PY'
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

print("transformers", transformers.__version__)
END, N = 2, 32
torch.manual_seed(0)
config = LlamaConfig(vocab_size=16, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                     bos_token_id=1, eos_token_id=END, pad_token_id=0)
model = LlamaForCausalLM(config).eval()
for p in model.parameters():
    if p.dim() > 1:
        torch.nn.init.normal_(p, std=0.3)
ids = torch.tensor([[1, 5, 6, 7]])
words = ids
with torch.no_grad():
    for _ in range(N):
        words = torch.cat([words, model(words).logits[:, -1:].argmax(-1)], 1)
likeliest = words[0, 4:].tolist()
first_end = likeliest.index(END)
print("likeliest token each time:", likeliest, "| first end token at", first_end)

seen = {}
for name, settings in {"nothing set": {}, "min_new_tokens=32": dict(min_new_tokens=N), "min_length=36": dict(min_length=N + 4),
                       "eos_token_id=-1": dict(eos_token_id=-1)}.items():
    out = model.generate(ids, max_new_tokens=N, do_sample=False, return_dict_in_generate=True, output_scores=True,
                         output_logits=True, **settings)
    got = out.sequences[0, 4:].tolist()
    same = next((i for i, (a, b) in enumerate(zip(got, likeliest)) if a != b), len(got))
    end = [f"{out[kind][0][0, END].item():.2f}" for kind in ("logits", "scores")]
    seen[name] = dict(tokens=len(got), alike_up_to=same, end_tokens=got.count(END), logit_and_score_of_end=end)
    print(name, "|", seen[name])

assert seen["nothing set"]["tokens"] == seen["nothing set"]["alike_up_to"] == first_end + 1 < N
for name in ("min_new_tokens=32", "min_length=36"):
    row = seen[name]
    assert (row["tokens"], row["alike_up_to"], row["end_tokens"]) == (N, first_end, 0), "the end token is no longer forbidden"
    assert row["logit_and_score_of_end"][1] == "-inf" != row["logit_and_score_of_end"][0]
assert seen["eos_token_id=-1"]["alike_up_to"] == N and seen["eos_token_id=-1"]["end_tokens"] == likeliest.count(END)
PY
