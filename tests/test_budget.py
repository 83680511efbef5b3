"Budgets, stored times and shares of time: what can be compared, and what is refused in one sentence."

import json
import math
import os
import subprocess
import sys
from pathlib import Path
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from lvlm_study.core.plotting import COLORS
from lvlm_study.core.store import needs_rows, temporary_results
from lvlm_study.efficiency import timing
from lvlm_study.efficiency.budget import against_rivals, budget_options, cell_table, draw_budget, draw_quality_bytes
from lvlm_study.efficiency.budget import practitioner_sentence, quality_cells, rival_of, show_budget, what_fits
from lvlm_study.efficiency.costs import kv_cache_bytes, pruning_costs
from lvlm_study.efficiency.onnx_files import engine_version
from lvlm_study.efficiency.quantization import quantization_results, quantize, weight_bytes
from lvlm_study.efficiency.timing import NEAR_SHARE, compare_times, held_megabytes, remaining_times, share_verdicts
from lvlm_study.efficiency.timing import stored_times, time_lvlm, time_plans
from lvlm_study.models.architecture import parameter_sizes
from lvlm_study.models.loading import load_lvlm
from lvlm_study.pruning.plan import Plan
from lvlm_study.pruning.surgery import apply_plan


@pytest.fixture(scope='module')
def options():
    return budget_options()


@pytest.fixture(scope='module')
def lvlm():
    return load_lvlm('tiny-gqa')


def test_a_budget_takes_what_fits(options):
    fit = what_fits(options, 150, 0.8, 'Q8_0')
    assert len(fit) and (fit.file_MB <= 150).all() and (fit.token_time <= 0.8).all() and set(fit.kind) == {'Q8_0'}
    everything = what_fits(options, 150)
    assert set(everything.kind) == {'Q8_0', 'Q4_0'} and {'none', 'layer', 'width'} == set(everything.method)
    assert len(what_fits(options, 1e6)) == len(options) and not len(what_fits(options, 1))


def test_a_whole_model_is_left_out_where_its_share_is_too_large():
    "The time of a whole model is a number of the table, not a rule: were it smaller, it would fit."
    numbers = [('none', 0.7, 2), ('layer', 0.9, 3)]
    lines = [dict(method=m, kind='Q8_0', file_MB=10, token_time=t, near=n) for m, t, n in numbers]
    assert what_fits(pd.DataFrame(lines), 20, 0.8).method.tolist() == ['none']


def test_times_of_two_types_are_not_compared(options):
    with pytest.raises(ValueError, match='a wish for time needs one of F16, Q4_0, Q8_0'):
        what_fits(options, 150, 0.8)
    assert (options[options.method == 'none'].token_time == 1).all()
    assert options.seeds.max() == 3


def test_the_picture_marks_single_draws(options):
    best = what_fits(options, 150, 0.8, 'Q8_0').head(3)
    few = options.assign(seeds=1)
    for table, marked in ((options, (best.seeds < 3).sum()), (few, 3)):
        title = draw_budget(table, 150, 0.8, 'Q8_0').axes[0].get_title(loc='left')
        assert 'of the whole Q8_0 model' in title and title.count('draw') == marked


BUDGET_ERRORS = {
    'text': (lambda o: what_fits(o, '150'), 'a size and a share above 0'),
    'nan': (lambda o: what_fits(o, math.nan), 'a size and a share above 0'),
    'negative': (lambda o: what_fits(o, -1), 'a size and a share above 0'),
    'bool': (lambda o: what_fits(o, 150, True), 'a size and a share above 0'),
    'type': (lambda o: what_fits(o, 150, 0.8, 'int3'), "not 'int3'"),
    'model': (lambda o: budget_options('foo'), "is of 'foo'"),
    'engine': (lambda o: show_budget(150, 0.8, 'vllm'), "engine 'vllm', only of llama.cpp"),
    'list of engines': (lambda o: show_budget(engine=['a']), r"given by its name, .* not by \['a'\]"),
    'no options': (lambda o: what_fits('x', 150), 'options are what `budget_options` gives, .* not a str'),
    'other table': (lambda o: what_fits(o[['near']], 150), 'with kind, file_MB, token_time, near, not a table without'),
    'text of rival': (lambda o: rival_of(quality_cells(), 150, 'mid'), "not 'mid'"),
    'text of rivals': (lambda o: against_rivals(quality_cells(), 'mid'), "not 'mid'"),
    'size text': (lambda o: rival_of(quality_cells(), 'x'), "a number of megabytes above 0, not 'x'"),
    'size nan': (lambda o: rival_of(quality_cells(), math.nan), 'a number of megabytes above 0, not nan'),
    'size below 0': (lambda o: rival_of(quality_cells(), -1), 'a number of megabytes above 0, not -1'),
    'no cells for a rival': (lambda o: rival_of([], 150), 'cells are what `quality_cells` gives, .* not a list'),
    'no cells': (lambda o: cell_table({}), 'cells are what `quality_cells` gives, one at least, not an empty dict'),
    'no rivals': (lambda o: against_rivals({}), 'cells are what `quality_cells` gives, one at least'),
    'nothing said': (lambda o: practitioner_sentence({}), 'cells are what `quality_cells` gives, one at least'),
    'other dict': (lambda o: cell_table(dict(a=[1])), 'a cell is .method, target ratio, recipe, type. -> rows'),
    'no whole model': (lambda o: practitioner_sentence(cells_of('width')), 'no cell is of a whole model'),
    'highest nan': (lambda o: draw_quality_bytes(cell_table(quality_cells()), math.nan), 'above 0, not nan'),
    'highest text': (lambda o: draw_quality_bytes(cell_table(quality_cells()), 'a'), "above 0, not 'a'"),
    'highest low': (lambda o: draw_quality_bytes(cell_table(quality_cells()), 2), 'at most 2: the lowest is 20.6'),
    'no table': (lambda o: draw_quality_bytes({}), 'a table is what `cell_table` gives'),
}


def cells_of(method):
    return {key: rows for key, rows in quality_cells().items() if key[0] == method}


def test_whole_models_alone_have_no_rivals():
    assert list(against_rivals(cells_of('none')).columns) == list(against_rivals(quality_cells()).columns)
    assert practitioner_sentence(cells_of('none')) == ''


def test_what_fits_has_the_colors_of_the_legend(options):
    ax = draw_budget(options, 150).axes[0]
    legend = {t.get_text(): h.get_color() for t, h in zip(ax.get_legend().get_texts(), ax.get_legend().legend_handles)}
    best = what_fits(options, 150).iloc[0]
    assert best.method == 'none'
    marks = [line for line in ax.lines if list(line.get_xdata()) == [best.file_MB]]
    faces = {to_hex(line.get_markerfacecolor()) for line in marks}
    assert faces == {COLORS['original'].lower()} == {to_hex(legend['whole, fits'])}
    plt.close('all')


def test_the_line_is_the_rival():
    "At the size of each pruned model the line has the perplexity of the best whole model that is no larger."
    cells = quality_cells()
    table = cell_table(cells)
    for ax, text in zip(draw_quality_bytes(table).axes, ('near', 'far')):
        (line,) = [line for line in ax.lines if len(line.get_xdata()) > 1]
        assert line.get_drawstyle() == 'steps-post'
        sizes, qualities = map(np.array, line.get_data())
        found = against_rivals(cells, text)
        for pruned in found.itertuples():
            step = np.searchsorted(sizes, pruned.megabytes, 'right') - 1
            assert (step < 0) == (pruned.verdict == 'alone')
            if step >= 0:
                rival = table[(table.method == 'none') & (table.kind == pruned.rival)].iloc[0]
                assert qualities[step] == rival[text]
    plt.close('all')


def test_the_slider_ends_where_the_options_do(options):
    widgets = pytest.importorskip('ipywidgets')
    notebook = Path(__file__).parent.parent / 'nbs' / 'efficiency' / 'budget.ipynb'
    cells = [''.join(cell['source']) for cell in json.loads(notebook.read_text())['cells']]
    (source,) = [cell for cell in cells if 'sizes = FloatSlider(' in cell]
    names = dict(options=options, np=np, FloatSlider=widgets.FloatSlider, fixed=str, interactive=dict, show_budget=0)
    exec(source.replace('interactive(show_budget, ', 'interactive('), names)
    low, high = options.file_MB.min(), options.file_MB.max()
    assert low - 10 <= names['sizes'].min <= low and high <= names['sizes'].max <= high + 10


def refused_in_a_sentence(call, given, says):
    with pytest.raises(ValueError, match=says) as e:
        call(given)
    return '\n' not in str(e.value)


@pytest.mark.parametrize('case', BUDGET_ERRORS)
def test_budgets_are_refused_in_a_sentence(options, case):
    call, says = BUDGET_ERRORS[case]
    assert refused_in_a_sentence(call, options, says)


TIMING_ERRORS = {
    'batch': (lambda m: time_lvlm(m, batch_size=0), 'batch_size is a whole number from 1'),
    'words': (lambda m: time_lvlm(m, words=0), 'words is a whole number from 1'),
    'rounds': (lambda m: time_lvlm(m, rounds=0), 'rounds is a whole number from 1'),
    'tokens': (lambda m: time_lvlm(m, tokens='a'), 'tokens is a whole number from 0'),
    'name': (lambda m: time_lvlm('tiny-gqa'), 'a model is loaded first'),
    'none': (lambda m: compare_times({}), 'nothing to compare'),
    'no batch': (lambda m: compare_times(dict(a=m), ()), 'nothing to compare'),
    'no dict': (lambda m: compare_times([m]), 'a dict of name -> model'),
    'name in dict': (lambda m: compare_times(dict(a='tiny-gqa')), 'a model is loaded first'),
    'no rounds': (lambda m: compare_times(dict(a=m), rounds=0), 'rounds is a whole number from 1'),
    'short': (lambda m: time_lvlm(m, tokens=10), 'the prompt with its picture has .* tokens, more than 10'),
    'long': (lambda m: time_lvlm(m, tokens=1020), 'at most 1,024, .* not 1,020 tokens and 8 words'),
    'huge': (lambda m: time_lvlm(m, tokens=10**12), 'at most 1,024'),
    'many words': (lambda m: time_lvlm(m, words=1024), 'at most 1,024'),
    'multiple 0': (lambda m: time_plans(parameter_sizes(m), 0), 'multiple is a whole number from 1 to 448, not 0'),
    'multiple below 0': (lambda m: time_plans(parameter_sizes(m), -32), 'multiple is a whole number from 1 to 448'),
    'multiple half': (lambda m: time_plans(parameter_sizes(m), 0.5), 'multiple is a whole number from 1 to 448'),
    'multiple large': (lambda m: time_plans(parameter_sizes(m), 449), 'multiple is a whole number from 1 to 448'),
    'sizes': (lambda m: time_plans('tiny-gqa'), 'sizes are what `parameter_sizes` gives, not a str'),
}
# The first values are legal, so that a check one by one would measure before it refuses
LATE_ERRORS = {
    'batch': (dict(batch_sizes=(1, 0)), 'batch_size is a whole number from 1 on, not 0'),
    'text': (dict(batch_sizes='12'), "batch_size is a whole number from 1 on, not '12'"),
    'length': (dict(lengths=(0, -1)), 'tokens is a whole number from 0 on, not -1'),
    'short': (dict(lengths=(128, 10)), 'the prompt with its picture has .* tokens, more than 10'),
    'long': (dict(lengths=[128, 4096]), 'at most 1,024, the positions of a, not 4,096 tokens and 8 words'),
    'one length': (dict(lengths=4096), 'at most 1,024'),
    'words': (dict(words=0), 'words is a whole number from 1 on, not 0'),
    'option': (dict(repeats=3), "options of a comparison are words and rounds, not 'repeats'"),
}


@pytest.mark.parametrize('case', LATE_ERRORS)
def test_all_values_are_checked_before_the_first_measurement(lvlm, monkeypatch, case):
    monkeypatch.setattr('lvlm_study.efficiency.timing._one_round', None)
    given, says = LATE_ERRORS[case]
    assert refused_in_a_sentence(lambda m: compare_times(dict(a=m, b=m), **given), lvlm, says)


def test_one_number_is_one_size(lvlm):
    times = compare_times(dict(a=lvlm), 2, 128, words=1, rounds=1)
    assert times.index.tolist() == [('a', 2, 128)]


def test_prompts_of_two_lengths_are_not_compared(lvlm, monkeypatch):
    other = load_lvlm('tiny-llava')
    real = timing._prompt
    monkeypatch.setattr(timing, '_one_round', None)

    def longer(m, batch_size, tokens):
        return real(m, batch_size, tokens or 114 if m is other else tokens)

    monkeypatch.setattr(timing, '_prompt', longer)
    with pytest.raises(ValueError, match=r'differ in their tokens \(a \d+, b 114\): give `lengths`') as e:
        compare_times(dict(a=lvlm, b=other))
    assert '\n' not in str(e.value)


@pytest.mark.parametrize('kind', ['int8', 'Q8_0', 'Q4_0'])
def test_weights_of_a_quantized_copy_are_its_own(lvlm, kind):
    if kind == 'int8' and not engine_version('torchao'):
        pytest.skip('torchao is not installed')
    small = quantize(lvlm, kind)
    times = compare_times(dict(whole=lvlm, small=small), words=1, rounds=1)
    assert times.weights_megabytes.tolist() == [weight_bytes(m) / 1e6 for m in (lvlm, small)]
    assert times.weights_megabytes.iloc[1] < times.weights_megabytes.iloc[0]


@pytest.mark.parametrize('case', TIMING_ERRORS)
def test_timers_refuse_in_a_sentence(lvlm, case):
    call, says = TIMING_ERRORS[case]
    assert refused_in_a_sentence(call, lvlm, says)


@pytest.mark.skipif(sys.platform != 'linux', reason='the kernel counts memory on Linux')
@pytest.mark.parametrize('word', ['VmXX', '', None, 'Vm'])
def test_memory_has_names(word):
    with pytest.raises(ValueError, match=f'is one of .*VmRSS.*, not {word!r}') as e:
        held_megabytes(word)
    assert '\n' not in str(e.value) and 0 < held_megabytes('VmRSS') <= held_megabytes('VmHWM')


def test_the_first_lesson_shows_what_it_says():
    "The cell under a claim on times shows times."
    notebook = Path(__file__).parent.parent / 'nbs' / 'efficiency' / 'timing.ipynb'
    (cell,) = [c for c in json.loads(notebook.read_text())['cells'] if "'a third': third}" in ''.join(c['source'])]
    shown = ''.join(cell['outputs'][0]['data']['text/plain'])
    assert all(f'{part}_ratio' in shown for part in ('look', 'prefill', 'decode'))


def test_memory_tells_models_apart(lvlm):
    times = compare_times(dict(whole=lvlm, half=apply_plan(lvlm, Plan.of(lvlm, range(6)))), words=1, rounds=1)
    weights = times.weights_megabytes.tolist()
    assert weights[0] == sum(p.numel() * 4 for p in lvlm.model.parameters()) / 1e6 > weights[1]
    assert {'tokens_per_second', 'decode_ratio'} <= set(times)


@pytest.mark.skipif(sys.platform != 'linux', reason='the kernel counts the peak on Linux')
def test_the_peak_holds_weights_and_what_a_prompt_needs(lvlm):
    "More and longer prompts need more beside the same weights, at least the cache of keys and values."
    few, many = (time_lvlm(lvlm, n, tokens, words=1, rounds=1) for n, tokens in ((1, 128), (8, 256)))
    assert few['weights_megabytes'] == many['weights_megabytes'] < few['peak_megabytes'] < many['peak_megabytes']
    cache = kv_cache_bytes(lvlm.config, 256, 8, 4) / 1e6
    assert many['peak_megabytes'] - many['weights_megabytes'] >= cache
    times = compare_times(dict(whole=lvlm, half=apply_plan(lvlm, Plan.of(lvlm, range(6)))), (8,), (256,), rounds=1)
    assert times.peak_ratio['whole'].item() == 1 > times.peak_ratio['half'].item() > 0


def test_within_means_both_measurements():
    found = share_verdicts(stored_times())
    near = (found[['measured', 'again']].sub(found.expected, axis=0).abs()).le(NEAR_SHARE * found.expected, axis=0)
    assert ((found.verdict == 'within') == near.all(axis=1)).all()
    assert (found.verdict[near.measured & ~near.again] == 'noise').all() and (found.verdict == 'noise').any()


def test_who_is_faster_by_published_and_measured():
    d = remaining_times()
    d = d.assign(removed=d.removed.round(1).where(d.source.str.contains(','), d.removed))
    pairs = d.pivot(index=['part', 'source', 'removed'], columns='method', values='time')
    assert len(pairs) == 20 and (pairs.layer < pairs.width).all()


READERS = [quality_cells, budget_options, pruning_costs, remaining_times, quantization_results]


@pytest.mark.parametrize('reader', READERS)
def test_without_rows_one_sentence_says_so(reader):
    with temporary_results(), pytest.raises(ValueError, match='no stored rows of .*LVLM_RESULTS names their folder'):
        reader()


def test_outside_the_checkout_its_own_rows_are_read(tmp_path):
    code = """from lvlm_study.efficiency.budget import budget_options
from lvlm_study.efficiency.costs import kv_cache_bytes, pruning_costs
from lvlm_study.efficiency.timing import remaining_times
assert len(budget_options()) and len(pruning_costs()) and len(remaining_times())"""
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]


def test_rows_are_lent_for_the_time_of_a_call(tmp_path, monkeypatch):
    monkeypatch.delenv('LVLM_RESULTS', raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'nbs' / 'results').mkdir(parents=True)
    with needs_rows('engines'):
        assert (Path(os.environ['LVLM_RESULTS']) / 'engines.jsonl').exists()
    assert 'LVLM_RESULTS' not in os.environ
