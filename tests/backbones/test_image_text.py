"""CLIP and SigLIP: embeddings, logits and losses as Hugging Face's own, with adapters in either tower or both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from folklora.adapters.layers import Bank
from folklora.backbones import towers
from folklora.backbones.image_text import ImageText, ImageTextBackbone
from folklora.errors import BackboneError, DataError
from folklora.sections import TrainSection
from folklora.training.cohort import CohortTrainer
from folklora.training.jobs import Job
from folklora.training.prediction import Question, features, predict

FAMILIES = ("clip", "clip-old", "siglip")
NAMES = ("w1", "w2 w3", "w4")
TEMPLATE = "w50 {} w51"
CAPTIONS = ["w1 w2", "w3", "w4 w5 w6 w7", "w8", "w9 w10", "w11", "w12 w13 w14", "w15 w16"]
SIZES = (4, 1, 3)
LABELS = [[0, 1, 2, 1], [2], [0, 0, 1]]


def load(folder: Path, **arguments: Any) -> ImageTextBackbone:
    return ImageTextBackbone.load(str(folder), **{"dtype": "float32", "device": "cpu", **arguments})


def stock(folder: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def stock_inputs(folder: Path, pictures: Sequence[np.ndarray], texts: Sequence[str]) -> dict[str, Tensor]:
    """What the checkpoint's own processor and tokenizer make: CLIP's texts to the longest, SigLIP's to full length."""
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    padding = "max_length" if AutoConfig.from_pretrained(folder).model_type == "siglip" else "longest"
    tokens = AutoTokenizer.from_pretrained(folder)(
        list(texts), truncation=True, max_length=12, padding=padding, return_tensors="pt"
    )
    processor = AutoImageProcessor.from_pretrained(folder)
    pixels = processor(images=list(pictures), input_data_format="channels_last", return_tensors="pt")
    return {"input_ids": tokens["input_ids"], "pixel_values": pixels["pixel_values"]}


def stock_output(model: Any, folder: Path, pictures: Sequence[np.ndarray], texts: Sequence[str]) -> Any:
    with torch.no_grad():
        return model(**stock_inputs(folder, pictures, texts), return_loss=len(pictures) == len(texts))


def labelled(folder: Path, **arguments: Any) -> ImageText:
    return ImageText(load(folder, **arguments), NAMES, template=TEMPLATE)


def captioned(folder: Path, **arguments: Any) -> ImageText:
    return ImageText(load(folder, **arguments), ("all",), captions=True)


def raw_groups(noise: Callable[..., list[np.ndarray]]) -> list[list[np.ndarray]]:
    return [noise(size, seed=k) for k, size in enumerate(SIZES)]


def raw_pairs(noise: Callable[..., list[np.ndarray]]) -> list[list[tuple[np.ndarray, str]]]:
    captions = iter(CAPTIONS)
    return [[(picture, next(captions)) for picture in group] for group in raw_groups(noise)]


def groups_of(task: ImageText, noise: Callable[..., list[np.ndarray]]) -> list[list[Any]]:
    return [task.encode(group) for group in (raw_pairs(noise) if task.captions else raw_groups(noise))]


# -- embeddings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", ["auto", "never"])
@pytest.mark.parametrize("family", FAMILIES)
def test_embeddings_are_the_stock_models(
    seeing_model: Callable[[str], Path], noise: Callable[..., Any], family: str, packed: str
) -> None:
    folder = seeing_model(family)
    backbone = load(folder)
    texts = [*CAPTIONS, "w1 unknown", " ".join(f"w{i}" for i in range(30))]  # the last is longer than the model takes
    pictures = noise(6)
    expected = stock_output(stock(folder), folder, pictures, texts)
    tokens = backbone.encode_texts(texts)
    assert max(map(len, tokens)) == 12
    with torch.no_grad():
        batch = backbone.text_batch([tokens[:3], tokens[3:]], packed)
        embedded = backbone.embed_texts(batch)
        seen = backbone.embed_pictures(backbone.picture_batch([backbone.encode_pictures(pictures)]))
    assert batch.packed is (packed == "auto" and family != "siglip")
    torch.testing.assert_close(embedded, expected.text_embeds, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen, expected.image_embeds, rtol=1e-5, atol=1e-5)
    assert (expected.text_embeds[:-1] - expected.text_embeds[1:]).norm(dim=1).min() > 0.05  # or all tests would pass
    assert backbone.width == expected.text_embeds.shape[1]


def test_clips_own_tokenizer_which_pads_with_its_end(
    seeing_model: Callable[[str], Path], tmp_path: Path, noise: Callable[..., Any]
) -> None:
    from transformers import CLIPTokenizer

    folder = Path(shutil.copytree(seeing_model("clip-old"), tmp_path / "clip"))
    letters = [*"abcdefghij", *(f"{letter}</w>" for letter in "abcdefghij")]
    words = ["<|startoftext|>", *letters, *(f"unused{i}" for i in range(20)), "<|endoftext|>"]
    for path in folder.glob("token*"):
        path.unlink()
    CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[]).save_pretrained(folder)
    backbone = load(folder)
    texts = ["a bad dead face", "A JIG", "fade abide a cab badge"]
    expected = stock_output(stock(folder), folder, noise(1), texts).text_embeds
    with torch.no_grad():
        embedded = backbone.embed_texts(backbone.text_batch([backbone.encode_texts(texts)]))
    torch.testing.assert_close(embedded, expected, rtol=1e-5, atol=1e-5)
    assert backbone.tokenizer.pad_token_id == backbone.tokenizer.eos_token_id


def test_texts_are_cut_where_the_recipe_says(seeing_model: Callable[[str], Path]) -> None:
    backbone = load(seeing_model("clip"))
    long = " ".join(f"w{i}" for i in range(30))
    ids = backbone.encode_texts([long], 6)[0]
    assert len(ids) == 6
    assert ids[-1] == backbone.tokenizer.eos_token_id
    assert len(backbone.encode_texts([long], 500)[0]) == 12
    assert backbone.encode_texts([]) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_sites_are_named_as_in_the_stock_model(seeing_model: Callable[[str], Path], family: str) -> None:
    folder = seeing_model(family)
    layers = dict(stock(folder).named_modules())
    both = [site.name for site in load(folder).sites]
    image = [site.name for site in load(folder, tower="image").sites]
    text = [site.name for site in load(folder, tower="text").sites]
    assert (len(both), len(image), len(text)) == (8, 4, 4)  # query and value in each of two layers of each tower
    assert sorted(both) == sorted(image + text)
    assert all(name.startswith("vision_model.encoder.layers.") for name in image)
    assert all(name.startswith("text_model.encoder.layers.") for name in text)
    everything = load(folder, targets=".*").sites
    assert len(everything) == 24  # neither projections nor what pools: they see no tokens
    for site in everything:
        assert (layers[site.name].in_features, layers[site.name].out_features) == (site.d_in, site.d_out)


def test_a_regex_names_layers_of_the_towers_that_are_adapted(seeing_model: Callable[[str], Path]) -> None:
    for tower in ("image", "text"):
        backbone = load(seeing_model("clip"), tower=tower, targets=r".*fc1")
        assert len(backbone.sites) == 2
        assert all(site.name.endswith("mlp.fc1") for site in backbone.sites)
        assert backbone.adapted == {tower}
    assert load(seeing_model("clip"), targets=r"text_model\..*fc1").adapted == {"text"}
    with pytest.raises(BackboneError, match="matches no linear layer of this clip; allowed"):
        load(seeing_model("clip"), targets=".*projection")
    with pytest.raises(BackboneError, match='no linear layer of this clip in adapter.tower = "image"; allowed') as told:
        load(seeing_model("clip"), tower="image", targets=r"text_model\..*fc1")
    assert "vision_model" in str(told.value)


# -- classes by prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", ["auto", "never"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("tower", ["both", "image", "text"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_a_stock_model_with_the_client_s_weights(
    seeing_model: Callable[[str], Path],
    noise: Callable[..., Any],
    company: Callable[..., Any],
    family: str,
    tower: str,
    norm: bool,
    packed: str,
) -> None:
    folder = seeing_model(family)
    task = labelled(folder, tower=tower, norm=norm)
    assert task.backbone.adapted == ({"image", "text"} if tower == "both" else {tower})
    clients = company(task, strength=0.2)
    answers = clients.answers(groups_of(task, noise), packed=packed).split(SIZES)
    prompts = [TEMPLATE.replace("{}", name) for name in NAMES]
    model = stock(folder)
    for k, pictures in enumerate(raw_groups(noise)):
        expected = stock_output(clients.merged(model, k), folder, pictures, prompts).logits_per_image
        torch.testing.assert_close(answers[k], expected, rtol=1e-4, atol=1e-4)
        frozen = stock_output(model, folder, pictures, prompts).logits_per_image
        assert not torch.allclose(answers[k], frozen, atol=1e-2)


@pytest.mark.parametrize("tower", ["both", "text"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_cross_entropies_over_all_classes(
    seeing_model: Callable[[str], Path],
    noise: Callable[..., Any],
    company: Callable[..., Any],
    family: str,
    tower: str,
) -> None:
    task = labelled(seeing_model(family), tower=tower)
    clients = company(task)
    groups = groups_of(task, noise)
    losses, _ = clients.losses(groups, LABELS)
    expected = [
        F.cross_entropy(logits, torch.tensor(labels))
        for logits, labels in zip(clients.answers(groups).split(SIZES), LABELS, strict=True)
    ]
    torch.testing.assert_close(losses, torch.stack(expected))


def test_the_default_template(seeing_model: Callable[[str], Path]) -> None:
    assert ImageText(load(seeing_model("clip")), ("cat",)).prompts == ["a photo of a cat."]


def test_class_names_may_hold_braces(seeing_model: Callable[[str], Path]) -> None:
    assert ImageText(load(seeing_model("clip")), ("{x} {}",), template="a {}").prompts == ["a {x} {}"]


@pytest.mark.parametrize("template", ["a photo", "{} and {}", ""])
def test_a_template_without_a_place(seeing_model: Callable[[str], Path], template: str) -> None:
    with pytest.raises(BackboneError, match="model.template = .*; allowed: a text with one {}"):
        ImageText(load(seeing_model("clip")), NAMES, template=template)


# -- captions --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["both", "image", "text"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_on_pairs_is_the_stock_models(
    seeing_model: Callable[[str], Path],
    noise: Callable[..., Any],
    company: Callable[..., Any],
    family: str,
    tower: str,
) -> None:
    folder = seeing_model(family)
    task = captioned(folder, tower=tower)
    clients = company(task, strength=0.2)
    losses, _ = clients.losses(groups_of(task, noise), LABELS)
    model = stock(folder)
    for k, pairs in enumerate(raw_pairs(noise)):
        expected = stock_output(clients.merged(model, k), folder, *zip(*pairs, strict=True)).loss
        torch.testing.assert_close(losses[k], expected, rtol=1e-4, atol=1e-5)


def brute_force(task: ImageText, images: Tensor, texts: Tensor, captions: Sequence[Any]) -> Tensor:
    """The loss of one client, pair by pair; a pair with the same caption (or the same of whatever) is left out."""
    logits = images @ texts.T * task.backbone.scale + task.backbone.bias
    n = len(captions)
    others = [[j for j in range(n) if j == i or captions[j] != captions[i]] for i in range(n)]
    if task.backbone.sigmoid:
        signed = [logits[i, j] * (1 if i == j else -1) for i in range(n) for j in others[i]]
        return -torch.stack([F.logsigmoid(value) for value in signed]).sum() / n
    rows = [torch.logsumexp(logits[i, others[i]], 0) - logits[i, i] for i in range(n)]
    columns = [torch.logsumexp(logits[others[i], i], 0) - logits[i, i] for i in range(n)]
    return (torch.stack(rows).mean() + torch.stack(columns).mean()) / 2


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_the_same_caption_twice_is_no_mistake(
    seeing_model: Callable[[str], Path], noise: Callable[..., Any], company: Callable[..., Any], family: str
) -> None:
    task = captioned(seeing_model(family))
    clients = company(task, clients=2)
    texts = [["w1", "w2", "w1", "w3", "w2", "w1"], ["w5", "w5"]]
    groups = [task.encode(list(zip(noise(len(own), seed=k), own, strict=True))) for k, own in enumerate(texts)]
    losses, _ = clients.losses(groups, [[0] * 6, [0] * 2])
    answers = clients.answers(groups).split([6, 2])
    for k, own in enumerate(texts):
        images, captions = answers[k][:, : task.width], answers[k][:, task.width : 2 * task.width]
        torch.testing.assert_close(losses[k], brute_force(task, images, captions, own), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("tower", ["both", "text"])
def test_captions_of_one_picture_are_no_mistakes_for_each_other(
    seeing_model: Callable[[str], Path], noise: Callable[..., Any], company: Callable[..., Any], family: str, tower: str
) -> None:
    """As in COCO and Flickr30k, whose pictures have five each."""
    task = captioned(seeing_model(family), tower=tower)
    clients = company(task, clients=1)
    which, pictures = [0, 1, 0, 2, 1, 0], noise(3)
    examples = task.encode([(pictures[p], f"w{i}") for i, p in enumerate(which)])
    losses, _ = clients.losses([examples], [[0] * 6])
    answers = clients.answers([examples])
    images, captions = answers[:, : task.width], answers[:, task.width : 2 * task.width]
    torch.testing.assert_close(losses[0], brute_force(task, images, captions, which), rtol=1e-5, atol=1e-6)
    # A model whose captions are their pictures' own embeddings makes no mistake.
    own = answers.numpy().copy()
    own[:, task.width : 2 * task.width] = images
    score = task.score(own, np.zeros(6))
    assert (score.value, score.beside) == (1, {"text_to_image": 1})


def test_answers_are_embeddings_and_the_caption_s_name(
    seeing_model: Callable[[str], Path], noise: Callable[..., Any], company: Callable[..., Any]
) -> None:
    folder = seeing_model("clip")
    task = captioned(folder)
    clients = company(task)
    answers = clients.answers(groups_of(task, noise))
    assert answers.shape == (8, task.answer_width)
    output = stock_output(clients.merged(stock(folder), 0), folder, *zip(*raw_pairs(noise)[0], strict=True))
    expected = torch.cat([output.image_embeds, output.text_embeds], dim=1)
    torch.testing.assert_close(answers[:4, : 2 * task.width], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tower", ["both", "image"])
def test_retrieval_counts_captions_not_pairs(
    seeing_model: Callable[[str], Path], noise: Callable[..., Any], company: Callable[..., Any], tower: str
) -> None:
    """Over many passes, which see the same caption in other company: its name is what is compared."""
    task = captioned(seeing_model("clip"), tower=tower)
    clients = company(task, clients=1)
    texts = ["w1 w2", "w3", "w1 w2", "w4", "w3", "w5", "w1 w2", "w6", "w7"]
    examples = task.encode(list(zip(noise(len(texts)), texts, strict=True)))
    question = Question("0", 1, clients.owned[0], examples)
    answers = predict(task, clients.adapter, [question], tokens=20)["0"]
    images, captions = answers[:, : task.width], answers[:, task.width : 2 * task.width]
    cosines = images @ captions.T
    score = task.score(answers, np.zeros(len(texts), dtype=np.int64))
    forth = [texts[int(row.argmax())] == texts[i] for i, row in enumerate(cosines)]
    back = [texts[int(column.argmax())] == texts[i] for i, column in enumerate(cosines.T)]
    assert (score.total, score.units) == (sum(forth), len(texts))
    assert score.beside == {"text_to_image": pytest.approx(np.mean(back))}
    # With captions that are their pictures' own embeddings all are found, twice the same or not.
    for i, text in enumerate(texts):
        answers[i, : 2 * task.width] = np.tile(images[texts.index(text)], 2)
    assert task.score(answers, np.zeros(len(texts))).value == 1


def test_a_picture_without_a_caption(seeing_model: Callable[[str], Path], noise: Callable[..., Any]) -> None:
    with pytest.raises(DataError, match="example 1: of type .*; allowed: a picture with its caption"):
        captioned(seeing_model("clip")).encode(noise(2))


@pytest.mark.parametrize("kind", [labelled, captioned])
@pytest.mark.parametrize("tower", ["both", "text"])
def test_what_is_no_picture(seeing_model: Callable[[str], Path], kind: Callable[..., ImageText], tower: str) -> None:
    task = kind(seeing_model("clip"), tower=tower)
    wrong = np.zeros((4, 4), dtype=np.uint8)
    with pytest.raises(DataError, match="example 1: a picture of uint8"):
        task.encode([(wrong, "w1")] if task.captions else [wrong])


# -- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{}, {"mixed": False}, {"packed": "never"}])
@pytest.mark.parametrize("tower", ["both", "image", "text"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
@pytest.mark.parametrize("kind", [labelled, captioned])
def test_company_changes_nothing(
    seeing_model: Callable[[str], Path],
    noise: Callable[..., Any],
    company: Callable[..., Any],
    kind: Callable[..., ImageText],
    family: str,
    tower: str,
    layout: dict[str, Any],
) -> None:
    task = kind(seeing_model(family), tower=tower)
    groups = groups_of(task, noise)
    clients = company(task)
    sizes = [2 * size for size in SIZES]  # a pair alone has no loss, and no gradient
    groups = [group + group_of_twins for group, group_of_twins in zip(groups, more(task, noise), strict=True)]
    labels = [[*own, *own] for own in LABELS]
    assert [len(group) for group in groups] == sizes
    clients.assert_company_changes_nothing(groups, labels, **layout)


def more(task: ImageText, noise: Callable[..., list[np.ndarray]]) -> list[list[Any]]:
    found = []
    for k, size in enumerate(SIZES):
        pictures = noise(size, seed=10 + k)
        captions = [f"w{20 + k} w{30 + i}" for i in range(size)]
        found.append(task.encode(list(zip(pictures, captions, strict=True)) if task.captions else pictures))
    return found


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("kind", [labelled, captioned])
def test_a_cohort_learns_what_each_client_would_alone(
    seeing_model: Callable[[str], Path],
    noise: Callable[..., Any],
    company: Callable[..., Any],
    kind: Callable[..., ImageText],
    dropout: float,
) -> None:
    task = kind(seeing_model("clip"))
    clients = company(task, dropout=dropout)
    groups = groups_of(task, noise)
    jobs = [
        Job(str(k), 1, k + 1, own, frozenset(own), groups[k], np.array(LABELS[k]))
        for k, own in enumerate(clients.owned)
    ]

    def fit(jobs: list[Job], **train: Any) -> dict[str, Any]:
        trainer = CohortTrainer(task, clients.adapter, TrainSection(batch_size=3, local_epochs=2, **train), 0)
        return {fitted.client: fitted for fitted in trainer.fit(jobs)}

    together = fit(jobs, cohort=3)
    for job in jobs:
        alone = fit([job])[job.client]
        assert together[job.client].loss == pytest.approx(alone.loss, rel=1e-4, abs=1e-6)
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(together[job.client].tensors[name], tensor, rtol=1e-3, atol=1e-5)
    if dropout:
        assert fit(jobs[:1])["0"].loss != pytest.approx(
            next(
                CohortTrainer(task, company(task).adapter, TrainSection(batch_size=3, local_epochs=2), 0).fit(jobs[:1])
            ).loss
        )


@pytest.mark.parametrize("kind", [labelled, captioned])
def test_bfloat16_is_near(
    seeing_model: Callable[[str], Path],
    noise: Callable[..., Any],
    company: Callable[..., Any],
    kind: Callable[..., ImageText],
) -> None:
    task = kind(seeing_model("clip"), dtype="bfloat16")
    groups = groups_of(task, noise)
    clients = company(task, strength=0.1)
    half, _ = clients.losses(groups, LABELS)
    full, _ = clients.losses(groups, LABELS, dtype=torch.float32)
    assert half.dtype == torch.float32
    assert 0 < float((half - full).abs().max()) < 0.1
    assert clients.answers(groups).dtype == torch.float32


@pytest.mark.parametrize("how", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_may_be_computed_either_way(
    seeing_model: Callable[[str], Path],
    noise: Callable[..., Any],
    company: Callable[..., Any],
    family: str,
    how: str,
) -> None:
    task = labelled(seeing_model(family))
    expected = company(task).answers(groups_of(task, noise))
    task.backbone.attend(how)
    torch.testing.assert_close(company(task).answers(groups_of(task, noise)), expected, rtol=1e-4, atol=1e-5)


def test_fused_kernels_are_for_many_tokens(
    seeing_model: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = load(seeing_model("clip"))
    chosen = lambda: backbone.run(lambda model: model.vision_model.config._attn_implementation, None)
    backbone.attend("auto")
    assert chosen() == "eager"
    monkeypatch.setattr(towers, "FUSED_FROM", 5)
    backbone.attend("auto")
    assert chosen() == "sdpa"


def test_checkpointing_changes_no_gradient(
    seeing_model: Callable[[str], Path], noise: Callable[..., Any], company: Callable[..., Any]
) -> None:
    task = captioned(seeing_model("clip"))
    groups = groups_of(task, noise)
    losses, grads = company(task).losses(groups, LABELS)
    task.backbone.checkpoint()
    again, anew = company(task).losses(groups, LABELS)
    torch.testing.assert_close(again, losses)
    for name, grad in grads.items():
        torch.testing.assert_close(anew[name], grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [labelled, captioned])
def test_what_is_not_finite_stays_with_whose_it_is(
    seeing_model: Callable[[str], Path],
    noise: Callable[..., Any],
    company: Callable[..., Any],
    kind: Callable[..., ImageText],
) -> None:
    task = kind(seeing_model("clip"))
    groups = groups_of(task, noise)
    clients = company(task)
    losses, grads = clients.losses(groups, LABELS)
    for tensor in clients.owned[1].values():
        tensor.fill_(torch.inf)
    sick, spoilt = clients.losses(groups, LABELS, mixed=False)
    assert not torch.isfinite(sick[1])
    torch.testing.assert_close(sick[[0, 2]], losses[[0, 2]])
    for name, grad in spoilt.items():
        torch.testing.assert_close(grad[[0, 2]], grads[name][[0, 2]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", [labelled, captioned])
@pytest.mark.parametrize(("tower", "runs"), [("image", {"image"}), ("text", {"text"}), ("both", {"image", "text"})])
def test_a_tower_without_adapters_runs_once_for_all(
    seeing_model: Callable[[str], Path],
    noise: Callable[..., Any],
    company: Callable[..., Any],
    kind: Callable[..., ImageText],
    tower: str,
    runs: set[str],
) -> None:
    task = kind(seeing_model("clip"), tower=tower)
    clients = company(task)
    groups = groups_of(task, noise)
    clients.answers(groups)  # class embeddings are made when they are first wanted
    ran: set[str] = set()
    model: Any = task.backbone.run(lambda model: model, None)
    model.vision_model.register_forward_hook(lambda *_: ran.add("image"))
    model.text_model.register_forward_hook(lambda *_: ran.add("text"))
    clients.losses(groups, LABELS)
    clients.answers(groups)
    assert ran == runs


def test_each_tower_is_plugged_once_a_pass(
    seeing_model: Callable[[str], Path], noise: Callable[..., Any], company: Callable[..., Any]
) -> None:
    task = labelled(seeing_model("clip"))
    clients = company(task)
    stacks = clients.stacks([0, 1, 2])
    batches = []
    inner = clients.plugged([0, 1, 2], stacks)

    def plugged(batch: Any) -> Bank:
        batches.append(batch)
        return inner(batch)

    task.answers(task.lay_out(groups_of(task, noise)), stacks, plugged)
    assert [batch.sequences for batch in batches] == [8, 9]  # pictures; three prompts of each of three clients


@pytest.mark.parametrize("tower", ["both", "text"])
@pytest.mark.parametrize("kind", [labelled, captioned])
def test_features_are_the_frozen_picture_embeddings(
    seeing_model: Callable[[str], Path], noise: Callable[..., Any], kind: Callable[..., ImageText], tower: str
) -> None:
    folder = seeing_model("siglip")
    task = kind(folder, tower=tower)
    pictures = noise(5)
    examples = task.encode([(picture, "w1") for picture in pictures] if task.captions else pictures)
    expected = stock_output(stock(folder), folder, pictures, ["w1"]).image_embeds
    np.testing.assert_allclose(features(task, examples, tokens=9), expected.numpy(), rtol=1e-4, atol=1e-5)
    assert task.width == 32
    assert task.head_shapes() == {}


def test_what_an_example_costs(seeing_model: Callable[[str], Path], noise: Callable[..., Any]) -> None:
    pair = [(noise(1)[0], "w1 w2 w3")]
    cost = lambda **arguments: len(captioned(seeing_model("clip"), **arguments).encode(pair)[0])
    assert cost() == 5 + 5  # four patches and the class token; three words, start and end
    assert cost(tower="image") == 5
    assert cost(tower="text") == 5
    assert len(labelled(seeing_model("clip"), tower="text").encode(noise(1))[0]) == 1


# -- refusals --------------------------------------------------------------------------------------------------------


def refused(message: str, call: Callable[[], object]) -> str:
    with pytest.raises(BackboneError, match=message) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_text_model_is_no_pair_of_towers(tiny_model: Callable[[str], Path]) -> None:
    assert "allowed" in refused("bert is a model of kind text", lambda: load(tiny_model("bert")))


def test_a_vision_model_is_no_pair_of_towers(seeing_model: Callable[[str], Path]) -> None:
    refused("vit is a model of kind image", lambda: load(seeing_model("vit")))


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused("model.name", lambda: load(tmp_path / "missing"))


@pytest.fixture
def copy(seeing_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(seeing_model("clip"), tmp_path / "clip"))


def test_no_image_processor(copy: Path) -> None:
    (copy / "preprocessor_config.json").unlink()
    assert str(copy) in refused("no image processor", lambda: load(copy))


def test_no_tokenizer(copy: Path) -> None:
    for path in copy.glob("token*"):
        path.unlink()
    refused("model.name", lambda: load(copy))


@pytest.mark.parametrize("part", ["text_projection", "vision_model.encoder.layers.1", "logit_scale"])
def test_missing_weights(copy: Path, part: str) -> None:
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if part not in name}
    assert len(kept) < len(weights)
    safetensors.torch.save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    refused("the weights lack", lambda: load(copy))


def test_pictures_of_another_size_than_the_models(copy: Path) -> None:
    path = copy / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "crop_size": {"height": 6, "width": 6}}))
    refused("6 x 6 pixels .* clip does not take them.*allowed", lambda: load(copy))


def change_tokenizer(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_tokenizer_that_ends_no_text(copy: Path) -> None:
    change_tokenizer(copy, post_processor=None)
    refused("does not end a text with token 3", lambda: load(copy))


def test_a_tokenizer_of_another_model(copy: Path) -> None:
    content = json.loads((copy / "tokenizer.json").read_text())
    content["model"]["vocab"] |= {f"extra{i}": 64 + i for i in range(5)}
    (copy / "tokenizer.json").write_text(json.dumps(content))
    refused("the tokenizer has 69 tokens, and the model 64", lambda: load(copy))


def test_siglip_without_a_pad_token(seeing_model: Callable[[str], Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(seeing_model("siglip"), tmp_path / "siglip"))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in settings.items() if key != "pad_token"}))
    refused("no pad token.*allowed", lambda: load(folder))


def test_siglip_is_not_packed(seeing_model: Callable[[str], Path]) -> None:
    refused('train.packed = "always"', lambda: labelled(seeing_model("siglip")).refuse_layout("always", 8))
    labelled(seeing_model("clip")).refuse_layout("always", 8)


def test_the_digest_knows_tokens_and_pixels(seeing_model: Callable[[str], Path], copy: Path) -> None:
    whole = load(seeing_model("clip")).digest
    assert load(copy).digest == whole
    change_tokenizer(copy, normalizer={"type": "Prepend", "prepend": "w1 "})
    assert load(copy).digest != whole
    shutil.copy(seeing_model("clip") / "tokenizer.json", copy)
    assert load(copy).digest == whole
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "resample": 0}))
    assert load(copy).digest != whole


def test_a_caption_alone_teaches_clip_nothing(seeing_model: Callable[[str], Path]) -> None:
    refused(
        "train.batch_size = 1: .*allowed: 2 or more", lambda: captioned(seeing_model("clip")).refuse_layout("auto", 1)
    )
    captioned(seeing_model("clip")).refuse_layout("auto", 2)
    labelled(seeing_model("clip")).refuse_layout("auto", 1)  # prompts of all classes are there
    captioned(seeing_model("siglip")).refuse_layout("auto", 1)  # whose own pair is a term by itself
