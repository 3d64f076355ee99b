"""Whom the server lets in: one process of a site, and none of a site that was withdrawn.

`Gate` is a part of the server. `python -m fed.remote.flare_gate KIT USER SITE` has a server that is
up withdraw a site; a process of its own, for FLARE's sessions keep threads that outlive a program.
"""

from __future__ import annotations

import os
import sys
import time

from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_context import FLContext
from nvflare.apis.fl_exception import NotAuthenticated
from nvflare.fuel.flare_api.flare_api import new_secure_session

from llava.errors import reason

_ALIVE = 12.0  # seconds since a site's last word, which comes every 10, in which it keeps its place
_LOGIN = 10.0


class Gate(FLComponent):
    """Refuses a second process of a site: FLARE would have it take the first one's place.

    Each of the two would then end the other's connection with its own, for ever.
    """

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        if event_type != EventType.CLIENT_REGISTER_RECEIVED:
            return
        peer = fl_ctx.get_peer_context()
        name = peer.get_identity_name() if peer else ""
        client = fl_ctx.get_engine().get_client_from_name(name)
        if client is not None and time.time() - client.last_connect_time < _ALIVE:
            raise NotAuthenticated(f"another process of {name} is connected")


def withdraw(kit: str, user: str, site: str) -> None:
    """End a site's connection, and let the server refuse it from now on.

    Args:
        kit: the admin's; `user` is the name in its certificate.
    """
    new_secure_session(user, kit, timeout=_LOGIN).disable_client(site)


if __name__ == "__main__":
    code = 0
    try:
        withdraw(*sys.argv[1:4])
    except Exception as error:  # whatever FLARE raises
        print(reason(error), file=sys.stderr, flush=True)
        code = 1
    os._exit(code)
