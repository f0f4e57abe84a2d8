"""The member's end: what an order does to the member's folder, and what a server cannot do to it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from folklora.errors import RunError
from folklora.federation.codec import decode, encode
from folklora.federation.folder import MemberFolder, locked
from folklora.federation.orders import Order
from folklora.federation.parties import Own, server_setup
from folklora.federation.resident import Resident
from folklora.federation.sampling import sampled
from folklora.federation.standing import own_model
from folklora.methods.contract import Message
from folklora.recipe import Recipe

RUN = "0f" * 16
ONE = "1"
CLIENTS = ["0", "1", "2", "3"]


class Server:
    """Gives one member orders by hand."""

    def __init__(self, recipe: Recipe, home: Path, own: Own | None = None) -> None:
        self.recipe, self.home = recipe, home
        self.own = own or Own(rehearse=recipe.data.source, model=recipe.model.name)
        self.setup = server_setup(recipe, CLIENTS)
        self.number = 0
        self.restart()

    def restart(self) -> None:
        """The member's process ends and begins anew."""
        self.resident = Resident(ONE, self.home, self.own)

    def record(self, kind: str, round: int = 0, **fields: Any) -> dict[str, Any]:
        self.number += 1
        order = {"kind": kind, "run": RUN, "number": self.number, "round": round, "client": ONE, **fields}
        return Order.of(order).record()

    def ask(self, kind: str, round: int = 0, **fields: Any) -> dict[str, Any]:
        return self.resident.answer(self.record(kind, round, **fields))

    def hello(self, **fields: Any) -> dict[str, Any]:
        told = {
            "recipe": self.recipe.to_toml(),
            "clients": CLIENTS,
            "classes": list(self.setup.data.table.classes),
            "backbone": self.setup.task.backbone.digest,
        }
        return self.ask("hello", **{**told, **fields})

    def begin(self) -> Server:
        assert self.hello()["status"] == "done"
        assert self.ask("sketch")["status"] == "done"
        return self

    @property
    def folder(self) -> MemberFolder:
        return MemberFolder(self.home / "runs" / RUN)

    def files(self) -> dict[str, bytes]:
        return {p.relative_to(self.home).as_posix(): p.read_bytes() for p in self.home.rglob("*") if p.is_file()}


def part(name: str, data: bytes) -> dict[str, Any]:
    return {name: hashlib.sha256(data).hexdigest(), f"{name}_data": data}


@pytest.fixture
def server(tiny_recipe: Callable[..., Any], tmp_path: Path) -> Server:
    recipe = tiny_recipe("method.name=fedit", "data.limit=80", "message.top_k=0.5", "message.error_feedback=true")
    return Server(recipe, tmp_path / "home").begin()


@pytest.fixture
def reply(server: Server) -> bytes:
    """What the server might say after round 1."""
    state = server.setup.method.initial(ONE)
    shapes = server.setup.method.expected(1, {}, ONE)
    return encode(Message({name: state[name] + 0.1 for name in shapes}))


# -- versions ----------------------------------------------------------------------------------------------------------


def test_the_same_order_gives_the_same_upload_to_a_member_that_died_before_it_answered(
    server: Server, reply: bytes
) -> None:
    first = server.ask("train", 1, base=0)
    server.restart()  # its version was written; the answer never left
    again = server.ask("train", 1, base=0)
    assert again["data"] == first["data"]
    assert again["loss"] == first["loss"]
    second = server.ask("train", 2, base=1, accepted=True, **part("reply", reply))
    server.restart()
    assert server.ask("train", 2, base=1, accepted=True, **part("reply", reply))["data"] == second["data"]


def test_whether_the_last_upload_was_taken_changes_what_is_owed(server: Server, reply: bytes) -> None:
    server.ask("train", 1, base=0)
    taken = server.ask("train", 2, base=1, accepted=True, **part("reply", reply))
    server.restart()
    refused = server.ask("train", 2, base=1, accepted=False, **part("reply", reply))
    assert taken["data"] != refused["data"]


def test_versions_and_replies_that_the_server_cannot_come_back_to_are_swept_away(server: Server, reply: bytes) -> None:
    told = part("reply", reply)
    server.ask("train", 1, base=0, keep=[0])
    server.ask("train", 2, base=1, keep=[0, 1], **told)
    assert set(server.folder.state().versions) == {0, 1, 2}
    server.ask("train", 3, base=2, keep=[2], reply=told["reply"])
    assert set(server.folder.state().versions) == {2, 3}
    assert len(list((server.folder.path / "versions").iterdir())) == 2
    other = encode(decode(reply), "float16")
    server.ask("train", 4, base=3, **part("reply", other))
    assert [path.name for path in (server.folder.path / "parts").iterdir()] == [part("reply", other)["reply"]]
    assert server.ask("train", 5, base=4, reply=told["reply"])["status"] == "resend"


def test_a_score_makes_no_version(server: Server, reply: bytes) -> None:
    server.ask("train", 1, base=0)
    versions = server.folder.state().versions
    told = part("reply", reply)
    found = server.ask("score", 1, base=1, questions=["test", "test+reply", "validation+reply"], **told)
    assert found["units"][0] == found["units"][1] > 0
    assert server.folder.state().versions == versions
    assert server.folder.state().reply == told["reply"]


def test_a_run_that_began_with_an_older_version_goes_on(server: Server) -> None:
    """What is described by fewer keys is the same recipe."""
    text = server.recipe.to_toml()
    older = text.partition("[eval]")[0] + text[text.index("[message]") :]
    assert older != text
    brief = server.folder.path / "brief.json"
    brief.write_text(json.dumps({**json.loads(brief.read_text()), "recipe": older}))
    server.restart()
    assert server.hello()["status"] == "done"
    assert server.hello(recipe=text.replace("lr = 0.005", "lr = 0.006"))["status"] == "refused"


def test_a_damaged_version_is_lost_and_not_used(server: Server) -> None:
    server.ask("train", 1, base=0)
    (file,) = (server.folder.path / "versions").glob("1-*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    server.restart()
    answer = server.ask("train", 2, base=1)
    assert answer["status"] == "lost"
    assert "round 1" in answer["failure"]


# -- what is refused -----------------------------------------------------------------------------------------------


def broken(reply: bytes, change: Callable[[dict[str, torch.Tensor]], None]) -> bytes:
    tensors = dict(decode(reply).tensors)
    change(tensors)
    return encode(Message(tensors))


BROKEN: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda r: r[:-3],
    "another shape": lambda r: broken(r, lambda t: t.update({"head/bias": torch.zeros(7)})),
    "another rank for one layer": lambda r: broken(r, lambda t: t.update({next(iter(t)): torch.zeros(5, 32)})),
    "another rank for all": lambda r: broken(
        r, lambda t: t.update({n: torch.zeros(64, 32) for n in t if n.startswith("A/")})
    ),
    "an unknown tensor": lambda r: broken(r, lambda t: t.update({"B/nowhere": torch.zeros(2)})),
    "integers": lambda r: broken(r, lambda t: t.update({"head/bias": torch.zeros(4, dtype=torch.int64)})),
    "gigantic": lambda r: bytes(64 << 20),
    "empty": lambda r: b"",
}


@pytest.mark.parametrize("where", ["welcome", "reply"])
@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_used_is_refused_and_nothing_changes(
    server: Server, reply: bytes, name: str, where: str
) -> None:
    before = {n: d for n, d in server.files().items() if "/parts/" not in n}
    answer = server.ask("train", 1, base=0, **part(where, BROKEN[name](reply)))
    assert answer["status"] == "failed"
    assert {n: d for n, d in server.files().items() if "/parts/" not in n} == before
    untouched = server.ask("train", 1, base=0)
    server.restart()
    assert server.ask("train", 1, base=0)["data"] == untouched["data"]


def test_orders_for_others_of_other_runs_or_from_versions_that_are_not_here(server: Server) -> None:
    order = server.record("train", 1, base=0)
    assert server.resident.answer({**order, "client": "2"})["status"] == "refused"
    assert server.resident.answer({**order, "run": "00" * 16})["status"] == "lost"
    assert server.ask("train", 5, base=4)["status"] == "lost"
    assert server.hello(classes=["amber", "blue"])["status"] == "failed"
    assert server.hello(clients=["0", "2"])["status"] == "failed"
    assert server.hello(clients=["1", "2"])["status"] != "done"
    assert server.hello(recipe="seed = ")["status"] == "failed"
    assert server.hello(recipe=server.recipe.to_toml().replace("seed = 0", "seed = 1"))["status"] == "refused"
    assert server.hello(backbone="0" * 64)["status"] == "refused"
    assert server.ask("train", 1, base=0)["status"] == "done"


def test_no_more_rounds_are_trained_than_the_noise_was_found_for(
    tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    """A server that asks on, or asks whom nobody drew, would be told more than the budget says."""
    for unit in (("privacy.unit=client", "privacy.placement=client"), ("privacy.unit=example",)):
        options = ("method.name=fedit", "data.limit=80", "privacy.epsilon=5.0", "train.participation=0.5")
        recipe = tiny_recipe(*options, *unit, "train.rounds=3")
        server = Server(recipe, tmp_path / unit[0]).begin()
        turns = [r for r in range(1, 4) if ONE in sampled(recipe, CLIENTS, r, 0)]
        assert 0 < len(turns) < 3
        base = 0
        for round in range(1, 7):
            answer = server.ask("train", round, base=base)
            if round in turns:
                assert answer["status"] == "done"
                base = round
            else:
                assert answer["status"] == "refused"
                assert "allowed" in answer["failure"]


def test_no_score_on_what_is_trained_on_where_that_is_private(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    options = ("method.name=fedit", "data.limit=80", "privacy.noise=1.0")
    for unit in ("example", "client"):
        server = Server(tiny_recipe(*options, f"privacy.unit={unit}"), tmp_path / unit).begin()
        assert server.ask("score", 0, base=0, questions=["validation"])["status"] == "done"
        answer = server.ask("score", 0, base=0, questions=["validation", "train"])
        assert answer["status"] == ("refused" if unit == "example" else "done")


def test_no_path_leaves_the_member(
    tiny_recipe: Callable[..., Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny_recipe("method.name=fedit")
    for own in (Own(str(tmp_path / "none.csv"), model=recipe.model.name), Own(model=str(tmp_path / "none")), Own()):
        server = Server(recipe, tmp_path / "home", own)
        answer = server.hello()
        assert answer["status"] == "failed"
        assert str(tmp_path) not in answer["failure"]
        assert "Traceback" not in answer["failure"]
    assert str(tmp_path / "none.csv") in caplog.text  # the member's own log is for the member


def test_a_server_cannot_name_a_file_or_a_backbone_to_open(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny_recipe("method.name=fedit")
    assert Server(recipe, tmp_path / "a").hello()["status"] == "done"  # the member named both itself
    refused = Server(recipe, tmp_path / "b", Own(model=recipe.model.name)).hello()
    assert refused["status"] == "failed"
    assert "DataError" in refused["failure"]
    refused = Server(recipe, tmp_path / "c", Own(rehearse=recipe.data.source)).hello()
    assert "BackboneError" in refused["failure"]


def test_a_rehearsal_reads_the_source_that_the_member_named(
    tiny_recipe: Callable[..., Any], tiny_data: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe("method.name=fedit")
    told = recipe.model_copy(update={"data": recipe.data.model_copy(update={"source": f"/nowhere/{tiny_data.name}"})})
    own = Own(rehearse=str(tiny_data), model=recipe.model.name)
    server = Server(recipe, tmp_path / "a", own)
    assert server.hello(recipe=told.to_toml())["status"] == "done"
    for other in (str(tiny_data / "train.csv"), "banking77"):  # another one than the run's
        server = Server(recipe, tmp_path / "b", Own(rehearse=other, model=recipe.model.name))
        assert server.hello(recipe=told.to_toml())["status"] == "failed"


def test_nothing_is_looked_for_where_the_recipe_of_a_server_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "private.csv").touch()
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.from_toml('[data]\nsource = "private.csv"')
    assert recipe.data.source == "private.csv"


def test_a_member_that_comes_back_with_another_backbone_is_refused(
    server: Server, tiny_model: Callable[[str], Path]
) -> None:
    server.ask("train", 1, base=0)
    server.own = dataclasses.replace(server.own, model=str(tiny_model("roberta")))
    server.restart()
    answer = server.ask("train", 2, base=1)
    assert answer["status"] == "refused"
    assert "backbone" in answer["failure"]
    brief = server.folder.brief()
    assert brief is not None
    with pytest.raises(RunError, match="not the backbone"):
        own_model(server.folder, brief.model_copy(update={"model": server.own.model}))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 10**6))
def test_a_damaged_reply_is_an_answer_like_any_other(
    server: Server, reply: bytes, where: int, value: int, cut: int
) -> None:
    data = bytearray(reply)
    data[where % len(data)] = value
    answer = server.ask(
        "score", 1, base=0, questions=["test+reply"], **part("reply", bytes(data[: 1 + cut % len(data)]))
    )
    assert answer["status"] in ("done", "failed")


# -- the folder --------------------------------------------------------------------------------------------------------


def test_own_rows_are_guarded_by_a_secret_that_stays(
    tiny_recipe: Callable[..., Any], tiny_data: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe("method.name=celora", "method.dp_epsilon=5.0", "method.components=0")
    own = Own(str(tiny_data / "train.csv"), model=recipe.model.name)
    one, other = (Server(recipe, tmp_path / name, own) for name in ("one", "other"))
    assert one.hello()["status"] == other.hello()["status"] == "done"
    secret = one.folder.path / "secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(one.folder.path.stat().st_mode) == 0o700
    first = one.ask("sketch")["data"]
    one.restart()
    assert one.ask("sketch")["data"] == first  # repeated noise does not average out
    assert other.ask("sketch")["data"] != first
    assert secret.read_bytes() not in first


def test_a_folder_has_one_process(tmp_path: Path) -> None:
    with locked(tmp_path / "home"), pytest.raises(RunError, match="another process"), locked(tmp_path / "home"):
        pass
    with locked(tmp_path / "home"):
        pass


def test_a_goodbye_ends_the_run_and_loses_nothing(server: Server) -> None:
    first = server.ask("train", 1, base=0)
    assert not server.resident.over
    assert server.ask("goodbye", 2)["status"] == "done"
    assert server.resident.over
    assert server.ask("train", 1, base=0)["data"] == first["data"]
