"""What clients end with: their models, taken away or asked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from folklora.cli.common import Json, RunFolder, Tuned
from folklora.terminal import err, out, print_json


def export(
    path: RunFolder,
    client: Annotated[str, typer.Option(help="The client's id")],
    to: Annotated[Path, typer.Option(help="New folder")],
    base: Annotated[
        str | None, typer.Option(help="What it names as its base model; default: as that is called here, path or not")
    ] = None,
    tuned: Tuned = False,
) -> None:
    """Write one client's adapter as a stock PEFT LoRA folder, with its head."""
    from folklora.federation.handover import export as library_export
    from folklora.federation.run import recipe_of

    out.print(f"adapter: {library_export(path, client, to, tuned=tuned, base=base)}", soft_wrap=True)
    model = recipe_of(path).model
    coarse = f"of {model.bits} bits (model.bits)" if model.bits else f"kept by {model.quantize} (model.quantize)"
    if model.bits or model.quantize != "none":
        err.print(
            f"note: it was trained on a backbone {coarse}; on the full-precision backbone that stock PEFT loads "
            "beside it, its answers differ a little",
            soft_wrap=True,
        )


def merge(
    path: RunFolder,
    client: Annotated[str, typer.Option(help="The client's id")],
    to: Annotated[Path, typer.Option(help="New folder")],
    tuned: Tuned = False,
) -> None:
    """Write one client's whole model as an ordinary checkpoint: the base's weights with the adapter in them."""
    from folklora.federation.handover import merge as library_merge

    out.print(f"model: {library_merge(path, client, to, tuned=tuned)}", soft_wrap=True)


def predict(
    path: RunFolder,
    client: Annotated[str, typer.Option(help="The client's id")],
    text: Annotated[
        list[str] | None, typer.Argument(help="Texts; with pictures: those to choose from", show_default=False)
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture's file (repeatable)")] = None,
    as_json: Json = False,
) -> None:
    """Ask one client's own model: classify texts or pictures, choose the texts that fit a picture, answer prompts."""
    from folklora.federation.answers import predict as library_predict

    answers = library_predict(path, client, text or (), image or ())
    if as_json:
        print_json(answers)
        return
    for answer in answers:
        asked = answer["image"] if "image" in answer else answer["text"]
        if "answer" in answer:
            out.print(answer["answer"], soft_wrap=True)
        for found in answer.get("ranking", [answer] if "label" in answer else []):
            what = found["label"] if "label" in found else found["text"]
            out.print(f"{what}  ({100 * found['probability']:.1f} %)  {asked}", soft_wrap=True)


def chat(
    path: RunFolder,
    client: Annotated[str, typer.Option(help="The client's id")],
    prompt: Annotated[str | None, typer.Option(help="One question; default: lines from standard input")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most")] = 256,
    temperature: Annotated[float, typer.Option(min=0, max=100, help="0: always the likeliest token")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from the likeliest, with this probability")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn")] = 0,
    tuned: Tuned = False,
    as_json: Json = False,
) -> None:
    """Talk with one client's own model: /reset forgets what was said, /quit or Ctrl-D ends."""
    from folklora.federation.chat import open_conversation
    from folklora.talk import talk
    from folklora.training.generation import Sampling

    sampling = Sampling(temperature, top_p, seed)
    conversation = open_conversation(path, client, tuned=tuned, max_new_tokens=max_new_tokens, sampling=sampling)
    talk(conversation, prompt, as_json=as_json)
