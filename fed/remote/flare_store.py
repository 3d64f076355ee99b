"""The server's store of FLARE jobs, whose files may go or be broken while it is looked at."""

from __future__ import annotations

import contextlib
from pathlib import PurePath

from nvflare.apis.fl_context import FLContext
from nvflare.apis.impl.job_def_manager import JobInfo, SimpleJobDefManager
from nvflare.apis.storage import StorageException


class Jobs(SimpleJobDefManager):
    """FLARE's own, but that a job whose files cannot be read is passed over.

    A driver deletes jobs that have ended, and a server may be killed while it writes one. FLARE's
    scheduler is a thread that an error in such a job would end: no job would start any more.
    """

    def _scan(self, job_filter, fl_ctx: FLContext, skip_tag: str | None = None) -> None:
        store = self._get_job_store(fl_ctx)
        for uri in store.list_objects(self.uri_root, without_tag=skip_tag):
            name = PurePath(uri).name
            with contextlib.suppress(StorageException, OSError, ValueError):
                meta = store.get_meta(self.job_uri(name))
                if meta and not job_filter.filter_job(JobInfo(meta, name, self.job_uri(name))):
                    return
