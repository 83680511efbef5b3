"README.md is the index notebook, and what it links to exists."

import json
import re
import sys

from conftest import none_found
from guards import NBS, ROOT, links

sys.path.insert(0, str(ROOT / 'docs'))
import readme

README = ROOT / 'README.md'


def test_readme_is_the_index():
    want, have = readme.render().splitlines(), README.read_text(encoding='utf-8').splitlines()
    pairs = enumerate(zip(have, want), 1)
    faults = [f'line {i}: {a!r}, where index.ipynb gives {b!r}' for i, (a, b) in pairs if a != b]
    none_found(faults, 'README.md is out of step with nbs/index.ipynb: run `python docs/readme.py`')
    assert len(have) == len(want)


def test_links():
    found = links(README.read_text(encoding='utf-8'))
    assert len(found) > 20
    none_found([o for o in found if not (ROOT / o).exists()], 'README.md links to what does not exist:')


def test_links_are_found():
    text = (
        'A [link](a.md#part) and ![picture](figures/b.png "title"), <img src="c.png">; '
        'not [web](https://x.y), [here](#part), `[no](code.md)`.'
    )
    assert links(text) == ['a.md', 'figures/b.png', 'c.png']


def words_of_prose(text):
    "Words of a page outside of code and tables."
    text = re.sub(r'^```.*?^```', '', text, flags=re.M | re.S)
    return sum(len(line.split()) for line in text.splitlines() if not line.startswith('|'))


def test_a_newcomer_can_read_them_in_one_sitting():
    assert words_of_prose(README.read_text(encoding='utf-8')) <= 900
    cells = json.loads((NBS / '00_tour.ipynb').read_text(encoding='utf-8'))['cells']
    assert sum(len(''.join(c['source']).split()) for c in cells if c['cell_type'] == 'markdown') <= 900


def test_every_notebook_is_on_the_reading_list():
    text = README.read_text(encoding='utf-8')
    listed = json.loads((NBS / 'chapters.json').read_text())
    paths = [f'nbs/{c}/{n}.ipynb'.replace('//', '/') for c, names in listed.items() for n in names]
    none_found([p for p in paths if p not in text], 'README.md does not list:')
    at = [text.index(p) for p in paths if not re.search(rf'{re.escape(p)}.*{re.escape(p)}', text, re.S)]
    assert at == sorted(at), 'the reading list is not in the order of nbs/chapters.json'


def test_findings_are_listed_and_held_by_tests():
    folder, defined = ROOT / 'findings', set()
    for path in (ROOT / 'tests').glob('test_*.py'):
        defined |= set(re.findall(r'^def (test_\w+)', path.read_text(encoding='utf-8'), re.M))
    rows = [line.split(' | ') for line in (folder / 'README.md').read_text(encoding='utf-8').splitlines()[6:]]
    rows = [row for row in rows if row[0].startswith('| `')]
    assert [row[0].strip('| `') for row in rows] == list(dict.fromkeys(row[0].strip('| `') for row in rows))
    assert {row[0].strip('| `') for row in rows} == {path.stem for path in folder.glob('*.sh')}
    none_found([row[0] for row in rows if len(row) != 6 or not row[5].strip('| ')], 'rows that leave a column empty:')
    none_found([row[0] for row in rows if '`test_' not in row[5]], 'rows that name no test:')
    named = {name for row in rows for name in re.findall(r'`(test_\w+)`', row[5])}
    none_found(sorted(named - defined), 'tests that are not there:')
    for path in folder.glob('*.sh'):
        text = path.read_text(encoding='utf-8')
        parts = [text.find(f'\n# {word}:') for word in ('Library', 'Guess', 'Happens', 'Do')]
        assert -1 < parts[0] < parts[1] < parts[2] < parts[3] and 'assert ' in text and '==' in text, path.name
        assert 'set -euo pipefail' in text and 'lvlm_study' not in text, path.name
