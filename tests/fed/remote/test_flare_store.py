"""Jobs that go, or are broken, while FLARE or a driver's watch looks at them."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pytest

pytest.importorskip("nvflare", reason="the extra `remote` is not installed")

from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_def import RunStatus
from nvflare.app_common.storages.filesystem_storage import FilesystemStorage

from fed.remote.flare_store import Jobs
from fed.remote.flare_watch import Watch


def meta(name: str, status: RunStatus) -> dict:
    return {"job_id": name, "name": name, "status": status.value, "submit_time": 1.0}


@pytest.fixture
def store(tmp_path):
    store = FilesystemStorage(root_dir=str(tmp_path))
    for name in ("a", "b", "c", "d"):
        store.create_object(f"jobs/{name}", b"", meta(name, RunStatus.SUBMITTED))
    store.create_object("jobs/ended", b"", meta("ended", RunStatus.FINISHED_COMPLETED))
    return store


@pytest.mark.parametrize("gone", ["deleted", "deleted at once", "empty", "cut"])
def test_a_job_that_cannot_be_read_is_passed_over(store, tmp_path, monkeypatch, gone):
    listed = store.list_objects

    def list_objects(path, without_tag=None):
        """What befalls a job befalls it between FLARE's look at the folder and at the job."""
        found = sorted(listed(path, without_tag=without_tag))
        file = tmp_path / "jobs" / "b" / "meta"
        if gone == "deleted":
            file.unlink(missing_ok=True)
        elif gone == "deleted at once":
            shutil.rmtree(tmp_path / "jobs" / "ended", ignore_errors=True)
            shutil.rmtree(file.parent, ignore_errors=True)
        else:
            file.write_bytes(b"" if gone == "empty" else file.read_bytes()[:20])
        return found

    monkeypatch.setattr(store, "list_objects", list_objects)
    monkeypatch.setattr(Jobs, "_get_job_store", lambda self, context: store)
    jobs, context = Jobs(uri_root="jobs", job_store_id="job_store"), FLContext()
    for _ in range(2):  # an ended job is marked the first time
        found = {job.job_id for job in jobs.get_jobs_to_schedule(context)}
        assert found == {"a", "c", "d"}
    assert {job.job_id for job in jobs.get_all_jobs(context)} >= {"a", "c", "d"}


def test_a_watch_deletes_only_what_has_ended_before():
    """The scheduler reads a job until it has seen it end."""
    done = []
    listed = [
        {"job_id": "1", "status": "FINISHED:COMPLETED"},
        {"job_id": "2", "status": "SUBMITTED"},
        {"job_id": "3", "status": "RUNNING"},
        {"job_id": "4", "status": "FINISHED:ABORTED"},
    ]

    def abort(name):
        done.append(("abort", name))
        raise RuntimeError("it is not running")

    watch = Watch.__new__(Watch)
    watch._session = SimpleNamespace(
        list_jobs=lambda name_prefix: listed,
        abort_job=abort,
        delete_job=lambda name: done.append(("delete", name)),
    )
    watch._clear("carry")
    assert done == [("delete", "1"), ("abort", "2"), ("abort", "3"), ("delete", "4")]
