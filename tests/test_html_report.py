"The report and the explorer: whole pages that fetch nothing, hold what they should, and work in a browser."

import base64
import html
import io
import json
import re
import shlex
import statistics
import sys
from html.parser import HTMLParser
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from conftest import outside
from fastcore.script import _run_cli
from PIL import Image

from lvlm_study.evaluation.evaluate import evaluate
from lvlm_study.evaluation.statistics import BenchmarkTable, benchmark_table, paired_retention
from lvlm_study.models.loading import load_lvlm
from lvlm_study.pruning.plan import make_plan
from lvlm_study.study import cli as commands
from lvlm_study.study.explorer import explorer_data, explorer_page
from lvlm_study.study.html_report import (
    abilities_left,
    curve_svg,
    next_command,
    read_curves,
    report_html,
    report_name,
    shell_line,
    spider_svg,
    worst_questions,
    write_index,
    write_report,
)

SIZES = dict(lm=1000, total=1200, layers=[100] * 6)
TARGET, BOUND = 300, 5000  # Milliseconds from a key to a new picture: wanted, and the most on a busy machine
NASTY = '<script>alert(1)</script> & "quoted"'


class Whole(HTMLParser):
    "Every tag that is opened is closed, in order."

    VOID = {'meta', 'img', 'br', 'input', 'link'}

    def __init__(self, page):
        super().__init__()
        self.open, self.faults, self.tags, self.fetched = [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        a = dict(attrs)
        if a.get('src') and not a['src'].startswith('data:') or tag == 'link':
            self.fetched.append(a)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.faults.append(tag)


def table(scores):
    "A table of two benchmarks with a question each in its records."
    names = ['POPE', 'GQA', 'GQA']
    records = pd.DataFrame(
        dict(
            id=['a', 'b', 'c'],
            benchmark=names,
            prompt=['Is it red?', NASTY, 'Where?'],
            answer=['yes', 'left', 'right'],
            prediction=['yes' if s else NASTY for s in scores],
            score=[float(s) for s in scores],
        )
    )
    return benchmark_table(records.assign(ways=[2, 10, 10], subtask='', pair=records.id))


WAYS = {'POPE': 2, 'MME-P': 2, 'MME-C': 2, 'GQA': 20, 'DocVQA': 0, 'SQA': 4}


def suite(**right):
    "A table with as many questions a benchmark as there are scores; `_` stands for the dash in a name."
    rows = []
    for name, scores in right.items():
        b = name.replace('_', '-')
        for i, score in enumerate(scores):
            row = dict(id=f'{b}-{i}', benchmark=b, prompt='Which?', answer='yes', prediction='yes', score=float(score))
            rows.append(row | dict(ways=WAYS[b], subtask='count', pair=f'{b}-{i // 2}'))
    return benchmark_table(pd.DataFrame(rows))


def shares(n, *right):
    "For each share of right answers n scores; what a smaller share has right, a larger one has as well."
    order = np.random.default_rng(n).permutation(n)
    return [(order < round(share * n)).tolist() for share in right]


def cells(page):
    "First cell -> texts of a line of the table of scores."
    body = page.split('<table class="scores')[1].split('</table>')[0]
    lines = [re.findall('<t[dh]>(.*?)</t[dh]>', line) for line in re.findall('<tr>(.*?)</tr>', body)]
    return {line[0]: dict(zip(lines[0], line)) for line in lines}


def pair(*, first='tiny-llava', **right):
    "Two tables: for each benchmark the scores of the original and of the pruned model."
    return {name: suite(**{b: s[i] for b, s in right.items()}) for i, name in enumerate((first, 'pruned'))}


@pytest.fixture(scope='module')
def page():
    picture = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    ds = datasets.Dataset.from_list([dict(id=i, images=[picture]) for i in 'abc'])
    plan = make_plan(SIZES, [0, 1, 2, 5], 0.2, model='a model')
    curves = pd.DataFrame(dict(step=[1, 2, 3], sft=[2.0, 1.0, 0.5], hidden=[9, 4, np.nan], lr=[1e-3] * 3))
    tables = {'original': table([1, 1, 1]), 'pruned': table([1, 0, 1])}
    return report_html(f'Report {NASTY}', plan, curves, tables, ds, dict(data='5 %'), 'lvlm_doctor out/model')


def test_a_report_is_whole_and_fetches_nothing(page):
    found = Whole(page)
    assert found.faults == [] and found.open == [] and found.fetched == []
    assert 'script' not in found.tags and page.count('alert(1)') == page.count('&lt;script&gt;alert(1)')


def test_a_report_holds_its_parts(page):
    for words in ('What was removed', 'How training went', 'What is left of each ability', 'Questions that were lost'):
        assert words in page
    assert (
        'sft: 2 to 0.5 in 3 steps' in page and 'hidden: 9 to 4 in 2 steps' in page and 'lvlm_doctor out/model' in page
    )
    assert 'GQA 50 %' in page and 'POPE 100 %' in page and page.count('<article>') == 1


def test_the_picture_of_a_lost_question_is_inside(page):
    data = page.split('data:image/png;base64,')[1].split('"')[0]
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (10, 10)


def test_parts_that_are_not_there_are_left_out():
    page = report_html('alone', tables={'model': table([1, 0, 1])})
    assert 'What was removed' not in page and 'Questions that were lost' not in page and 'Scores' in page
    assert Whole(page).faults == []


def test_scores_come_with_questions_and_intervals():
    tables = pair(POPE=shares(240, 0.95, 0.8), GQA=shares(60, 0.6, 0.58), SQA=shares(60, 0.5, 0.9))
    page = report_html('pruned', tables=tables)
    lines = cells(page)
    assert [lines[b]['questions'] for b in ('POPE', 'GQA', 'SQA')] == ['240', '60', '60']
    for b in ('POPE', 'GQA', 'SQA'):
        value, low, high = paired_retention(tables['pruned'], tables['tiny-llava'], b)
        assert lines[b]['left in % (95 % interval)'] == f'{value:.1f} ({low:.1f} to {high:.1f})'
    assert {b: lines[b]['reading'] for b in lines if b in WAYS} == dict(POPE='less', GQA='within noise', SQA='more')
    for kind, b in {'Less than tiny-llava': 'POPE', 'More than tiny-llava': 'SQA', 'Within noise': 'GQA'}.items():
        assert f'<b>{kind}</b>: {b}</li>' in page
    assert page.count('class="bar"') == 3 and 'Few questions' not in page and 'drawn again 1000 times' in page


def test_left_out_questions_are_counted():
    tables = pair(POPE=shares(40, 0.9, 0.8))
    gone = pd.DataFrame(dict(id=['x', 'y'], benchmark='POPE', why='broken'))
    tables['pruned'] = benchmark_table(tables['pruned'].records, excluded=gone)
    assert cells(report_html('pruned', tables=tables))['POPE']['questions'] == '40 of 42'


def test_sums_of_points_are_no_percents():
    tables = pair(MME_P=shares(40, 0.9, 0.8), MME_C=shares(40, 0.9, 0.8), POPE=shares(40, 0.9, 0.8))
    for given in (tables, {'pruned': tables['pruned']}):
        page = report_html('pruned', tables=given)
        scale = {b: line['scale'] for b, line in cells(page).items()}
        assert scale == {'benchmark': 'scale', 'MME-P': 'of 2000', 'MME-C': 'of 800', 'POPE': '%'}
        assert 'sums of points, not percent, are MME-C of 800 and MME-P of 2000.' in page
    assert 'sums of points' not in report_html('pruned', tables=pair(POPE=shares(40, 0.9, 0.8)))


def test_where_the_original_only_guesses_nothing_is_lost():
    known = dict(GQA=shares(60, 0.8, 0.8), SQA=shares(60, 0.9, 0.4))
    tables = pair(POPE=shares(60, 0.5, 0.2), DocVQA=shares(60, 0, 0), **known)
    page = report_html('pruned', tables=tables)
    lines, found = cells(page), abilities_left(tables['pruned'], tables['tiny-llava'])
    for b in ('POPE', 'DocVQA'):
        assert lines[b]['left in % (95 % interval)'] == '–' and lines[b]['reading'] == 'not measurable'
        assert np.isnan(found.left[b]) and f'{b} –' in page
    assert '<b>Not measurable</b>: tiny-llava scores 0 on DocVQA and is not above guessing on POPE; what' in page
    assert page.count('class="dot"') == 2 and '<b>Less than tiny-llava</b>: SQA</li>' in page
    assert '<b>Not measurable</b>: none' in report_html('pruned', tables=pair(POPE=shares(60, 0.9, 0.8)))


def test_few_questions_are_no_finding():
    "Where every draw says the same, the intervals of both scores decide: one question shows nothing, sixty do."
    for n, reading in ((1, 'within noise'), (4, 'within noise'), (60, 'less')):
        tables = pair(GQA=shares(n, 1, 0))
        found = abilities_left(tables['pruned'], tables['tiny-llava']).loc['GQA']
        assert found.left == found.low == 0 < found.high and found.reading.startswith(reading)
        assert ('Few questions' in report_html('p', tables=tables)) == (n < 30)
    same = pair(GQA=shares(20, 1, 1))
    found = abilities_left(same['pruned'], same['tiny-llava']).loc['GQA']
    assert found.low < found.left == 100 < found.high and found.reading == 'within noise'


def test_where_no_draw_can_move_a_value_nothing_is_said():
    "A pair of MME a subtask: drawn within subtasks, it is always the same one."
    tables = pair(MME_P=([1, 1, 1, 0], [1, 0, 0, 0]), POPE=shares(40, 0.9, 0.4))
    for t in tables.values():
        t.records['subtask'] = t.records.pair
    page = report_html('pruned', tables={name: benchmark_table(t.records) for name, t in tables.items()})
    assert cells(page)['MME-P']['left in % (95 % interval)'] == '20.0'
    assert cells(page)['MME-P']['reading'] == 'too few questions' and page.count('class="bar"') == 1
    assert '<b>Too few questions</b>: MME-P' in page and '<b>Less than tiny-llava</b>: POPE</li>' in page


def test_what_guessing_reaches_too_is_marked():
    tables = pair(POPE=shares(100, 0.95, 0.55), GQA=shares(100, 0.95, 0.55))
    lines, page = cells(report_html('pruned', tables=tables)), report_html('pruned', tables=tables)
    assert (lines['POPE']['reading'], lines['GQA']['reading']) == ('less, near guessing', 'less')
    assert '<b>Less than tiny-llava</b>: POPE, GQA</li>' in page


def test_without_answers_to_the_same_questions_there_is_no_interval():
    tables = pair(POPE=shares(60, 0.9, 0.5))
    for records in (None, tables['pruned'].records.head(50)):
        bare = BenchmarkTable(tables['pruned'])
        bare.records = records
        page = report_html('pruned', tables=tables | {'pruned': bare})
        assert cells(page)['POPE']['left in % (95 % interval)'] == '55.6' and 'No intervals' in page
        assert 'class="bar"' not in page and 'Questions that were lost' not in page and '>none<' not in page


@pytest.mark.parametrize('name', ['llava-v1.5-7b', NASTY, 'original'])
def test_the_original_is_named(name):
    page = report_html('mine', tables=pair(first=name, POPE=shares(60, 0.9, 0.5)))
    said = html.escape('the original' if name == 'original' else name)
    for words in (f'<h1>mine, compared with {said}</h1>', f'<title>mine, compared with {said}</title>'):
        assert words in page
    assert f'Dashed: {said} (100 %)' in page and f'<th>{html.escape(name)}</th>' in page and Whole(page).faults == []
    assert f'Of 60 questions {said} answers 54 rightly and pruned 30: 24 were lost' in page


def test_examples_say_how_many_they_stand_for():
    picture = Image.new('RGB', (4, 4))
    tables = pair(POPE=([1] * 9 + [0] * 3, [0] * 9 + [1] * 3), GQA=([1] * 4, [1, 1, 0, 0]))
    ids = tables['pruned'].records.id
    ds = datasets.Dataset.from_list([dict(id=i, images=[picture]) for i in ids])
    page = report_html('pruned', tables=tables, ds=ds)
    assert 'Of 16 questions tiny-llava answers 13 rightly and pruned 5: 11 were lost (right before' in page
    assert 'and 3 won (wrong before' in page and page.count('<article>') == 6
    assert '6 of the 11 lost ones are shown, as examples: of each benchmark in turn the first in the order' in page
    shown = re.findall('<article>.*?<p class="soft">(.*?)</p>', page)
    assert shown == ['POPE-0', 'GQA-2', 'POPE-1', 'GQA-3', 'POPE-2', 'POPE-3']
    assert 'All that were lost are shown' in report_html('pruned', tables=tables, ds=ds, number=20)
    better = report_html('pruned', tables=dict(reversed(tables.items())), ds=ds, number=0)
    assert '3 were lost' in better and '11 won' in better and '<article>' not in better


def test_worst_questions_come_from_all_benchmarks_in_turn():
    tables = {'original': table([1, 1, 1]), 'pruned': table([0, 0, 0])}
    assert worst_questions(tables, 2) == ['a', 'b'] and worst_questions(tables) == ['a', 'b', 'c']
    assert worst_questions({'original': table([0, 0, 0]), 'pruned': table([1, 1, 1])}) == []


def test_only_reports_are_replaced(tmp_path, page):
    path = write_report(tmp_path / 'report.html', page)
    write_report(path, page.replace('5 %', '7 %'))
    assert '7 %' in path.read_text()
    path.write_text('mine')
    with pytest.raises(FileExistsError, match='no report'):
        write_report(path, page)
    assert path.read_text() == 'mine'
    assert write_report(path, page, force=True).read_text() == page


def test_curves_are_found_beside_the_model_and_above(tmp_path):
    (tmp_path / 'model').mkdir()
    assert read_curves(tmp_path / 'model') is None
    (tmp_path / 'curves.jsonl').write_text('{"step": 1, "sft": 2.0}\n{"step": 2, "sft": 1.5}\n')
    assert read_curves(tmp_path / 'model').sft.tolist() == [2.0, 1.5] == read_curves(tmp_path).sft.tolist()


def test_what_was_not_scored_is_no_number():
    picture = spider_svg(pd.Series(dict(POPE=50.0, GQA=np.nan, AI2D=130.0)))
    assert 'nan' not in picture and 'GQA –' in picture and '130 %' in picture


def points(picture, kind):
    return re.findall(f'points="([^"]*)" class="{kind}"', picture)


def test_what_is_not_measurable_is_not_drawn_as_a_loss():
    "No dot, no edge and no bar lies at the center or leads to it; guessing is not drawn there either."
    left = pd.Series(dict(POPE=50.0, GQA=np.nan, AI2D=130.0, SQA=80.0))
    bars = pd.DataFrame(dict(low=left - 10, high=left + 10))
    picture = spider_svg(left, pd.Series(dict(POPE=30.0, GQA=np.nan, AI2D=20.0, SQA=10.0)), bars)
    assert picture.count('class="dot"') == 3 and 'cx="190.0" cy="150.0"' not in picture
    edges = re.findall('<polyline points="([^"]*)" class="model"', picture)
    assert len(edges) == 1 and len(edges[0].split()) == 3 and not re.search(r'190(.0)?,150', edges[0])
    assert len(points(picture, 'bar')) == 3 and 'polygon' in picture
    whole = spider_svg(left.fillna(60.0))
    assert '<polyline' not in whole and len(points(whole, 'model')) == 1 and len(points(whole, 'model')[0].split()) == 4
    assert spider_svg(left * np.nan).count('class="model"') == 0 and 'nan' not in spider_svg(left * np.nan)


def test_one_step_is_seen():
    assert 'in 1 step<' in curve_svg([1], [3.0], 'sft') and '<circle' in curve_svg([1], [3.0], 'sft')


def test_a_flat_curve_is_drawn():
    assert 'nan' not in curve_svg([1, 2], [3.0, 3.0], 'sft') and 'nan' not in curve_svg([1], [3.0], 'sft')


def test_every_command_has_a_next_one():
    done = dict(model='m', out='o', folder='f', suite='small')
    names = ('lvlm_score', 'lvlm_prune', 'lvlm_recover', 'lvlm_evaluate', 'lvlm_doctor')
    lines = [next_command(name, done, dict(ok=True)) for name in names]
    assert all(line.startswith('lvlm_') for line in lines) and len(set(lines)) == len(lines)
    assert next_command('lvlm_doctor', done, dict(ok=False)) == ''
    taken = dict(ok=True, engines=[dict(engine='llama.cpp', takes='yes')])
    assert next_command('lvlm_doctor', done, taken).startswith('lvlm_evaluate f')  # A name, and no folder to write into
    assert next_command('lvlm_evaluate', done | dict(records='r.parquet'), {}) == 'lvlm_score m scores'
    assert next_command('lvlm_evaluate', done | dict(records='r.parquet'), dict(retention=90.0)) == 'lvlm_doctor m'


@pytest.mark.parametrize('command', ['lvlm_score', 'lvlm_prune'])
def test_hints_keep_the_data_and_can_be_pasted(command):
    given = dict(model='my model', out='o', data="it's.json", images='two words', skip=True)
    line = next_command(command, given, {})
    words = shlex.split(line)
    for name in ('data', 'images'):
        assert words[words.index(f'--{name}') + 1] == given[name]
    assert '--skip' in words and 'my model' in words and not re.search(r'\b[A-Z]{3,}\b|\.\.\.', line)
    assert '--data' not in next_command(command, dict(model='m', out='o', data='small'), {})


def test_the_same_questions_are_asked_again():
    line = next_command('lvlm_evaluate', dict(model='m', suite='pope', rule='lmms-eval', limit=5), {})
    assert shlex.split(line)[-2:] == ['--limit', '5'] and '--suite pope --rule lmms-eval' in line
    assert '--records original.parquet' in line


def test_hints_end(tmp_path):
    "From an examined folder to its file for an engine, and from there to nothing."
    folder, taken = tmp_path / 'pruned', dict(ok=True, engines=[dict(engine='llama.cpp', takes='yes')])
    folder.mkdir()
    assert next_command('lvlm_doctor', dict(folder=str(folder)), taken).endswith('--type Q8_0')
    (folder / 'model-Q8_0.gguf').touch()
    assert next_command('lvlm_doctor', dict(folder=str(folder)), taken) == ''


def test_a_repaired_model_is_asked_before_any_training():
    done = dict(model='m', out='smaller')
    assert next_command('lvlm_prune', done, {}).startswith('lvlm_recover smaller recovered --teacher m')
    assert '--large' in next_command('lvlm_prune', done, dict(parameters=7e9))
    assert next_command('lvlm_prune', done | dict(repair=True), {}) == 'lvlm_evaluate smaller --records smaller.parquet'


def test_after_recovery_the_questions_of_the_original_are_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = dict(out='recovered')
    assert '--base' not in next_command('lvlm_recover', done, {})
    (tmp_path / 'original.parquet').write_text('of somebody else')
    assert '--base' not in next_command('lvlm_recover', done, {})
    (tmp_path / 'original.parquet').unlink()
    lvlm = load_lvlm('tiny-llava')
    evaluate(lvlm, 'small', limit=2, records='original.parquet', rule='lmms-eval', progress=False)
    line = next_command('lvlm_recover', done, {})
    assert '--base original.parquet' in line and '--rule lmms-eval' in line and line.endswith('--limit 2')


def test_lines_for_a_shell():
    assert shell_line('c', Path('a b'), x='-1', y=True, z=False, r=0.3) == "c 'a b' --x=-1 --y --r 0.3"


def test_the_explorer_shows_what_is_stored():
    data = explorer_data()
    row = next(r for r in data['rows'] if r[:6] == ['tiny-llava', 'layer', 0.3, 'none', 0.0, 0])
    assert row[6] == pytest.approx(91.2, abs=0.06) and row[13] == 69.2 and len(row[12]) == len(data['names']) == 9
    assert any(line.startswith('lvlm_prune tiny-llava') for line in row[14])
    repaired = next(r for r in data['rows'] if r[:6] == ['tiny-llava', 'layer', 0.3, 'none', 0.0, 1])
    assert repaired[6] > row[6] and repaired[13] is None and repaired[10] == row[10]
    assert any('--repair' in line for line in repaired[14])
    assert any('LLaVA-v1.5-7B' in line for line in data['times']['tiny-llavalayer0.3'])
    page = explorer_page()
    assert len(page) < 250_000 and Whole(page).fetched == []


@pytest.mark.browser
def test_the_report_in_a_browser(page, tmp_path, browser):
    path = write_report(tmp_path / 'report.html', page)
    for scheme in ('light', 'dark'):
        with outside(browser, 'file://', color_scheme=scheme) as (tab, asked):
            tab.goto(f'file://{path}')
            tab.set_viewport_size(dict(width=360, height=700))
            colors = tab.evaluate(
                '[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]'
            )
            bright = [sum(map(int, c[4:-1].split(','))) for c in colors]
            assert (bright[0] < bright[1]) == (scheme == 'light')
            assert tab.evaluate('document.documentElement.scrollWidth') <= 360
            assert tab.evaluate('[...document.images].every(i => i.naturalWidth > 0)') and asked == []


TOOK = """() => new Promise(done => { const t = performance.now()
  requestAnimationFrame(() => requestAnimationFrame(() => done(performance.now() - t))) })"""


INSIDE = """[...document.querySelectorAll('svg text')].filter(t => {
  const r = t.getBoundingClientRect(), s = t.ownerSVGElement.getBoundingClientRect()
  return r.left < s.left - 1 || r.right > s.right + 1 || r.top < s.top - 1 || r.bottom > s.bottom + 1
}).map(t => t.textContent)"""
HEIGHT = "Math.min(...[...document.querySelectorAll('svg text')].map(t => t.getBoundingClientRect().height))"


@pytest.mark.browser
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_explorer_can_be_read(tmp_path, browser, scheme):
    "Wide and narrow, light and dark: nothing is cut off, letters have a size, words stand out from the ground."
    (tmp_path / 'explorer.html').write_text(explorer_page(whole=True))
    with outside(browser, 'file://', color_scheme=scheme) as (tab, _):
        tab.goto(f'file://{tmp_path}/explorer.html')
        words = tab.locator('.soft').first.evaluate('e => getComputedStyle(e).color')
        numbers = [float(x) for x in re.findall(r'[\d.]+', words.replace('srgb', ''))[:3]]
        bright = sum(numbers) / (3 if 'srgb' in words else 3 * 255)
        assert bright > 0.8 if scheme == 'dark' else bright < 0.4
        for width in (1200, 400):
            tab.set_viewport_size(dict(width=width, height=900))
            assert tab.evaluate(INSIDE) == [] and tab.evaluate(HEIGHT) >= 11.5
            assert tab.evaluate('document.documentElement.scrollWidth') <= width
            code = tab.locator('pre')
            assert code.evaluate('e => e.scrollWidth <= e.clientWidth')


@pytest.mark.browser
def test_the_explorer_in_a_browser(tmp_path, browser, told):
    (tmp_path / 'explorer.html').write_text(explorer_page(whole=True))
    with outside(browser, 'file://') as (tab, asked):
        faults = []
        tab.on('pageerror', lambda e: faults.append(str(e)))
        tab.goto(f'file://{tmp_path}/explorer.html')
        shown = tab.locator('.lvlm-explorer')
        big, took = shown.locator('.big'), []
        assert tab.locator('.spider svg').count() == 1 and tab.locator('.stays rect').count() == 96
        tab.locator('[name=ratio]').focus()
        seen = [big.inner_text()]
        for key in ('ArrowLeft', 'ArrowRight', 'ArrowRight', 'ArrowRight'):
            tab.keyboard.press(key)
            took.append(tab.evaluate(TOOK))
            seen.append(big.inner_text())
        assert len(set(seen)) >= 4, 'the arrow keys change what is shown'
        tab.locator('[name=ratio]').press('Home')  # Nothing is removed: fewer bits alone
        assert '--type' in shown.locator('pre').inner_text() and 'lvlm_prune' not in shown.locator('pre').inner_text()
        tab.locator('[name=ratio]').press('ArrowRight')
        before, plain = big.inner_text(), shown.locator('pre').inner_text()
        tab.locator('[name=repair]').select_option('1')
        assert (
            big.inner_text() != before and '--repair' in shown.locator('pre').inner_text() and '--repair' not in plain
        )
        assert 'first word' in shown.locator('.time').inner_text()
        tab.locator('[name=repair]').select_option('0')
        tab.locator('[name=method]').select_option('width')
        tab.locator('[name=recovery]').select_option(index=1)
        assert (
            '--method width' in shown.locator('pre').inner_text()
            and 'lvlm_recover' in shown.locator('pre').inner_text()
        )
        tab.set_viewport_size(dict(width=360, height=700))
        assert tab.evaluate('document.documentElement.scrollWidth') <= 360
        assert faults == [] and asked == []
    ms = statistics.median(took)
    told(f'explorer: {ms:.0f} ms from a key to a new picture (target {TARGET})')
    assert ms <= BOUND


def names(folder):
    return sorted(p.name for p in folder.glob('*.html'))


def test_every_evaluation_has_a_page_of_its_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ['tiny-llava', '--limit', '1', '--device', 'cpu', '--records', 'a.parquet']
    monkeypatch.setattr(sys, 'argv', ['lvlm_evaluate', *words, '--json'])
    assert _run_cli(commands.lvlm_evaluate.__wrapped__, True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['report'] == 'report-a.html' and found['next'] == 'lvlm_score tiny-llava scores'
    first = (tmp_path / 'report-a.html').read_text()
    assert 'What is left of each ability' not in first and names(tmp_path) == ['report-a.html']
    found = commands.lvlm_evaluate('tiny-gqa', limit=1, device='cpu', records='b.parquet', base='a.parquet')
    page, index = (tmp_path / 'report-b.html').read_text(), (tmp_path / 'reports.html').read_text()
    assert 'What is left of each ability' in page and Whole(page).faults == []
    assert (tmp_path / 'report-a.html').read_text() == first and found['all_reports'] == 'reports.html'
    assert index.count('<li>') == 2 and 'href="report-b.html"' in index and Whole(index).faults == []
    for name in ('report-c.html', 'reports.html'):
        (tmp_path / name).write_text('mine')
        with pytest.raises(FileExistsError, match='no report'):
            commands.lvlm_evaluate('tiny-gqa', limit=1, device='cpu', records='c.parquet')
        (tmp_path / name).unlink()
    assert not (tmp_path / 'c.parquet').exists()


def test_the_page_of_a_recovery_is_not_an_evaluations(tmp_path, page):
    write_report(tmp_path / 'report.html', page)
    write_report(report_name(tmp_path / 'r.parquet'), page)
    assert write_index(tmp_path).name == 'reports.html' and names(tmp_path) == [
        'report-r.html',
        'report.html',
        'reports.html',
    ]
    index = (tmp_path / 'reports.html').read_text()
    assert index.count('data: 5 %') == 2 and 'compared with the original' in index
    write_report(tmp_path / 'report.html', report_html('no facts', tables=pair(POPE=shares(40, 0.9, 0.5))))
    write_index(tmp_path)
    assert (tmp_path / 'reports.html').read_text().count('<span class="soft"></span>') == 1
    (tmp_path / 'report-x.html').write_text('<h1>of somebody</h1>')
    assert write_index(tmp_path).read_text().count('<li>') == 2


def test_damaged_curves_are_named(tmp_path):
    (tmp_path / 'curves.jsonl').write_text('{"step": 1}\n{"step"')
    with pytest.raises(ValueError, match='curves.jsonl is damaged in line 2'):
        read_curves(tmp_path)
    (tmp_path / 'curves.jsonl').write_text('')
    assert read_curves(tmp_path) is None
