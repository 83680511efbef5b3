"Two rules a benchmark: what each must say of known cases, and of thousands of odd answers."

import pandas as pd
import pytest
from restated import RESTATED, expected_scores, odd_records

from lvlm_study import grade
from lvlm_study.evaluation.grading import DEPARTURES, RULES, extract_math_answer, pope_scores
from lvlm_study.evaluation.metrics import choice_letter, find_numbers, math_score, open_score
from lvlm_study.evaluation.statistics import benchmark_table

ANY = None  # The script guesses
CASES = [  # benchmark, answer of a model, right answer, options, score as published, score of lmms-eval
    ('MMMU', '', 'B', ['Yes', 'No'], ANY, ANY),
    ('MMMU', '答案是B', 'B', ['291', '140', '258', '44'], ANY, 1),
    ('MMMU', '答案：B', 'B', ['291', '140'], ANY, 1),
    ('MMMU', 'MgS%', ['$MgS$', 'MgS'], [], 1, 0),
    ('MMMU', 'a or b', ['a or b', 'both'], [], 1, 0),
    ('MMMU', 'x^2V', 'x^2', [], 1, 1),
    ('MMMU', '15mm', '15', [], 0, 0),
    ('MMMU', '−.5', '.5', [], 1, 1),
    ('MMMU', 'it is .25', '.25', [], 1, 1),
    ('MMMU', 'The answer is 8\nThis is because 7 is given', '8', [], 1, 1),
    ('MMMU', 'So it is Paris\nor maybe Rome', 'Paris', [], 1, 1),
    ('MMMU', 'P = A W.\nThat is all', 'A', [], 0, 0),
    ('MMMU', 'That is all\nP = A W.', 'A', [], 1, 1),
    ('MMMU', 'Look at (a) first.\nAnswer: C', 'C', ['x', 'y', 'z'], 1, 1),
    ('MMMU', 'Compare (b) and (a). Answer: C', 'C', ['x', 'y', 'z'], 1, 1),
    ('SQA', 'C', 'B', ['K', 'C'], 0, 0),
    ('SQA', 'topaz', 'B', ['emerald', 'topaz'], 0, 0),
    ('SQA', '（Ｅ）', 'E', ['59', '315', '4', '351', '23'], 0, 0),
    ('SQA', 'Ｂ', 'B', ['x', 'y'], 0, 0),
    ('SQA', 'The answer is B.', 'B', ['x', 'y', 'z'], 1, 0),
    ('SQA', 'b', 'B', ['x', 'y'], 0, 1),
    ('MathVista', '选C。', 'C', ['$178.23', '$105.91', '$748.23', '$191.51', '$860.94'], 1, 1),
    ('MathVista', '答案是B', 'B', ['3', '5'], 1, 1),
    ('MathVista', '3/1', '3', [], 1, 1),
    ('MathVista', '8 / 2', '4', [], 1, 1),
    ('MathVista', '[1,3]', '[1, 3]', [], 0, 0),
    ('MathVista', '[1, 3]', '[1, 3]', [], 1, 1),
    ('MathVista', 'There are 3 objects liked by more than 7 people', '3', [], 1, 1),
    ('MathVista', 'It is 5, less than 9', '5', [], 1, 1),
    ('MathVista', '1' * 309, '5', [], 0, 0),
    ('MathVista', '1' * 400, '5', [], 0, 0),
    ('MathVista', '1e999', '5', [], 0, 0),
    ('MathVista', '', 'B', ['blue whale', 'ant'], 1, 1),
    ('MathVista', 'a blue wale', 'A', ['blue whale', 'ant'], 1, 1),
    ('MathVista', '长度-5', '-5', [], 1, 1),
    ('MathVista', 'Look at (a) first.\nAnswer: C', 'C', ['x', 'y', 'z'], 1, 1),
    ('AI2D', 'B-', 'B', ['$618.26', '$143.69'], 1, 1),
    ('AI2D', 'b;', 'B', ['x', 'y'], 1, 1),
    ('AI2D', 'B: E', 'B', ['H', 'E', 'B', 'F'], 0, 0),
    ('AI2D', 'B. E', 'B', ['H', 'E', 'B', 'F'], 1, 1),
    ('MME-C', 'Y!', 'Yes', [], 0, 0),
    ('MME-C', 'Y', 'Yes', [], 0, 1),
    ('MME-C', 'a  no', 'No', [], 0, 0),
    ('MME-P', ', yes', 'Yes', [], 0, 0),
    ('MME-P', 'N!', 'No', [], 0, 0),
    ('MME-P', 'no.', 'No', [], 1, 1),
    ('POPE', 'Y', 'yes', [], 1, 0),
    ('POPE', 'No,', 'no', [], 1, 0),
    ('POPE', 'Yes.', 'yes', [], 1, 0),
    ('POPE', '', 'yes', [], 1, 0),
    ('POPE', '', 'no', [], 0, 0),
    ('DocVQA', 'Ａ', 'A', [], 0, 0),
    ('DocVQA', 'hallo', 'hello', [], 0.8, 0.8),
    ('GQA', '- 3', '3', [], 0, 0),
    ('GQA', 'teddy  bear', 'teddy bear', [], 0, 0),
    ('GQA', 'Yes', 'yes', [], 0, 1),
]


@pytest.mark.parametrize('benchmark, said, right, options, published, harness', CASES)
def test_known_cases(benchmark, said, right, options, published, harness):
    record = [dict(id='q', benchmark=benchmark, prediction=said, answer=right, options=options)]
    for rule, wanted in (('published', published), ('lmms-eval', harness)):
        graded = grade(record, rule)
        assert graded.rule[0] == rule
        if wanted is ANY:
            guesses = {grade(record, rule, seed=seed).score[0] for seed in range(30)}
            assert guesses == {0, 1}, f'{rule} does not guess'
        else:
            assert graded.score[0] == pytest.approx(wanted), rule


@pytest.mark.parametrize('benchmark', RESTATED)
def test_odd_answers(benchmark):
    rows = odd_records(benchmark, 2000)
    assert len({r['prediction'] for r in rows}) > 700, 'the answers are hardly odd'
    for rule in RULES:
        scores = grade(rows, rule).score
        wrong = [
            (r['prediction'][:60], r['answer'], r['options'], score)
            for r, score in zip(rows, scores)
            if all(abs(score - e) > 1e-9 for e in expected_scores(r, rule == 'lmms-eval', extract_math_answer))
        ]
        assert not wrong, f'{rule}: {len(wrong)} of {len(rows)}, such as {wrong[:3]}'
        assert 0.005 < scores.mean() < 0.995, 'all answers have one score'


def test_the_rules_differ():
    rows = [r for b in RESTATED for r in odd_records(b, 300, seed=1)]
    published, harness = (grade(rows, rule) for rule in ('published', 'lmms-eval'))
    differ = published[(published.score - harness.score).abs() > 1e-9].benchmark.unique()
    assert {'MMMU', 'SQA', 'POPE', 'GQA', 'MME-C'} <= {*differ} and not {'AI2D'} & {*differ}
    assert {*DEPARTURES.benchmark} >= {'MMMU', 'SQA', 'POPE', 'GQA'} and DEPARTURES.notna().all(axis=None)


def test_guesses_belong_to_a_question_and_a_seed():
    silent = pd.DataFrame(
        [dict(id=i, benchmark='MMMU', prediction='', answer='B', options=list('wxyz')) for i in range(800)]
    )
    first = grade(silent, seed=3)
    again = grade(silent.sample(frac=1, random_state=0), seed=3).sort_values('id')
    assert first.score.tolist() == again.score.tolist()
    assert 0.2 < first.score.mean() < 0.3 and first.score.tolist() != grade(silent, seed=4).score.tolist()


def test_records_of_any_form():
    rows = [dict(benchmark='POPE', prediction=None, answer='yes'), dict(benchmark='GQA', prediction='a', answer='a')]
    assert grade(rows).score.tolist() == [1, 1] and grade(rows, 'lmms-eval').score.tolist() == [0, 1]
    frame = pd.DataFrame([dict(benchmark='AI2D', prediction='B', answer='y', options=('x', 'y')), rows[1]])
    assert grade(frame).score.tolist() == [1, 1] and 'score' not in frame
    word = dict(benchmark='SQA', prediction='y', answer='B', options=['x', 'y'])
    own = [word | dict(own_script=own) for own in (True, False)]
    assert grade(own).score.tolist() == grade(own, 'lmms-eval').score.tolist() == [1, 0]
    with pytest.raises(ValueError, match="no rule 'strict': take one of published, lmms-eval"):
        grade(rows, 'strict')
    with pytest.raises(ValueError, match="knows no benchmark 'MMLU'"):
        grade([dict(benchmark='MMLU', prediction='', answer='')])


def test_pope_of_unreadable_answers():
    pairs = [('yes', 'yes'), ('maybe', 'yes'), ('', 'no'), ('no', 'no'), ('no', 'yes'), ('yes', 'no')]
    rows = [dict(benchmark='POPE', prediction=a, answer=b, subtask='random') for a, b in pairs]
    script = pope_scores(grade(rows)).loc['all']  # All that is not no is yes: 2 hits, 2 false alarms, 1 missed
    assert (script.precision, script.yes) == (50, pytest.approx(400 / 6))
    assert script.recall == pytest.approx(200 / 3) and script.F1 == pytest.approx(400 / 7)
    harness = pope_scores(grade(rows, 'lmms-eval')).loc['all']  # 1 hit, 1 false alarm, 1 missed; yes: right answers
    assert (harness.precision, harness.recall, harness.F1, harness.yes) == (50, 50, 50, 50)
    assert harness.accuracy == pytest.approx(200 / 6)


def test_own_metrics_read_what_they_did_not():
    assert choice_letter('Look at (a) first.\nAnswer: C', ['x', 'y', 'z']) == 'C'
    assert choice_letter('选C。', ['x', 'y', 'z']) == 'C' and find_numbers('长度-5') == [-5]
    assert open_score('The answer is 8\nThis is because 7 is given', '8') == 1
    assert open_score('.5', '.5') == 1 and math_score('1' * 400, '5') == 0


ONE_OF_EACH = [(b, 'yes' if b.startswith('MME') or b == 'POPE' else 'B') for b in RULES['published']]


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('given', ["['x', 'y']", '["x", "y"]', " ['x',\n 'y'] "])
def test_options_written_as_text_are_the_list(rule, given):
    for benchmark in ('MMMU', 'SQA', 'AI2D', 'MathVista'):
        for own in (False, True):
            said = ['B', '(A)', 'y', '', 'neither of the two can be seen']
            as_list = [
                dict(id=i, benchmark=benchmark, prediction=a, answer='B', options=['x', 'y'], own_script=own)
                for i, a in enumerate(said)
            ]
            as_text = pd.DataFrame([r | dict(options=given) for r in as_list])
            pd.testing.assert_frame_equal(grade(as_text, rule), grade(as_list, rule))
            assert as_text.options.tolist() == [given] * len(said), 'the table that was given is changed'
    opened = dict(benchmark='MMMU', prediction='15', answer='15')
    assert grade([opened | dict(options='[]'), opened | dict(options=float('nan'))], rule).score.tolist() == [1, 1]


@pytest.mark.parametrize('given', ['x or y', '', "['x', 2]", "('x', 'y')", "{'A': 'x'}", "['x'", '3', 3, {'A': 'x'}])
def test_options_that_are_no_list(given):
    record = dict(id='q5', benchmark='MMMU', prediction='B', answer='B', options=given)
    with pytest.raises(ValueError, match=r"^the options of question 'q5' are no list of texts: [^\n]+$"):
        grade([record])


@pytest.mark.parametrize('answer', [None, float('nan'), pd.NA, [], [None]], ids=str)
@pytest.mark.parametrize('benchmark, right', ONE_OF_EACH)
def test_no_right_answer(benchmark, right, answer):
    rows = [dict(id=f'q{i}', benchmark=benchmark, prediction='', answer=a) for i, a in enumerate([right, answer])]
    for rule in RULES:
        for own in (False, True):
            if benchmark in RULES[rule]:
                with pytest.raises(ValueError, match=rf"^question 'q1' of {benchmark} has no right answer: [^\n]+$"):
                    grade([r | dict(own_script=own) for r in rows], rule)


@pytest.mark.parametrize('precision', [float('inf'), 'x', '1', -1, 1.5, [1], True, 10**400], ids=lambda p: f'{p!r:.9}')
def test_precision_that_is_no_number(precision):
    rows = [dict(id='q', benchmark='MathVista', prediction='1.5', answer='1.5', precision=precision)]
    for own in (False, True):
        with pytest.raises(ValueError, match=r"^the precision of question 'q' is a number of decimals [^\n]+$"):
            grade([rows[0] | dict(own_script=own)])
    for right in (1, 1.0, None, float('nan'), pd.NA):
        assert grade([rows[0] | dict(precision=right)]).score.tolist() == [1]


SINGLE = dict(benchmark='MMMU', prediction='B', answer='B')


@pytest.mark.parametrize(
    'records, says',
    [
        ('abc', "are a table or a list of records, not 'abc'"),
        (3, 'are a table or a list of records, not 3'),
        (SINGLE, 'put a single record into a list'),
        (SINGLE | dict(options=['x', 'y']), 'put a single record into a list'),
        ({'a': 1}, 'are a table or a list of records, not'),
        ([], 'need the column benchmark; these have none'),
        ([SINGLE | dict(benchmark=['MMMU'])], r"knows no benchmark \['MMMU'\]"),
        ([SINGLE | dict(benchmark=None)], 'knows no benchmark None'),
    ],
    ids=str,
)
def test_what_is_no_table_of_records(records, says):
    with pytest.raises(ValueError, match=says) as e:
        grade(records)
    assert '\n' not in str(e.value)


def pairs_of_mme():
    "Two whole pairs of MME and two questions of POPE, graded."
    mme = [(p, a) for p in ('cat', 'dog') for a in ('yes', 'no')]
    rows = [dict(id=f'{p}-{a}', benchmark='MME-P', subtask='existence', pair=p, answer=a) for p, a in mme]
    rows += [dict(id=f'pope-{a}', benchmark='POPE', subtask='random', pair=a, answer=a) for a in ('yes', 'no')]
    return grade([r | dict(prediction=r['answer'], ways=2, options=[]) for r in rows])


@pytest.mark.parametrize(
    'spoil, says',
    [
        (lambda r: r.iloc[1:], "MME-P is paid in pairs .* the pair 'cat' has 1, 1 of them different"),
        (lambda r: pd.concat([r, r.iloc[2:4]]), "the pair 'dog' has 4, 2 of them different"),
        (lambda r: r.iloc[[0, 0, 2, 3]], "the pair 'cat' has 2, 1 of them different"),
        (lambda r: r.assign(pair=None), 'needs the column pair'),
        (lambda r: r.drop(columns='subtask'), 'needs the column subtask'),
        (lambda r: r.assign(score=r.score.where(r.id != 'pope-no')), "score of question 'pope-no' is a number .* nan"),
        (lambda r: r.assign(score=2.0), "score of question 'cat-yes' is a number from 0 to 1, not "),
        (lambda r: r.drop(columns='score'), 'need the column score; these have id, benchmark'),
        (lambda r: r.to_dict('records'), 'made of graded questions'),
    ],
)
def test_tables_of_what_cannot_be_scored(spoil, says):
    records = pairs_of_mme()
    assert benchmark_table(records, draws=5).value.to_dict() == {'MME-P': 2000, 'POPE': 100}
    with pytest.raises(ValueError, match=says) as e:
        benchmark_table(spoil(records), draws=5)
    assert '\n' not in str(e.value)
