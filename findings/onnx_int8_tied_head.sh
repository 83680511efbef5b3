#!/usr/bin/env bash
# Library: torch 2.13.0 (torch.onnx.export), onnx 1.23.2, onnxscript 0.7.2, onnxruntime 1.32.0
# Guess:   `quantize_dynamic` makes every product of an exported language model an INT8 one, the tied head, the largest
#          product of a small or pruned model, first of all.
# Happens: the exporter writes a tied weight once and transposes it for the head in the graph. The quantizer takes only
#          products whose weight is a stored tensor, so the head stays in float32, silently: the file shrinks to a
#          quarter, as the table of the embeddings (the same tensor) is INT8, and the head multiplies by that table,
#          widened again. An untied copy of the same model has an INT8 head, and its table twice. New beside the known
#          trouble with a tied head in a quantizer: the head is left out of it, though the file shrinks all the same.
# Do:      count the `MatMulInteger` nodes; untie before the export where the head is to be INT8, and compare logits.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
pins=(torch==2.13.0 onnx==1.23.2 onnxscript==0.7.2 onnxruntime==1.32.0)
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
import os
import warnings

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from torch import nn

heard = []  # what the loggers and Python's warnings say
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: heard.append(record.getMessage())
for name in (None, "torch", "torch.onnx"):
    logging.getLogger(name).addHandler(handler)
logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)  # torchvision is not needed
warnings.simplefilter("always")
warnings.showwarning = lambda message, *args, **kwargs: heard.append(str(message))
VOCABULARY, HIDDEN, WIDTH = 4000, 64, 96


class TinyLM(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, HIDDEN)
        self.up, self.down = nn.Linear(HIDDEN, WIDTH, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.head.weight = self.embeddings.weight if tied else nn.Parameter(self.embeddings.weight.detach().clone())

    def forward(self, ids):
        x = self.embeddings(ids)
        return self.head(x + self.down(torch.relu(self.up(x))))


ids = torch.randint(0, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))


def exported(tied):
    torch.manual_seed(0)
    model = TinyLM(tied).eval()
    torch.onnx.export(model, (ids,), "float.onnx", input_names=["ids"], dynamo=True, external_data=False, verbose=False)
    quantize_dynamic("float.onnx", "int8.onnx", weight_type=QuantType.QInt8)
    nodes = onnx.load("int8.onnx").graph.node
    makers = {name: node for node in nodes for name in node.output}

    def chain(name):
        "The operations that make a tensor, back to what is stored."
        return [makers[name].op_type, *chain(makers[name].input[0])] if name in makers else []

    logits = [
        onnxruntime.InferenceSession(name, providers=["CPUExecutionProvider"]).run(None, {"ids": ids.numpy()})[0]
        for name in ("float.onnx", "int8.onnx")
    ]
    floats = [node for node in nodes if node.op_type == "MatMul"]
    return dict(
        megabytes=[round(os.path.getsize(name) / 1e6, 2) for name in ("float.onnx", "int8.onnx")],
        int8_products=sum(node.op_type == "MatMulInteger" for node in nodes),
        float_products=len(floats),
        weight_of_float_product=[sorted(chain(node.input[1])) for node in floats],
        error=round(float(np.abs(logits[1] - logits[0]).max() / np.abs(logits[0]).max()), 3),
    )


seen = {tied: exported(tied) for tied in (True, False)}
for tied, row in seen.items():
    print("tied  " if tied else "untied", row)
words = ("matmul", "transpose", "head", "tied", "float")
about = [text for text in heard if any(word in text.lower() for word in words)]
print("warnings:", sorted({text.strip()[:80] for text in heard}) or "none")
assert not about, "it now warns"
tied, untied = seen[True], seen[False]
assert (tied["int8_products"], tied["float_products"]) == (2, 1), "the head is INT8 now"
assert tied["weight_of_float_product"] == [["DequantizeLinear", "Transpose"]]
assert (untied["int8_products"], untied["float_products"]) == (3, 0)
assert tied["megabytes"][1] < 0.3 * tied["megabytes"][0] and untied["megabytes"][1] > 1.8 * tied["megabytes"][1]
PY
