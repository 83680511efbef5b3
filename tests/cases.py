"""The table of odd checkpoints and odd data: tried, right, refused in a sentence, wrong, by kind of input.

Each kind is a fault that people met. Its inputs are the parametrized tests below, each of which says by its
assertions what is right: the result that transformers gives, or one sentence. `python tests/cases.py` runs them all
and stores one row a kind; a test compares the kinds and tests named here with what is there.
"""

import sys
import time
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = (
    'tests/test_real_data.py',
    'tests/test_real_checkpoints.py',
    'tests/test_published_checkpoints.py',
    'tests/test_bad_inputs.py',
)
RIGHT, REFUSED = 'right', 'refused'
TESTS = {  # kind -> {start of a test's name, with its parameters: what is right}
    'chat template of parts': {
        'test_ids_are_those_of_the_processor': RIGHT,
        'test_every_answer_of_a_conversation': RIGHT,
        'test_recovery_and_scores_with_a_template': RIGHT,
        'test_a_written_conversation_is_the_same': RIGHT,
        'test_a_template_that_writes_no_text': REFUSED,
        'test_what_a_template_leaves_out': REFUSED,
    },
    'contents stored as parts': {
        'test_contents_stored_as_parts': RIGHT,
        'test_scores_and_recovery_on_contents': RIGHT,
    },
    'chat template beside the processor': {
        'test_the_template_beside_the_processor': RIGHT,
        'test_the_fingerprint_covers_the_template': RIGHT,
        'test_no_template_at_all': REFUSED,
    },
    'no padding token': {'test_no_padding_token': RIGHT},
    'token without an embedding': {'test_a_token_without_an_embedding': REFUSED},
    'stale index': {
        'test_a_stale_index_is_passed_over': RIGHT,
        'test_bad_input[lvlm_score stale s': REFUSED,
        'test_bad_input[lvlm_score no_weights s': REFUSED,
    },
    'tied by name only': {'test_tied_by_name_only': RIGHT, 'test_an_adapter_on_a_tied_model': RIGHT},
    'text alone, projector alone': {'test_a_batch_of_texts_alone': RIGHT},
    'output that is an input': {
        'test_no_command_writes_over': REFUSED,
        'test_links_to_an_input': REFUSED,
        'test_functions_do_not_write': REFUSED,
        'test_a_place_beside_an_input': RIGHT,
        'test_what_is_replaced_stays': RIGHT,
        'test_something_new_is_not_lost': RIGHT,
    },
    'widths that a config cannot say': {
        'test_widths_on_disk_are_refused_as_in_memory[llama': RIGHT,
        'test_widths_on_disk_are_refused_as_in_memory[gemma2': RIGHT,
        'test_widths_on_disk_are_refused': REFUSED,
        'test_layers_without_a_part': REFUSED,
    },
    'scores that are no numbers': {
        'test_scores_that_overflow': REFUSED,
        'test_stored_scores_that_are_no_numbers': REFUSED,
        'test_scores_in_memory': REFUSED,
        'test_bad_input[lvlm_prune m p --scores nan': REFUSED,
    },
    'quantized source': {
        'test_quantized_sources': REFUSED,
        'test_quantized_by_a_file': REFUSED,
        'test_a_part_that_is_quantized': REFUSED,
        'test_other_entries_beside_dense': REFUSED,
        'test_dense_weights_that_count_as_gguf': RIGHT,
        'test_whole_layers_leave_fp8': RIGHT,
        'test_other_cuts_of_fp8': REFUSED,
    },
    'max_length through a picture': {
        'test_max_length': REFUSED,
        'test_collator_does_not_cut': REFUSED,
    },
    'words of other libraries': {
        'test_the_words_of_a_template': REFUSED,
        'test_pictures_that_do_not_decode': REFUSED,
        'test_a_full_disk': REFUSED,
        'test_bad_input[lvlm_prune m p --scores half': REFUSED,
    },
    'pictures of 16 bit': {
        'test_deep_pictures': RIGHT,
        'test_other_pictures': RIGHT,
        'test_pictures_of_unknown_range': REFUSED,
        'test_stored_pictures': RIGHT,
    },
    'data as published': {
        'test_published_samples': REFUSED,
        'test_skipped_samples': RIGHT,
        'test_a_byte_order_mark': RIGHT,
    },
    'adapters': {'test_adapters_are_named': REFUSED},
    'small things': {
        'test_a_text_longer_than': REFUSED,
        'test_a_damaged_settings_file': REFUSED,
        'test_the_repr_of_a_model': RIGHT,
        'test_scores_on_tensors': RIGHT,
    },
    'good models in 16 bit': {'test_doctor_passes': RIGHT, 'test_doctor_finds': REFUSED},
    'files that do not fit the config': {
        'test_files_are_compared': REFUSED,
        'test_dry_runs_compare': REFUSED,
    },
    'inconsistent config': {'test_inconsistent_configs': REFUSED},
    'layers removed by hand': {
        'test_layers_removed_by_hand_are_mended': RIGHT,
        'test_kinds_of_layers': RIGHT,
        'test_stale_groups': REFUSED,
        'test_what_cannot_be_mended': REFUSED,
        'test_a_copy_grown': RIGHT,
    },
    'batch size in 16 bit': {'test_records_say_how': RIGHT},
    'adapters merged in 16 bit': {
        'test_adapters_are_merged': RIGHT,
        'test_the_adapter_beside': RIGHT,
    },
    'type of the weights': {'test_weights_are_loaded_as_most': RIGHT},
    'pictures of other processors': {
        'test_ids_are_equal': RIGHT,
        'test_pictures_in_other_places': RIGHT,
        'test_internvl_reads_pictures': RIGHT,
        'test_pictures_of_a_sample': RIGHT,
        'test_padding_changes_no_row': RIGHT,
        'test_a_processor_that_makes_other_tokens': REFUSED,
        'test_an_input_that_is_not_made': REFUSED,
        'test_what_a_processor_refuses': REFUSED,
    },
    'recovery of other projectors': {
        'test_loss_of_recovery_with_pictures': RIGHT,
        'test_a_teacher_cache_of_models': RIGHT,
        'test_scores_do_not_depend_on_the_batch': RIGHT,
        'test_batches_of_packed_pictures': RIGHT,
        'test_a_recovery_that_would_learn': REFUSED,
    },
    'checkpoints in the form that people download': {
        'test_the_table_is_what_comes_out': RIGHT,
        'test_forms_of_files': RIGHT,
        'test_models_without_a_template': RIGHT,
        'test_what_is_no_whole_model': REFUSED,
    },
    'bad words on a command': {'test_bad_input[': REFUSED},
    'bad values from Python': {'test_a_name_is_no_model': REFUSED, 'test_bad_values': REFUSED},
}


def expected(name):
    "(kind, what is right) of a test; the first start that fits, longest first within a kind; None for other tests."
    for kind, starts in TESTS.items():
        for start in sorted(starts, key=len, reverse=True):
            if name.startswith(start):
                return kind, starts[start]
    return None


def table(outcomes):
    "Kind -> counts, from (name, passed) pairs."
    counts = {kind: Counter() for kind in TESTS}
    for name, passed in outcomes:
        if found := expected(name):
            kind, right = found
            counts[kind]['tried'] += 1
            counts[kind][right if passed else 'wrong'] += 1
    return {kind: {word: c[word] for word in ('tried', 'right', 'refused', 'wrong')} for kind, c in counts.items()}


class Collect:
    "A plugin of pytest that keeps the outcome of each test."

    def __init__(self):
        self.outcomes = {}

    def pytest_runtest_logreport(self, report):
        name = report.nodeid.partition('::')[2]
        if report.skipped:
            return
        if report.when == 'call' or report.failed:
            self.outcomes[name] = report.passed and self.outcomes.get(name, True)


def store(counts, seconds):
    "One row a kind in the stored results."
    from dataclasses import asdict

    from lvlm_study.core.store import Run, environment, write_row

    for kind, metrics in counts.items():
        run = Run('odd_inputs', model='', suite='', purpose=kind)
        write_row(dict(key=run.key, run=asdict(run), env=environment(), seconds=seconds, metrics=metrics))


if __name__ == '__main__':
    plugin, start = Collect(), time.time()
    pytest.main(['-q', '-p', 'no:cacheprovider', *(str(ROOT / f) for f in FILES), *sys.argv[1:]], plugins=[plugin])
    counts = table(plugin.outcomes.items())
    store(counts, round(time.time() - start))
    for kind, row in counts.items():
        print(f'{kind:36s}', *(f'{word} {n:3d}' for word, n in row.items()))
    print({word: sum(row[word] for row in counts.values()) for word in ('tried', 'right', 'refused', 'wrong')})
    sys.exit(any(row['wrong'] for row in counts.values()))
