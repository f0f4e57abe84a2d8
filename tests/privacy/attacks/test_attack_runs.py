"""`attack` from end to end: what is written, what repeats, where it starts from, and what is refused."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from folklora.federation.run import run
from folklora.privacy.attacks import ATTACKS
from folklora.privacy.attacks.observation import Knowledge
from folklora.privacy.attacks.run import Plan, attack


def _but_time(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key != "seconds"}


@pytest.mark.parametrize("name", ["dlg", "lamp", "tag"])
def test_the_same_seed_gives_the_same_bits(tiny_recipe: Callable[..., Any], name: str, tmp_path: Path) -> None:
    plan = Plan(name, budget=10, victims=1, batch=2)
    recipe = tiny_recipe("method.name=fedit")
    first, second = (attack(recipe, plan, tmp_path / str(i)) for i in range(2))
    assert _but_time(first) == _but_time(second)
    written = json.loads((tmp_path / "0" / f"{name}-fedit-sent-b2-e1-s0.json").read_text())
    assert _but_time(written) == json.loads(json.dumps(_but_time(first)))
    other = attack(recipe, replace(plan, seed=1, budget=1))
    assert other["victims"][0]["original"] != first["victims"][0]["original"]


def test_a_result_says_what_was_done(tiny_recipe: Callable[..., Any]) -> None:
    plan = Plan("tag", "celora:adapter.rank=2", Knowledge(labels=False, lengths=False), 2, 3, 1, 2, seed=5, budget=2)
    found = attack(tiny_recipe(), plan)
    said = {key: found[key] for key in ("attack", "method", "variant", "seed", "view", "batch", "warmup", "steps")}
    assert said == {
        "attack": "tag",
        "method": "celora",
        "variant": "celora:adapter.rank=2",
        "seed": 5,
        "view": "sent",
        "batch": 2,
        "warmup": 1,
        "steps": 2,
    }
    assert found["knowledge"]["labels"] is found["knowledge"]["lengths"] is found["knowledge"]["bases"] is False
    assert re.fullmatch(r"bigrams of \d+ public texts", found["knowledge"]["prior"])
    assert set(found["sent"]) == {name for name in found["sent"] if name.startswith("C/")}
    assert all(shape == [2, 2] for shape in found["sent"].values())
    assert len(found["victims"]) == 3
    assert all(len(victim[key]) == 2 for victim in found["victims"] for key in ("original", "recovered", "control"))
    assert {len(entry["values"]) for entry in found["metrics"].values()} == {3}
    json.dumps(found, allow_nan=False)


def test_pictures_come_with_a_gallery(picture_recipe: Callable[..., Any], tmp_path: Path) -> None:
    found = attack(picture_recipe("vit"), Plan("inverting", budget=3, victims=2, batch=2), tmp_path)
    assert {"mse", "psnr", "ssim", "perceptual"} <= found["metrics"].keys()
    for victim in found["victims"]:
        for key in ("original", "recovered", "control"):
            for uri in victim[key]:
                kind, _, data = uri.partition(",")
                assert kind == "data:image/png;base64"
                assert Image.open(io.BytesIO(base64.b64decode(data))).size == (12, 12)
    with Image.open(tmp_path / "inverting-fedit-sent-b2-e1-s0.png") as sheet:
        assert sheet.size == (4 + 4 * (12 * 3 + 4), 4 + 3 * (12 * 3 + 4))


def test_a_run_is_attacked_where_it_stands(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    """A finished run gives what the rounds played in memory give; an unfinished one stands where it stopped."""
    recipe, plan = tiny_recipe("method.name=fedit"), Plan("tag", budget=5, victims=2, warmup=2)
    run(recipe, tmp_path / "run")
    found = attack(tmp_path / "run", plan)
    assert _but_time(found) == _but_time(attack(recipe, plan))
    assert (tmp_path / "run" / "attacks" / "tag-fedit-sent-b1-e1-s0.json").is_file()
    attack(tmp_path / "run", replace(plan, knowledge=Knowledge(view="gradient", bases=True)))
    assert len(list((tmp_path / "run" / "attacks").glob("*.json"))) == 2  # what differs lies side by side
    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    (tmp_path / "stopped" / "checkpoint-previous.json").replace(tmp_path / "stopped" / "checkpoint.json")
    (tmp_path / "stopped" / "summary.json").unlink()
    assert attack(tmp_path / "stopped", plan)["warmup"] == 1


def test_a_secret_is_hidden_and_looked_for(tiny_recipe: Callable[..., Any], tmp_path: Path) -> None:
    recipe = tiny_recipe("method.name=fedit")
    plain, found = (attack(recipe, Plan("tag", budget=2, victims=2, canary=canary)) for canary in (False, True))
    assert "canary_recall" not in plain["metrics"]
    assert 0 <= found["metrics"]["canary_recall"]["mean"] <= 1
    for before, after in zip(plain["victims"], found["victims"], strict=True):
        (text,), (longer,) = before["original"], after["original"]
        assert longer.startswith(text)
        assert len(longer.split()) == len(text.split()) + 4


def test_a_language_model_is_a_prior(tiny_recipe: Callable[..., Any], tiny_speaker: Path) -> None:
    found = attack(tiny_recipe("method.name=fedit"), Plan("lamp", budget=20, victims=1, prior=str(tiny_speaker)))
    assert found["knowledge"]["prior"] == f"language model {tiny_speaker.name}"


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tiny_recipe: Callable[..., Any], tmp_path: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(tiny_recipe("method.name=fedit").to_toml())
    return path


def test_the_command(folklora: Callable[..., Any], recipe_file: Path, tmp_path: Path) -> None:
    arguments = ("--attack", "tag", "--budget", 2, "--victims", 1, "--set", "adapter.rank=2")
    ran = folklora("attack", recipe_file, *arguments, "--json", "--to", tmp_path / "found")
    assert ran.code == 0
    document = json.loads(ran.out)
    assert document["metrics"].keys() == {"token_recall", "rouge_1", "rouge_2", "rouge_l", "exact_match"}
    assert (tmp_path / "found" / "tag-fedit-sent-b1-e1-s0.json").is_file()
    shown = folklora("attack", recipe_file, *arguments)
    assert shown.code == 0
    assert "token_recall" in shown.out
    assert document["victims"][0]["original"][0] in shown.out


def test_the_list_of_attacks(folklora: Callable[..., Any]) -> None:
    ran = folklora("attack", "--list")
    assert ran.code == 0
    assert all(name in ran.out for name in ATTACKS)
    assert [entry["name"] for entry in json.loads(folklora("attack", "--list", "--json").out)] == list(ATTACKS)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--attack", "tagg"], r"--attack 'tagg': no such attack; did you mean 'tag'\? \(allowed: dlg, "),
        (["--attack", "inverting"], "--attack 'inverting' is one on image, and the recipe's examples are texts"),
        (["--attack", "tag", "--view", "all"], "--view 'all'; allowed: sent, gradient"),
        (["--attack", "tag", "--batch", "900"], r"--batch 900: no client has so many .*; allowed: 1 to \d+"),
        (["--attack", "tag", "--batch", "0"], "--batch 0; allowed: at least 1"),
        (["--attack", "tag", "--budget", "0"], "--budget 0; allowed: at least 1"),
        (["--attack", "tag", "--warmup", "9"], "--warmup 9: train.rounds = 2; allowed: at most so many"),
        (["--attack", "tag", "--prior", "nowhere"], "--prior nowhere: no such folder; allowed: bigrams, none, or"),
        (["--attack", "tag", "--method", "fedid"], "method.name = 'fedid': no such method; did you mean 'fedit'"),
        (["--attack", "tag", "--set", "train.lr=x"], "train.lr"),
    ],
)
def test_mistakes_are_one_line(
    folklora: Callable[..., Any], recipe_file: Path, arguments: list[str], line: str
) -> None:
    ran = folklora("attack", recipe_file, *arguments)
    assert ran.code == 2
    assert re.search(line, ran.err)
    assert len(ran.err.strip().splitlines()) == 1
    assert ran.out == ""


def test_mistakes_about_pictures_and_runs(
    folklora: Callable[..., Any], picture_recipe: Callable[..., Any], tiny_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    pictures, folder = tmp_path / "pictures.toml", tmp_path / "run"
    pictures.write_text(picture_recipe("vit").to_toml())
    for arguments, line in (
        ((pictures, "--attack", "lamp"), "--attack 'lamp' is one on text, and the recipe's examples are pictures"),
        ((pictures, "--attack", "dlg", "--canary"), "--canary: a secret is hidden in texts"),
        ((), "--attack '': no such attack"),
        (("--attack", "tag"), "nothing to attack is named; allowed: a recipe, or a run directory"),
        ((tmp_path / "none.toml", "--attack", "tag"), "no such recipe file"),
        ((tmp_path, "--attack", "tag"), "not a run directory"),
    ):
        ran = folklora("attack", *arguments)
        assert (ran.code, ran.out) == (2, "")
        assert line in ran.err
    run(tiny_recipe("method.name=fedit", "train.rounds=1"), folder)
    for arguments, line in (
        (("--method", "local"), "is a run of 'fedit'; allowed: no --method"),
        (("--set", "seed=1"), "is a run, whose recipe stands"),
    ):
        assert line in folklora("attack", folder, "--attack", "tag", *arguments).err
    for name in ("checkpoint.json", "checkpoint-previous.json"):
        (folder / name).unlink(missing_ok=True)
    ran = folklora("attack", folder, "--attack", "tag")
    assert (ran.code, ran.out) == (2, "")
    assert "nothing is committed yet" in ran.err
