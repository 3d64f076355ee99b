"""A participant's certificate: whose it is, and until when."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from llava.errors import InputError, reason

INSTALL = "pip install 'fedllava[remote]'"


@dataclass(frozen=True)
class Certificate:
    """The subject of a certificate, and its last moment (UTC)."""

    name: str
    organisation: str
    ends: datetime.datetime

    def days_left(self) -> int:
        return (self.ends - datetime.datetime.now(datetime.timezone.utc)).days


def read_certificate(path: Path) -> Certificate:
    """The certificate in a PEM file.

    Raises:
        InputError: there is none, or it is not valid at this machine's time.
    """
    try:
        from cryptography import x509
        from cryptography.x509.oid import NameOID
    except ImportError:
        raise InputError(f"sites on other machines need {INSTALL}") from None
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
        name, company = (
            str(found.subject.get_attributes_for_oid(which)[0].value)
            for which in (NameOID.COMMON_NAME, NameOID.ORGANIZATION_NAME)
        )
    except (OSError, ValueError, IndexError) as error:
        raise InputError(f"{path}: not a certificate of a kit ({reason(error)})") from None
    begins, ends = found.not_valid_before_utc, found.not_valid_after_utc
    now = datetime.datetime.now(datetime.timezone.utc)
    if now >= ends:
        raise InputError(
            f"{path}: the certificate of {name} has ended on {ends:%Y-%m-%d}; the coordinator "
            f"makes a new one with python -m fed.remote.kits --renew {name}"
        )
    if now < begins:
        raise InputError(
            f"{path}: the certificate of {name} begins on {begins:%Y-%m-%d %H:%M} UTC, and here it "
            f"is {now:%Y-%m-%d %H:%M} UTC: this clock or the coordinator's is wrong"
        )
    return Certificate(name, company, ends)
