"What a GGUF file can hold: values of its metadata, types and widths, and what is refused in one sentence."

import struct
import numpy as np
import pytest
from lvlm_study.efficiency.gguf_files import decode_tensor, encode_tensor, encode_value, file_widths, write_gguf
from lvlm_study.models.loading import load_lvlm


@pytest.fixture(scope='module')
def lvlm():
    return load_lvlm('tiny-llava')


NO_VALUES = {
    '2**40': (2**40, 'fits into 32 bits, from -2..31 to 2..32 - 1, and 1099511627776 does not'),
    'too low': (-(2**31) - 1, 'fits into 32 bits'),
    'in a list': ([1, 2**31], 'fits into 32 bits, from -2..31 to 2..31 - 1, and 2147483648 does not'),
    'float': (1e300, 'fits into 32 bits, and 1e.300 does not'),
    'None': (None, 'a text, a bool, a number, or a list of one of them, not None'),
    'dict': ({}, 'or a list of one of them, not a dict'),
    'nested': ([[1]], 'or a list of one of them, not a list'),
    'None in a list': ([None], 'or a list of one of them, not None'),
    'empty': ([], 'values of one type, and at least one'),
}


@pytest.mark.parametrize('case', NO_VALUES)
def test_values_that_no_file_holds(case):
    value, says = NO_VALUES[case]
    with pytest.raises(ValueError, match=says) as e:
        encode_value(value)
    assert '\n' not in str(e.value)


def test_values_to_the_last_bit():
    for value, code, letter in ((2**32 - 1, 4, 'I'), (-(2**31), 5, 'i'), (0.5, 6, 'f'), (True, 7, '?')):
        assert encode_value(value) == struct.pack(f'<I{letter}', code, value)
    assert encode_value(np.int64(7)) == encode_value(7) and encode_value(np.float32(0.5)) == encode_value(0.5)
    assert encode_value([2**31 - 1]) == struct.pack('<IIQi', 9, 5, 1, 2**31 - 1)


NO_FILES = {
    'name': (lambda m, path: write_gguf('tiny-llava', path), 'a model is loaded first'),
    'none': (lambda m, path: write_gguf(None, path), 'a model is what load_lvlm gives, not a NoneType'),
    'multiple': (lambda m, path: write_gguf(m, path, 'F16', 1.5), 'a whole number from 1 to 384 .* not 1.5'),
    'multiple text': (lambda m, path: write_gguf(m, path, 'F16', '32'), "multiple is a whole number .* not '32'"),
    'multiple bool': (lambda m, path: file_widths(m, True), 'multiple is a whole number .* not True'),
    'widths of a name': (lambda m, path: file_widths('tiny-llava'), 'a model is loaded first'),
    'type': (lambda m, path: write_gguf(m, path, ['F16']), 'a GGUF file is written in F32, F16, Q8_0, Q4_0'),
    'path': (lambda m, path: write_gguf(m, None), 'a file to write is named by a text or a path, not None'),
}


@pytest.mark.parametrize('case', NO_FILES)
def test_files_that_cannot_be_written(lvlm, tmp_path, case):
    call, says = NO_FILES[case]
    with pytest.raises(ValueError, match=says) as e:
        call(lvlm, tmp_path / 'x.gguf')
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())


def test_rows_are_whole_blocks_of_a_known_type():
    x = np.ones((2, 40), dtype=np.float32)
    for kind, says in (('Q4_0', 'rows of 40 numbers are no whole blocks of 32'), ('Q5_K', "not 'Q5_K'")):
        with pytest.raises(ValueError, match=says):
            encode_tensor(x, kind)
    assert np.allclose(decode_tensor(encode_tensor(x[:, :32], 'Q8_0'), 'Q8_0', (2, 32)), 1, atol=1e-3)
