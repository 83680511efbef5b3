#!/usr/bin/env bash
# Library: transformers 5.23.0, hqq 0.2.8.post1, optimum-quanto 0.2.7
# Guess:   a quantized cache takes any number of KV heads where the group (64) divides the head size (64), and any
#          prompt.
# Happens: groups are counted over the whole tensor (batch x heads x tokens x head size), and hqq packs them in twos at
#          4 bits. With an odd number of KV heads, as a cut of heads leaves it (or SmolLM2's 3), every prompt of an odd
#          length raises "The size of tensor a must match"; even lengths, or two rows at once, are fine. quanto takes
#          both. With a head size that the group does not divide (40) both raise or not by the length of the prompt.
# Do:      test quantized caches at odd and even prompts; keep an even number of KV heads for hqq, or use quanto.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
pins=(torch==2.13.0 transformers==5.23.0 hqq==0.2.8.post1 optimum-quanto==0.2.7)
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

logging.disable(logging.WARNING)
import torch
from transformers import LlamaConfig, LlamaForCausalLM

AXES = {"hqq": dict(axis_key=1, axis_value=1), "quanto": {}}


def generated(backend, heads, head_dim=64, rows=1):
    "For prompts of 4 to 11 tokens: does generation end?"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=12 * heads,
        intermediate_size=48,
        num_hidden_layers=2,
        head_dim=head_dim,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    cache = dict(backend=backend, nbits=4, q_group_size=64, residual_length=8, **AXES[backend])
    ends = {}
    for length in range(4, 12):
        ids = torch.arange(3, 3 + length).repeat(rows, 1)
        try:
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=6,
                do_sample=False,
                cache_implementation="quantized",
                cache_config=cache,
            )
            ends[length] = "ok" if out.shape[1] == length + 6 else "short"
        except (RuntimeError, ValueError, AssertionError) as e:
            ends[length] = type(e).__name__
    return ends


cases = {
    "hqq, 4 heads": ("hqq", 4),
    "hqq, 3 heads": ("hqq", 3),
    "hqq, 3 heads, 2 rows": ("hqq", 3, 64, 2),
    "quanto, 3 heads": ("quanto", 3),
    "hqq, 4 heads of 40": ("hqq", 4, 40),
    "quanto, 4 heads of 40": ("quanto", 4, 40),
}
seen = {name: generated(*case) for name, case in cases.items()}
for name, row in seen.items():
    print(f"{name:22}", row)
for name in ("hqq, 4 heads", "hqq, 3 heads, 2 rows", "quanto, 3 heads"):
    assert set(seen[name].values()) == {"ok"}, name
assert seen["hqq, 3 heads"] == {n: "RuntimeError" if n % 2 else "ok" for n in range(4, 12)}, (
    "odd numbers of heads now work"
)
for name in ("hqq, 4 heads of 40", "quanto, 4 heads of 40"):
    assert "ok" in seen[name].values() and len(set(seen[name].values())) > 1, "the length no longer decides"
PY
