"README.md is the index notebook, and what it links to exists."
import importlib
import pytest
from conftest import none_found
from guards import NBS, ROOT, links

README,INDEX = ROOT/'README.md', NBS/'index.ipynb'

def rendered():
    "What `lvlm_study.study.readme()` makes of the index; skips until there is one."
    if not (ROOT/'lvlm_study'/'study.py').exists(): pytest.skip('lvlm_study.study does not exist yet')
    readme = getattr(importlib.import_module('lvlm_study.study'), 'readme', None)
    if readme is None: pytest.skip('lvlm_study.study.readme does not exist yet')
    return readme()

def test_readme_is_the_index():
    want = rendered()
    have = README.read_text(encoding='utf-8')
    diff = next((f'line {i}: {a!r}, where index.ipynb gives {b!r}' for i,(a,b) in enumerate(zip(have.splitlines(), want.splitlines()), 1) if a!=b), 'the lengths differ')
    none_found([diff] if have!=want else [], 'README.md is out of step with nbs/index.ipynb:')

def test_links():
    if not README.exists() and not INDEX.exists(): pytest.skip('README.md does not exist yet')
    none_found([o for o in links(README.read_text(encoding='utf-8')) if not (ROOT/o).exists()], 'README.md links to what does not exist:')

def test_links_are_found():
    text = 'A [link](a.md#part) and ![picture](figures/b.png "title"), <img src="c.png">; not [web](https://x.y), [here](#part), `[no](code.md)`.'
    assert links(text) == ['a.md', 'figures/b.png', 'c.png']
