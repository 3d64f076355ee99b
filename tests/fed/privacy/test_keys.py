import hashlib
import hmac
import runpy
import stat
import sys

import pytest

from fed.privacy import keys, secret_shares
from llava.errors import InputError


def test_a_site_key_is_a_file_of_its_owner_alone(tmp_path):
    path = tmp_path / "site.pem"
    public = keys.make_site_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    signature = keys.read_site_key(path).sign(b"text")
    assert keys.is_signed(signature, b"text", public)
    assert not keys.is_signed(signature, b"texts", public)
    assert not keys.is_signed(signature[:-1] + bytes([signature[-1] ^ 1]), b"text", public)
    assert not keys.is_signed(signature, b"text", keys.make_site_key(tmp_path / "other.pem"))
    with pytest.raises(InputError, match="site.pem: is there already"):
        keys.make_site_key(path)


def test_what_is_no_site_key(tmp_path):
    path = tmp_path / "site.pem"
    with pytest.raises(InputError, match="site.pem: not a site's signing key"):
        keys.read_site_key(path)
    path.write_text("-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n")
    with pytest.raises(InputError, match="site.pem: not a site's signing key"):
        keys.read_site_key(path)
    key = keys.X25519PrivateKey.generate()
    serialization = keys.serialization
    pem = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    path.write_bytes(key.private_bytes(*pem, serialization.NoEncryption()))
    with pytest.raises(InputError, match="expected an Ed25519 key, found a X25519"):
        keys.read_site_key(path)


@pytest.mark.parametrize(
    ("module", "library"),
    [(keys, "cryptography.exceptions"), (secret_shares, "Crypto.Protocol.SecretSharing")],
)
def test_without_the_extra_an_error_says_what_to_install(monkeypatch, module, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=r"secure sums need pip install 'fedllava\[privacy\]'"):
        runpy.run_path(module.__file__)


def test_derived_keys_are_hkdf_sha256():
    secret, label = bytes(range(16)), b"label"
    extracted = hmac.new(bytes(32), secret, hashlib.sha256).digest()  # RFC 5869, by hand
    expected = hmac.new(extracted, label + b"\1", hashlib.sha256).digest()
    assert keys.derive(secret, label) == expected
    assert keys.derive(secret, b"other") != expected


def test_two_sides_agree_on_a_key_that_depends_on_the_label():
    a, b = keys.new_key(), keys.new_key()
    one = keys.agree(a, keys.public_of(b), b"x", "b")
    assert one == keys.agree(b, keys.public_of(a), b"x", "a")
    assert one != keys.agree(a, keys.public_of(b), b"y", "b")
    assert one != keys.agree(a, keys.public_of(keys.new_key()), b"x", "c")


@pytest.mark.parametrize("public", [bytes(32), b"\1" + bytes(31)])
def test_a_public_key_of_small_order_is_refused_by_name(public):
    with pytest.raises(InputError, match="client b: the public key that it advertised is not one"):
        keys.agree(keys.new_key(), public, b"x", "b")


def test_what_was_sealed_opens_with_the_same_key_and_label_alone():
    key, plain = keys.new_key(), bytes(range(32))
    sealed = keys.seal(key, plain, b"a to b")
    assert len(sealed) == keys.SEALED
    assert keys.unseal(key, sealed, b"a to b") == plain
    assert keys.unseal(key, sealed, b"b to a") is None
    assert keys.unseal(keys.new_key(), sealed, b"a to b") is None
    assert keys.unseal(key, bytes([sealed[0] ^ 1]) + sealed[1:], b"a to b") is None
    assert keys.unseal(key, sealed[:-1] + bytes([sealed[-1] ^ 1]), b"a to b") is None
    assert keys.seal(key, plain, b"a to b") != sealed  # a nonce of its own
