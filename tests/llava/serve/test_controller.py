"""The controller with workers that come, go and die, spoken to as upstream's parts do."""

from __future__ import annotations

import httpx
import pytest

from llava.errors import InputError
from llava.serve import protocol
from llava.serve.controller import Registry, arguments, controller_app
from llava.serve.heartbeat import HeartBeat
from tests.llava.serve.conftest import answers, running


def status(*names: str, speed: float = 1, queue: int = 0) -> dict:
    return {"model_names": list(names), "speed": speed, "queue_length": queue}


def stub(chunks: list[bytes], names=("m",)):
    """A worker as an application: its status, and the bytes that it answers."""
    from llava.serve.http_server import application, streamed

    async def worker_get_status(http):
        return status(*names)

    async def worker_generate_stream(http):
        async def pieces():
            for piece in chunks:
                yield piece

        return streamed(pieces())

    return application(worker_get_status, worker_generate_stream)


@pytest.fixture
def controller():
    registry = Registry()
    with running(controller_app(registry)) as address:

        def post(path: str, body: dict | None = None):
            response = httpx.post(f"{address}/{path}", json=body or {})
            assert response.status_code == 200, response.text
            return response.json()

        post.address, post.registry = address, registry
        yield post


def test_a_worker_of_upstream_registers_beats_and_is_found(controller):
    name = "http://localhost:1"
    body = {"worker_name": name, "check_heart_beat": True, "worker_status": status("b", "a")}
    beat = {"worker_name": name, "queue_length": 2}
    assert controller("receive_heart_beat", beat) == {"exist": False}
    assert controller("register_worker", body) is None
    assert controller("receive_heart_beat", beat) == {"exist": True}
    assert controller("list_models") == {"models": ["a", "b"]}
    assert controller("get_worker_address", {"model": "a"}) == {"address": name}
    assert controller("get_worker_address", {"model": "c"}) == {"address": ""}
    assert controller("worker_get_status") == status("a", "b", queue=2)


def test_a_worker_that_sends_no_status_is_asked(controller):
    with running(stub([])) as worker:
        controller("register_worker", {"worker_name": worker, "check_heart_beat": False})
        assert controller("list_models") == {"models": ["m"]}
        assert controller("refresh_all_workers") is None
        assert controller("list_models") == {"models": ["m"]}
    controller("refresh_all_workers")  # it is gone now
    assert controller("list_models") == {"models": []}


def test_an_answer_is_passed_on_and_a_missing_worker_said(controller):
    whole = protocol.chunk("one") + protocol.chunk("one two")
    with running(stub([whole[:9], whole[9:]])) as worker:
        controller("register_worker", {"worker_name": worker})
        found = answers(controller.address, {"model": "m", "prompt": ""})
        assert [c["text"] for c in found] == ["one", "one two"]
        found = answers(controller.address, {"model": "n", "prompt": ""})
        assert found[-1]["error_code"] == protocol.NO_WORKER
        assert "models that are served: m" in str(found)
    found = answers(controller.address, {"model": "m", "prompt": ""})
    assert found[-1]["error_code"] == protocol.WORKER_GONE
    assert "stopped" in found[-1]["text"]


def test_who_is_silent_for_thirty_seconds_is_forgotten():
    now = [0.0]
    registry = Registry(now=lambda: now[0])
    registry.register("quiet", status("m"), True)
    registry.register("beating", status("m"), True)
    registry.register("unwatched", status("n"), False)
    now[0] = 20
    assert registry.beat("beating", 0)
    now[0] = 31
    assert set(registry.alive()) == {"beating", "unwatched"}
    assert not registry.beat("quiet", 0)


def test_the_shortest_queue_counts_what_it_hands_out_and_the_lottery_draws_by_speed():
    registry = Registry("shortest_queue")
    registry.register("slow", status("m"), True)
    registry.register("fast", status("m", speed=2), True)
    assert sorted(registry.choose("m") for _ in range(6)) == ["fast"] * 4 + ["slow"] * 2
    registry = Registry("lottery")
    registry.register("never", status("m", speed=1e-9), True)
    registry.register("always", status("m"), True)
    assert {registry.choose("m") for _ in range(50)} == {"always"}


def test_a_controller_that_was_started_anew_finds_its_workers_again():
    known = []
    with running(controller_app(Registry())) as address:
        port = int(address.rpartition(":")[2])
        life = HeartBeat(address, "http://localhost:7", lambda: status("m"))
        assert life.beat()
        assert life.beat()
        known.append(httpx.post(f"{address}/list_models").json()["models"])
    assert not life.beat()  # nobody is there
    with running(controller_app(Registry()), port) as address:
        assert life.beat()
        known.append(httpx.post(f"{address}/list_models").json()["models"])
    assert known == [["m"], ["m"]]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("register_worker", b"{}", "worker_name: str is expected"),
        ("register_worker", b'{"worker_name": "http://127.0.0.1:9"}', "does not answer"),
        ("register_worker", b'{"worker_name": "w", "worker_status": {"speed": 1}}', "has no model"),
        ("receive_heart_beat", b'{"worker_name": "w"}', "queue_length: int is expected"),
        ("get_worker_address", b"[]", "JSON object is expected"),
        ("get_worker_address", b"{", "not JSON"),
    ],
)
def test_bad_requests_are_refused_in_words(controller, path, body, message):
    response = httpx.post(f"{controller.address}/{path}", content=body)
    assert response.status_code == 400
    assert message in response.json()["detail"]
    assert controller("list_models") == {"models": []}


def test_flags_are_upstreams():
    args = arguments([])
    assert (args.host, args.port, args.dispatch_method) == ("localhost", 21001, "lottery")
    with pytest.raises(InputError, match="lottery or shortest_queue"):
        Registry("longest")
