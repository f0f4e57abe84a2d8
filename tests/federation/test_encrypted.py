"""Runs whose server mixes what it cannot read, against the same runs in the clear."""

from __future__ import annotations

import shutil
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from folklora.errors import FederationError, FolkLoraError, MessageError
from folklora.federation.codec import decode, encode
from folklora.federation.encrypted import EncryptedIntake, EncryptedOutlet
from folklora.federation.engine import Upload
from folklora.federation.inspect import inspect
from folklora.federation.keys import make_key, read_key
from folklora.federation.ledger import Ledger
from folklora.federation.local import LocalEngine
from folklora.federation.member import Member
from folklora.federation.orders import Order, Record
from folklora.federation.parties import Own
from folklora.federation.rounds import Silent
from folklora.federation.run import client_model, resume, run
from folklora.federation.rundir import RunDirectory
from folklora.federation.setup import prepare
from folklora.methods.contract import Message
from folklora.privacy.ckks import Key

pytest.importorskip("tenseal.sealapi")

CKKS = "secure.kind=ckks"
# Plain steps: where numbers agree within 1e-5, Adam would make much of their last digits.
PLAIN = ["train.optimizer=sgd", "train.lr=0.02", "data.limit=80", "train.rounds=3", "train.participation=0.75"]
CLOSE = {"rtol": 0, "atol": 2e-4}
METHODS = {
    "cores mixed by data": ["method.name=celora", "method.similarity=data"],
    "statistics": ["method.name=folklora", "method.similarity=data", "method.temperature=0.1"],
    "one core for all": ["method.name=folklora"],
    "uniform, and a head by examples": ["method.name=celora", "method.similarity=uniform", "method.head=shared"],
    "mixed cores, and a head by examples": ["method.name=celora", "method.similarity=data", "method.head=shared"],
    "fedit": ["method.name=fedit"],
    "factors that alternate": ["method.name=rolora", "train.rounds=4"],
    "two models": ["method.name=ditto"],
}


def models(path: Path, clients: list[str], **options: bool) -> dict[str, dict[str, Tensor]]:
    return {client: dict(client_model(path, client, **options).tensors) for client in clients}


def assert_close(found: dict[str, dict[str, Tensor]], wanted: dict[str, dict[str, Tensor]]) -> None:
    assert found.keys() == wanted.keys()
    for client, tensors in wanted.items():
        assert found[client].keys() == tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_allclose(found[client][name], tensor, err_msg=f"{client} {name}", **CLOSE)


@pytest.fixture
def key(tmp_path: Path) -> Key:
    return make_key(tmp_path / "common.key")


# -- the same run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_an_encrypted_run_is_the_run_in_the_clear(tiny_recipe: Callable[..., Any], tmp_path: Path, name: str) -> None:
    clients = ["0", "1", "2", "3"]
    clear = run(tiny_recipe(*PLAIN, *METHODS[name]), tmp_path / "clear")
    sealed = run(tiny_recipe(*PLAIN, *METHODS[name], CKKS), tmp_path / "sealed")
    assert_close(models(tmp_path / "sealed", clients), models(tmp_path / "clear", clients))
    assert sealed["row"]["aggregation_error"] is None
    assert sealed["row"]["accuracy_global"] is None
    assert sealed["row"]["accuracy_mean"] == pytest.approx(clear["row"]["accuracy_mean"], abs=0.1)
    # Whoever was drawn is so in both, and some are away in some rounds.
    lines = [RunDirectory(tmp_path / each).metrics() for each in ("sealed", "clear")]
    assert [line["participants"] for line in lines[0]] == [line["participants"] for line in lines[1]]


@pytest.mark.parametrize("name", ["statistics", "mixed cores, and a head by examples"])
def test_a_network_run_is_the_local_run(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], tmp_path: Path, key: Key, name: str
) -> None:
    recipe = tiny_recipe(*PLAIN, "train.cohort=1", *METHODS[name], CKKS)
    run(recipe, tmp_path / "local")
    own = Own(rehearse=recipe.data.source, model=recipe.model.name, key=key)
    there = federated(recipe, own=lambda client: own, rebuild=True)
    there.play()
    wanted = models(tmp_path / "local", there.members)
    assert_close({c: models(there.folder(c), [c])[c] for c in there.members}, wanted)
    assert_close(
        {c: models(there.folder(c), [c], tuned=True)[c] for c in there.members},
        models(tmp_path / "local", there.members, tuned=True),
    )
    # The bytes of messages are those of the local run: which key members have is said once in either.
    lines = [run_.metrics() for run_ in (there.directory, RunDirectory(tmp_path / "local"))]
    assert [line["bytes_up"] for line in lines[0]] == [line["bytes_up"] for line in lines[1]]
    assert [line["bytes_down"] for line in lines[0]] == [line["bytes_down"] for line in lines[1]]


def test_client_noise_comes_before_encryption(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    """In the clear and encrypted, members clip alike and add the same noise: what they end with agrees."""
    noisy = ["privacy.unit=client", "privacy.placement=client", "privacy.noise=0.01", "privacy.clip=0.5"]
    recipes = [tiny_recipe(*PLAIN, "method.name=fedsa", *noisy, *more) for more in ([], [CKKS])]
    for recipe, path in zip(recipes, ("clear", "sealed"), strict=True):
        run(recipe, tmp_path / path)
    assert_close(models(tmp_path / "sealed", ["0", "3"]), models(tmp_path / "clear", ["0", "3"]))
    bare = run(tiny_recipe(*PLAIN, "method.name=fedsa", CKKS), tmp_path / "bare")
    assert bare["row"]["rounds"] == 3
    name = next(n for n in client_model(tmp_path / "bare", "0").tensors if n.startswith("A/"))
    found = [client_model(tmp_path / each, "0").tensors[name] for each in ("sealed", "bare")]
    assert not torch.allclose(*found, atol=1e-3)


class Killed(BaseException):
    """The process ends here."""


class Until(Silent):
    """Ends the process after so many rounds."""

    def __init__(self, rounds: int) -> None:
        self.left = rounds

    def line(self, metrics: Any) -> None:
        self.left -= 1
        if not self.left:
            raise Killed


@pytest.mark.parametrize("name", ["one core for all", "statistics"])
def test_a_killed_run_goes_on_where_it_was(tiny_recipe: Callable[..., Any], tmp_path: Path, name: str) -> None:
    recipe = tiny_recipe(*PLAIN, *METHODS[name], CKKS)
    whole = run(recipe, tmp_path / "whole")
    with pytest.raises(Killed):
        run(recipe, tmp_path / "killed", Until(2))
    again = resume(tmp_path / "killed")
    assert again["row"]["rounds"] == whole["row"]["rounds"] == 3
    clients = list(whole["clients"])
    assert_close(models(tmp_path / "killed", clients), models(tmp_path / "whole", clients))


def test_a_server_that_was_killed_goes_on_with_its_members(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], key: Key
) -> None:
    recipe = tiny_recipe(*PLAIN, *METHODS["statistics"], CKKS)
    own = Own(rehearse=recipe.data.source, model=recipe.model.name, key=key)
    whole, killed = federated(recipe, own=lambda client: own), federated(recipe, own=lambda client: own)
    whole.play()
    with pytest.raises(Killed):
        killed.play(Until(2))
    killed.resume()
    assert_close(
        {c: models(killed.folder(c), [c])[c] for c in killed.members},
        {c: models(whole.folder(c), [c])[c] for c in whole.members},
    )


# -- what the server has -----------------------------------------------------------------------------------------------


def test_nothing_that_the_server_sees_or_keeps_is_secret(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], key: Key
) -> None:
    recipe = tiny_recipe(*PLAIN, *METHODS["statistics"], CKKS)
    own = Own(rehearse=recipe.data.source, model=recipe.model.name, key=key)
    seen: list[Record] = []

    def watch(order: Order, answer: Record) -> list[Record]:
        seen.extend((order.record(), answer))
        return [answer]

    there = federated(recipe, own=lambda client: own, tamper=watch)
    there.play()
    wire = b"".join(v if isinstance(v, bytes) else str(v).encode() for record in seen for v in record.values())
    kept = b"".join(file.read_bytes() for file in there.path.rglob("*") if file.is_file())
    secrets = [key.seed, key.seed.hex().encode(), key.trits.tobytes()[:48], key.trits.tobytes()[-48:]]
    for found in (wire, kept):
        assert len(found) > 10_000
        assert not any(secret in found for secret in secrets)
        # Nor a number of what members sent: those of a model's core, as float32.
        for client in there.members:
            tuned = client_model(there.folder(client), client, tuned=True).tensors
            cores = [t for name, t in tuned.items() if name.startswith("C/")]
            assert not any(core.contiguous().numpy().tobytes()[:16] in found for core in cores)
    uploads = [decode(r["data"]) for r in seen if r.get("loss") is not None]
    assert uploads
    assert all({n.split("/")[0] for n in message.tensors} == {"sealed"} for message in uploads)
    for client in there.members:
        file = there.folder(client) / "key"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_the_state_shows_whom_each_listens_to(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    for path, more in (("clear", []), ("sealed", [CKKS])):
        run(tiny_recipe(*PLAIN, *METHODS["cores mixed by data"], *more), tmp_path / path)
    from safetensors.torch import load_file

    shown = [load_file(tmp_path / path / "insight.safetensors") for path in ("clear", "sealed")]
    np.testing.assert_allclose(shown[1]["weights"], shown[0]["weights"], atol=1e-6)
    np.testing.assert_array_equal(shown[1]["similarity/data"], shown[0]["similarity/data"])


def test_bytes_are_as_predicted(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny_recipe("data.limit=80", "train.rounds=4", *METHODS["statistics"], CKKS)
    said = inspect(recipe)["method"]
    row = run(recipe, tmp_path / "run")["row"]
    for key in ("bytes_up_per_client_round", "bytes_down_per_client_round", "bytes_once_per_client"):
        assert row[key] == said[key]


# -- whoever does not fit ----------------------------------------------------------------------------------------------


def test_a_member_with_another_key_fails_alone(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], key: Key
) -> None:
    recipe = tiny_recipe("data.limit=80", *METHODS["one core for all"], CKKS)
    other = Key.new()

    def own(client: str) -> Own:
        return Own(rehearse=recipe.data.source, model=recipe.model.name, key=other if client == "0" else key)

    there = federated(recipe, own=own)
    there.play()
    for line in there.lines[1:]:
        assert line["participants"] == ["1", "2", "3"]
        assert line["failed"] == {"0": f"its key is {other.id}, most members' is {key.id}; allowed: one for all"}


@pytest.mark.parametrize("said", [b"", b"\x1b[31mred\n", b"f" * 17, b"F" * 16])
def test_what_is_no_keys_name_fails_its_member(
    tiny_recipe: Callable[..., Any], play: Callable[..., Any], said: bytes
) -> None:
    class Lying(LocalEngine):
        def talk(self, round: int, topic: str, parts: Any) -> Any:
            for client, answer in super().talk(round, topic, parts):
                yield client, said if client == "0" else answer

    played = play(tiny_recipe("data.limit=80", "train.rounds=1", *METHODS["one core for all"], CKKS), Lying)
    assert played.lines[1]["failed"] == {"0": "it did not say which key it has"}


def test_a_member_without_a_key_is_left_out(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], key: Key, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny_recipe("data.limit=80", "engine.wait=0", *METHODS["one core for all"], CKKS)

    def own(client: str) -> Own:
        return Own(rehearse=recipe.data.source, model=recipe.model.name, key=None if client == "2" else key)

    there = federated(recipe, own=own)
    there.play()
    assert all(line["failed"] == {"2": "not connected"} for line in there.lines[1:])
    assert 'member 2 is left out: secure.kind = "ckks" and no key here; allowed: --key FILE' in caplog.text


def test_a_member_with_a_key_sends_nothing_in_the_clear(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], key: Key, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny_recipe("data.limit=80", "engine.wait=0", "method.name=fedit")
    own = Own(rehearse=recipe.data.source, model=recipe.model.name, key=key)
    there = federated(recipe, own=lambda client: own)
    with pytest.raises(FolkLoraError, match="0 of 4 clients are connected"):
        there.play()
    assert "this member has a key (--key), and the run does not encrypt what it sends" in caplog.text
    assert not sum(there.carrier.up.values())


def test_a_run_goes_on_with_the_key_it_began_with(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], key: Key, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tiny_recipe("data.limit=80", "engine.wait=0", *METHODS["one core for all"], CKKS)
    keys: dict[str, Key | None] = dict.fromkeys("0123", key)

    def own(client: str) -> Own:
        return Own(rehearse=recipe.data.source, model=recipe.model.name, key=keys[client])

    there = federated(recipe, own=own, rebuild=True)
    with pytest.raises(Killed):
        there.play(Until(1))
    keys["0"], keys["1"] = None, Key.new()  # forgotten on the command line: the folder has it; or mistaken
    there.resume()
    assert "this run began with the key" in caplog.text
    assert there.lines[-1]["participants"] == ["0", "2", "3"]


@pytest.mark.parametrize("how", ["cut", "another length", "clear", "nothing"])
def test_what_is_no_upload_fails_its_client_alone(
    tiny_recipe: Callable[..., Any], play: Callable[..., Any], how: str
) -> None:
    recipe = tiny_recipe("data.limit=80", *METHODS["statistics"], CKKS)

    class Hostile(LocalEngine):
        def train(self, round: int, clients: Any) -> Any:
            for upload in super().train(round, clients):
                yield self.bent(upload) if upload.client == "1" else upload

        def bent(self, upload: Upload) -> Upload:
            assert upload.data is not None
            if how == "nothing":
                return replace(upload, data=None)
            if how == "cut":
                return replace(upload, data=upload.data[:-40])
            message = decode(upload.data)
            if how == "clear":
                return replace(upload, data=encode(Message({"C/x": torch.zeros(4, 4)}, message.numbers)))
            longer = {name: torch.cat([t, t]) for name, t in message.tensors.items()}
            return replace(upload, data=encode(Message(longer, message.numbers)))

    played = play(recipe, Hostile)
    for line in played.lines[1:]:
        assert line["participants"] == ["0", "2", "3"]
        assert list(line["failed"]) == ["1"]
        assert "\n" not in line["failed"]["1"]


def test_noise_of_the_right_length_is_noticed_by_those_who_get_it(
    tiny_recipe: Callable[..., Any], play: Callable[..., Any]
) -> None:
    """The server cannot tell; whoever decrypts can, and nobody's model takes it in."""
    recipe = tiny_recipe("data.limit=80", *METHODS["one core for all"], CKKS)

    class Noisy(LocalEngine):
        def train(self, round: int, clients: Any) -> Any:
            for upload in super().train(round, clients):
                message = decode(upload.data or b"")
                for tensor in message.tensors.values():
                    if upload.client == "1":
                        tensor.random_(-(2**31), 2**31 - 1)
                yield replace(upload, data=encode(message))

    with pytest.raises(MessageError, match="not encrypted with this member's key alone"):
        play(recipe, Noisy)


def test_a_number_that_does_not_fit_fails_its_client(tiny_recipe: Callable[..., Any]) -> None:
    setup = prepare(tiny_recipe("data.limit=80", *METHODS["one core for all"], CKKS))
    member = Member(setup, "0", key=Key.of_simulation(1))
    assert isinstance(member.outlet, EncryptedOutlet)
    message = setup.method.send(1, member.client)
    assert message is not None
    name = next(iter(message.tensors))
    message.tensors[name].view(-1)[0] = 1e4
    with pytest.raises(MessageError, match="tensors of kind 'C': a number that cannot be encrypted"):
        member.outlet.encode(1, message)


# -- what cannot be ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["method.name=celora"], 'method.similarity = "both" with secure.kind = "ckks"'),
        (["method.name=celora"], 'allowed: similarity = "data", "uniform" or "size"'),
        (["method.name=celora", "method.similarity=data", "method.basis=aligned"], 'method.basis = "aligned"'),
        (["method.name=folklora", "adapter.rank=[2,3,4,4]"], "adapter.rank = [2, 3, 4]"),
        (["method.name=fedit", "method.fedopt=adam"], 'method.fedopt = "adam"'),
        (["method.name=folklora", "method.fedopt=adam"], 'method.fedopt = "adam"'),
        (["method.name=flora"], 'method.name = "flora"'),
        (["method.name=lorafair"], 'method.name = "lorafair"'),
        (["method.name=fedlpp"], 'method.name = "fedlpp"'),
        (["method.name=local"], 'method.name = "local"'),
        (["method.name=fedit", "message.top_k=0.5"], "message.top_k = 0.5"),
        (["method.name=fedit", "message.error_feedback=true"], "message.error_feedback = true"),
        (["method.name=fedit", "robust.rule=median"], 'robust.rule = "median"'),
        (["method.name=fedit", "privacy.unit=client", "privacy.noise=1"], 'privacy.placement = "server"'),
    ],
)
def test_what_a_server_would_have_to_read_is_refused_before_anything_runs(
    tiny_recipe: Callable[..., Any], tmp_path: Path, settings: list[str], said: str
) -> None:
    with pytest.raises(FolkLoraError) as refused:
        run(tiny_recipe("data.limit=80", *settings, CKKS), tmp_path / "run")
    assert said in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_without_tenseal_a_run_is_refused_in_a_line_and_a_server_mixes_all_the_same(
    tiny_recipe: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("data.limit=80", *METHODS["one core for all"], CKKS)
    setup, key = prepare(recipe), Key.of_simulation(0)
    member = Member(setup, "0", key=key)
    message = setup.method.send(1, member.client)
    assert message is not None
    upload = member.outlet.encode(1, message)
    for name in ("tenseal", "tenseal.sealapi"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FederationError, match=r'secure.kind = "ckks" needs TenSEAL: pip install "folklora\[he\]"'):
        run(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    engine: Any = None
    intake = EncryptedIntake(setup, engine)
    state = intake.server(1, {}, {"0": intake.read(1, {}, "0", upload, ())}, Ledger())
    reply = intake.reply(state, "1")
    assert reply is not None
    for name, tensor in member.outlet.open(reply, 1 << 20).tensors.items():
        np.testing.assert_allclose(tensor, message.tensors[name], **CLOSE)


# -- keys, and what leaves a run ---------------------------------------------------------------------------------------


def test_the_command_makes_a_key_once(folklora: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "common.key"
    made = folklora("keys", "--to", path)
    assert made.code == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert read_key(path).id in made.out
    before = path.read_bytes()
    again = folklora("keys", "--to", path)
    assert again.code == 2
    assert "already exists" in again.err
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [None, b"", b"nonsense", b"\xff" * 4000])
def test_what_is_no_key_is_refused_in_a_line(
    folklora: Callable[..., Any], tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / "common.key"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FederationError, match=r"common\.key: (cannot be read|not a key)"):
        read_key(path)


def test_a_key_that_others_on_the_computer_can_read_is_refused(tmp_path: Path, key: Key) -> None:
    path = tmp_path / "common.key"
    for mode in (0o640, 0o604, 0o644):
        path.chmod(mode)
        with pytest.raises(FederationError, match=r"common\.key: others .* can read it; run: chmod 600 "):
            read_key(path)
    path.chmod(0o400)
    assert read_key(path).id == key.id


def test_predictions_need_the_folder_alone(
    tiny_recipe: Callable[..., Any], federated: Callable[..., Any], key: Key, tmp_path: Path
) -> None:
    from folklora.federation.handover import export

    recipe = tiny_recipe("data.limit=80", *METHODS["statistics"], CKKS)
    own = Own(rehearse=recipe.data.source, model=recipe.model.name, key=key)
    there = federated(recipe, own=lambda client: own)
    there.play()
    folder = there.folder("0")
    export(folder, "0", tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    whole = client_model(folder, "0").tensors
    shutil.move(folder / "key", tmp_path / "elsewhere")
    with pytest.raises(FolkLoraError, match='secure.kind = "ckks" and no key here'):
        client_model(folder, "0")
    client_model(folder, "0", tuned=True)
    shutil.move(tmp_path / "elsewhere", folder / "key")
    for name, tensor in client_model(folder, "0").tensors.items():
        assert torch.equal(tensor, whole[name])


def test_join_refuses_a_key_that_is_none_before_it_dials(folklora: Callable[..., Any], tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    folklora("federation", "init", tmp_path / "clinics", "--members", "north")
    ended = folklora("join", "--federation", tmp_path / "clinics", "--member", "north", "--key", tmp_path / "nowhere")
    assert ended.code == 2
    assert "nowhere: cannot be read: No such file or directory" in ended.err
    assert len(ended.err.strip().splitlines()) == 1
