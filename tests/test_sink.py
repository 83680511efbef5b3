"The attention sink: a planted one is found, scored and guarded, and where there is none nothing changes."

import pytest
import torch
from lvlm_study.importance.attention_sink import sink_layers, trace_sinks
from lvlm_study.importance.importance import Scores, score
from lvlm_study.models.architecture import LVLM
from lvlm_study.models.random_models import random_model
from lvlm_study.pruning.layer_pruning import layer_plan, sink_notes

MARK, WRITER = 9, 1  # Token that becomes a sink, and the layer that writes it


@pytest.fixture(scope='module')
def planted():
    "A random Llama whose second layer makes one token five hundred times longer."
    lvlm, seen = LVLM(random_model('llama'), name='planted'), {}
    push = torch.zeros(lvlm.architecture.hidden_size)
    push[5] = 500.0

    def note(module, args, kwargs):
        seen['ids'] = kwargs['input_ids']

    lvlm.model.register_forward_pre_hook(note, with_kwargs=True)
    lvlm.layers[WRITER].register_forward_hook(
        lambda m, args, kwargs, out: out + seen['ids'].eq(MARK)[..., None] * push, with_kwargs=True
    )
    return lvlm


def texts(position=None, pad=0):
    ids = torch.randint(10, 90, (3, 50), generator=torch.Generator().manual_seed(0))
    if position is not None:
        ids[:, position] = MARK
    mask = torch.ones_like(ids)
    return {k: torch.nn.functional.pad(v, (pad, 0)) for k, v in dict(input_ids=ids, attention_mask=mask).items()}


@pytest.mark.parametrize('position', [0, 17])
@pytest.mark.parametrize('pad', [0, 4])
def test_position_and_layer_are_found(planted, position, pad):
    sinks = trace_sinks(planted, [texts(position, pad)]).sinks
    assert sinks.layer.tolist() == [WRITER] and sinks.position.tolist() == [position]
    assert sinks.share[0] == 1 and sinks.length[0] > 100 and sinks.influence[0] > 0.5


def test_the_score_is_the_maximum_of_mean_and_sink(planted):
    "Against cosines of hidden states that transformers returns."
    batch = texts(17)
    s = score(planted, batch, ('bi', 'bi_max'))
    with torch.no_grad():
        h = torch.stack(planted.model(**batch, output_hidden_states=True).hidden_states[:-1])
    distance = 1 - torch.cosine_similarity(h[:-1], h[1:], dim=-1)
    want = torch.maximum(distance.mean(-1), distance[..., 17]).mean(1)
    assert torch.allclose(s.layers['bi_max'][:2], want, atol=1e-4)
    assert (s.layers['bi_max'] >= s.layers['bi'] - 1e-6).all()
    assert WRITER in sink_layers(s.layers['bi'], s.layers['bi_max'])


def test_without_a_sink_nothing_changes(planted):
    batch = texts()
    s = score(planted, batch, ('bi', 'bi_max'))
    assert torch.allclose(s.layers['bi'], s.layers['bi_max'], atol=1e-5)
    trace = trace_sinks(planted, [batch])
    assert trace.sinks.empty and sink_layers(trace.mean_L, trace.max_L) == []
    assert layer_plan(s, 0.2).notes == ()


def scores_of(bi, bi_max):
    n = len(bi)
    sizes = dict(lm=100 * n, total=100 * n, layers=[100] * n, kv_heads=2, mlp_channels=4, head=20, channel=10)
    layers = dict(bi=torch.tensor([bi]), bi_max=torch.tensor([bi_max]))
    return Scores(dict(layers=layers), model='x', sizes=sizes)


def test_a_plan_says_what_it_takes_and_what_keeping_it_costs():
    s = scores_of([0.9, 0.03, 0.05, 0.04, 0.3], [0.9, 0.7, 0.05, 0.04, 0.3])
    plan = layer_plan(s, 0.4)
    (note,) = plan.notes
    assert plan.removed == (1, 3)
    assert 'Layer 1 ' in note and '0.70 there' in note and 'layer 2 would go instead, with 0.050' in note
    assert layer_plan(s, 0.4, guard=False).notes == () and layer_plan(s, 0.4, guard=False).layers == plan.layers
    assert layer_plan(s, 0.4, 'bi_max').removed == (2, 3) and layer_plan(s, 0.4, 'bi_max').notes == ()
    assert sink_notes(scores_of([0.9, 0.5, 0.1], [0.9, 0.7, 0.1]), [1]) == ()  # the mean does not hide it


def test_scores_without_sinks_say_nothing():
    s = scores_of([0.9, 0.03, 0.5], [0.9, 0.7, 0.5])
    del s.samples['layers']['bi_max']
    assert layer_plan(s, 0.3).notes == ()
