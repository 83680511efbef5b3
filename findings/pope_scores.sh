#!/usr/bin/env bash
# Library: lmms-eval 0.7.3 (task `pope`)
# Guess:   an answer to a yes question that is neither "yes" nor "no" counts as a miss in recall and F1, and the yes
#          ratio is the share of "yes" among the answers.
# Happens: such answers are left out of precision, recall and F1: a model that says "yes" once, rightly, and writes
#          nonsense otherwise has F1 1.0 at an accuracy of .01. "Yes." with a period is such an answer too (accuracy 0).
#          The yes ratio counts the true answers: it is that of the data for every model.
# Do:      report accuracy with the share of answers that are "yes" or "no"; never F1 alone for models that may have
#          lost the form of the answer; compute the yes ratio from the samples.
set -euo pipefail
tmp=$(mktemp -d); trap 'rm -rf "$tmp"' EXIT
pins=(lmms-eval==0.7.3)
py=${FINDINGS_VENV:+$(cd "$FINDINGS_VENV" && pwd)/bin/python}
if [ -z "$py" ]; then
  python3 -m venv "$tmp/venv"; py=$tmp/venv/bin/python
  "$py" -m pip install -q --no-deps "${pins[@]}"
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
import importlib.util
import sysconfig

path = sysconfig.get_paths()["purelib"] + "/lmms_eval/tasks/pope/utils.py"  # the file alone: the package wants torch
spec = importlib.util.spec_from_file_location("pope", path)
pope = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pope)
truth = ["yes", "no"] * 50


def score(answers):
    rows = [
        pope.pope_process_results({"answer": t, "question_id": i}, [a]) for i, (t, a) in enumerate(zip(truth, answers))
    ]
    names = {k: "pope_aggregate_" + k.removeprefix("pope_") for k in rows[0]}
    return {k: round(getattr(pope, f)([r[k] for r in rows]), 3) for k, f in names.items()}


seen = {
    "always right": score(truth),
    "always yes": score(["yes"] * 100),
    "always no": score(["no"] * 100),
    "one yes, else nonsense": score(["yes"] + ["the the the"] * 99),
    "right, with a period": score([t.capitalize() + "." for t in truth]),
}
for name, row in seen.items():
    print(f"{name:22}", row)
nonsense = seen["one yes, else nonsense"]
assert (nonsense["pope_f1_score"], nonsense["pope_recall"], nonsense["pope_accuracy"]) == (1, 1, 0.01)
assert {row["pope_yes_ratio"] for row in seen.values()} == {0.5}, "the yes ratio now looks at the answers"
assert seen["right, with a period"]["pope_accuracy"] == 0
PY
