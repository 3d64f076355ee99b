import numpy as np
import pytest

from fed.privacy.layout import CHUNK
from fed.privacy.masks import Masks

ONE, TWO = bytes(range(32)), bytes(range(32, 64))


def stream(key, count, dtype):
    """The mask of a key, by another library's AES."""
    aes = pytest.importorskip("Crypto.Cipher.AES")
    cipher = aes.new(key, aes.MODE_CTR, nonce=b"", initial_value=0)
    return np.frombuffer(cipher.encrypt(bytes(count * np.dtype(dtype).itemsize)), dtype)


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
def test_masks_are_the_keystreams_with_their_signs(dtype):
    values = np.arange(1000).astype(dtype)
    masks = Masks([(ONE, 1), (TWO, -1)], np.dtype(dtype))
    found = values.copy()
    for part in (found[:3], found[3:10], found[10:]):  # the same, in whichever pieces
        masks.add_to(part)
    with np.errstate(over="ignore"):
        expected = values + stream(ONE, 1000, dtype) - stream(TWO, 1000, dtype)
    assert (found == expected).all()
    assert (found != values).all()


def test_two_clients_masks_cancel():
    values = np.zeros(2 * CHUNK, np.uint64)
    for sign in (1, -1):
        masks = Masks([(ONE, sign)], values.dtype)
        masks.add_to(values[:CHUNK])
        masks.add_to(values[CHUNK:])
        assert values.any() == (sign == 1)
