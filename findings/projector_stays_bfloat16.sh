#!/usr/bin/env bash
# Library: peft 0.21.2 (transformers 5.23.0)
# Guess:   on a bfloat16 LLaVA, LoRA matrices and the projector trained beside them (`modules_to_save`) get one type:
#          float32.
# Happens: the LoRA matrices are float32, the copy of the projector stays bfloat16. At the usual learning rate of 2e-5
#          most of its weights do not move at all: the step is less than half of the gap between two bfloat16 numbers.
# Do:      cast what is in `modules_to_save` to float32 before the optimizer is made, and train under autocast.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
pins=(torch==2.13.0 transformers==5.23.0 peft==0.21.2 pillow==13.0.0)
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
from peft import LoraConfig, get_peft_model
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

vision = CLIPVisionConfig(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
    projection_dim=16,
)
text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
ids = torch.tensor([[3] + [5] * 4 + [7, 8, 9]])
pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def step(cast):
    "Types of what is trained, and the share of weights that one step of AdamW moves."
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=5))
    tuned = get_peft_model(
        model.to(torch.bfloat16),
        LoraConfig(r=2, target_modules=r".*language_model.*(q_proj|v_proj)", modules_to_save=["multi_modal_projector"]),
    )
    trained = {n: p for n, p in tuned.named_parameters() if p.requires_grad}
    if cast:
        for name, p in trained.items():
            p.data = p.data.float()
    types = {part: {str(p.dtype) for n, p in trained.items() if part in n} for part in ("lora_", "projector")}
    before = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=2e-5, weight_decay=0)
    with torch.autocast("cpu", torch.bfloat16):
        tuned(input_ids=ids, pixel_values=pixels.bfloat16(), labels=ids).loss.backward()
    optimizer.step()
    matrix = "multi_modal_projector.modules_to_save.default.linear_2.weight"
    moved = {n: (p != before[n]).float().mean().item() for n, p in trained.items()}
    return types, next(v for n, v in moved.items() if n.endswith(matrix))


types, moved = step(cast=False)
print("types:", types, "| projector weights moved by one step:", f"{moved:.0%}")
types32, moved32 = step(cast=True)
print("types:", types32, "| projector weights moved by one step:", f"{moved32:.0%}")
assert types == {"lora_": {"torch.float32"}, "projector": {"torch.bfloat16"}}, "the types are one now"
assert moved < 0.5 < 0.95 < moved32
PY
