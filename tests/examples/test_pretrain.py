"""The three pretrainings on next to nothing: the same weights each time, also after a kill, in a folder that loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import distil_shared_depth
import numpy as np
import pretrain_tiny_clip
import pretrain_tiny_lm
import pretraining
import pytest
import torch
from pretraining import Budget
from safetensors.torch import load_file
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPModel,
)

SMALL = {
    pretrain_tiny_lm: ["--vocabulary", "300", "--width", "16", "--layers", "1", "--rows", "2"],
    pretrain_tiny_clip: ["--vocabulary", "300", "--image-width", "16", "--text-width", "16", "--layers", "1"],
    distil_shared_depth: ["--tokens", "40", "--most", "2000", "--heldout", "5"],
}
Train = Callable[..., Path]


class Killed(Exception):
    pass


@pytest.fixture(params=SMALL, ids=lambda script: script.__name__)
def train(request: pytest.FixtureRequest, prepared: Path, taught: list[str], tmp_path: Path) -> Train:
    """Runs one of the scripts into a folder of this name."""

    def run(name: str, *given: str, **options: object) -> Path:
        script, to = request.param, tmp_path / name
        more = taught if script is distil_shared_depth else []
        where = ["--data", str(prepared), "--to", str(to), "--device=cpu", "--threads=1"]
        script.main([*SMALL[script], *more, *where, *given], **options)
        return to

    return run


def test_a_killed_pretraining_goes_on_to_the_same_weights(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("whole", "--steps", "4")
    monkeypatch.setattr(pretraining, "SAVE_SECONDS", 0)
    steps = []

    def kill(step: int, loss: float) -> None:
        steps.append(step)
        if steps == [1, 2]:
            raise Killed

    with pytest.raises(Killed):
        train("killed", "--steps", "4", progress=kill)
    killed = train("killed", "--steps", "4", progress=kill)
    assert steps == [1, 2, 3, 4]
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (killed / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
    stated = [json.loads((folder / "quality.json").read_text()) for folder in (whole, killed)]
    assert stated[0]["heldout"] == stated[1]["heldout"]
    assert not (killed / pretraining.CHECKPOINT).exists()


def test_another_seed_gives_other_weights(train: Train) -> None:
    one, other = (load_file(train(seed, "--steps", "1", "--seed", seed) / "model.safetensors") for seed in "01")
    assert any(not torch.equal(one[name], other[name]) for name in one)


def test_what_is_there_is_not_trained_over(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train("a", "--steps", "1")
    with pytest.raises(SystemExit, match="holds a finished checkpoint"):
        train("a", "--steps", "1")

    def kill(step: int, loss: float) -> None:
        raise Killed

    monkeypatch.setattr(pretraining, "SAVE_SECONDS", 0)
    with pytest.raises(Killed):
        train("b", "--steps", "2", progress=kill)
    with pytest.raises(
        SystemExit, match=r"pretraining\.pt: of a pretraining with other seed, (data, )?steps; remove it"
    ):
        train("b", "--steps", "3", "--seed", "1")


def test_the_language_model_loads_and_its_text_is_the_templates(prepared: Path, tmp_path: Path) -> None:
    given = [
        *SMALL[pretrain_tiny_lm],
        "--data",
        str(prepared),
        "--to",
        str(tmp_path / "lm"),
        "--device=cpu",
        "--threads=1",
    ]
    pretrain_tiny_lm.main([*given, "--steps", "1"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "lm")
    document = pretrain_tiny_lm.read(prepared / "heldout")["sgd"][0]
    assert tokenizer.apply_chat_template(document, tokenize=False) == pretrain_tiny_lm.as_text(document)
    text = "Grüße 123\n  \t🙂"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text

    # The stated quality, again: every token of the held-out text but each row's first, in nats.
    tokens = pretrain_tiny_lm.stream(tokenizer, pretrain_tiny_lm.read(prepared / "heldout")["sgd"])
    rows = torch.from_numpy(tokens[: len(tokens) // 256 * 256].astype(np.int64)).view(-1, 256)
    with torch.no_grad():
        logs = model(input_ids=rows).logits[:, :-1].log_softmax(-1)
    nats = -logs.gather(-1, rows[:, 1:, None])
    stated = json.loads((tmp_path / "lm" / "quality.json").read_text())["heldout"]["sgd"]
    assert stated["tokens"] == nats.numel()
    assert stated["loss"] == pytest.approx(nats.mean().item(), abs=1e-3)
    assert stated["perplexity"] == pytest.approx(nats.mean().exp().item(), rel=1e-3)


def test_the_clip_loads_and_sees_what_it_was_trained_on(prepared: Path, tmp_path: Path) -> None:
    given = [
        *SMALL[pretrain_tiny_clip],
        "--data",
        str(prepared),
        "--to",
        str(tmp_path / "clip"),
        "--device=cpu",
        "--threads=1",
    ]
    pretrain_tiny_clip.main([*given, "--steps", "1"])
    model = CLIPModel.from_pretrained(tmp_path / "clip")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "clip")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "clip")
    images = np.load(prepared / "heldout" / "emoji.npz")["image"]
    values = processor(list(images), return_tensors="pt")["pixel_values"]
    assert torch.allclose(values, pretrain_tiny_clip.pixels(images), atol=1e-5)

    captions = ["red cat", "a much longer caption of a green dog"]
    told = tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        stock = model(pixel_values=values, **told)
        towers = pretrain_tiny_clip.Towers(model, tokenizer)
        assert torch.allclose(stock.text_embeds, towers.texts(captions), atol=1e-5)
        assert torch.allclose(stock.image_embeds, towers.images(images), atol=1e-5)


def test_the_learning_rate_follows_what_is_used_of_the_budget() -> None:
    steps = Budget(100, None)
    rates = [pretraining.learning_rate(steps.used(i, 0), steps.used(i + 1, 0)) for i in range(100)]
    top = rates.index(max(rates))
    assert rates[0] > 0
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(pretraining.FLOOR, abs=0.01)
    assert Budget(100, 1).used(10, 30) == 0.5
    assert Budget(None, 1).used(10, 61) == 1
