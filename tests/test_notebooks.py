"Every notebook keeps to the rules of guards.py."
import pytest
from conftest import none_found
from guards import FIGURES, GUARDS, NBS, ROOT, figures_in_step, notebooks, one_module_each

ALL = notebooks()

def test_there_are_notebooks(): assert ALL, f'no notebooks in {NBS.name}/'

@pytest.mark.parametrize('guard', GUARDS, ids=lambda g: g.__name__)
@pytest.mark.parametrize('nb', ALL, ids=lambda nb: nb.name)
def test_form(nb, guard):
    none_found(guard(nb), f'{nb.path.name}: {guard.__doc__}')

def test_one_module_each(): none_found(one_module_each(ALL), one_module_each.__doc__)

def test_figures_in_step(): none_found(figures_in_step(ALL), figures_in_step.__doc__)

def test_figures_are_small():
    sizes = {p.name: p.stat().st_size for p in FIGURES.iterdir()}
    assert sum(sizes.values()) <= 5_000_000, f'figures/ holds {sum(sizes.values())/1e6:.1f} MB; 5 is the most'

def test_figures_are_seen_from_notebooks():
    assert (NBS/'figures').resolve() == FIGURES, 'nbs/figures should be a link to ../figures, so that README and index share their paths'
    assert (ROOT/'figures').is_dir()
