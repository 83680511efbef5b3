"Metrics on the cases that go wrong, and evaluation that depends on nothing but model and questions."

import random
import numpy as np, pandas as pd, pytest
import torch, transformers, datasets
from PIL import Image
from lvlm_study.evaluation import evaluate as ev
from lvlm_study.evaluation.evaluate import (
    answer_questions,
    evaluate,
    question_table,
    read_records,
    suite_fingerprint,
    take_per_benchmark,
)
from lvlm_study.evaluation.grading import grade, pope_scores
from lvlm_study.evaluation.metrics import METRICS, PAIRED_BENCHMARKS, TOP_SCORE, scoring_units
from lvlm_study.evaluation.results import paper_table
from lvlm_study.evaluation.statistics import (
    average_score,
    benchmark_table,
    bootstrap,
    chance_floor,
    expected_interval_width,
    no_image_baselines,
    paired_retention,
    retention,
    retention_above_chance,
    retention_by_benchmark,
)
from lvlm_study.models.loading import fingerprint
from lvlm_study.evaluation.metrics import (
    anls,
    choice_letter,
    choice_score,
    edit_distance,
    exact_match,
    final_number,
    find_numbers,
    math_score,
    mme_scores,
    normalize_text,
    open_score,
    relaxed_accuracy,
    vqa_accuracy,
    yes_no,
)
from lvlm_study.models.architecture import LVLM
from lvlm_study.models.loading import load_lvlm
from lvlm_study.data.toy_benchmarks import small_suite

transformers.logging.set_verbosity_error()
GEMS = ['emerald', 'topaz', 'sapphire', 'amethyst']

# --- metrics ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'said, letter, strict',
    [
        ('B', 'B', 'B'),
        ('b', 'B', 'B'),
        (' B\n', 'B', 'B'),
        ('(B)', 'B', 'B'),
        ('B.', 'B', 'B'),
        ('B)', 'B', 'B'),
        ('[b]', 'B', 'B'),
        ('**B**', 'B', 'B'),
        ('（Ｂ）', 'B', 'B'),
        ('B. topaz', 'B', 'B'),
        ('(B) topaz', 'B', 'B'),
        ('b: topaz', 'B', 'B'),
        ('Topaz', 'B', 'B'),
        ('TOPAZ.', 'B', 'B'),
        ('"topaz"', 'B', 'B'),
        ('The answer is B', 'B', None),
        ('The answer is (B).', 'B', None),
        ('the answer is b', 'B', None),
        ('Answer: B', 'B', None),
        ('The correct option is B.', 'B', None),
        ('The answer is A because of its green', 'A', None),
        ('A or B', 'B', None),
        ('(A) is wrong, (B) is right', 'B', None),
        ('A B C D', 'D', None),
        ('A topaz is what I see', 'B', None),
        ('not emerald but topaz', 'B', None),
        ('it looks like topaz to me', 'B', None),
        ('the answer is a topaz', 'B', None),
        ('', None, None),
        ('   ', None, None),
        (None, None, None),
        ('E', None, None),
        ('ruby', None, None),
        ('Because', None, None),
        ('Cannot say', None, None),
        ('topazes', None, None),
    ],
)
def test_choice_letter(said, letter, strict):
    assert choice_letter(said, GEMS) == letter
    assert choice_letter(said, GEMS, strict=True) == strict


def test_choice_of_overlapping_options():
    assert choice_letter('I see dark red here', ['red', 'dark red']) == 'B'
    assert choice_letter('-3', ['3', '-3']) == 'B' and choice_letter('1.5', ['15', '1.5']) == 'B'
    assert choice_letter('A', ['B', 'A']) == 'A', 'letters go before texts'


def test_nothing_is_guessed_unless_seeded():
    assert choice_score('', 'B', GEMS) == 0
    a, b = ([choice_letter('', GEMS, guess=random.Random(s)) for s in range(40)] for _ in range(2))
    assert a == b and set(a) == set('ABCD')
    assert choice_letter('C', GEMS, guess=random.Random(0)) == 'C'
    assert choice_letter('B', []) is None


def test_choice_score():
    assert (
        choice_score('(b)', 'B', GEMS)
        == choice_score('topaz', 'B', GEMS)
        == choice_score('B', 'topaz', GEMS)
        == choice_score('C', ['B', 'C'], GEMS)
        == 1
    )
    assert choice_score('A', 'B', GEMS) == choice_score('', 'none of these', GEMS) == 0


@pytest.mark.parametrize(
    'said, mme, pope',
    [
        ('yes', 'yes', 'yes'),
        ('No', 'no', 'no'),
        ('YES.', 'yes', 'yes'),
        (' no\n', 'no', 'no'),
        ('y', 'yes', 'yes'),
        ('N', 'no', 'no'),
        ('Yes, it is', 'yes', 'other'),
        ('no it is not', 'no', 'other'),
        ('It is yes', 'other', 'other'),
        ('nothing', 'no', 'other'),
        ('', 'other', 'other'),
        (None, 'other', 'other'),
        ('x', 'other', 'other'),
    ],
)
def test_yes_no(said, mme, pope):
    assert (yes_no(said), yes_no(said, whole=True)) == (mme, pope)


def test_exact_match():
    assert [
        exact_match(s, 'teddy bear') for s in ('Teddy Bear.', ' teddy  bear ', 'teddy-bear', 'a teddy bear', 'bear', '')
    ] == [1, 1, 0, 0, 0, 0]
    assert exact_match('two', ['2', 'two']) == 1 and exact_match('', '') == exact_match('...', '!') == 0


@pytest.mark.parametrize(
    'a, b, d',
    [('', '', 0), ('abc', '', 3), ('', 'abc', 3), ('kitten', 'sitting', 3), ('flaw', 'lawn', 2), ('abc', 'abc', 0)],
)
def test_edit_distance(a, b, d):
    assert edit_distance(a, b) == edit_distance(b, a) == d


@pytest.mark.parametrize(
    'said, right, score',
    [
        ('hello', 'hello', 1),
        ('HELLO ', 'hello', 1),
        ('hallo', 'hello', 0.8),
        ('ab', 'abcd', 0.5),
        ('a', 'abcd', 0),
        ('', 'hello', 0),
        ('', '', 0),
        ('12 may', ['May 12', '12  May'], 1),
        ('1,000', ['one thousand', '1,00'], 0.8),
        ('٣٤', '34', 1),
    ],
)
def test_anls(said, right, score):
    assert anls(said, right) == pytest.approx(score)


@pytest.mark.parametrize(
    'text, found',
    [
        ('3', [3]),
        ('-3.5', [-3.5]),
        ('−3', [-3]),
        ('1,234,567.5', [1234567.5]),
        ('1,23', [1, 23]),
        ('[2007, 2008]', [2007, 2008]),
        ('.5', [0.5]),
        ('5.', [5]),
        ('1e3', [1000]),
        ('45%', [45]),
        ('$1.45', [1.45]),
        ('3-5', [3, 5]),
        ('x-5', [5]),
        ('١٢', [12]),
        ('１２', [12]),
        ('10²', [10]),
        ('none', []),
        ('', []),
    ],
)
def test_numbers(text, found):
    assert find_numbers(text) == found


@pytest.mark.parametrize(
    'said, right, score',
    [
        ('14', '14', 1),
        ('14.0', '14', 1),
        ('The answer is 14.', '14', 1),
        ('7 + 7 = 14', '14', 1),
        ('1,400', '1400', 1),
        ('45 %', '45', 1),
        ('45', '45%', 1),
        ('$1.45', '1.45', 1),
        ('1.449', '1.45', 1),
        ('1.4', '1.45', 0),
        ('２３', '23', 1),
        ('', '14', 0),
        ('fourteen', '14', 0),
        ('[1, 2]', '[1, 2]', 1),
        ('1 and 2', '[1, 2]', 1),
        ('[2, 1]', '[1, 2]', 0),
        ('Paris', 'paris', 1),
        ('-3', '3', 0),
    ],
)
def test_math_score(said, right, score):
    assert math_score(said, right) == score


def test_math_options_and_precision():
    assert (
        math_score('B', 'B', ['3/11', '8/11']) == math_score('8/11', '8/11', ['3/11', '8/11']) == 1
        and math_score('', 'A', ['3/11', '8/11']) == 0
    )
    assert math_score('1.44', '1.4', precision=1) == 1 and math_score('1.44', '1.4', precision=2) == 0
    assert final_number('no number') is None


def test_open_score():
    assert [open_score(s, '6.33') for s in ('6.33', 'I think it is 6.333', 'The result is 6.33 A', '6.4', '')] == [
        1,
        1,
        1,
        0,
        0,
    ]
    assert [open_score(s, ['Monet']) for s in ('It is Claude Monet.', 'monet', 'Monetary', '')] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    'said, right, score',
    [
        ('10.5', '10', 1),
        ('10.51', '10', 0),
        ('-9.6', '-10', 1),
        ('5%', '0.05', 1),
        ('5 %', '5%', 1),
        ('1,000', '1030', 1),
        ('0', '0', 1),
        ('0.01', '0', 0),
        ('Rome', 'ROME', 1),
        ('Rom', 'Rome', 0),
        ('', '', 0),
        ('', '3', 0),
        ('b', ['a', 'b'], 1),
    ],
)
def test_relaxed(said, right, score):
    assert relaxed_accuracy(said, right) == score


def test_vqa_accuracy():
    people = ['2'] * 3 + ['two'] + ['3'] * 6
    assert (
        vqa_accuracy('Two.', people) == vqa_accuracy('the 3', people) == 1
        and vqa_accuracy('', people) == vqa_accuracy('4', people) == 0
    )
    assert vqa_accuracy('x', ['x'] * 2 + ['y'] * 8) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy('x', ['x'] + ['y'] * 9) == pytest.approx(0.3)
    assert vqa_accuracy('a cat', ['Cat']) == 1 and vqa_accuracy('', ['']) == 0


def test_no_precision_is_no_precision():
    assert (
        math_score('1.45', '1.45', precision=float('nan')) == math_score('1.45', '1.45') == 1
        and math_score('1.4', '1.45', precision=float('nan')) == 0
    )


def one(benchmark, prediction, answer, **kw):
    return METRICS[benchmark](prediction, dict(answer=answer, options=[]) | kw)


def test_strict_benchmarks_take_a_letter_and_no_sentence():
    def both(said):
        return [one(b, said, 'B', options=GEMS) for b in ('MMMU', 'SQA', 'AI2D')]

    assert both('B') == both('(b)') == both('B. topaz') == both('topaz') == [1, 1, 1]
    assert both('The answer is (B)') == both('A or B') == [1, 0, 0] and both('') == both('C') == [0, 0, 0]


def test_an_empty_answer_is_never_right():
    for b in METRICS:
        for right in ('B', 'yes', '3', '', 'maybe', ['x', '']):
            assert one(b, '', right, options=GEMS if right == 'B' else []) == 0, (b, right)


def test_mme_by_subtask():
    rows = [
        dict(id=f'{s}{i}{a}', benchmark='MME-C', subtask=s, pair=f'{s}{i}', answer=a, options=[], ways=2, prediction=p)
        for s, said in dict(code=('yes', 'no'), text=('yes', 'yes')).items()
        for i in range(3)
        for a, p in zip(('yes', 'no'), said)
    ]
    assert mme_scores(grade(pd.DataFrame(rows))).to_dict() == {('MME-C', 'code'): 200, ('MME-C', 'text'): 50}


def test_plain():
    assert [normalize_text(t) for t in (None, 3, ' a\t b\n', '％', '“x”')] == ['', '3', 'a b', '%', '“x”']


# --- records and tables -----------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def ds():
    return small_suite()


@pytest.fixture(scope='module')
def q(ds):
    return question_table(ds)


def said(q, right=1.0, seed=0):
    "A table of answers of which a share is right."
    ok = np.random.default_rng(seed).random(len(q)) < right
    return benchmark_table(grade(q.assign(prediction=[a if k else '' for a, k in zip(q.answer, ok)])), draws=200)


def test_right_answers_score_the_most(q):
    t = said(q)
    assert (
        t.value.to_dict() == pytest.approx(TOP_SCORE)
        and average_score(t) == pytest.approx(100)
        and list(t) == ['value', 'n', 'low', 'high', 'chance']
    )
    assert (t.n >= 200).all() and t.n.sum() == len(q)
    assert (t.low < t.value).all() and (t.high == t.value).all() and t.low['GQA'] == pytest.approx(98.475, abs=0.01)
    nothing = said(q, 0.0)
    assert (nothing.value == 0).all() and (nothing.low == 0).all() and (nothing.high > 0).all()


def test_chance_is_what_guessing_scores(q):
    rng = np.random.default_rng(0)
    lucky = [float(w > 0 and rng.random() < 1 / w) for w in pd.concat([q] * 30).ways]
    many = pd.concat([q.assign(id=q.id + f'/{i}', pair=q.pair + f'/{i}') for i in range(30)]).assign(score=lucky)
    t = benchmark_table(many, draws=10)
    assert (
        retention_by_benchmark(t, t.chance.to_frame('value')).drop('DocVQA').to_numpy() == pytest.approx(100, abs=6)
        and 1 < t.chance['DocVQA'] < 2
    )
    assert t.chance['MME-C'] == 300 and t.chance['MME-P'] == 750 and t.chance['POPE'] == 50


def test_mme_is_the_published_sum_over_subtasks():
    rows = [
        dict(
            id=f'{s}{i}{a}',
            benchmark='MME-P',
            subtask=str(s),
            pair=f'{s}{i}',
            answer=a,
            options=[],
            ways=2,
            prediction='yes' if s < 6 else a,
        )
        for s in range(10)
        for i in range(2)
        for a in ('yes', 'no')
    ]
    assert benchmark_table(grade(pd.DataFrame(rows))).value['MME-P'] == pytest.approx(6 * 50 + 4 * 200)


def test_answers_may_be_lists_everywhere(q):
    few = q.groupby('benchmark').head(4)
    assert (grade(few.assign(prediction=few.answer, answer=[[a] for a in few.answer])).score == 1).all()


def test_pope_by_setting(q):
    t = pope_scores(said(q, 0.8).records)
    assert set(t.index) == {'random', 'popular', 'adversarial', 'all'} and t.accuracy['all'] == pytest.approx(80, abs=8)
    always = pope_scores(grade(q[q.benchmark == 'POPE'].assign(prediction='yes')))
    assert always.loc['all', ['accuracy', 'precision', 'recall', 'yes']].tolist() == [50, 50, 100, 100] and always.F1[
        'all'
    ] == pytest.approx(200 / 3)


def test_tables_can_be_joined(q):
    a, b = said(q), said(q, 0.5)
    assert len(pd.concat([a, b])) == 18 and a.copy().records is a.records


def test_bootstrap_is_seeded_and_close_to_the_formula(q):
    t, again = said(q, 0.7), said(q, 0.7)
    pd.testing.assert_frame_equal(t, again)
    r = benchmark_table(
        grade(q.assign(prediction='')).assign(score=(np.random.default_rng(5).random(len(q)) < 0.7) * 1.0)
    )
    want = [
        expected_interval_width(100 * r.value[b] / TOP_SCORE[b], r.n[b], b in PAIRED_BENCHMARKS) * TOP_SCORE[b] / 100
        for b in TOP_SCORE
    ]
    assert ((r.high - r.low) / want).to_numpy() == pytest.approx(1, abs=0.15)


def test_average_of_the_paper():
    assert [round(average_score(paper_table(f)), 2) for f in ('llava-v1.5-7b', 'mini-internvl-4b', 'bunny-3b')] == [
        53.70,
        72.63,
        51.89,
    ]
    with pytest.raises(ValueError, match='no values for llava-v1.5-7b, layer, 20 %'):
        paper_table(method='layer', ratio=20)


def test_retention(q):
    base, half = said(q), said(q, 0.5)
    assert retention(base, base) == retention_above_chance(base, base) == 100
    assert retention_above_chance(base.assign(value=base.chance), base) == pytest.approx(0) and retention(
        half, base
    ) > retention_above_chance(half, base)
    with pytest.raises(ValueError, match='scores 0 on all nine'):
        retention(base, said(q, 0.0))
    with pytest.raises(ValueError, match='nothing above chance'):
        retention_above_chance(base, said(q, 0.0))
    with pytest.raises(ValueError, match='MMMU, POPE are missing'):
        average_score(base.drop(['MMMU', 'POPE']))


def test_floors(q):
    t = no_image_baselines(q)
    assert (
        t.chance.to_dict() == pytest.approx(chance_floor(q).to_dict())
        and (t.habit <= t.chance + 0.1 * t.index.map(TOP_SCORE)).all()
    )
    always = grade(q.assign(prediction='no', answer='no', options=[[]] * len(q))[q.benchmark == 'POPE'])
    assert (
        always.score.mean() == 1
        and no_image_baselines(q[q.benchmark == 'POPE'].assign(answer='no')).habit['POPE'] == 100
    )
    assert list(no_image_baselines(q, said(q, 0.0))) == ['chance', 'habit', 'text_only', 'low', 'high']


def test_compare(q):
    base, half = said(q, 0.9), said(q, 0.5)
    v, low, high = paired_retention(half, base)
    assert (
        low < v < high
        and v == pytest.approx(retention(half, base))
        and paired_retention(base, base) == pytest.approx((100, 100, 100))
    )
    assert paired_retention(half, base, 'POPE').value == pytest.approx(retention_by_benchmark(half, base)['POPE'])
    assert paired_retention(half, base, 'MME-P', above_chance=True).value == pytest.approx(
        retention_by_benchmark(half, base, True)['MME-P']
    )
    assert paired_retention(half, base, above_chance=True).value == pytest.approx(retention_above_chance(half, base))
    with pytest.raises(
        ValueError, match='the same questions: 0 were asked of the first model only, 1 of the second only'
    ):
        paired_retention(benchmark_table(half.records.iloc[1:]), base)
    with pytest.raises(ValueError, match='the same questions'):
        paired_retention(paper_table(), base)


# --- asking -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module', params=['shipped', 'random'])
def lvlm(request):
    m = load_lvlm('tiny-llava')
    if request.param == 'shipped':
        return m
    torch.manual_seed(1)
    return LVLM(type(m.model)(m.config).eval(), m.processor, m.tokenizer, name='random')


def mixed(ds):
    "Questions of all lengths, among them one without a picture and some whose pictures have other sizes."
    rows = [dict(ds[i]) for i in range(0, len(ds), 170)]
    for r, size in zip(rows, ((64, 64), (200, 120), (81, 300))):
        r['images'] = [im.resize(size) for im in r['images']]
    return rows + [
        dict(rows[5], id='blind', images=[], messages=[dict(role='user', content='Which of these is a word?')])
    ]


def test_answers_do_not_depend_on_the_batch(lvlm, ds):
    rows = mixed(ds)

    def ask(rows, n, **kw):
        return answer_questions(lvlm, rows, batch_size=n, max_new_tokens=6, **kw)

    alone = ask(rows, 1)
    assert alone == ask(rows, 16) == ask(rows[::-1], 5)[::-1]
    assert len(alone) == len(rows)
    blind = ask(rows, 16, use_images=False)
    assert blind[:5] == ask(rows[:5], 1, use_images=False) and blind[-1] == alone[-1]


def test_evaluate_does_not_depend_on_the_batch(lvlm, ds):
    some = [dict(ds[int(i)]) for i in take_per_benchmark(question_table(ds), 3)]
    for r, size in zip(some, [(64, 64), (200, 120), (81, 300)] * len(some)):
        r['images'] = [im.resize(size) for im in r['images']]
    suite = datasets.Dataset.from_list(some, features=ds.features)
    alone, together = (evaluate(lvlm, suite, batch_size=n, progress=False, max_new_tokens=5) for n in (1, 16))
    pd.testing.assert_frame_equal(alone, together)
    pd.testing.assert_frame_equal(alone.records, together.records)
    assert alone.records.prompt.map(len).nunique() > 5


def test_each_question_has_its_own_limit(lvlm, ds):
    rows = mixed(ds)
    limits = [1 + i % 3 for i in range(len(rows))]
    want = [answer_questions(lvlm, [r], max_new_tokens=n)[0] for r, n in zip(rows, limits)]
    assert (
        answer_questions(lvlm, rows, max_new_tokens=limits) == want
        and answer_questions(lvlm, rows, 2, max_new_tokens=limits) == want
    )
    assert answer_questions(lvlm, rows, max_new_tokens=3) != want or lvlm.name != 'random'


def test_answers_are_greedy_whatever_the_model_is_set_to(lvlm, ds, recwarn):
    rows = mixed(ds)[:4]
    was = answer_questions(lvlm, rows)
    cfg, modes = lvlm.model.generation_config, [m.training for m in lvlm.model.modules()]
    old = {k: getattr(cfg, k) for k in ('do_sample', 'temperature', 'top_p')}
    try:
        cfg.update(do_sample=True, temperature=0.9, top_p=0.6)
        lvlm.model.train()
        assert answer_questions(lvlm, rows) == was
        assert all(m.training for m in lvlm.model.modules())
    finally:
        cfg.update(**old)
        for m, t in zip(lvlm.model.modules(), modes):
            m.training = t
    assert not [str(w.message) for w in recwarn if 'generation' in str(w.message)]


def test_limit_keeps_pairs_whole(q):
    for k in (1, 2, 5):
        some = q.iloc[take_per_benchmark(q, k)]
        assert some.groupby('benchmark').size().to_dict() == {
            b: k + k % 2 if b in PAIRED_BENCHMARKS else k for b in TOP_SCORE
        }
    assert len(take_per_benchmark(q)) == len(q)


@pytest.fixture
def tiny():
    return load_lvlm('tiny-llava')


def test_a_killed_run_goes_on(tiny, ds, tmp_path, monkeypatch):
    whole = evaluate(tiny, limit=4, batch_size=8, progress=False)
    real = ev.iterate_shared_answers

    def noted(asked, most):
        "The engine, which notes whom it asked, and dies before it asks more than `most`."

        def engine(lvlm, rows, *args):
            for indices, texts in real(lvlm, rows, *args):
                if len(asked) + len(indices) > most:
                    raise KeyboardInterrupt
                asked.extend(rows['id'][i] for i in indices)
                yield indices, texts

        return engine

    asked, again = [], []
    monkeypatch.setattr(ev, 'iterate_shared_answers', noted(asked, 16))
    path = tmp_path / 'deep' / 'r.parquet'
    with pytest.raises(KeyboardInterrupt):
        evaluate(tiny, limit=4, batch_size=8, records=path, progress=False)
    assert set(read_records(path).id) == set(asked) and 8 < len(asked) <= 16
    monkeypatch.setattr(ev, 'iterate_shared_answers', noted(again, 10**6))
    resumed = evaluate(tiny, limit=4, batch_size=8, records=path, progress=False)
    pd.testing.assert_frame_equal(resumed, whole)
    pd.testing.assert_frame_equal(resumed.records, whole.records, check_like=True)
    assert not set(again) & set(asked) and len(again) + len(asked) == whole.n.sum()
    monkeypatch.setattr(ev, 'iterate_shared_answers', None)
    pd.testing.assert_frame_equal(evaluate(tiny, limit=4, records=path, progress=False), whole)
    assert sorted(p.name for p in path.parent.iterdir()) == ['r.parquet']


def test_records_of_something_else_are_refused(tiny, ds, tmp_path):
    path, go = tmp_path / 'r.parquet', dict(limit=1, progress=False)
    evaluate(tiny, records=path, **go)
    with pytest.raises(ValueError, match='r.parquet holds records of the same questions with and without pictures'):
        evaluate(tiny, records=path, use_images=False, **go)
    with pytest.raises(ValueError, match='answers of another length'):
        evaluate(tiny, records=path, max_new_tokens=2, **go)
    with pytest.raises(ValueError, match='other questions'):
        evaluate(tiny, suite=ds.select(range(5)), records=path, **go)
    with torch.no_grad():
        tiny.part('norm').weight[7] += 1e-3
    with pytest.raises(ValueError, match=r'another model \(tiny-llava\): give each run a file of its own'):
        evaluate(tiny, records=path, **go)
    (tmp_path / 'x.parquet').write_text('no parquet')
    with pytest.raises(ValueError, match='x.parquet is no file of records'):
        evaluate(tiny, records=tmp_path / 'x.parquet', **go)
    pd.DataFrame(dict(a=[1])).to_parquet(tmp_path / 'y.parquet')
    with pytest.raises(ValueError, match='y.parquet is no file of records'):
        evaluate(tiny, records=tmp_path / 'y.parquet', **go)


def test_fingerprint_and_suite_key(tiny, ds):
    assert fingerprint(tiny) == fingerprint(load_lvlm('tiny-llava')) and suite_fingerprint(ds) != suite_fingerprint(
        ds.select(range(9))
    )


def bad(ds, **change):
    return ds.select(range(3)).map(lambda r: change)


@pytest.mark.parametrize(
    'suite, says',
    [
        (lambda ds: 'smal', "there is no suite 'smal': give one of small, .*a datasets.Dataset"),
        (lambda ds: [1], 'a suite is a name or a datasets.Dataset, not a list'),
        (lambda ds: ds.select([]), 'the suite has no questions'),
        (lambda ds: ds.remove_columns(['answer', 'benchmark']), 'this data set has no benchmark, answer'),
        (lambda ds: bad(ds, answer=' '), "question 'MMMU-0' has no answer to compare with"),
        (lambda ds: bad(ds, answer=None), "question 'MMMU-0' has no answer"),
        (lambda ds: bad(ds, benchmark='MMLU'), r'no benchmark that has a metric \(MMMU, SQA'),
        (lambda ds: bad(ds, id='x'), "question 'x' has an id that another question has"),
        (
            lambda ds: ds.select([i for i, b in enumerate(ds['benchmark']) if b == 'MME-P'][:3]),
            "'MME-P-1-yes' is half of a pair",
        ),
        (
            lambda ds: bad(ds, benchmark='POPE', options=[], answer='maybe'),
            "'MMMU-0' asks for yes or no and has another answer",
        ),
        (lambda ds: bad(ds, answer='E'), "'MMMU-0' has an answer that is none of its options"),
    ],
)
def test_what_cannot_be_graded_is_refused_first(tiny, ds, suite, says, monkeypatch):
    monkeypatch.setattr(ev, 'answer_batch', None)
    datasets.disable_progress_bars()
    with pytest.raises(ValueError, match=says):
        evaluate(tiny, suite=suite(ds), progress=False)


def test_a_name_that_is_no_suite_tells_of_the_nine(tiny):
    with pytest.raises(ValueError, match="there is no suite 'pop': give one of small, .*mmmu, .*pope.*, mme, nine"):
        evaluate(tiny, suite='pop', progress=False)


def test_limit_is_a_number_of_questions(tiny):
    for name, value in dict(limit=0, batch_size=1.5, every=-1).items():
        with pytest.raises(ValueError, match=f'{name} is a whole number from 1 on, not {value}'):
            evaluate(tiny, **{name: value}, progress=False)


def test_a_picture_that_does_not_decode_is_named(tiny, ds):
    broken = ds.select(range(2)).cast_column('images', datasets.List(datasets.Image(decode=False)))
    rows = [
        dict(r, images=[dict(bytes=r['images'][0]['bytes'][:60] if i else r['images'][0]['bytes'], path=None)])
        for i, r in enumerate(broken)
    ]
    broken = datasets.Dataset.from_list(rows, features=ds.features)
    with pytest.raises(ValueError, match="question 'MMMU-1': its image does not decode"):
        answer_questions(tiny, broken)
    with pytest.warns(UserWarning, match='1 of 2 questions are left out: MMMU-1'):
        table = evaluate(tiny, suite=broken, progress=False)
    assert table.excluded.id.tolist() == ['MMMU-1'] and (table.n.sum(), table.of.sum()) == (1, 2)


def test_a_suite_says_how_long_its_answers_may_be(tiny, ds):
    few = ds.select([i for i, b in enumerate(ds['benchmark']) if b == 'DocVQA'][:8])
    own = few.add_column('new_tokens', [1] * 4 + [6] * 4)
    said = evaluate(tiny, own, progress=False).records.prediction.tolist()
    assert said[:4] == answer_questions(tiny, few.select(range(4)), max_new_tokens=1) and said[4:] == answer_questions(
        tiny, few.select(range(4, 8)), max_new_tokens=6
    )
    two_tokens = evaluate(tiny, own, progress=False, max_new_tokens=2).records.prediction
    assert two_tokens.tolist() == answer_questions(tiny, few, max_new_tokens=2)


def test_without_looking_no_picture_is_read(tiny, ds):
    broken = ds.select(range(3)).cast_column('images', datasets.List(datasets.Image(decode=False)))
    rows = [dict(r, images=[dict(bytes=b'no picture', path=None)]) for r in broken]
    suite = datasets.Dataset.from_list(rows, features=ds.features)
    predictions = evaluate(tiny, suite, use_images=False, progress=False).records.prediction
    assert predictions.tolist() == answer_questions(tiny, ds.select(range(3)), use_images=False)


def test_a_suite_of_ones_own(tiny):
    rows = [
        dict(
            id=str(i),
            images=[Image.new('RGB', (90, 50 + i))],
            messages=[dict(role='user', content='<image>\nWhat color?')],
            benchmark=b,
            answer=a,
            options=o,
        )
        for i, (b, a, o) in enumerate(
            [
                ('DocVQA', ['black', 'dark'], []),
                ('GQA', ['black'], []),
                ('AI2D', ['A'], ['black', 'red']),
                ('ChartQA', ['3'], []),
                ('VQAv2', ['x'] * 10, []),
            ]
        )
    ]
    t = evaluate(tiny, suite=datasets.Dataset.from_list(rows), progress=False)
    assert list(t.index) == ['AI2D', 'DocVQA', 'GQA', 'ChartQA', 'VQAv2'] and t.chance.tolist() == [50, 0, 0, 0, 0]


def test_every_benchmark_has_a_metric():
    assert set(TOP_SCORE) <= set(METRICS)


def test_bootstrap_draws_the_same_units_for_two_models(q):
    u = scoring_units(grade(q.assign(prediction=q.answer)))
    a = bootstrap(u.assign(score=np.arange(len(u), dtype=float)), 20, 3)
    b = bootstrap(u.assign(score=2.0 * np.arange(len(u))), 20, 3)
    pd.testing.assert_frame_equal(2 * a, b)
