#!/usr/bin/env bash
# Library: lm-eval 0.4.13
# Guess:   `use_cache`, the file of answers that is to save a second run, tells models apart: one name serves the whole
#          model and its pruned copies.
# Happens: an answer is found by its question alone. Evaluated with the same `use_cache` after the whole model, the
#          pruned one gets the whole one's log-likelihoods, digit by digit, under its own name and its own number of
#          parameters: pruning seems to cost nothing.
# Do:      a cache file for each checkpoint (and each state of it), or none where models are compared.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
pins=(torch==2.13.0 transformers==5.23.0 lm_eval==0.4.13 datasets==5.2.0 accelerate==1.15.0)
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
import json
import logging
import random
from pathlib import Path

import datasets
import torch
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

logging.disable(logging.WARNING)
datasets.disable_progress_bars()
words = {"<unk>": 0, "<eos>": 1, **{f"w{i}": i + 2 for i in range(62)}}
tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")
draw = random.Random(0)


def some(n):
    return [f"w{draw.randrange(62)}" for _ in range(n)]


rows = [dict(question=" ".join(some(5)), choices=some(4), answer=draw.randrange(4)) for _ in range(40)]
Path("tasks").mkdir()
Path("tasks/rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
Path("tasks/toy.yaml").write_text(f"""task: toy
dataset_path: json
dataset_kwargs: {{data_files: {{test: {Path("tasks/rows.jsonl").resolve()}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
""")
torch.manual_seed(0)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        initializer_range=0.3,
    )
)
for name, layers in (("whole", 4), ("pruned", 1)):
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:layers], layers
    model.save_pretrained(name)
    tokenizer.save_pretrained(name)


def evaluated(name, cache):
    out = simple_evaluate(
        model="hf",
        model_args=dict(pretrained=name),
        tasks=["toy"],
        use_cache=cache,
        bootstrap_iters=0,
        device="cpu",
        batch_size=8,
        task_manager=TaskManager(include_path="tasks", include_defaults=False),
    )
    likelihoods = [float(choice[0][0]) for row in out["samples"]["toy"] for choice in row["resps"]]
    return likelihoods, dict(acc=out["results"]["toy"]["acc,none"], parameters=out["config"]["model_num_parameters"])


seen = {(name, cache): evaluated(name, cache) for cache in (None, "answers") for name in ("whole", "pruned")}
for (name, cache), (likelihoods, row) in seen.items():
    print(f"{name:7} use_cache={cache!s:8}", row, "first likelihoods", [round(x, 3) for x in likelihoods[:3]])
gap = max(abs(a - b) for a, b in zip(seen["whole", None][0], seen["pruned", None][0]))
print("largest difference of the two models without a cache:", round(gap, 3))
assert gap > 0.1
assert seen["pruned", "answers"][0] == seen["whole", "answers"][0], "the cache now tells models apart"
assert seen["pruned", "answers"][1]["parameters"] < seen["whole", "answers"][1]["parameters"]
PY
