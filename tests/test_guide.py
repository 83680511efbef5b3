"What `recommend` must always hold: budgets that only add options, answers that stand on rows, errors in a sentence."

import json
import math
import os
import re
import sys

import numpy as np
import pytest
from fastcore.script import _run_cli
from transformers import CLIPVisionConfig, LlavaConfig, Qwen2Config

from lvlm_study import recommend
from lvlm_study.core.store import Run, load_results, read_rows, temporary_results, write_row
from lvlm_study.efficiency.engines import export
from lvlm_study.models.architecture import count_config, paper_config
from lvlm_study.study import cli as commands
from lvlm_study.study import guide
from lvlm_study.study.guide import case_options, check_guide, decision_map, option_commands
from lvlm_study.study.settings import RESULT_FILES, bits_evidence, describe_case, language_settings, measured_settings
from lvlm_study.study.settings import published_settings, repair_evidence, stored_runs, witness_distances

LLAVA = 'LLaVA-v1.5-7B'
MODELS = (LLAVA, 'Bunny-v1.0-3B', 'tiny-internvl')


def never_falls(values):
    return all(a <= b + 1e-9 for a, b in zip(values, values[1:]))


@pytest.mark.parametrize('source', ['measured', 'published'])
@pytest.mark.parametrize('model', MODELS)
def test_more_memory_never_gives_a_worse_model(model, source):
    whole = describe_case(model).memory(0)
    found = [recommend(model, memory=share * whole, source=source).expected for share in np.linspace(0.2, 1.1, 13)]
    assert never_falls(found) and found[0] == 0 and found[-1] == 100


@pytest.fixture
def only_16_bits(monkeypatch):
    "No measured rows in fewer bits: what the paper says of 8 bits is all there is"
    settings = measured_settings()
    whole = settings[settings.bits == 16]
    assert len(whole) < len(settings)
    monkeypatch.setattr(guide, 'measured_settings', lambda: whole)


def expected_by(limit, **fixed):
    "Expected retention under a limit that is eased step by step"
    most = dict(latency=1, hours=60, data=1)[limit]
    values = [most * share for share in (0.01, 0.05, 0.1, 0.5, 0.75, 1)]
    return [recommend(LLAVA, **fixed, **{limit: v}).expected for v in values]


@pytest.mark.parametrize('limit', ['latency', 'hours', 'data'])
def test_more_of_anything_never_gives_a_worse_model(limit):
    fixed = dict(memory=9.5) if limit == 'latency' else dict(memory=16, engine='OpenVINO')  # Which gets float32 alone
    expected = expected_by(limit, **fixed)
    assert never_falls(expected) and expected[-1] > expected[0]


@pytest.mark.parametrize('limit', ['latency', 'hours', 'data'])
def test_more_of_anything_helps_where_fewer_bits_are_not_measured(limit, only_16_bits):
    expected = expected_by(limit, memory=9.5 if limit == 'latency' else 7.5)  # 8 bits take more than 8 GiB
    assert never_falls(expected) and expected[-1] > expected[0]


def test_the_choice_keeps_to_every_limit():
    rng = np.random.default_rng(0)
    for _ in range(12):
        memory, hours, data = rng.uniform(6, 13), rng.uniform(0, 40), rng.uniform(0, 1)
        advice = recommend(LLAVA, memory=memory, hours=hours, data=data)
        for option in (advice.choice, advice.cheaper, advice.published):
            if option is not None:
                assert option.memory <= memory + 1e-6 and option.hours <= hours + 1e-6
                assert option.fraction <= data + 1e-9


def test_the_choice_is_the_best_of_what_fits():
    "By hand, from the stored rows of the model itself."
    d = load_results('recovery').query('model == "tiny-llava" and metric == "retention" and fraction <= 0.1')
    mine = d[(d.method == 'width') & (d.ratio == 0.6) & (d.budget == 'epochs')]
    best = mine.groupby(['recipe', 'trainable', 'fraction']).value.mean().max()
    case = describe_case('tiny-llava')
    ratio = measured_settings().query('model == "tiny-llava" and method == "width" and target == 0.6').ratio.min()
    advice = recommend('tiny-llava', memory=case.memory(ratio) * 1.0005, data=0.1)
    assert advice.choice.budget == 'steps' or abs(advice.expected - best) < 1.5
    assert advice.expected >= best - 1.5 and advice.others == {}


def test_an_impossible_budget_names_the_nearest_possible():
    advice = recommend(LLAVA, memory=3)
    assert not advice.ok and advice.verdict == 'nothing' and advice.commands == ()
    assert 'at least' in repr(advice) and set(advice.nearest) == {'memory'}
    least = advice.nearest['memory']
    assert recommend(LLAVA, memory=least).ok and not recommend(LLAVA, memory=0.999 * least).ok


@pytest.mark.parametrize('seed', range(4))
def test_easing_one_limit_as_named_is_enough_and_less_is_not(seed):
    "For budgets drawn at random that nothing fits."
    rng, refused = np.random.default_rng(seed), 0
    for model in MODELS:
        whole = describe_case(model).memory(0)
        limits = dict(memory=rng.uniform(0.2, 0.5) * whole, latency=rng.uniform(0.2, 0.5), data=rng.uniform(0, 0.02))
        advice = recommend(model, **limits)
        if advice.ok:
            continue
        refused += 1
        assert advice.choice is None and advice.commands == () and advice.nearest
        if advice.together:
            assert recommend(model, **limits | advice.nearest).ok and 'all at once' in repr(advice)
            for name in advice.nearest:
                others = {n: v for n, v in advice.nearest.items() if n != name}
                assert not recommend(model, **limits | others).ok
            continue
        for name, least in advice.nearest.items():
            assert recommend(model, **limits | {name: least}).ok
            assert least == 0 or not recommend(model, **limits | {name: 0.999 * least}).ok
    assert refused, 'some of these budgets must be impossible'


def test_two_limits_that_exclude_each_other():
    advice = recommend(LLAVA, memory=6.0, latency=0.3)
    assert not advice.ok and advice.nearest
    eased = recommend(LLAVA, memory=6.0, latency=min(1, advice.nearest.get('latency', 1)))
    assert eased.ok or 'latency' not in advice.nearest


@pytest.mark.parametrize(
    'limits, part',
    [
        (dict(memory=0), 'memory is a number above 0, not 0'),
        (dict(memory='8'), "memory is a number above 0, not '8'"),
        (dict(memory=math.nan), 'memory is a number above 0, not nan'),
        (dict(memory=True), 'memory is a number above 0'),
        (dict(latency=80), 'divide your limit'),
        (dict(hours=-1), 'hours is a number from 0 on'),
        (dict(data=-0.5), 'data is a number from 0 on'),
        (dict(data=2.5), 'whole number of samples'),
        (dict(engine='abacus'), 'engine is one of transformers'),
        (dict(source='hearsay'), 'measured or published'),
    ],
)
def test_a_bad_limit_is_refused_in_a_sentence(limits, part):
    with pytest.raises(ValueError, match=part) as e:
        recommend(LLAVA, **limits)
    assert '\n' not in str(e.value)


def test_what_is_no_model():
    with pytest.raises(FileNotFoundError, match='my-model is no model'):
        recommend('my-model')
    with pytest.raises(ValueError, match='not int'):
        recommend(7)


def test_memory_is_counted_as_torch_counts():
    "Weights of the original against tensors of an empty model; the cache by hand."
    case, config = describe_case(LLAVA), paper_config(LLAVA)
    text = config.text_config
    cache = 2 * text.num_hidden_layers * text.hidden_size * 2048 * 2
    assert case.memory(0) == pytest.approx((2 * count_config(config)['total'] + cache) / 2**30)
    whole = case.layer_parameters / case.lm_parameters
    assert case.memory(whole) == pytest.approx(2 * (case.parameters - case.layer_parameters) / 2**30)


def test_a_stored_ratio_gives_the_stored_number():
    options = case_options(describe_case('tiny-bunny'))
    stored = measured_settings().query('model == "tiny-bunny" and method == "layer"')
    for line in stored.itertuples():
        same = options[
            (options.method == 'layer') & (options.recipe == line.recipe) & np.isclose(options.ratio, line.ratio)
        ]
        same = same[(same.trainable == line.trainable) & (same.fraction == line.fraction) & ~same.interpolated]
        same = same[(same.repair == line.repair) & (same.bits == line.bits)]
        assert len(same) == 1 and same.retention.iloc[0] == pytest.approx(line.retention, abs=0.01)


def test_nothing_beyond_the_last_row():
    options = case_options(describe_case(LLAVA))
    pruned = options[options.method != 'none']
    assert pruned.ratio.max() <= measured_settings().ratio.max() + 0.02


def test_rows_that_an_answer_rests_on_exist():
    advice = recommend('Bunny-v1.0-3B', memory=5, data=0.1, hours=20)
    keys = set().union(*(read_rows(name) for name in RESULT_FILES))
    names = advice.choice.rows.split()
    assert names and (set(names) <= keys or advice.choice.source == 'published')
    pruned = case_options(describe_case(LLAVA)).query('method != "none"')
    assert all(set(rows.split()) <= keys for rows in pruned.rows.unique())


@pytest.mark.parametrize('model', MODELS)
def test_every_answer_names_its_rows(model):
    "A row that is stored, or a table or figure of the paper; only keeping the original needs none."
    keys, tables = set().union(*(read_rows(name) for name in RESULT_FILES)), set(published_settings().rows)
    printed = set(' '.join(tables).split())
    whole, rng = describe_case(model).memory(0), np.random.default_rng(1)
    for share in (0.45, 0.6, 0.75, 0.9, 1.1):
        advice = recommend(model, memory=share * whole, data=rng.choice([0, 0.05, 1]), hours=rng.choice([0, 5, 50]))
        for option in (advice.choice, advice.cheaper, advice.published):
            if option is None or (option.ratio == 0 and option.bits == 16):
                continue
            known = keys if option.source == 'measured' else printed
            assert option.rows and set(option.rows.split()) <= known
        if advice.choice is not None and advice.choice.rows:
            first = advice.choice.rows.split()[0]
            assert first in repr(advice) and first in advice.to_dict()['choice']['rows']


def test_8_bits_are_advised_where_they_lose_nothing():
    advice = recommend('llava-v1.5-7b', memory=12, data=500)
    assert advice.verdict == 'quantize' and advice.advised.bits == 8 and advice.advised.ratio == 0
    assert advice.commands[-1].endswith('--type Q8_0')


def test_fewer_bits_within_the_noise_are_advised(only_16_bits):
    "Rows of a tiny model say that pruning costs little, the paper that 8 bits cost little: the second is less to do."
    whole, even = describe_case(LLAVA).memory(0), 0
    for share in np.linspace(0.58, 0.84, 14):
        advice = recommend(LLAVA, memory=share * whole)
        less = advice.choice.ratio > 0 and advice.advised.ratio == 0 and advice.advised.bits == 8
        assert (advice.verdict == 'even') == less
        if less:
            even += 1
            assert advice.expected >= advice.advised.expected and 'highest number, within noise' in repr(advice)
            assert advice.commands[-1].endswith('--type Q8_0')
    assert even


def test_the_least_work_within_the_noise_of_the_best_is_advised():
    rng, eased = np.random.default_rng(3), 0
    for _ in range(8):
        limits = dict(memory=rng.uniform(14, 26), data=rng.choice([0.1, 0.5, 1]), hours=rng.uniform(1, 40))
        advice = recommend(LLAVA, engine='OpenVINO', **limits)
        if not advice.ok:
            continue
        most, wide = advice.choice, advice.choice.high - advice.choice.low
        assert most.expected - advice.advised.expected <= max(0.5, wide / math.sqrt(2)) + 1e-9
        assert advice.advised.hours <= most.hours
        eased += advice.advised is not most
        assert ('highest number, within noise' in repr(advice)) == (advice.advised is not most)
    assert eased, 'for some of these budgets less work is as good'


def test_what_lies_just_outside_is_named_with_what_it_takes():
    advice = recommend(LLAVA, memory=8, source='published')
    (said,) = advice.missed
    gap = float(said.split('With ')[1].split(' GiB')[0])
    assert 'keep the weights in 8 bits' in said and 'just outside' in repr(advice)
    more = recommend(LLAVA, memory=8 + gap, source='published')
    assert more.advised.bits == 8 and more.advised.ratio == 0 and more.expected > advice.expected
    assert recommend(LLAVA, memory=20, source='published').missed == ()


def test_a_limit_on_time_says_what_it_leaves_out():
    advice = recommend(LLAVA, memory=12, latency=1)
    assert advice.advised.bits == 16 and any('nobody timed it' in said for said in advice.missed)


def test_the_step_of_layers_next_to_a_measured_ratio_stands_for_it():
    "Layers of another number have other ratios; the step next to a measured one is there, across a wide gap as well."
    case, d = describe_case(LLAVA), measured_settings()
    plain = d[(d.model == 'tiny-llava') & (d.method == 'layer') & (d.recipe == 'none') & (d.bits == 16) & ~d.repair]
    layers = case_options(case).query('method == "layer" and recipe == "none" and bits == 16 and not repair')
    stored = plain.sort_values('ratio')
    known = [100.0, *stored.retention, stored.retention.iloc[-1]]
    for i, line in enumerate(stored.itertuples()):
        near = layers[(layers.ratio - line.ratio).abs() <= case.layer_parameters / case.lm_parameters / 64]
        around = known[i : i + 3]
        assert len(near) and near.retention.between(min(around), max(around)).all()
    for bits in (8, 4):  # Measured at one ratio, behind a gap from 0 that no line crosses
        alone = d[(d.model == 'tiny-llava') & (d.method == 'layer') & (d.bits == bits) & ~d.repair]
        there = case_options(case).query('method == "layer" and bits == @bits and not repair').ratio
        assert alone.ratio.nunique() == 1 and alone.ratio.min() > guide.LARGEST_GAP
        assert len(there) and (there - alone.ratio.min()).abs().max() <= 1 / 64


@pytest.mark.parametrize('model', MODELS)
def test_widths_end_where_rows_end(model):
    options = case_options(describe_case(model)).query('method == "width"')
    last = measured_settings().query('method == "width"').groupby('model').ratio.max()
    assert options.ratio.max() <= last[options.model.iloc[0]] + 0.0051


def test_an_engine_that_gets_float32_takes_twice_the_memory_and_no_fewer_bits():
    whole = describe_case(LLAVA).memory(0)
    assert not recommend(LLAVA, memory=0.5 * whole, engine='OpenVINO', data=0, hours=0).ok
    advice = recommend(LLAVA, memory=1.6 * whole, engine='openvino')
    assert advice.advised.bits == 16 and advice.advised.ratio > 0 and 'float32' in ' '.join(advice.needs)
    assert '8 or 4 bits' in ' '.join(advice.unknown)
    assert recommend(LLAVA, memory=2.01 * whole, engine='openvino').verdict == 'keep'
    assert recommend(LLAVA, memory=6, engine='NF4 on CPU').advised.bits == 4
    unknown = ' '.join(recommend('Bunny-v1.0-3B', memory=4, engine='vLLM').unknown)
    assert 'vLLM reads weights in 4 bits' in unknown


def test_what_is_taken_for_granted_is_said():
    text = repr(recommend(LLAVA, memory=8))
    assert 'all 665,298 samples' in text and 'as long as' in text
    given = recommend(LLAVA, memory=8, data=0.1, hours=3)
    assert given.assumed == '' and 'taken for granted' not in repr(given)
    published = recommend(LLAVA, memory=8, source='published')
    assert "the paper's" in published.assumed and 'No LVLM was asked' not in repr(published)


@pytest.mark.parametrize('bits, kind', [(8, 'Q8_0'), (4, 'Q4_0')])
def test_fewer_bits_are_counted_as_the_file_that_is_written(tmp_path, bits, kind):
    "Against the length of an exported file without its words, the vision encoder in 16 bits beside it."
    case = describe_case('tiny-llava')
    whole, small = (export('tiny-llava', 'llama.cpp', k, tmp_path / f'{k}.gguf').stat().st_size for k in ('F16', kind))
    saved = (case.weights(0) - case.weights(0, bits)) * 2**30
    assert whole - small == pytest.approx(saved, rel=0.01)


@pytest.mark.parametrize('model', ['Bunny-v1.0-3B', 'Mini-InternVL-Chat-4B-V1-5'])
def test_pruned_models_in_fewer_bits_of_another_family_stand_in(model):
    options = case_options(describe_case(model))
    both = options[(options.bits == 4) & (options.method == 'layer')]
    assert len(both) and set(both.model) == {'tiny-llava'}
    least = both.memory.min()
    advice = recommend(model, memory=1.001 * least, hours=0)
    assert advice.advised.bits == 4 and advice.advised.ratio > 0 and 'another architecture' in advice.distance


def test_fewer_bits_have_the_interval_of_all_models_and_of_the_paper():
    advice = recommend(LLAVA, memory=9, data=0)
    assert advice.advised.bits == 8 and advice.advised.low <= 97.8 < advice.expected
    assert {'tiny-bunny', 'tiny-internvl', 'LLaVA-v1.5-7B (the paper)'} <= set(advice.others)
    own = recommend('tiny-llava', memory=0.9 * describe_case('tiny-llava').memory(0), data=0)
    assert own.others == {}


def test_a_nearest_budget_is_enough_as_it_is_printed():
    units = dict(memory=r'at least ([\d.]+) GiB', latency=r'at least ([\d.]+)% of the time')
    for model, limits in (
        (LLAVA, dict(memory=3)),
        (LLAVA, dict(latency=0.4)),
        ('Bunny-v1.0-3B', dict(latency=0.4)),
        ('tiny-bunny', dict(memory=0.005)),
        ('Mini-InternVL-Chat-4B-V1-5', dict(memory=1.9, hours=0)),
    ):
        advice = recommend(model, **limits)
        assert not advice.ok
        (name,) = (name for name in ('memory', 'latency') if re.search(units[name], repr(advice)))
        printed = float(re.search(units[name], repr(advice))[1]) / (100 if name == 'latency' else 1)
        assert recommend(model, **limits | {name: printed}).ok


def test_no_budget_is_named_where_nobody_timed_the_engine():
    advice = recommend('tiny-bunny', memory=0.0064, latency=0.85, data=0, engine='NF4 on CPU')
    assert not advice.ok and advice.nearest == {} and 'not timed' in repr(advice)


def test_commands_are_for_the_engine():
    for engine, last in ((None, '--type Q4_0'), ('llama.cpp', '--type Q4_0'), ('vLLM', 'original.parquet')):
        assert recommend(LLAVA, memory=8, engine=engine).commands[-1].endswith(last)
    assert recommend(LLAVA, memory=20, engine='OpenVINO').commands[-1].endswith('--engine openvino')
    assert recommend(LLAVA, memory=80, engine='llama.cpp').commands[-1].endswith('--type F16')


def test_evidence_is_counted_by_the_rule_of_noise():
    case = describe_case(LLAVA)
    found = bits_evidence(case, 8)
    text = repr(recommend(LLAVA, memory=9, data=0))
    for e in found[2:]:
        word = 'the same' if e.same else 'ahead' if e.wins else 'behind'
        elsewhere = text.split('8 bits alone elsewhere: ')[1].split('.\n')[0]
        part = next(part for part in elsewhere.split('; ') if e.model in part)
        assert part.startswith(word)
        assert ('same within the noise' in e.text) == e.same
    own = bits_evidence(describe_case('tiny-llava'), 8)
    assert own[0].model == 'tiny-llava' and 'this very model' in own[0].text


def test_a_language_model_alone_is_told_so():
    text = Qwen2Config(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    assert any('language model alone' in said for said in recommend(text, memory=0.2).unknown)
    assert not any('language model alone' in said for said in recommend(LLAVA, memory=8).unknown)


def test_a_number_between_published_ones_says_so():
    for memory in (7.9, 8.5, 10):
        advice = recommend(LLAVA, memory=memory, data=1)
        line = next(line for line in repr(advice).splitlines() if "the paper's numbers:" in line)
        assert ('between its neighbors' in line) == bool(advice.published.interpolated)


def test_own_samples_are_all_used():
    "A number of samples is what train.json holds: the share on the command line is one of these."
    options = case_options(describe_case(LLAVA)).query('recipe != "none" and budget == "epochs"')
    option = options[np.isclose(options.fraction, 0.05)].iloc[0]
    for share, part in ((1.0, '0.05'), (0.1, '0.5'), (0.01, '1')):
        line = next(line for line in option_commands(option, LLAVA, share) if line.startswith('lvlm_recover'))
        assert line.split('--fraction ')[1].split()[0] == part
    assert 'your 20,000 samples' in repr(recommend(LLAVA, memory=16, data=20_000, engine='OpenVINO'))


def test_what_the_way_needs_is_said():
    "A card that holds the smaller model need not hold the original, nor a training."
    few = ' '.join(recommend('llava-v1.5-7b', memory=12, data=500).needs)
    assert '--device cpu' in few and 'no recovery was run' in few
    for memory in (6, 7, 8):
        trained = recommend('llava-v1.5-7b', memory=memory, data=0.1)
        if trained.advised.recipe not in ('none', 'sft'):
            assert 'Training holds student and original at once' in ' '.join(trained.needs)
    assert recommend('llava-v1.5-7b', memory=80).needs == ()


def test_the_answer_is_the_same_from_any_folder(tmp_path, monkeypatch):
    here = recommend('llava-v1.5-7b', memory=8, data=0.05)
    monkeypatch.setenv('LVLM_CACHE', str(tmp_path))
    monkeypatch.delenv('LVLM_RESULTS', raising=False)
    monkeypatch.chdir(tmp_path)
    assert repr(recommend('llava-v1.5-7b', memory=8, data=0.05)) == repr(here) and 'LVLM_RESULTS' not in os.environ


def test_int8_alone_by_the_papers_own_numbers(only_16_bits):
    advice = recommend(LLAVA, memory=9, data=0)
    assert advice.verdict == 'quantize' and advice.choice.source == 'published' and 'table7' in advice.choice.rows
    assert advice.expected == pytest.approx(100 * 52.5 / 53.7)
    assert any('8 bits' in line for line in advice.unknown)


def test_the_guide_of_the_paper_against_its_numbers():
    llava = check_guide(published_settings(), 'llava-v1.5-7b')
    assert llava.gap[45, 'no resources'] == pytest.approx(34.4 - 32.4, abs=0.1)
    assert llava['by the rule'][30, 'recovery'] == pytest.approx(96.38, abs=0.1)
    assert llava['the best'][45, 'recovery'].startswith('layer sft')
    intern = published_settings().query('model == "mini-internvl-4b"')
    assert not intern.rows.str.contains('table5').any()


def test_repaired_models_are_used_as_soon_as_they_are_stored():
    "Rows of the file `repair` are settings of their own, beside those of the plain pruned models."
    with temporary_results():
        for ratio, retention in ((0.0, 100.0), (0.3, 70.0)):
            method, criterion = ('layer', 'bi') if ratio else ('none', '')
            runs = [('layer_pruning', {}, retention), ('repair', {}, retention + 12)]
            for experiment, extra, value in runs[: 1 + (ratio > 0)]:
                run = Run(experiment, model='tiny-llava', method=method, criterion=criterion, ratio=ratio)
                metrics = dict(retention=value, retention_low=value - 1, retention_high=value + 1)
                metrics |= dict(actual_ratio=ratio, parameters=3_000_000)
                write_row(dict(key=run.key, run=run.__dict__ | extra, seconds=1.0, metrics=metrics))
        d = measured_settings().query('method == "layer"').set_index('repair').retention
        assert d[True] == 82 and d[False] == 70


def stored(experiment, metrics, **fields):
    "Write one row."
    run = Run(experiment, **fields)
    write_row(dict(key=run.key, run=run.__dict__, seconds=1.0, metrics=metrics))


def retained(value, ratio=0.0):
    return dict(retention=value, retention_low=value - 1, retention_high=value + 1, actual_ratio=ratio)


def test_rows_in_8_bits_of_an_lvlm_take_the_place_of_the_papers():
    with temporary_results():
        stored('layer_pruning', retained(100.0) | dict(parameters=3_000_000), model='tiny-llava')
        case = describe_case('LLaVA-v1.5-7B')
        assert case_options(case).query('bits == 8').source.tolist() == ['published']
        stored('quantization', retained(88.0), model='tiny-llava', purpose='int8')
        stored('quantization', retained(66.0), model='tiny-llava', purpose='nf4')
        options = case_options(case).set_index('bits')
        assert options.expected[8] == 88 and options.expected[4] == 66 and set(options.source) == {'measured'}
        advice = recommend(LLAVA, memory=9, data=0)
        assert advice.verdict == 'quantize' and advice.expected == 88 and 'times smaller' in advice.distance
        assert advice.commands[-1].endswith('--type Q8_0')


def nats(near, far, megabytes, ratio):
    return dict(near_nats=near, far_nats=far, megabytes=megabytes, actual_ratio=ratio)


def test_language_rows_say_which_order_and_never_a_retention():
    pruned = dict(model='a', method='layer', criterion='bi', ratio=0.3, calibration=16)
    with temporary_results():
        stored('layer_pruning', retained(100.0) | dict(parameters=3_000_000), model='tiny-llava')
        stored('quantization', nats(2.0, 3.0, 200.0, 0.0), model='a', purpose='bfloat16')
        stored('quantization', nats(2.1, 3.1, 120.0, 0.0), model='a', purpose='int8')
        for recipe, worse in (('none', 2.0), ('repaired', 0.5)):
            found = nats(2.0 + worse, 3.0 + worse, 140.0, 0.3)
            stored('quantization', found, purpose='bfloat16', recipe=recipe, **pruned)
        d = language_settings().set_index(['bits', 'repair', 'method']).perplexity
        assert d[8, False, 'none'] == pytest.approx(math.exp(0.1))
        assert d[16, True, 'layer'] == pytest.approx(math.exp(0.5))
        case = describe_case(LLAVA)
        (paper, bits), (repair,) = bits_evidence(case), repair_evidence(case)
        assert paper.wins and not paper.language and 'table7' in paper.rows and 'the paper names no seeds' in paper.text
        assert bits.wins and repair.wins and bits.language and 'one seed' in bits.text and len(bits.rows) == 2
        assert bits.factor == pytest.approx(case.parameters / 100e6)
        assert 'a' not in set(measured_settings().model) and 'a' not in set(stored_runs().model)
        for seed in (1, 2):
            stored(
                'quantization', nats(2.4, 3.4, 140.0, 0.3), purpose='bfloat16', recipe='repaired', seed=seed, **pruned
            )
        assert language_settings().query('repair').runs.tolist() == [3]


def test_every_row_behind_a_sentence_exists():
    printed = set(' '.join(published_settings().rows).split())
    keys = set().union(*(read_rows(name) for name in RESULT_FILES)) | printed
    for model in (LLAVA, 'tiny-bunny'):
        for e in recommend(model, memory=0.5 * describe_case(model).memory(0)).evidence:
            assert set(e.rows) <= keys and e.model in e.text and e.text.endswith('.') and '  ' not in e.text


def test_a_repair_is_asked_for_with_its_data():
    option = case_options(describe_case(LLAVA)).query('repair and method == "layer"').iloc[0]
    prune = next(line for line in option_commands(option, LLAVA) if line.startswith('lvlm_prune'))
    assert prune.endswith('--repair --data train.json')
    assert all('--data' not in line for line in option_commands(option, 'tiny-llava'))


def test_it_says_how_far_the_rows_are():
    near = witness_distances(describe_case('tiny-gqa'))
    assert near.index[0] == 'tiny-gqa' and near.distance.iloc[0] == 0
    text = Qwen2Config(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4)
    advice = recommend(LlavaConfig(vision_config=CLIPVisionConfig(), text_config=text), memory=0.5, data=0.1, hours=1)
    assert 'another architecture' in advice.distance or advice.verdict in ('keep', 'quantize')
    assert any('of this size' in line for line in recommend(LLAVA, memory=8, data=0.05).unknown)


def test_an_answer_is_plain_data():
    for advice in (recommend(LLAVA, memory=8), recommend(LLAVA, memory=1)):
        data = json.loads(json.dumps(advice.to_dict(), allow_nan=False))
        assert data['ok'] == advice.ok and data['verdict'] == advice.verdict
        assert '|' in advice._repr_markdown_()
        assert [e['text'] for e in data['evidence']] == [e.text for e in advice.evidence]


def test_an_engine_that_refuses_width_pruned_phi():
    advice = recommend('Bunny-v1.0-3B', memory=4, engine='vllm')
    assert advice.choice.method != 'width' and 'vLLM'.lower() in ' '.join(advice.unknown).lower()


def test_the_map_agrees_with_the_answers():
    d = decision_map(LLAVA, 'published', memories=(0.5, 0.7), fractions=(0, 0.1))
    for line in d.itertuples():
        advice = recommend(
            LLAVA, memory=line.memory * describe_case(LLAVA).memory(0), data=line.data, source='published'
        )
        assert advice.expected == pytest.approx(line.expected)


def shell(monkeypatch, capsys, *words):
    "Status, standard output and standard error of `lvlm_study`."
    monkeypatch.setattr(sys, 'argv', ['lvlm_study', *map(str, words)])
    capsys.readouterr()
    try:
        status = _run_cli(commands.study_command.__wrapped__, True)
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


def test_a_study_model_is_written_where_one_is(run, tmp_path, monkeypatch):
    "The last line of an answer, as it is printed."
    option = case_options(describe_case('tiny-llava')).query('bits == 8 and method == "none"').iloc[0]
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*option_commands(option, 'tiny-llava')[-1].split())
    assert status == 0 and [p.name for p in tmp_path.iterdir()] == ['tiny-llava-Q8_0.gguf'], err


def test_on_the_command_line(monkeypatch, capsys):
    status, out, err = shell(monkeypatch, capsys, 'recommend', LLAVA, '--memory', 9, '--data', 0, '--json')
    assert (status, err) == (0, '') and json.loads(out)['choice']['bits'] == 8
    status, out, _ = shell(monkeypatch, capsys, 'recommend', 'tiny-llava')
    assert status == 0 and 'Keep the original' in out and '$ lvlm_evaluate tiny-llava' in out


def test_on_the_command_line_what_cannot_be(monkeypatch, capsys):
    status, out, _ = shell(monkeypatch, capsys, 'recommend', LLAVA, '--memory', 1)
    assert status == 1 and 'at least' in out
    for words, part in (
        (['recommend'], 'name the model'),
        (['recommend', LLAVA, '--latency', 80], 'divide your limit'),
    ):
        status, out, err = shell(monkeypatch, capsys, *words)
        assert status == 2 and out == '' and part in err and err.count('\n') == 1


def test_without_stored_rows_the_paper_answers(tmp_path, monkeypatch):
    "As in an installation outside of a checkout."
    monkeypatch.setenv('LVLM_RESULTS', str(tmp_path))
    advice = recommend('llava-v1.5-7b', memory=8, data=0.05)
    assert 'the paper' in repr(advice) and 'nan' not in repr(advice)
    assert 'nearest possible' in repr(recommend('tiny-llava', memory=1e-6))
