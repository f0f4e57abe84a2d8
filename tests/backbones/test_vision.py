"""Vision transformers: states as Hugging Face's own, with and without adapters; classification of pictures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from folklora.backbones.backbone import Backbone
from folklora.backbones.quantize import WeightBits
from folklora.backbones.vision import ImageClassification, VisionBackbone
from folklora.errors import BackboneError
from folklora.sections import TrainSection
from folklora.training.cohort import CohortTrainer
from folklora.training.jobs import Job
from folklora.training.prediction import features

ARCHITECTURES = ("vit", "deit", "dinov2", "clip_vision_model", "siglip_vision_model")
CLASSES = 3
SIZES = (4, 1, 3)
LABELS = [[0, 1, 2, 1], [2], [0, 0, 1]]


def load(folder: Path, **arguments: Any) -> VisionBackbone:
    return VisionBackbone.load(str(folder), **{"dtype": "float32", "device": "cpu", **arguments})


def stock(folder: Path) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(folder, dtype=torch.float32).eval()


def stock_pixels(folder: Path, pictures: list[np.ndarray]) -> Tensor:
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(folder)
    pixels: Tensor = processor(images=pictures, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    return pixels


def stock_states(model: Any, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        states: Tensor = model(pixel_values=pixels).last_hidden_state
        return model.post_layernorm(states) if model.config.model_type == "clip_vision_model" else states


def grouped(task: Any, noise: Callable[..., list[np.ndarray]]) -> tuple[list[list[Any]], list[list[np.ndarray]]]:
    raw = [noise(size, seed=k) for k, size in enumerate(SIZES)]
    return [task.encode(group) for group in raw], raw


# -- states ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_states_are_the_stock_models(
    seeing_model: Callable[[str], Path], noise: Callable[..., Any], architecture: str
) -> None:
    folder = seeing_model(architecture)
    backbone = load(folder)
    raw = noise(5)
    batch = backbone.batch([backbone.encode(raw[:2]), backbone.encode(raw[2:])])
    expected = stock_states(stock(folder), stock_pixels(folder, raw))
    with torch.no_grad():
        states = backbone.hidden(batch)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    assert (backbone.tokens, backbone.width) == tuple(expected.shape[1:])
    assert len(backbone.encode(raw)[0]) == backbone.tokens


def test_clips_class_token_is_what_it_pools(seeing_model: Callable[[str], Path], noise: Callable[..., Any]) -> None:
    folder = seeing_model("clip_vision_model")
    backbone = load(folder)
    raw = noise(3)
    with torch.no_grad():
        pooled = stock(folder)(pixel_values=stock_pixels(folder, raw)).pooler_output
        states = backbone.hidden(backbone.batch([backbone.encode(raw)]))
    torch.testing.assert_close(states[:, 0], pooled, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sites_are_named_as_in_the_stock_model_and_see_every_token(
    seeing_model: Callable[[str], Path], architecture: str
) -> None:
    folder = seeing_model(architecture)
    layers = dict(stock(folder).named_modules())
    default = load(folder).sites
    assert len(default) == 4  # query and value in each of two layers
    everything = load(folder, targets=".*").sites
    assert {site.name for site in default} < {site.name for site in everything}
    for site in everything:
        layer = layers[site.name]
        assert (layer.in_features, layer.out_features) == (site.d_in, site.d_out)
        assert not site.name.startswith(("head.", "pooler."))
    assert len(everything) == 12


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adapters_are_changes_of_the_weights(
    seeing_model: Callable[[str], Path],
    noise: Callable[..., Any],
    company: Callable[..., Any],
    architecture: str,
    norm: bool,
) -> None:
    """The oracle: a stock model for each client, with ``s B C A`` added to its weights, and its own LayerNorms."""
    folder = seeing_model(architecture)
    task = ImageClassification(load(folder, targets=".*", norm=norm), CLASSES)
    assert bool(task.backbone.norms) is norm
    clients = company(task, strength=0.1)
    groups, raw = grouped(task, noise)
    answers = clients.answers(groups).split(SIZES)
    for k, own in enumerate(clients.owned):
        states = stock_states(clients.merged(stock(folder), k), stock_pixels(folder, raw[k]))
        pooled = states.mean(1) if architecture.startswith("siglip") else states[:, 0]
        logits = F.linear(pooled, own["head/weight"], own["head/bias"])
        torch.testing.assert_close(answers[k], logits, rtol=1e-4, atol=1e-5)


def test_a_frozen_backbone_has_no_gradient_and_features_no_adapter(
    seeing_model: Callable[[str], Path], noise: Callable[..., Any]
) -> None:
    folder = seeing_model("vit")
    task = ImageClassification(load(folder), CLASSES)
    raw = noise(7)
    expected = stock_states(stock(folder), stock_pixels(folder, raw))[:, 0].numpy()
    np.testing.assert_allclose(features(task, task.encode(raw), tokens=12), expected, rtol=1e-4, atol=1e-5)
    assert task.width == 32
    assert not any(p.requires_grad for p in task.backbone.run(lambda model: model, None).parameters())


def test_few_bits_a_weight(seeing_model: Callable[[str], Path], noise: Callable[..., Any]) -> None:
    whole, coarse = (load(seeing_model("vit"), weight_bits=bits) for bits in (None, WeightBits(4)))
    assert coarse.stored < whole.stored / 4
    with torch.no_grad():
        states, rounded = (b.hidden(b.batch([b.encode(noise(3))])) for b in (whole, coarse))
    error = float((rounded - states).norm() / states.norm())
    assert 0.01 < error < 0.5


# -- the task --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixed", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_company_changes_nothing(
    seeing_model: Callable[[str], Path],
    noise: Callable[..., Any],
    company: Callable[..., Any],
    architecture: str,
    mixed: bool,
) -> None:
    task = ImageClassification(load(seeing_model(architecture), norm=True), CLASSES)
    groups, _ = grouped(task, noise)
    company(task).assert_company_changes_nothing(groups, LABELS, mixed=mixed)


def test_losses_are_cross_entropies(
    seeing_model: Callable[[str], Path], noise: Callable[..., Any], company: Callable[..., Any]
) -> None:
    task = ImageClassification(load(seeing_model("vit")), CLASSES)
    clients = company(task)
    groups, _ = grouped(task, noise)
    losses, _ = clients.losses(groups, LABELS)
    expected = [
        F.cross_entropy(logits, torch.tensor(labels))
        for logits, labels in zip(clients.answers(groups).split(SIZES), LABELS, strict=True)
    ]
    torch.testing.assert_close(losses, torch.stack(expected))


def test_bfloat16_is_near(
    seeing_model: Callable[[str], Path], noise: Callable[..., Any], company: Callable[..., Any]
) -> None:
    task = ImageClassification(load(seeing_model("vit"), dtype="bfloat16"), CLASSES)
    groups, _ = grouped(task, noise)
    clients = company(task)
    half, _ = clients.losses(groups, LABELS)
    full, _ = clients.losses(groups, LABELS, dtype=torch.float32)
    assert half.dtype == torch.float32
    assert 0 < float((half - full).abs().max()) < 0.05
    assert clients.answers(groups).dtype == torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_a_cohort_learns_what_each_client_would_alone(
    seeing_model: Callable[[str], Path], noise: Callable[..., Any], company: Callable[..., Any], dropout: float
) -> None:
    task = ImageClassification(load(seeing_model("vit")), CLASSES)
    clients = company(task, dropout=dropout)
    groups, _ = grouped(task, noise)
    jobs = [
        Job(str(k), 1, k + 1, own, frozenset(own), groups[k], np.array(LABELS[k]))
        for k, own in enumerate(clients.owned)
    ]
    fit = lambda jobs, **train: {
        fitted.client: fitted
        for fitted in CohortTrainer(task, clients.adapter, TrainSection(batch_size=2, local_epochs=3, **train), 0).fit(
            jobs
        )
    }
    together = fit(jobs, cohort=3)
    for job in jobs:
        alone = fit([job])[job.client]
        assert together[job.client].loss == pytest.approx(alone.loss, rel=1e-4)
        for name, tensor in alone.tensors.items():
            torch.testing.assert_close(together[job.client].tensors[name], tensor, rtol=1e-3, atol=1e-5)
            assert not torch.equal(tensor, job.tensors[name])


def test_pictures_are_learned(seeing_model: Callable[[str], Path], noise: Callable[..., Any]) -> None:
    """Six pictures with labels that say nothing: a head alone learns them by heart."""
    task = ImageClassification(load(seeing_model("dinov2")), 2)
    examples, labels = task.encode(noise(6)), torch.tensor([0, 1, 0, 1, 1, 0])
    found = task.features(task.lay_out([examples]))
    weight, bias = torch.zeros(2, 32, requires_grad=True), torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.Adam([weight, bias], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(F.linear(found.detach(), weight, bias), labels).backward()
        optimizer.step()
    layout = task.lay_out([examples])
    stacks = {"head/weight": weight[None].detach(), "head/bias": bias[None].detach()}
    answers = task.answers(layout, stacks, lambda batch: None)
    score = task.score(answers.numpy(), labels.numpy())
    assert (score.total, score.units) == (6, 6)


# -- refusals --------------------------------------------------------------------------------------------------------


def refused(message: str, call: Callable[[], object]) -> str:
    with pytest.raises(BackboneError, match=message) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert "allowed" in text
    return text


def test_a_text_model_takes_no_pictures(tiny_model: Callable[[str], Path]) -> None:
    folder = tiny_model("bert")
    text = refused("bert is a model of kind text", lambda: load(folder))
    assert str(folder) in text


def test_two_towers_are_another_task(seeing_model: Callable[[str], Path]) -> None:
    refused('model.task = "image-text"', lambda: load(seeing_model("clip")))


def test_a_vision_model_takes_no_texts(seeing_model: Callable[[str], Path]) -> None:
    refused("with data.image", lambda: Backbone.load(str(seeing_model("vit"))))


def test_two_towers_take_no_texts_alone(seeing_model: Callable[[str], Path]) -> None:
    refused('model.task = "image-text"', lambda: Backbone.load(str(seeing_model("siglip"))))


@pytest.fixture
def copy(seeing_model: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(seeing_model("vit"), tmp_path / "vit"))


def change(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_no_image_processor(copy: Path) -> None:
    (copy / "preprocessor_config.json").unlink()
    assert str(copy) in refused("no image processor", lambda: load(copy))


def test_an_image_processor_that_transformers_no_longer_knows(copy: Path) -> None:
    """As in folders of fine-tuned ViTs that were written years ago."""
    path = copy / "preprocessor_config.json"
    path.write_text(json.dumps({"image_processor_type": "ViTOldExtractor"}))
    assert str(copy) in refused("its image processor cannot be used: ", lambda: load(copy))


def test_an_image_processor_of_its_own_code_is_never_run(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(copy)
    change(
        copy, "preprocessor_config.json", image_processor_type="Own", auto_map={"AutoImageProcessor": "code.Processor"}
    )
    (copy / "code.py").write_text("from pathlib import Path; Path('exploded').touch()")
    refused("model.name", lambda: load(copy))
    assert not Path("exploded").exists()


def test_missing_weights(copy: Path) -> None:
    weights = safetensors.torch.load_file(copy / "model.safetensors")
    lost = {name: tensor for name, tensor in weights.items() if "layer.1." not in name}
    assert len(lost) < len(weights)
    safetensors.torch.save_file(lost, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match="the weights lack"):
        load(copy)


def test_pictures_of_another_size_than_the_models(copy: Path) -> None:
    change(copy, "preprocessor_config.json", size={"height": 18, "width": 18})
    refused("18 x 18 pixels .* vit does not take them", lambda: load(copy))


def test_a_model_of_one_channel(tmp_path: Path, copy: Path) -> None:
    from transformers import ViTConfig, ViTModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**sizes, image_size=12, patch_size=6, num_channels=1)).save_pretrained(copy)
    refused("in 3 channels", lambda: load(copy))


def test_a_convolutional_network_has_no_tokens(copy: Path) -> None:
    from transformers import ConvNextConfig, ConvNextModel

    ConvNextModel(ConvNextConfig(hidden_sizes=[4, 8], depths=[1, 1], num_stages=2, image_size=12)).save_pretrained(copy)
    refused("no sequence of tokens", lambda: load(copy))


def test_a_model_that_hides_patches(copy: Path) -> None:
    from transformers import ViTMAEConfig, ViTMAEModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTMAEModel(ViTMAEConfig(**sizes, image_size=12, patch_size=3)).save_pretrained(copy)
    refused("at random", lambda: load(copy))


def test_packing_has_no_meaning(seeing_model: Callable[[str], Path]) -> None:
    task = ImageClassification(load(seeing_model("vit")), CLASSES)
    refused('train.packed = "always"', lambda: task.refuse_layout("always", 8))
    task.refuse_layout("auto", 8)


@pytest.mark.parametrize(
    ("architecture", "pooling"), [("vit", "last"), ("siglip_vision_model", "last"), ("siglip_vision_model", "cls")]
)
def test_a_pooling_that_cannot_be(seeing_model: Callable[[str], Path], architecture: str, pooling: str) -> None:
    backbone = load(seeing_model(architecture))
    refused(f'model.pooling = "{pooling}"', lambda: ImageClassification(backbone, 2, pooling=pooling))


def test_the_digest_knows_how_pictures_become_pixels(seeing_model: Callable[[str], Path], copy: Path) -> None:
    assert load(copy).digest == load(seeing_model("vit")).digest
    change(copy, "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3])
    assert load(copy).digest != load(seeing_model("vit")).digest
