"""The server's part of a site's job, without FLARE around it: when it lets the site go."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

pytest.importorskip("nvflare", reason="the extra `remote` is not installed")

from nvflare.apis.shareable import Shareable

from fed.remote import exchange, flare_job, policy
from fed.remote.exchange import ServerEnd, SiteEnd
from fed.remote.spool import STATE, Spool
from tests.fed.remote.test_exchange import SITE, ask, reply

OVER = {"over": True}


@pytest.fixture
def spools(tmp_path, monkeypatch):
    monkeypatch.setattr(flare_job, "end_with_parent", lambda: None)
    monkeypatch.setattr(exchange, "PIECE", 1000)
    return Spool(tmp_path / SITE, SITE), Spool(tmp_path / "site", SITE)


@pytest.fixture
def jobs(spools, tmp_path):
    """`jobs(enough)`: a new job of the site, as a call for its messages."""

    def make(enough: float):
        job = flare_job.ServerJob(str(tmp_path), SITE, "0" * 32, enough)
        job._end = ServerEnd(spools[0])
        context = SimpleNamespace(
            get_peer_context=lambda: SimpleNamespace(get_identity_name=lambda: SITE),
            get_workspace=lambda: SimpleNamespace(get_root_dir=lambda: str(tmp_path)),
        )

        def call(message):
            answer = job._answer("", Shareable({"message": message}), context)["message"]
            if answer == OVER:
                raise flare_job._OverError
            return answer

        return call

    return make


@pytest.mark.parametrize("enough", [0, 5000, 1e9])
def test_a_job_ends_between_two_files_and_the_next_one_goes_on(spools, jobs, enough):
    """A request of 5500 bytes and its answer of as many: one job, or a new one after each file."""
    server, site = spools
    key, state = ask(server)
    ends = [SiteEnd(site, jobs(enough))]

    def until_still():
        moved = True
        while moved:
            try:
                moved = ends[-1].step()
            except flare_job._OverError:
                assert not list(site.folder.glob(".*.part"))
                assert not list(server.folder.glob(".*.part"))
                ends.append(SiteEnd(site, jobs(enough)))

    until_still()
    assert site.file(key, STATE).read_bytes() == state
    reply(site, key, state[::-1])
    until_still()
    assert server.answer(key).update.read_bytes() == state[::-1]
    assert len(ends) == (1 if enough == 1e9 else 3)


def test_a_withdrawn_site_has_no_answer_any_more(spools, jobs, tmp_path):
    server, _ = spools
    key, _ = ask(server)
    call = jobs(1e9)
    piece = {"do": "get", "key": key, "kind": STATE, "at": 0}
    assert call(piece)["size"] == 5500
    (tmp_path / policy.WITHDRAWN).write_text(json.dumps({"disabled_clients": ["another"]}))
    assert call(piece)["size"] == 5500
    (tmp_path / policy.WITHDRAWN).write_text(json.dumps({"disabled_clients": [SITE, "another"]}))
    with pytest.raises(flare_job._OverError):
        call(piece)
