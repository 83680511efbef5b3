#!/usr/bin/env bash
# Library: torch 2.13.0 (FSDP2, `fully_shard` with a mixed precision policy; one process on CPU is enough to see it)
# Guess:   parts may be frozen and thawed between stages (first the projector, then the adapters) after the model was
#          sharded, because FSDP2 handles every parameter by itself.
# Happens: a group decides the type of its gradients at the first forward pass, from what is trainable then. A group
#          that was frozen as a whole at that time has none: as soon as it is thawed, the backward pass raises, with a
#          message about `grad_dtype` that names neither freezing nor FSDP. Without mixed precision the same two stages
#          work.
# Do:      make everything that is trained in any stage trainable, run one forward pass without gradients, then freeze
#          for stage one; or shard anew for each stage.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
pins=(torch==2.13.0 numpy==2.4.6)
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
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.base = nn.Linear(8, 8)
        self.adapter = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.base(x) + self.adapter(x)


def two_stages(first, second, mixed=True, warm_up=False):
    torch.manual_seed(0)
    model = nn.ModuleDict({"projector": nn.Linear(8, 8), "a": Block(), "b": Block()})
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()

    def train_only(part):
        for name, p in model.named_parameters():
            p.requires_grad_(part in name)
            p.grad = None

    def forward():
        x = torch.ones(4, 8)
        for module in model.values():
            x = module(x)
        return x.float().sum()

    train_only("" if warm_up else first)
    for module in model.values():
        fully_shard(module, mesh=mesh, mp_policy=policy)
    if warm_up:
        with torch.no_grad():
            forward()
    for part in (first, second):
        train_only(part)
        try:
            forward().backward()
        except RuntimeError as e:
            return f"stage {part!r} raises: {str(e)}"
    return "works"


seen = {
    "projector, then adapters": two_stages("projector", "adapter"),
    "adapters, then projector": two_stages("adapter", "projector"),
    "adapters in both stages": two_stages("adapter", "adapter"),
    "projector, then adapters, no mixed precision": two_stages("projector", "adapter", mixed=False),
    "projector, then adapters, all trainable at the first pass": two_stages("projector", "adapter", warm_up=True),
}
for name, text in seen.items():
    print(f"{name}: {text[:230]}")
dist.destroy_process_group()
raised = [text != "works" for text in seen.values()]
assert raised == [True, True, False, False, False], "another set of stages works now"
errors = [text for text in seen.values() if text != "works"]
assert all("grad_dtype" in text for text in errors), "it now raises otherwise"
assert not any("fsdp" in text.lower() or "requires_grad" in text for text in errors), "the message now names the cause"
PY
