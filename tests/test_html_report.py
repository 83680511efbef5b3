"The report and the explorer: whole pages that fetch nothing, hold what they should, and work in a browser."

import base64
import io
import json
import statistics
import sys
from html.parser import HTMLParser

import datasets
import numpy as np
import pandas as pd
import pytest
from conftest import outside
from fastcore.script import _run_cli
from PIL import Image

from lvlm_study.evaluation.statistics import BenchmarkTable
from lvlm_study.pruning.plan import make_plan
from lvlm_study.study import cli as commands
from lvlm_study.study.explorer import explorer_data, explorer_page
from lvlm_study.study.html_report import (
    curve_svg,
    next_command,
    read_curves,
    report_html,
    worst_questions,
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
    value = 100 * records.groupby('benchmark').score.mean()
    t = BenchmarkTable(dict(value=value, n=1, low=value, high=value, chance=pd.Series(dict(POPE=50.0, GQA=10.0))))
    t.records = records
    return t


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


def test_a_flat_curve_is_drawn():
    assert 'nan' not in curve_svg([1, 2], [3.0, 3.0], 'sft') and 'nan' not in curve_svg([1], [3.0], 'sft')


def test_every_command_has_a_next_one():
    done = dict(model='m', out='o', folder='f', suite='small')
    names = ('lvlm_score', 'lvlm_prune', 'lvlm_recover', 'lvlm_evaluate', 'lvlm_doctor')
    lines = [next_command(name, done, dict(ok=True)) for name in names]
    assert all(line.startswith('lvlm_') for line in lines) and len(set(lines)) == len(lines)
    assert next_command('lvlm_doctor', done, dict(ok=False)) == ''
    assert '--base r.parquet' in next_command('lvlm_evaluate', done | dict(records='r.parquet'), {})


def test_the_explorer_shows_what_is_stored():
    data = explorer_data()
    row = next(r for r in data['rows'] if r[:5] == ['tiny-llava', 'layer', 0.3, 'none', 0.0])
    assert row[5] == pytest.approx(91.2, abs=0.06) and row[12] == 69.2 and len(row[11]) == len(data['names']) == 9
    assert any(line.startswith('lvlm_prune tiny-llava') for line in row[13])
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


@pytest.mark.browser
def test_the_explorer_in_a_browser(tmp_path, browser, told):
    (tmp_path / 'explorer.html').write_text(f'<!doctype html><meta charset="utf-8">{explorer_page()}')
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


def test_an_evaluation_leaves_a_report_and_says_what_is_next(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = ['tiny-llava', '--limit', '1', '--device', 'cpu', '--records', 'a.parquet']
    monkeypatch.setattr(sys, 'argv', ['lvlm_evaluate', *words, '--json'])
    assert _run_cli(commands.lvlm_evaluate.__wrapped__, True) == 0
    found = json.loads(capsys.readouterr().out)
    assert found['report'] == 'report.html' and found['next'].endswith('--base a.parquet')
    assert 'What is left of each ability' not in (tmp_path / 'report.html').read_text()
    commands.lvlm_evaluate('tiny-gqa', limit=1, device='cpu', records='b.parquet', base='a.parquet')
    page = (tmp_path / 'report.html').read_text()
    assert 'What is left of each ability' in page and Whole(page).faults == []
    (tmp_path / 'report.html').write_text('mine')
    with pytest.raises(FileExistsError, match='no report'):
        commands.lvlm_evaluate('tiny-gqa', limit=1, device='cpu', records='c.parquet')
    assert not (tmp_path / 'c.parquet').exists()
