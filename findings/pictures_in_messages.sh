#!/usr/bin/env bash
# Library: datasets 5.2.0
# Guess:   pictures inside chat messages become picture columns like those in a column of their own, and come back as
#          pictures; message parts come back with the keys they had.
# Happens: a picture within a message is stored as a plain structure and comes back as {"path": None, "bytes": ...}; the
#          same picture in a column of its own, alone or in a list, comes back decoded. Every part gets the keys of all
#          parts: a text part now has `image: None`. With the features written out the pictures are decoded; the None
#          keys stay.
# Do:      keep pictures in a column of their own and only markers in the messages, or write the features out; drop None
#          keys before a chat template is applied, which may test for the key alone.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
pins=(datasets==5.2.0 pillow==13.0.0 jinja2==3.1.6)
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
from datasets import Dataset, Features, Image, List, Value
from jinja2 import Template
from PIL import Image as Picture

picture = Picture.new("RGB", (16, 16), "red")
messages = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]}]
plain = Dataset.from_list([{"messages": messages, "images": [picture], "image": picture}])
part = Features({"type": Value("string"), "text": Value("string"), "image": Image()})
written = Features({"messages": List({"role": Value("string"), "content": List(dict(part))})})
explicit = Dataset.from_list([{"messages": messages}], features=written)


def kind(x):
    return (
        "picture"
        if isinstance(x, Picture.Image)
        else type(x).__name__ + (str(sorted(x)) if isinstance(x, dict) else "")
    )


parts = plain[0]["messages"][0]["content"]
seen = {
    "in a message": kind(parts[0]["image"]),
    "in a list": kind(plain[0]["images"][0]),
    "alone": kind(plain[0]["image"]),
    "in a message, features written out": kind(explicit[0]["messages"][0]["content"][0]["image"]),
}
for where, what in seen.items():
    print(f"{where}: {what}")
by_key = Template("{% for c in content %}{% if 'image' in c %}<image>{% else %}{{ c['text'] }}{% endif %}{% endfor %}")
asked, got = by_key.render(content=messages[0]["content"]), by_key.render(content=parts)
print("text part:", parts[1], "| a template that tests for the key:", asked, "->", got)
assert list(seen.values()) == ["dict['bytes', 'path']", "picture", "picture", "picture"], (
    "nested pictures are now decoded"
)
assert parts[1]["image"] is None and (asked, got) == ("<image>What is it?", "<image><image>")
PY
