"""What a holder of a kit can ask of FLARE's server; a process of its own, for sessions linger.

`python -m tests.fed.remote.flare_admin KIT USER [JOB]`: log in, perhaps have a job run to its end,
and say how that went as JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time

from nvflare.fuel.flare_api.flare_api import new_secure_session


def ask(kit: str, user: str, job: str | None) -> dict:
    session = new_secure_session(user, kit, timeout=60)
    if job is None:
        return {"clients": [client.name for client in session.get_connected_client_list()]}
    number = session.submit_job(job)
    status, deadline = "", time.monotonic() + 40
    while not status.startswith("FINISHED") and time.monotonic() < deadline:
        time.sleep(0.5)
        status = session.get_job_meta(number)["status"]
    return {"status": status}


if __name__ == "__main__":
    try:
        found = ask(*sys.argv[1:3], sys.argv[3] if len(sys.argv) > 3 else None)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(found), flush=True)
    os._exit(0)
