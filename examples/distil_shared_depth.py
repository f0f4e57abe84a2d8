"""A sentence encoder whose one block is applied several times, distilled from MiniLM: an ordinary ALBERT folder.

    python examples/distil_shared_depth.py                  # 50 minutes; kill it and start it again, and it goes on
    python examples/distil_shared_depth.py --steps 3000     # the same weights every time

The student has its teacher's tokenizer, width and number of layers T, but the T layers are one (AlbertModel with one
group of one layer). It is trained over depths (arXiv 2310.12818): each batch draws a number of steps K and walks
``x <- x + T/K (Block(x) - x)``, which at K = T is the stock model, until its last states and their mean are its
teacher's. So it can be run, and fine-tuned, with fewer steps than T. The texts are the pretraining parts of
`prepare_data.py`, messages and their sentences; Banking77 and SNIPS are not among them. ``quality.json`` states for
every K the cosine to the teacher on held-out texts, and what probes on the embeddings of Banking77's training rows
reach, beside the teacher's own.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretraining import arguments, begin, budget_of, finish, precision, pretrain
from torch import nn
from torch.nn import functional as F
from transformers import AlbertConfig, AlbertModel, AutoModel, BertModel

from folklora.backbones.loading import pretrained, tokenizer_of

SOURCES = ("dolly", "shakespeare", "gsm8k", "sgd")
DEPTHS = {2: 0.1, 3: 0.3, 4: 0.25, 6: 0.35}
"""Steps of a batch -> how often: the full depth most, because it is what the others are measured by."""
LONGEST = 64

LAYER = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.dense",
    "attention.output.LayerNorm": "attention.LayerNorm",
    "intermediate.dense": "ffn",
    "output.dense": "ffn_output",
    "output.LayerNorm": "full_layer_layer_norm",
}
"""The parts of a BertLayer -> those of an AlbertLayer, which computes the same."""

PART = {"attention.dense": 0.2, "ffn_output": 0.2}
"""What the student's block begins with of these, which write into the residual stream."""


# -- texts -------------------------------------------------------------------------------------------------------------


def read(folder: Path) -> dict[str, list[str]]:
    """Name of a source -> its texts, each once: every message and every sentence of it."""
    found = {}
    for name in SOURCES:
        path = folder / f"{name}.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise SystemExit(f"{path}: {error.strerror}; run examples/prepare_data.py first") from None
        contents = [message["content"] for line in lines if line for message in json.loads(line)["messages"]]
        pieces = (piece.strip() for text in contents for piece in (text, *re.split(r"\n+|(?<=[.!?])\s+", text)))
        found[name] = sorted({piece for piece in pieces if piece})
    return found


def encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, with the special tokens, cut where they are too many."""
    return tokenizer(list(texts), truncation=True, max_length=LONGEST)["input_ids"] if texts else []


@dataclass(frozen=True)
class Corpus:
    """Texts sorted by their length, so that a batch of one length has nothing to pad.

    Attributes
    ----------
    rows
        Length -> the texts of this length, [texts, length].
    """

    rows: dict[int, np.ndarray]

    @classmethod
    def draw(cls, tokenizer: Any, texts: Sequence[str], most: int, seed: int) -> Corpus:
        """Texts in a drawn order, until they have this many tokens together."""
        order = np.random.default_rng([seed, 1]).permutation(len(texts))
        by_length: dict[int, list[list[int]]] = {}
        total = 0
        for start in range(0, len(order), 1000):
            for ids in encode(tokenizer, [texts[i] for i in order[start : start + 1000]]):
                if total < most:
                    by_length.setdefault(len(ids), []).append(ids)
                    total += len(ids)
            if total >= most:
                break
        return cls({length: np.array(by_length[length], np.int32) for length in sorted(by_length)})

    @property
    def tokens(self) -> int:
        return sum(each.size for each in self.rows.values())

    def batches(self, tokens: int) -> Iterator[np.ndarray]:
        """All texts in their order, about so many tokens at once."""
        for length, rows in self.rows.items():
            size = max(1, tokens // length)
            yield from (rows[i : i + size] for i in range(0, len(rows), size))

    def digest(self) -> str:
        return hashlib.sha256(b"".join(each.tobytes() for each in self.rows.values())).hexdigest()


@torch.no_grad()
def teach(teacher: BertModel, corpus: Corpus, path: Path, device: torch.device) -> np.ndarray:
    """The teacher's last states of all tokens, [tokens, width] in float16: computed once, and held in a file.

    What a killed run has written is kept: the file only grows, a batch at a time.
    """
    width = teacher.config.hidden_size
    done = path.stat().st_size // (2 * width) if path.exists() else 0
    position, shown = 0, time.monotonic()
    with path.open("r+b" if path.exists() else "w+b") as file:
        for batch in corpus.batches(4096):
            if position + batch.size > done:
                file.seek(2 * width * position)
                with precision(device):
                    states = teacher(input_ids=torch.from_numpy(batch).long().to(device)).last_hidden_state
                file.write(states.to(torch.float16).cpu().numpy().tobytes())
            position += batch.size
            if time.monotonic() - shown > 15:
                print(f"teacher: {100 * position / corpus.tokens:.0f} % of its states", file=sys.stderr, flush=True)
                shown = time.monotonic()
        file.truncate(2 * width * position)
    return np.memmap(path, np.float16, "r", shape=(position, width))


# -- the student -------------------------------------------------------------------------------------------------------


def make_student(teacher: BertModel) -> AlbertModel:
    """One block for all of the teacher's layers, and its embeddings, which stay as they are.

    The block begins as the last layer, whose LayerNorm makes states of the teacher's size, with a smaller part in the
    residual stream: T layers one behind the other have T parts in it, and a step of any length is then a small one.
    (Tried for a hundred steps each: beside the mean of all layers, and layers as they are.)
    """
    config = teacher.config
    student = AlbertModel(
        AlbertConfig(
            vocab_size=config.vocab_size,
            embedding_size=config.hidden_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_hidden_groups=1,
            inner_group_num=1,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            hidden_act=config.hidden_act,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=config.max_position_embeddings,
            type_vocab_size=config.type_vocab_size,
            layer_norm_eps=config.layer_norm_eps,
            pad_token_id=config.pad_token_id,
            bos_token_id=None,
            eos_token_id=None,
        ),
        add_pooling_layer=False,
    )
    student.embeddings.load_state_dict(teacher.embeddings.state_dict())
    nn.init.eye_(student.encoder.embedding_hidden_mapping_in.weight)
    nn.init.zeros_(student.encoder.embedding_hidden_mapping_in.bias)
    block, last = block_of(student), teacher.encoder.layer[-1].state_dict()
    for of, to in LAYER.items():
        part = block.get_submodule(to)
        part.load_state_dict({kind: last[f"{of}.{kind}"] * PART.get(to, 1.0) for kind in ("weight", "bias")})
    for part in (student.embeddings.word_embeddings, student.embeddings.position_embeddings):
        part.requires_grad_(False)
    return student


def block_of(student: AlbertModel) -> nn.Module:
    return student.encoder.albert_layer_groups[0].albert_layers[0]


def walk(student: AlbertModel, ids: torch.Tensor, steps: int) -> torch.Tensor:
    """The states after so many steps over the whole depth, of texts of one length."""
    x = student.encoder.embedding_hidden_mapping_in(student.embeddings(ids))
    block, size = block_of(student), student.config.num_hidden_layers / steps
    for _ in range(steps):
        x = block(x) if size == 1 else torch.lerp(x, block(x).to(x.dtype), size)
    return x


def distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Of the states, relative to what the teacher's are in size, and of the texts' embeddings: one minus the cosine."""
    student = student.float()
    states = (student - teacher).square().sum() / teacher.square().sum()
    return states + (1 - F.cosine_similarity(student.mean(1), teacher.mean(1), dim=-1)).mean()


# -- how good it is ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def embed(texts: Sequence[list[int]], states: Any, device: torch.device) -> torch.Tensor:
    """Mean of the last states of each text, of length one: [texts, width], in the texts' order."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, torch.Tensor] = {}
    at = 0
    while at < len(order):
        length = len(texts[order[at]])
        chosen = [i for i in order[at : at + max(1, 4096 // length)] if len(texts[i]) == length]
        ids = torch.tensor([texts[i] for i in chosen], device=device)
        with precision(device):
            mean = states(ids).float().mean(1)
        found.update(zip(chosen, F.normalize(mean, dim=-1).cpu(), strict=True))
        at += len(chosen)
    return torch.stack([found[i] for i in range(len(texts))])


def probe(embeddings: torch.Tensor, labels: Sequence[str], texts: Sequence[str]) -> dict[str, float]:
    """Accuracy on a fifth of the rows, chosen by a hash of their texts, of two probes fitted to the rest.

    The label of most of the five nearest (by cosine; of equal ones the nearest), and ridge regression to the labels.
    """
    names = sorted(set(labels))
    y = torch.tensor([names.index(label) for label in labels])
    held = torch.tensor([hashlib.sha256(text.strip().lower().encode()).digest()[0] < 51 for text in texts])
    x, test, known = embeddings[~held].double(), embeddings[held].double(), y[~held]
    near, rows = (test @ x.T).topk(min(5, len(x)), dim=1)
    votes = torch.zeros(len(test), len(names), dtype=torch.float64).scatter_add_(1, known[rows], 1 + 1e-3 * near)
    x, test = (torch.cat([each, torch.ones(len(each), 1, dtype=each.dtype)], 1) for each in (x, test))
    weights = torch.linalg.solve(x.T @ x + 0.1 * torch.eye(x.shape[1]).double(), x.T @ F.one_hot(known).double())
    return {
        "nearest": round((votes.argmax(1) == y[held]).double().mean().item(), 4),
        "linear": round(((test @ weights).argmax(1) == y[held]).double().mean().item(), 4),
    }


def quality(
    student: AlbertModel, teacher: BertModel, tokenizer: Any, heldout: dict[str, list[str]], rows: list[dict[str, str]]
) -> dict[str, Any]:
    """For every number of steps what its embeddings are worth, beside the teacher's."""
    device = student.device
    texts, labels = [row["text"] for row in rows], [row["category"] for row in rows]
    ids = {name: encode(tokenizer, each) for name, each in heldout.items()}
    ids_of_probe = encode(tokenizer, texts)

    def states_of_teacher(ids: torch.Tensor) -> torch.Tensor:
        return teacher(input_ids=ids).last_hidden_state

    theirs = {name: embed(each, states_of_teacher, device) for name, each in ids.items()}
    found: dict[str, Any] = {
        "texts": {name: len(each) for name, each in ids.items()},
        "teacher": {"probe": probe(embed(ids_of_probe, states_of_teacher, device), labels, texts)},
    }
    for steps in range(1, student.config.num_hidden_layers + 1):

        def states(ids: torch.Tensor, steps: int = steps) -> torch.Tensor:
            return walk(student, ids, steps)

        cosines = {
            name: (embed(each, states, device) * theirs[name]).sum(1).mean().item() for name, each in ids.items()
        }
        found[f"{steps} steps"] = {
            "cosine": {name: round(value, 4) for name, value in cosines.items()},
            "probe": probe(embed(ids_of_probe, states, device), labels, texts),
        }
    return found


def main(given: list[str] | None = None, **options: Any) -> None:
    parser = arguments(__doc__, "models/tiny-albert")
    parser.add_argument("--teacher", default="minilm", help="a BERT whose mean of states embeds a text")
    parser.add_argument("--tokens", type=int, default=256, help="tokens a step")
    parser.add_argument(
        "--full-depth-alone",
        action="store_true",
        help="draw no other depth: what training over depths is compared with",
    )
    parser.add_argument("--most", type=int, default=600_000, help="tokens of the texts that are drawn to learn from")
    parser.add_argument("--heldout", type=int, default=500, help="texts of each held-out source that are measured")
    parser.add_argument("--probed", type=int, default=4000, help="rows of --banking that are")
    parser.add_argument(
        "--banking", type=Path, default=Path("../shared/data/banking77/train.csv"), help="rows for the probes alone"
    )
    chosen = parser.parse_args(given)
    begin(chosen)
    try:
        with chosen.banking.open(encoding="utf-8", newline="") as file:
            rows_of_probe = list(csv.DictReader(file))
    except OSError as error:
        raise SystemExit(f"{chosen.banking}: {error.strerror}; name Banking77's train.csv with --banking") from None

    device = torch.device(chosen.device)
    tokenizer = tokenizer_of(chosen.teacher)
    teacher = pretrained(chosen.teacher, AutoModel, unused="pooler.").to(device).eval()
    texts = sorted({text for each in read(chosen.data / "pretraining").values() for text in each})
    corpus = Corpus.draw(tokenizer, texts, chosen.most, chosen.seed)
    cache = chosen.to / f"teacher-{corpus.digest()[:16]}.f16"
    taught = teach(teacher, corpus, cache, device)
    student = make_student(teacher).to(device)
    if device.type == "cpu":
        student.set_attn_implementation("eager")  # faster than SDPA on texts this short

    lengths = list(corpus.rows)
    sizes = np.array([corpus.rows[length].size for length in lengths])
    starts = dict(zip(lengths, np.concatenate([[0], np.cumsum(sizes)]), strict=False))
    full = student.config.num_hidden_layers
    fewer = {} if chosen.full_depth_alone else {steps: share for steps, share in DEPTHS.items() if steps < full}
    depths = fewer | {full: DEPTHS[max(DEPTHS)]}
    odds = np.array(list(depths.values())) / sum(depths.values())

    def loss(generator: np.random.Generator) -> torch.Tensor:
        steps = int(generator.choice(list(depths), p=odds))
        length = int(generator.choice(lengths, p=sizes / sizes.sum()))
        rows = corpus.rows[length]
        drawn = np.sort(generator.choice(len(rows), min(len(rows), max(1, chosen.tokens // length)), replace=False))
        at = starts[length] + drawn[:, None] * length + np.arange(length)
        target = torch.from_numpy(taught[at].astype(np.float32)).to(device)
        return distance(walk(student, torch.from_numpy(rows[drawn]).long().to(device), steps), target)

    told = {
        "seed": chosen.seed,
        "tokens": chosen.tokens,
        "config": student.config.to_json_string(),
        "data": corpus.digest(),
        "depths": sorted(depths),
    }
    spent = pretrain(student, loss, chosen.to, budget_of(chosen), told, lr=1e-3, weight_decay=0.01, **options)

    student.save_pretrained(chosen.to)
    tokenizer.save_pretrained(chosen.to)
    draw = np.random.default_rng([chosen.seed, 2])

    def some(of: list[Any], most: int) -> list[Any]:
        return [of[i] for i in sorted(draw.choice(len(of), min(len(of), most), replace=False))]

    heldout = {name: some(each, chosen.heldout) for name, each in read(chosen.data / "heldout").items()}
    measured = quality(student, teacher, tokenizer, heldout, some(rows_of_probe, chosen.probed))
    described = {
        "parameters": student.num_parameters(),
        "parameters_of_the_block": sum(p.numel() for p in block_of(student).parameters()),
        "texts": sum(len(rows) for rows in corpus.rows.values()),
        "tokens": corpus.tokens,
        "seed": chosen.seed,
        "depths": sorted(depths),
        **spent,
    }
    finish(chosen.to, {**described, "heldout": measured})
    cache.unlink()


if __name__ == "__main__":
    main()
