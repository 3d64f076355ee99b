"""A client's file: the same answers after a restart, and no second ones."""

import json
import shutil
import stat

import pytest

from fed.privacy.client_memory import STEPS
from llava.errors import InputError
from tests.fed.privacy.federation import Federation, assert_close

FIRST, SECOND, MASKED, CHECK, LAST = STEPS


@pytest.fixture
def made(tmp_path):
    return Federation(4, folder=tmp_path)


def test_a_client_that_is_killed_at_each_step_gives_the_same_answers(made):
    for step in STEPS:
        for name in made.names:
            made.clients[name] = made.client(name)  # killed before it has answered
            answer = made.answer(name, step)
            made.clients[name] = made.client(name)  # and before its answer was sent
            assert made.answer(name, step) == answer
            made.server.receive(name, answer)
        if step != LAST:
            made.messages = made.server.proceed()
    assert_close(made.server.finish(), made.plain(made.names))


def test_the_file_is_its_owners_alone_and_lies_there_before_the_answer(made, monkeypatch):
    for step in STEPS:
        with monkeypatch.context() as patch:
            patch.setattr("fed.privacy.client_memory.write_secret", full)
            with pytest.raises(OSError, match="no room"):
                made.answer("a", step)
        before = made.client("a")._memory._state
        assert step not in before.sent
        made.do(step)
        assert stat.S_IMODE(made.clients["a"]._memory.file.stat().st_mode) == 0o600
        assert step in made.client("a")._memory._state.sent


def full(path, content):
    raise OSError("no room")


def test_another_input_after_a_restart_is_refused(made):
    made.until(MASKED)
    answer = made.answer("a", MASKED)
    made.clients["a"] = made.client("a")
    weight, made.weights["a"] = made.weights["a"], 11.0
    with pytest.raises(
        InputError, match="^client a: a second, different input in the same attempt"
    ):
        made.answer("a", MASKED)
    made.weights["a"] = weight
    assert made.answer("a", MASKED) == answer


def test_after_the_last_answer_the_keys_are_destroyed(made):
    made.until(LAST)
    secrets = made.clients["a"]._memory.secrets
    file = made.clients["a"]._memory.file
    assert all(value.hex() in file.read_text() for value in vars(secrets).values())
    answer = made.answer("a", LAST)
    assert not any(value.hex() in file.read_text() for value in vars(secrets).values())
    for client in (made.clients["a"], made.client("a")):
        assert client._memory._state.secrets is None
        assert client.unmask(made.messages["a"]) == answer
        for step, message in ((FIRST, b""), (MASKED, b"x")):
            with pytest.raises(InputError, match="^client a: this attempt is over, and its keys"):
                client.advertise() if step == FIRST else client.mask(message, {})


def test_another_attempt_destroys_the_keys_of_the_last_one(made):
    made.until(CHECK)
    old, messages = dict(made.clients), dict(made.messages)
    secrets = old["a"]._memory.secrets
    made.attempt()
    file = made.clients["a"]._memory.file
    assert not any(value.hex() in file.read_text() for value in vars(secrets).values())
    with pytest.raises(InputError, match="a.json: is not as client a left it: a later attempt"):
        old["a"].confirm(messages["a"])
    assert_close(made.run(), made.plain(made.names))


@pytest.mark.parametrize("step", STEPS)
def test_no_second_attempt_once_a_sum_was_unmasked(made, step):
    """The sums over two sets of clients would tell the server their difference."""
    made.until(step)
    made.do(step)
    if step != LAST:
        made.attempt()
        return
    text = "^client a: this sum was unmasked in another attempt; a second one could tell the server"
    with pytest.raises(InputError, match=text):
        made.attempt()


def test_each_sum_has_a_file_of_its_own(made):
    with pytest.raises(InputError, match="a.json: is of the exchange .*; each secure sum of each"):
        made.attempt(exchange="other")
    with pytest.raises(InputError, match="a.json: is of the exchange"):
        made.attempt(round=2)
    shutil.copy(made.folder / "b.json", made.folder / "a.json")
    with pytest.raises(InputError, match="a.json: is of the exchange .*'b'"):
        made.client("a")


def test_two_processes_with_one_file(made):
    made.until(MASKED)
    other = made.client("a")
    made.answer("a", MASKED)
    with pytest.raises(InputError, match="a.json: is not as client a left it: .* another process"):
        other.mask(made.messages["a"], made.tensors["a"], 12.0)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"protocol": 2}', "[" * 10**5])
def test_what_is_no_memory(made, content):
    file = made.folder / "a.json"
    file.write_text(content)
    with pytest.raises(InputError, match="a.json: "):
        made.client("a")


@pytest.mark.parametrize(
    "changes",
    [{"secrets": {"x": "00"}}, {"secrets": 5}, {"sent": []}, {"sent": {"x": 5}}, {"more": 1},
     {"secrets": {"channel_key": "zz"}}],
)  # fmt: skip
def test_a_damaged_memory(made, changes):
    file = made.folder / "a.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(InputError, match="a.json: not a client's memory of a secure sum"):
        made.client("a")
