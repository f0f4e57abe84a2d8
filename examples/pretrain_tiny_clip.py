"""A small CLIP from nothing, as an ordinary Hugging Face folder: what the image-text recipes run on.

    python examples/pretrain_tiny_clip.py                # 50 minutes; kill it and start it again, and it goes on
    python examples/pretrain_tiny_clip.py --steps 2000   # the same weights every time

Pictures of 36 pixels in patches of 6, two towers of four layers, trained on the pretraining parts of `prepare_data.py`:
emoji with their Unicode names (contrastive, both ways), Fashion-MNIST with prompts around its ten classes. Retrieval
among held-out emoji and zero-shot accuracy on held-out Fashion-MNIST are in ``quality.json`` beside the weights.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pretraining import arguments, begin, budget_of, finish, pretrain
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, PreTrainedTokenizerFast

SIDE, PATCH, LENGTH = 36, 6, 48
# CLIP in transformers reads an end-of-text id of 2 as "of an old file": ours is 1.
PAD, EOS, BOS = "<|pad|>", "<|endoftext|>", "<|startoftext|>"
PROMPTS = ("a photo of a {}.", "a photo of a {}", "a picture of a {}.", "this is a {}.", "{}")
CAPTIONS = ("{}", "{}", "a picture of {}.", "an emoji: {}")
FLIPPED = ("Animals & Nature", "Food & Drink", "Smileys & Emotion", "People & Body", "Objects")
"""Groups whose pictures mean the same in a mirror, where the name does not tell a side."""
SHIFT = 3

Pairs = dict[str, np.ndarray]


def read(folder: Path) -> tuple[Pairs, Pairs]:
    """The emoji and the fashion pictures, column by column."""
    found = []
    for name in ("emoji", "fashion"):
        try:
            with np.load(folder / f"{name}.npz", allow_pickle=False) as file:
                found.append(dict(file))
        except OSError as error:
            raise SystemExit(f"{error}; run examples/prepare_data.py first") from None
    return found[0], found[1]


def make_tokenizer(texts: list[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of lower-case text, between begin and end as CLIP's own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, EOS, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in (BOS, EOS)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {EOS}", pair=f"{BOS} $A $B {EOS}", special_tokens=ids
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, model_max_length=LENGTH
    )


def make_model(tokenizer: PreTrainedTokenizerFast, image: int, text: int, layers: int) -> CLIPModel:
    """Towers so wide, both projected to the width of the text's."""
    both = {"num_hidden_layers": layers, "hidden_act": "gelu", "projection_dim": text}
    config = CLIPConfig(
        text_config={
            **both,
            "vocab_size": len(tokenizer),
            "hidden_size": text,
            "intermediate_size": 4 * text,
            "num_attention_heads": max(1, text // 32),
            "max_position_embeddings": LENGTH,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            **both,
            "hidden_size": image,
            "intermediate_size": 4 * image,
            "num_attention_heads": max(1, image // 32),
            "image_size": SIDE,
            "patch_size": PATCH,
        },
        projection_dim=text,
    )
    return CLIPModel(config)


def make_processor() -> CLIPImageProcessor:
    size = {"height": SIDE, "width": SIDE}
    return CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3, do_convert_rgb=True
    )


def pixels(images: np.ndarray) -> torch.Tensor:
    """What the image processor makes of pictures of this size."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def flippable(groups: np.ndarray, captions: np.ndarray) -> np.ndarray:
    sided = np.array([any(word in caption for word in ("left", "right", "clock")) for caption in captions])
    return np.isin(groups, FLIPPED) & ~sided


def augment(images: np.ndarray, mirrored: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Shifted by a few pixels, a little lighter or darker and of another hue, half of those that may be in a mirror."""
    wide = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    moved = np.empty_like(images)
    mirrored = mirrored & (generator.random(len(images)) < 0.5)
    for i, (top, left) in enumerate(generator.integers(0, 2 * SHIFT + 1, (len(images), 2))):
        moved[i] = wide[i, top : top + SIDE, left : left + SIDE]
    moved[mirrored] = moved[mirrored, :, ::-1]
    gain = generator.uniform(0.85, 1.15, (len(images), 1, 1, 1)) * generator.uniform(0.94, 1.06, (len(images), 1, 1, 3))
    return np.clip(moved * gain, 0, 255).astype(np.uint8)


class Towers:
    """A CLIP and its tokenizer: pictures and texts to unit vectors."""

    def __init__(self, model: CLIPModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer

    def images(self, images: np.ndarray) -> torch.Tensor:
        out = self.model.vision_model(pixel_values=pixels(images).to(self.model.device))
        return F.normalize(self.model.visual_projection(out.pooler_output).float(), dim=-1)

    def texts(self, texts: list[str]) -> torch.Tensor:
        told = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.model.device)
        out = self.model.text_model(input_ids=told["input_ids"], attention_mask=told["attention_mask"])
        return F.normalize(self.model.text_projection(out.pooler_output).float(), dim=-1)

    def scale(self) -> torch.Tensor:
        return self.model.logit_scale.float().clamp(max=4.6).exp()


@torch.no_grad()
def retrieval(towers: Towers, emoji: Pairs) -> dict[str, Any]:
    """How often a picture's own name is the nearest of all names, and a name's own picture of all pictures."""
    near = towers.images(emoji["image"]) @ towers.texts(emoji["caption"].tolist()).T
    own = torch.arange(len(near), device=near.device)
    first, second = ((near.argmax(dim=axis) == own).float().mean().item() for axis in (1, 0))
    among = near.argsort(dim=1, descending=True)[:, :5]
    fifth = (among == own[:, None]).any(dim=1).float().mean().item()
    found = {"image_to_text": first, "image_to_text_top5": fifth, "text_to_image": second, "chance": 1 / len(near)}
    return {"pairs": len(near), **{name: round(value, 4) for name, value in found.items()}}


@torch.no_grad()
def zero_shot(towers: Towers, fashion: Pairs) -> dict[str, Any]:
    """Accuracy by the nearest prompt."""
    classes = sorted(set(fashion["label"].tolist()))
    prompts = towers.texts([PROMPTS[0].format(name) for name in classes])
    chunks = np.array_split(np.arange(len(fashion["image"])), max(1, len(fashion["image"]) // 256))
    answers = [(towers.images(fashion["image"][chunk]) @ prompts.T).argmax(dim=1).cpu().numpy() for chunk in chunks]
    right = np.array(classes)[np.concatenate(answers)] == fashion["label"]
    return {"pictures": len(right), "accuracy": round(float(right.mean()), 4), "chance": 1 / len(classes)}


def main(given: list[str] | None = None, **options: Any) -> None:
    parser = arguments(__doc__, "models/tiny-clip")
    parser.add_argument("--vocabulary", type=int, default=1024)
    parser.add_argument("--image-width", type=int, default=160)
    parser.add_argument("--text-width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=64, help="emoji a step; half as many fashion pictures")
    chosen = parser.parse_args(given)
    begin(chosen)

    emoji, fashion = read(chosen.data / "pretraining")
    classes = sorted(set(fashion["label"].tolist()))
    spoken = [form.format(name) for form in PROMPTS for name in classes]
    tokenizer = make_tokenizer([*emoji["caption"].tolist(), *spoken], chosen.vocabulary)
    model = make_model(tokenizer, chosen.image_width, chosen.text_width, chosen.layers).to(chosen.device)
    if chosen.device == "cpu":
        model.set_attn_implementation("eager")  # faster than SDPA for so few tokens
    towers = Towers(model, tokenizer)
    mirrored = flippable(emoji["group"], emoji["caption"])
    labels = np.searchsorted(classes, fashion["label"])
    pairs, half = min(chosen.pairs, len(emoji["image"])), min(chosen.pairs // 2, len(labels))

    def loss(generator: np.random.Generator) -> torch.Tensor:
        # No emoji twice in a batch: its other copy would count as wrong.
        some = generator.choice(len(emoji["image"]), pairs, replace=False)
        others = generator.choice(len(labels), half, replace=False)
        pictures = np.concatenate([emoji["image"][some], fashion["image"][others]])
        may = np.concatenate([mirrored[some], np.ones(half, bool)])
        prompt = PROMPTS[generator.integers(len(PROMPTS))]
        captions = [CAPTIONS[generator.integers(len(CAPTIONS))].format(text) for text in emoji["caption"][some]]
        images = towers.images(augment(pictures, may, generator))
        texts = towers.texts([*captions, *(prompt.format(name) for name in classes)])
        near = towers.scale() * images @ texts.T
        own = torch.arange(pairs, device=near.device)
        contrast = near[:pairs, :pairs]
        named = torch.from_numpy(labels[others]).to(near.device)
        by_class = F.cross_entropy(near[pairs:, pairs:], named)
        return 0.5 * (F.cross_entropy(contrast, own) + F.cross_entropy(contrast.T, own)) + by_class

    digest = hashlib.sha256(emoji["image"].tobytes() + fashion["image"].tobytes()).hexdigest()
    told = {"seed": chosen.seed, "pairs": chosen.pairs, "config": model.config.to_json_string(), "data": digest}
    spent = pretrain(model, loss, chosen.to, budget_of(chosen), told, lr=1e-3, weight_decay=0.2, **options)

    model.save_pretrained(chosen.to)
    tokenizer.save_pretrained(chosen.to)
    make_processor().save_pretrained(chosen.to)
    emoji, fashion = read(chosen.data / "heldout")
    described = {"parameters": model.num_parameters(), "seed": chosen.seed, **spent}
    finish(
        chosen.to,
        {**described, "heldout": {"emoji": retrieval(towers, emoji), "fashion": zero_shot(towers, fashion)}},
    )


if __name__ == "__main__":
    main()
