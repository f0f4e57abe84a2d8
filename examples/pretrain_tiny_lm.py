"""A small language model from nothing, as an ordinary Hugging Face folder: what the text-generation recipes run on.

    python examples/pretrain_tiny_lm.py                  # 50 minutes; kill it and start it again, and it goes on
    python examples/pretrain_tiny_lm.py --steps 3000     # the same weights every time

A byte-level BPE of 4096 tokens with a chat template, and a Llama of four million parameters, trained on the pretraining
parts of `prepare_data.py` in that template: instructions (dolly), sums (gsm8k), dialogues (sgd), speeches
(shakespeare), packed into rows of 256 tokens. The loss on held-out text is in ``quality.json`` beside the weights.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pretraining import arguments, begin, budget_of, finish, pretrain
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SHARES = {"dolly": 0.5, "shakespeare": 0.16, "gsm8k": 0.17, "sgd": 0.17}
"""Of the tokens seen: what the recipes are about comes more often than its size says."""

PAD, BOS, EOS = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = ("<|system|>", "<|user|>", "<|assistant|>")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
LENGTH = 256

Document = list[dict[str, str]]


def read(folder: Path) -> dict[str, list[Document]]:
    """Name of a source -> its documents: lists of chat messages."""
    found = {}
    for name in SHARES:
        path = folder / f"{name}.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").split("\n")
        except OSError as error:
            raise SystemExit(f"{path}: {error.strerror}; run examples/prepare_data.py first") from None
        found[name] = [json.loads(line)["messages"] for line in lines if line]
    return found


def make_tokenizer(documents: dict[str, list[Document]], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every text can be told, digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Replace(Regex("\r\n?"), "\n")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[PAD, BOS, EOS, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (message["content"] for each in documents.values() for document in each for message in document)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=list(ROLES),
        model_max_length=LENGTH,
    )
    made.chat_template = TEMPLATE
    return made


def as_text(document: Document) -> str:
    """What the chat template makes of it (a test holds them together), without its cost a call."""
    return BOS + "".join(f"<|{message['role']}|>{message['content']}{EOS}" for message in document)


def stream(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> np.ndarray:
    """All documents one behind the other, as token ids."""
    found = tokenizer.backend_tokenizer.encode_batch([as_text(each) for each in documents], add_special_tokens=False)
    return np.concatenate([np.array(each.ids, np.int32) for each in found])


def make_model(tokenizer: PreTrainedTokenizerFast, width: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=max(8, round(width * 8 / 3 / 32) * 32),
        num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64),
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attention_dropout=0.0,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def measure(model: LlamaForCausalLM, tokens: np.ndarray, bytes_a_token: float, most: int = 60_000) -> dict[str, Any]:
    """Loss in nats a token, perplexity, and bits a byte of the text, over at most so many tokens."""
    length = min(LENGTH, len(tokens))
    rows = min(len(tokens), most) // length
    windows = torch.from_numpy(tokens[: rows * length].astype(np.int64)).view(rows, length).to(model.device)
    loss = sum(model(input_ids=each, labels=each).loss.item() * len(each) for each in windows.split(16)) / rows
    return {
        "tokens": rows * (length - 1),
        "loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 2),
        "bits_per_byte": round(loss / math.log(2) / bytes_a_token, 4),
    }


def main(given: list[str] | None = None, **options: Any) -> None:
    parser = arguments(__doc__, "models/tiny-lm")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rows", type=int, default=8, help=f"rows of {LENGTH} tokens a step")
    chosen = parser.parse_args(given)
    begin(chosen)

    documents = read(chosen.data / "pretraining")
    tokenizer = make_tokenizer(documents, chosen.vocabulary)
    streams = {name: stream(tokenizer, each) for name, each in documents.items()}
    device = torch.device(chosen.device)
    model = make_model(tokenizer, chosen.width, chosen.layers).to(device)
    if device.type == "cpu":
        model.set_attn_implementation("eager")  # rows this short: a fifth faster than SDPA
    names, shares = list(SHARES), list(SHARES.values())
    span = np.arange(LENGTH)

    def loss(generator: np.random.Generator) -> torch.Tensor:
        rows = []
        for name in generator.choice(names, chosen.rows, p=shares):
            tokens = streams[name]
            rows.append(tokens[(generator.integers(len(tokens)) + span) % len(tokens)])
        batch = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device)
        return model(input_ids=batch, labels=batch).loss

    digest = hashlib.sha256(b"".join(tokens.tobytes() for tokens in streams.values())).hexdigest()
    told = {"seed": chosen.seed, "rows": chosen.rows, "config": model.config.to_json_string(), "data": digest}
    spent = pretrain(model, loss, chosen.to, budget_of(chosen), told, lr=2e-3, **options)

    model.save_pretrained(chosen.to)
    tokenizer.save_pretrained(chosen.to)
    quality = {}
    for name, each in read(chosen.data / "heldout").items():
        tokens = stream(tokenizer, each)
        size = sum(len(message["content"].encode()) for document in each for message in document)
        quality[name] = measure(model, tokens, size / len(tokens))
    seen = spent["steps"] * chosen.rows * LENGTH
    described = {"parameters": model.num_parameters(), "tokens_seen": seen, "seed": chosen.seed, **spent}
    finish(chosen.to, {**described, "heldout": quality})


if __name__ == "__main__":
    main()
