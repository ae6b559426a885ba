"""splitmix64: the published numbers, and the same bits on the host and as torch computes them."""

import numpy
import pytest
import torch

from adamerge.deltas.splitmix64 import GAMMA, mix_, mix_with_signs_, mixed, signed, start_of

FIRST_OF_SEED_1234567 = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
"""The generator's first numbers, as https://rosettacode.org/wiki/Pseudo-random_numbers/Splitmix64 lists them."""

WRAP = 1 << 64


def counters(seed, count):
    return [(seed + GAMMA * (number + 1)) % WRAP for number in range(count)]


def test_counters_of_a_seed_are_mixed_to_the_published_numbers():
    values = numpy.array(counters(1234567, 4), dtype=numpy.uint64)
    mix_(values)
    assert values.tolist() == FIRST_OF_SEED_1234567


def test_torch_has_the_same_bits():
    values = torch.tensor([signed(value) for value in counters(1234567, 4)])
    assert [value % WRAP for value in mixed(values).tolist()] == FIRST_OF_SEED_1234567


@pytest.mark.parametrize("value", [0, 1, 3 << 62, WRAP - 1, 0x0123456789ABCDEF])
def test_shifts_that_repeat_the_sign_are_those_of_signed_numbers(value):
    def wrapped(number):
        return signed(number % WRAP)

    wanted = wrapped(signed(value))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        wanted = wrapped((wanted ^ (wanted >> shift)) * factor)
    assert mix_with_signs_(torch.tensor([signed(value)])).tolist() == [wanted]


def test_signed_numbers_have_the_same_bits():
    assert [signed(bits) for bits in (0, (1 << 63) - 1, 1 << 63, WRAP - 1)] == [0, (1 << 63) - 1, -(1 << 63), -1]


def test_the_start_of_a_key_is_that_of_its_sha256():
    # printf abc | sha256sum begins with ba7816bf8f01cfea
    assert start_of("abc") == int.from_bytes(bytes.fromhex("ba7816bf8f01cfea"), "little")
