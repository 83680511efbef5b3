#!/usr/bin/env bash
# What `make test` runs. It reads the work tree and leaves it as it was: export and clean are tried on a copy.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH" MPLBACKEND=Agg TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1
unset IN_TEST
workers=2
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
export LVLM_FIGURES="$copy/figures"   # what tests draw does not go into the repository

part() { printf '\n== %s\n' "$1"; start=$SECONDS; }
took() { printf -- '-- %s s\n' $((SECONDS - start)); }
fail() { printf '%s\n' "$*" >&2; exit 1; }
changed() { # changed FILE...: is any of them different in the copy? Shows how.
  local f bad=0
  for f in "$@"; do
    cmp -s "$f" "$copy/$f" && continue
    bad=1; diff -N -u --label "$f (now)" --label "$f (would be)" "$f" "$copy/$f" | cut -c1-200 | head -30 || true
  done
  [ $bad = 1 ]
}
modules() { { find lvlm_study -name '*.py'; cd "$copy"; find lvlm_study -name '*.py'; } | sort -u; }
tree() { cksum figures/* nbs/results/* 2>/dev/null; find nbs lvlm_study figures -type f -not -path '*/__pycache__/*' -not -path '*/.*' | sort; }

part "export changes nothing"
find nbs -name '*.ipynb' -not -path '*/.*' | tar -cf - settings.ini lvlm_study/__init__.py -T - | tar -xf - -C "$copy"
(cd "$copy" && nbdev_export)
if changed $(modules); then
  fail "The package is out of step with the notebooks. Run nbdev_export; a module that no notebook exports has to go."
fi
took

part "clean changes nothing"
(cd "$copy" && nbdev_clean)
if changed $(find nbs -name '*.ipynb' -not -path '*/.*'); then fail "Notebooks carry noise. Run nbdev_clean."; fi
took

part "ruff"
ruff check -q --no-cache --output-format concise --select F lvlm_study
took

part "nbdev_test"
before=$(tree)
OMP_NUM_THREADS=$(python -c "import os; print(max(1, (os.cpu_count() or 1)//$workers))") \
  nbdev_test --n_workers $workers --do_print --timing
diff <(echo "$before") <(tree) || fail "Running the notebooks changed these files."
took

part "pytest"
# one thread a worker: the models are too small for two to share the work
OMP_NUM_THREADS=1 python -m pytest tests -q -n $workers --dist loadfile --ignore tests/test_browser.py --ignore tests/test_docs.py --durations 5
took

part "site and browser"
python -m pytest tests/test_docs.py tests/test_browser.py -q -rs
took
