"The nine benchmarks on small files in exactly their columns, and logs that go to lmms-eval and come back."

import hashlib, json, re, shutil
import datasets, numpy as np, pandas as pd, pytest, transformers
from PIL import Image
from lvlm_study.evaluation.benchmarks import (
    LETTER_PROMPT,
    NINE_BENCHMARKS,
    SHORT_PROMPT,
    ask_mathvista,
    ask_mmmu,
    join_suites,
    load_benchmarks,
    parquet_files,
    read_benchmark_folder,
    to_suite,
)
from lvlm_study.core.store import Run, load_results, temporary_results, write_row
from lvlm_study.evaluation.benchmarks import SUITES
from lvlm_study.evaluation.evaluate import evaluate, question_table, read_records, suite_fingerprint, take_per_benchmark
from lvlm_study.evaluation.metrics import TOP_SCORE
from lvlm_study.evaluation.results import paper_table
from lvlm_study.evaluation.statistics import average_score, benchmark_table, chance_floor, retention_above_chance
from lvlm_study.evaluation.grading import grade
from lvlm_study.models.loading import load_lvlm
from lvlm_study.evaluation.error_analysis import (
    AnswerCard,
    answer_card,
    answer_gallery,
    nth_card,
    plot_above_chance,
    plot_answer_cards,
    plot_text_only,
    retention_above_chance_table,
    select_questions,
)
from lvlm_study.evaluation.lmms_eval import (
    export_for_scoring,
    export_samples,
    lmms_eval_commands,
    lmms_eval_task,
    read_results,
    read_samples,
    scoring_commands,
    table_from_samples,
)
from lvlm_study.evaluation.results import paper_text_only, stored_tables, text_only_scores
from lvlm_study.data.toy_benchmarks import small_suite

transformers.logging.set_verbosity_error()
datasets.disable_progress_bars()
S, I, L = datasets.Value('string'), datasets.Image(), datasets.List(datasets.Value('string'))


def pic(i):
    return Image.new('RGB', (40 + i, 50), (i * 7 % 255, 90, 200))


# --- the data sets as they are on the hub: every column, with its type ------------------------------------------


def _mmmu():
    blank = {f'image_{i}': None for i in range(1, 8)}
    rows = [
        dict(
            id='validation_Art_Theory_1',
            question='<image 1> Which is older?',
            options="['<image 2>', \"the artist's\", 'neither']",
            answer='B',
            question_type='multiple-choice',
            image_1=pic(1),
            image_2=pic(2),
        ),
        dict(
            id='validation_Math_2',
            question='What is the sum in <image 1>?',
            options='[]',
            answer='6.5',
            question_type='open',
            image_1=pic(3),
        ),
        dict(
            id='validation_Math_3',
            question='Name one of <image 3>.',
            options='[]',
            answer="['cat', 'a cat']",
            question_type='open',
            image_3=pic(4),
        ),
    ]
    more = dict(explanation='', img_type="['Plots']", topic_difficulty='Easy', subfield='x')
    return datasets.Features(
        {k: S for k in ('id', 'question', 'options', 'explanation')}
        | {k: I for k in blank}
        | {k: S for k in ('img_type', 'answer', 'topic_difficulty', 'question_type', 'subfield')}
    ), [blank | more | r for r in rows]


def _sqa():
    more = dict(task='closed choice', grade='grade4', topic='physics', category='c', skill='s', lecture='', solution='')
    rows = [
        dict(
            image=pic(5),
            question='Which sinks?',
            choices=['cork', 'iron'],
            answer=1,
            hint='Iron is heavy.',
            subject='natural science',
        ),
        dict(
            image=pic(6), question='Which is it?', choices=['a', 'b', 'c'], answer=0, hint='', subject='social science'
        ),
    ]
    return datasets.Features(
        dict(image=I, question=S, choices=L, answer=datasets.Value('int8'), hint=S)
        | {k: S for k in 'task grade subject topic category skill lecture solution'.split()}
    ), [more | r for r in rows]


def _mathvista():
    about = dict(
        category='math',
        context='chart',
        grade='daily',
        img_height=50,
        img_width=50,
        language='english',
        skills=['arithmetic'],
        source='x',
        split='testmini',
        task='figure question answering',
    )
    kinds = [
        dict(question='How many?', answer='14', answer_type='integer', question_type='free_form'),
        dict(question='What share?', answer='0.6', answer_type='float', precision=1.0, question_type='free_form'),
        dict(
            question='How much?', answer='1.45', answer_type='float', precision=2.0, unit='$', question_type='free_form'
        ),
        dict(question='Between which years?', answer='[2007, 2008]', answer_type='list', question_type='free_form'),
        dict(
            question='Which angle?',
            answer='A',
            answer_type='text',
            choices=['B', 'A', 'C'],
            question_type='multi_choice',
        ),
    ]
    rows = [
        dict(
            pid=str(i + 1),
            image=f'images/{i}.jpg',
            decoded_image=pic(10 + i),
            choices=None,
            unit=None,
            precision=None,
            metadata=about,
            query='q',
        )
        | r
        for i, r in enumerate(kinds)
    ]
    meta = (
        {k: S for k in ('category', 'context', 'grade')}
        | {k: datasets.Value('int64') for k in ('img_height', 'img_width')}
        | dict(language=S, skills=L, source=S, split=S, task=S)
    )
    return datasets.Features(
        dict(
            pid=S,
            question=S,
            image=S,
            decoded_image=I,
            choices=L,
            unit=S,
            precision=datasets.Value('float64'),
            answer=S,
            question_type=S,
            answer_type=S,
            metadata=meta,
            query=S,
        )
    ), rows


def _ai2d():
    return datasets.Features(dict(question=S, options=L, answer=S, image=I)), [
        dict(question='What eats K?', options=['L', 'A', 'W', 'P'], answer='1', image=pic(20))
    ]


def _mme():
    rows = [
        dict(
            question_id=f'{c}/{i}.png',
            image=pic(30 + i),
            question=f'Is it {w}? Please answer yes or no.',
            answer=a,
            category=c,
        )
        for c, i in (('existence', 0), ('OCR', 1), ('code_reasoning', 2))
        for w, a in (('a cat', 'Yes'), ('a dog', 'No'))
    ]
    return datasets.Features(dict(question_id=S, image=I, question=S, answer=S, category=S)), rows


def _pope():
    rows = [
        dict(
            id=str(i),
            question_id=str(i),
            question=f'Is there a {o} in the image?',
            answer=a,
            image_source='COCO_1',
            image=pic(40),
            category=c,
        )
        for i, (o, a, c) in enumerate(
            (('car', 'yes', 'random'), ('dog', 'no', 'popular'), ('bus', 'no', 'adversarial'))
        )
    ]
    return datasets.Features(dict(id=S, question_id=S, question=S, answer=S, image_source=S, image=I, category=S)), rows


def _docvqa():
    rows = [
        dict(
            questionId='337',
            question='What is the date?',
            question_types=['handwritten', 'form'],
            image=pic(50),
            docId=279,
            ucsf_document_id='xx',
            ucsf_document_page_no='1',
            answers=['1/8/93', '01/08/93'],
            data_split='val',
        )
    ]
    return datasets.Features(
        dict(
            questionId=S,
            question=S,
            question_types=L,
            image=I,
            docId=datasets.Value('int64'),
            ucsf_document_id=S,
            ucsf_document_page_no=S,
            answers=L,
            data_split=S,
        )
    ), rows


def _gqa():
    types = dict(structural='verify', semantic='attr', detailed='x')
    rows = [
        dict(
            id=f'2{i}',
            imageId=f'n{1 - i % 2}',
            question='Is it overcast?',
            answer='no',
            fullAnswer='No, it is clear.',
            isBalanced=True,
            groups={'global': None, 'local': '06-sky'},
            entailed='',
            equivalent='',
            types=types,
            semanticStr='select: sky',
        )
        for i in range(3)
    ]
    return datasets.Features(
        {k: S for k in ('id', 'imageId', 'question', 'answer', 'fullAnswer')}
        | dict(
            isBalanced=datasets.Value('bool'),
            groups={'global': S, 'local': S},
            entailed=S,
            equivalent=S,
            types={k: S for k in types},
            semanticStr=S,
        )
    ), rows


GQA_IMAGES = datasets.Features(dict(id=S, image=I)), [dict(id=f'n{i}', image=pic(60 + i)) for i in range(2)]
HUB = {
    'MMMU/data/validation-00000-of-00001': _mmmu(),
    'ScienceQA/ScienceQA-IMG/test-00000-of-00001': _sqa(),
    'MathVista/data/testmini-00000-of-00001-72': _mathvista(),
    'ai2d/data/test-00000-of-00001': _ai2d(),
    'MME/data/test-00000-of-00001': _mme(),
    'POPE/data/test-00000-of-00001': _pope(),
    'DocVQA/DocVQA/validation-00000-of-00001': _docvqa(),
    'GQA/testdev_balanced_instructions/testdev-00000-of-00001': _gqa(),
    'GQA/testdev_balanced_images/testdev-00000-of-00001': GQA_IMAGES,
}
DECOYS = {
    'ScienceQA/ScienceQA-FULL/test-00000-of-00001': _pope(),
    'DocVQA/InfographicVQA/validation-00000-of-00001': _pope(),
    'POPE/Full/random-00000-of-00001': _sqa(),
    'MME/data/train-00000-of-00001': _sqa(),
}


def rows_of(features, rows):
    return datasets.Dataset.from_list(rows, features=features)


@pytest.fixture(scope='module')
def shelf(tmp_path_factory):
    "A folder with all data sets as `hf download` leaves them, and files beside them that must not be taken."
    d = tmp_path_factory.mktemp('shelf')
    for path, made in (HUB | DECOYS).items():
        p = d / f'{path}.parquet'
        p.parent.mkdir(parents=True, exist_ok=True)
        rows_of(*made).to_parquet(p)
    return d


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv('LVLM_CACHE', str(tmp_path_factory.getbasetemp() / 'cache'))


@pytest.fixture
def on_shelf(shelf, monkeypatch):
    monkeypatch.setenv('LVLM_BENCHMARKS', str(shelf))


@pytest.fixture(scope='module')
def tiny():
    return load_lvlm('tiny-llava')


# --- rows become questions --------------------------------------------------------------------------------------

SIZES = dict(MMMU=3, SQA=2, MathVista=5, AI2D=1, POPE=3, DocVQA=1, GQA=3) | {'MME-C': 2, 'MME-P': 4}


@pytest.mark.parametrize('name', NINE_BENCHMARKS)
def test_each_benchmark_is_a_suite(name, on_shelf):
    ds = SUITES[name.lower()]()
    q = question_table(ds)
    assert (
        len(q) == SIZES[name] and set(q.benchmark) == {name} and set(q.new_tokens) == {NINE_BENCHMARKS[name].new_tokens}
    )
    for r in ds:
        assert len(r['images']) == r['messages'][0]['content'].count('<image>') >= 1 and all(
            isinstance(i, Image.Image) for i in r['images']
        )
    right = benchmark_table(grade(q.assign(prediction=[a[0] for a in q.answer])), draws=20)
    assert right.value.to_dict() == {name: TOP_SCORE[name]}, 'the first right answer has to be right'
    wrong = benchmark_table(grade(q.assign(prediction='', own_script=True)), draws=20)
    assert (wrong.value == 0).all()


def prompts(name):
    return question_table(SUITES[name]()).prompt.tolist()


def test_prompts_are_lmms_evals(on_shelf):
    assert prompts('mmmu') == [
        f"<image 1> Which is older?\nA. <image 2>\nB. the artist's\nC. neither\n\n{LETTER_PROMPT}",
        f'What is the sum in <image 1>?\n\n{SHORT_PROMPT}',
        f'Name one of <image 3>.\n\n{SHORT_PROMPT}',
    ]
    assert prompts('sqa') == [
        f'Context: Iron is heavy.\nWhich sinks?\nA. cork\nB. iron\n{LETTER_PROMPT}',
        f'Which is it?\nA. a\nB. b\nC. c\n{LETTER_PROMPT}',
    ]
    assert (
        prompts('ai2d') == [f'What eats K?\nA. L\nB. A\nC. W\nD. P\n{LETTER_PROMPT}']
        and prompts('mme-c')[0] == f'Is it a cat?\n{SHORT_PROMPT}'
    )
    assert (
        prompts('pope')[0] == f'Is there a car in the image?\n{SHORT_PROMPT}'
        and prompts('docvqa') == [f'What is the date?\n{SHORT_PROMPT}']
        and prompts('gqa')[0] == f'Is it overcast?\n{SHORT_PROMPT}'
    )
    assert prompts('mathvista') == [
        'How many?\nAnswer the question using a single integer number.',
        'What share?\nAnswer the question using a single floating-point number with one decimal place.',
        'How much? (Unit: $)\nAnswer the question using a single floating-point number with two decimal places.',
        'Between which years?\nAnswer the question using a Python list.',
        f'Which angle?\nA. B\nB. A\nC. C\n{LETTER_PROMPT}',
    ]


def test_answers_options_and_subtasks(on_shelf):
    q = question_table(SUITES['nine']()).set_index('id')
    answer = {i: list(a) for i, a in q.answer.items()}
    assert (
        answer['MMMU-0'] == ['B']
        and answer['MMMU-2'] == ['cat', 'a cat']
        and answer['SQA-0'] == ['B']
        and answer['AI2D-0'] == ['B']
        and answer['DocVQA-0'] == ['1/8/93', '01/08/93']
    )
    assert answer['MathVista-4'] == ['B'], 'the text A is the second option'
    assert q.precision['MathVista-1'] == 1 and q.precision['MathVista-2'] == 2 and np.isnan(q.precision['MathVista-0'])
    assert q.subtask[['MMMU-0', 'MMMU-1', 'POPE-2', 'SQA-0', 'MathVista-0']].tolist() == [
        'Art_Theory',
        'Math',
        'adversarial',
        'natural science',
        'figure question answering',
    ]
    assert (
        q[q.benchmark == 'MME-P'].subtask.unique().tolist() == ['existence', 'OCR']
        and q.pair['MME-C-4'] == q.pair['MME-C-5'] == 'code_reasoning/2.png'
    )
    assert q.ways[['MMMU-0', 'MMMU-1', 'SQA-1', 'AI2D-0', 'POPE-0', 'MME-C-4', 'GQA-0', 'DocVQA-0']].tolist() == [
        3,
        0,
        3,
        4,
        2,
        2,
        0,
        0,
    ]


def test_pictures_are_the_right_ones(on_shelf):
    def widths(name):
        return [[i.size[0] - 40 for i in r['images']] for r in SUITES[name]()]

    assert (
        widths('mmmu') == [[1, 2], [3], [4]]
        and widths('gqa') == [[61], [60], [61]]
        and widths('mathvista') == [[10], [11], [12], [13], [14]]
    )
    assert (
        widths('mme-p') == [[30], [30], [31], [31]]
        and widths('nine')[:5] == [[1, 2], [3], [4], [5], [6]]
        and widths('nine')[-3:] == [[61], [60], [61]]
    )


def test_the_nine_together(tiny, on_shelf, tmp_path):
    table = evaluate(tiny, suite='nine', batch_size=4, records=tmp_path / 'r.parquet', max_new_tokens=4, progress=False)
    assert (
        table.n.to_dict() == {b: SIZES[b] for b in TOP_SCORE}
        and table.chance['AI2D'] == 25
        and table.chance['MME-P'] == 750
    )
    again = evaluate(tiny, suite='nine', batch_size=1, max_new_tokens=4, progress=False)
    pd.testing.assert_frame_equal(table, again)
    kept = read_records(tmp_path / 'r.parquet')
    assert kept.score.tolist() == table.records.score.tolist() and len(kept) == sum(SIZES.values())
    for name in ('mmmu', 'gqa'):
        alone = evaluate(tiny, suite=name, max_new_tokens=4, progress=False).records
        both = again.records.set_index('id').prediction
        assert alone.prediction.tolist() == both[alone.id].tolist()


def test_both_halves_of_mme(on_shelf):
    q = question_table(SUITES['mme']())
    assert sorted(q.doc) == list(range(6)) and set(q.benchmark) == {'MME-C', 'MME-P'}


def test_a_suite_knows_its_questions_and_copies_no_picture(shelf):
    a, b = load_benchmarks('POPE', folder=shelf), load_benchmarks('POPE', folder=shelf / 'POPE')
    assert suite_fingerprint(a) == suite_fingerprint(b) != suite_fingerprint(a.select([0, 1])) and a.data.nbytes < 1500
    assert join_suites([a, load_benchmarks('SQA', folder=shelf)]).data.nbytes < 3000


def test_limits_are_kept_by_benchmark(on_shelf):
    q = question_table(SUITES['nine']())
    assert q.iloc[take_per_benchmark(q, 1)].groupby('benchmark').size().to_dict() == {
        b: 2 if b.startswith('MME') else 1 for b in TOP_SCORE
    }


# --- where the data come from -----------------------------------------------------------------------------------


def test_only_files_of_the_split_and_configuration(shelf):
    assert [p.name for p in parquet_files(shelf / 'MME', 'default', 'test')] == ['test-00000-of-00001.parquet']
    assert [p.parent.name for p in parquet_files(shelf / 'ScienceQA', 'ScienceQA-IMG', 'test')] == ['ScienceQA-IMG']
    assert [p.parent.name for p in parquet_files(shelf / 'POPE', 'default', 'test')] == ['data']


@pytest.mark.parametrize('at', ['', 'test', 'default/test'])
def test_folders_of_save_to_disk(at, tmp_path):
    raw = rows_of(*_pope())
    raw.save_to_disk(tmp_path / 'd' / at)
    assert load_benchmarks('POPE', folder=tmp_path / 'd')['id'][:] == ['POPE-0', 'POPE-1', 'POPE-2']


def test_a_dataset_dict_and_gqas_two_parts(tmp_path):
    datasets.DatasetDict(test=rows_of(*_pope()), train=rows_of(*_sqa())).save_to_disk(tmp_path / 'pope')
    assert len(load_benchmarks('POPE', folder=tmp_path / 'pope')) == 3
    for config, made in (('testdev_balanced_instructions', _gqa()), ('testdev_balanced_images', GQA_IMAGES)):
        rows_of(*made).save_to_disk(tmp_path / 'gqa' / config)
    assert [r['images'][0].size for r in load_benchmarks('GQA', folder=tmp_path / 'gqa')] == [
        (101, 50),
        (100, 50),
        (101, 50),
    ]


@pytest.fixture
def hub_cache(shelf, tmp_path, monkeypatch):
    "The cache of `datasets` as it is after a download of POPE, and of nothing else."
    made = datasets.load_dataset(
        'parquet',
        data_files=dict(test=str(shelf / 'POPE' / 'data' / 'test-00000-of-00001.parquet')),
        cache_dir=tmp_path / 'made',
    )
    was = next(p.parent for p in (tmp_path / 'made').rglob('dataset_info.json'))
    now = tmp_path / 'hub' / 'lmms-lab___pope' / 'default' / '0.0.0' / NINE_BENCHMARKS['POPE'].revision
    shutil.copytree(was, now)
    for p in now.glob('*.arrow'):
        p.rename(now / p.name.replace('parquet-', 'pope-'))
    info = json.loads((now / 'dataset_info.json').read_text()) | dict(
        dataset_name='pope', config_name='default', builder_name='parquet'
    )
    (now / 'dataset_info.json').write_text(
        json.dumps(info).replace('"dataset_name": "parquet"', '"dataset_name": "pope"')
    )
    monkeypatch.setattr(datasets.config, 'HF_DATASETS_CACHE', str(tmp_path / 'hub'))
    assert len(made['test']) == 3


def test_offline_the_cache_is_used(hub_cache, tiny):
    assert datasets.config.HF_HUB_OFFLINE
    table = evaluate(tiny, suite='pope', limit=2, max_new_tokens=2, progress=False)
    assert table.n['POPE'] == 2 and table.records.subtask.tolist() == ['random', 'popular']


def test_what_is_nowhere_says_how_to_get_it(hub_cache):
    with pytest.raises(
        FileNotFoundError,
        match='AI4Math/MathVista is neither in the cache nor within reach .*hf download AI4Math/MathVista '
        f'--repo-type dataset --revision {NINE_BENCHMARKS["MathVista"].revision} --local-dir FOLDER/MathVista',
    ):
        evaluate(None, suite='mathvista')


def test_folders_that_are_not_right(shelf, tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no folder nowhere'):
        load_benchmarks('POPE', folder=tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match='ai2d holds no files of the split validation'):
        read_benchmark_folder(shelf / 'ai2d', 'default', 'validation')
    (tmp_path / 'p').mkdir()
    (tmp_path / 'p' / 'test-0.parquet').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0')
    with pytest.raises(ValueError, match='p cannot be read as parquet, from test-0.parquet on'):
        load_benchmarks('POPE', folder=tmp_path / 'p')
    with pytest.raises(ValueError, match="no benchmark is called 'VQA': take one of MMMU, SQA"):
        load_benchmarks('VQA')
    with pytest.raises(ValueError, match='no benchmark is called'):
        load_benchmarks()


# --- bad rows ---------------------------------------------------------------------------------------------------


def changed(made, i=0, **change):
    f, rows = made
    return rows_of(f, [r | change if j == i else r for j, r in enumerate(rows)])


@pytest.mark.parametrize(
    'name, made, change, says',
    [
        (
            'SQA',
            _sqa,
            dict(answer=7),
            'row 0 of lmms-lab/ScienceQA cannot be read as a question of SQA: answer 7 of 2 options',
        ),
        ('AI2D', _ai2d, dict(answer='x'), 'row 0 of lmms-lab/ai2d cannot be read as a question of AI2D'),
        ('AI2D', _ai2d, dict(answer='-1'), 'answer -1 of 4 options'),
        ('MMMU', _mmmu, dict(options='none'), 'its options are no list'),
        ('MMMU', _mmmu, dict(image_2=None), 'row 0 of lmms-lab/MMMU lacks a picture'),
        ('MMMU', _mmmu, dict(question='<image 9> what?'), 'row 0 of lmms-lab/MMMU lacks a picture'),
        ('MME-P', _mme, dict(category='smell'), "category 'smell' belongs neither to perception nor to cognition"),
        ('MathVista', _mathvista, dict(choices=['x', 'y'], answer='z'), 'row 0 of AI4Math/MathVista cannot be read'),
        ('POPE', _pope, dict(image=None), 'row 0 of lmms-lab/POPE lacks a picture'),
        ('POPE', _pope, dict(question=None), 'row 0 of lmms-lab/POPE cannot be read'),
    ],
)
def test_a_bad_row_is_named(name, made, change, says):
    rows = changed(made(), **change)
    if len(rows) == 1:
        with pytest.raises(ValueError, match=says):
            to_suite(name, rows)
        return
    suite = to_suite(name, rows)
    reasons = suite.with_format(None)['excluded']
    assert len([why for why in reasons if why]) == 1 and re.search(says, ' '.join(reasons))
    assert len(question_table(suite)) == len(suite)


@pytest.mark.parametrize(
    'name, made, column',
    [
        (n, m, c)
        for n, m in (
            ('MMMU', _mmmu),
            ('SQA', _sqa),
            ('MathVista', _mathvista),
            ('AI2D', _ai2d),
            ('MME-C', _mme),
            ('POPE', _pope),
            ('DocVQA', _docvqa),
            ('GQA', _gqa),
        )
        for c in NINE_BENCHMARKS[n].columns.split() + NINE_BENCHMARKS[n].pictures.split()[:1]
    ],
)
def test_a_missing_column_is_named(name, made, column):
    with pytest.raises(ValueError, match=f'should have the column {column}; it has'):
        to_suite(name, rows_of(*made()).remove_columns([column]))


def test_gqa_needs_its_pictures():
    with pytest.raises(ValueError, match='GQA keeps its pictures in a data set of their own'):
        to_suite('GQA', rows_of(*_gqa()))
    with pytest.raises(ValueError, match="has no picture 'n1'"):
        to_suite('GQA', rows_of(*_gqa()), rows_of(*GQA_IMAGES).select([0]))
    with pytest.raises(ValueError, match='should have the column image'):
        to_suite('GQA', rows_of(*_gqa()), rows_of(*GQA_IMAGES).remove_columns('image'))


def test_what_only_shows_when_graded(tiny):
    with pytest.raises(ValueError, match="question 'MME-C-4' is half of a pair"):
        evaluate(tiny, to_suite('MME-C', rows_of(*_mme()).select(range(5))), progress=False)
    with pytest.raises(ValueError, match="question 'POPE-0' asks for yes or no and has another answer"):
        evaluate(tiny, to_suite('POPE', changed(_pope(), answer='maybe')), progress=False)
    with pytest.raises(ValueError, match="question 'MMMU-0' has an answer that is none of its options"):
        evaluate(tiny, to_suite('MMMU', changed(_mmmu(), answer='F')), progress=False)
    with pytest.raises(ValueError, match='no question of MME-C'):
        to_suite('MME-C', rows_of(*_mme()).select(range(4)))


def test_a_picture_that_does_not_decode_is_named(tiny, tmp_path):
    rows = rows_of(*_pope()).cast_column('image', datasets.Image(decode=False)).to_list()
    rows[1]['image'] = dict(bytes=rows[1]['image']['bytes'][:40], path=None)
    suite = to_suite('POPE', datasets.Dataset.from_list(rows, features=_pope()[0]))
    with pytest.warns(UserWarning, match=r'1 of 3 questions are left out: POPE-1 \(its image does not decode'):
        table = evaluate(tiny, suite, max_new_tokens=2, progress=False)
    assert (table.n['POPE'], table.of['POPE'], table.excluded.id.tolist()) == (2, 3, ['POPE-1'])
    assert len(question_table(suite)) == 3, 'what is asked is known without reading a picture'
    assert len(evaluate(tiny, suite, use_images=False, max_new_tokens=2, progress=False).records) == 3


def test_science_questions_without_a_picture_are_asked_without(tiny):
    ds = to_suite('SQA', changed(_sqa(), image=None))
    assert ds[0]['images'] == [] and '<image>' not in ds[0]['messages'][0]['content'] and len(ds[1]['images']) == 1
    assert evaluate(tiny, ds, max_new_tokens=2, progress=False).n['SQA'] == 2


def test_pictures_that_are_bytes_or_structs_are_read():
    plain = datasets.Features(dict(question=S, options=L, answer=S, image=dict(bytes=datasets.Value('binary'), path=S)))
    rows = rows_of(*_ai2d()).cast_column('image', datasets.Image(decode=False)).to_list()
    assert to_suite('AI2D', datasets.Dataset.from_list(rows, features=plain))[0]['images'][0].size == (60, 50)


def test_mathvista_answers_that_are_options():
    row = dict(question='q', unit='', precision=None, answer_type='text', choices=['yes', 'no'], answer='no')
    assert (
        ask_mathvista(row)['answer'] == 'B'
        and ask_mathvista(row | dict(choices=[], answer_type='text', answer='x'))['prompt'] == f'q\n{SHORT_PROMPT}'
    )


def test_an_mmmu_answer_in_brackets_that_is_no_list():
    assert (
        ask_mmmu(dict(id='validation_Math_1', question='q', options='[]', question_type='open', answer='[0, 1)'))[
            'answer'
        ]
        == '[0, 1)'
    )


def test_revisions_are_commits():
    assert all(
        len(b.revision) == 40 and set(b.revision) <= set('0123456789abcdef') for b in NINE_BENCHMARKS.values()
    ) and [*NINE_BENCHMARKS] == [*TOP_SCORE]


# --- scores above chance, with and without pictures -------------------------------------------------------------


@pytest.fixture(scope='module')
def ds():
    return small_suite()


@pytest.fixture(scope='module')
def q(ds):
    return question_table(ds)


def share(q, right=1.0):
    "A table of answers of which a share is right."
    ok = np.random.default_rng(0).random(len(q)) < right
    return benchmark_table(grade(q.assign(prediction=[a if k else '' for a, k in zip(q.answer, ok)])), draws=20)


def test_above_chance(q):
    base, half = share(q), share(q, 0.5)
    left = retention_above_chance_table(dict(same=base, half=half, guess=base.assign(value=base.chance)), base)
    assert (
        left['same'].to_numpy() == pytest.approx(100)
        and left['guess'].to_numpy() == pytest.approx(0)
        and list(left.index) == [*base.index, 'AVG']
    )
    assert left.half['AVG'] == pytest.approx(retention_above_chance(half, base))
    none = retention_above_chance_table(dict(a=half), base.assign(value=base.chance))
    assert none.isna().to_numpy().all()
    assert len(plot_above_chance(left).texts) == left.size


def test_stored_runs_become_tables(q):
    floor = chance_floor(q)
    with temporary_results():
        assert stored_tables('layer_pruning', floor) == {} and text_only_scores(load_results('layer_pruning')).empty
        for ratio, seed, use_images, avg in (
            (0.0, 0, True, 60.0),
            (0.3, 0, True, 40.0),
            (0.3, 1, True, 44.0),
            (0.3, 0, False, 20.0),
        ):
            method = 'layer' if ratio else 'none'
            run = Run('layer_pruning', ratio=ratio, seed=seed, use_images=use_images, method=method)
            metrics = dict(AVG=avg) | {b: avg * m / 100 for b, m in TOP_SCORE.items()}
            write_row(dict(key=run.key, run=vars(run), seconds=1.0, env={}, metrics=metrics))
        tables = stored_tables('layer_pruning', floor, use_images=True, method=('none', 'layer'))
        assert (
            set(tables) == {0, 30}
            and average_score(tables[30]) == pytest.approx(42)
            and list(tables[30].index) == [*TOP_SCORE]
        )
        assert set(stored_tables('layer_pruning', floor, method='layer', use_images=True)) == {30}
        assert retention_above_chance_table({'30 %': tables[30]}, tables[0]).notna().all().all()
        both = text_only_scores(load_results('layer_pruning'))
        assert both.to_dict('index') == {30.0: dict(multimodal=42.0, text_only=20.0)}


def test_the_papers_text_only_table():
    p = paper_text_only()
    assert (
        p.index.tolist() == [0, 15, 30, 45, 60]
        and p.multimodal[0] == pytest.approx(average_score(paper_table()), abs=0.01)
        and (p.text_only < p.multimodal).all()
    )
    ax = plot_text_only(p, 25.0)
    assert [l.get_label() for l in ax.lines] == ['with the picture', 'text only', 'guessing']


# --- cards ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def two(ds):
    "Two tables: one right but for every third question, one but for every second."
    q = question_table(ds)
    q = q.iloc[take_per_benchmark(q, 6)]

    def ok(k):
        return [a if i % k else ('no' if a == 'yes' else 'yes' if a == 'no' else '') for i, a in enumerate(q.answer)]

    return {
        n: benchmark_table(grade(q.assign(prediction=ok(k))), draws=10) for n, k in (('original', 3), ('pruned', 2))
    }


def test_kinds_of_questions(two):
    ids = {k: set(select_questions(two, k)) for k in ('all', 'lost', 'won', 'other')}
    assert (
        ids['lost'] | ids['won'] == ids['other']
        and not ids['lost'] & ids['won']
        and ids['other'] < ids['all']
        and len(ids['all']) == 54
    )
    want = [r.id for i, r in enumerate(two['original'].records.itertuples()) if i % 3 and not i % 2]
    assert select_questions(two, 'lost') == want and set(select_questions(two, 'lost', 'POPE')) == {
        i for i in want if i.startswith('POPE')
    }
    assert select_questions(dict(one=two['original']), 'lost') == []


def test_a_card_is_what_was_asked_and_answered(two, ds):
    id = select_questions(two, 'lost', 'POPE')[0]
    c = answer_card(ds, two, id)
    assert (
        c == answer_card(ds, two, id)
        and c.id == id
        and [s for _, _, s in c.answers] == [1, 0]
        and c.right == c.answers[0][1]
        and c.question in ds[list(ds['id']).index(id)]['messages'][0]['content']
    )
    assert c.png and id in repr(c) and len(repr(c)) < 400
    page = AnswerCard('a', '<b>&', 'x', (('m', '<script>', 0.0),))._repr_html_()
    assert '<script>' not in page and '&lt;script&gt;' in page and '✗' in page and '<img' not in page


def test_the_gallery_shows_what_the_function_gives(two, ds):
    w = answer_gallery(ds, two)
    benchmark_, kind, number = w.children[:3]
    benchmark_.value, kind.value, number.value = 'GQA', 'lost', 1
    assert (
        w.result
        == nth_card(ds, two, 'GQA', 'lost', 1)
        == answer_card(ds, two, select_questions(two, 'lost', 'GQA')[1 % len(select_questions(two, 'lost', 'GQA'))])
    )
    kind.value = 'won'
    n = len(select_questions(two, 'won', 'GQA'))
    assert w.result == nth_card(ds, two, 'GQA', 'won', 1 + n)
    assert nth_card(ds, dict(a=two['pruned']), 'GQA', 'lost').answers == ()


def test_cards_are_drawn(two, ds):
    cards = [answer_card(ds, two, i) for i in select_questions(two)[::10]]
    fig = plot_answer_cards(cards, columns=2)
    assert len(fig.axes) == 2 * 2 * -(-len(cards) // 2) and sum(len(a.images) for a in fig.axes) == len(cards)
    assert sum(t.get_text().startswith('✗') for a in fig.axes for t in a.texts) == sum(
        s < 0.5 for c in cards for _, _, s in c.answers
    )


# --- lmms-eval's logs -------------------------------------------------------------------------------------------


@pytest.fixture
def real(on_shelf):
    q = question_table(SUITES['nine']())
    return benchmark_table(
        grade(q.assign(prediction=[str(a[0]) if i % 3 else 'no idea' for i, a in enumerate(q.answer)])), draws=10
    )


def lines(path):
    return [json.loads(l) for l in path.read_text().splitlines()]


def test_logs_have_the_format_of_lmms_eval(real, tmp_path):
    files = {
        p.name.split('_samples_')[1][:-6]: p for p in export_samples(real, tmp_path, 'org/model', '20240101_000000')
    }
    assert set(files) == {b.task for b in NINE_BENCHMARKS.values()} and all(
        p.parent == tmp_path / 'org__model' and p.name.startswith('20240101_000000_samples_') for p in files.values()
    )
    for task, p in files.items():
        for i, s in enumerate(lines(p)):
            assert (
                list(s)[:6] == ['doc_id', 'target', 'filtered_resps', 'doc_hash', 'prompt_hash', 'target_hash']
                and list(s)[-1] == 'input'
                and len(s) == 8
            )
            assert (
                s['doc_id'] == i
                and isinstance(s['target'], str)
                and s['prompt_hash'] == hashlib.sha256(s['input'].encode()).hexdigest()
                and s['target_hash'] == hashlib.sha256(s['target'].encode()).hexdigest()
            )
    one = {t: lines(p)[-1] for t, p in files.items()}
    assert (
        one['docvqa_val']['target'] == "['1/8/93', '01/08/93']"
        and one['mathvista_testmini_format']['target'] == 'A'
        and one['scienceqa_img']['target'] == 'A'
        and one['mme']['target'] == 'No'
    )
    assert (
        set(one['gqa']) >= {'exact_match'}
        and set(one['docvqa_val']) >= {'anls'}
        and one['mmmu_val']['mmmu_acc']['subdomain'] == 'Math'
        and one['pope']['pope_accuracy']['ground_truth'] == 'no'
    )
    assert (
        one['mme']['mme_cognition_score']['question_id'] == 'code_reasoning/2.png'
        and lines(files['mme'])[0]['mme_perception_score']['category'] == 'existence'
    )


def test_logs_score_as_the_table_does(real, tmp_path):
    files = {p.name.split('_samples_')[1][:-6]: lines(p) for p in export_samples(real, tmp_path, 'm')}

    def mean(task, get):
        return 100 * np.mean([float(get(s)) for s in files[task]])

    assert mean('gqa', lambda s: s['exact_match']) == pytest.approx(real.value['GQA']) and mean(
        'docvqa_val', lambda s: s['anls']
    ) == pytest.approx(real.value['DocVQA'])
    assert mean('pope', lambda s: s['pope_accuracy']['score']) == pytest.approx(real.value['POPE']) and mean(
        'mathvista_testmini_format', lambda s: s['llm_as_judge_eval']['true_false']
    ) == pytest.approx(real.value['MathVista'])
    by = {}
    for s in files['mme']:
        for key in ('mme_perception_score', 'mme_cognition_score'):
            if key in s:
                by.setdefault((key, s[key]['category'], s[key]['question_id']), []).append(s[key]['score'])
    total = {k: 0.0 for k in ('mme_perception_score', 'mme_cognition_score')}
    n = {k: {c for a, c, _ in by if a == k} for k in total}
    for (k, _, _), scores in by.items():
        total[k] += 100 * np.mean(scores) + 100 * (sum(scores) == 2)
    assert total['mme_cognition_score'] / len(n['mme_cognition_score']) * 4 == pytest.approx(
        real.value['MME-C']
    ) and total['mme_perception_score'] / len(n['mme_perception_score']) * 10 == pytest.approx(real.value['MME-P'])


def test_there_and_back(real, tmp_path):
    export_samples(real, tmp_path, 'm')
    back = table_from_samples(SUITES['nine'](), read_samples(tmp_path))
    assert back.value.to_dict() == pytest.approx(real.value.to_dict()) and back.n.tolist() == real.n.tolist()
    pope = table_from_samples(SUITES['pope'](), read_samples(next(tmp_path.rglob('*_samples_pope.jsonl'))))
    assert pope.value['POPE'] == pytest.approx(real.value['POPE']) and list(pope.index) == ['POPE']


def test_logs_as_lmms_eval_itself_writes_them(on_shelf, tmp_path):
    log = [
        dict(
            doc_id=i,
            target='yes',
            resps=[['<think>x</think> yes']],
            filtered_resps=f,
            doc_hash='0',
            pope_accuracy={},
            input=p,
        )
        for i, (f, p) in enumerate(zip((['yes'], 'no', [['No']]), prompts('pope')))
    ]
    (tmp_path / '20250101_000000_samples_pope.jsonl').write_text('\n'.join(map(json.dumps, log)) + '\n')
    t = table_from_samples(SUITES['pope'](), read_samples(tmp_path))
    assert t.value['POPE'] == 100 and t.records.prediction.tolist() == ['yes', 'no', 'No']


def test_bad_logs(real, on_shelf, tmp_path):
    export_samples(real, tmp_path, 'm', 'now')
    logs = read_samples(tmp_path)
    with pytest.raises(FileExistsError, match='now_samples_mmmu_val.jsonl is there already'):
        export_samples(real, tmp_path, 'm', 'now')
    with pytest.raises(ValueError, match="'POPE-0' was asked in other words"):
        table_from_samples(SUITES['pope'](), logs.assign(prompt='what?'))
    with pytest.raises(ValueError, match='several answers to one question'):
        table_from_samples(SUITES['pope'](), pd.concat([logs, logs]))
    with pytest.raises(ValueError, match='the logs hold no answers to this suite: they are of gqa'):
        table_from_samples(SUITES['pope'](), logs[logs.task == 'gqa'])
    with pytest.raises(FileNotFoundError, match='holds no logs'):
        read_samples(tmp_path / 'nothing')
    (tmp_path / 'x_samples_pope.jsonl').write_text('no json')
    with pytest.raises(ValueError, match='x_samples_pope.jsonl, line 1 is no log of samples'):
        read_samples(tmp_path / 'x_samples_pope.jsonl')


@pytest.mark.parametrize(
    'line, says',
    [
        ('', 'is empty: it holds no samples'),
        ('[1]', 'line 1 is a list and no sample'),
        ('{"doc_id": 0, "target": "yes"}', 'line 1 has no filtered_resps'),
        ('{"doc_id": 0, "target": "yes", "filtered_resps": []}', r'has no answer: its filtered_resps are \[\]'),
        ('{"doc_id": 0, "target": "yes", "filtered_resps": [[]]}', 'has no answer'),
        ('{"doc_id": 0, "target": "yes", "filtered_resps": null}', 'has no answer'),
    ],
)
def test_lines_that_are_no_samples(line, says, tmp_path):
    (tmp_path / 'x_samples_pope.jsonl').write_text(line)
    with pytest.raises(ValueError, match=says):
        read_samples(tmp_path)


@pytest.mark.parametrize('mark', ['\u2028', '\u2029', '\x85', '\x0c', '\x1e'])
def test_a_line_ends_at_a_newline_only(mark, real, on_shelf, tmp_path):
    records = real.records.assign(prediction=f'Yes{mark}because')
    export_samples(benchmark_table(grade(records), draws=5), tmp_path, 'm', 'now')
    assert set(read_samples(tmp_path).prediction) == {f'Yes{mark}because'}


def test_half_a_pair_and_values_alone(real, on_shelf, tmp_path):
    export_samples(real, tmp_path, 'm', 'now')
    logs = read_samples(tmp_path)
    mme = logs[logs.task == 'mme']
    with pytest.raises(ValueError, match='half of a pair: the partner of'):
        table_from_samples(SUITES['mme'](), mme.iloc[:-1])
    by_harness = table_from_samples(SUITES['pope'](), logs, rule='lmms-eval')
    assert by_harness.rule == 'lmms-eval' and by_harness.records.rule.eq('lmms-eval').all()
    results = tmp_path / '2024_results.json'
    results.write_text(json.dumps({'results': {'gqa': {'exact_match,none': 0.5}, 'mmlu': {'acc,none': 1}}}))
    assert read_results(results).value.to_dict() == {'GQA': 50}
    with pytest.raises(ValueError, match='holds values and no answers: read it with read_results'):
        read_samples(results)
    results.write_text('{"results": {"mmlu": {}}}')
    with pytest.raises(ValueError, match='holds no value of the nine benchmarks; it has mmlu'):
        read_results(results)


def test_sisters_and_halves_are_refused(tmp_path, monkeypatch):
    pope = rows_of(*_pope())
    for name, place in dict(DocVQA='DocVQA/InfographicVQA/validation', SQA='ScienceQA/ScienceQA-FULL/test').items():
        (tmp_path / place).parent.mkdir(parents=True)
        pope.to_parquet(tmp_path / f'{place}-00000-of-00001.parquet')
        with pytest.raises(ValueError, match='it is not scored as such'):
            load_benchmarks(name, folder=tmp_path)
    with pytest.raises(ValueError, match='rows of ScienceQA-FULL, not of ScienceQA-IMG'):
        to_suite('SQA', rows_of(_sqa()[0], [r | dict(image=None) for r in _sqa()[1]] * 2))
    (tmp_path / 'POPE').mkdir()
    pope.to_parquet(tmp_path / 'POPE' / 'test-00000-of-00003.parquet')
    with pytest.raises(FileNotFoundError, match='POPE lacks 2 of 3 shards: test-00001-of-00003.parquet'):
        load_benchmarks('POPE', folder=tmp_path)
    monkeypatch.setenv('LVLM_BENCHMARKS', str(tmp_path / 'nowhere'))
    with pytest.raises(FileNotFoundError, match='LVLM_BENCHMARKS=.*nowhere is no folder'):
        load_benchmarks('POPE')
    monkeypatch.setenv('LVLM_BENCHMARKS', str(tmp_path))
    with pytest.raises(FileNotFoundError, match='holds no folder GQA; it holds DocVQA, POPE, ScienceQA'):
        load_benchmarks('GQA')


def test_moved_repositories_are_tried_and_named(monkeypatch):
    tried = []

    def unreachable(repo, *args, **kw):
        tried.append(repo)
        raise ConnectionError

    monkeypatch.delenv('LVLM_BENCHMARKS', raising=False)
    monkeypatch.setattr('lvlm_study.evaluation.benchmarks.datasets.load_dataset', unreachable)
    with pytest.raises(FileNotFoundError, match=r'lmms-lab/POPE \(moved to lmms-lab-encoder/POPE\)'):
        load_benchmarks('POPE')
    assert tried == ['lmms-lab/POPE', 'lmms-lab-encoder/POPE']
    assert (NINE_BENCHMARKS['DocVQA'].new_tokens, NINE_BENCHMARKS['MathVista'].new_tokens) == (32, 16384)


def test_small_tasks_have_names_of_their_own(two, tmp_path):
    names = {p.name for p in export_samples(two['pruned'], tmp_path, 'm', 't')}
    assert names == {f't_samples_small_{b.lower()}.jsonl' for b in TOP_SCORE} and not {
        lmms_eval_task(b, False) for b in NINE_BENCHMARKS
    } & {lmms_eval_task(b) for b in NINE_BENCHMARKS}
    back = table_from_samples(small_suite(), read_samples(tmp_path))
    assert back.value.to_dict() == pytest.approx(two['pruned'].value.to_dict())


def test_answers_for_lmms_evals_own_metrics(real, tmp_path):
    paths = export_for_scoring(real, tmp_path / 's', 'm')
    logs = {p.stem: json.loads(p.read_text()) for p in paths}
    assert set(logs) == {b.task for b in NINE_BENCHMARKS.values()}
    for t, log in logs.items():
        assert (
            log['model_configs']['task'] == t
            and log['args']['limit'] is None
            and [l['doc_id'] for l in log['logs']] == list(range(len(log['logs'])))
            and all(isinstance(l['resps'][0][0], str) for l in log['logs'])
        )
    assert 'logs=' + str(tmp_path / 's') in scoring_commands(tmp_path / 's') and all(
        t in scoring_commands(tmp_path / 's') for t in logs
    )
    with pytest.raises(FileExistsError):
        export_for_scoring(real, tmp_path / 's', 'm')


def test_commands_for_lmms_eval(tmp_path):
    for kind, loader in dict(llava='llava_hf', internvl='internvl_hf').items():
        (tmp_path / 'config.json').write_text(json.dumps(dict(model_type=kind)))
        shell = lmms_eval_commands(tmp_path)
        assert (
            f'--model {loader} ' in shell
            and f'pretrained={tmp_path} ' in shell
            and all(b.task in shell for b in NINE_BENCHMARKS.values())
            and shell.count('mme') == 1 + shell.count('--model_args mme')
            and 'use_cache' not in shell
        )
    assert lmms_eval_commands(tmp_path, ['POPE', 'GQA']).count('--tasks pope,gqa ') == 1
    (tmp_path / 'config.json').write_text('{"model_type": "gpt2"}')
    with pytest.raises(ValueError, match="no loader for a model of the type 'gpt2'"):
        lmms_eval_commands(tmp_path)
    with pytest.raises(FileNotFoundError, match='it has no config.json'):
        lmms_eval_commands(tmp_path / 'none')
