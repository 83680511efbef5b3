"""Stored rows of the first layout in the words of this one: `python tests/migrate_results.py OLD_FOLDER NEW_FOLDER`.

What one word (`note`) said of what was computed stands in typed fields of `Run` now; names follow the tour's glossary.
No value is touched: every number and text is compared before and after, and every key with the one of its run."""

import json
import re
import sys
from pathlib import Path

BY_NOTE = {
    '': {},
    'text only': dict(use_images=False),
    'same size': dict(size_match=True),
    'equal steps': dict(budget='steps'),
    'drifting teacher': dict(teacher='drifting'),
    'own teacher': dict(teacher='own'),
}
RUN_NAMES = dict(recovery='recipe', trains='trainable', rev='revision')
METRIC_NAMES = dict(
    realised_lm='actual_ratio',
    realised_lvlm='actual_ratio_lvlm',
    MB='megabytes_16bit',
    training_secs='training_seconds',
)
# Words inside the names of what benchmarks measured.
METRIC_WORDS = dict(block='layer', blocks='layers', secs='seconds', realised='actual_ratio')
TEXT_NAMES = dict(blocks='num_layers')
WORDS = {
    r'\bblock(s?)\b': r'layer\1',
    r'^(\d+) heads in (\d+) groups, (\d+) channels': r'\1 query heads in \2 KV heads, \3 MLP channels',
}
RECIPE_NAMES = {'sft+blocks': 'sft+layers'}
KIND_NAMES = dict(blocks='layers', heads='kv_heads', channels='mlp_channels')


def new_run(old):
    "The fields of a run in today's words."
    run = {RUN_NAMES.get(k, k): v for k, v in old.items() if k != 'note'}
    run['recipe'] = RECIPE_NAMES.get(run['recipe'], run['recipe'])
    typed = BY_NOTE.get(old['note'], dict(purpose=old['note']))
    return dict(budget='epochs', size_match=False, use_images=True, teacher='original', purpose='') | run | typed


def new_name(name):
    "The name of a curve: kinds of groups have other names."
    return ' '.join(KIND_NAMES.get(word, word) for word in name.split(' '))


def new_metric(name):
    "The name of a metric: whole names first, then words between underscores."
    return METRIC_NAMES.get(name) or '_'.join(METRIC_WORDS.get(word, word) for word in new_name(name).split('_'))


def new_text(text):
    "A stored sentence in the words of the glossary."
    for old, new in WORDS.items():
        text = re.sub(old, new, text)
    return text


def new_row(old, key_of):
    "A row in today's words; `key_of` gives the key of a run."
    row = {k: v for k, v in old.items() if k not in ('run', 'key', 'secs')}
    row['run'] = new_run(old['run'])
    row['key'] = key_of(row['run'])
    row['seconds'] = old['secs']
    if 'metrics' in row:
        row['metrics'] = {new_metric(k): v for k, v in old['metrics'].items()}
    if 'curves' in row:
        row['curves'] = {new_name(k): v for k, v in old['curves'].items()}
    if 'text' in row:
        row['text'] = {TEXT_NAMES.get(k, k): new_text(v) for k, v in old['text'].items()}
    return row


def values(row):
    "Every number of a row and every text, the latter in the words of the glossary."
    parts = [list(row.get(k, {}).values()) for k in ('metrics', 'curves')]
    return json.dumps(
        [
            *parts,
            [new_text(v) for v in row.get('text', {}).values()],
            row.get('error'),
            row.get('secs', row.get('seconds')),
            row['env'],
        ],
        sort_keys=True,
    )


def main(old_folder, new_folder):
    from lvlm_study.core.store import Run

    new_folder = Path(new_folder)
    new_folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(old_folder).glob('*.jsonl')):
        old = [json.loads(line) for line in path.read_text().splitlines()]
        new = [new_row(r, lambda run: Run(**run).key) for r in old]
        assert [values(r) for r in old] == [values(r) for r in new], f'{path.name}: a value changed'
        assert len({r['key'] for r in new}) == len(old), f'{path.name}: two runs have one key now'
        lines = [json.dumps(r, sort_keys=True) + '\n' for r in sorted(new, key=lambda r: r['key'])]
        (new_folder / path.name).write_text(''.join(lines))
        print(f'{path.name}: {len(new)} rows, every value unchanged, every key recomputed')


if __name__ == '__main__':
    main(*sys.argv[1:])
