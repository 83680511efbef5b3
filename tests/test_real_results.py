"Scores above two floors, and pictures against language: on rows made for the purpose."

import numpy as np
import pytest
from lvlm_study.evaluation.verdicts import pack_correct
from lvlm_study.study import real_results
from lvlm_study.study.real_results import damage_table, floor_sentence, floor_table, margin_above, right_by_split

SPLITS = dict(GQA=90, POPE=60)


def answers(shares, seed=0):
    "Right and wrong answers of each split, with given shares"
    draw = np.random.default_rng(seed)
    return {name: draw.permutation(np.arange(n) < round(shares[name] * n)) for name, n in SPLITS.items()}


def row(right, suite='plain', method='none', ratio=0.0, seed=0, use_images=True, perplexity=20.0, calibration=50):
    "A stored row with some answers"
    run = dict(model='smol-llava', suite=suite, purpose='', method=method, ratio=ratio, seed=seed)
    run |= dict(calibration=calibration)
    run |= dict(use_images=use_images, recipe='none', criterion=dict(layer='bi', width='taylor').get(method, 'bi'))
    curves = dict(correct=pack_correct(np.concatenate([*right.values()])))
    curves |= dict(chance=dict(GQA=20.0, POPE=50.0, TextQA=25.0))
    curves |= dict(splits=[[name, len(part)] for name, part in right.items()])
    return dict(run=run, curves=curves, metrics=dict(perplexity_reference=perplexity, perplexity_chat=perplexity))


def text_row(share, **fields):
    "A row of questions that need no picture"
    return row(dict(TextQA=np.arange(100) < 100 * share), suite='textqa', **fields)


@pytest.fixture
def store(monkeypatch):
    "A store that holds what a test puts in"
    rows = []

    def read(experiment):
        return {str(i): r for i, r in enumerate(rows)} if experiment == 'layer_pruning' else {}

    monkeypatch.setattr(real_results, 'read_rows', read)
    return rows


def test_splits_come_back_as_they_were_stored():
    right = answers(dict(GQA=0.5, POPE=0.7))
    found = right_by_split(row(right))
    assert list(found) == list(right)
    assert all((found[name] == right[name]).all() for name in right)


def test_the_higher_floor_counts(store):
    store += [row(answers(dict(GQA=0.6, POPE=0.55))), row(answers(dict(GQA=0.4, POPE=0.3)), use_images=False)]
    floors = floor_table()
    assert floors.loc['GQA', 'margin'] == pytest.approx(20, abs=1.2)  # above what it answers without pictures
    assert floors.loc['POPE', 'margin'] == pytest.approx(5, abs=1.2)  # above half, which guessing gets
    said = floor_sentence(floors)
    assert 'on 1 of 2 splits (GQA)' in said and 'not shown to be on POPE' in said


def test_nothing_stored_is_an_empty_table(store):
    assert not len(floor_table()) and not len(damage_table()) and floor_sentence(floor_table()) == ''


@pytest.mark.parametrize('n', [20, 200])
def test_more_questions_give_a_narrower_margin(n):
    right = np.arange(n) < 0.8 * n
    _, low, high = margin_above(right, None, 25)
    _, low2, high2 = margin_above(np.tile(right, 4), None, 25)
    assert high2 - low2 < 0.7 * (high - low)


def damaged(pictures, language, seeds):
    "Rows of a whole model and of a pruned one, a seed each"
    whole = [row(answers(dict(GQA=0.9, POPE=0.95))), text_row(0.9)]
    for seed in range(seeds):
        shares = dict(GQA=pictures, POPE=pictures)
        whole.append(row(answers(shares, seed), method='layer', ratio=0.3, seed=seed, perplexity=60.0))
        whole.append(text_row(language, method='layer', ratio=0.3, seed=seed))
    return whole


def test_pictures_that_suffer_more_are_a_finding_with_three_seeds(store):
    store += damaged(0.6, 0.88, 3)
    line = damage_table().loc[('layer', 0.3)]
    assert line.gap > 0 and line.verdict == 'holds' and line.low > 0
    assert line.reference == pytest.approx(3)


def test_language_that_suffers_more_is_the_reverse(store):
    store += damaged(0.9, 0.4, 3)
    assert damage_table().loc[('layer', 0.3)].verdict == 'reversed'


def test_models_pruned_on_fewer_samples_are_not_mixed_in(store):
    store += damaged(0.6, 0.88, 3)
    before = damage_table()
    fewer = dict(method='layer', ratio=0.3, seed=1, calibration=10)
    store.append(row(answers(dict(GQA=0.1, POPE=0.1), 1), perplexity=900.0, **fewer))
    store.append(text_row(0.1, **fewer))
    assert damage_table().equals(before)


def test_one_seed_is_never_a_finding(store):
    store += damaged(0.6, 0.88, 1)
    assert damage_table().loc[('layer', 0.3)].verdict == 'one seed'


def test_a_seed_that_lacks_one_of_both_is_left_out(store):
    store += damaged(0.6, 0.88, 3)
    store.pop()
    assert damage_table().loc[('layer', 0.3)].seeds == 2
