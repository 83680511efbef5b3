"The way through all commands: lines that can be typed, and costs that follow from the shapes."

import inspect
import shlex
from dataclasses import replace

import pytest

from lvlm_study.models.architecture import count_config
from lvlm_study.study import cli as commands
from lvlm_study.study.settings import describe_case
from lvlm_study.study.walkthrough import Pipeline, fewer_layers, pipeline_commands, pipeline_costs, stored_speeds

LARGE = Pipeline('llava-v1.5-7b', 'train.json', 'nine', ratio=0.3, large=True)


@pytest.mark.parametrize('pipeline', [Pipeline('tiny-llava'), Pipeline('my model', 'plain', 'plain'), LARGE])
def test_every_option_of_every_line_exists(pipeline):
    for line in pipeline_commands(pipeline).values():
        name, *words = shlex.split(line)
        known = inspect.signature(getattr(commands, name)).parameters
        used = [word.removeprefix('--') for word in words if word.startswith('--')]
        assert set(used) <= set(known) and len(used) == len(set(used)), line


def test_a_line_reads_only_what_was_given_or_written_before():
    there = {LARGE.model}
    for step, line in pipeline_commands(LARGE).items():
        name, *words = shlex.split(line)
        assert words[0].split('/')[0] in there, f'{step} reads {words[0]}'
        options = dict(zip(words[1:], words[2:]))
        for option in ('--base', '--scores', '--teacher'):
            assert options.get(option, LARGE.model) in there, f'{step} reads {options[option]}'
        there |= {options['--records']} if name == 'lvlm_evaluate' else {words[1]} if len(words) > 1 else set()


def test_layers_are_counted_as_torch_counts():
    case = describe_case('LLaVA-v1.5-7B')
    less = count_config(fewer_layers(case, 0.3))
    removed = (case.parameters - less['total']) / case.lm_parameters
    one_layer = case.layer_parameters / case.num_layers / case.lm_parameters
    assert abs(removed - 0.3) <= one_layer / 2 and less['LM'] == case.lm_parameters - (case.parameters - less['total'])
    assert fewer_layers(case, 1.0).get_text_config().num_hidden_layers == 1


def test_removing_more_never_costs_more():
    frames = [pipeline_costs(replace(LARGE, ratio=ratio)) for ratio in (0.15, 0.3, 0.45, 0.6)]
    for a, b in zip(frames, frames[1:]):
        assert (b.petaflop <= a.petaflop).all() and (b.memory <= a.memory).all() and (b.written <= a.written).all()
    original = frames[0].loc['ask the original']
    assert all(frame.loc['ask the original'].equals(original) for frame in frames)


def test_recovery_grows_with_the_data():
    half, whole = (pipeline_costs(replace(LARGE, fraction=f)).loc['recover'] for f in (0.5, 1.0))
    assert whole.hours == pytest.approx(2 * half.hours) and whole.petaflop == pytest.approx(2 * half.petaflop, rel=1e-4)
    assert whole.memory == half.memory


def test_hours_are_those_of_timed_steps():
    "Operations of training at the speed of reading take less time than the timed steps, but not ten times less."
    recover = pipeline_costs(LARGE).loc['recover']
    counted = recover.petaflop * 1e15 / stored_speeds()['flop'] / 3600
    assert recover.hours / 10 < counted < recover.hours


def test_without_times_it_says_what_to_run(tmp_path, monkeypatch):
    monkeypatch.setenv('LVLM_RESULTS', str(tmp_path))
    with pytest.raises(ValueError, match='real_size'):
        stored_speeds()
