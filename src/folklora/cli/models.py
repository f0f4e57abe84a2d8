"""What clients end with: their models, taken away or asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from folklora.cli.common import Json, Precision, RunFolder, Tuned
from folklora.terminal import err, out, print_json, still


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
    _say_depth(to)


def merge(
    path: RunFolder,
    client: Annotated[str, typer.Option(help="The client's id")],
    to: Annotated[Path, typer.Option(help="New folder")],
    tuned: Tuned = False,
) -> None:
    """Write one client's whole model as an ordinary checkpoint: the base's weights with the adapter in them."""
    from folklora.federation.handover import merge as library_merge

    out.print(f"model: {library_merge(path, client, to, tuned=tuned)}", soft_wrap=True)
    _say_depth(to)


def _say_depth(folder: Path) -> None:
    """What no file of a folder can make stock libraries do."""
    use = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    if use.get("depth") != use.get("full_depth"):
        err.print(
            f"note: this client applies the shared block {use['depth']} times; stock libraries apply it "
            f"{use['full_depth']} times and answer otherwise: docs/depth.md has the loop in a few lines",
            soft_wrap=True,
        )


def predict(
    path: RunFolder,
    client: Annotated[str | None, typer.Option(help="The client's id", show_default=False)] = None,
    text: Annotated[
        list[str] | None, typer.Argument(help="Texts; with pictures: those to choose from", show_default=False)
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="A picture's file (repeatable)")] = None,
    requests: Annotated[
        Path | None,
        typer.Option(help='Instead: a JSONL file, {"client": ..., "text": ...} a line', show_default=False),
    ] = None,
    to: Annotated[Path | None, typer.Option("--out", help="New file for the answers to --requests")] = None,
    dtype: Precision = "float32",
    depth: Annotated[
        str | None,
        typer.Option(help='Steps through a shared block, or "auto"; default: as the run has it', show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of a language model's answer, at most; default: eval.max_new_tokens", show_default=False
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Ask clients' own models: classify texts or pictures, choose the texts that fit a picture, answer prompts."""
    if requests is not None:
        from folklora.federation.requests import lines_of, predict_requests

        if client is not None or text or image:
            raise typer.BadParameter("it says whom and what to ask", param_hint="--requests")
        if depth is not None:
            raise typer.BadParameter("requests are answered as the run has it", param_hint="--depth")
        answers = predict_requests(path, requests, to, precision=dtype, max_new_tokens=max_new_tokens)
        if as_json:
            print_json(answers)
        elif to is None:
            sys.stdout.write(lines_of(answers))
        else:
            out.print(f"answers: {to}", soft_wrap=True)
        return
    from folklora.federation.answers import predict as library_predict

    if client is None or to is not None:
        raise typer.BadParameter("give --client with texts or pictures, or --requests (with or without --out)")
    answers = library_predict(
        path, client, text or (), image or (), precision=dtype, depth=_steps(depth), max_new_tokens=max_new_tokens
    )
    if as_json:
        print_json(answers)
        return
    for answer in answers:
        asked = answer["image"] if "image" in answer else answer["text"]
        if "answer" in answer:
            said = answer["answer"]
            sys.stdout.write(still(_diverged(client, asked) if said is None else said) + "\n")
        for found in answer.get("ranking", [answer] if "label" in answer else []):
            what = found["label"] if "label" in found else found["text"]
            chance = found["probability"]
            said = _diverged(client, asked) if chance is None else f"{what}  ({100 * chance:.1f} %)  {asked}"
            out.print(still(said), soft_wrap=True)


def _diverged(client: str, asked: str) -> str:
    return f"no finite number: the model of client {client} diverged  {asked}"


def _steps(depth: str | None) -> int | Literal["auto"] | None:
    if depth is None or depth == "auto":
        return "auto" if depth else None
    if not depth.isdecimal() or len(depth) > 4:
        raise typer.BadParameter(f'{depth!r}; allowed: "auto", or a number of steps', param_hint="--depth")
    return int(depth)


def evaluate(
    path: RunFolder,
    split: Annotated[
        Literal["validation", "test"], typer.Option(help="test: of finished runs, which have read it")
    ] = "validation",
    dtype: Precision = "float32",
    as_json: Json = False,
) -> None:
    """Score the models that a run's clients ended with once more, as they are served."""
    from folklora.backbones.metric import metric_of
    from folklora.federation.rescoring import evaluate as library_evaluate

    found = library_evaluate(path, split, precision=dtype)
    if as_json:
        print_json(found)
        return
    metric = metric_of(found)
    said = f"{metric.name} on {split}, {len(found['clients'])} clients, {dtype}: {metric.show(found['mean'])}"
    beside = f"; the run said {metric.show(found['run'])}" if "run" in found else ""
    out.print(f"{said}, worst tenth {metric.show(found['worst_tenth'])}{beside}", soft_wrap=True)


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
