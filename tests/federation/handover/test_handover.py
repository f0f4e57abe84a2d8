"""What leaves a run works without us: stock models with the exported adapter, or merged checkpoints, answer alike."""

from __future__ import annotations

import json
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from folklora.data.pictures import read_picture
from folklora.errors import RunError
from folklora.federation.handover import export, merge
from folklora.federation.run import client_model
from folklora.federation.rundir import RunDirectory
from folklora.recipe import Recipe
from folklora.training.prediction import Question, predict

Finished = Callable[..., Path]

TEXTS = ["w1 w2 w3", "w40", "w7 w7 w9 w30 w31"]
CHATS = [(("user", "w1 w2"), ("assistant", "w3")), (("user", "w9"), ("assistant", "w4 w5 w6"))]
ASKED = ["text", "vit", "clip", "captions", "llama", "gpt2"]


def files(shown: Path) -> list[Path]:
    return [shown / "w1" / "2.png", shown / "w2" / "7.png", shown / "w3" / "0.png"]


def ours(run: Path, name: str, shown: Path, client: str = "1") -> Tensor:
    """What the run's own client answers."""
    model = client_model(run, client)
    pictures = [read_picture(file) for file in files(shown)]
    pairs = [(picture, f"w4 w{i}") for i, picture in enumerate(pictures)]
    inputs: dict[str, list[Any]] = {"text": TEXTS, "vit": pictures, "clip": pictures, "captions": pairs}
    examples = model.setup.task.encode(inputs.get(name, CHATS))
    question = Question(client, model.rank, model.tensors, examples)
    return torch.from_numpy(predict(model.setup.task, model.setup.method.adapter, [question])[client])


def theirs(stock: Any, reader: Path, beside: Path, name: str, shown: Path, run: Path) -> Tensor:
    """What a stock model answers with the files that lie in ``beside``; tokens and pixels as ``reader`` has them."""
    from transformers import AutoImageProcessor, AutoTokenizer

    use = json.loads((beside / "task.json").read_text())
    stock = stock.eval()
    with torch.no_grad():
        if name in {"llama", "gpt2"}:
            dialogues = client_model(run, "1").setup.task.encode(CHATS)
            return torch.stack([nats(stock, dialogue.tokens, dialogue.prompt) for dialogue in dialogues])
        tokens, pixels = None, None
        if name != "text":
            processor = AutoImageProcessor.from_pretrained(reader, backend="pil")
            pixels = processor([read_picture(file) for file in files(shown)], return_tensors="pt")["pixel_values"]
        if name != "vit":
            tokenizer = AutoTokenizer.from_pretrained(reader)
            texts = TEXTS if name == "text" else [f"w4 w{i}" for i in range(3)]
            if name == "clip":
                texts = [use["template"].format(label) for label in json.loads((beside / "classes.json").read_text())]
            tokens = tokenizer(texts, padding=True, return_tensors="pt")
            tokens = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        if name == "clip":
            both: Tensor = stock(**tokens, pixel_values=pixels).logits_per_image
            return both
        if name == "captions":
            found = stock(**tokens, pixel_values=pixels)
            return torch.cat([F.normalize(found.image_embeds), F.normalize(found.text_embeds)], dim=1)
        head = safetensors.torch.load_file(beside / "head.safetensors")
        if name == "vit":
            assert use == {"task": "classification", "pooling": "cls"}
            features = stock(pixel_values=pixels).last_hidden_state[:, 0]
        else:
            assert use == {"task": "classification", "pooling": "mean", "max_length": 32}
            mask = tokens["attention_mask"][:, :, None]
            features = (stock(**tokens).last_hidden_state * mask).sum(1) / mask.sum(1)
        return features @ head["weight"].T + head["bias"]


def nats(stock: Any, tokens: list[int], prompt: int) -> Tensor:
    """The nats of a response and how many tokens it has, by the stock model's own loss."""
    ids = torch.tensor([tokens])
    labels = ids.clone()
    labels[:, :prompt] = -100
    count = len(tokens) - prompt
    return torch.stack([stock(input_ids=ids, labels=labels).loss * count, torch.tensor(float(count))])


def base(run: Path) -> tuple[Any, Path]:
    from transformers import AutoModel, AutoModelForCausalLM

    section = client_model(run, "1").setup.recipe.model
    auto = AutoModelForCausalLM if section.task == "causal-lm" else AutoModel
    return auto, Path(section.name)


def alike(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted[:, : found.shape[1]], rtol=1e-4, atol=1e-4)


# Methods that change the frozen weights, or whose clients have ranks of their own.
METHODS = {
    "fedit": [],
    "flora": ["adapter.rank=[2, 4]"],
    "fedex": [],
    "federa": [],
    "hetlora": ["adapter.rank=[2, 4]", "method.gamma=0.5"],
}
EXPORTED = [*((name, "fedit") for name in ASKED), *(("text", name) for name in METHODS if name != "fedit")]
EXPORTED += [("clip", "flora"), ("gpt2", "flora")]


@pytest.mark.parametrize(("name", "method"), EXPORTED)
def test_an_exported_adapter_on_the_stock_base_answers_as_we_do(
    finished: Finished, shown: Path, tmp_path: Path, name: str, method: str
) -> None:
    from peft import PeftModel

    run = finished(name, f"method.name={method}", *METHODS[method])
    assert export(run, "1", tmp_path / "peft") == tmp_path / "peft"
    auto, folder = base(run)
    stock = auto.from_pretrained(folder)
    bare = theirs(stock, folder, tmp_path / "peft", name, shown, run)
    peft = PeftModel.from_pretrained(stock, str(tmp_path / "peft"))
    wanted = ours(run, name, shown)
    assert (bare - wanted[:, : bare.shape[1]]).abs().max() > 0.01
    alike(theirs(peft, folder, tmp_path / "peft", name, shown, run), wanted)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    types = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "clip": None, "captions": None}
    assert config["task_type"] == types.get(name, "FEATURE_EXTRACTION")
    assert config["base_model_name_or_path"] == str(folder)
    assert config["fan_in_fan_out"] == (name == "gpt2")


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("method", ["celora", "flora"])
def test_a_merged_checkpoint_answers_as_we_do(
    finished: Finished, shown: Path, tmp_path: Path, name: str, method: str
) -> None:
    """FLoRA's clients have changed the frozen weights too."""
    run = finished(name, f"method.name={method}")
    kinds = {key.partition("/")[0] for key in client_model(run, "1").tensors}
    assert ("base" in kinds, "C" in kinds) == (method == "flora", method == "celora")
    assert merge(run, "1", tmp_path / "deep" / "merged") == tmp_path / "deep" / "merged"
    folder = tmp_path / "deep" / "merged"
    assert [path.name for path in folder.parent.iterdir()] == ["merged"]
    stock = base(run)[0].from_pretrained(folder)
    alike(theirs(stock, folder, folder, name, shown, run), ours(run, name, shown))
    assert not any(str(tmp_path.parent).encode() in file.read_bytes() for file in folder.glob("*.json"))


BESIDE = {
    "text": {"head.safetensors", "classes.json", "task.json"},
    "vit": {"head.safetensors", "classes.json", "task.json"},
    "clip": {"classes.json", "task.json"},
    "captions": {"task.json"},
    "llama": {"task.json"},
}
READS = {
    "text": {"tokenizer.json", "tokenizer_config.json"},
    "vit": {"preprocessor_config.json"},
    "clip": {"tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"},
    "llama": {"tokenizer.json", "tokenizer_config.json", "generation_config.json"},
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_lies_in_the_folders(finished: Finished, tmp_path: Path, name: str) -> None:
    run = finished(name)
    export(run, "0", tmp_path / "peft")
    merge(run, "0", tmp_path / "merged")
    found = {path.name for path in (tmp_path / "peft").iterdir()}
    assert found == {"adapter_config.json", "adapter_model.safetensors"} | BESIDE[name]
    modes = {path.stat().st_mode for folder in ("peft", "merged") for path in (tmp_path / folder).iterdir()}
    assert modes == {(tmp_path / "peft" / "task.json").stat().st_mode}  # whoever may read one may read all
    found = {path.name for path in (tmp_path / "merged").iterdir()}
    assert found == {"config.json", "model.safetensors"} | BESIDE[name] | READS[name.replace("captions", "clip")]


def test_how_a_model_is_used_is_spelt_out(finished: Finished, tmp_path: Path) -> None:
    uses = {
        "clip": {"task": "image-text", "template": "w9 {} w8", "max_length": 48},
        "captions": {"task": "image-text", "max_length": 48},
        "llama": {"task": "causal-lm", "template": "{}\n", "max_length": 32},
        "gpt2": {"task": "causal-lm", "template": "w5 {} w6", "max_length": 32},
    }
    for name, use in uses.items():
        export(finished(name), "0", tmp_path / name)
        assert json.loads((tmp_path / name / "task.json").read_text()) == use


def test_a_folder_names_the_base_that_it_is_told_to(finished: Finished, tmp_path: Path) -> None:
    run = finished("text")
    export(run, "0", tmp_path / "peft", base="org/name")
    written = [file.read_bytes() for file in (tmp_path / "peft").iterdir()]
    assert json.loads((tmp_path / "peft" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/name"
    assert not any(str(run.parent).encode() in content for content in written)


def test_trained_norms_are_merged_and_tuned_is_another_model(finished: Finished, shown: Path, tmp_path: Path) -> None:
    run = finished("text", "adapter.norm=true")
    merge(run, "1", tmp_path / "merged")
    merge(run, "1", tmp_path / "tuned", tuned=True)
    auto, folder = base(run)
    wanted = ours(run, "text", shown)
    alike(theirs(auto.from_pretrained(tmp_path / "merged"), folder, tmp_path / "merged", "text", shown, run), wanted)
    tuned = theirs(auto.from_pretrained(tmp_path / "tuned"), folder, tmp_path / "tuned", "text", shown, run)
    assert (tuned - wanted).abs().max() > 1e-3
    before, after = (
        safetensors.torch.load_file(place / "model.safetensors") for place in (folder, tmp_path / "merged")
    )
    assert any("LayerNorm" in name and not torch.equal(before[name], after[name]) for name in before)


# -- refusals ----------------------------------------------------------------------------------------------------------


def one_line(caught: pytest.ExceptionInfo[RunError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_merge_overwrites_nothing(finished: Finished, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(RunError, match="already exists; nothing was overwritten") as caught:
        merge(finished("text"), "1", tmp_path / "taken")
    one_line(caught)
    with pytest.raises(RunError, match="no client '7'") as caught:
        merge(finished("text"), "7", tmp_path / "new")
    one_line(caught)
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    assert not list((tmp_path / "taken").iterdir())


def test_a_coarse_backbone_is_not_merged(finished: Finished, tmp_path: Path) -> None:
    run = finished("text", "model.bits=4")
    with pytest.raises(RunError, match="model.bits = 4: an ordinary checkpoint has other weights") as caught:
        merge(run, "1", tmp_path / "new")
    assert "`folklora export`" in one_line(caught)
    export(run, "1", tmp_path / "peft")  # which says so on the command line
    assert [path.name for path in tmp_path.iterdir()] == ["peft"]


def test_a_backbone_that_a_library_keeps_in_few_bits_is_not_merged(finished: Finished, tmp_path: Path) -> None:
    """Refused by the recipe alone: the library need not be here."""
    run = tmp_path / "run"
    shutil.copytree(finished("text"), run)
    written = (run / "recipe.toml").read_text()
    assert 'quantize = "none"' in written
    (run / "recipe.toml").write_text(written.replace('quantize = "none"', 'quantize = "torchao-int8"'))
    with pytest.raises(RunError, match="model.quantize = torchao-int8: an ordinary checkpoint") as caught:
        merge(run, "1", tmp_path / "new")
    one_line(caught)


def test_a_full_disk_is_one_line_and_leaves_nothing(finished: Finished, tmp_path: Path) -> None:
    """A limit on the size of files, which the system itself enforces, in place of a disk that is full."""
    run = finished("text")
    client_model(run, "1")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(RunError, match="cannot be written") as caught:
            merge(run, "1", tmp_path / "merged")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert str(tmp_path / "merged") in one_line(caught)
    assert not list(tmp_path.iterdir())


def test_a_member_hands_over_out_of_its_own_folder(finished: Finished, federated: Any, tmp_path: Path) -> None:
    document = RunDirectory.open(finished("text")).recipe.model_dump()
    document["engine"]["kind"] = "flower"
    fed = federated(Recipe.parse(document), ("0", "1"))
    fed.play()
    merge(fed.folder("1"), "1", tmp_path / "member")
    merge(finished("text"), "1", tmp_path / "local")
    one, other = (safetensors.torch.load_file(tmp_path / name / "model.safetensors") for name in ("member", "local"))
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    assert (tmp_path / "member" / "task.json").read_bytes() == (tmp_path / "local" / "task.json").read_bytes()


def test_who_hands_a_model_on_encodes_no_examples(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from folklora.backbones.classification import Classification
    from folklora.federation import setup

    run = finished("text", "method.name=fedit")
    setup._encode.cache_clear()
    monkeypatch.setattr(Classification, "encode", lambda *_: pytest.fail("examples were encoded"))
    export(run, "1", tmp_path / "peft")
    merge(run, "1", tmp_path / "merged")
    with pytest.raises(pytest.fail.Exception, match="examples were encoded"):
        assert client_model(run, "1").setup.encoded
