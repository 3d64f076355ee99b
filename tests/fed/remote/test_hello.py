"""The facts that a site tells: the fingerprint of its records can be compared, and not guessed."""

from __future__ import annotations

import stat

from fed.remote.hello import data_fingerprint


def test_a_fingerprint_of_records_is_the_sites_own(tmp_path):
    own, other = tmp_path / "a" / "secret", tmp_path / "b" / "secret"
    first = data_fingerprint("records", "run", own)
    assert first == data_fingerprint("records", "run", own)
    assert len(first) == 16
    assert stat.S_IMODE(own.stat().st_mode) == 0o600
    others = {
        data_fingerprint("other records", "run", own),
        data_fingerprint("records", "another run", own),
        data_fingerprint("records", "run", other),  # who knows the records cannot tell
    }
    assert first not in others
    assert len(others) == 3
