import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from adq_train.deploy.bits import pack, unpack


@given(bits=st.integers(1, 8), data=st.data())
def test_packing_is_one_long_binary_number(bits, data):
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    # A second implementation: the codes as digits of one integer, in little-endian bytes.
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    expected = number.to_bytes(-(-len(codes) * bits // 8), "little")
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert bytes(packed.tolist()) == expected
    assert unpack(packed, bits, len(codes)).tolist() == codes


def test_a_code_too_large_is_refused():
    with pytest.raises(ValueError, match="4 does not fit into 2 bits"):
        pack(torch.tensor([1, 4], dtype=torch.uint8), 2)


def test_a_wrong_number_of_bytes_is_refused():
    with pytest.raises(ValueError, match="3 bytes do not hold 5 codes of 3 bits"):
        unpack(torch.zeros(3, dtype=torch.uint8), 3, 5)
