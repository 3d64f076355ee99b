"""Keys: a site's own Ed25519 key, X25519 key agreement, and the symmetric keys made from it.

Every derived key is made by HKDF-SHA256 with a label (`Terms.label`) that says what it is for, in
which run, round, exchange and attempt, and between whom: keys of different use are independent.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import Any

from llava.atomic import write_secret
from llava.errors import InputError, reason

try:
    from cryptography.exceptions import InvalidSignature, InvalidTag
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF
except ImportError:
    raise InputError("secure sums need pip install 'fedllava[privacy]'") from None

SEED = 16  # bytes; 128 bits, as much as X25519 itself gives
KEY = 32
SIGNATURE = 64
_NONCE = 12
SEALED = _NONCE + 2 * SEED + 16  # bytes of two sealed shares: nonce, shares, tag


def make_site_key(path: Path) -> bytes:
    """Make a site's signing key in a PEM file of mode 0600; returns its public key, 32 bytes."""
    if path.exists():
        raise InputError(f"{path}: is there already; a site keeps its signing key")
    key = Ed25519PrivateKey.generate()
    kind = serialization.PrivateFormat.PKCS8
    plain = serialization.NoEncryption()
    write_secret(path, key.private_bytes(serialization.Encoding.PEM, kind, plain))
    return key.public_key().public_bytes_raw()


def read_site_key(path: Path) -> Ed25519PrivateKey:
    """The signing key in a PEM file; `InputError` if there is none."""
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{path}: not a site's signing key ({reason(error)})") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise InputError(f"{path}: expected an Ed25519 key, found a {type(key).__name__}")
    return key


def is_signed(signature: bytes, content: bytes, public: bytes) -> bool:
    """Whether `signature` is that of `content` by the Ed25519 key `public`."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, content)
    except (InvalidSignature, ValueError):
        return False
    return True


def new_seed() -> bytes:
    return secrets.token_bytes(SEED)


def new_key() -> bytes:
    """A new X25519 private key."""
    return secrets.token_bytes(KEY)


def derive(secret: bytes, label: bytes) -> bytes:
    """A key of 32 bytes for the use that `label` names."""
    return HKDF(hashes.SHA256(), KEY, salt=None, info=label).derive(secret)


def public_of(private: bytes) -> bytes:
    """The X25519 public key, 32 bytes, of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def agree(private: bytes, public: bytes, label: bytes, whose: str) -> bytes:
    """The key of 32 bytes that the owners of two X25519 keys share; KA.agree in the paper.

    Raises:
        InputError: `public`, a key of `whose`, is of a small order: the secret would be no secret.
    """
    try:
        shared = X25519PrivateKey.from_private_bytes(private).exchange(
            X25519PublicKey.from_public_bytes(public)
        )
    except ValueError:
        raise InputError(f"client {whose}: the public key that it advertised is not one") from None
    return derive(shared, label)


def seal(key: bytes, plain: bytes, label: bytes) -> bytes:
    """AES-256-GCM with a random nonce in front; `label` is authenticated with it."""
    nonce = secrets.token_bytes(_NONCE)
    return nonce + AESGCM(key).encrypt(nonce, plain, label)


def unseal(key: bytes, sealed: bytes, label: bytes) -> bytes | None:
    """What was sealed; None if it was sealed with another key or label, or was changed."""
    try:
        return AESGCM(key).decrypt(sealed[:_NONCE], sealed[_NONCE:], label)
    except InvalidTag:
        return None


def commit(label: bytes, value: bytes) -> bytes:
    """SHA-256 of a random value of 16 bytes with its label: binds to it, and tells nothing."""
    return hashlib.sha256(label + value).digest()


def keystream(key: bytes) -> Any:
    """AES-256 in counter mode from zero; a key is used for one stream."""
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
