"""Pruning, healing and measuring large vision-language models: the public door, imported only as it is used."""

__version__ = "0.1.0"

from importlib import import_module

_DOOR = {
    'load_lvlm': 'models.loading',
    'save_lvlm': 'models.loading',
    'score': 'importance.importance',
    'Plan': 'pruning.plan',
    'layer_plan': 'pruning.layer_pruning',
    'width_plan': 'pruning.width_pruning',
    'apply_plan': 'pruning.surgery',
    'repair': 'pruning.repair',
    'prune_checkpoint': 'pruning.checkpoint',
    'doctor': 'pruning.doctor',
    'recover': 'recovery.recovery',
    'evaluate': 'evaluation.evaluate',
    'grade': 'evaluation.grading',
    'retention': 'evaluation.statistics',
    'export': 'efficiency.engines',
    'check_engine': 'efficiency.engines',
    'quantize': 'efficiency.quantization',
    'recommend': 'study.guide',
}
__all__ = ['__version__', *_DOOR]


def __getattr__(name):
    "A name of the public door, imported when it is first asked for."
    if name not in _DOOR:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}; it offers {", ".join(_DOOR)}')
    value = globals()[name] = getattr(import_module(f'{__name__}.{_DOOR[name]}'), name)
    return value


def __dir__():
    return sorted({*globals(), *_DOOR})
